"""Modules over the linear ops, and `accelerate`, which puts them where they win."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

import prunelm._C
from prunelm import ops
from prunelm.ops.activation import activation_code
from prunelm.ops.backend import GPU_DTYPES
from prunelm.ops.break_even import block_sparse_us, dense_us, low_rank_blocks_us
from prunelm.ops.gpu_break_even import Card, best_block, card_of, product_wins
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
        schedule: what GPU kernels look up, made from crow and col; None on a CPU. It is not saved.
        bias: [N] or None.
    """

    crow: Tensor
    col: Tensor
    schedule: Tensor | None

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
        self.register_buffer("schedule", weight.schedule, persistent=False)
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
        """A view on the module's tensors."""
        shape = (self.out_features, self.in_features)
        return BlockSparse(self.values, self.crow, self.col, shape, self.schedule)

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
        self._reschedule()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BlockSparseLinear":
        """Move the module, and make a schedule where it comes to a GPU."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if (self.schedule is not None) != (self.crow.device.type == "cuda"):
            self._reschedule()
        return self

    def _reschedule(self) -> None:
        self.schedule = None
        if self.crow.device.type == "cuda":
            self.schedule = self.weight.scheduled().schedule

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
            blocks = BlockSparse.from_dense(factor.detach(), (16, max(K, 1)), _all_blocks(N, K))
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


# Blocks that `accelerate` looks for. The kernels read 16 outputs at a time, so that lower blocks
# gain nothing; taller ones save indices.
BLOCKS = ((16, 1), (16, 4), (16, 16), (32, 32), (64, 64), (128, 128))


def accelerate(
    model: nn.Module, rows: Sequence[int] = (1, 8, 64), dense: bool | None = None
) -> nn.Module:
    """A copy of the model in eval mode, with linears replaced where that is predicted to be faster.

    Zero blocks are found in the weights themselves: an nn.Linear with enough of them becomes a
    `BlockSparseLinear`, with the block of `BLOCKS` that promises most; a `LowRankLinear` has its
    factors laid out for the kernels or, where they cost more than their product, becomes that
    product. Predictions are for one thread where a module lies on the CPU, for its card where it
    lies on a GPU. The copy is for inference: its parameters need no gradient, and its state dict is
    not the model's.

    On the CPU dense linears go through the same op, as one block per 16 outputs, unless that is
    predicted to be slower. With all linears there, a row's result does not depend on how many rows
    are computed with it, bit for bit, which torch's own linear does not promise.

    Args:
        model: any module; nn.Linear and LowRankLinear in it are looked at, subclasses are not.
        rows: the numbers of rows M to be fast for; what wins must win for each.
        dense: True sends every dense linear through the op, False none, None those on the CPU that
            do not lose more than 3 %.

    Raises:
        ValueError: rows is empty or holds a number below 1.
    """
    if not rows or min(rows) < 1:
        raise ValueError(f"rows: expected numbers of at least 1, got {list(rows)}")
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    for name, module in list(fast.named_modules()):
        new = _accelerated(module, rows, dense)
        if new is module:
            continue
        if not name:
            return new
        parent, _, own = name.rpartition(".")
        setattr(fast.get_submodule(parent), own, new)
    return fast


def _accelerated(module: nn.Module, rows: Sequence[int], dense: bool | None) -> nn.Module:
    """What stands for one module in the accelerated copy; the module itself where nothing wins."""
    new: nn.Module | None = None
    if type(module) is LowRankLinear:
        if module.down.device.type == "cpu":
            new = _accelerated_low_rank(module, rows)
        elif module.down.device.type == "cuda":
            card = card_of(module.down.device.index or 0)
            new = _multiplied_out(module, rows, card)
    elif type(module) is nn.Linear:
        if module.weight.device.type == "cpu":
            new = _accelerated_linear(module, rows, dense)
        elif module.weight.device.type == "cuda":
            card = card_of(module.weight.device.index or 0)
            new = _accelerated_on_gpu(module, rows, dense, card)
    return module if new is None else new.eval().requires_grad_(False)


def _accelerated_on_gpu(
    linear: nn.Linear, rows: Sequence[int], dense: bool | None, card: Card
) -> nn.Module | None:
    weight = linear.weight.detach()
    N, K = weight.shape
    if weight.dtype not in GPU_DTYPES:
        return None
    stored = {block: _stored_blocks(weight, block) for block in BLOCKS}
    block = best_block(card, tuple(rows), N, K, stored, weight.dtype)
    if block is not None:
        return BlockSparseLinear.from_linear(linear, block)
    if dense:
        every = torch.ones(-(-N // 64), -(-K // 64), dtype=torch.bool)
        return BlockSparseLinear.from_linear(linear, (64, 64), every)
    return None


def _multiplied_out(linear: LowRankLinear, rows: Sequence[int], card: Card) -> nn.Module | None:
    """The product of the factors as a dense layer, where these would be slower."""
    N, K, R, dtype = linear.out_features, linear.in_features, linear.rank, linear.down.dtype
    if not product_wins(card, tuple(rows), N, K, R, dtype):
        return None
    product = (linear.up.detach().double() @ linear.down.detach().double()).to(dtype)
    whole = _linear_of(product, linear.bias)
    modules = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
    name = linear.activation
    return whole if name is None else nn.Sequential(whole, modules[name]())


def _accelerated_low_rank(linear: LowRankLinear, rows: Sequence[int]) -> nn.Module:
    N, K, R, dtype = linear.out_features, linear.in_features, linear.rank, linear.down.dtype
    factored = [low_rank_blocks_us(M, N, K, R, dtype) for M in rows]
    merged = [block_sparse_us(M, -(-N // 16), (16, K), dtype) for M in rows]
    if not all(us < other for us, other in zip(merged, factored, strict=True)):
        return PackedLowRankLinear(linear)
    product = (linear.up.double() @ linear.down.double()).to(dtype)
    new = BlockSparseLinear.from_linear(
        _linear_of(product, linear.bias), (16, K), _all_blocks(N, K)
    )
    new.activation = linear.activation
    return new


def _accelerated_linear(
    linear: nn.Linear, rows: Sequence[int], dense: bool | None
) -> nn.Module | None:
    N, K = linear.out_features, linear.in_features
    block = _best_block(linear, rows)
    if block is not None:
        return BlockSparseLinear.from_linear(linear, block)
    if dense or (dense is None and _wins(linear, -(-N // 16), (16, K), rows, 1 / 0.97)):
        return BlockSparseLinear.from_linear(linear, (16, K), _all_blocks(N, K))
    return None


def _linear_of(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    N, K = weight.shape
    linear = nn.Linear(K, N, bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = bias
    return linear


def _all_blocks(N: int, K: int) -> Tensor:
    """The mask that keeps everything, for blocks (16, K)."""
    return torch.ones(-(-N // 16), min(K, 1), dtype=torch.bool)


def _best_block(linear: nn.Linear, rows: Sequence[int]) -> tuple[int, int] | None:
    """The block of BLOCKS with the least predicted time, if it beats dense for every M."""
    weight = linear.weight.detach()
    best, best_us = None, float("inf")
    for block in BLOCKS:
        nnz = _stored_blocks(weight, block)
        own = sum(block_sparse_us(M, nnz, block, weight.dtype) for M in rows)
        packed = sum(_dense_blocks_us(linear, M) for M in rows)
        if own < min(best_us, packed) and _wins(linear, nnz, block, rows, 1.0):
            best, best_us = block, own
    return best


def _dense_blocks_us(linear: nn.Linear, M: int) -> float:
    blocks = -(-linear.out_features // 16)
    return block_sparse_us(M, blocks, (16, linear.in_features), linear.weight.dtype)


def _wins(
    linear: nn.Linear, nnz: int, block: tuple[int, int], rows: Sequence[int], slack: float
) -> bool:
    """Whether nnz blocks take at most `slack` times as long as dense, as predicted, for each M."""
    N, K, dtype = linear.out_features, linear.in_features, linear.weight.dtype
    return all(
        block_sparse_us(M, nnz, block, dtype) <= slack * dense_us(M, N, K, dtype) for M in rows
    )


def _stored_blocks(weight: Tensor, block: tuple[int, int]) -> int:
    """How many blocks of the weight [N, K] are not all zero."""
    (N, K), (bn, bk) = weight.shape, block
    nonzero = nn.functional.pad(weight != 0, (0, -K % bk, 0, -N % bn))
    return int(nonzero.view(-(-N // bn), bn, -(-K // bk), bk).any(3).any(1).sum())
