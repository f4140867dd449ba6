"""Joins a method, a criterion, a schedule and a recovery into one run."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunelm.data.runs import named
from prunelm.data.tokenizer import Tokenizer
from prunelm.nn import copied
from prunelm.pruning.architecture import is_sized_by_config
from prunelm.pruning.budget import Ledger, count_parameters, parse_target, smallest
from prunelm.pruning.budget import unreachable as unreachable_line
from prunelm.pruning.calibration import (
    Calibration,
    Data,
    Loss,
    broadcast,
    is_main_process,
    own_loss,
    process_count,
)
from prunelm.pruning.compact import remove
from prunelm.pruning.criteria import Magnitude, Taylor
from prunelm.pruning.groups import Criterion, Groups, Method, Schedule
from prunelm.pruning.journal import Entry, Journal
from prunelm.pruning.parts import check_part, listed
from prunelm.pruning.plan import Plan as Plan
from prunelm.pruning.recovery import Recovery, Wound
from prunelm.pruning.result import Result, Round
from prunelm.pruning.schedulers import OneShot
from prunelm.pruning.selection import choose
from prunelm.pruning.source import Source, opened, refuse_unfit
from prunelm.pruning.words import in_words
from prunelm.training.checkpoint import check_vocabulary
from prunelm.training.facts import config_facts, masks_digest
from prunelm.training.progress import Watch
from prunelm.training.settings import check_types

Validate = Callable[[nn.Module], float]
_REPORT_BATCHES = 8  # for the losses in a report, where the criterion needs no data


@dataclass(frozen=True)
class Pruner:
    """Prunes models to exact sizes.

    Args:
        method: what can go, such as `Heads() | Neurons()`.
        criterion: what losing it costs.
        schedule: when; a schedule runs from one size to the next.
        recovery: what heals after each round; None: nothing.
        seed: equal seeds give equal results.
    """

    method: Method
    criterion: Criterion = field(default_factory=Taylor)
    schedule: Schedule = field(default_factory=OneShot)
    recovery: Recovery | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("method", "criterion", "schedule"):
            check_part(name, getattr(self, name))
        if self.recovery is not None:
            check_part("recovery", self.recovery)

    def run(
        self,
        model: Source,
        target: str | int,
        data: Data | None = None,
        *,
        loss: Loss = own_loss,
        validate: Validate | None = None,
        tokenizer: Tokenizer | None = None,
        masks: Mapping[str, Tensor] | None = None,
        folder: Path | str | None = None,
        facts: Mapping[str, Any] | None = None,
        watch: Watch | None = None,
    ) -> Result:
        """A copy of `model` with at most `target` parameters, and as near as groups allow.

        Args:
            model: from `prunelm.load_lm(folder, accelerated=False)`, whose tokenizer, masks and
                chosen search go with it; or any module, also inside `torch.compile` or
                DistributedDataParallel (the result is not).
            target: "5M", "40%" of the present size, or a number of parameters.
            data: step -> batch, a pure function, such as `TokenBatches`; any batch that `loss`
                takes, see `calibration.samples_in` for what it weighs.
            loss: (model, batch) -> mean loss; by default the model's own.
            validate: a metric to report, lower is better, such as perplexity.
            tokenizer: what `Result.save` puts beside the model; None: the loaded model's own.
            masks: of an earlier result, whose zeros stay; None: the loaded model's own.
            folder: takes the state after each round; a later call with the same arguments resumes,
                one with any other is refused. One process at a time works in it.
            facts: JSON values that shape the result and that this method cannot see, such as
                digests of the data (`data.runs.file_fact`) and the batch's size.
            watch: is told what is under way: words, how much of it is done, of how much.

        Raises:
            ValueError: the target cannot be reached (says what can), data are needed and missing,
                weights are not finite, the model has been accelerated, the tokenizer is of another
                vocabulary, or a folder that holds another run or is in use.
            OSError: a file cannot be written; finished rounds stand.
        """
        results = self.ladder(
            model, [target], data, loss=loss, validate=validate, tokenizer=tokenizer,
            masks=masks, folder=folder, facts=facts, watch=watch,
        )  # fmt: skip
        return results[0]

    def ladder(
        self,
        model: Source,
        targets: Sequence[str | int],
        data: Data | None = None,
        *,
        loss: Loss = own_loss,
        validate: Validate | None = None,
        tokenizer: Tokenizer | None = None,
        masks: Mapping[str, Tensor] | None = None,
        folder: Path | str | None = None,
        facts: Mapping[str, Any] | None = None,
        watch: Watch | None = None,
        finished: Callable[[Result], None] | None = None,
    ) -> list[Result]:
        """One result per target, each made from the one before; arguments as for `run`.

        With a folder and a tokenizer, each result is saved in a folder of its own as it is made.

        Args:
            finished: is given each result as soon as it is there, so that it stands whatever comes
                of the smaller ones.

        Raises:
            ValueError: as for `run`, or targets that do not fall; says at which target a run of
                several stopped.
        """
        model, tokenizer, masks, chosen = opened(model, tokenizer, masks)
        refuse_unfit(model)
        targets, evidence = listed(targets), Calibration(data, loss)
        dense_size = count_parameters(model, masks)
        asked = [parse_target(target, dense_size) for target in targets]
        if not asked or any(b >= a for a, b in itertools.pairwise(asked)):
            raise ValueError(f"targets: expected falling sizes, got {targets}")
        check_vocabulary(config_facts(model), tokenizer)
        self._refuse_unreachable(model, masks, asked[-1], targets[-1])
        journal = Journal(Path(folder) if folder is not None else None)
        results: list[Result] = []
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), journal.hold():
            own = {
                **self.settings(), "targets": asked, "masks": masks_digest(masks),
                "loss": named(loss), "data": data is not None, "validation": validate is not None,
                "processes": process_count(),
            }  # fmt: skip
            journal.claim(model, {**own, **(facts or {})})
            run = _Run(self, model, evidence, validate, masks, journal, watch)
            for target, size in zip(targets, asked, strict=True):
                try:
                    run.descend(size, f"{target}, " if len(asked) > 1 else "")
                except (ValueError, OSError) as error:
                    _name_target(error, targets, len(results))
                    raise
                result = replace(run.result(target, size, tokenizer), chosen=chosen)
                results.append(result)
                if folder is not None and tokenizer is not None and is_main_process():
                    result.save(Path(folder) / f"size-{size}")
                if finished is not None:
                    finished(result)
        return results

    def plan(
        self,
        model: Source,
        target: str | int,
        data: Data | None = None,
        *,
        loss: Loss = own_loss,
        masks: Mapping[str, Tensor] | None = None,
        watch: Watch | None = None,
    ) -> Plan:
        """What one shot would take, and whether it can; nothing is changed.

        Without data a data-driven criterion is replaced by `Magnitude()`: sizes hold, places are
        an estimate.
        """
        model, _, masks, _ = opened(model, None, masks)
        refuse_unfit(model)
        dense_size = count_parameters(model, masks)
        asked = parse_target(target, dense_size)
        with torch.inference_mode(False):  # for gradients of what is made here
            prepared = self.method.prepare(model)
        groups = self.method.groups(prepared, masks)
        least = smallest(prepared, groups, masks)
        if least > asked:
            advice = unreachable_line(prepared, groups, masks, asked, target)
            return Plan(target, asked, least, dense_size, least, {}, {}, advice)
        criterion = (
            self.criterion if data is not None or not self.criterion.batches else Magnitude()
        )
        evidence = Calibration(data, loss, _seed(self.seed, 0), watch)
        with torch.inference_mode(False):
            scores = criterion.score(prepared, groups, evidence)
        keep = choose(prepared, groups, scores, masks, asked)
        size = Ledger(prepared, groups, masks).size(keep)
        places = {
            f"{each.kind} {each.place}": (int(kept.sum()), each.count)
            for each, kept in zip(groups, keep, strict=True)
        }
        return Plan(target, asked, size, dense_size, least, _gone(groups, keep), places)

    def _refuse_unreachable(
        self, model: nn.Module, masks: Mapping[str, Tensor], target: int, asked: str | int
    ) -> None:
        prepared = self.method.prepare(model)
        groups = self.method.groups(prepared, masks)
        if smallest(prepared, groups, masks) > target:
            raise ValueError(unreachable_line(prepared, groups, masks, target, asked))

    def settings(self) -> dict[str, str]:
        """The four axes and the seed in words."""
        names = ("method", "criterion", "schedule", "recovery", "seed")
        return {name: in_words(getattr(self, name)) for name in names}


class _Run:
    """One run's state: the model between rounds, and what has happened."""

    def __init__(
        self,
        pruner: Pruner,
        model: nn.Module,
        evidence: Calibration,
        validate: Validate | None,
        masks: Mapping[str, Tensor],
        journal: Journal,
        watch: Watch | None,
    ) -> None:
        self.pruner, self.validate = pruner, validate
        self.journal, self.watch, self.where = journal, watch, ""
        self.evidence = replace(evidence, watch=self.tell if watch is not None else None)
        self.dense = copied(model).eval()
        self.model, self.masks = copied(model).eval(), dict(masks)
        self.size = self.dense_size = count_parameters(model, masks)
        self.rounds: list[Round] = []
        self.steps = 0
        self.metric_dense: float | None = None
        batches = pruner.criterion.batches or _REPORT_BATCHES
        self.loss_batches = batches if evidence.data is not None else 0

    def tell(self, what: str, done: int, of: int) -> None:
        """Passes on what is under way, and where."""
        if self.watch is not None:
            self.watch(f"{self.where}: {what}", done, of)

    def descend(self, target: int, name: str) -> None:
        """All rounds down to `target`; those that the journal holds are read, not run."""
        sizes = self.pruner.schedule.sizes(self.size, target)
        for index, size in enumerate(sizes):
            self.where = f"{name}round {index + 1} of {len(sizes)}"
            position = len(self.rounds)
            entry = self.journal.read(position)
            last = index == len(sizes) - 1
            if entry is None:
                self.journal.check_batch(self.evidence.data)
                entry = self.round(size, index, len(sizes))
                self.journal.write(position, entry, self.model, self.masks, forget=index > 0)
            elif last or self.journal.read(position + 1) is None:
                self.model, self.masks = self.journal.weights(position, self.dense)
            self.rounds.append(entry.round)
            self.size, self.steps, self.metric_dense = (
                entry.round.size, entry.steps, entry.metric_dense,
            )  # fmt: skip

    def round(self, asked: int, index: int, count: int) -> Entry:
        """Removes groups down to `asked` parameters and recovers."""
        pruner, position = self.pruner, len(self.rounds)
        if self.validate is not None and self.metric_dense is None:
            self.metric_dense = self.validate(self.dense)
        seed = _seed(pruner.seed, position)
        evidence = replace(self.evidence, seed=seed)
        before = self.rounds[-1].loss_recovered if self.rounds else self.loss()
        prepared = pruner.method.prepare(self.model)
        groups = pruner.method.groups(prepared, self.masks)
        scores = pruner.criterion.score(prepared, groups, evidence)
        keep = choose(prepared, groups, scores, self.masks, asked)
        device = next(prepared.parameters()).device
        keep = broadcast(keep, device)
        predicted = None
        if pruner.criterion.in_loss_units:
            lost = zip(groups, scores, keep, strict=True)
            predicted = sum(float(score[each.kept & ~kept].sum()) for each, score, kept in lost)
        self.model, self.masks, _ = remove(prepared, groups, keep, self.masks)
        self.agree(device)
        pruned, metric_pruned = self.first_loss(), self.metric()
        recovered, metric, steps = pruned, metric_pruned, 0
        if pruner.recovery is not None:
            folder = self.journal.recovery_folder(position)
            wound = Wound(index, count, self.steps, seed, self.dense, folder, self.evidence.watch)
            steps = pruner.recovery(self.model, evidence, self.masks, wound)
            recovered, metric = self.loss(), self.metric()
        size = count_parameters(self.model, self.masks)
        record = Round(
            asked, size, _gone(groups, keep), predicted, before, pruned, recovered,
            metric_pruned, metric, steps,
        )  # fmt: skip
        return Entry(record, self.steps + steps, self.metric_dense)

    def agree(self, device: torch.device) -> None:
        """Process 0's weights for all, in case a decomposition rounds differently elsewhere."""
        weights = list(self.model.parameters())
        with torch.no_grad():
            for weight, agreed in zip(weights, broadcast(list(weights), device), strict=True):
                if agreed is not weight:
                    weight.copy_(agreed)

    def first_loss(self) -> float | None:
        """`loss` of a model that has just shrunk, which a forward of fixed sizes does not survive.

        ValueError then, naming the module.
        """
        try:
            return self.loss()
        except RuntimeError as error:
            if is_sized_by_config(self.model):
                raise
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"model: expected {type(self.model).__name__} to run at smaller sizes, got "
                f"{reason!r}; take sizes from shapes or from attributes that Architecture names"
            ) from error

    def loss(self) -> float | None:
        """Mean loss over the calibration batches, None without data."""
        if not self.loss_batches:
            return None
        return self.evidence.mean_loss(self.model, self.loss_batches)

    def metric(self) -> float | None:
        """What `validate` says."""
        return None if self.validate is None else self.validate(self.model)

    def result(self, target: str | int, asked: int, tokenizer: Tokenizer | None) -> Result:
        """The present model as a result of its own."""
        return Result(
            model=copied(self.model).eval(),
            masks=dict(self.masks),
            target=target,
            asked=asked,
            size=self.size,
            dense_size=self.dense_size,
            rounds=tuple(self.rounds),
            settings=self.pruner.settings(),
            metric_dense=self.metric_dense,
            tokenizer=tokenizer,
        )


def _seed(seed: int, position: int) -> int:
    """The seed of the round at `position`."""
    return (seed * 1009 + position) % 2**20


def _name_target(error: ValueError | OSError, targets: Sequence[str | int], done: int) -> None:
    """Adds to an error at which of several targets it arose, and what stands."""
    if len(targets) < 2 or str(error).startswith("target: "):
        return
    text = f"stopped at the target {targets[done]}"
    if done:
        text += f"; {', '.join(map(str, targets[:done]))} finished before"
    if isinstance(error, OSError):
        error.strerror = f"{error.strerror} ({text})"
    else:
        error.args = (f"{error} ({text})",)


def _gone(groups: Sequence[Groups], keep: Sequence[Tensor]) -> dict[str, int]:
    gone: dict[str, int] = {}
    for each, kept in zip(groups, keep, strict=True):
        gone[each.kind] = gone.get(each.kind, 0) + int((each.kept & ~kept).sum())
    return gone
