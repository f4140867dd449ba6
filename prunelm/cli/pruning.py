"""`prunelm prune` and `prunelm plan`."""

import functools
import operator
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from prunelm.cli.arguments import Sizes
from prunelm.cli.numbers import at_least
from prunelm.cli.texts import known_lines
from prunelm.data.files import require_file
from prunelm.data.runs import (
    RUN,
    WORK,
    claim,
    file_fact,
    prepared,
    refuse_other_run,
    remove_work,
    work_folder,
)
from prunelm.data.text import TokenBatches, text_batches
from prunelm.metrics.perplexity import perplexity
from prunelm.pruning import (
    Blocks,
    Elements,
    Finetune,
    Heads,
    Incremental,
    LowRank,
    Magnitude,
    Neurons,
    OneShot,
    Pruner,
    Random,
    Taylor,
)
from prunelm.pruning import groups as protocols
from prunelm.pruning.recovery import Recovery
from prunelm.pruning.result import Result, load_result, read_masks
from prunelm.training.checkpoint import MODEL_FILES
from prunelm.training.facts import masks_digest
from prunelm.training.pretrained import LoadedLM, LoadedRecogniser, load_pretrained
from prunelm.training.progress import Watch, stages

AMethod = Heads | Neurons | Blocks | LowRank | Elements | protocols.Method
ACriterion = Taylor | Magnitude | Random | protocols.Criterion
ASchedule = OneShot | Incremental | protocols.Schedule
ARecovery = Finetune | Recovery

HEADS_AND_NEURONS: list[AMethod] = [Heads(), Neurons()]
TAYLOR = Taylor()
ONE_SHOT = OneShot()


def prune(
    model: Path,
    target: Sizes,
    out: Path,
    text: Path | None = None,
    valid: Path | None = None,
    method: list[AMethod] = HEADS_AND_NEURONS,
    criterion: ACriterion = TAYLOR,
    schedule: ASchedule = ONE_SHOT,
    recovery: ARecovery | None = None,
    seed: int = 0,
    batch: int = 32,
    length: int = 96,
    normalise: bool = False,
    fp16: bool = False,
    threads: int | None = None,
) -> None:
    """Writes a pruned model, with a record of what went and what it cost.

    Args:
        model: folder of a language model.
        target: "5M" or a number of parameters, "40%" of the present size; several, falling and
            with commas between them, are made in one run, each in a folder of its own.
        out: folder for the result; a stopped run goes on in it, and any other change than of
            threads is refused. Sizes that are finished stand, whatever ends the run.
        text: lines that the model knows, for criteria that look at data and for recovery.
        valid: lines to report the perplexity of, before and after.
        method: what can go; several share one budget, as in 'Heads|Neurons'.
        criterion: what losing it would cost.
        schedule: when how much goes.
        recovery: what heals after each round, such as Finetune; none unless given.
        seed: equal seeds give equal results.
        batch: rows of tokens in a batch of text.
        length: tokens in a row.
        normalise: write text and valid as the recogniser does: lower-case words of a to z and
            inner apostrophes.
        fp16: store the weights as float16.
        threads: of torch; by default its own choice.
    """
    at_least(1, {"batch": batch, "length": length, "threads": threads})
    set_threads(threads)
    targets = [part.strip() for part in target.split(",") if part.strip()]
    places = _places(out, targets)
    if out.resolve() == model.resolve():
        raise ValueError(f"out: expected a folder other than the model's, got {out}")
    if text is None and (criterion.batches or recovery is not None):
        who = recovery if recovery is not None else criterion
        raise ValueError(f"text: expected lines, which {type(who).__name__} needs, got none")
    for name, path in (("text", text), ("valid", valid)):
        if path is not None:
            require_file(name, path)
    dense = load_pretrained(model, accelerated=False)
    pruner = Pruner(joined(method), criterion, schedule, recovery, seed)
    facts = {
        "kind": "prune",
        "text": file_fact(text) if text is not None else None,
        "valid": file_fact(valid) if valid is not None else None,
        "batch": batch if text is not None else None,
        "length": length if text is not None else None,
        "normalise": normalise,
        "tokenizer": dense.tokenizer.fingerprint,
    }
    whole = {
        **pruner.settings(), "target": ", ".join(targets), **facts, "fp16": fp16,
        "model": dense.weights,
        "masks": masks_digest(read_masks(model / "masks.safetensors", dense.model)),
    }  # fmt: skip
    results: list[Result] = []
    with stages() as watch, prepared(out):
        refuse_other_run(out, whole)
        for to in places:
            refuse_other_run(to, {}, makes=() if (out / RUN).is_file() else MODEL_FILES)
        if _is_finished(out, places):
            results = [load_result(to) for to in places]
        else:
            claim(out, whole)
            work = work_folder(out)
            data = _batches(text, dense, work, batch, length, seed, normalise)

            def save(result: Result) -> None:
                to = places[len(results)]
                result.save(to, dtype=torch.float16 if fp16 else None)
                results.append(result)

            pruner.ladder(
                dense, targets, data, validate=_validation(valid, dense, watch, normalise),
                folder=work, facts=facts, watch=watch, finished=save,
            )  # fmt: skip
            remove_work(out)
    for to, result in zip(places, results, strict=True):
        print(f"{to}\n{result.report()}\n")


def plan(
    model: Path,
    target: Sizes,
    text: Path | None = None,
    method: list[AMethod] = HEADS_AND_NEURONS,
    criterion: ACriterion = TAYLOR,
    batch: int = 32,
    length: int = 96,
    normalise: bool = False,
) -> None:
    """Says what one shot of pruning would take; nothing is written.

    Args:
        model: folder of a language model.
        target: "5M" or a number of parameters, "40%" of the present size.
        text: lines that the model knows; without them, places are estimated by magnitude.
        method: what can go; several share one budget, as in 'Heads|Neurons'.
        criterion: what losing it would cost.
        batch: rows of tokens in a batch of text.
        length: tokens in a row.
        normalise: write text and valid as the recogniser does: lower-case words of a to z and
            inner apostrophes.
    """
    at_least(1, {"batch": batch, "length": length})
    dense = load_pretrained(model, accelerated=False)
    with tempfile.TemporaryDirectory() as folder, stages() as watch:
        data = _batches(text, dense, Path(folder), batch, length, 0, normalise)
        planned = Pruner(joined(method), criterion).plan(dense, target, data, watch=watch)
    if not planned.reachable:
        raise ValueError(planned.advice)
    print(planned)


def joined(methods: list[Any]) -> protocols.Method:
    """Heads() | Neurons() of a list of the two."""
    if not methods:
        raise ValueError("method: expected at least one class, got none")
    return cast(protocols.Method, functools.reduce(operator.or_, methods))


def _places(out: Path, targets: Sequence[str]) -> list[Path]:
    """Where the result of each target goes."""
    if len(targets) == 1:
        return [out]
    places = [out / name.replace("%", "pc").replace(" ", "") for name in targets]
    for i, place in enumerate(places):
        if place in places[:i]:
            same = targets[places.index(place)]
            raise ValueError(
                f"target: expected sizes with a folder each, got {same} and {targets[i]} for "
                f"{place.name}"
            )
    return places


def _is_finished(out: Path, places: Sequence[Path]) -> bool:
    """Whether an earlier call has made every result."""
    done = all((place / "model.json").is_file() for place in places)
    return done and (out / RUN).is_file() and not (out / WORK).exists()


def set_threads(threads: int | None) -> None:
    """Has torch use that many threads."""
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)


def _batches(
    text: Path | None,
    model: LoadedLM | LoadedRecogniser,
    folder: Path,
    batch: int,
    length: int,
    seed: int,
    normalise: bool,
) -> TokenBatches | None:
    if text is None:
        return None
    _insist_on_lm("text", model)
    known_lines(text, model.tokenizer, normalise)
    return text_batches(
        text, model.tokenizer, folder, batch=batch, length=length, seed=seed, normalised=normalise
    )


def _validation(
    valid: Path | None, model: LoadedLM | LoadedRecogniser, watch: Watch, normalise: bool
) -> Callable[[nn.Module], float] | None:
    if valid is None:
        return None
    _insist_on_lm("valid", model)
    lines, tokenizer = known_lines(valid, model.tokenizer, normalise), model.tokenizer

    def progress(done: int, of: int) -> None:
        watch("perplexity of valid", done, of)

    return lambda pruned: perplexity(pruned, lines, tokenizer, progress=progress).per_word


def _insist_on_lm(name: str, model: LoadedLM | LoadedRecogniser) -> None:
    if not isinstance(model, LoadedLM):
        raise ValueError(f"{name}: expected a language model to go with it, got a recogniser")
