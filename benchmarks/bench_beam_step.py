"""beam_step against the same step in torch's own ops, eager and compiled, on this machine.

python -m prunelm.benchmarks.bench_beam_step [--full] [--threads 2] [--save]
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prunelm.benchmarks.harness import measure_roof, options_of, report, side_by_side
from prunelm.ops.beam_step import beam_step

BATCHES, BEAMS, VOCABULARIES = (1, 8, 32), (4, 8, 16), (500, 1000, 5000)


def in_torch(score: Tensor, am_logits: Tensor, log_probs: Tensor, weight: Tensor) -> Tensor:
    """Late pruning with one term, whose [B, W, V] log-probabilities lie there in order.

    Less than `beam_step` does: no row is looked up, and no token is silent.
    """
    total = am_logits.log_softmax(-1) + weight[:, None, None] * log_probs + score[..., None]
    best, index = total.flatten(1).topk(score.shape[1])
    V = am_logits.shape[2]
    return torch.stack([best, index // V, index % V])


def normalising(score: Tensor, am_logits: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
    """The same from the language model's logits."""
    return in_torch(score, am_logits, logits.log_softmax(-1), weight)


def measure(B: int, W: int, V: int, threads: int, compiled: bool) -> dict[str, Any]:
    """One line of the table: each way to take one step, all checked against each other first."""
    g = torch.Generator().manual_seed(0)
    score = torch.randn(B, W, generator=g)
    am_logits = 3 * torch.randn(B, W, V, generator=g)
    logits = torch.randn(B, W, V, generator=g)
    rows, row = logits.log_softmax(-1), torch.arange(B * W).view(B, W)
    rows[..., 0] = 0  # as beam_step takes blank
    weight = torch.full((B,), 0.3)
    term, raw = (((x.view(B * W, V), row, weight),) for x in (rows, logits))
    calls: dict[str, Callable[[], object]] = {
        "late": lambda: beam_step(score, am_logits, term),
        "early": lambda: beam_step(score, am_logits, term, prune="early"),
        "after": lambda: beam_step(score, am_logits, term, prune="after"),
        "no_term": lambda: beam_step(score, am_logits, prune="after"),
        "late_from_logits": lambda: beam_step(score, am_logits, raw, normalise=True),
        "torch": lambda: in_torch(score, am_logits, rows, weight),
        "torch_from_logits": lambda: normalising(score, am_logits, logits, weight),
    }
    ours, theirs = beam_step(score, am_logits, term), in_torch(score, am_logits, rows, weight)
    if not (ours.parent == theirs[1]).all() or not (ours.token == theirs[2]).all():
        raise RuntimeError(f"beam_step: expected torch's choice at B={B} W={W} V={V}")
    if compiled:
        torch.compiler.reset()  # it gives up after some shapes
        step = torch.compile(in_torch, dynamic=False)
        calls["torch_compiled"] = lambda: step(score, am_logits, rows, weight)
    with torch.inference_mode():
        us = side_by_side(calls, threads)
    shares = {
        "speedup": us["torch"] / us["late"],
        "speedup_from_logits": us["torch_from_logits"] / us["late_from_logits"],
    }
    return {"B": B, "W": W, "V": V, **us, **shares}


def main(words: Sequence[str] | None = None) -> None:
    """Prints a machine line, a table in microseconds and one line of JSON."""
    options = options_of(str(__doc__), words, "torch.compile too")
    rows = [
        measure(B, W, V, options.threads, options.full)
        for B in BATCHES
        for W in BEAMS
        for V in VOCABULARIES
    ]
    roof = measure_roof(options.threads)
    report("beam_step", options.threads, roof, rows, options.save)


if __name__ == "__main__":
    main()
