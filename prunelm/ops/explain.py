"""What a linear op would do with given tensors, and why."""

import torch
from torch import Tensor

from prunelm.ops.backend import Explanation, autocast, choose, refusals
from prunelm.ops.break_even import block_sparse_us, dense_us, low_rank_us
from prunelm.sparse import BlockSparse


def explain(
    x: Tensor, weight: BlockSparse | tuple[Tensor, Tensor], backend: str | None = None
) -> Explanation:
    """What the linear op would run for x [..., K], and why nothing else.

    Args:
        x: [..., K].
        weight: a BlockSparse for block_sparse_linear, or (down [R, K], up [N, R]) for
            low_rank_linear.
        backend: as for the op.

    Raises:
        ValueError: the backend asked for is unknown or cannot run.
    """
    if isinstance(weight, BlockSparse):
        op, weights = "block_sparse_linear", {"values": weight.values}
        N, K = weight.shape
    else:
        op, weights = "low_rank_linear", {"down": weight[0], "up": weight[1]}
        N, K = weight[1].shape[0], weight[0].shape[1]
    if torch.is_autocast_enabled(x.device.type):
        x, *cast = autocast(x, *weights.values())
        weights = dict(zip(weights, cast, strict=True))
    dtype = next(iter(weights.values())).dtype
    M = x.numel() // max(K, 1)
    if isinstance(weight, BlockSparse):
        own = block_sparse_us(M, weight.nnz, weight.block, dtype)
    else:
        own = low_rank_us(M, N, K, weight[0].shape[0], dtype)
    chosen = choose(op, x.device.type, x, weights, backend)
    predicted = {"cpu": own, "dense": dense_us(M, N, K, x.dtype)} if x.device.type == "cpu" else {}
    return Explanation(chosen, refusals(op, x, weights), predicted)
