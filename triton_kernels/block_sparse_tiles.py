"""Tile shapes of the block-sparse kernels: a rule from block, M bucket, dtype and device.

What decides is traffic between L2 and the cores. A tile [m, n] of y reads, for each column of the
union, m rows of x and n outputs of the stored blocks: at density d and union density u (u = d for
blocks of 128) that is 2 u / n + 2 d / m bytes for each of the M N K products of 16 bits. Dense
matrix products at 700 TFLOP/s over tiles of 128 x 256 read 0.023 bytes each, 8 TB/s. So tiles are
as tall as registers allow: [256, 128] in float32 is 128 registers a thread of 8 warps.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton

WGMMA = (9, 10)  # major capabilities whose matrix units take 64 rows and more at once


@dataclass(frozen=True)
class Tile:
    """The shape of one program's work, and with what it runs.

    Attributes:
        rows: rows of x.
        cols: outputs.
        depth: columns of x per step.
        warps, stages: num_warps and num_stages.
        swap: whether the outputs are the rows of the matrix product.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    swap: bool = False


@dataclass(frozen=True)
class Device:
    """What the rule knows of a GPU."""

    major: int
    cores: int

    @staticmethod
    def of(device: torch.device) -> "Device":
        """That of a tensor's device; in the interpreter, an H100."""
        return _device(device.index) if device.type == "cuda" else Device(9, 132)


@cache
def _device(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    return Device(found.major, found.multi_processor_count)


def precision_of(dtype: torch.dtype) -> str:
    """How float32 is multiplied: "tf32" if torch's own products may be, else "ieee"."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def exact(dtype: torch.dtype) -> bool:
    """Whether products are float32's own, which no matrix unit computes."""
    return dtype == torch.float32 and precision_of(dtype) == "ieee"


def whole(bn: int, bk: int) -> bool:
    """Whether a step's indices can be loaded once for each block."""
    return bn & (bn - 1) == 0 and bk & (bk - 1) == 0


def product_tile(
    dtype: torch.dtype, M: int, lines: int, width: int, block: tuple[int, int], device: Device
) -> Tile:
    """The tile of x @ weight.T.

    Args:
        dtype: x's.
        M: rows of x.
        lines: groups of block rows.
        width: outputs of a group.
        block: (bn, bk) of the product: outputs first.
        device: where it runs.
    """
    few = max(16, triton.next_power_of_2(M))
    cols = max(16, triton.next_power_of_2(min(width, 128)))
    half = dtype != torch.float32
    if not whole(*block) or block[1] < 4:
        # Indices stand in registers, one for each weight.
        cols = min(cols, 64)
        return Tile(min(few, 64), cols, 32, 4, 3, _swapped(half, cols, device))
    if exact(dtype):
        return Tile(min(few, 64), min(cols, 64), 32, 8 if M > 32 else 4, 3)
    if M < 64:
        cols = min(cols, 64)
        return Tile(few, cols, 128 if half else 64, 4, 4, _swapped(half, cols, device))
    if not half:
        return Tile(128 if M > 64 else 64, cols, 32, 8, 3)
    programs, swap = lines * triton.cdiv(width, cols), _swapped(half, cols, device)
    if M > 128 and swap and programs * triton.cdiv(M, 256) >= device.cores:
        return Tile(256, cols, 64, 8, 4, swap)
    return Tile(128, cols, 64, 8, 4, swap) if M > 64 else Tile(64, cols, 64, 4, 4, swap)


def _swapped(half: bool, cols: int, device: Device) -> bool:
    """Whether outputs are the rows of the product: they fill the 64 of wgmma whatever M is.

    And rows of x fill its 256 columns: [64, 256, 16] reads 10 KB of shared memory in 128 cycles,
    where two of [64, 128, 16] read 12. 32-bit operands would have to be turned over.
    """
    return half and cols >= 64 and device.major in WGMMA


def gradient_tile(dtype: torch.dtype, width: int, block: tuple[int, int], device: Device) -> Tile:
    """The tile of the gradient to values: `cols` outputs by `rows` columns of x, `depth` rows.

    For each row of x it reads cols + rows numbers and makes cols * rows products of them.

    Args:
        dtype: x's.
        width: outputs of a group.
        block: (bn, bk).
        device: where it runs.
    """
    cols = max(16, triton.next_power_of_2(min(width, 128)))
    if not whole(*block) or min(block) < 4:
        return Tile(64, min(cols, 64), 32, 4, 3)
    if exact(dtype):
        return Tile(64, min(cols, 64), 16, 8, 3)
    if dtype == torch.float32:
        return Tile(128, min(cols, 64), 32, 8, 3)
    return Tile(256 if device.major in WGMMA else 128, cols, 64, 8, 4)
