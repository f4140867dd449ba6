"""Chooses which groups go so that a model has the size asked.

Groups go in the order of score per parameter. The result is never above the target, and short of
it by less than the cheapest remaining group (where costs differ, as far as they can be combined to
it). Every choice is checked against the `Ledger`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunelm.pruning.budget import Ledger, reserve, unreachable
from prunelm.pruning.groups import Groups


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


def _bundle(groups: Sequence[Groups], scores: Sequence[Tensor], reserved: int = 0) -> _Bundles:
    """Bundles of all that may go.

    What stays in each `Groups` for its `min_keep` has the highest scores; in the first `reserved`
    of them it is the cheapest instead, with which alone some sizes are reached.
    """
    keys, gains, owners, uptos, nested, orders = [], [], [], [], [], []
    for i, (each, score) in enumerate(zip(groups, scores, strict=True)):
        alive = each.kept.nonzero()[:, 0]
        per_parameter = score[alive].double() / each.cost[alive].clamp_min(1)
        if not bool(per_parameter.isfinite().all()):
            raise ValueError(f"scores: expected finite numbers for {each.kind}s of {each.place}")
        if i < reserved:
            staying = reserve(each)[alive]
            per_parameter = per_parameter.masked_fill(staying, torch.inf)
        rank = per_parameter.argsort(stable=True)
        order = alive[rank]
        free = max(len(alive) - each.min_keep, 0)
        together = each.cap is not None or each.multiple_of > 1
        if together:
            key, gain, upto = _steps(each, score[order].double(), free)
        else:
            key, gain = per_parameter[rank][:free], each.cost[order][:free]
            # What is reserved stands last, and so has no bundle.
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

    def give_way(self, dropped: Tensor, slack: int) -> tuple[Tensor, int]:
        """Keeps large groups that overshoot, in favour of smaller ones behind them in the order."""
        bundles = self.bundles
        pinned = torch.zeros_like(dropped)
        trial, best = dropped, dropped
        for _ in range(64):
            large = (trial & (bundles.gain > self.cheapest(best))).nonzero()[:, 0]
            if slack < self.cheapest(best) or not len(large):
                break
            pinned[large[bundles.key[large].argmax()]] = True
            prefix = self.prefix(_tails(bundles, pinned))
            if prefix is None:
                break
            trial, left = self.refill(prefix)
            if left < slack:
                best, slack = trial, left
        return best, slack

    def swap(self, dropped: Tensor, slack: int) -> Tensor:
        """Exchanges one bundle for a slightly smaller one while that brings the size nearer."""
        key, gain = self.bundles.key, self.bundles.gain
        for _ in range(64):
            if slack < self.cheapest(dropped):
                break
            back = _best_by_gain(dropped & self._last(dropped), -key, gain)
            away = _best_by_gain(~dropped & self._next(dropped), key, gain)
            left = slack + gain[away][None, :] - gain[back][:, None]
            better = ((left >= 0) & (left < slack)).nonzero()
            better = better[left[better[:, 0], better[:, 1]].argsort(stable=True)][:32]
            for i, j in better.tolist():
                trial = dropped.clone()
                trial[back[i]], trial[away[j]] = False, True
                size = self.size(trial)
                if self.target - slack < size <= self.target:
                    dropped, slack = trial, self.target - size
                    break
            else:
                break
        return dropped

    def top_up(self, dropped: Tensor) -> Tensor:
        """Takes back what fits by the sizes that really result, until nothing does.

        Where kinds overlap, a group brings back less than it cost in the whole model.
        """
        groups, bundles = self.ledger.groups, self.bundles
        tiled = {part.name for g in groups if not g.shrinks for part in g.parts}
        tiled |= set(self.ledger.masks)
        while True:
            keep = bundles.keep(groups, dropped)
            slack = self.target - self.ledger.size(keep)
            candidates = dropped & self._last(dropped)
            best, best_key = -1, -torch.inf
            for i, each in enumerate(groups):
                own = (candidates & (bundles.owner == i)).nonzero()[:, 0]
                if not len(own):
                    continue
                own = own[bundles.key[own].argsort(stable=True, descending=True)]
                if bundles.nested[i] or not any(part.name in tiled for part in each.parts):
                    own = self._fitting(dropped, own)
                elif not slack:
                    continue
                else:
                    begin = int(torch.searchsorted(bundles.owner, i))
                    gains = self.ledger.gains(keep, i)[bundles.order[i][own - begin]]
                    own = own[(gains > 0) & (gains <= slack)]
                if len(own) and float(bundles.key[own[0]]) > best_key:
                    best, best_key = int(own[0]), float(bundles.key[own[0]])
            if best < 0:
                return dropped
            dropped = dropped.clone()
            dropped[best] = False

    def _fitting(self, dropped: Tensor, own: Tensor) -> Tensor:
        """Of bundles of one `Groups` without masks, which differ in score alone, the first fit."""
        trial = dropped.clone()
        trial[own[0]] = False
        return own[:1] if self.size(trial) <= self.target else own[:0]

    def cheapest(self, dropped: Tensor) -> int:
        """Parameters of the cheapest bundle left."""
        left = self.bundles.gain[~dropped & self._next(dropped)]
        return int(left.min()) if len(left) else 0

    def _next(self, dropped: Tensor) -> Tensor:
        """True where a bundle may go next: anywhere, or behind the last gone where nested."""
        nested = torch.tensor(self.bundles.nested)[self.bundles.owner]
        ready = torch.ones_like(dropped)
        ready[1:] = dropped[:-1] | (self.bundles.owner[1:] != self.bundles.owner[:-1])
        return ~nested | ready

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
    if not groups and ledger.size(everything) > target:
        raise ValueError(unreachable(model, groups, masks, target))
    if ledger.size(everything) <= target:
        return everything
    for reserved in range(len(groups) + 1):
        bundles = _bundle(groups, scores, reserved)
        choice = _Choice(ledger, bundles, target)
        dropped = choice.prefix(torch.zeros(len(bundles.key), dtype=torch.bool))
        if dropped is not None:
            break
    else:
        raise ValueError(unreachable(model, groups, masks, target))
    best, slack = choice.refill(dropped)
    best, slack = choice.give_way(best, slack)
    return bundles.keep(groups, choice.top_up(choice.swap(best, slack)))


def _tails(bundles: _Bundles, pinned: Tensor) -> Tensor:
    """Pinned bundles, and where nested all that could only go after them."""
    pinned = pinned.clone()
    for i, nested in enumerate(bundles.nested):
        own = (bundles.owner == i).nonzero()[:, 0]
        if nested and bool(pinned[own].any()):
            pinned[own[int(pinned[own].int().argmax()) :]] = True
    return pinned


def _best_by_gain(allowed: Tensor, key: Tensor, gain: Tensor) -> Tensor:
    """For each gain that occurs among the allowed bundles, the one with the lowest key."""
    indices = allowed.nonzero()[:, 0]
    indices = indices[key[indices].argsort(stable=True)]
    indices = indices[gain[indices].argsort(stable=True)]
    first = torch.ones(len(indices), dtype=torch.bool)
    first[1:] = gain[indices][1:] != gain[indices][:-1]
    return indices[first]
