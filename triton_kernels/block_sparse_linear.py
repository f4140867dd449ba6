"""Block-sparse linear in Triton; contract in `prunelm/ops/block_sparse_linear.py`.

A program computes a tile of y for a group of neighbouring block rows: it walks the union of their
block columns, so that small blocks share what is read of x. What a tile costs is said in
`block_sparse_tiles`. The gradient to x is the same kernel over the groups of block columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunelm.gpu_index import GpuIndex, RowGroups, make_gpu_index
from prunelm.triton_kernels.activation import activate
from prunelm.triton_kernels.block_sparse_tiles import Device, Tile, precision_of, product_tile


@triton.jit
def where(p_column, p_block, first, last, i_step, o_n, first_slot, bn: tl.constexpr,
          bk: tl.constexpr, GROUP: tl.constexpr, TAKE: tl.constexpr, TILE_N: tl.constexpr,
          DEPTH: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """What step i_step walks: block columns and stored blocks (-1: none), as few as tell them.

    Where TAKE is 1, DEPTH of one entry's bk: a number and [SLOTS] blocks, or one block where a tile
    lies within one. Else TAKE entries with all their depth: [TAKE] and [TAKE, SLOTS]. If not WHOLE,
    an index for each depth and output: [DEPTH] in place of [TAKE], [TILE_N] in place of [SLOTS].
    Entries past the last repeat it, without blocks.
    """
    SLOTS: tl.constexpr = (TILE_N + bn - 1) // bn
    o_slot = first_slot + tl.arange(0, SLOTS) if WHOLE else o_n // bn
    m_slot = o_slot < tl.where(first < last, GROUP, 0)
    if TAKE == 1:
        i_entry = tl.minimum(first + i_step // ((bk + DEPTH - 1) // DEPTH), last - 1)
        b_column = tl.load(p_column + i_entry, mask=first < last, other=0)
        if SLOTS == 1 and WHOLE:
            b_block = tl.load(p_block + i_entry * GROUP + first_slot, mask=first < last, other=-1)
        else:
            b_block = tl.load(p_block + i_entry * GROUP + o_slot, mask=m_slot, other=-1)
    else:
        o_take = tl.arange(0, TAKE) if WHOLE else tl.arange(0, DEPTH) // bk
        o_entry = first + i_step * TAKE + o_take
        m_entry = (o_entry < last) & (o_take < TAKE)
        o_entry = tl.minimum(o_entry, last - 1)
        b_column = tl.load(p_column + o_entry, mask=o_entry >= first, other=0)
        b_block = tl.load(
            p_block + o_entry[:, None] * GROUP + o_slot[None, :],
            mask=m_entry[:, None] & m_slot[None, :],
            other=-1,
        )
    return b_column, b_block


@triton.jit
def spread(b_column, b_block, i_step, bn: tl.constexpr, bk: tl.constexpr,
           TAKE: tl.constexpr, TILE_N: tl.constexpr, DEPTH: tl.constexpr,
           WHOLE: tl.constexpr):  # fmt: skip
    """(depth in its block [DEPTH], bk past the end; column of x [DEPTH]; block [DEPTH, TILE_N])."""
    SLOTS: tl.constexpr = (TILE_N + bn - 1) // bn
    o_depth = tl.arange(0, DEPTH)
    if TAKE == 1:
        o_inner = (i_step % ((bk + DEPTH - 1) // DEPTH)) * DEPTH + o_depth
        o_k = b_column * bk + o_inner
        if SLOTS == 1 and WHOLE:
            b_block = tl.full((DEPTH, TILE_N), 0, tl.int32) + b_block
        elif WHOLE:
            b_block = tl.broadcast_to(b_block[:, None], (SLOTS, TILE_N // SLOTS))
            b_block = tl.reshape(b_block, (1, TILE_N))
        else:
            b_block = b_block[None, :]
    elif WHOLE:
        o_inner = o_depth % bk
        o_k = tl.reshape(b_column[:, None] * bk + tl.arange(0, bk)[None, :], (DEPTH,))
        b_block = tl.broadcast_to(b_block[:, None, :, None], (TAKE, bk, SLOTS, TILE_N // SLOTS))
        b_block = tl.reshape(b_block, (DEPTH, TILE_N))
    else:
        o_inner = tl.where(o_depth < TAKE * bk, o_depth % bk, bk)
        o_k = b_column * bk + o_inner
    return o_inner, o_k, b_block


@triton.jit
def tile_at(i, p_order, groups, m_tiles, panel, PARTS: tl.constexpr):
    """(group, part of its outputs, tile of rows) of program i.

    RowGroups come longest first, so that the last programs are short. Within a panel of rows all
    groups are done: programs that run together share both rows of x and blocks.
    """
    size = panel * PARTS * groups
    first_m = i // size * panel
    height = tl.minimum(m_tiles - first_m, panel)
    i_line = i % size // height
    i_group = tl.load(p_order + i_line // PARTS)
    return i_group, i_line % PARTS, first_m + i % size % height


@triton.jit
def _store(b_sum, p_y, p_bias, o_m, first_n, first_y, M, N, WIDTH: tl.constexpr,
           COLS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """Bias, activation and store of [rows, COLS], the columns from first_n of a group's WIDTH."""
    o_n = first_n + tl.arange(0, COLS)
    o_y = first_y + o_n
    m_n = (o_n < WIDTH) & (o_y < N)
    if HAS_BIAS:
        b_sum += tl.load(p_bias + o_y, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_y = activate(b_sum, ACTIVATION)
    tl.store(
        p_y + o_m.to(tl.int64)[:, None] * N + o_y[None, :],
        b_y.to(p_y.dtype.element_ty),
        mask=(o_m < M)[:, None] & m_n[None, :],
    )


@triton.jit(do_not_specialize=["M", "groups", "panel"])
def product_kernel(
    p_x,  # [M, K]
    p_values,  # [nnz, bk, bn], or if TRANSPOSED [nnz, bn, bk]: the last one fastest
    p_pointer,  # RowGroups: [groups + 1]
    p_column,  # [nnz]
    p_block,  # [nnz, GROUP]
    p_order,  # [groups]
    p_bias,  # [N]
    p_y,  # [M, N]
    M,
    K,
    N,
    groups,
    panel,  # tiles of rows, see tile_at
    bn: tl.constexpr,
    bk: tl.constexpr,
    GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    DEPTH: tl.constexpr,
    SWAP: tl.constexpr,  # y^T = W x^T, so that the weights fill the matrix unit's long side
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,  # bk divides K
    EVEN_N: tl.constexpr,  # bn divides N
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    TAKE: tl.constexpr = 1 if bk >= DEPTH else DEPTH // bk
    WHOLE: tl.constexpr = bn & (bn - 1) == 0 and bk & (bk - 1) == 0
    PARTS: tl.constexpr = (GROUP * bn + TILE_N - 1) // TILE_N
    # Every block begins at a multiple of its size; 16 numbers are enough for any copy.
    ALIGN: tl.constexpr = min(16, bk & -bk if TRANSPOSED else bn & -bn)

    m_tiles = tl.cdiv(M, TILE_M)
    i_group, i_part, i_m = tile_at(tl.program_id(0), p_order, groups, m_tiles, panel, PARTS)
    first = tl.load(p_pointer + i_group)
    last = tl.load(p_pointer + i_group + 1)

    o_m = i_m * TILE_M + tl.arange(0, TILE_M)  # [TILE_M]
    # Rows past M read the last one and are not stored: no mask stands before the copies.
    p_rows = p_x + tl.minimum(o_m, M - 1).to(tl.int64)[:, None] * K  # [TILE_M, 1]
    o_n = i_part * TILE_N + tl.arange(0, TILE_N)  # [TILE_N], within the group
    o_y = i_group * (GROUP * bn) + o_n
    m_n = (o_n < GROUP * bn) & (o_y < N)
    o_inner_n = o_n % bn

    if SWAP:
        b_sum = tl.zeros([TILE_N, TILE_M], dtype=tl.float32)
    else:
        b_sum = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
    steps = tl.cdiv(last - first, TAKE) * ((bk + DEPTH - 1) // DEPTH)
    first_slot = i_part * TILE_N // bn
    b_column, b_next = where(
        p_column, p_block, first, last, 0, o_n, first_slot, bn, bk, GROUP, TAKE, TILE_N, DEPTH,
        WHOLE,
    )  # fmt: skip
    for i_step in range(0, steps):
        o_inner, o_k, b_block = spread(b_column, b_next, i_step, bn, bk, TAKE, TILE_N, DEPTH, WHOLE)
        # A step ahead, and through a variable of the loop: else the pipeliner would spend half of
        # its stages on the indices.
        b_column, b_next = where(
            p_column, p_block, first, last, i_step + 1, o_n, first_slot, bn, bk, GROUP, TAKE,
            TILE_N, DEPTH, WHOLE,
        )  # fmt: skip
        m_w = b_block >= 0
        if WHOLE and (TAKE > 1 or TILE_N > bn):
            # A run of outputs lies in one block.
            m_w = tl.max_constancy(m_w, [min(bk, DEPTH) if TAKE > 1 else 1, min(bn, TILE_N)])
        o_x = tl.broadcast_to(o_k[None, :], (TILE_M, DEPTH))
        # Hints stand beside what they speak of: out of a function's arguments they are lost.
        if WHOLE:
            o_x = tl.max_contiguous(tl.multiple_of(o_x, [1, min(16, bk)]), [1, min(16, bk)])
        if EVEN_K and (WHOLE or bk % DEPTH == 0):
            b_x = tl.load(p_rows + o_x)  # [TILE_M, DEPTH]
        else:
            m_k = (o_inner < bk) & (o_k < K)
            b_x = tl.load(p_rows + o_x, mask=m_k[None, :], other=0.0)
            m_w = m_w & m_k[:, None]
        if not EVEN_N:
            m_w = m_w & m_n[None, :]
        if TRANSPOSED:
            o_w = o_inner[:, None] + o_inner_n[None, :] * bk
        else:
            o_w = o_inner[:, None] * bn + o_inner_n[None, :]
        # int64: nnz * bk * bn passes 2^31.
        o_w = b_block.to(tl.int64) * (bk * bn) + o_w
        if TRANSPOSED:
            o_w = tl.max_contiguous(tl.multiple_of(o_w, [ALIGN, 1]), [ALIGN, 1])
        else:
            o_w = tl.max_contiguous(tl.multiple_of(o_w, [1, ALIGN]), [1, ALIGN])
        b_w = tl.load(p_values + o_w, mask=m_w, other=0.0)  # [DEPTH, TILE_N]
        if SWAP:
            b_sum = tl.dot(tl.trans(b_w), tl.trans(b_x), b_sum, input_precision=PRECISION)
        else:
            b_sum = tl.dot(b_x, b_w, b_sum, input_precision=PRECISION)

    if SWAP:
        b_sum = tl.trans(b_sum)
    HALF: tl.constexpr = TILE_N // 2
    # In halves, since the whole tile with what its conversion needs does not fit into registers.
    b_left, b_right = tl.split(
        tl.permute(tl.reshape(b_sum, (TILE_M, 2, HALF)), (0, 2, 1))
    )  # [TILE_M, HALF] each
    for i_half in tl.static_range(2):
        _store(
            b_left if i_half == 0 else b_right, p_y, p_bias, o_m, i_part * TILE_N + i_half * HALF,
            i_group * (GROUP * bn), M, N, GROUP * bn, HALF, HAS_BIAS, ACTIVATION,
        )  # fmt: skip


def block_sparse_linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    gpu_index: Tensor | None = None,
    *,
    out_features: int,
    activation: str | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias) for a weight in blocks.

    A row's result has the same bits for every M where one kind of matrix instruction serves all M:
    in float32 without TF32, on Ampere, and for 16 bits where groups have at least 64 outputs
    (bn >= 8), since then the outputs are the instruction's rows. Else it has the same bits for
    every M below 64 and for every M from 64 on. What is infinite or NaN in x meets the zeros of
    the other block rows of its group.

    Args:
        x: [M, K], contiguous; float32, bfloat16 or float16.
        values: [nnz, bn, bk] in x's dtype, lying in memory as [nnz, bk, bn].
        crow: [ceil(N / bn) + 1] int32.
        col: [nnz] int32.
        bias: [N] in x's dtype, or None.
        gpu_index: the pattern's; computed here if None.
        out_features: N.
        activation: None, "relu", "gelu" or "silu".
        tile: for measurements; None: chosen by sizes.

    Returns:
        [M, N] in x's dtype.
    """
    _, bn, bk = values.shape
    shape = (out_features, x.shape[1])
    if gpu_index is None:
        gpu_index = make_gpu_index(crow, col, shape, (bn, bk))
    groups = GpuIndex(gpu_index, shape, (bn, bk), values.shape[0]).by_row
    return _product(x, values, groups, bias, (bn, bk), shape, activation, False, tile)


def block_sparse_linear_grad_x(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    gpu_index: Tensor | None = None,
    *,
    in_features: int,
    tile: Tile | None = None,
) -> Tensor:
    """grad @ weight, [M, K] in grad's dtype; arguments as for `block_sparse_linear`."""
    _, bn, bk = values.shape
    shape = (grad.shape[1], in_features)
    if gpu_index is None:
        gpu_index = make_gpu_index(crow, col, shape, (bn, bk))
    groups = GpuIndex(gpu_index, shape, (bn, bk), values.shape[0]).by_column
    return _product(grad, values, groups, None, (bk, bn), shape[::-1], None, True, tile)


def _product(
    x: Tensor,
    values: Tensor,
    groups: RowGroups,
    bias: Tensor | None,
    block: tuple[int, int],
    shape: tuple[int, int],
    activation: str | None,
    transposed: bool,
    tile: Tile | None,
) -> Tensor:
    M, (N, K), (bn, bk) = x.shape[0], shape, block
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    lines, width = len(groups.order), groups.size * bn
    if tile is None:
        tile = product_tile(x.dtype, M, lines, width, block, Device.of(x.device))
    # 16 MB of x at a time stay in L2 beside the weights.
    panel = max(1, 2**24 // (tile.rows * max(K, 1) * x.element_size()))
    programs = triton.cdiv(M, tile.rows) * lines * triton.cdiv(width, tile.cols)
    with torch.cuda.device_of(x):
        product_kernel[(programs,)](
            x,
            values,
            groups.pointer,
            groups.column,
            groups.block,
            groups.order,
            x if bias is None else bias,
            y,
            M,
            K,
            N,
            lines,
            panel,
            bn=bn,
            bk=bk,
            GROUP=groups.size,
            TRANSPOSED=transposed,
            TILE_M=tile.rows,
            TILE_N=tile.cols,
            DEPTH=tile.depth,
            SWAP=tile.swap,
            PRECISION=precision_of(x.dtype),
            EVEN_K=K % bk == 0,
            EVEN_N=N % bn == 0,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation or "none",
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return y
