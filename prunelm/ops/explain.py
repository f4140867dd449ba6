"""What a linear op would do with given tensors, and why."""

import torch
from torch import Tensor

from prunelm.ops import gpu_cost
from prunelm.ops.backend import Explanation, autocast, choose, refusals
from prunelm.ops.cpu_cost import block_sparse_us, dense_us, low_rank_us
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
    M = x.numel() // max(K, 1)
    chosen = choose(op, x.device.type, x, weights, backend, N)
    why = refusals(op, x, weights)
    if x.device.type == "cpu":
        return Explanation(chosen, why, _on_cpu(weight, M, N, K, x.dtype, weights))
    if x.device.type != "cuda":
        return Explanation(chosen, why, {})
    card = gpu_cost.card_of(x.device.index or 0)
    found = {"dense": gpu_cost.dense_us(card, M, N, K, x.dtype)}
    for name in ("cuda", "triton"):
        if isinstance(weight, BlockSparse):
            found[name] = gpu_cost.block_sparse_us(
                card, name, M, N, K, weight.nnz, weight.block, x.dtype
            )
        else:
            R = weight[0].shape[0]
            found[name] = gpu_cost.low_rank_us(card, name, M, N, K, R, x.dtype)
            found["reference"] = gpu_cost.low_rank_us(card, "reference", M, N, K, R, x.dtype)
    return Explanation(
        chosen,
        why,
        {name: one.us for name, one in found.items()},
        card.name,
        tuple(name for name, one in found.items() if one.measured),
    )


def _on_cpu(
    weight: BlockSparse | tuple[Tensor, Tensor],
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    weights: dict[str, Tensor],
) -> dict[str, float]:
    stored = next(iter(weights.values())).dtype
    if isinstance(weight, BlockSparse):
        own = block_sparse_us(M, weight.nnz, weight.block, stored)
    else:
        own = low_rank_us(M, N, K, weight[0].shape[0], stored)
    return {"cpu": own, "dense": dense_us(M, N, K, dtype)}
