"""beam_step on a GPU against the same step in torch's own ops, and against the memory's speed.

python -m prunelm.benchmarks.gpu_beam_step [--full] [--seconds 60] [--out FOLDER]
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from prunelm.benchmarks.bench_beam_step import in_torch
from prunelm.benchmarks.gpu_harness import (
    Call,
    Case,
    Roof,
    Timer,
    Times,
    best,
    compiled,
    options_of,
    replayed,
    run_benchmark,
    size_bytes,
    times,
)
from prunelm.ops.beam_step import BeamStep, beam_step

SHAPES = ((64, 8, 5000), (32, 8, 500))  # B, W, V: the goals'
MORE = ((1, 8, 500), (8, 16, 1000), (64, 16, 32000))  # with --full
PRUNE = ("late", "early", "after")
Prune = Literal["late", "early", "after"]
Peers = tuple[Times, Times, str]  # eager, the best way, its name


def step(
    timer: Timer, roof: Roof, known: dict[Any, Peers], *, B: int, W: int, V: int, prune: Prune,
    backend: Any, device: str = "cuda",
) -> Mapping[str, Any]:  # fmt: skip
    """One line of the table: one language model's rows, in order, and checked against float64."""
    torch.manual_seed(B)
    score = torch.randn(B, W, device=device)
    am_logits = 3 * torch.randn(B, W, V, device=device)
    rows = torch.randn(B * W, V, device=device).log_softmax(-1)
    row = torch.arange(B * W, device=device).view(B, W)
    weight = torch.full((B,), 0.3, device=device)
    inputs = (score, am_logits, rows, row, weight)

    def run(
        score: Tensor, am_logits: Tensor, rows: Tensor, row: Tensor, weight: Tensor
    ) -> BeamStep:
        term = (rows, row, weight)
        return beam_step(score, am_logits, (term,), prune=prune, backend=backend)

    def torchs(
        score: Tensor, am_logits: Tensor, rows: Tensor, row: Tensor, weight: Tensor
    ) -> Tensor:
        return in_torch(score, am_logits, rows.view(B, W, V), weight)

    got = BeamStep(*replayed(timer, run, inputs))
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    exact = beam_step(wide[0], wide[1], (tuple(wide[2:]),), prune=prune, backend="reference")  # type: ignore[arg-type]
    error = float((got.score.double() - exact.score).abs().max())
    if not error <= 1e-4:  # scores are below 100
        raise RuntimeError(f"beam_step: expected the reference's scores, off {error}")
    own = times(timer, run, inputs)
    if (B, W, V) not in known:  # torch's way of pruning is one
        ways: dict[str, Call] = {"eager": torchs}
        made, _ = compiled(torchs, inputs, 20.0)
        if made is not None:
            ways["compiled"] = made
        known[B, W, V] = times(timer, torchs, inputs), *best(timer, ways, inputs)
    eager, peer, way = known[B, W, V]
    # Pruning by the recogniser alone reads no more of the rows than what was chosen.
    read = (score, am_logits, row, weight, *((rows,) if prune == "late" else ()))
    least = roof.us(0, size_bytes(read) + B * W * (4 + 8 + 8 + 8))
    return {
        "us": own.warm_us,
        "cold_us": own.cold_us,
        "eager_us": eager.warm_us,
        "best_us": peer.warm_us,
        "best": way,
        "speedup": eager.warm_us / own.warm_us,
        "speedup_cold": eager.cold_us / own.cold_us,
        "speedup_best": peer.warm_us / own.warm_us,
        "of_bandwidth": least / own.warm_us,
        "of_bandwidth_cold": least / own.cold_us,
    }


def cases(timer: Timer, roof: Roof, full: bool, device: str = "cuda") -> list[Case]:
    """All lines, the goals' first."""
    shapes, known = (*SHAPES, *(MORE if full else ())), dict[Any, Peers]()
    return [
        (
            {"backend": backend, "B": B, "W": W, "V": V, "prune": prune},
            partial(
                step, timer, roof, known, B=B, W=W, V=V, prune=prune, backend=backend,
                device=device,
            ),
        )
        for prune, (B, W, V), backend in product(PRUNE, shapes, ("cuda", "triton"))
    ]  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Prints the card, a table in microseconds, and saves it."""
    options = options_of(str(__doc__), words)
    return run_benchmark("beam_step", partial(cases, full=options.full), options)


if __name__ == "__main__":
    sys.exit(main())
