"""Modules over the linear ops, and `accelerate`, which puts them where they win."""

import torch
from torch import Tensor, nn

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
        bias: [N] or None.
    """

    crow: Tensor
    col: Tensor

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
        self.bias: nn.Parameter | None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach())
        else:
            self.register_parameter("bias", None)

    @property
    def weight(self) -> BlockSparse:
        """A view on the module's tensors."""
        shape = (self.out_features, self.in_features)
        return BlockSparse(self.values, self.crow, self.col, shape)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return ops.block_sparse_linear(x, self.weight, self.bias, self.activation)
