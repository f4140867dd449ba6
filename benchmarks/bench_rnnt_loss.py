"""rnnt_loss with its gradient, against torch's own ops one anti-diagonal at a time.

python -m prunelm.benchmarks.bench_rnnt_loss [--threads 2] [--save]
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prunelm.benchmarks.harness import Roof, measure_roof, options_of, report, side_by_side
from prunelm.ops.rnnt_loss import rnnt_loss

SHAPES = (
    (16, 50, 35, 29),
    (32, 80, 45, 29),
    (16, 100, 30, 500),
)  # B, T, U + 1, V


def in_torch(logits: Tensor, targets: Tensor, frames: Tensor, tokens: Tensor) -> Tensor:
    """The loss by one vectorised step per anti-diagonal; blank is 0."""
    B, T, U1, _ = logits.shape
    log_probs = logits.log_softmax(-1)
    blank = log_probs[..., 0]
    token = log_probs[:, :, :-1].gather(3, targets[:, None, :, None].expand(B, T, U1 - 1, 1))[
        ..., 0
    ]
    place = torch.arange(U1)
    diagonals = [torch.where(place == 0, 0.0, -torch.inf).expand(B, U1)]
    for n in range(1, T + U1 - 1):
        time = n - place  # of cell u on this diagonal
        before = diagonals[-1]
        over = blank[:, (time - 1).clamp(0, T - 1), place].masked_fill(
            (time < 1) | (time > T), -torch.inf
        )
        up = token[:, time[1:].clamp(0, T - 1), place[:-1]]
        below = torch.cat((torch.full((B, 1), -torch.inf), before[:, :-1] + up), 1)
        inside = (time >= 0) & (time < T)
        # A finite floor, because the gradient of -inf - -inf is NaN.
        reached = torch.logaddexp((before + over).clamp_min(-1e30), below.clamp_min(-1e30))
        diagonals.append(reached.masked_fill(~inside, -torch.inf))
    grid, row = torch.stack(diagonals, 1), torch.arange(B)
    last = frames - 1
    return -(grid[row, last + tokens, tokens] + blank[row, last, tokens])


def measure(B: int, T: int, U1: int, V: int, *, threads: int, roof: Roof) -> dict[str, Any]:
    """One line of the table: loss and gradient either way, checked against each other first."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, U1, V, generator=g).requires_grad_()
    targets = torch.randint(1, V, (B, U1 - 1), generator=g)
    frames = torch.randint(T // 2, T + 1, (B,), generator=g)
    tokens = torch.randint(U1 // 2, U1, (B,), generator=g)

    def both(loss: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        value = loss(logits, targets, frames, tokens)
        return value.detach(), torch.autograd.grad(value.sum(), logits)[0]

    ours, theirs = both(rnnt_loss), both(in_torch)
    for name, a, b in zip(("loss", "gradient"), ours, theirs, strict=True):
        error = float(((a - b).abs() / b.abs().max()).max())
        if not error <= 1e-4:  # torch keeps its lattice in float32
            raise RuntimeError(f"{name}: expected torch's, got an error of {error}")
    us = side_by_side(
        {"ours": lambda: both(rnnt_loss), "torch": lambda: both(in_torch)}, threads, rounds=5
    )
    least = roof.us(0, 2 * 4 * logits.numel())  # logits read once, their gradient written once
    shares = {"speedup": us["torch"] / us["ours"], "of_roof": least / us["ours"]}
    return {"B": B, "T": T, "U1": U1, "V": V, **us, **shares}


def main(words: Sequence[str] | None = None) -> None:
    """Prints a machine line, a table in microseconds and one line of JSON."""
    options = options_of(str(__doc__), words, "the same: it is short")
    roof = measure_roof(options.threads)
    rows = [measure(*shape, threads=options.threads, roof=roof) for shape in SHAPES]
    report("rnnt_loss", options.threads, roof, rows, options.save)


if __name__ == "__main__":
    main()
