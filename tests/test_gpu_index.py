"""The GPU index of a pattern against a search through it, block by block."""

import pytest
import torch
from torch import Tensor

from prunelm import BlockSparse
from prunelm.gpu_index import GpuIndex, RowGroups, group_size, make_gpu_index

SHAPES = [
    pytest.param(64, 96, (16, 16), 0.4, id="whole"),
    pytest.param(300, 50, (16, 4), 0.3, id="ragged"),
    pytest.param(7, 5, (1, 1), 0.5, id="elements"),
    pytest.param(520, 260, (128, 64), 0.6, id="large"),
    pytest.param(520, 700, (64, 16), 1.0, id="dense"),
    pytest.param(20, 33, (7, 3), 0.0, id="all-pruned"),
    pytest.param(20, 0, (7, 3), 0.0, id="no-columns"),
]


def stored(N: int, K: int, block: tuple[int, int], keep: float) -> tuple[BlockSparse, Tensor]:
    mask = torch.rand(-(-N // block[0]), -(-K // block[1])) < keep
    mask[len(mask) // 2] = False
    return BlockSparse.from_dense(torch.randn(N, K), block, mask).with_gpu_index(), mask


def assert_groups(groups: RowGroups, mask: Tensor, number: Tensor) -> None:
    """`number` [rows, cols] says which stored block stands where, -1: none."""
    lengths = groups.pointer.diff()
    for i in range(len(groups.order)):
        rows = slice(i * groups.size, (i + 1) * groups.size)
        union = mask[rows].any(0).nonzero().flatten()
        own = slice(int(groups.pointer[i]), int(groups.pointer[i + 1]))
        assert groups.column[own].tolist() == union.tolist()
        blocks = torch.nn.functional.pad(
            number[rows], (0, 0, 0, groups.size - len(mask[rows])), value=-1
        )
        assert torch.equal(groups.block[own].long(), blocks[:, union].T)
    assert sorted(groups.order.tolist()) == list(range(len(lengths)))
    assert not (lengths[groups.order.long()].diff() > 0).any()


@pytest.mark.parametrize("N, K, block, keep", SHAPES)
def test_schedule(N: int, K: int, block: tuple[int, int], keep: float) -> None:
    weight, mask = stored(N, K, block, keep)
    assert weight.gpu_index is not None and weight.gpu_index.dtype == torch.int32
    gpu_index = GpuIndex(weight.gpu_index, weight.shape, block, weight.nnz)
    rows, cols = mask.shape
    number = torch.full((rows, cols), -1)
    number[mask] = torch.arange(weight.nnz)
    for row in range(rows):
        for i in range(9):
            before = int(mask[row, : i * -(-cols // 8)].sum())
            assert int(gpu_index.cut[row, i]) == int(weight.crow[row]) + before
    assert (gpu_index.by_row.size, gpu_index.by_column.size) == tuple(map(group_size, block))
    assert_groups(gpu_index.by_row, mask, number)
    assert_groups(gpu_index.by_column, mask.T, number.T)


def test_the_cut_comes_first_and_every_part_at_16_bytes() -> None:
    weight, _ = stored(300, 50, (16, 4), 0.3)
    assert weight.gpu_index is not None
    gpu_index = GpuIndex(weight.gpu_index, weight.shape, weight.block, weight.nnz)
    assert gpu_index.cut.storage_offset() == 0
    for groups in (gpu_index.by_row, gpu_index.by_column):
        for part in (groups.pointer, groups.column, groups.block, groups.order):
            assert part.storage_offset() % 4 == 0 and part.is_contiguous()


def test_a_weight_is_scheduled_once_and_never_on_a_cpu_unasked() -> None:
    weight = BlockSparse.from_dense(torch.randn(32, 32), (16, 16))
    assert weight.gpu_index is None
    indexed = weight.with_gpu_index()
    assert indexed.with_gpu_index() is indexed and indexed.values is weight.values


def test_it_is_traceable() -> None:
    weight, _ = stored(64, 96, (16, 16), 0.4)

    def make(crow: Tensor, col: Tensor) -> Tensor | None:
        return BlockSparse(weight.values, crow, col, weight.shape).with_gpu_index().gpu_index

    compiled = torch.compile(make, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight.crow, weight.col), weight.gpu_index)


def test_group_sizes_fill_a_tile_and_stay_small() -> None:
    sizes = {1: 8, 7: 8, 16: 8, 24: 5, 32: 4, 64: 2, 100: 1, 128: 1, 500: 1}
    assert {b: group_size(b) for b in sizes} == sizes


def test_the_schedule_of_another_number_of_blocks_is_refused() -> None:
    weight, _ = stored(64, 96, (16, 16), 0.4)
    assert weight.gpu_index is not None
    with pytest.raises(ValueError, match=r"gpu_index: expected int32 \[\d+\] for 3 blocks, got"):
        GpuIndex(weight.gpu_index, weight.shape, weight.block, 3)


def test_more_blocks_than_int32_counts_in_groups_are_refused() -> None:
    crow = torch.empty(2**20 + 1, dtype=torch.int32, device="meta")
    col = torch.empty(2**28, dtype=torch.int32, device="meta")
    with pytest.raises(
        ValueError, match=r"gpu_index: expected at most 268435455 blocks of \(1, 1\)"
    ):
        make_gpu_index(crow, col, (2**20, 2**20), (1, 1))
