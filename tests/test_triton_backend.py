"""The ops' backend "triton", in the interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from prunelm import ops
from prunelm.sparse import BlockSparse


def test_gradients_and_compile_go_through_the_backend() -> None:
    """Forward in Triton; backward is shared with the other backends."""
    mask = torch.rand(3, 4) < 0.6
    weight = BlockSparse.from_dense(torch.randn(40, 30), (16, 8), mask)
    x, down, up = torch.randn(2, 3, 30), torch.randn(9, 30), torch.randn(40, 9)
    values, bias = weight.values, torch.randn(40)
    leaves = [t.requires_grad_() for t in (x, values, bias, down, up)]

    def run(backend: str) -> torch.Tensor:
        blocks = BlockSparse(values, weight.crow, weight.col, weight.shape)
        y = ops.block_sparse_linear(x, blocks, bias, "gelu", backend=backend)
        return y * ops.low_rank_linear(x, down, up, bias, "silu", backend=backend)

    expected = torch.autograd.grad(run("reference").square().mean(), leaves)
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        got = torch.autograd.grad(function("triton").square().mean(), leaves)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_backend_that_cannot_run_says_why() -> None:
    weight = torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"triton cannot run low_rank_linear: x: expected"):
        ops.low_rank_linear(weight, weight, weight, backend="triton")
    with pytest.raises(ValueError, match=r"cuda cannot run low_rank_linear: .*x: expected"):
        ops.low_rank_linear(weight, weight, weight, backend="cuda")
