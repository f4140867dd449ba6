"""Compiled operators; each one's contract is its docstring."""

from prunelm.ops.beam_step import BeamStep, beam_step, beam_step_reference
from prunelm.ops.block_sparse_linear import block_sparse_linear, block_sparse_linear_reference
from prunelm.ops.explain import explain
from prunelm.ops.low_rank_linear import low_rank_linear, low_rank_linear_reference
from prunelm.ops.rnnt_loss import rnnt_loss, rnnt_loss_reference
from prunelm.ops.tree_attention import tree_attention, tree_attention_reference

__all__ = [
    "BeamStep",
    "beam_step",
    "beam_step_reference",
    "block_sparse_linear",
    "block_sparse_linear_reference",
    "explain",
    "low_rank_linear",
    "low_rank_linear_reference",
    "rnnt_loss",
    "rnnt_loss_reference",
    "tree_attention",
    "tree_attention_reference",
]
