"""beam_step for every mix of dtypes: what it is computed in must not change what is found."""

import itertools
import math

import pytest
import torch

from prunelm import ops

WIDE = [torch.float32, torch.float64]


def test_a_large_narrow_score_keeps_its_extensions() -> None:
    logits = torch.zeros(1, 1, 64, dtype=torch.float64)
    logits[0, 0, 5] = 1e-3
    for V in (64, 20, 3):
        for backend in (None, "cpu", "reference"):
            out = ops.beam_step(torch.tensor([[100.0]]), logits[..., :V], backend=backend)
            assert out.score.isfinite().all() and not out.bad.any()
            assert float(out.score[0, 0]) == pytest.approx(100 - math.log(V), abs=1e-2)


@pytest.mark.parametrize("prune", ["late", "early", "after"])
@pytest.mark.parametrize("size", [1.0, 100.0, 3e4])
@pytest.mark.parametrize(
    ("score", "logits", "rows", "weight"),
    list(itertools.product(WIDE, WIDE, [*WIDE, torch.bfloat16, torch.float16], WIDE)),
    ids=str,
)
def test_it_agrees_with_the_reference(
    score: torch.dtype,
    logits: torch.dtype,
    rows: torch.dtype,
    weight: torch.dtype,
    size: float,
    prune: str,
) -> None:
    torch.manual_seed(0)
    B, W, V = 3, 4, 70
    # Exact in every dtype, and far apart: rounding decides nothing.
    old = (torch.randint(-9, 9, (B, W)) + size).to(score)
    am = (torch.randperm(B * W * V).view(B, W, V) / 8).to(logits)
    values = torch.randint(-20, 20, (6, V)).to(rows)
    row = torch.randint(6, (B, W))
    term = (values, row, torch.full((B,), 0.5).to(weight))
    want = ops.beam_step(old, am, (term,), token_reward=0.25, prune=prune, backend="reference")
    for backend in (None, "cpu"):
        got = ops.beam_step(old, am, (term,), token_reward=0.25, prune=prune, backend=backend)
        assert [t.dtype for t in got] == [t.dtype for t in want]
        torch.testing.assert_close(got.score, want.score, rtol=1e-6, atol=1e-3)
        torch.testing.assert_close(got.parts, want.parts, rtol=1e-5, atol=1e-3)
        assert torch.equal(got.bad, want.bad) and not got.bad.any()


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("score", [1.0, torch.inf, torch.nan])
@pytest.mark.parametrize("row", [10**9, -1, 3, 2**62])
def test_a_row_that_is_not_there_is_refused_whatever_the_score(
    row: int, score: float, backend: str | None
) -> None:
    term = (torch.zeros(3, 4), torch.tensor([[row, 0]]), torch.ones(1))
    old = torch.tensor([[score, -1.0]])
    with pytest.raises(RuntimeError, match=f"row: expected 0 to 2, got {row}"):
        ops.beam_step(old, torch.zeros(1, 2, 4), (term,), backend=backend)
    for slot in (torch.tensor([[1, 0]]), torch.tensor([[3, 0]])):  # not read
        ops.beam_step(old, torch.zeros(1, 2, 4), (term,), slot=slot, backend=backend)
    with pytest.raises(RuntimeError, match="slot: expected 0 to 3, got 4"):
        ops.beam_step(old, torch.zeros(1, 2, 4), slot=torch.tensor([[4, 0]]), backend=backend)
