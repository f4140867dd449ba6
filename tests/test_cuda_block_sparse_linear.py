"""The CUDA block-sparse linear, run on the CPU (tests/cuda_emulation), agrees with float64."""

import math

import pytest
import torch
from cuda_emulation.emulated import Kernels, assert_accurate
from torch import Tensor

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


def spoil_past_edges(weight: BlockSparse, values: Tensor) -> Tensor:
    """NaN in what the last blocks hold past N and K: nobody may read it."""
    (N, K), (bn, bk) = weight.shape, weight.block
    for row in range(len(weight.crow) - 1):
        for i in range(int(weight.crow[row]), int(weight.crow[row + 1])):
            values[i, max(N - row * bn, 0) :] = torch.nan
            values[i, :, max(K - int(weight.col[i]) * bk, 0) :] = torch.nan
    return values


def cut_of(weight: BlockSparse) -> Tensor:
    """Where each block row's eighths of columns begin, counted one by one."""
    columns = math.ceil(weight.shape[1] / weight.block[1])
    width = math.ceil(columns / 8)
    cut = torch.zeros(len(weight.crow) - 1, 9, dtype=torch.int32)
    for row in range(len(cut)):
        first, last = int(weight.crow[row]), int(weight.crow[row + 1])
        for i in range(9):
            cut[row, i] = first + int((weight.col[first:last] < i * width).sum())
    return cut


def assert_tiles(
    kernels: Kernels,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    block: tuple[int, int],
    keep: float,
    activation: str | None,
) -> None:
    """Within the rounding of the dtype of float64, and the same with and without a GPU index."""
    M, K, N = sizes
    weight = random_blocks(N, K, block, keep)
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    dense = weight.to_dense().to(dtype).double()
    transposed = weight.values.transpose(1, 2).to(dtype).contiguous()
    values = spoil_past_edges(weight, transposed.transpose(1, 2))
    parts = (x, values, weight.crow, weight.col, bias)
    y = kernels.block_sparse_linear(*parts, out_features=N, activation=activation)
    truth = activate(x.double() @ dense.T + bias, activation)
    assert_accurate(y, truth, x.double().abs() @ dense.abs().T + bias.abs())
    cut = cut_of(weight)
    again = kernels.block_sparse_linear(*parts, out_features=N, activation=activation, cut=cut)
    assert torch.equal(again, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes, block, keep, activation",
    [
        pytest.param((1, 72, 80), (16, 16), 0.5, None, id="one-row"),
        pytest.param((9, 88, 51), (16, 32), 0.4, "gelu", id="ragged"),
        pytest.param((33, 200, 100), (32, 16), 0.6, "silu", id="64-rows"),
        pytest.param((65, 136, 70), (64, 64), 0.7, "relu", id="two-tiles-of-rows"),
        pytest.param((3, 296, 200), (48, 128), 0.8, None, id="uneven-blocks"),
        pytest.param((2, 9000, 16), (16, 64), 0.1, None, id="more-chunks-than-fit"),
        pytest.param((5, 160, 600), (32, 32), 0.3, None, id="several-warps"),
        pytest.param((4, 64, 33), (16, 16), 0.0, "gelu", id="all-pruned"),
    ],
)
def test_tiles(
    kernels: Kernels,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    block: tuple[int, int],
    keep: float,
    activation: str | None,
) -> None:
    assert_tiles(kernels, dtype, sizes, block, keep, activation)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "sizes, block, keep, activation",
    [
        pytest.param((515, 144, 140), (16, 16), 0.5, "gelu", id="ragged"),
        pytest.param((514, 136, 37), (16, 16), 0.5, None, id="half-a-step"),
        pytest.param((513, 720, 36), (32, 64), 0.4, "relu", id="more-chunks-than-fit"),
        pytest.param((520, 80, 50), (16, 16), 0.0, "silu", id="all-pruned"),
    ],
)
def test_tiles_of_many_rows(
    kernels: Kernels,
    dtype: torch.dtype,
    capability: int,
    sizes: tuple[int, int, int],
    block: tuple[int, int],
    keep: float,
    activation: str | None,
) -> None:
    """Multicast on 9.0, not on 8.0."""
    with kernels.device(capability, 108):
        assert_tiles(kernels, dtype, sizes, block, keep, activation)


def test_without_clusters_slices_are_added_by_a_second_kernel(kernels: Kernels) -> None:
    weight = random_blocks(50, 200, (16, 16), 0.5)
    values = weight.values.transpose(1, 2).half().contiguous().transpose(1, 2)
    parts = (torch.randn(9, 200).half(), values, weight.crow, weight.col, torch.randn(50).half())
    y = kernels.block_sparse_linear(*parts, out_features=50, activation="gelu")
    with kernels.device(80, 108):
        assert torch.equal(
            kernels.block_sparse_linear(*parts, out_features=50, activation="gelu"), y
        )


@pytest.mark.parametrize("M", [9, 514])
@pytest.mark.parametrize("largest", [1, 2, 4])
def test_a_device_that_is_too_small_for_wide_clusters(
    kernels: Kernels, M: int, largest: int
) -> None:
    """A device with clusters need not have 8 multiprocessors next to each other."""
    weight = random_blocks(300, 208, (16, 16), 0.3)
    values = weight.values.transpose(1, 2).half().contiguous().transpose(1, 2)
    parts = (torch.randn(M, 208).half(), values, weight.crow, weight.col, torch.randn(300).half())
    with kernels.device(largest_cluster=largest):
        y = kernels.block_sparse_linear(*parts, out_features=300, activation="silu")
    dense = weight.to_dense().half().double()
    truth = activate(parts[0].double() @ dense.T + parts[4], "silu")
    assert_accurate(y, truth, parts[0].double().abs() @ dense.abs().T + parts[4].abs())


def test_few_multiprocessors_get_larger_tiles(kernels: Kernels) -> None:
    weight = random_blocks(300, 208, (16, 16), 0.3)
    values = weight.values.transpose(1, 2).half().contiguous().transpose(1, 2)
    for M in (9, 514):
        parts = (torch.randn(M, 208).half(), values, weight.crow, weight.col, None)
        y = kernels.block_sparse_linear(*parts, out_features=300)
        with kernels.device(90, 2):
            assert torch.equal(kernels.block_sparse_linear(*parts, out_features=300), y)


def test_a_row_does_not_depend_on_how_many_there_are(kernels: Kernels) -> None:
    weight = random_blocks(70, 272, (16, 16), 0.5)
    values = weight.values.transpose(1, 2).bfloat16().contiguous().transpose(1, 2)
    x = torch.randn(70, 272).bfloat16()

    def run(rows: Tensor) -> Tensor:
        return kernels.block_sparse_linear(
            rows, values, weight.crow, weight.col, None, out_features=70
        )

    y = run(x)
    for M in (1, 8, 9, 33, 64):
        assert torch.equal(run(x[:M]), y[:M])
    assert torch.equal(run(x[69:]), y[69:])


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
