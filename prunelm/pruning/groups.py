"""Groups: the smallest things that can go, as arrays of equals in one place.

A `Groups` is every group of one kind in one place: the heads of a block, the elements of a weight,
the rank components of a linear. It knows which slices of which parameters belong to each group and
how many parameters each holds. Criteria fold weights and gradients along these slices, budgets add
up the costs, and `compact` removes what is not kept: nobody else knows a shape.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from prunelm.nn import LowRankLinear


@dataclass(frozen=True)
class Rows:
    """Slices along one axis of a parameter, which has the layout [outer, count, inner] there.

    Where `segments` are given they are the inner sizes of each of the outer parts, which then may
    differ; the last `tail` positions belong to no group and stay.
    `scored` is False where the group is already represented by another part: a rank component's
    mask multiplies the product of two factors, and so counts once.
    """

    name: str
    count: int
    axis: int = 0
    outer: int = 1
    scored: bool = True
    segments: tuple[int, ...] = ()
    tail: int = 0

    def fold(self, tensor: Tensor) -> Tensor:
        """[count, n]: everything of `tensor` (the parameter's shape) that belongs to each group."""
        rows = tensor.movedim(self.axis, 0)
        rows = rows[: len(rows) - self.tail]
        if self.segments:
            cut = torch.split(rows, [self.count * inner for inner in self.segments])
            return torch.cat([part.reshape(self.count, -1) for part in cut], 1)
        rows = rows.reshape(self.outer, self.count, -1)
        return rows.transpose(0, 1).reshape(self.count, -1)

    def positions(self, keep: Tensor, length: int) -> Tensor:
        """Kept positions along the axis, which is `length` long; keep [count] bool."""
        inner = (length - self.tail) // (self.outer * self.count) if self.count else 1
        segments = self.segments or (inner,) * self.outer
        kept = torch.cat([keep.repeat_interleave(inner) for inner in segments])
        return torch.cat([kept, kept.new_ones(self.tail)]).nonzero()[:, 0]

    def left(self, length: int, staying: int) -> int:
        """How long the axis, `length` now, is with so many groups."""
        return self.tail + (length - self.tail) * staying // max(self.count, 1)

    def mask(self, keep: Tensor, shape: Sequence[int]) -> Tensor:
        """True where a parameter of `shape` is kept; keep [count] bool."""
        kept = torch.zeros(shape[self.axis], dtype=torch.bool, device=keep.device)
        kept[self.positions(keep, shape[self.axis])] = True
        view = [1] * len(shape)
        view[self.axis] = -1
        return kept.view(view).expand(tuple(shape))


@dataclass(frozen=True)
class Tiles:
    """(bn, bk) blocks of a parameter [N, K], row by row; those at the edges may be cut."""

    name: str
    shape: tuple[int, int]
    block: tuple[int, int]
    scored: bool = True

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along N and along K."""
        return -(-self.shape[0] // self.block[0]), -(-self.shape[1] // self.block[1])

    def fold(self, tensor: Tensor) -> Tensor:
        """[count, bn * bk] of `tensor` [N, K]; past the edges stand zeros."""
        (rows, columns), (bn, bk) = self.grid, self.block
        if self.block == (1, 1):
            return tensor.reshape(-1, 1)
        padded = tensor.new_zeros(rows * bn, columns * bk)
        padded[: self.shape[0], : self.shape[1]] = tensor
        return padded.view(rows, bn, columns, bk).transpose(1, 2).reshape(rows * columns, bn * bk)

    def mask(self, keep: Tensor, shape: Sequence[int]) -> Tensor:
        """True where a parameter [N, K] is kept; keep [count] bool."""
        grid = keep.view(self.grid)
        full = grid.repeat_interleave(self.block[0], 0).repeat_interleave(self.block[1], 1)
        return full[: shape[0], : shape[1]]


@dataclass(frozen=True)
class Groups:
    """All groups of one kind in one place.

    Args:
        kind: "head", "neuron", "rank", "element" or "block"; a method may bring its own word.
        place: a module or parameter name, for reports.
        parts: the slices; what holds for one holds for all.
        cost: [count] int64, parameters that go with each group.
        kept: [count] bool, False where a group has gone already (masks; shrunk ones just vanish).
        shrinks: True: the parameters become smaller. False: they are masked.
        min_keep: so many always stay, against layer collapse.
        multiple_of: what stays is a multiple of it.
        cap: the place never counts more than this (a dense weight against its factors).
        whole: parameters that vanish with the last group.
        counters: (module, attribute) that hold a multiple of `count` and shrink with it.
    """

    kind: str
    place: str
    parts: tuple[Rows | Tiles, ...]
    cost: Tensor
    kept: Tensor
    shrinks: bool
    min_keep: int = 0
    multiple_of: int = 1
    cap: int | None = None
    whole: tuple[str, ...] = ()
    counters: tuple[tuple[str, str], ...] = ()

    @property
    def count(self) -> int:
        """How many groups, gone ones included."""
        return len(self.cost)

    def fold(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """[count, n] of the scored parts, side by side; `tensors` by parameter name."""
        folded = [part.fold(tensors[part.name]) for part in self.parts if part.scored]
        return folded[0] if len(folded) == 1 else torch.cat(folded, 1)


class Evidence(Protocol):
    """What a criterion may ask of the data; `seed` is for those that draw numbers."""

    @property
    def seed(self) -> int: ...

    def mean_gradient(self, model: nn.Module, batches: int) -> dict[str, Tensor]:
        """Gradient of the mean loss over all samples, by parameter name."""
        ...


class Criterion(Protocol):
    """What losing each group costs.

    `in_loss_units`: scores add up to a rise of the loss. `batches`: how many it reads; 0: none.
    """

    @property
    def in_loss_units(self) -> bool: ...

    @property
    def batches(self) -> int: ...

    def score(self, model: nn.Module, groups: Sequence[Groups], evidence: Evidence) -> list[Tensor]:
        """One [count] float tensor per `Groups`, not divided by cost; lowest goes first."""
        ...


class Method(Protocol):
    """What can go. `prepare` may rewrite the model without changing its function."""

    def prepare(self, model: nn.Module) -> nn.Module: ...

    def groups(self, model: nn.Module, masks: Mapping[str, Tensor]) -> list[Groups]: ...


class Schedule(Protocol):
    """How much goes when."""

    def sizes(self, start: int, target: int) -> tuple[int, ...]:
        """Parameters after each round; the last is `target`."""
        ...


def outputs(
    parameters: Mapping[str, Tensor],
    linear: str,
    count: int,
    outer: int | tuple[int, ...] = 1,
    tail: int = 0,
) -> list[Rows]:
    """The parts of a dense or factorised linear that hold its output features.

    Args:
        outer: so many equal segments, or the inner sizes of each, see `Rows`.
        tail: rows at the end that stay.
    """
    weight = f"{linear}.up" if f"{linear}.up" in parameters else f"{linear}.weight"
    names = [weight] + [f"{linear}.bias"] * (f"{linear}.bias" in parameters)
    if isinstance(outer, int):
        return [Rows(name, count, 0, outer, tail=tail) for name in names]
    return [Rows(name, count, 0, segments=outer, tail=tail) for name in names]


def inputs(parameters: Mapping[str, Tensor], linear: str, count: int) -> list[Rows]:
    """The part of a dense or factorised linear that reads its input features."""
    weight = f"{linear}.down" if f"{linear}.down" in parameters else f"{linear}.weight"
    return [Rows(weight, count, 1)]


def out_features(parameters: Mapping[str, Tensor], linear: str) -> int:
    """N of a dense or factorised linear."""
    weight = parameters.get(f"{linear}.up")
    return (parameters[f"{linear}.weight"] if weight is None else weight).shape[0]


def marginal_cost(
    parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor], parts: Sequence[Rows | Tiles]
) -> Tensor:
    """[count] int64, parameters that each group holds now, masked ones left out.

    A linear that is written as factors but counts as dense (see `size`) costs what it counts.
    """
    total: Tensor | None = None
    for part in parts:
        if part.name in masks:
            cost = part.fold(masks[part.name]).sum(1)
        elif isinstance(part, Tiles):
            weight = parameters[part.name]
            cost = part.fold(torch.ones(weight.shape, device=weight.device)).sum(1).long()
        else:
            weight = parameters[part.name]
            across = weight.numel() // max(weight.shape[part.axis], 1)
            rows = weight.shape[part.axis] - part.tail
            per_group = rows // max(part.count, 1) * across
            stem, _, leaf = part.name.rpartition(".")
            if leaf in ("up", "down") and counts_dense(parameters, stem):
                n, k = parameters[f"{stem}.up"].shape[0], parameters[f"{stem}.down"].shape[1]
                across = k if part.axis == 0 else n
                per_group = rows // max(part.count, 1) * across
            cost = torch.full((part.count,), per_group, device=parameters[part.name].device)
        total = cost if total is None else total + cost
    assert total is not None
    return total.cpu()


def largest_useful_rank(n: int, k: int) -> int:
    """The highest rank at which factors of a [N, K] weight are smaller than the weight."""
    return max(math.ceil(n * k / (n + k)) - 1, 0) if n and k else 0


def counts_dense(parameters: Mapping[str, Tensor], linear: str) -> bool:
    """True where the factors of a linear are no smaller than the dense weight."""
    up, down = parameters[f"{linear}.up"], parameters[f"{linear}.down"]
    return up.shape[1] > largest_useful_rank(up.shape[0], down.shape[1])


def factorised(model: nn.Module) -> list[str]:
    """Names of the linears that are written as factors and could be a dense weight again."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear) and module.activation is None
    ]


def prunable_weights(model: nn.Module, embedding: bool) -> dict[str, nn.Parameter]:
    """The 2-d parameters, each tied one once, with or without embedding tables."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name: weight
        for name, weight in model.named_parameters()
        if weight.dim() == 2 and (embedding or id(weight) not in tables)
    }
