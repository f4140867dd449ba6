"""Predicted times of the linear ops from sizes alone: what `accelerate` and `explain` decide by.

Each is a sum of what was measured to matter on one thread: the call, the weights' way from memory,
multiply-adds, and what a block or a transposed weight costs. Constants are fitted to a Zen 5 core
(benchmarks/results); what decides is their ratio, which other machines change little.
"""

from functools import cache

import torch

from prunelm import _C

CALL_US = 1.7
DENSE_BYTES_PER_US = 75e3  # weights that lie in the third-level cache, read by torch
BYTES_PER_US = 85e3  # and by these kernels
DENSE_FLOPS_PER_US = 97e3  # torch's own kernels use what the processor has
DENSE_REPACK_US = 0.13e-3  # per weight, torch's matrix product rearranges them at each call
BLOCK_US = 0.3e-3  # per panel of 16 outputs (or line of up to 6), block and tile of rows
NEAR_BYTES_PER_US = 300e3  # x in the second-level cache, read again for every block of a line
TRANSPOSE_US = 0.09e-3  # per weight that lies row by row


@cache
def flops_per_us() -> float:
    """Speed of this package's own inner loops, from the instruction set that they use."""
    return {"portable": 24e3, "avx2": 115e3, "avx512": 185e3}[
        str(_C.build_information()["instruction_set"])
    ]


@cache
def dense_flops_per_us(dtype: torch.dtype) -> float:
    """Speed of torch's matrix product; it multiplies bfloat16 in hardware where there is some."""
    if dtype is not torch.bfloat16:
        return DENSE_FLOPS_PER_US
    return 340e3 if torch.cpu._is_avx512_bf16_supported() else 30e3


def dense_us(M: int, N: int, K: int, dtype: torch.dtype = torch.float32) -> float:
    """torch.nn.functional.linear, [M, K] by [N, K]."""
    if M < 4:  # a vector product for each row
        return CALL_US + M * N * K * dtype.itemsize / DENSE_BYTES_PER_US
    return CALL_US + 2 * M * N * K / dense_flops_per_us(dtype) + N * K * DENSE_REPACK_US


def block_sparse_us(
    M: int, nnz: int, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> float:
    """block_sparse_linear with nnz blocks."""
    bn, bk = block
    weights = nnz * bn * bk
    memory = weights * dtype.itemsize / BYTES_PER_US
    if bn % 16:  # outputs are broadcast to 8 rows of x, whether there are 8 or not
        rows = -(-M // 8) * 8
        tiles = nnz * -(-bn // 6)
        walks = tiles * -(-M // 64) * BLOCK_US + tiles * rows * bk * 4 / NEAR_BYTES_PER_US
    else:
        rows, walks = M, nnz * (bn // 16) * -(-M // 6) * BLOCK_US
    return CALL_US + max(memory, 2 * rows * weights / flops_per_us()) + walks


def low_rank_us(M: int, N: int, K: int, R: int, dtype: torch.dtype = torch.float32) -> float:
    """low_rank_linear with plain factors of rank R."""
    weights = R * (N + K)
    return (
        CALL_US
        + weights * dtype.itemsize / BYTES_PER_US
        + 2 * M * weights / flops_per_us()
        + weights * TRANSPOSE_US
    )


def low_rank_blocks_us(M: int, N: int, K: int, R: int, dtype: torch.dtype = torch.float32) -> float:
    """low_rank_linear with factors of rank R in blocks of 16 outputs."""
    down = block_sparse_us(M, -(-R // 16), (16, K), dtype)
    return down + block_sparse_us(M, -(-N // 16), (16, R), dtype) - CALL_US
