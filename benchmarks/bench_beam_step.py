"""beam_step against the same step in torch's own ops, eager and compiled, on this machine.

python -m prunelm.benchmarks.bench_beam_step
"""

import argparse
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prunelm.metrics.speed import interleaved
from prunelm.ops.beam_step import beam_step
from prunelm.study.machine import describe, one_line

SHAPES = (
    (1, 4, 30),
    (16, 4, 30),
    (1, 4, 500),
    (16, 4, 500),
    (32, 8, 500),
    (16, 4, 5000),
)  # B, W, V


def in_torch(score: Tensor, am_logits: Tensor, rows: Tensor, row: Tensor, weight: Tensor) -> Tensor:
    """Late pruning with one term: the scores, packed with what `topk` chose."""
    B, W, V = am_logits.shape
    term = rows[row] * weight[:, None, None]
    term[..., 0] = 0
    total = score[..., None] + am_logits.log_softmax(-1) + term
    best, index = total.view(B, W * V).topk(W)
    return torch.stack([best, index // V, index % V])


def measure(B: int, W: int, V: int, threads: int, compiled: bool) -> dict[str, float]:
    """Microseconds of each way to take one step; all checked against each other first."""
    g = torch.Generator().manual_seed(0)
    score = torch.randn(B, W, generator=g)
    am_logits = 3 * torch.randn(B, W, V, generator=g)
    rows = torch.randn(2 * B * W, V, generator=g).log_softmax(-1)
    row = torch.randint(0, len(rows), (B, W), generator=g)
    weight = torch.full((B,), 0.3)
    term = ((rows, row, weight),)
    calls: dict[str, Callable[[], object]] = {
        "late": lambda: beam_step(score, am_logits, term),
        "early": lambda: beam_step(score, am_logits, term, prune="early"),
        "after": lambda: beam_step(score, am_logits, term, prune="after"),
        "no_term": lambda: beam_step(score, am_logits, prune="after"),
        "torch": lambda: in_torch(score, am_logits, rows, row, weight),
    }
    ours, theirs = beam_step(score, am_logits, term), in_torch(score, am_logits, rows, row, weight)
    if not (ours.parent == theirs[1]).all() or not (ours.token == theirs[2]).all():
        raise RuntimeError(f"beam_step: expected torch's choice at B={B} W={W} V={V}")
    if compiled:
        step = torch.compile(in_torch, dynamic=False)
        calls["torch_compiled"] = lambda: step(score, am_logits, rows, row, weight)
    with torch.inference_mode():
        times = interleaved(calls, threads=threads, runs=100)
    return {name: 1e3 * time.median_ms for name, time in times.items()}


def main(words: Sequence[str] | None = None) -> None:
    """Prints a machine line, a table in microseconds and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="also torch.compile's version")
    options = parser.parse_args(words)
    print(one_line(describe()), f"median of 100 in microseconds, {options.threads} threads")
    results = []
    for B, W, V in SHAPES:
        times = measure(B, W, V, options.threads, options.compiled)
        if not results:
            print("    B  W     V", *(f"{name:>14}" for name in times))
        print(f"{B:5} {W:2} {V:5}", *(f"{us:14.1f}" for us in times.values()), flush=True)
        results.append({"B": B, "W": W, "V": V, **times})
    print(json.dumps({"bench": "beam_step", "threads": options.threads, "us": results}))


if __name__ == "__main__":
    main()
