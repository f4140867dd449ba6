"""Linear layer whose weight is a product of two thin factors: contract, reference, gradient."""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

import prunelm._C
from prunelm.ops import _library  # noqa: F401  (loads the extension)
from prunelm.ops.activation import (
    ACTIVATIONS,
    activate,
    activation_code,
    activation_gradient,
)
from prunelm.ops.backend import autocast, choose, in_onnx_export
from prunelm.ops.block_sparse_linear import block_sparse_linear
from prunelm.ops.tensors import check_one_device, check_tensors
from prunelm.sparse import BlockSparse

_OP = torch.ops.prunelm.low_rank_linear.default  # an overload found once saves a look-up
_OP_BLOCKS = torch.ops.prunelm.low_rank_linear_blocks.default
_direct = prunelm._C.low_rank_linear


def low_rank_linear(
    x: Tensor,
    down: Tensor | BlockSparse,
    up: Tensor | BlockSparse,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation((x @ down.T) @ up.T + bias), without writing the [M, R] middle to memory.

    On CPU the middle stays in cache, float32 (float64 for float64) also for 16-bit dtypes; on GPUs
    it is rounded to x's dtype, as by two linears. A row's result depends on neither M nor the
    number of threads, as for `block_sparse_linear`; for Triton, beside rounding, M < 64 and M >= 64
    may differ, since other instructions compute them. Gradients flow to all tensors; the middle is
    computed again for them. On a GPU, sizes at which two dense products are predicted to be faster
    get these, unless a backend is named.

    Plain factors are rearranged at each call on CPU, which is most of the work at small M. For
    inference there they may be given as blocks, laid out once: `BlockSparse.from_dense(down, (16,
    K))`. GPUs read plain factors as they are, and faster than blocks. Under
    torch.onnx.export the reference runs, in plain torch.

    Args:
        x: [..., K] float32, float64, bfloat16 or float16; any number of rows M, also none.
        down: [R, K], x's dtype; beside float32 rows also bfloat16 or float16.
        up: [N, R], down's dtype and kind. R may be 0.
        bias: [N], x's dtype or up's.
        activation: None, "relu", "gelu" (exact) or "silu".
        backend: None (chosen from device, dtypes and sizes), "cpu", "cuda", "triton" or
            "reference". One that is named never falls back.

    Returns:
        [..., N], x's dtype; under autocast, autocast's.

    Raises:
        ValueError: activation or backend is unknown, the backend cannot run, or only one factor is
            in blocks.
        RuntimeError: a tensor is not as above; it says which one and what was expected.
    """
    if isinstance(down, BlockSparse) and isinstance(up, BlockSparse):
        if backend is None and not is_compiling():
            y = _direct(
                x, down.values, down.crow, down.col, down.shape,
                up.values, up.crow, up.col, up.shape, bias, activation,
            )  # fmt: skip
            if y is not None:
                return y
        if backend is None and in_onnx_export():
            plain = (down.to_dense(), up.to_dense())
            return low_rank_linear_reference(x, *plain, bias, activation)
        return _through_blocks(x, down, up, bias, activation_code(activation), backend)
    if isinstance(down, BlockSparse) or isinstance(up, BlockSparse):
        raise ValueError("down, up: expected both in blocks or none, got one")
    check_tensors(x=x, down=down, up=up, bias=bias)
    code, thin, wide, device = activation_code(activation), down, up, x.device.type
    if backend is None and in_onnx_export():
        return low_rank_linear_reference(x, down, up, bias, activation)
    if torch.is_autocast_enabled(device):
        x, thin, wide, bias = autocast(x, thin, wide, bias)
    chosen = choose("low_rank_linear", device, x, {"down": thin, "up": wide}, backend)
    if chosen == "reference":
        return low_rank_linear_reference(x, thin, wide, bias, activation)
    run = _triton if chosen == "triton" else _OP
    return cast(Tensor, run(x, thin, wide, bias, code))


def _through_blocks(
    x: Tensor,
    down: BlockSparse,
    up: BlockSparse,
    bias: Tensor | None,
    code: int,
    backend: str | None,
) -> Tensor:
    parts = {f"down.{name}": getattr(down, name) for name in ("values", "crow", "col")}
    parts |= {f"up.{name}": getattr(up, name) for name in ("values", "crow", "col")}
    check_tensors(x=x, **parts, bias=bias)
    thin, wide, device = down.values, up.values, x.device.type
    on_gpu = device == "cuda" if backend is None else backend in ("cuda", "triton")
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, thin, wide, bias)
    )
    if on_gpu or needs_grad:
        middle = block_sparse_linear(x, down, backend=backend)
        return block_sparse_linear(middle, up, bias, ACTIVATIONS[code], backend)
    if torch.is_autocast_enabled(device):
        x, thin, wide, bias = autocast(x, thin, wide, bias)
    if backend is not None or device != "cpu":  # else it costs as much as a small product
        weights = {"down": thin, "up": wide}
        if choose("low_rank_linear", device, x, weights, backend) == "reference":
            plain = (down.to_dense(), up.to_dense())
            return low_rank_linear_reference(x, *plain, bias, ACTIVATIONS[code])
    N, R = up.shape
    factors = (thin, down.crow, down.col, wide, up.crow, up.col)
    return cast(Tensor, _OP_BLOCKS(x, *factors, bias, R, N, code))


def low_rank_linear_reference(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """low_rank_linear in plain torch."""
    check_tensors(x=x, down=down, up=up, bias=bias)
    bias = None if bias is None else bias.to(x.dtype)
    return activate(F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype), bias), activation)


@torch.library.custom_op("prunelm::low_rank_linear_triton", mutates_args=())
def _triton(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    from prunelm.triton_kernels.low_rank_linear import low_rank_linear as launch

    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    factors = (down.contiguous(), up.contiguous())
    y: Tensor = launch(rows, *factors, bias, activation=ACTIVATIONS[activation])
    return y.view(*x.shape[:-1], up.shape[0])


@_triton.register_fake
@torch.library.register_fake("prunelm::low_rank_linear")
def _fake(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    check_one_device({"x": x, "down": down, "up": up, "bias": bias})
    return x.new_empty((*x.shape[:-1], up.shape[0]))


@torch.library.register_fake("prunelm::low_rank_linear_blocks")
def _fake_blocks(
    x: Tensor,
    down_values: Tensor,
    down_crow: Tensor,
    down_col: Tensor,
    up_values: Tensor,
    up_crow: Tensor,
    up_col: Tensor,
    bias: Tensor | None,
    rank: int,
    out_features: int,
    activation: int,
) -> Tensor:
    thin = {"down_values": down_values, "down_crow": down_crow, "down_col": down_col}
    wide = {"up_values": up_values, "up_crow": up_crow, "up_col": up_col}
    check_one_device({"x": x, **thin, **wide, "bias": bias})
    return x.new_empty((*x.shape[:-1], out_features))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, down, up, bias, ctx.activation = inputs
    ctx.save_for_backward(x, down, up, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, down, up, bias = ctx.saved_tensors
    check_tensors(grad=grad, x=x, down=down, up=up, bias=bias)
    M = math.prod(x.shape[:-1])
    flat = x.reshape(M, x.shape[-1]).to(down.dtype)  # [M, K]
    z = None
    if x.is_cuda and (ctx.activation or ctx.needs_input_grad[2]):
        z = flat @ down.T  # [M, R]
    if ctx.activation:
        if z is not None:
            before = F.linear(z, up, bias).view(grad.shape)
        else:
            before = torch.ops.prunelm.low_rank_linear(x, down, up, bias, 0)
        grad = activation_gradient(grad, before, ctx.activation)
    rows = grad.reshape(M, grad.shape[-1]).to(up.dtype)  # [M, N]
    middle = rows @ up  # [M, R]
    grad_x = grad_down = grad_up = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = (middle @ down).to(x.dtype).view(x.shape)
    if ctx.needs_input_grad[1]:
        grad_down = middle.T @ flat
    if ctx.needs_input_grad[2]:
        grad_up = rows.T @ (flat @ down.T if z is None else z)
    if ctx.needs_input_grad[3]:
        grad_bias = rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
        grad_bias = grad_bias.to(bias.dtype)
    return grad_x, grad_down, grad_up, grad_bias, None


for _op in ("prunelm::low_rank_linear", "prunelm::low_rank_linear_triton"):
    torch.library.register_autograd(_op, _backward, setup_context=_save)
