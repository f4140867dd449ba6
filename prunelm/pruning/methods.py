"""What can go. A method is a class with `prepare` and `groups`, see `groups.Method`.

`a | b` joins methods under one budget. `min_keep` is a floor against layer collapse: a global
ranking may otherwise empty a layer, which no fine-tuning repairs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prunelm.pruning.architecture import Architecture, Found, is_sized_by_config, joined
from prunelm.pruning.compact import factorise
from prunelm.pruning.groups import (
    Groups,
    Method,
    Rows,
    Tiles,
    largest_useful_rank,
    marginal_cost,
    prunable_weights,
)
from prunelm.pruning.parts import check_part
from prunelm.pruning.resizing import state_of
from prunelm.training.settings import check_types


class _Joinable:
    """Gives a method `a | b`."""

    def __or__(self, other: Method) -> "Joined":
        mine = self.methods if isinstance(self, Joined) else (self,)
        theirs = other.methods if isinstance(other, Joined) else (other,)
        return Joined((*mine, *theirs))


@dataclass(frozen=True)
class Joined(_Joinable):
    """Several methods under one budget; made by `a | b`."""

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        for method in self.methods:
            check_part("method", method)
        kinds = [type(method) for method in self.methods]
        if LowRank in kinds and (Elements in kinds or Blocks in kinds):
            raise ValueError(
                "method: expected LowRank without Elements or Blocks, whose masks would be on "
                "weights that it rewrites; prune twice instead"
            )
        if len(set(kinds)) < len(kinds):
            names = " | ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"method: expected each kind once, got {names}")

    def prepare(self, model: nn.Module) -> nn.Module:
        """Prepared by every method in turn."""
        for method in self.methods:
            model = method.prepare(model)
        return model

    def groups(self, model: nn.Module, masks: Mapping[str, Tensor]) -> list[Groups]:
        """The groups of all."""
        return [groups for method in self.methods for groups in method.groups(model, masks)]


@dataclass(frozen=True)
class Elements(_Joinable):
    """Single weights of the 2-d parameters, masked. Biases and norms stay.

    Args:
        min_keep: fraction of each weight that always stays.
        embedding: whether embedding tables (a tied head is the same table) take part.
    """

    min_keep: float = 0.02
    embedding: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        _check_fraction(self.min_keep)

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model as it is."""
        return model

    def groups(self, model: nn.Module, masks: Mapping[str, Tensor]) -> list[Groups]:
        """One `Groups` per weight."""
        return _tiles(
            model, masks, "element", block=(1, 1), min_keep=self.min_keep, embedding=self.embedding
        )


@dataclass(frozen=True)
class Blocks(_Joinable):
    """(bn, bk) blocks of the 2-d parameters, masked; `accelerate` makes them fast.

    Args:
        bn, bk: rows and columns of a block; blocks at the edges may be cut.
        min_keep: fraction of each weight's blocks that always stays.
        embedding: whether embedding tables take part; no kernel makes their lookup faster.
    """

    bn: int = 16
    bk: int = 16
    min_keep: float = 0.02
    embedding: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("bn", "bk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        _check_fraction(self.min_keep)

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model as it is."""
        return model

    def groups(self, model: nn.Module, masks: Mapping[str, Tensor]) -> list[Groups]:
        """One `Groups` per weight."""
        return _tiles(
            model,
            masks,
            "block",
            block=(self.bn, self.bk),
            min_keep=self.min_keep,
            embedding=self.embedding,
        )


@dataclass(frozen=True)
class Heads(_Joinable):
    """Attention heads: their query, key and value rows and their output columns.

    Where query heads share key and value heads, a group is one key and value head with all its
    query heads; where all share a single one, it stays, and query heads go one by one.

    Args:
        min_keep: groups that stay in every block; with 0 the attention half of a block of this
            project's models may vanish, other modules keep at least 1.
        architecture: the names of the parts in a model of another make.
    """

    min_keep: int = 1
    architecture: Architecture = field(default_factory=Architecture)

    def __post_init__(self) -> None:
        check_types(self)
        _check_count("min_keep", self.min_keep, 0)

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model as it is."""
        return model

    def groups(self, model: nn.Module, masks: Mapping[str, Tensor]) -> list[Groups]:
        """One `Groups` per block that has heads."""
        names = self.architecture.attention_norms
        return [
            _structure("head", model, each, masks, names, min_keep=self.min_keep)
            for each in self.architecture.attentions(model)
        ]


@dataclass(frozen=True)
class Neurons(_Joinable):
    """Feed-forward neurons: a row of the first linear, its bias, a column of the second.

    Args:
        multiple_of: a block keeps a multiple of this many.
        min_keep: neurons that stay in every block; with 0 the feed-forward half of a block of this
            project's models may vanish, other modules keep at least 1.
        architecture: the names of the parts in a model of another make.
    """

    multiple_of: int = 1
    min_keep: int = 8
    architecture: Architecture = field(default_factory=Architecture)

    def __post_init__(self) -> None:
        check_types(self)
        _check_count("multiple_of", self.multiple_of, 1)
        _check_count("min_keep", self.min_keep, 0)

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model as it is."""
        return model

    def groups(self, model: nn.Module, masks: Mapping[str, Tensor]) -> list[Groups]:
        """One `Groups` per block that has a feed-forward half."""
        return [
            _structure(
                "neuron",
                model,
                each,
                masks,
                self.architecture.ff_norms,
                min_keep=min(self.min_keep, each.count),
                multiple_of=self.multiple_of,
            )
            for each in self.architecture.neurons(model)
        ]


@dataclass(frozen=True)
class LowRank(_Joinable):
    """Rank components u_k s_k v_k' of the linears in the blocks: the incremental variant.

    Every linear is rewritten exactly as factors (a factorised one is made orthogonal again by QR
    and an SVD of the small core, never of the product); components are groups like any other and
    go round by round, with fine-tuning of the balanced factors U sqrt(s), sqrt(s) V' in between.
    A linear counts as min(dense, factors): at or above break-even it is a dense weight again, so
    that its first components go together or not at all.

    Args:
        multiple_of: ranks below break-even are a multiple of it.
        min_keep: components that stay in every linear.
    """

    multiple_of: int = 1
    min_keep: int = 1
    architecture: Architecture = field(default_factory=Architecture)

    def __post_init__(self) -> None:
        check_types(self)
        _check_count("multiple_of", self.multiple_of, 1)
        _check_count("min_keep", self.min_keep, 1)

    def prepare(self, model: nn.Module) -> nn.Module:
        """A copy whose linears are factors U s, V' with orthonormal U and V; the same function."""
        return factorise(model, list(self.architecture.linears(model)))

    def groups(self, model: nn.Module, masks: Mapping[str, Tensor]) -> list[Groups]:
        """One `Groups` per linear of a prepared model."""
        parameters, found = state_of(model), []
        for linear in self.architecture.linears(model):
            up, down = parameters[f"{linear}.up"], parameters[f"{linear}.down"]
            (n, rank), k = up.shape, down.shape[1]
            if largest_useful_rank(n, k) < self.min_keep:
                continue
            parts = (Rows(f"{linear}.up", rank, 1), Rows(f"{linear}.down", rank, 0, scored=False))
            found.append(
                Groups(
                    "rank",
                    linear,
                    parts,
                    cost=torch.full((rank,), n + k),
                    kept=torch.ones(rank, dtype=torch.bool),
                    shrinks=True,
                    min_keep=min(self.min_keep, rank),
                    multiple_of=self.multiple_of,
                    cap=n * k,
                )
            )
        return found


def _tiles(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    kind: str,
    *,
    block: tuple[int, int],
    min_keep: float,
    embedding: bool,
) -> list[Groups]:
    found, parameters = [], dict(model.named_parameters())
    for name, weight in prunable_weights(model, embedding).items():
        shape = (weight.shape[0], weight.shape[1])
        # A block past the edges holds no more weights, only padding that would fill the memory.
        cut = (min(block[0], max(shape[0], 1)), min(block[1], max(shape[1], 1)))
        part = Tiles(name, shape, cut)
        cost = marginal_cost(parameters, masks, [part])
        floor = math.ceil(min_keep * len(cost))
        found.append(Groups(kind, name, (part,), cost, cost > 0, False, min_keep=floor))
    if not found:
        tables = not embedding and prunable_weights(model, True)
        what, hint = ("beside embeddings", "; see embedding=True") if tables else ("", "")
        expected = f"2-d parameters {what}".strip()
        got = type(model).__name__
        raise ValueError(f"model: expected {expected}, got {got} without any{hint}")
    return found


def _structure(
    kind: str,
    model: nn.Module,
    found: Found,
    masks: Mapping[str, Tensor],
    norms: tuple[str, ...],
    *,
    min_keep: int,
    multiple_of: int = 1,
) -> Groups:
    parameters = dict(model.named_parameters())
    cost = marginal_cost(parameters, masks, found.parts)
    kept = torch.ones(len(cost), dtype=torch.bool)
    whole: tuple[str, ...] = ()
    if is_sized_by_config(model):
        halves = tuple(joined(found.place, name) + "." for name in (*found.linears, *norms))
        whole = tuple(name for name in parameters if name.startswith(halves))
    else:  # a module that knows nothing of empty halves
        min_keep = max(min_keep, 1)
    return Groups(
        kind,
        found.place,
        found.parts,
        cost,
        kept,
        True,
        min_keep=min_keep,
        multiple_of=multiple_of,
        whole=whole,
        counters=found.counters,
    )


def _check_fraction(min_keep: float) -> None:
    if not 0.0 <= min_keep < 1.0:
        raise ValueError(f"min_keep: expected a fraction in [0, 1), got {min_keep}")


def _check_count(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
