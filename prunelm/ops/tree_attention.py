"""Self-attention of new nodes of a token tree to their ancestors, over a pool of K and V."""

from typing import Literal

import torch
from torch import Tensor

from prunelm.ops import _library  # noqa: F401  (loads the extension)
from prunelm.ops.backend import GPU_DTYPES, WITH_CUDA
from prunelm.ops.tensors import can_look_at, check_one_device, check_tensors

Backend = Literal["reference", "cpu", "cuda"]
MOST_HEAD_DIM = 512  # of the CUDA backend


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
    on P. Of rows with the same slot any one is stored, and each has its own key. For search: where
    a gradient is wanted, the reference runs. The CUDA backend computes in float32, and since it
    cannot look at indices before it runs, a row with a wrong length or slot comes out as NaN.

    Args:
        qkv: [R, 3, H, D], D even; float32 or float64 on the CPU backend, float32, float16 or
            bfloat16 and D at most 512 on the CUDA backend.
        cos, sin: [R, D / 2], qkv's dtype.
        path: [R, P] int64; what lies past a row's length is not read.
        length: [R] int64, 1 to P.
        key, value: [C, H, D], qkv's dtype, contiguous; written in place.
        backend: None (chosen), "reference", "cpu" or "cuda".

    Returns:
        [R, H, D].

    Raises:
        ValueError: the backend is unknown or cannot run this.
        RuntimeError: a shape, dtype or index is not as above.
    """
    if backend not in (None, "reference", "cpu", "cuda"):
        raise ValueError(f"backend: expected None, 'reference', 'cpu' or 'cuda', got {backend!r}")
    check_tensors(qkv=qkv, cos=cos, sin=sin, path=path, length=length, key=key, value=value)
    native = backend or ("cuda" if qkv.is_cuda else "cpu")
    if native != "reference" and (reasons := _refusals(native, qkv)):
        if backend is not None:
            raise ValueError(f"backend: {backend!r} cannot run this: {'; '.join(reasons)}")
        native = "reference"
    if native == "reference":
        return tree_attention_reference(qkv, cos, sin, path, length, key, value)
    out: Tensor = torch.ops.prunelm.tree_attention(
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), path, length, key, value
    )
    return out


def _refusals(backend: str, qkv: Tensor) -> list[str]:
    """Why a native backend cannot run this."""
    reasons = []
    if qkv.device.type != backend:
        reasons.append(f"tensors are on {qkv.device}")
    if qkv.dtype not in (GPU_DTYPES if backend == "cuda" else (torch.float32, torch.float64)):
        reasons.append(f"qkv is {qkv.dtype}")
    if torch.is_grad_enabled() and qkv.requires_grad:
        reasons.append("a gradient is wanted")
    if backend == "cuda" and not WITH_CUDA:
        reasons.append("the extension was built without CUDA")
    if backend == "cuda" and qkv.shape[-1] > MOST_HEAD_DIM:
        reasons.append(f"head_dim is {qkv.shape[-1]}")
    return reasons


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
    check_tensors(qkv=qkv, cos=cos, sin=sin, path=path, length=length, key=key, value=value)
    hidden = torch.arange(path.shape[1], device=path.device) >= length[:, None]
    _check_paths(path, length, hidden, len(key))
    path = path.masked_fill(hidden, 0)
    query, new_key, new_value = qkv.unbind(1)
    slot = path.gather(1, length[:, None] - 1)[:, 0]
    key[slot] = _rotate(new_key, cos, sin).detach().to(key.dtype)
    value[slot] = new_value.detach().to(value.dtype)
    # Products and sums, not batched matmuls, whose kernel would depend on R.
    score = (_rotate(query, cos, sin)[:, None] * key[path]).sum(-1) * qkv.shape[-1] ** -0.5
    weight = score.masked_fill(hidden[:, :, None], -torch.inf).softmax(1)
    values = value[path].masked_fill(hidden[:, :, None, None], 0)
    out: Tensor = (weight[..., None] * values).sum(1)
    return out


def _check_paths(path: Tensor, length: Tensor, hidden: Tensor, slots: int) -> None:
    """As the compiled op does, where looking costs no wait for a device and nothing is traced."""
    if not can_look_at(path, length):
        return
    wrong = length[(length < 1) | (length > path.shape[1])]
    if len(wrong):
        raise RuntimeError(f"length: expected 1 to {path.shape[1]}, got {int(wrong[0])}")
    wrong = path[~hidden & ((path < 0) | (path >= slots))]
    if len(wrong):
        raise RuntimeError(f"path: expected 0 to {slots - 1}, got {int(wrong[0])}")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@torch.library.register_fake("prunelm::tree_attention")
def _fake(
    qkv: Tensor, cos: Tensor, sin: Tensor, path: Tensor, length: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    check_one_device(
        {
            "qkv": qkv,
            "cos": cos,
            "sin": sin,
            "path": path,
            "length": length,
            "key": key,
            "value": value,
        }
    )
    return torch.empty_like(qkv[:, 0], memory_format=torch.contiguous_format)
