"""Block-sparse linear in Triton; contract in `prunelm/ops/block_sparse_linear.py`.

A program computes [ROWS, COLS] of y: it walks the stored blocks of its block row in order, so a
row's result does not depend on M. Not tuned yet: one tile shape for every size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunelm.triton_kernels.activation import activate

ROWS = 64  # wgmma wants 64 rows; fewer rows of x are masked


@triton.jit
def _kernel(
    p_x,  # [M, K]
    p_values,  # [nnz, bk, bn]: bn fastest
    p_crow,  # [ceil(N / bn) + 1]
    p_col,  # [nnz]
    p_bias,  # [N]
    p_y,  # [M, N]
    M,
    K,
    N,
    bn: tl.constexpr,
    bk: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    i_m = tl.program_id(0)
    i_row = tl.program_id(1)  # block row
    i_n = tl.program_id(2)  # tile of COLS columns within it
    o_m = i_m.to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    o_inner = i_n * COLS + tl.arange(0, COLS)  # [COLS], within the block
    o_n = i_row.to(tl.int64) * bn + o_inner  # [COLS]
    m_m = o_m < M
    m_n = (o_inner < bn) & (o_n < N)

    b_sum = tl.zeros([ROWS, COLS], dtype=tl.float32)
    # int64 bounds make the loop variable int64: nnz * bk * bn passes 2^31.
    b_first = tl.load(p_crow + i_row).to(tl.int64)
    b_last = tl.load(p_crow + i_row + 1).to(tl.int64)
    for i_block in range(b_first, b_last):
        o_first = tl.load(p_col + i_block).to(tl.int64) * bk
        p_block = p_values + i_block * (bk * bn)
        for i_depth in range(0, bk, DEPTH):
            o_depth = i_depth + tl.arange(0, DEPTH)  # [DEPTH], within the block
            o_k = o_first + o_depth
            m_k = (o_depth < bk) & (o_k < K)
            b_x = tl.load(
                p_x + o_m[:, None] * K + o_k[None, :],
                mask=m_m[:, None] & m_k[None, :],
                other=0.0,
            )  # [ROWS, DEPTH]
            b_w = tl.load(
                p_block + o_depth[:, None] * bn + o_inner[None, :],
                mask=m_k[:, None] & m_n[None, :],
                other=0.0,
            )  # [DEPTH, COLS]
            b_sum = tl.dot(b_x, b_w, b_sum, input_precision="ieee")

    if HAS_BIAS:
        b_sum += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_y = activate(b_sum, ACTIVATION)
    tl.store(
        p_y + o_m[:, None] * N + o_n[None, :],
        b_y.to(p_y.dtype.element_ty),
        mask=m_m[:, None] & m_n[None, :],
    )


def block_sparse_linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    *,
    out_features: int,
    activation: str | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias) for a weight in blocks.

    Args:
        x: [M, K], contiguous; float32, bfloat16 or float16.
        values: [nnz, bn, bk] in x's dtype, lying in memory as [nnz, bk, bn].
        crow: [ceil(N / bn) + 1] int32.
        col: [nnz] int32.
        bias: [N] in x's dtype, or None.
        out_features: N.
        activation: None, "relu", "gelu" or "silu".

    Returns:
        [M, N] in x's dtype.
    """
    M, K = x.shape
    _, bn, bk = values.shape
    y = torch.empty((M, out_features), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    # tl.dot wants at least 16 of each; a tile is at most 128 x 64, larger blocks take several.
    cols = min(max(triton.next_power_of_2(bn), 16), 128)
    depth = min(max(triton.next_power_of_2(bk), 16), 64)
    grid = (triton.cdiv(M, ROWS), len(crow) - 1, triton.cdiv(bn, cols))
    _kernel[grid](
        x,
        values,
        crow,
        col,
        x if bias is None else bias,
        y,
        M,
        K,
        out_features,
        bn=bn,
        bk=bk,
        ROWS=ROWS,
        COLS=cols,
        DEPTH=depth,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation or "none",
    )
    return y
