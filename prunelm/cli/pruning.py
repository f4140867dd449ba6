"""`prunelm prune` and `prunelm plan`."""

import functools
import operator
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from prunelm.cli.arguments import Sizes
from prunelm.data.text import TokenBatches, read_lines
from prunelm.data.tokenizer import Tokenizer
from prunelm.metrics.perplexity import perplexity
from prunelm.models.lm import TransformerLM
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
from prunelm.pruning.result import read_masks
from prunelm.study.testbed import text_batches
from prunelm.training.checkpoint import load_model

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
    fp16: bool = False,
    threads: int | None = None,
) -> None:
    """Writes a pruned model, with a record of what went and what it cost.

    Args:
        model: folder of a language model.
        target: "5M" or a number of parameters, "40%" of the present size; several, falling and
            with commas between them, are made in one run, each in a folder of its own.
        out: folder for the result.
        text: lines that the model knows, for criteria that look at data and for recovery.
        valid: lines to report the perplexity of, before and after.
        method: what can go; several share one budget, as in 'Heads|Neurons'.
        criterion: what losing it would cost.
        schedule: when how much goes.
        recovery: what heals after each round, such as Finetune; none unless given.
        seed: equal seeds give equal results.
        batch: rows of tokens in a batch of text.
        length: tokens in a row.
        fp16: store the weights as float16.
        threads: of torch; by default its own choice.
    """
    set_threads(threads)
    targets = [part.strip() for part in target.split(",") if part.strip()]
    if out.resolve() == model.resolve():
        raise ValueError(f"out: expected a folder other than the model's, got {out}")
    if text is None and (criterion.batches or recovery is not None):
        who = recovery if recovery is not None else criterion
        raise ValueError(f"text: expected lines, which {type(who).__name__} needs, got none")
    dense, tokenizer, _ = load_model(model)
    pruner = Pruner(joined(method), criterion, schedule, recovery, seed)
    with tempfile.TemporaryDirectory() as folder, nothing_left(out):
        data = _batches(text, dense, tokenizer, folder, batch, length, seed)
        results = pruner.ladder(
            dense, targets, data, validate=_validation(valid, dense, tokenizer),
            tokenizer=tokenizer, masks=read_masks(model / "masks.safetensors", dense),
            folder=out / "work",
        )  # fmt: skip
    for name, result in zip(targets, results, strict=True):
        to = out if len(targets) == 1 else out / name.replace("%", "pc").replace(" ", "")
        result.save(to, tokenizer, dtype=torch.float16 if fp16 else None)
        print(f"{to}\n{result.report()}\n")
    shutil.rmtree(out / "work", ignore_errors=True)


def plan(
    model: Path,
    target: Sizes,
    text: Path | None = None,
    method: list[AMethod] = HEADS_AND_NEURONS,
    criterion: ACriterion = TAYLOR,
    batch: int = 32,
    length: int = 96,
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
    """
    dense, tokenizer, _ = load_model(model)
    masks = read_masks(model / "masks.safetensors", dense)
    with tempfile.TemporaryDirectory() as folder:
        data = _batches(text, dense, tokenizer, folder, batch, length, 0)
        planned = Pruner(joined(method), criterion).plan(dense, target, data, masks=masks)
    if not planned.reachable:
        raise ValueError(planned.advice)
    print(planned)


def joined(methods: list[Any]) -> protocols.Method:
    """Heads() | Neurons() of a list of the two."""
    if not methods:
        raise ValueError("method: expected at least one class, got none")
    return cast(protocols.Method, functools.reduce(operator.or_, methods))


@contextmanager
def nothing_left(out: Path) -> Iterator[None]:
    """Removes a folder that the block made and then refused to fill; a stopped run's stays."""
    there = out.exists()
    try:
        yield
    except (ValueError, OSError):
        if not there:
            shutil.rmtree(out, ignore_errors=True)
        raise


def set_threads(threads: int | None) -> None:
    """Has torch use that many threads."""
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)


def _batches(
    text: Path | None,
    model: nn.Module,
    tokenizer: Tokenizer,
    folder: str,
    batch: int,
    length: int,
    seed: int,
) -> TokenBatches | None:
    if text is None:
        return None
    _insist_on_lm("text", model)
    return text_batches(text, tokenizer, folder, batch=batch, length=length, seed=seed)


def _validation(
    valid: Path | None, model: nn.Module, tokenizer: Tokenizer
) -> Callable[[nn.Module], float] | None:
    if valid is None:
        return None
    _insist_on_lm("valid", model)
    lines = read_lines(valid)
    return lambda pruned: perplexity(pruned, lines, tokenizer).per_word


def _insist_on_lm(name: str, model: nn.Module) -> None:
    if not isinstance(model, TransformerLM):
        raise ValueError(f"{name}: expected a language model to go with it, got a recogniser")
