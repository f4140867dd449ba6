"""Gradient of block-sparse linear to the stored values in Triton, for the stored blocks only.

A program sums grad^T x over rows for the outputs of one group of block rows and some columns of
the group's union: what it reads of grad serves all of them. Blocks that are not stored are computed
where the group has them and not written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunelm.gpu_index import GpuIndex, group_size, make_gpu_index
from prunelm.triton_kernels.block_sparse_tiles import Device, Tile, gradient_tile, precision_of

PROGRAMS = 264  # two for each core of an H100: with fewer, the rows are shared out among more


@triton.jit
def _columns(p_column, first, last, o_k, bk: tl.constexpr, TAKE: tl.constexpr, WHOLE: tl.constexpr):
    """The columns of x at o_k [COLS], which counts along the union's entries from `first`."""
    if WHOLE and TAKE > 1:
        o_entry = tl.minimum(first + tl.arange(0, TAKE), last - 1)
        b_column = tl.load(p_column + o_entry)[:, None] * bk  # [TAKE, 1]
        o_x = tl.reshape(b_column + tl.arange(0, bk)[None, :], o_k.shape)
    else:
        o_x = tl.load(p_column + tl.minimum(first + o_k // bk, last - 1)) * bk + o_k % bk
    return o_x


@triton.jit
def _blocks(p_block, first, last, o_k, first_n, bn: tl.constexpr, bk: tl.constexpr,
            GROUP: tl.constexpr, TAKE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
            WHOLE: tl.constexpr):  # fmt: skip
    """The stored block of each result, [ROWS, COLS] or [1, COLS]; -1 where there is none."""
    if GROUP == 1:
        # The groups are the block rows: an entry of the union is a stored block.
        o_entry = first + o_k // bk
        b_block = tl.where((o_entry < last) & (o_k < TAKE * bk), o_entry, -1)[None, :]
    else:
        SLOTS: tl.constexpr = (ROWS + bn - 1) // bn
        SPREAD: tl.constexpr = WHOLE and bk <= COLS
        if SPREAD:  # each index is loaded once
            o_slot = first_n // bn + tl.arange(0, SLOTS)
            o_entry = first + tl.min(o_k, 0) // bk + tl.arange(0, COLS // bk)
            m_entry = o_entry < last
        else:
            o_slot = (first_n + tl.arange(0, ROWS)) // bn
            o_entry = first + o_k // bk
            m_entry = (o_entry < last) & (o_k < TAKE * bk)
        b_block = tl.load(
            p_block + o_entry[None, :] * GROUP + o_slot[:, None],
            mask=m_entry[None, :] & (o_slot < GROUP)[:, None],
            other=-1,
        )
        if SPREAD:
            b_block = tl.broadcast_to(
                b_block[:, None, :, None], (SLOTS, ROWS // SLOTS, COLS // bk, bk)
            )
            b_block = tl.reshape(b_block, (ROWS, COLS))
    return b_block


@triton.jit
def _write(b_sum, p_out, p_block, first, last, first_n, o_k, m_n, m_k, bn: tl.constexpr,
           bk: tl.constexpr, GROUP: tl.constexpr, TAKE: tl.constexpr, ROWS: tl.constexpr,
           COLS: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """Store the results [ROWS, COLS] that belong to stored blocks; 0 past N and K."""
    b_block = _blocks(p_block, first, last, o_k, first_n, bn, bk, GROUP, TAKE, ROWS, COLS, WHOLE)
    o_n = first_n + tl.arange(0, ROWS)
    # int64: nnz * bk * bn passes 2^31.
    o_out = b_block.to(tl.int64) * (bk * bn) + ((o_k % bk) * bn)[None, :] + (o_n % bn)[:, None]
    m_out = (b_block >= 0) & (o_n < GROUP * bn)[:, None]
    if WHOLE:
        o_out = tl.max_contiguous(tl.multiple_of(o_out, [min(16, bn), 1]), [min(16, bn), 1])
        m_out = tl.max_constancy(m_out, [min(bn, ROWS), 1])
    if EVEN:
        tl.store(p_out + o_out, b_sum.to(p_out.dtype.element_ty), mask=m_out)
    else:
        m_inside = m_n[:, None] & m_k[None, :]
        b_zero = tl.zeros([ROWS, COLS], dtype=p_out.dtype.element_ty)
        tl.store(p_out + o_out, b_sum.to(p_out.dtype.element_ty), mask=m_out & m_inside)
        # Not by a choice between sums and zeros, which ptxas would mix with the sums' last
        # instructions: it makes those of wgmma wait for each other then.
        tl.store(p_out + o_out, b_zero, mask=m_out & (m_inside == 0))


@triton.jit(do_not_specialize=["M", "nnz", "chunks", "rows_each"])
def gradient_kernel(
    p_grad,  # [M, N]
    p_x,  # [M, K]
    p_pointer,  # RowGroups: [groups + 1]
    p_column,  # [nnz]
    p_block,  # [nnz, GROUP]
    p_out,  # [splits, nnz, bk, bn]
    M,
    K,
    N,
    nnz,
    chunks,  # programs that share a group's union out
    rows_each,  # rows of grad and x that a program sums over, a multiple of DEPTH
    bn: tl.constexpr,
    bk: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,  # outputs
    COLS: tl.constexpr,  # columns of x
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,  # bk divides K
    EVEN_N: tl.constexpr,  # bn divides N
):
    WHOLE: tl.constexpr = bn & (bn - 1) == 0 and bk & (bk - 1) == 0
    TAKE: tl.constexpr = 1 if bk >= COLS else COLS // bk  # entries of the union
    PIECES: tl.constexpr = (bk + COLS - 1) // COLS  # of an entry, where one is wider than a tile
    PARTS: tl.constexpr = (GROUP * bn + ROWS - 1) // ROWS

    i = tl.program_id(0)
    i_part = i % PARTS
    i_piece = i // PARTS % PIECES
    i_chunk = i // (PARTS * PIECES) % chunks
    i_group = i // (PARTS * PIECES * chunks)
    i_split = tl.program_id(1)
    first = tl.load(p_pointer + i_group) + i_chunk * TAKE
    last = tl.load(p_pointer + i_group + 1)
    if first >= last:
        return

    o_n = i_part * ROWS + tl.arange(0, ROWS)  # [ROWS], within the group
    o_grad = i_group * (GROUP * bn) + o_n
    m_n = (o_n < GROUP * bn) & (o_grad < N)
    o_k = i_piece * COLS + tl.arange(0, COLS)  # [COLS], along the entries
    o_x = _columns(p_column, first, last, o_k, bk, TAKE, WHOLE)
    m_k = (o_x < K) & ((o_k < bk) | (TAKE > 1))
    b_sum = tl.zeros([ROWS, COLS], dtype=tl.float32)
    first_m = i_split * rows_each
    end_m = tl.minimum(first_m + rows_each, M)
    o_x2 = tl.broadcast_to(o_x[None, :], (DEPTH, COLS))
    if WHOLE:
        # Hints stand beside what they speak of: out of a function's arguments they are lost.
        o_x2 = tl.max_contiguous(tl.multiple_of(o_x2, [1, min(16, bk)]), [1, min(16, bk)])
    for i_m in range(first_m, end_m, DEPTH):
        o_m = i_m + tl.arange(0, DEPTH)  # [DEPTH]
        m_m = o_m < end_m
        o_m = o_m.to(tl.int64)
        b_grad = tl.load(
            p_grad + o_m[None, :] * N + o_grad[:, None],
            mask=m_m[None, :] & m_n[:, None],
            other=0.0,
        )  # [ROWS, DEPTH]
        m_x = m_m[:, None]
        if not (EVEN_K and WHOLE):
            m_x = m_x & m_k[None, :]
        b_x = tl.load(p_x + o_m[:, None] * K + o_x2, mask=m_x, other=0.0)  # [DEPTH, COLS]
        b_sum = tl.dot(b_grad, b_x, b_sum, input_precision=PRECISION)

    p_out += i_split.to(tl.int64) * nnz * (bk * bn)
    # In halves, since all results with their addresses do not fit into registers.
    HALF: tl.constexpr = COLS // 2
    b_left, b_right = tl.split(tl.permute(tl.reshape(b_sum, (ROWS, 2, HALF)), (0, 2, 1)))
    for i_half in tl.static_range(2):
        o_half = i_piece * COLS + i_half * HALF + tl.arange(0, HALF)
        o_x = tl.load(p_column + tl.minimum(first + o_half // bk, last - 1)) * bk + o_half % bk
        m_k = (o_x < K) & ((o_half < bk) | (TAKE > 1))
        _write(
            b_left if i_half == 0 else b_right, p_out, p_block, first, last, i_part * ROWS,
            o_half, m_n, m_k, bn, bk, GROUP, TAKE, ROWS, HALF, WHOLE, EVEN_K and EVEN_N,
        )  # fmt: skip


def gradient_group(bn: int) -> int:
    """Block rows taken together: one of 64 outputs fills a tile alone, without blocks in vain."""
    return 1 if bn >= 64 else group_size(bn)


def block_sparse_linear_grad_values(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    gpu_index: Tensor | None = None,
    *,
    block: tuple[int, int],
    tile: Tile | None = None,
) -> Tensor:
    """grad^T @ x at the stored blocks, zeros past N and K.

    Args:
        grad: [M, N], contiguous.
        x: [M, K] in grad's dtype, contiguous.
        crow: [ceil(N / bn) + 1] int32.
        col: [nnz] int32.
        gpu_index: the pattern's; computed here if None and needed.
        block: (bn, bk).
        tile: for measurements; None: chosen by sizes.

    Returns:
        [nnz, bn, bk] in grad's dtype, lying in memory as [nnz, bk, bn].
    """
    (M, N), K, nnz, (bn, bk) = grad.shape, x.shape[1], col.shape[0], block
    out = torch.empty((nnz, bk, bn), dtype=grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out.transpose(1, 2)
    pointer, column, blocks, size = crow, col, col, gradient_group(bn)
    if size > 1:
        if gpu_index is None:
            gpu_index = make_gpu_index(crow, col, (N, K), block)
        groups = GpuIndex(gpu_index, (N, K), block, nnz).by_row
        pointer, column, blocks = groups.pointer, groups.column, groups.block
    if tile is None:
        tile = gradient_tile(grad.dtype, size * bn, block, Device.of(grad.device))
    lines, take = len(pointer) - 1, max(1, tile.rows // bk)
    chunks = triton.cdiv(min(-(-K // bk), nnz), take)
    pieces = triton.cdiv(size * bn, tile.cols) * triton.cdiv(bk, tile.rows)
    # A chunk is at least half full on average; sums over rows are split by sizes alone.
    busy = max(1, min(lines * chunks, nnz // take)) * pieces
    steps = triton.cdiv(M, tile.depth)
    splits = max(1, min(triton.cdiv(PROGRAMS, busy), steps // 8))
    rows_each = triton.cdiv(max(steps, 1), splits) * tile.depth
    sums = out  # where rows are shared out, one for each share, added up in their order
    if splits > 1:
        sums = torch.empty((splits, *out.shape), dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        gradient_kernel[(lines * chunks * pieces, splits)](
            grad,
            x,
            pointer,
            column,
            blocks,
            sums,
            M,
            K,
            N,
            nnz,
            chunks,
            rows_each,
            bn=bn,
            bk=bk,
            GROUP=size,
            ROWS=tile.cols,
            COLS=tile.rows,
            DEPTH=tile.depth,
            PRECISION=precision_of(grad.dtype),
            EVEN_K=K % bk == 0,
            EVEN_N=N % bn == 0,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    if splits > 1:
        out = sums.sum(0).to(grad.dtype)
    return out.transpose(1, 2)
