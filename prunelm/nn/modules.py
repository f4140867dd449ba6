"""Modules over the linear ops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

import prunelm._C
from prunelm import ops
from prunelm.ops.activation import activation_code
from prunelm.sparse import BlockSparse


class LowRankLinear(nn.Module):
    """y = activation((x @ down.T) @ up.T + bias); the op is `ops.low_rank_linear`.

    Attributes:
        down: [R, K].
        up: [N, R].
        bias: [N] or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if rank < 0:
            raise ValueError(f"rank: expected at least 0, got {rank}")
        activation_code(activation)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.activation = activation
        self.down = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw factors whose product is distributed like nn.Linear's weight."""
        # Variances: R * (bound^2 / 3)^2 = 1 / (3 K), which is what nn.Linear draws.
        bound = (3 / (self.in_features * max(self.rank, 1))) ** 0.25
        for factor in (self.down, self.up):
            nn.init.uniform_(factor, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.in_features**-0.5), self.in_features**-0.5)

    @property
    def weight(self) -> Tensor:
        """The product [N, K], for code that reads a linear's weight; computed at each look."""
        return self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return ops.low_rank_linear(x, self.down, self.up, self.bias, self.activation)

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear shows its own."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


class BlockSparseLinear(nn.Module):
    """y = activation(x @ weight.T + bias); the op is `ops.block_sparse_linear`.

    Attributes:
        values: [nnz, bn, bk], bn fastest in memory; the parameter.
        crow, col: int32 buffers, where the blocks stand; see `BlockSparse`.
        gpu_index: what GPU kernels look up, made from crow and col; None on a CPU. It is not saved.
        bias: [N] or None.
    """

    crow: Tensor
    col: Tensor
    gpu_index: Tensor | None

    def __init__(
        self, weight: BlockSparse, bias: Tensor | None = None, activation: str | None = None
    ) -> None:
        super().__init__()
        activation_code(activation)
        self.out_features, self.in_features = weight.shape
        self.activation = activation
        self.values = nn.Parameter(weight.values.detach())
        self.register_buffer("crow", weight.crow)
        self.register_buffer("col", weight.col)
        self.register_buffer("gpu_index", weight.gpu_index, persistent=False)
        self.bias: nn.Parameter | None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach())
        else:
            self.register_parameter("bias", None)

    @staticmethod
    def from_linear(
        linear: nn.Linear, block: tuple[int, int], mask: Tensor | None = None
    ) -> "BlockSparseLinear":
        """A copy of a linear; block and mask as for `BlockSparse.from_dense`."""
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return BlockSparseLinear(BlockSparse.from_dense(linear.weight.detach(), block, mask), bias)

    @property
    def weight(self) -> BlockSparse:
        """A view on the module's tensors, which torch's functions take for the dense weight."""
        shape = (self.out_features, self.in_features)
        return BlockSparse(self.values, self.crow, self.col, shape, self.gpu_index)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if not is_compiling():
            # Past nn.Module's look-up of names, which takes as long as the smallest products.
            own, buffers = self._parameters, self._buffers
            try:
                y = prunelm._C.block_sparse_linear(
                    x, own["values"], buffers["crow"], buffers["col"],
                    (self.out_features, self.in_features), own["bias"], self.activation,
                )  # fmt: skip
            except KeyError:  # a parametrization has its own way to them
                y = None
            if y is not None:
                return y
        return ops.block_sparse_linear(x, self.weight, self.bias, self.activation)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Adopt the file's number of blocks; all else must fit, as in any module."""
        found = state_dict.get(prefix + "values")
        col = state_dict.get(prefix + "col")
        bn, bk = self.values.shape[1:]
        if found is not None and col is not None and found.shape[1:] == (bn, bk):
            nnz = found.shape[0]
            if col.shape == (nnz,) and nnz != self.values.shape[0]:
                # .data, so that an optimizer's reference to the parameter stays good.
                self.values.data = self.values.new_empty(nnz, bk, bn).transpose(1, 2)
                self.col = self.col.new_empty(nnz)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._index_for_gpu()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BlockSparseLinear":
        """Move the module, and make a GPU index where it comes to a GPU."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if (self.gpu_index is not None) != (self.crow.device.type == "cuda"):
            self._index_for_gpu()
        return self

    def _index_for_gpu(self) -> None:
        self.gpu_index = None
        if self.crow.device.type == "cuda":
            self.gpu_index = self.weight.with_gpu_index().gpu_index

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear shows its own."""
        bn, bk = self.values.shape[1:]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"block=({bn}, {bk}), sparsity={self.weight.sparsity:.3f}, "
            f"bias={self.bias is not None}"
        )


class PackedLowRankLinear(nn.Module):
    """A `LowRankLinear` for inference: its factors laid out once, as the kernels read them.

    Attributes:
        down, up: [R, K] and [N, R] as blocks of 16 outputs; the module's buffers, seen as weights.
        bias: [N] or None.
    """

    down_values: Tensor
    down_crow: Tensor
    down_col: Tensor
    up_values: Tensor
    up_crow: Tensor
    up_col: Tensor
    bias: Tensor | None

    def __init__(self, linear: LowRankLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank, self.activation = linear.rank, linear.activation
        for name, factor in (("down", linear.down), ("up", linear.up)):
            N, K = factor.shape
            blocks = BlockSparse.from_dense(factor.detach(), (16, max(K, 1)), all_blocks(N, K))
            self.register_buffer(f"{name}_values", blocks.values)
            self.register_buffer(f"{name}_crow", blocks.crow)
            self.register_buffer(f"{name}_col", blocks.col)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        self.register_buffer("bias", bias)

    @property
    def down(self) -> BlockSparse:
        """[R, K]."""
        shape = (self.rank, self.in_features)
        return BlockSparse(self.down_values, self.down_crow, self.down_col, shape)

    @property
    def up(self) -> BlockSparse:
        """[N, R]."""
        shape = (self.out_features, self.rank)
        return BlockSparse(self.up_values, self.up_crow, self.up_col, shape)

    @property
    def weight(self) -> Tensor:
        """The product [N, K], for code that reads a linear's weight; computed at each look."""
        return self.up.to_dense() @ self.down.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if not is_compiling():
            own, K, R, N = self._buffers, self.in_features, self.rank, self.out_features
            try:
                y = prunelm._C.low_rank_linear(
                    x, own["down_values"], own["down_crow"], own["down_col"], (R, K),
                    own["up_values"], own["up_crow"], own["up_col"], (N, R),
                    own["bias"], self.activation,
                )  # fmt: skip
            except KeyError:
                y = None
            if y is not None:
                return y
        return ops.low_rank_linear(x, self.down, self.up, self.bias, self.activation)

    def extra_repr(self) -> str:
        """Sizes, as LowRankLinear shows its own."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


def all_blocks(N: int, K: int) -> Tensor:
    """The mask that keeps everything, for blocks (16, K)."""
    return torch.ones(-(-N // 16), min(K, 1), dtype=torch.bool)


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` has put inference modules into a model."""
    return any(isinstance(m, (BlockSparseLinear, PackedLowRankLinear)) for m in model.modules())


def refuse_accelerated(model: nn.Module, instead: str) -> None:
    """ValueError, saying what to do instead, for what came from `accelerate`."""
    if is_accelerated(model):
        raise ValueError(
            f"model: expected a model before accelerate, got an accelerated one; {instead}"
        )
