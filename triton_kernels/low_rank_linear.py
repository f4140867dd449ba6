"""Low-rank linear in Triton; contract in `prunelm/ops/low_rank_linear.py`.

Many rows: one launch, `_fused`. Fewer leave most of a GPU idle with that, since every program that
needs the [M, R] middle would compute it anew; so two launches of `_product` then, and where there
are fewer than 64 rows the weights are the left operand, whose tiles are the wide ones.

For every M the middle is the sum of the same parts of K in the same order, and so are the products
inside a part. Below 64 rows mma.sync computes them, on Hopper wgmma from there on.
"""

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunelm.triton_kernels.activation import activate

MAX_FUSED_RANK = 256  # a wider middle and the sum of its parts fill the registers of a program
FUSED_SHARED = 160 * 1024  # bytes; consumer GPUs have 99 KiB
FUSED_ROWS = 64
PARTS_PER_RANK = 512  # parts * R at most: what the second launch reads of the middle, for each row
SHORTEST_PART = 256  # a multiple of every tile's depth
# What an H100 does in a microsecond: bytes, to one processor and to all; bf16 multiplies of one.
L2_TO_PROCESSOR, L2, MULTIPLIES = 110e3, 5.5e6, 2.5e6


@triton.jit
def _product(
    p_left,  # [P, K]
    p_right,  # [Q, K]
    # The weights are the left operand if SWAPPED, else the right one. The other one is the sum of
    # PARTS_IN such matrices behind each other.
    p_bias,  # [P] if SWAPPED, else [Q]
    p_out,  # [Q, P] if SWAPPED, else [P, Q]; a float32 one for each part where PARTS_OUT
    P,
    Q,
    K,
    part,  # how much of K one part is, a multiple of SHORTEST_PART
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_IN: tl.constexpr,
    PARTS_OUT: tl.constexpr,
    SWAPPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program computes [ROWS, COLS] of left @ right.T over all of K, or over one part of it."""
    i_tile, i_part = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(Q, COLS)
    o_i = (i_tile // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    o_j = (i_tile % tiles).to(tl.int64) * COLS + tl.arange(0, COLS)  # [COLS]
    m_i = o_i < P
    m_j = o_j < Q
    dtype = p_bias.dtype.element_ty

    b_sum = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for i_own in range(0, 1 if PARTS_OUT else PARTS):
        i_k0 = (i_part + i_own) * part
        b_part = tl.zeros([ROWS, COLS], dtype=tl.float32)
        for i_k in range(i_k0, min(i_k0 + part, K), DEPTH):
            o_k = i_k + tl.arange(0, DEPTH)  # [DEPTH]
            m_k = o_k < K
            o_left = o_i[:, None] * K + o_k[None, :]  # [ROWS, DEPTH]
            o_right = o_j[None, :] * K + o_k[:, None]  # [DEPTH, COLS]
            m_left = m_i[:, None] & m_k[None, :]
            m_right = m_j[None, :] & m_k[:, None]
            b_left = tl.load(p_left + o_left, mask=m_left, other=0.0)
            b_right = tl.load(p_right + o_right, mask=m_right, other=0.0)
            for i_in in tl.static_range(1, PARTS_IN):
                if SWAPPED:
                    p_in = p_right + tl.full([], i_in, tl.int64) * Q * K
                    b_right += tl.load(p_in + o_right, mask=m_right, other=0.0)
                else:
                    p_in = p_left + tl.full([], i_in, tl.int64) * P * K
                    b_left += tl.load(p_in + o_left, mask=m_left, other=0.0)
            b_part = tl.dot(b_left.to(dtype), b_right.to(dtype), b_part, input_precision=PRECISION)
        b_sum += b_part

    if HAS_BIAS:
        if SWAPPED:
            b_sum += tl.load(p_bias + o_i, mask=m_i, other=0.0).to(tl.float32)[:, None]
        else:
            b_sum += tl.load(p_bias + o_j, mask=m_j, other=0.0).to(tl.float32)[None, :]
    b_sum = activate(b_sum, ACTIVATION)
    if SWAPPED:
        o_out = o_j[None, :] * P + o_i[:, None]
    else:
        o_out = o_i[:, None] * Q + o_j[None, :]
    if PARTS_OUT:
        p_out += i_part.to(tl.int64) * Q * P
    m_out = m_i[:, None] & m_j[None, :]
    tl.store(p_out + o_out, b_sum.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def _fused(
    p_x,  # [M, K]
    p_down,  # [R, K]
    p_up,  # [N, R]
    p_bias,  # [N]
    p_y,  # [M, N]
    M,
    K,
    N,
    R,
    part,  # how much of K one part is, a multiple of SHORTEST_PART
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program computes ROWS rows of y; their [ROWS, R] middle stays on chip."""
    o_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    o_r = tl.arange(0, RANK)  # [RANK]
    m_m = o_m < M
    m_r = o_r < R

    b_z = tl.zeros([ROWS, RANK], dtype=tl.float32)
    for i_part in range(0, PARTS):
        b_part = tl.zeros([ROWS, RANK], dtype=tl.float32)
        for i_k in range(i_part * part, min((i_part + 1) * part, K), DEPTH):
            o_k = i_k + tl.arange(0, DEPTH)  # [DEPTH]
            m_k = o_k < K
            b_x = tl.load(
                p_x + o_m[:, None] * K + o_k[None, :],
                mask=m_m[:, None] & m_k[None, :],
                other=0.0,
            )  # [ROWS, DEPTH]
            b_down = tl.load(
                p_down + o_r.to(tl.int64)[None, :] * K + o_k[:, None],
                mask=m_r[None, :] & m_k[:, None],
                other=0.0,
            )  # [DEPTH, RANK]
            b_part = tl.dot(b_x, b_down, b_part, input_precision=PRECISION)
        b_z += b_part
    b_z = b_z.to(p_x.dtype.element_ty)

    for i_n in range(0, N, COLS):
        o_n = i_n + tl.arange(0, COLS)  # [COLS]
        m_n = o_n < N
        b_up = tl.load(
            p_up + o_n.to(tl.int64)[None, :] * R + o_r[:, None],
            mask=m_n[None, :] & m_r[:, None],
            other=0.0,
        )  # [RANK, COLS]
        b_y = tl.dot(b_z, b_up, input_precision=PRECISION)  # [ROWS, COLS]
        if HAS_BIAS:
            b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        b_y = activate(b_y, ACTIVATION).to(p_y.dtype.element_ty)
        tl.store(p_y + o_m[:, None] * N + o_n[None, :], b_y, mask=m_m[:, None] & m_n[None, :])


@dataclass(frozen=True)
class Tile:
    """What one program of `_product` computes at a time, and with how much."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        assert SHORTEST_PART % self.depth == 0


def small_tiles(M: int, element_size: int) -> tuple[Tile, Tile]:
    """The tiles of both products for M < 64: 16 rows of down, 32 of up, all of x.

    So few rows give the most programs, and with them loads in flight.
    """
    deep = 4 // element_size  # as many bytes in float32 as in 16 bits
    cols = max(16, triton.next_power_of_2(M))
    first = Tile(16, cols, (128 if cols <= 32 else 64) * deep, 4, 5 if cols == 16 else 4)
    return first, Tile(32, cols, 32 * deep, 8 if deep == 1 and cols > 32 else 4, 3)


def large_tile(P: int, Q: int, K: int, parts: int, element_size: int, processors: int) -> Tile:
    """The tile of [P, K] times [Q, K] transposed, for P >= 64: the one predicted to end first."""
    if element_size == 4:
        return Tile(64, 64, 32, 8, 3)

    def microseconds(tile: Tile) -> float:
        programs = parts * triton.cdiv(P, tile.rows) * triton.cdiv(Q, tile.cols)
        depth = triton.cdiv(K, parts)
        moved = (tile.rows + tile.cols) * depth * element_size
        one = max(moved / L2_TO_PROCESSOR, tile.rows * tile.cols * depth / MULTIPLIES)
        return float(max(triton.cdiv(programs, processors) * one, programs * moved / L2))

    sizes = ((128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 4), (64, 32, 4, 4), (64, 16, 4, 5))
    return min((Tile(r, c, 64, warps, stages) for r, c, warps, stages in sizes), key=microseconds)


@lru_cache(1024)
def tiles(
    M: int, K: int, R: int, N: int, parts: int, element_size: int, device: "Device"
) -> tuple[Tile, Tile]:
    """The tiles of both products; the first one leaves so many parts."""
    if M < 64:
        first, second = small_tiles(M, element_size)
        tokens = second.cols
    else:
        first = large_tile(M, R, K, parts, element_size, device.processors)
        second = large_tile(M, N, R, 1, element_size, device.processors)
        tokens = second.rows
    if parts > 1:  # float32, and at most 32 KiB of them in flight at each step
        depth = max(16, min(second.depth, 8192 // (tokens * parts)))
        second = replace(second, depth=1 << depth.bit_length() - 1, stages=min(second.stages, 3))
    return first, second


def fuses(M: int, R: int, element_size: int, device: "Device") -> bool:
    """Whether one launch can do it and fills the device."""
    programs = triton.cdiv(M, FUSED_ROWS)
    waves = triton.cdiv(programs, device.processors)
    fits = element_size == 2 and R <= MAX_FUSED_RANK and device.shared >= FUSED_SHARED
    return fits and programs >= 0.85 * waves * device.processors


@dataclass(frozen=True)
class Device:
    """What of a device the choices depend on."""

    processors: int = 132
    shared: int = 227 * 1024  # bytes that a program may have


@cache
def _device(index: int | None) -> Device:
    if index is None:  # interpreted
        return Device()
    found = torch.cuda.get_device_properties(index)
    shared = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
    return Device(found.multi_processor_count, shared)


def low_rank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None = None,
    fused: bool | None = None,
) -> Tensor:
    """activation((x @ down.T) @ up.T + bias), the middle rounded to x's dtype as by two linears.

    Args:
        x: [M, K], contiguous; float32, bfloat16 or float16.
        down: [R, K], contiguous, x's dtype.
        up: [N, R], contiguous, x's dtype.
        bias: [N] in x's dtype, or None.
        activation: None, "relu", "gelu" or "silu".
        fused: whether by one launch, R at most 256; None: chosen from the sizes.

    Returns:
        [M, N] in x's dtype.
    """
    M, K = x.shape
    N, R = up.shape
    device = _device(x.device.index)
    if fused is None:
        fused = fuses(M, R, x.element_size(), device)
    if fused and R > MAX_FUSED_RANK:
        raise ValueError(f"down: expected at most {MAX_FUSED_RANK} rows if fused, got {R}")
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    parts = max(1, min(PARTS_PER_RANK // max(R, 1), 8, K // SHORTEST_PART))
    part = triton.cdiv(triton.cdiv(K, parts), SHORTEST_PART) * SHORTEST_PART
    options = {
        "HAS_BIAS": bias is not None,
        "ACTIVATION": activation or "none",
        "PRECISION": "tf32" if tf32 else "ieee",
    }
    p_bias = x if bias is None else bias
    if fused:
        _fused[(triton.cdiv(M, FUSED_ROWS),)](
            x, down, up, p_bias, y, M, K, N, R, part, PARTS=parts, **fused_tile(R), **options
        )  # fmt: skip
        return y

    swapped = M < 64
    apart = M <= 256 and parts > 1  # the second launch sums the parts
    z = x.new_empty((parts, M, R), dtype=torch.float32) if apart else x.new_empty(M, R)
    first, second = tiles(M, K, R, N, parts if apart else 1, x.element_size(), device)

    def product(tile: Tile, x: Tensor, weight: Tensor, out: Tensor, **constants: object) -> None:
        left, right = (weight, x) if swapped else (x, weight)
        P, Q = left.shape[-2], right.shape[-2]
        programs = triton.cdiv(P, tile.rows) * triton.cdiv(Q, tile.cols)
        _product[(programs, parts if constants["PARTS_OUT"] else 1)](
            left, right, p_bias, out, P, Q, left.shape[-1],
            ROWS=tile.rows, COLS=tile.cols, DEPTH=tile.depth, SWAPPED=swapped,
            num_warps=tile.warps, num_stages=tile.stages, **constants,
        )  # fmt: skip

    if R:
        plain = {**options, "HAS_BIAS": False, "ACTIVATION": "none"}
        product(first, x, down, z, part=part, PARTS=parts, PARTS_IN=1, PARTS_OUT=apart, **plain)
    whole = triton.cdiv(max(R, 1), SHORTEST_PART) * SHORTEST_PART
    parts_in = parts if apart else 1
    product(second, z, up, y, part=whole, PARTS=1, PARTS_IN=parts_in, PARTS_OUT=False, **options)
    return y


def fused_tile(R: int) -> dict[str, int]:
    return {
        "ROWS": FUSED_ROWS,
        "COLS": 64,
        "DEPTH": 32,
        "RANK": max(triton.next_power_of_2(R), 16),
        "num_warps": 8 if R > 64 else 4,
        "num_stages": 3,
    }
