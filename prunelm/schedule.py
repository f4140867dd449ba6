"""What GPU kernels would otherwise search a pattern of blocks for, computed once per pattern."""

from dataclasses import dataclass

import torch
from torch import Tensor

PARTS = 8  # of K, between which the decode kernel of CUDA shares a block row out
TILE = 128  # outputs that a program of the Triton kernels computes together, at most
LARGEST_GROUP = 8  # more rows would make the tables of single weights larger than the weights


def group_size(b: int) -> int:
    """How many neighbouring block rows of b outputs go together."""
    return max(1, min(LARGEST_GROUP, TILE // b))


@dataclass(frozen=True)
class Groups:
    """Neighbouring block rows taken together, over the union of their block columns.

    Attributes:
        pointer: [groups + 1]; the union of group i is column[pointer[i]:pointer[i + 1]].
        column: [nnz], ascending in each group; what lies past pointer[-1] means nothing.
        block: [nnz, size], which stored block stands in a column of the union, or -1.
        order: [groups], the groups by length of their union, longest first.
    """

    pointer: Tensor
    column: Tensor
    block: Tensor
    order: Tensor

    @property
    def size(self) -> int:
        """Block rows in a group."""
        return self.block.shape[1]


@dataclass(frozen=True)
class Schedule:
    """Views into the one int32 tensor that travels with a weight; offsets follow from sizes alone.

    Attributes:
        cut: [ceil(N / bn), 9]: the first stored block of each block row whose block column is at
            least i * ceil(cols / 8); cut[:, 0] and cut[:, 8] are crow[:-1] and crow[1:].
        by_row: groups of block rows, for products with the weight's transpose.
        by_column: the same of the transposed weight, for the gradient to x.
    """

    cut: Tensor
    by_row: Groups
    by_column: Groups

    @staticmethod
    def view(
        schedule: Tensor, shape: tuple[int, int], block: tuple[int, int], nnz: int
    ) -> "Schedule":
        """The parts of `schedule`.

        Raises:
            ValueError: its size is not that of a schedule for nnz such blocks.
        """
        rows, cols = -(-shape[0] // block[0]), -(-shape[1] // block[1])
        sizes: list[tuple[int, ...]] = [(rows, PARTS + 1)]
        for lines, b in ((rows, block[0]), (cols, block[1])):
            size = group_size(b)
            groups = -(-lines // size)
            sizes += [(groups + 1,), (nnz,), (nnz, size), (groups,)]
        counts = [_aligned(torch.Size(size).numel()) for size in sizes]
        if schedule.dtype != torch.int32 or schedule.shape != (sum(counts),):
            raise ValueError(
                f"schedule: expected int32 [{sum(counts)}] for {nnz} blocks, got "
                f"{schedule.dtype} {list(schedule.shape)}"
            )
        parts = [
            part[: torch.Size(size).numel()].view(size)
            for part, size in zip(torch.split(schedule, counts), sizes, strict=True)
        ]
        return Schedule(parts[0], Groups(*parts[1:5]), Groups(*parts[5:9]))


def make_schedule(
    crow: Tensor, col: Tensor, shape: tuple[int, int], block: tuple[int, int]
) -> Tensor:
    """The schedule of a pattern, int32 on the pattern's device; nothing waits for the device.

    Args:
        crow: [ceil(N / bn) + 1] int32.
        col: [nnz] int32, ascending in each block row.
        shape: (N, K).
        block: (bn, bk).
    """
    rows, cols = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    device, nnz = crow.device, col.shape[0]
    row = torch.searchsorted(
        crow[1:], torch.arange(nnz, dtype=torch.int32, device=device), right=True
    )
    column = col.long()
    line = torch.arange(rows, device=device)[:, None] * cols
    width = max(-(-cols // PARTS), 1)
    begin = (torch.arange(PARTS + 1, device=device) * width).clamp(max=cols)
    cut = torch.searchsorted(row * cols + column, line + begin)
    parts = [cut, *_groups(row, column, rows, cols, group_size(block[0]))]
    parts += _groups(column, row, cols, rows, group_size(block[1]))
    return torch.cat(
        [torch.nn.functional.pad(p.flatten(), (0, _aligned(p.numel()) - p.numel())) for p in parts]
    ).to(torch.int32)


def _groups(row: Tensor, column: Tensor, rows: int, cols: int, size: int) -> tuple[Tensor, ...]:
    """The parts of Groups, int64, for stored blocks at (row, column) in any order."""
    nnz, groups = row.shape[0], -(-rows // size)
    slot = row % size
    key = (row // size) * cols + column  # which union, and where in it
    order = torch.argsort(key * size + slot)
    key, slot, column = key[order], slot[order], column[order]
    first = torch.ones_like(key)
    first[1:] = key[1:] != key[:-1]
    count = torch.nn.functional.pad(first.cumsum(0), (1, 0))  # [nnz + 1] of union entries before
    entry = count[1:] - 1
    start = torch.searchsorted(key, torch.arange(groups + 1, device=key.device) * cols)
    pointer = count[start]
    blocks = torch.full((nnz * size,), -1, device=key.device)
    return (
        pointer,
        torch.zeros_like(column).scatter_(0, entry, column),
        blocks.scatter_(0, entry * size + slot, order),
        torch.argsort(pointer.diff(), descending=True, stable=True),
    )


def _aligned(count: int) -> int:
    """Every part begins at 16 bytes, so that Triton compiles a kernel once for all patterns."""
    return -(-count // 4) * 4
