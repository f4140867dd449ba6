"""Predicted times of the linear ops from sizes alone: what `accelerate` and `explain` decide by.

Each is a sum of what was measured to matter on one thread: the call, the weights' way from memory,
multiply-adds, and what a block or a transposed weight costs. Constants are fitted to a Zen 4 core
(benchmarks/results); what decides is their ratio, which other machines change little.
"""

from functools import cache

import torch

from prunelm import _C

CALL_US = 3.0
BYTES_PER_US = 45e3  # weights that lie in the third-level cache
DENSE_FLOPS_PER_US = 85e3  # torch's own kernels use what the processor has
DENSE_REPACK_US = 0.135e-3  # per weight, torch's matrix product rearranges them at each call
BLOCK_US = 6e-3  # per panel of 16 outputs, block and tile of 6 rows
TRANSPOSE_US = 0.25e-3  # per weight that lies row by row


@cache
def flops_per_us() -> float:
    """Speed of this package's own inner loops, from the instruction set that they use."""
    return {"portable": 15e3, "avx2": 85e3}.get(
        str(_C.build_information()["instruction_set"]), 85e3
    )


def dense_us(M: int, N: int, K: int, dtype: torch.dtype = torch.float32) -> float:
    """torch.nn.functional.linear, [M, K] by [N, K]."""
    memory = N * K * dtype.itemsize / BYTES_PER_US
    if M < 4:  # a vector product for each row
        return CALL_US + M * memory
    return CALL_US + memory + 2 * M * N * K / DENSE_FLOPS_PER_US + N * K * DENSE_REPACK_US


def block_sparse_us(
    M: int, nnz: int, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> float:
    """block_sparse_linear with nnz blocks."""
    bn, bk = block
    weights = nnz * bn * bk
    memory = weights * dtype.itemsize / BYTES_PER_US
    if bn % 16:  # outputs are broadcast to 16 rows of x, whether there are 16 or not
        rows, walks = -(-M // 16) * 16, nnz * -(-bn // 6) * -(-M // 16)
    else:
        rows, walks = M, nnz * (bn // 16) * -(-M // 6)
    flops = 2 * rows * weights / flops_per_us()
    # Up to 3 rows the multiply-adds wait for the weights; more rows use each weight more than once.
    return CALL_US + (max(memory, flops) if M < 4 else memory + flops) + walks * BLOCK_US


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
