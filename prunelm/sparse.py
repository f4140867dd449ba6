"""BlockSparse: the block-sparse weight format, a frozen view on plain tensors."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prunelm.gpu_index import INT32_MAX, make_gpu_index


@dataclass(frozen=True)
class BlockSparse:
    """A weight [N, K] of which only some (bn, bk) blocks are stored, row by row.

    It owns nothing and checks nothing: modules keep the tensors and make one of these per call, and
    the ops check what they are given. What a block on the edge holds past N or K is never read.
    Where torch's functions, methods and operators expect a tensor, it stands for `to_dense()`, so
    that code which reads a linear's weight finds one.

    Attributes:
        values: [nnz, bn, bk] float32, float64, bfloat16 or float16. The kernels read it with bn
            fastest in memory (strides bn * bk, 1, bn); any other layout is right, but copied at
            each call.
        crow: [ceil(N / bn) + 1] int32; row i of blocks is values[crow[i]:crow[i + 1]].
        col: [nnz] int32, the column of blocks of each block, ascending in its row.
        shape: (N, K).
        gpu_index: int32, what `with_gpu_index` computes from this crow and col for GPU kernels.
            None: each call computes it first, which takes some twenty launches; the result is the
            same.
    """

    values: Tensor
    crow: Tensor
    col: Tensor
    shape: tuple[int, int]
    gpu_index: Tensor | None = None

    @staticmethod
    def from_dense(
        weight: Tensor, block: tuple[int, int], mask: Tensor | None = None
    ) -> "BlockSparse":
        """The blocks of `weight` that `mask` keeps, copied; gradients flow back to `weight`.

        On a GPU with a GPU index.

        Args:
            weight: [N, K], floating.
            block: (bn, bk); it need not divide N and K.
            mask: [ceil(N / bn), ceil(K / bk)] bool, True = kept. None: the blocks that are not all
                zero.

        Raises:
            ValueError: a shape or dtype is not as above, or a count does not fit into int32.
        """
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(
                f"weight: expected a floating [N, K], got {weight.dtype} {list(weight.shape)}"
            )
        bn, bk = block
        if bn < 1 or bk < 1:
            raise ValueError(f"block: expected sizes of at least 1, got {block}")
        N, K = weight.shape
        rows, cols = -(-N // bn), -(-K // bk)
        for name, count in (("rows", rows), ("columns", cols), ("elements", bn * bk)):
            if count > INT32_MAX:
                raise ValueError(f"weight: expected at most {INT32_MAX} block {name}, got {count}")
        padded = torch.nn.functional.pad(weight, (0, cols * bk - K, 0, rows * bn - N))
        blocks = padded.view(rows, bn, cols, bk).permute(0, 2, 3, 1)  # [rows, cols, bk, bn]
        if mask is None:
            mask = (blocks.detach() != 0).any(-1).any(-1)
        elif mask.shape != (rows, cols) or mask.dtype != torch.bool:
            raise ValueError(
                f"mask: expected bool [{rows}, {cols}], got {mask.dtype} {list(mask.shape)}"
            )
        at = mask.to(weight.device).nonzero(as_tuple=True)
        if len(at[0]) > INT32_MAX:
            raise ValueError(f"weight: expected at most {INT32_MAX} blocks, got {len(at[0])}")
        crow = torch.zeros(rows + 1, dtype=torch.int32, device=weight.device)
        crow[1:] = mask.sum(1).cumsum(0)
        values = blocks[at].contiguous().transpose(1, 2)
        stored = BlockSparse(values, crow, at[1].to(torch.int32), (N, K))
        return stored.with_gpu_index() if weight.device.type == "cuda" else stored

    def with_gpu_index(self) -> "BlockSparse":
        """The same weight with a GPU index; it costs nothing where there is one."""
        if self.gpu_index is not None:
            return self
        return replace(self, gpu_index=make_gpu_index(self.crow, self.col, self.shape, self.block))

    def to_dense(self) -> Tensor:
        """The weight with its zeros, [N, K]; gradients flow back to `values`."""
        N, K = self.shape
        nnz, bn, bk = map(int, self.values.shape)  # constants, also where torch.jit.trace looks on
        rows, cols = -(-N // bn), -(-K // bk)
        if nnz == rows * cols:  # all of them, in order: no index is needed
            blocks = self.values.reshape(rows, cols, bn, bk)
            return blocks.transpose(1, 2).reshape(rows * bn, cols * bk)[:N, :K]
        # A block's row: how many rows have ended before it. By operators that ONNX has.
        ends = self.crow[1:-1].long()
        row = ends.new_zeros(nnz + 1).scatter_add(0, ends, torch.ones_like(ends)).cumsum(0)[:nnz]
        blocks = self.values.new_zeros(rows, cols, bn, bk)
        blocks = blocks.index_put((row, self.col.long()), self.values)
        return blocks.transpose(1, 2).reshape(rows * bn, cols * bk)[:N, :K]

    @property
    def block(self) -> tuple[int, int]:
        """(bn, bk)."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def nnz(self) -> int:
        """Number of stored blocks."""
        return self.values.shape[0]

    @property
    def sparsity(self) -> float:
        """Fraction of blocks that are not stored."""
        (N, K), (bn, bk) = self.shape, self.block
        return 1 - self.nnz / max(-(-N // bn) * -(-K // bk), 1)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Of the values."""
        return self.values.device

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What torch calls for a function that is given one."""
        return func(*_dense(args), **_dense(dict(kwargs or {})))

    def __getattr__(self, name: str) -> Any:
        """The dense weight's methods and attributes."""
        if name.startswith("_") or name in self.__dataclass_fields__:
            raise AttributeError(f"BlockSparse has no attribute {name!r}")
        return getattr(self.to_dense(), name)


def _dense(value: Any) -> Any:
    if isinstance(value, BlockSparse):
        return value.to_dense()
    if isinstance(value, (tuple, list)):
        return type(value)(map(_dense, value))
    return {k: _dense(v) for k, v in value.items()} if isinstance(value, dict) else value


def _operator(name: str) -> Callable[..., Any]:
    def run(self: BlockSparse, *others: Any) -> Any:
        return getattr(self.to_dense(), name)(*map(_dense, others))

    return run


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow"):
    for _side in ("", "r"):
        setattr(BlockSparse, f"__{_side}{_name}__", _operator(f"__{_side}{_name}__"))
for _name in ("neg", "abs", "getitem", "len"):
    setattr(BlockSparse, f"__{_name}__", _operator(f"__{_name}__"))
