"""Measures tiles of the Triton block-sparse product: what wins belongs into its rule.

python -m prunelm.benchmarks.tune_block_sparse [--block 64x64] [--sparsity 0.9] [--seconds 10]

The rule (`triton_kernels/block_sparse_tiles.py`) chooses by sizes alone; nothing is measured inside
a call.
"""

import argparse
from collections.abc import Callable, Iterator
from time import monotonic

import torch

from prunelm.gpu_index import group_size
from prunelm.sparse import BlockSparse
from prunelm.triton_kernels.block_sparse_linear import block_sparse_linear
from prunelm.triton_kernels.block_sparse_tiles import Device, Tile, product_tile

M_BUCKETS = (1, 16, 64, 256, 4096)  # each stands for the numbers of rows up to the next


def neighbours(tile: Tile) -> Iterator[Tile]:
    """The tile and others that might beat it; those nearest to it first."""
    yield tile
    for rows in (tile.rows, max(16, tile.rows // 2)):
        for cols in (tile.cols, max(16, tile.cols // 2)):
            for depth in (tile.depth, max(32, tile.depth // 2)):
                for stages in (4, 3, 5, 2):
                    for warps in (tile.warps, 12 - tile.warps):  # 4 and 8
                        if rows * cols <= warps * 32 * 128:  # half of a thread's registers
                            swap = tile.swap and cols >= 64
                            yield Tile(rows, cols, depth, warps, stages, swap)


def triton_us(call: Callable[[], object]) -> float:
    """The median time of a call in microseconds, L2 flushed before each."""
    from triton.testing import do_bench

    return 1e3 * float(do_bench(call, warmup=5, rep=20, return_mode="median"))


def tune(
    block: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    size: tuple[int, int] = (4096, 4096),
    sparsity: float = 0.8,
    seconds: float = 10.0,
    time_us: Callable[[Callable[[], object]], float] = triton_us,
) -> dict[int, list[tuple[Tile, float]]]:
    """(tile, microseconds), fastest first and at least one, for each bucket of M.

    Args:
        block: (bn, bk).
        dtype: x's.
        size: (N, K).
        sparsity: fraction of blocks that are not stored, at random.
        seconds: for each bucket; what is not reached by then is left out.
        time_us: how long a call takes.
    """
    from triton.runtime.errors import OutOfResources

    (N, K), (bn, bk) = size, block
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    mask = torch.rand(-(-N // bn), -(-K // bk)) >= sparsity
    dense = torch.randn(N, K, dtype=dtype, device=device)
    weight = BlockSparse.from_dense(dense, block, mask).with_gpu_index()
    group, found = group_size(bn), {}
    for M in M_BUCKETS:
        x = torch.randn(M, K, dtype=dtype, device=device)
        lines = -(-len(mask) // group)
        first = product_tile(dtype, M, lines, group * bn, block, Device.of(device))
        end, times = monotonic() + seconds, []
        for tile in dict.fromkeys(neighbours(first)):

            def call(x: torch.Tensor = x, tile: Tile = tile) -> torch.Tensor:
                pattern = (weight.values, weight.crow, weight.col, None, weight.gpu_index)
                return block_sparse_linear(x, *pattern, out_features=N, tile=tile)

            try:
                times.append((tile, time_us(call)))
            except OutOfResources:
                continue
            if monotonic() > end:
                break
        found[M] = sorted(times, key=lambda pair: pair[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block", nargs="*", default=["128x128", "64x64", "32x32", "16x16"])
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each block and M")
    options = parser.parse_args()
    for name in options.block:
        bn, bk = map(int, name.split("x"))
        for M, times in tune((bn, bk), sparsity=options.sparsity, seconds=options.seconds).items():
            for tile, us in times[:3]:
                print(f"{name} M={M}: {us:8.1f} us {tile}")


if __name__ == "__main__":
    main()
