"""`accelerate`: the modules over the ops, put where they win."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunelm.nn.modules import (
    BlockSparseLinear,
    LowRankLinear,
    PackedLowRankLinear,
    all_blocks,
)
from prunelm.ops.backend import DTYPES, GPU_DTYPES
from prunelm.ops.cpu_cost import block_sparse_us, dense_us, low_rank_blocks_us
from prunelm.ops.gpu_cost import Card, best_block, card_of, product_wins

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

    What stands for a linear keeps its `in_features`, `out_features` and `bias`, and its `weight`
    can be read, as the dense weight that it stands for. A linear stays as it is where that could be
    seen to make a difference: with hooks, a parametrization, a forward or tensors of its own, or a
    dtype that the ops do not take. A weight that is tied is copied for each linear; a module that
    stands in several places stays one.

    Args:
        model: any module; nn.Linear and LowRankLinear in it are looked at, subclasses are not.
        rows: the numbers of rows M to be fast for; what wins must win for each.
        dense: True sends every dense linear through the op, False none, None those on the CPU that
            do not lose more than 3 %.

    Raises:
        ValueError: rows is empty or holds a number below 1, or the model is a script.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "model: expected a module, got a script of one; accelerate it before torch.jit.trace"
        )
    if not isinstance(model, nn.Module):
        hint = (
            "; accelerate its .model" if isinstance(getattr(model, "model", 0), nn.Module) else ""
        )
        got = type(model).__name__
        raise ValueError(f"model: expected a torch.nn.Module, got {got}{hint}")
    if not rows or min(rows) < 1:
        raise ValueError(f"rows: expected numbers of at least 1, got {list(rows)}")
    fast = copied(model).eval()
    for parameter in fast.parameters():
        if not nn.parameter.is_lazy(parameter):
            parameter.requires_grad_(False)
    replaced: dict[nn.Module, nn.Module] = {}
    for module in list(fast.modules()):
        new = _accelerated(module, rows, dense)
        if new is not module:
            replaced[module] = new
    if fast in replaced:
        return replaced[fast]
    for module in list(fast.modules()):
        for name, child in list(module._modules.items()):
            if child in replaced:
                setattr(module, name, replaced[child])
    leave_fused_layers(fast, set(replaced.values()))
    return fast


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; computed tensors that modules hold, which deepcopy refuses, become constants."""
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, computed)


def leave_fused_layers(fast: nn.Module, replaced: set[nn.Module]) -> None:
    """Has torch's encoder layers call their linears, whose weights they would read past them."""
    for module in fast.modules():
        if isinstance(module, nn.TransformerEncoder):
            if any(part in replaced for part in module.modules()):
                module.use_nested_tensor = False
        if isinstance(module, nn.TransformerEncoderLayer):
            if replaced & {module.linear1, module.linear2}:
                module.activation_relu_or_gelu = 0


def _accelerated(module: nn.Module, rows: Sequence[int], dense: bool | None) -> nn.Module:
    """What stands for one module in the accelerated copy; the module itself where nothing wins."""
    new: nn.Module | None = None
    if not isinstance(module, (nn.Linear, LowRankLinear)) or not is_plain(module):
        return module
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
    if new is None:
        return module
    for name, value in vars(module).items():  # what the model's own code has noted there
        if name not in vars(new):
            setattr(new, name, value)
    return new.eval().requires_grad_(False)


def is_plain(module: nn.Linear | LowRankLinear) -> bool:
    """Whether a linear does what its class says, by its own parameters alone, and is not empty."""
    own = vars(module)
    hooks = (name for name in own if "_hook" in name)
    names = {"down", "up", "bias"} if isinstance(module, LowRankLinear) else {"weight", "bias"}
    parameters = [p for p in module._parameters.values() if p is not None]
    return (
        set(module._parameters) == names
        and not (module._buffers or module._modules or "forward" in own)
        and not any(own[name] for name in hooks)
        and module.in_features > 0 < module.out_features
        and all(p.dtype in DTYPES and type(p) is nn.Parameter for p in parameters)
        and all(p.layout is torch.strided for p in parameters)
    )


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
    new = BlockSparseLinear.from_linear(_linear_of(product, linear.bias), (16, K), all_blocks(N, K))
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
        return BlockSparseLinear.from_linear(linear, (16, K), all_blocks(N, K))
    return None


def _linear_of(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    N, K = weight.shape
    linear = nn.Linear(K, N, bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = bias
    return linear


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
