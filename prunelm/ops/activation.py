"""The activations that the linear ops apply to their result."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

# Position in this tuple is the code that the compiled ops take.
ACTIVATIONS = (None, "relu", "gelu", "silu")
_CODES = {activation: code for code, activation in enumerate(ACTIVATIONS)}


def activation_code(activation: str | None) -> int:
    """The compiled ops' code of an activation; ValueError if there is no such activation."""
    code = _CODES.get(activation)
    if code is None:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    return code


def activate(x: Tensor, activation: str | None) -> Tensor:
    """The activation of x in plain torch; gelu is the exact one, x * Phi(x)."""
    code = activation_code(activation)
    return x if code == 0 else (F.relu, F.gelu, F.silu)[code - 1](x)


def activation_gradient(grad: Tensor, x: Tensor, code: int) -> Tensor:
    """grad times the derivative, at x, of the activation with this code."""
    if code == 0:
        return grad
    aten = torch.ops.aten
    if code == 1:
        return cast(Tensor, aten.threshold_backward(grad, x, 0))
    return cast(Tensor, (aten.gelu_backward if code == 2 else aten.silu_backward)(grad, x))
