"""Linear layer with a block-sparse weight: the contract, its reference, its gradient."""

import math
from functools import partial
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
from prunelm.ops.backend import WITH_TRITON, autocast, choose, in_onnx_export
from prunelm.ops.tensors import can_look_at, check_one_device, check_tensors
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
    their zeros. CUDA departs from the first: in 16 bits it does not cut sums for M above 512, and
    may round otherwise there. Triton departs from both: with TF32, and in 16 bits for bn < 8, it
    may round otherwise for M below 64; and it takes up to 128 outputs together, so that what is not
    finite in x meets zeros where another of their block rows stores something.
    Under torch.onnx.export the reference runs, in plain torch.
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
    check_tensors(x=x, values=weight.values, crow=weight.crow, col=weight.col, bias=bias)
    code, K = activation_code(activation), weight.shape[1]
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x: expected [..., {K}], got {list(x.shape)}")
    values, device = weight.values, x.device.type
    if backend is None and in_onnx_export():
        return block_sparse_linear_reference(x, weight, bias, activation)
    if torch.is_autocast_enabled(device):
        x, values, bias = autocast(x, values, bias)
    weights = {"values": values}
    chosen = choose("block_sparse_linear", device, x, weights, backend, weight.shape[0])
    if chosen == "reference":
        stored = BlockSparse(values, weight.crow, weight.col, weight.shape)
        return block_sparse_linear_reference(x, stored, bias, activation)
    crow, col, gpu_index = weight.crow, weight.col, weight.gpu_index
    learns = torch.is_grad_enabled() and (x.requires_grad or values.requires_grad)
    if chosen == "triton" or (chosen == "cuda" and learns and WITH_TRITON):
        gpu_index = weight.with_gpu_index().gpu_index  # once for the call and its gradients
    run = _triton if chosen == "triton" else _OP
    return cast(Tensor, run(x, values, crow, col, bias, weight.shape[0], code, gpu_index))


def block_sparse_linear_reference(
    x: Tensor, weight: BlockSparse, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """block_sparse_linear in plain torch, through the dense weight."""
    check_tensors(x=x, values=weight.values, crow=weight.crow, col=weight.col, bias=bias)
    _check_pattern(weight)
    bias = None if bias is None else bias.to(x.dtype)
    return activate(F.linear(x, weight.to_dense().to(x.dtype), bias), activation)


def _check_pattern(weight: BlockSparse) -> None:
    """As the compiled op does, where looking costs no wait for a device and nothing is traced."""
    crow, col = weight.crow, weight.col
    if not can_look_at(crow, col):
        return
    (N, K), (bn, bk) = weight.shape, weight.block
    rows, columns = -(-N // bn), -(-K // bk)
    for name, index, size in (("crow", crow, rows + 1), ("col", col, weight.nnz)):
        if index.dtype != torch.int32 or index.shape != (size,):
            found = f"{index.dtype} {list(index.shape)}"
            raise RuntimeError(f"{name}: expected torch.int32 [{size}], got {found}")
    if crow[0] != 0 or crow[-1] != weight.nnz or (crow.diff() < 0).any():
        raise RuntimeError("crow: expected 0 to nnz, never falling, got something else")
    begins = torch.zeros(weight.nnz + 1, dtype=torch.bool).index_fill(0, crow.long(), True)
    rises = (col.diff() > 0) | begins[1:-1]
    if (col < 0).any() or (col >= columns).any() or not rises.all():
        raise RuntimeError(
            f"col: expected columns in [0, {columns}), ascending in each row, got something else"
        )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


def _bn_fastest(values: Tensor) -> Tensor:
    return values.transpose(1, 2).contiguous().transpose(1, 2)


@torch.library.custom_op("prunelm::block_sparse_linear_triton", mutates_args=())
def _triton(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: int,
    gpu_index: Tensor | None = None,
) -> Tensor:
    from prunelm.triton_kernels.block_sparse_linear import block_sparse_linear as launch

    y: Tensor = launch(
        _rows(x),
        _bn_fastest(values),
        crow,
        col,
        bias,
        gpu_index,
        out_features=out_features,
        activation=ACTIVATIONS[activation],
    )
    return y.view(*x.shape[:-1], out_features)


@torch.library.custom_op("prunelm::block_sparse_linear_grad_x_triton", mutates_args=())
def _triton_grad_x(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    in_features: int,
    gpu_index: Tensor | None = None,
) -> Tensor:
    from prunelm.triton_kernels.block_sparse_linear import block_sparse_linear_grad_x as launch

    out: Tensor = launch(
        _rows(grad), _bn_fastest(values), crow, col, gpu_index, in_features=in_features
    )
    return out.view(*grad.shape[:-1], in_features)


@torch.library.custom_op("prunelm::block_sparse_linear_grad_values_triton", mutates_args=())
def _triton_grad_values(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    bn: int,
    bk: int,
    gpu_index: Tensor | None = None,
) -> Tensor:
    from prunelm.triton_kernels.block_sparse_gradient import (
        block_sparse_linear_grad_values as launch,
    )

    out: Tensor = launch(_rows(grad), _rows(x), crow, col, gpu_index, block=(bn, bk))
    return out


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
    gpu_index: Tensor | None = None,
) -> Tensor:
    check_one_device({"x": x, "values": values, "crow": crow, "col": col, "bias": bias})
    return x.new_empty((*x.shape[:-1], out_features))


@_triton_grad_x.register_fake
@torch.library.register_fake("prunelm::block_sparse_linear_grad_x")
def _fake_grad_x(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    in_features: int,
    gpu_index: Tensor | None = None,
) -> Tensor:
    check_one_device({"grad": grad, "values": values, "crow": crow, "col": col})
    return grad.new_empty((*grad.shape[:-1], in_features))


@_triton_grad_values.register_fake
@torch.library.register_fake("prunelm::block_sparse_linear_grad_values")
def _fake_grad_values(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    bn: int,
    bk: int,
    gpu_index: Tensor | None = None,
) -> Tensor:
    check_one_device({"grad": grad, "x": x, "crow": crow, "col": col})
    return grad.new_empty((col.shape[0], bk, bn)).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, crow, col, bias, ctx.out_features, ctx.activation, gpu_index = inputs
    ctx.save_for_backward(x, values, crow, col, bias, gpu_index)


def _backward(ctx: Any, grad: Tensor, run: Any) -> tuple[Tensor | None, ...]:
    x, values, crow, col, bias, gpu_index = ctx.saved_tensors
    check_tensors(grad=grad, x=x, values=values, crow=crow, col=col, bias=bias)
    if ctx.activation:
        # Computed again rather than kept: M * N numbers for the whole time between are dearer.
        before = run(x, values, crow, col, bias, ctx.out_features, 0, gpu_index)
        grad = activation_gradient(grad, before, ctx.activation)
    native = run is _OP and not (WITH_TRITON and x.device.type == "cuda")
    gradients = _native_gradients if native else _triton_gradients
    pattern = (values, crow, col, gpu_index)
    grad_x, grad_values = gradients(grad, x, *pattern, ctx.needs_input_grad[:2])
    grad_bias = None
    if ctx.needs_input_grad[4]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_bias = grad.flatten(0, -2) if grad.dim() > 1 else grad[None]
        grad_bias = grad_bias.sum(0, dtype=wide).to(bias.dtype)
    return grad_x, grad_values, None, None, grad_bias, None, None, None


def _native_gradients(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    gpu_index: Tensor | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to x and values by the compiled ops, which take 32 and 64 bits only."""
    op = torch.ops.prunelm
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad = grad.to(wide)
    grad_x = grad_values = None
    if wanted[0]:
        grad_x = op.block_sparse_linear_grad_x(grad, values.to(wide), crow, col, x.shape[-1])
        grad_x = grad_x.to(x.dtype)
    if wanted[1]:
        bn, bk = values.shape[1:]
        grad_values = op.block_sparse_linear_grad_values(grad, x.to(wide), crow, col, bn, bk)
        grad_values = grad_values.to(values.dtype)
    return grad_x, grad_values


def _triton_gradients(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    gpu_index: Tensor | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The same by the Triton kernels, in x's dtype with sums in float32."""
    grad_x = grad_values = None
    if wanted[0]:
        grad_x = _triton_grad_x(grad, values, crow, col, x.shape[-1], gpu_index)
    if wanted[1]:
        grad_values = _triton_grad_values(grad, x, crow, col, *values.shape[1:], gpu_index)
    return grad_x, grad_values


for _name, _run in (("prunelm::block_sparse_linear", _OP), (_triton, _triton)):
    torch.library.register_autograd(_name, partial(_backward, run=_run), setup_context=_save)
