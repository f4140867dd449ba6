"""The CUDA block-sparse linear, run on the CPU (tests/cuda_emulation), agrees with float64."""

import pytest
import torch
from cuda_emulation.emulated import Kernels, assert_accurate

from prunelm.ops.activation import activate
from prunelm.sparse import BlockSparse

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random_blocks(N: int, K: int, block: tuple[int, int], keep: float) -> BlockSparse:
    bn, bk = block
    mask = torch.rand(-(-N // bn), -(-K // bk)) < keep
    return BlockSparse.from_dense(torch.randn(N, K), block, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, K, N, block, keep, activation",
    [
        pytest.param(1, 37, 51, (16, 4), 0.4, None, id="one-row"),
        pytest.param(9, 33, 65, (16, 16), 0.5, "gelu", id="ragged"),
        pytest.param(3, 13, 7, (1, 1), 0.3, "relu", id="elements"),
        pytest.param(2, 70, 40, (40, 70), 1.0, "silu", id="one-block"),
        pytest.param(4, 20, 33, (7, 3), 0.0, "gelu", id="all-pruned"),
        pytest.param(0, 8, 8, (4, 4), 0.5, None, id="no-rows"),
    ],
)
def test_block_sparse_linear(
    kernels: Kernels,
    dtype: torch.dtype,
    M: int,
    K: int,
    N: int,
    block: tuple[int, int],
    keep: float,
    activation: str | None,
) -> None:
    weight = random_blocks(N, K, block, keep)
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    values = weight.values.to(dtype)
    y = kernels.block_sparse_linear(
        x, values, weight.crow, weight.col, bias, out_features=N, activation=activation
    )
    dense = BlockSparse(values, weight.crow, weight.col, (N, K)).to_dense().double()
    truth = activate(x.double() @ dense.T + bias, activation)
    assert_accurate(y, truth, x.double().abs() @ dense.abs().T + bias.abs())


@pytest.mark.parametrize(
    "M, K, N, block, keep",
    [
        pytest.param(5, 37, 51, (16, 4), 0.4, id="ragged"),
        pytest.param(3, 13, 7, (1, 1), 0.3, id="elements"),
        pytest.param(4, 20, 33, (7, 3), 0.0, id="all-pruned"),
        pytest.param(0, 8, 9, (4, 4), 0.5, id="no-rows"),
    ],
)
def test_block_sparse_linear_gradients(
    kernels: Kernels, M: int, K: int, N: int, block: tuple[int, int], keep: float
) -> None:
    weight = random_blocks(N, K, block, keep)
    x, grad = torch.randn(M, K), torch.randn(M, N)
    stored = (weight.values, weight.crow, weight.col)
    got = kernels.block_sparse_linear_gradients(grad, x, *stored)
    x = x.double().requires_grad_()
    values = weight.values.double().requires_grad_()
    wide = BlockSparse(values, weight.crow, weight.col, (N, K))
    expected = torch.autograd.grad(x @ wide.to_dense().T, (x, values), grad.double())
    for one, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=1e-5, atol=1e-5)
