"""Modules over the linear ops, and `accelerate`, which puts them where they win."""

from prunelm.nn.acceleration import BLOCKS, accelerate, copied, is_plain, leave_fused_layers
from prunelm.nn.modules import (
    BlockSparseLinear,
    LowRankLinear,
    PackedLowRankLinear,
    is_accelerated,
    refuse_accelerated,
)

__all__ = [
    "BLOCKS",
    "BlockSparseLinear",
    "LowRankLinear",
    "PackedLowRankLinear",
    "accelerate",
    "copied",
    "is_accelerated",
    "is_plain",
    "leave_fused_layers",
    "refuse_accelerated",
]
