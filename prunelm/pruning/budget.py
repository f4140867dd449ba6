"""Parameter budgets: what a target means, and what a model counts.

Costs of different kinds overlap (a head removed makes a rank component cheaper), so they do not add
up: a `Ledger` counts what would really be left.
"""

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from prunelm.pruning.groups import Groups, Rows, factorised

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
_NUMBER = re.compile(r"(\d+(?:_\d+)*|\d{1,3}(?:,\d{3})+)?(\.\d+)?(?:e([+-]?\d{1,2}))?")


def parse_target(target: str | float, dense: int) -> int:
    """Parameters that a size means, rounded down.

    Args:
        target: a number of parameters, also with a unit k, M, G or B ("800k", "5 M", "1e6",
            "5,000,000"); a share of `dense` in percent ("40%") or as a number below 1 (0.4).
        dense: parameters that the model has.

    Raises:
        ValueError: anything else, or more than `dense`.
    """
    size = _as_size(target, dense)
    if size is None:
        got = repr(target) if len(repr(target)) <= 60 else repr(target)[:57] + "..."
        raise ValueError(
            'target: expected "5M", "40%" or a number of parameters (units k, M, G, B; below 1, a '
            f"share of the model's), got {got}"
        )
    if not 0 < size <= dense:
        got = f"{size:,}" if abs(size) < 10**30 else "a number of more than 30 digits"
        raise ValueError(f"target: expected 1 to {dense:,} parameters, the model's, got {got}")
    return size


def _as_size(target: str | float, dense: int) -> int | None:
    if isinstance(target, numbers.Integral) and not isinstance(target, bool):
        return int(target)
    if isinstance(target, numbers.Real) and not isinstance(target, bool):
        target = repr(float(target))
    if not isinstance(target, str) or len(target) > 60:
        return None
    words = re.fullmatch(r"\s*([\d.,_]+(?:[eE][+-]?\d+)?)\s*([kKmMgGbB%]?)\s*", target)
    number = _NUMBER.fullmatch(words.group(1).lower()) if words else None
    if not words or not number or not (number.group(1) or number.group(2)):
        return None
    whole, fraction = re.sub("[,_]", "", number.group(1) or "0"), (number.group(2) or ".")[1:]
    # Fractions throughout: 0.29 * 100 is not 29.
    value = Fraction(int(whole + fraction), 10 ** len(fraction)) * Fraction(10) ** int(
        number.group(3) or 0
    )
    unit = words.group(2).lower()
    if unit == "%":
        return math.floor(value * dense / 100)
    if not unit and 0 < value < 1:
        return math.floor(value * dense)
    value *= _UNITS[unit]
    # 1.5 parameters are no size; 1.2345k is rounded down.
    return math.floor(value) if unit or value.denominator == 1 else None


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
        self.factors = set(factorised(model))
        for stem in self.factors:
            if {f"{stem}.up", f"{stem}.down"} & touched:
                touched |= {f"{stem}.up", f"{stem}.down"}
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
                    shapes[part.name][part.axis] = part.left(length, staying)
        sizes = {}
        for name, shape in shapes.items():
            final = masks.get(name)
            if name not in gone:
                sizes[name] = math.prod(shape) if final is None else int(final.sum())
        return self.fixed + self._total(sizes, {n: tuple(s) for n, s in shapes.items()})

    def gains(self, keep: Sequence[Tensor], index: int) -> Tensor:
        """[count], by how much each group of `groups[index]` that has gone would raise the size.

        For groups that go one by one and whose parts are no factors; those of factors cost the same
        each, which `size` tells.
        """
        each, kept = self.groups[index], keep[index]
        gains = torch.zeros(each.count, dtype=torch.int64)
        for part in each.parts:
            shape = self.shapes[part.name]
            alive = self.masks.get(part.name, torch.ones(shape, dtype=torch.bool))
            for i, (other, other_kept) in enumerate(zip(self.groups, keep, strict=True)):
                for their in other.parts:
                    if i != index and their.name == part.name:
                        alive = alive & their.mask(other_kept, shape)
                if i != index and part.name in other.whole and not bool(other_kept.any()):
                    alive = torch.zeros_like(alive)
            gains += part.fold(alive).sum(1)
        if not bool(kept.any()):
            inside = {part.name for part in each.parts}
            gains += sum(math.prod(self.shapes[name]) for name in each.whole if name not in inside)
            gains += sum(
                part.tail * math.prod(self.shapes[part.name]) // self.shapes[part.name][part.axis]
                for part in each.parts
                if isinstance(part, Rows) and part.name in each.whole
            )
        return gains

    def _total(self, sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> int:
        total = sum(sizes.values())
        for stem in self.factors:
            up, down = f"{stem}.up", f"{stem}.down"
            if up in sizes and down in sizes:
                total -= max(sizes[up] + sizes[down] - shapes[up][0] * shapes[down][1], 0)
        return total


def count_parameters(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> int:
    """Parameters of a model, tied ones once, masked elements not, factors at most as dense."""
    return Ledger(model, (), masks).size(())


def reserve(each: Groups) -> Tensor:
    """[count] bool, the groups that stay when all go that may: as few as can be, the cheapest."""
    alive = each.kept.nonzero()[:, 0]
    floor = min(each.min_keep + -each.min_keep % each.multiple_of, len(alive))
    kept = torch.zeros_like(each.kept)
    kept[alive[each.cost[alive].argsort(stable=True)][:floor]] = True
    return kept


def smallest(model: nn.Module, groups: Sequence[Groups], masks: Mapping[str, Tensor]) -> int:
    """Parameters left when everything goes that may go."""
    return Ledger(model, groups, masks).size([reserve(each) for each in groups])


def unreachable(
    model: nn.Module,
    groups: Sequence[Groups],
    masks: Mapping[str, Tensor],
    target: int,
    asked: str | int = "",
) -> str:
    """One line: the smallest reachable size, and what would lower it.

    Args:
        target: parameters.
        asked: the target as the user gave it; a small number may have been meant in percent.
    """
    if not groups:
        size = count_parameters(model, masks)
        return f"target: expected {size:,} parameters, as nothing can go, got {target:,}"
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
        + (f'; did you mean "{asked}%"?' if str(asked) == str(target) and target <= 100 else "")
    )
