"""The activations that the kernels apply before they store."""

import triton
import triton.language as tl


@triton.jit
def activate(x, activation: tl.constexpr):
    """activation(x) in float32: "none", "relu", "gelu" (erf) or "silu"."""
    if activation == "relu":
        # NaN stays NaN, as in torch.
        x = tl.where(x < 0, 0.0, x)
    elif activation == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif activation == "silu":
        x = x / (1 + tl.exp(-x))
    return x
