"""What torch's own block-sparse linear refuses, ours does.

torch's refusals are asserted too, so that a release that mends one is noticed.
"""

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_accurate
from torch import Tensor

from prunelm import BlockSparse, ops
from prunelm.nn import BlockSparseLinear

N, K = 48, 64


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's is in beta
        yield


def weight_of(block: tuple[int, int], dtype: torch.dtype = torch.float32) -> BlockSparse:
    mask = torch.rand(-(-N // block[0]), -(-K // block[1])) < 0.5
    mask[0, 0] = True
    return BlockSparse.from_dense(torch.randn(N, K).to(dtype), block, mask)


def bsr(weight: BlockSparse) -> Tensor:
    return weight.to_dense().to_sparse_bsr(weight.block)


def assert_right(weight: BlockSparse, M: int = 5, dtype: torch.dtype | None = None) -> None:
    dense = weight.to_dense()
    x = torch.randn(M, K).to(dtype or dense.dtype)
    wide = dense.to(x.dtype)
    exact = F.linear(x.double(), wide.double())
    assert_as_accurate(ops.block_sparse_linear(x, weight), F.linear(x, wide), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_1_weights_of_16_bits(dtype: torch.dtype) -> None:
    weight = weight_of((16, 16), dtype)
    with pytest.raises((NotImplementedError, RuntimeError)):
        F.linear(torch.randn(5, K).to(dtype), bsr(weight))
    assert_right(weight)


def test_2_blocks_that_are_not_square() -> None:
    weight = weight_of((16, 4))
    with pytest.raises(RuntimeError):
        F.linear(torch.randn(5, K), bsr(weight))
    assert_right(weight)


def test_3_gradients() -> None:
    weight, x = weight_of((16, 16)), torch.randn(5, K, requires_grad=True)
    with pytest.raises((NotImplementedError, RuntimeError)):
        F.linear(x, bsr(weight)).sum().backward()
    values = weight.values.detach().requires_grad_()
    ours = BlockSparse(values, weight.crow, weight.col, weight.shape)
    dense = weight.to_dense().requires_grad_()
    grad = torch.randn(5, N)
    got = torch.autograd.grad(ops.block_sparse_linear(x, ours), (x, values), grad)
    want = torch.autograd.grad(F.linear(x, dense), (x, dense), grad)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
    mask = torch.zeros(N // 16, K // 16, dtype=torch.bool)
    for row in range(N // 16):
        mask[row, weight.col[weight.crow[row] : weight.crow[row + 1]].long()] = True
    stored = BlockSparse.from_dense(want[1], (16, 16), mask).values
    torch.testing.assert_close(got[1], stored, rtol=1e-4, atol=1e-4)


def test_4_products_sampled_at_the_stored_blocks() -> None:
    weight, grad, x = weight_of((16, 16)), torch.randn(5, N), torch.randn(5, K)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.sparse.sampled_addmm(bsr(weight), grad.T.contiguous(), x)
    got = torch.ops.prunelm.block_sparse_linear_grad_values(
        grad, x, weight.crow, weight.col, 16, 16
    )
    product, crow = grad.T @ x, weight.crow.tolist()
    for row in range(N // 16):
        for place in range(crow[row], crow[row + 1]):
            k = 16 * int(weight.col[place])
            want = product[16 * row : 16 * row + 16, k : k + 16]
            torch.testing.assert_close(got[place], want, rtol=1e-4, atol=1e-4)


def test_5_products_with_the_weight_turned_over() -> None:
    weight, grad = weight_of((16, 16)), torch.randn(5, N)
    with pytest.raises((NotImplementedError, RuntimeError)):
        F.linear(grad, bsr(weight).transpose(0, 1))
    tensors = (weight.values, weight.crow, weight.col)
    got = torch.ops.prunelm.block_sparse_linear_grad_x(grad, *tensors, K)
    torch.testing.assert_close(got, grad @ weight.to_dense(), rtol=1e-4, atol=1e-4)


def test_6_compiling() -> None:
    module, x = BlockSparseLinear(weight_of((16, 16))), torch.randn(5, K)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)


def test_7_adam() -> None:
    refused = torch.nn.Parameter(bsr(weight_of((16, 16))))
    refused.grad = refused.detach().clone()
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.optim.Adam([refused]).step()
    module, x = BlockSparseLinear(weight_of((16, 16))), torch.randn(50, K)
    target, adam = torch.randn(50, N), torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (module(x) - target).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_8_the_gradient_is_as_small_as_the_weight() -> None:
    module = BlockSparseLinear(weight_of((16, 16)))
    module(torch.randn(5, K)).sum().backward()
    grad = module.values.grad
    assert grad is not None and grad.shape == module.values.shape
    assert grad.numel() < N * K and grad.stride() == module.values.stride()


@pytest.mark.parametrize("block", [(17, 3), (8, 5), (1, 1), (48, 6)], ids=str)
def test_9_blocks_of_any_size(block: tuple[int, int]) -> None:
    assert_right(weight_of(block))


@pytest.mark.parametrize("M", [0, 1, 3, 17, 33])
def test_10_any_number_of_rows(M: int) -> None:
    assert_right(weight_of((16, 16)), M)


def test_11_rows_and_weight_of_two_dtypes() -> None:
    assert_right(weight_of((16, 16), torch.bfloat16), dtype=torch.float32)


def test_12_float32_is_summed_in_float32() -> None:
    values = torch.tensor([2.0**24, 1.0, -(2.0**24)]).repeat(16, 1)[None]  # float64 would keep 1
    weight = BlockSparse(values, torch.tensor([0, 1]).int(), torch.tensor([0]).int(), (16, 3))
    assert torch.equal(ops.block_sparse_linear(torch.ones(2, 3), weight), torch.zeros(2, 16))
