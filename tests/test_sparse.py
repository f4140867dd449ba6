"""BlockSparse keeps what its mask keeps, in the layout that the kernels read."""

import pytest
import torch

from prunelm import BlockSparse


def random_mask(N: int, K: int, block: tuple[int, int], density: float) -> torch.Tensor:
    return torch.rand(-(-N // block[0]), -(-K // block[1])) < density


@pytest.mark.parametrize(
    ("N", "K", "block"),
    [
        pytest.param(32, 48, (16, 16), id="whole"),
        pytest.param(33, 50, (16, 4), id="ragged"),
        pytest.param(5, 7, (1, 1), id="elements"),
        pytest.param(7, 3, (16, 16), id="smaller-than-a-block"),
        pytest.param(40, 9, (16, 9), id="panels"),
    ],
)
def test_dense_and_back(N: int, K: int, block: tuple[int, int]) -> None:
    dense, mask = torch.randn(N, K), random_mask(N, K, block, 0.5)
    weight = BlockSparse.from_dense(dense, block, mask)
    wide = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:N, :K]
    assert torch.equal(weight.to_dense(), dense * wide)
    assert weight.nnz == int(mask.sum()) and weight.block == block and weight.shape == (N, K)
    assert weight.values.transpose(1, 2).is_contiguous()
    assert weight.crow.dtype == weight.col.dtype == torch.int32


def test_zero_blocks_are_found() -> None:
    dense = torch.randn(8, 6)
    dense[:4, 2:4] = 0
    dense[4:] = 0
    weight = BlockSparse.from_dense(dense, (4, 2))
    assert weight.col.tolist() == [0, 2] and weight.crow.tolist() == [0, 2, 2]
    assert weight.sparsity == pytest.approx(4 / 6)


def test_a_block_of_nan_is_kept() -> None:
    assert BlockSparse.from_dense(torch.full((2, 2), torch.nan), (2, 2)).nnz == 1


def test_nothing_kept() -> None:
    weight = BlockSparse.from_dense(torch.zeros(5, 6), (2, 4))
    assert weight.nnz == 0 and weight.sparsity == 1
    assert torch.equal(weight.to_dense(), torch.zeros(5, 6))


def test_gradients_pass_both_ways() -> None:
    dense = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False], [True, True]])
    torch.autograd.gradcheck(
        lambda w: BlockSparse.from_dense(w, (4, 3), mask).to_dense(), dense, fast_mode=True
    )


@pytest.mark.parametrize(
    ("weight", "block", "mask", "message"),
    [
        (torch.zeros(3), (1, 1), None, r"weight: expected a floating \[N, K\], got .*\[3\]"),
        (torch.zeros(2, 2, dtype=torch.int64), (1, 1), None, "weight: expected a floating"),
        (torch.zeros(2, 2), (0, 1), None, r"block: expected sizes of at least 1, got \(0, 1\)"),
        (torch.zeros(4, 4), (2, 2), torch.ones(2, 3).bool(), r"mask: expected bool \[2, 2\], got"),
        (torch.zeros(4, 4), (2, 2), torch.ones(2, 2), "mask: expected bool .* got torch.float32"),
        (
            torch.empty(1, 2**31, device="meta"),
            (1, 1),
            None,
            "weight: expected at most 2147483647 block columns, got 2147483648",
        ),
        (
            torch.empty(1, 1, device="meta"),
            (2**16, 2**16),
            None,
            "weight: expected at most 2147483647 block elements, got 4294967296",
        ),
    ],
)
def test_bad_input_is_refused_by_name(weight, block, mask, message) -> None:
    with pytest.raises(ValueError, match=message):
        BlockSparse.from_dense(weight, block, mask)
