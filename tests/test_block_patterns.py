"""Damaged patterns of blocks are refused: past the dispatcher, through it, by the reference."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import prunelm._C
from prunelm import BlockSparse, ops


def _with(tensor: Tensor, at: int, value: int) -> Tensor:
    out = tensor.clone()
    out[at] = value
    return out


DAMAGE: dict[str, tuple[Callable[[BlockSparse], BlockSparse], str]] = {
    "crow-begins-late": (lambda w: replace(w, crow=_with(w.crow, 0, 1)), "crow: expected 0 to nnz"),
    "crow-ends-late": (lambda w: replace(w, crow=_with(w.crow, -1, 99)), "crow: expected 0 to nnz"),
    "crow-ends-early": (lambda w: replace(w, crow=_with(w.crow, -1, 1)), "crow: expected 0 to nnz"),
    "crow-falls": (lambda w: replace(w, crow=_with(w.crow, 1, 2**31 - 1)), "crow: expected 0 to"),
    "crow-negative": (lambda w: replace(w, crow=_with(w.crow, 1, -(2**31))), "crow: expected 0 to"),
    "col-negative": (lambda w: replace(w, col=_with(w.col, 0, -1)), "col: expected columns in"),
    "col-too-large": (lambda w: replace(w, col=_with(w.col, -1, 15)), "col: expected columns in"),
    "col-huge": (lambda w: replace(w, col=_with(w.col, 2, 2**31 - 1)), "col: expected columns in"),
    "col-twice": (
        lambda w: replace(w, col=_with(w.col, 1, int(w.col[0]))),
        "col: expected columns",
    ),
    "col-falls": (lambda w: replace(w, col=w.col.flip(0)), "col: expected columns in"),
}


@pytest.mark.parametrize("block", [(16, 4), (8, 4), (1, 4)], ids=str)
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_pattern_is_refused(kind: str, block: tuple[int, int]) -> None:
    damage, message = DAMAGE[kind]
    weight = BlockSparse.from_dense(torch.randn(40, 60), block)
    wrong, x = damage(weight), torch.randn(2, 60)
    pattern = (wrong.values, wrong.crow, wrong.col)
    with torch.inference_mode():
        assert prunelm._C.block_sparse_linear(x, *pattern, (40, 60), None, None) is None
        for backend in (None, "cpu", "reference"):
            with pytest.raises(RuntimeError, match=message):
                ops.block_sparse_linear(x, wrong, backend=backend)
    values = wrong.values.clone(memory_format=torch.preserve_format).requires_grad_()
    with pytest.raises(RuntimeError, match=message):
        ops.block_sparse_linear(x, replace(wrong, values=values))
    grad = torch.randn(2, 40)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.prunelm.block_sparse_linear_grad_x(grad, *pattern, 60)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.prunelm.block_sparse_linear_grad_values(grad, x, *pattern[1:], *block)
    up = BlockSparse.from_dense(torch.randn(8, 40), (8, 40))
    for factors in ((wrong, up), (BlockSparse.from_dense(torch.randn(60, 9), (4, 3)), wrong)):
        rows = torch.randn(2, factors[0].shape[1])
        with torch.inference_mode(), pytest.raises(RuntimeError, match=message):
            ops.low_rank_linear(rows, *factors)


@pytest.mark.parametrize(
    ("bn", "bk"), [(2**40, 1), (1, 2**40), (2**20, 2**20), (2**62, 1)], ids=str
)
def test_blocks_whose_sizes_overflow_are_refused(bn: int, bk: int) -> None:
    none = torch.zeros(2, dtype=torch.int32)
    values = torch.empty(0, 1, 1).expand(0, bn, bk)
    weight = BlockSparse(values, none, none[:0], (16, 1))
    for run in (torch.inference_mode, torch.enable_grad):
        with run(), pytest.raises(RuntimeError, match="values: expected blocks of at most"):
            ops.block_sparse_linear(torch.randn(2, 1), weight)


def test_vmap_gives_what_a_loop_gives() -> None:
    weight, x = BlockSparse.from_dense(torch.randn(40, 60), (16, 4)), torch.randn(3, 2, 60)
    down, up = torch.randn(8, 60), torch.randn(40, 8)
    for run in (
        lambda rows: ops.block_sparse_linear(rows, weight, None, "gelu"),
        lambda rows: ops.low_rank_linear(rows, down, up, None, "relu"),
    ):
        want = torch.stack([run(rows) for rows in x])
        torch.testing.assert_close(torch.vmap(run)(x), want)
        torch.testing.assert_close(torch.vmap(run)(x.clone().requires_grad_()), want)
        with pytest.raises(RuntimeError, match="functorch transforms"):  # torch's own refusal
            torch.func.grad(lambda rows, run=run: run(rows).sum())(x)
