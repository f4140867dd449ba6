"""Exact parameter budgets: which groups go so that a model has the size asked.

Groups go in the order of score per parameter. The result is never above the target, and short of
it by less than the cheapest remaining group. Costs of different kinds overlap (a head removed makes
a rank component cheaper), so a `Ledger` counts what would really be left, and every choice is
checked against it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunelm.pruning.groups import Groups, Rows

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def parse_target(target: str | int, dense: int) -> int:
    """Parameters that "5M", "800k", "40%" (of `dense`) or an int mean; rounded down.

    Raises:
        ValueError: anything else, or more than `dense`.
    """
    size: int | None = None
    if isinstance(target, int) and not isinstance(target, bool):
        size = target
    elif isinstance(target, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMbB]?|%)\s*", target)
        if match:
            number, unit = match.groups()
            whole, _, fraction = number.partition(".")
            scale = 10 ** len(fraction)  # integers throughout: 0.29 * 100 is not 29
            value = int(whole + fraction)
            unit_size = _UNITS.get(unit.lower())
            size = value * (dense if unit_size is None else unit_size)
            size //= scale * (100 if unit_size is None else 1)
    if size is None:
        raise ValueError(f'target: expected "5M", "40%" or a number of parameters, got {target!r}')
    if not 0 < size <= dense:
        raise ValueError(f"target: expected 1 to {dense:,} parameters, the model's, got {size:,}")
    return size


class Ledger:
    """Counts the parameters of a model as they would be after groups have gone.

    Tied parameters count once, masked elements do not, and factors count as min(dense, factors).
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Groups] = (),
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.groups = groups
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.masks = {name: mask.cpu() for name, mask in (masks or {}).items()}
        tiled = {part.name for g in groups if not g.shrinks for part in g.parts}
        self.masked = tiled | set(self.masks)
        touched = {part.name for g in groups for part in g.parts} | self.masked
        touched |= {name for g in groups for name in g.whole}
        # The partner of a touched factor counts with it.
        for name in list(touched):
            stem, _, leaf = name.rpartition(".")
            if leaf in ("up", "down"):
                touched |= {f"{stem}.up", f"{stem}.down"} & set(self.shapes)
        self.fixed = self._total(
            {n: math.prod(s) for n, s in self.shapes.items() if n not in touched}, self.shapes
        )
        self.touched = touched

    def size(self, keep: Sequence[Tensor]) -> int:
        """Parameters left; keep: per `Groups`, [count] bool."""
        shapes = {name: list(self.shapes[name]) for name in self.touched}
        masks: dict[str, Tensor | None] = {n: self.masks.get(n) for n in self.masked}
        gone: set[str] = set()
        for each, kept in zip(self.groups, keep, strict=True):
            staying = int(kept.sum())
            if not staying:
                gone |= set(each.whole)
            for part in each.parts:
                if part.name in masks:
                    mask = part.mask(kept, self.shapes[part.name])
                    old = masks[part.name]
                    masks[part.name] = mask if old is None else mask & old
                if isinstance(part, Rows):
                    length = shapes[part.name][part.axis]
                    shapes[part.name][part.axis] = length * staying // max(part.count, 1)
        sizes = {}
        for name, shape in shapes.items():
            final = masks.get(name)
            if name not in gone:
                sizes[name] = math.prod(shape) if final is None else int(final.sum())
        return self.fixed + self._total(sizes, {n: tuple(s) for n, s in shapes.items()})

    def _total(self, sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> int:
        total = sum(sizes.values())
        for name, size in sizes.items():
            if name.endswith(".down") and f"{name[:-5]}.up" in sizes:
                factors = size + sizes[f"{name[:-5]}.up"]
                total -= max(factors - shapes[f"{name[:-5]}.up"][0] * shapes[name][1], 0)
        return total


def count_parameters(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> int:
    """Parameters of a model, tied ones once, masked elements not, factors at most as dense."""
    return Ledger(model, (), masks).size(())


@dataclass
class _Bundles:
    """What can be decided: one entry per bundle of groups that go together.

    Entries of one `Groups` are adjacent and in the order in which they go. Where `nested`, a bundle
    goes only after those before it.
    """

    key: Tensor  # [n] score per parameter, never falling within one Groups
    gain: Tensor  # [n] parameters
    owner: Tensor  # [n] which Groups
    upto: Tensor  # [n] groups of it that have gone after this bundle
    nested: list[bool]
    order: list[Tensor]  # per Groups, group indices, lowest score first

    def keep(self, groups: Sequence[Groups], dropped: Tensor) -> list[Tensor]:
        """Per `Groups`, [count] bool; dropped [n] bool."""
        result = []
        ends = torch.searchsorted(self.owner, torch.arange(len(groups) + 1)).tolist()
        for i, each in enumerate(groups):
            kept = each.kept.clone()
            part = slice(ends[i], ends[i + 1])
            if self.nested[i]:
                gone = self.upto[part][dropped[part]]
                kept[self.order[i][: int(gone.max()) if len(gone) else 0]] = False
            else:
                kept[self.order[i][: ends[i + 1] - ends[i]][dropped[part]]] = False
            result.append(kept)
        return result


def _bundle(groups: Sequence[Groups], scores: Sequence[Tensor]) -> _Bundles:
    keys, gains, owners, uptos, nested, orders = [], [], [], [], [], []
    for i, (each, score) in enumerate(zip(groups, scores, strict=True)):
        alive = each.kept.nonzero()[:, 0]
        per_parameter = score[alive].double() / each.cost[alive].clamp_min(1)
        if not bool(per_parameter.isfinite().all()):
            raise ValueError(f"scores: expected finite numbers for {each.kind}s of {each.place}")
        rank = per_parameter.argsort(stable=True)
        order = alive[rank]
        free = max(len(alive) - each.min_keep, 0)
        together = each.cap is not None or each.multiple_of > 1
        if together:
            key, gain, upto = _steps(each, score[order].double(), free)
        else:
            key, gain = per_parameter[rank][:free], each.cost[order][:free]
            upto = torch.arange(1, free + 1)
        keys.append(key)
        gains.append(gain)
        uptos.append(upto)
        owners.append(torch.full((len(key),), i))
        nested.append(together)
        orders.append(order)
    return _Bundles(
        torch.cat(keys), torch.cat(gains), torch.cat(owners), torch.cat(uptos), nested, orders
    )


def _steps(each: Groups, score: Tensor, free: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bundles of one `Groups` whose groups cost the same: (key, gain, upto).

    The first is what it takes to reach a multiple of `multiple_of`, or to get below `cap`. Keys are
    averages over runs of bundles such that they never fall (the lower convex hull of score against
    parameters): an expensive first bundle goes together with the cheap ones that it opens.
    """
    alive, cost = len(score), int(each.cost.max()) if each.count else 1
    uptos = []
    left = alive
    if each.cap is not None and left * cost >= each.cap:
        left = (each.cap - 1) // cost
    left -= left % each.multiple_of if left < alive or left % each.multiple_of else each.multiple_of
    while left >= alive - free and left >= 0:
        if left < alive:
            uptos.append(alive - left)
        left -= each.multiple_of

    def counted(rest: int) -> int:
        return rest * cost if each.cap is None else min(rest * cost, each.cap)

    losses, gains = [], []
    before = 0
    cumulative = torch.cat([score.new_zeros(1), score.cumsum(0)]).tolist()
    for upto in uptos:
        losses.append(cumulative[upto] - cumulative[before])
        gains.append(counted(alive - before) - counted(alive - upto))
        before = upto
    runs: list[list[float]] = []  # loss, gain, bundles
    for loss, gain in zip(losses, gains, strict=True):
        runs.append([loss, gain, 1])
        while len(runs) > 1 and runs[-2][0] * runs[-1][1] > runs[-1][0] * runs[-2][1]:
            last = runs.pop()
            runs[-1] = [a + b for a, b in zip(runs[-1], last, strict=True)]
    key = [run[0] / max(run[1], 1) for run in runs for _ in range(int(run[2]))]
    return (
        torch.tensor(key, dtype=torch.float64),
        torch.tensor(gains, dtype=torch.int64),
        torch.tensor(uptos, dtype=torch.int64),
    )


class _Choice:
    """Looks for the bundles that go."""

    def __init__(self, ledger: Ledger, bundles: _Bundles, target: int) -> None:
        self.ledger, self.bundles, self.target = ledger, bundles, target
        self.queue = bundles.key.argsort(stable=True)

    def size(self, dropped: Tensor) -> int:
        return self.ledger.size(self.bundles.keep(self.ledger.groups, dropped))

    def prefix(self, pinned: Tensor) -> Tensor | None:
        """The fewest bundles in order, without the pinned ones, that reach the target."""
        queue = self.queue[~pinned[self.queue]]

        def first(count: int) -> Tensor:
            dropped = torch.zeros(len(self.queue), dtype=torch.bool)
            dropped[queue[:count]] = True
            return dropped

        if self.size(first(len(queue))) > self.target:
            return None
        low, high = 0, len(queue)
        while low < high:
            middle = (low + high) // 2
            if self.size(first(middle)) <= self.target:
                high = middle
            else:
                low = middle + 1
        return first(low)

    def refill(self, dropped: Tensor) -> tuple[Tensor, int]:
        """Takes back what fits below the target, the most valuable first; (dropped, slack)."""
        refused = torch.zeros_like(dropped)
        slack = self.target - self.size(dropped)
        while True:
            candidates = dropped & ~refused & (self.bundles.gain <= slack) & self._last(dropped)
            indices = candidates.nonzero()[:, 0]
            if not slack or not len(indices):
                return dropped, slack
            indices = indices[self.bundles.key[indices].argsort(stable=True, descending=True)]
            fitting = int((self.bundles.gain[indices].cumsum(0) <= slack).sum())
            low, high = 0, max(fitting, 1)
            while low < high:
                middle = (low + high + 1) // 2
                trial = dropped.clone()
                trial[indices[:middle]] = False
                if self.size(trial) <= self.target:
                    low = middle
                else:
                    high = middle - 1
            if low:
                dropped = dropped.clone()
                dropped[indices[:low]] = False
                slack = self.target - self.size(dropped)
            else:
                refused[indices[0]] = True

    def _last(self, dropped: Tensor) -> Tensor:
        """True where a bundle may be taken back: anywhere, or at the end where nested."""
        nested = torch.tensor(self.bundles.nested)[self.bundles.owner]
        same = torch.zeros_like(dropped)
        same[:-1] = dropped[1:] & (self.bundles.owner[1:] == self.bundles.owner[:-1])
        return ~nested | ~same


def choose(
    model: nn.Module,
    groups: Sequence[Groups],
    scores: Sequence[Tensor],
    masks: Mapping[str, Tensor],
    target: int,
) -> list[Tensor]:
    """Per `Groups`, [count] bool of what is kept, so that at most `target` parameters are left.

    Args:
        model: prepared by the method that gave the groups.
        scores: per `Groups`, [count], what losing each group costs.

    Raises:
        ValueError: the target cannot be reached; says what can.
    """
    ledger = Ledger(model, groups, masks)
    everything = [each.kept for each in groups]
    if ledger.size(everything) <= target:
        return everything
    bundles = _bundle(groups, scores)
    choice = _Choice(ledger, bundles, target)
    pinned = torch.zeros(len(bundles.key), dtype=torch.bool)
    dropped = choice.prefix(pinned)
    if dropped is None:
        raise ValueError(unreachable(model, groups, masks, target))
    best, best_slack = choice.refill(dropped)
    dropped = best
    # A large group that overshoots gives way to smaller ones behind it in the order.
    for _ in range(64):
        cheapest = bundles.gain[~best].min() if bool((~best).any()) else 0
        large = (dropped & (bundles.gain > cheapest)).nonzero()[:, 0]
        if best_slack < cheapest or not len(large):
            break
        pinned[large[bundles.key[large].argmax()]] = True
        trial = choice.prefix(_tails(bundles, pinned))
        if trial is None:
            break
        dropped, slack = choice.refill(trial)
        if slack < best_slack:
            best, best_slack = dropped, slack
    return bundles.keep(groups, best)


def _tails(bundles: _Bundles, pinned: Tensor) -> Tensor:
    """Pinned bundles, and where nested all that could only go after them."""
    pinned = pinned.clone()
    for i, nested in enumerate(bundles.nested):
        own = (bundles.owner == i).nonzero()[:, 0]
        if nested and bool(pinned[own].any()):
            pinned[own[int(pinned[own].int().argmax()) :]] = True
    return pinned


def smallest(model: nn.Module, groups: Sequence[Groups], masks: Mapping[str, Tensor]) -> int:
    """Parameters left when everything goes that may go."""
    bundles = _bundle(groups, [torch.zeros(each.count) for each in groups])
    gone = torch.ones(len(bundles.key), dtype=torch.bool)
    return Ledger(model, groups, masks).size(bundles.keep(groups, gone))


def unreachable(
    model: nn.Module, groups: Sequence[Groups], masks: Mapping[str, Tensor], target: int
) -> str:
    """One line: the smallest reachable size, and what would lower it."""
    kinds = {each.kind for each in groups}
    touched = {part.name for each in groups for part in each.parts}
    untouched = {n: p.numel() for n, p in model.named_parameters() if n not in touched}
    ways = []
    if any(each.min_keep for each in groups):
        ways.append("a lower min_keep")
    if not kinds & {"element", "block"}:
        structured = {"head": "Heads()", "neuron": "Neurons()", "rank": "LowRank()"}
        ways += [f"adding {name}" for kind, name in structured.items() if kind not in kinds]
    if "element" not in kinds:
        ways.append("Elements()")
    if untouched:
        name, size = max(untouched.items(), key=lambda item: item[1])
        ways.append(f"a smaller {name} ({size:,})")
    return (
        f"target: expected at least {smallest(model, groups, masks):,} parameters, the smallest "
        f"that {', '.join(sorted(kinds))} groups can reach, got {target:,}; to get lower: "
        f"{', '.join(ways)}"
    )
