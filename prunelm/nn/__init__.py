"""Modules over the linear ops, and `accelerate`, which puts them where they win."""

from prunelm.nn.acceleration import BLOCKS, accelerate, copied
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
    "refuse_accelerated",
]
