"""Low-rank linear in Triton; contract in `prunelm/ops/low_rank_linear.py`.

A program takes ROWS rows of x and all of N; its [ROWS, R] middle stays in registers. Not tuned yet:
few rows leave most of a GPU idle.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunelm.triton_kernels.activation import activate

ROWS = 16
MAX_RANK = 512  # [16, 512] float32 in 128 threads are 64 registers each


@triton.jit
def _kernel(
    p_x,  # [M, K]
    p_down,  # [R, K]
    p_up,  # [N, R]
    p_bias,  # [N]
    p_y,  # [M, N]
    M,
    K,
    N,
    R,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    i_m = tl.program_id(0)
    o_m = i_m.to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    o_r = tl.arange(0, RANK)  # [RANK]
    m_m = o_m < M
    m_r = o_r < R

    b_z = tl.zeros([ROWS, RANK], dtype=tl.float32)
    for i_k in range(0, K, DEPTH):
        o_k = i_k + tl.arange(0, DEPTH)  # [DEPTH]
        m_k = o_k < K
        b_x = tl.load(
            p_x + o_m[:, None] * K + o_k[None, :],
            mask=m_m[:, None] & m_k[None, :],
            other=0.0,
        )  # [ROWS, DEPTH]
        b_down = tl.load(
            p_down + o_r.to(tl.int64)[None, :] * K + o_k[:, None],
            mask=m_k[:, None] & m_r[None, :],
            other=0.0,
        )  # [DEPTH, RANK]
        b_z = tl.dot(b_x, b_down, b_z, input_precision="ieee")
    b_z = b_z.to(p_x.dtype.element_ty)

    for i_n in range(0, N, COLS):
        o_n = i_n + tl.arange(0, COLS)  # [COLS]
        m_n = o_n < N
        b_up = tl.load(
            p_up + o_n.to(tl.int64)[None, :] * R + o_r[:, None],
            mask=m_r[:, None] & m_n[None, :],
            other=0.0,
        )  # [RANK, COLS]
        b_sum = tl.dot(b_z, b_up, input_precision="ieee")  # [ROWS, COLS]
        if HAS_BIAS:
            b_sum += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        b_y = activate(b_sum, ACTIVATION)
        tl.store(
            p_y + o_m[:, None] * N + o_n[None, :],
            b_y.to(p_y.dtype.element_ty),
            mask=m_m[:, None] & m_n[None, :],
        )


def low_rank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None = None,
) -> Tensor:
    """activation((x @ down.T) @ up.T + bias), the middle rounded to x's dtype as by two linears.

    Args:
        x: [M, K], contiguous; float32, bfloat16 or float16.
        down: [R, K], contiguous, x's dtype; R at most 512.
        up: [N, R], contiguous, x's dtype.
        bias: [N] in x's dtype, or None.
        activation: None, "relu", "gelu" or "silu".

    Returns:
        [M, N] in x's dtype.
    """
    M, K = x.shape
    N, R = up.shape
    if R > MAX_RANK:
        raise ValueError(f"down: expected at most {MAX_RANK} rows for Triton, got {R}")
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    _kernel[(triton.cdiv(M, ROWS),)](
        x,
        down,
        up,
        x if bias is None else bias,
        y,
        M,
        K,
        N,
        R,
        ROWS=ROWS,
        COLS=32,
        DEPTH=32,
        RANK=max(triton.next_power_of_2(R), 16),
        HAS_BIAS=bias is not None,
        ACTIVATION=activation or "none",
    )
    return y
