"""What GPU kernels would otherwise search a pattern of blocks for, computed once per pattern."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1
PARTS = 8  # of K, between which the decode kernel of CUDA shares a block row out
TILE = 128  # outputs that a program of the Triton kernels computes together, at most
LARGEST_GROUP = 8  # more rows would make the tables of single weights larger than the weights


def group_size(b: int) -> int:
    """How many neighbouring block rows of b outputs go together."""
    return max(1, min(LARGEST_GROUP, TILE // b))


@dataclass(frozen=True)
class RowGroups:
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
class GpuIndex:
    """Named views into the one int32 tensor that travels with a weight.

    Attributes:
        tensor: from `make_gpu_index`; where its parts begin follows from the sizes alone.
        shape: (N, K).
        block: (bn, bk).
        nnz: stored blocks.

    Raises:
        ValueError: the tensor is not a GPU index for that many such blocks.
    """

    tensor: Tensor
    shape: tuple[int, int]
    block: tuple[int, int]
    nnz: int

    def __post_init__(self) -> None:
        size = self._by_column + self._groups_size(1)
        if self.tensor.dtype != torch.int32 or self.tensor.shape != (size,):
            raise ValueError(
                f"gpu_index: expected int32 [{size}] for {self.nnz} blocks, got "
                f"{self.tensor.dtype} {list(self.tensor.shape)}"
            )

    @property
    def cut(self) -> Tensor:
        """[rows, 9]: the first stored block of each block row in column i * ceil(cols / 8) or past.

        cut[:, 0] and cut[:, 8] are crow[:-1] and crow[1:].
        """
        return self._part(0, (self._lines(0), PARTS + 1))

    @property
    def by_row(self) -> RowGroups:
        """Groups of block rows, for products with the weight's transpose."""
        return self._groups(self._by_row, 0)

    @property
    def by_column(self) -> RowGroups:
        """The same of the transposed weight, for the gradient to x."""
        return self._groups(self._by_column, 1)

    @property
    def _by_row(self) -> int:
        return _aligned(self._lines(0) * (PARTS + 1))

    @property
    def _by_column(self) -> int:
        return self._by_row + self._groups_size(0)

    def _lines(self, side: int) -> int:
        return -(-self.shape[side] // self.block[side])

    def _groups_shapes(self, side: int) -> tuple[tuple[int, ...], ...]:
        size = group_size(self.block[side])
        groups = -(-self._lines(side) // size)
        return (groups + 1,), (self.nnz,), (self.nnz, size), (groups,)

    def _groups_size(self, side: int) -> int:
        return sum(_aligned(math.prod(shape)) for shape in self._groups_shapes(side))

    def _groups(self, begin: int, side: int) -> RowGroups:
        parts = []
        for shape in self._groups_shapes(side):
            parts.append(self._part(begin, shape))
            begin += _aligned(math.prod(shape))
        return RowGroups(*parts)

    def _part(self, begin: int, shape: tuple[int, ...]) -> Tensor:
        strides = (1,) if len(shape) == 1 else (shape[1], 1)
        return self.tensor.as_strided(shape, strides, self.tensor.storage_offset() + begin)


def make_gpu_index(
    crow: Tensor, col: Tensor, shape: tuple[int, int], block: tuple[int, int]
) -> Tensor:
    """The GPU index of a pattern, int32 on the pattern's device; nothing waits for the device.

    Args:
        crow: [ceil(N / bn) + 1] int32.
        col: [nnz] int32, ascending in each block row.
        shape: (N, K).
        block: (bn, bk).

    Raises:
        ValueError: kernels could not count the tables' entries in int32.
    """
    rows, cols = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    device, nnz = crow.device, col.shape[0]
    most = INT32_MAX // max(map(group_size, block))
    if nnz > most:
        raise ValueError(f"gpu_index: expected at most {most} blocks of {block}, got {nnz}")
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
    """The parts of `RowGroups`, int64, for stored blocks at (row, column) in any order."""
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
