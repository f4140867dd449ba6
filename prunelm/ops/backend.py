"""Which implementation of a linear op runs, and why the others do not."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import prunelm._C
from prunelm.ops.gpu_cost import block_sparse_order, card_of, low_rank_order

BACKENDS = ("cpu", "cuda", "triton", "reference")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WITH_CUDA = bool(prunelm._C.build_information()["cuda"])
WITH_TRITON = find_spec("triton") is not None


@dataclass(frozen=True)
class Explanation:
    """What would run, why the others would not, and how long each way is predicted to take.

    Attributes:
        backend: the one that runs.
        refusals: every reason for which each backend that cannot run cannot.
        predicted_us: microseconds of one call, from sizes alone, on one thread of a CPU or within a
            CUDA graph; "dense" is torch.nn.functional.linear on the weight with its zeros.
        predicted_for: the card that the model takes a GPU for, "" on a CPU.
        measured: those of predicted_us that come from measurements on such a card.
    """

    backend: str
    refusals: Mapping[str, tuple[str, ...]]
    predicted_us: Mapping[str, float]
    predicted_for: str = ""
    measured: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.backend} runs"]
        lines += [f"{name} cannot: {'; '.join(why)}" for name, why in self.refusals.items()]
        where = f" on {self.predicted_for}" if self.predicted_for else ""
        for name, us in self.predicted_us.items():
            how = "measured" if name in self.measured else "predicted"
            lines.append(f"{how}{where}: {name} {us:.1f} us")
        return "\n".join(lines)


def refusals(op: str, x: Tensor, weights: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """All reasons for which a backend cannot run an op on these tensors; {} if all can."""
    reasons: dict[str, list[str]] = {name: [] for name in BACKENDS}
    if not WITH_CUDA:
        reasons["cuda"].append("the extension was built without CUDA")
    if not WITH_TRITON:
        reasons["triton"].append("triton is not installed")
    tensors = {"x": x, **weights}
    interpreted = x.device.type == "cpu" and triton_is_interpreted()
    for backend, device, dtypes in (
        ("cpu", "cpu", DTYPES),
        ("cuda", "cuda", GPU_DTYPES),
        ("triton", "cpu" if interpreted else "cuda", GPU_DTYPES[:1] if interpreted else GPU_DTYPES),
    ):
        for name, tensor in tensors.items():
            if tensor.device.type != device:
                reasons[backend].append(f"{name}: expected a {device} tensor, got {tensor.device}")
            if tensor.dtype not in dtypes:
                reasons[backend].append(
                    f"{name}: expected one of {_names(dtypes)}, got {tensor.dtype}"
                )
    for name, tensor in weights.items():
        if tensor.dtype == x.dtype:
            continue
        for backend in ("cuda", "triton"):
            reasons[backend].append(f"{name}: expected x's {x.dtype}, got {tensor.dtype}")
        if not _widens(tensor.dtype, x.dtype):
            reasons["cpu"].append(
                f"{name}: expected x's {x.dtype}, or 16 bits beside float32, got {tensor.dtype}"
            )
    own_gradient = op == "block_sparse_linear"  # in Triton too
    if not (WITH_CUDA or own_gradient) and x.device.type == "cuda" and torch.is_grad_enabled():
        if any(tensor.requires_grad for tensor in tensors.values()):
            reasons["triton"].append(f"gradients of {op} need the extension built with CUDA")
    return {name: tuple(why) for name, why in reasons.items() if why}


def in_onnx_export() -> bool:
    """Whether torch.onnx.export is looking on, which knows plain torch only."""
    looked_at = torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None
    return looked_at and torch.onnx.is_in_onnx_export()


def triton_is_interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors, for tests; set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _widens(weight: torch.dtype, x: torch.dtype) -> bool:
    return x == torch.float32 and weight in (torch.bfloat16, torch.float16)


def choose(
    op: str,
    device: str,
    x: Tensor,
    weights: Mapping[str, Tensor],
    backend: str | None,
    out_features: int = 0,
) -> str:
    """The backend that runs: the one asked for, or of those that can the one predicted to be best.

    Args:
        device: x's type.
        weights: "values" of a block-sparse weight of so many out_features, or "down" and "up".

    Raises:
        ValueError: the backend asked for is unknown or cannot run; it lists every reason.
    """
    if backend is None and device == "cpu":
        return "cpu"  # which refuses what it cannot take, by name
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS} or None, got {backend!r}")
    why = refusals(op, x, weights)
    if backend is None:
        return next(name for name in _order(x, weights, out_features) if name not in why)
    if backend in why:
        raise ValueError(f"backend: {backend} cannot run {op}: {'; '.join(why[backend])}")
    return backend


def _order(x: Tensor, weights: Mapping[str, Tensor], out_features: int) -> tuple[str, ...]:
    """The backends, the best first; what another device needs refuses."""
    if x.device.type != "cuda":
        return BACKENDS
    card, K = card_of(x.device.index or 0), x.shape[-1]
    M = x.numel() // max(K, 1)
    if "values" in weights:
        nnz, bn, bk = weights["values"].shape
        return block_sparse_order(card, M, out_features or K, K, nnz, (bn, bk), x.dtype)
    N, R = weights["up"].shape
    return low_rank_order(card, M, N, K, R, x.dtype)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors (or None) as autocast wants them for a matrix product; float64 stays as it is."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
