"""Linear layer whose weight is a product of two thin factors: contract, reference, gradient."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from prunelm.ops import _library  # noqa: F401  (loads the extension)
from prunelm.ops.activation import activate, activation_code, activation_gradient
from prunelm.ops.backend import autocast, choose


def low_rank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation((x @ down.T) @ up.T + bias), without writing the [M, R] middle to memory.

    The middle stays in cache, float32 (float64 for float64) also for 16-bit dtypes. A row's result
    depends on neither M nor the number of threads, as for `block_sparse_linear`. Gradients flow to
    all tensors; the middle is computed again for them.

    Args:
        x: [..., K] float32, float64, bfloat16 or float16; any number of rows M, also none.
        down: [R, K], x's dtype; beside float32 rows also bfloat16 or float16.
        up: [N, R], down's dtype. R may be 0.
        bias: [N], x's dtype or up's.
        activation: None, "relu", "gelu" (exact) or "silu".
        backend: None (chosen from device and dtypes), "cpu", "cuda", "triton" or "reference". One
            that is named never falls back.

    Returns:
        [..., N], x's dtype; under autocast, autocast's.

    Raises:
        ValueError: activation or backend is unknown, or the backend cannot run.
        RuntimeError: a tensor is not as above; it says which one and what was expected.
    """
    code = activation_code(activation)
    rows, thin, wide, bias = autocast(x, down, up, bias)
    assert rows is not None and thin is not None and wide is not None
    chosen = choose("low_rank_linear", rows, {"down": thin, "up": wide}, backend)
    if chosen == "reference":
        return low_rank_linear_reference(rows, thin, wide, bias, activation)
    return cast(Tensor, torch.ops.prunelm.low_rank_linear(rows, thin, wide, bias, code))


def low_rank_linear_reference(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """low_rank_linear in plain torch."""
    bias = None if bias is None else bias.to(x.dtype)
    return activate(F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype), bias), activation)


@torch.library.register_fake("prunelm::low_rank_linear")
def _fake(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], up.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, down, up, bias, ctx.activation = inputs
    ctx.save_for_backward(x, down, up, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, down, up, bias = ctx.saved_tensors
    if ctx.activation:
        before = torch.ops.prunelm.low_rank_linear(x, down, up, bias, 0)
        grad = activation_gradient(grad, before, ctx.activation)
    rows = grad.reshape(-1, grad.shape[-1]).to(up.dtype)  # [M, N]
    flat = x.reshape(-1, x.shape[-1]).to(down.dtype)  # [M, K]
    middle = rows @ up  # [M, R]
    grad_x = grad_down = grad_up = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = (middle @ down).to(x.dtype).view(x.shape)
    if ctx.needs_input_grad[1]:
        grad_down = middle.T @ flat
    if ctx.needs_input_grad[2]:
        grad_up = rows.T @ (flat @ down.T)
    if ctx.needs_input_grad[3]:
        grad_bias = rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
        grad_bias = grad_bias.to(bias.dtype)
    return grad_x, grad_down, grad_up, grad_bias, None


torch.library.register_autograd("prunelm::low_rank_linear", _backward, setup_context=_save)
