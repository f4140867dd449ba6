"""Self-attention of new nodes of a token tree to their ancestors, over a pool of K and V."""

from typing import Literal

import torch
from torch import Tensor

from prunelm.ops import _library  # noqa: F401  (loads the extension)

Backend = Literal["reference", "cpu"]


def tree_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    path: Tensor,
    length: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Rotates, stores keys and values in the pool, attends along each row's own path.

    Row r is the node in slot path[r, length[r] - 1]; its ancestors, root first, lie before it in
    path[r] and are in the pool already or are rows of this call. With q, k, v the three parts of
    qkv, q and k turned by the rotary angles (pairs (x[i], x[i + D / 2]), arXiv 2104.09864):

        key[slot], value[slot] = k, v
        out[r, h] = softmax_p(q[r, h] . key[path[r, p], h] / sqrt(D)) @ value[path[r, p], h]

    over p < length[r]. A row's result depends on its own path alone, bit for bit: neither on R nor
    on P. For search: no gradient on the CPU backend; where one is wanted, the reference runs.

    Args:
        qkv: [R, 3, H, D] float32 or float64 on the CPU backend, D even.
        cos, sin: [R, D / 2], qkv's dtype.
        path: [R, P] int64; what lies past a row's length is not read by the CPU backend, but must
            be a valid slot for the reference.
        length: [R] int64, 1 to P.
        key, value: [C, H, D], qkv's dtype, contiguous; written in place.
        backend: None (chosen), "reference" or "cpu".

    Returns:
        [R, H, D].

    Raises:
        ValueError: the backend is unknown or cannot run this.
        RuntimeError: a shape, dtype or index is not as above.
    """
    reasons = []
    if qkv.device.type != "cpu":
        reasons.append(f"tensors are on {qkv.device}")
    if qkv.dtype not in (torch.float32, torch.float64):
        reasons.append(f"qkv is {qkv.dtype}")
    if torch.is_grad_enabled() and qkv.requires_grad:
        reasons.append("a gradient is wanted")
    if backend not in (None, "reference", "cpu"):
        raise ValueError(f"backend: expected None, 'reference' or 'cpu', got {backend!r}")
    if backend == "cpu" and reasons:
        raise ValueError(f"backend: 'cpu' cannot run this: {'; '.join(reasons)}")
    if backend == "reference" or reasons:
        return tree_attention_reference(qkv, cos, sin, path, length, key, value)
    out: Tensor = torch.ops.prunelm.tree_attention(
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), path, length, key, value
    )
    return out


def tree_attention_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    path: Tensor,
    length: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """tree_attention in plain torch, which gathers every path; differentiable in q."""
    query, new_key, new_value = qkv.unbind(1)
    slot = path.gather(1, length[:, None] - 1)[:, 0]
    key[slot] = _rotate(new_key, cos, sin).detach().to(key.dtype)
    value[slot] = new_value.detach().to(value.dtype)
    hidden = torch.arange(path.shape[1], device=path.device) >= length[:, None]
    # Products and sums, not batched matmuls, whose kernel would depend on R.
    score = (_rotate(query, cos, sin)[:, None] * key[path]).sum(-1) * qkv.shape[-1] ** -0.5
    weight = score.masked_fill(hidden[:, :, None], -torch.inf).softmax(1)
    out: Tensor = (weight[..., None] * value[path]).sum(1)
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@torch.library.register_fake("prunelm::tree_attention")
def _fake(
    qkv: Tensor, cos: Tensor, sin: Tensor, path: Tensor, length: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    return torch.empty_like(qkv[:, 0], memory_format=torch.contiguous_format)
