"""Linear layer with a block-sparse weight: the contract, its reference, its gradient."""

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
from prunelm.ops.backend import autocast, choose
from prunelm.sparse import BlockSparse

_OP = torch.ops.prunelm.block_sparse_linear.default  # an overload found once saves a look-up
_direct = prunelm._C.block_sparse_linear


def block_sparse_linear(
    x: Tensor,
    weight: BlockSparse,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias), reading only the stored blocks.

    A row's result depends on neither M nor the number of threads, bit for bit on one backend and
    machine: a sum runs over the stored blocks in ascending order and is cut by a rule that knows
    only them. Blocks that are not stored are skipped, so that an infinity or NaN in x does not meet
    their zeros.
    Sums are float32 (float64 for float64), also for 16-bit dtypes. Gradients flow to x,
    weight.values and bias; values of a block past N or K get zeros.

    Args:
        x: [..., K] float32, float64, bfloat16 or float16; any number of rows M, also none.
        weight: [N, K] blocks of x's dtype; beside float32 rows also bfloat16 or float16.
        bias: [N], x's dtype or the weight's.
        activation: None, "relu", "gelu" (exact) or "silu".
        backend: None (chosen from device, dtypes and sizes), "cpu", "cuda", "triton" or
            "reference". One that is named never falls back.

    Returns:
        [..., N], x's dtype; under autocast, autocast's. Its memory need not be torch's own: it can
        be written to, but not resized in place.

    Raises:
        ValueError: activation or backend is unknown, the backend cannot run, or x does not have K
            columns.
        RuntimeError: a tensor is not as above; it says which one and what was expected.
    """
    if backend is None and not is_compiling():
        y = _direct(x, weight.values, weight.crow, weight.col, weight.shape, bias, activation)
        if y is not None:
            return y
    code, K = activation_code(activation), weight.shape[1]
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x: expected [..., {K}], got {list(x.shape)}")
    values, device = weight.values, x.device.type
    if torch.is_autocast_enabled(device):
        x, values, bias = autocast(x, values, bias)
    weights = {"values": values}
    chosen = choose("block_sparse_linear", device, x, weights, backend, weight.shape[0])
    if chosen == "reference":
        stored = BlockSparse(values, weight.crow, weight.col, weight.shape)
        return block_sparse_linear_reference(x, stored, bias, activation)
    run = _triton if chosen == "triton" else _OP
    return cast(Tensor, run(x, values, weight.crow, weight.col, bias, weight.shape[0], code))


def block_sparse_linear_reference(
    x: Tensor, weight: BlockSparse, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """block_sparse_linear in plain torch, through the dense weight."""
    bias = None if bias is None else bias.to(x.dtype)
    return activate(F.linear(x, weight.to_dense().to(x.dtype), bias), activation)


@torch.library.custom_op("prunelm::block_sparse_linear_triton", mutates_args=())
def _triton(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: int,
) -> Tensor:
    from prunelm.triton_kernels.block_sparse_linear import block_sparse_linear as launch

    y: Tensor = launch(
        x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous(),
        values.transpose(1, 2).contiguous().transpose(1, 2),
        crow,
        col,
        bias,
        out_features=out_features,
        activation=ACTIVATIONS[activation],
    )
    return y.view(*x.shape[:-1], out_features)


@_triton.register_fake
@torch.library.register_fake("prunelm::block_sparse_linear")
def _fake(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("prunelm::block_sparse_linear_grad_x")
def _fake_grad_x(
    grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, in_features: int
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.register_fake("prunelm::block_sparse_linear_grad_values")
def _fake_grad_values(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, bn: int, bk: int
) -> Tensor:
    return grad.new_empty((col.shape[0], bk, bn)).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, crow, col, bias, ctx.out_features, ctx.activation = inputs
    ctx.save_for_backward(x, values, crow, col, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, crow, col, bias = ctx.saved_tensors
    op = torch.ops.prunelm
    if ctx.activation:
        # Computed again rather than kept: M * N numbers for the whole time between are dearer.
        before = op.block_sparse_linear(x, values, crow, col, bias, ctx.out_features, 0)
        grad = activation_gradient(grad, before, ctx.activation)
    # 16-bit gradients are summed in float32; float64 stays.
    wide = torch.promote_types(grad.dtype, torch.float32)
    wide_grad = grad.to(wide)
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = op.block_sparse_linear_grad_x(wide_grad, values.to(wide), crow, col, x.shape[-1])
        grad_x = grad_x.to(x.dtype)
    if ctx.needs_input_grad[1]:
        bn, bk = values.shape[1:]
        grad_values = op.block_sparse_linear_grad_values(wide_grad, x.to(wide), crow, col, bn, bk)
        grad_values = grad_values.to(values.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = wide_grad.reshape(-1, wide_grad.shape[-1]).sum(0).to(bias.dtype)
    return grad_x, grad_values, None, None, grad_bias, None, None


for _op in ("prunelm::block_sparse_linear", "prunelm::block_sparse_linear_triton"):
    torch.library.register_autograd(_op, _backward, setup_context=_save)
