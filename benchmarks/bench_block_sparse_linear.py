"""block_sparse_linear against torch's dense linear and its block-sparse one, on this machine.

python -m prunelm.benchmarks.bench_block_sparse_linear [--threads 2] [--save]
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunelm import BlockSparse, ops
from prunelm.benchmarks.harness import Roof, check, measure_roof, report, side_by_side

BLOCKS = ((16, 1), (16, 4), (16, 16), (32, 32), (64, 64), (128, 128))
SPARSITIES = (0.5, 0.75, 0.9, 0.95)
ROWS = (1, 8, 64)
# (N, K): the square of most publications, and the layers of a model of width 512.
SHAPES = ((1024, 1024), (3072, 512), (512, 2048))


def case(M: int, N: int, K: int, block: tuple[int, int], sparsity: float) -> tuple[Tensor, ...]:
    """x, the dense weight with its zeros, and the mask; exactly as many blocks as sparsity says."""
    g = torch.Generator().manual_seed(0)
    rows, cols = N // block[0], K // block[1]
    order = torch.randperm(rows * cols, generator=g)
    mask = (order < round((1 - sparsity) * rows * cols)).view(rows, cols)
    dense = torch.randn(N, K, generator=g)
    dense *= mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return torch.randn(M, K, generator=g), dense, mask


def torch_bsr(x: Tensor, dense: Tensor, block: tuple[int, int]) -> Callable[[], object]:
    """torch's own block-sparse linear, which does not run under inference mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is in beta
        weight = dense.to_sparse_bsr(block)

    def call() -> object:
        with torch.inference_mode(False), torch.no_grad():
            return F.linear(x, weight)

    return call


def forward(
    M: int, N: int, K: int, block: tuple[int, int], sparsity: float, threads: int, roof: Roof
) -> dict[str, Any]:
    """One line of the table: every way to compute the same, checked first."""
    x, dense, mask = case(M, N, K, block, sparsity)
    weight = BlockSparse.from_dense(dense, block, mask)
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.block_sparse_linear(x, weight),
        "dense": lambda: F.linear(x, dense),
    }
    exact = F.linear(x.double(), dense.double())
    what = f"block_sparse_linear at M={M} N={N} K={K}, block {block}, sparsity {sparsity}"
    check(ops.block_sparse_linear(x, weight), F.linear(x, dense), exact, what)
    if block[0] == block[1] >= 16 and (N, K) == SHAPES[0] and sparsity >= 0.75:
        calls["torch_bsr"] = torch_bsr(x, dense, block)
    with torch.inference_mode():
        us = side_by_side(calls, threads)
    stored = weight.values.numel()
    least = roof.us(2 * M * stored, 4 * (stored + M * (N + K)))
    return {
        "M": M,
        "N": N,
        "K": K,
        "block": f"{block[0]}x{block[1]}",
        "sparsity": sparsity,
        **{name: us.get(name) for name in ("ours", "dense", "torch_bsr")},
        "speedup": us["dense"] / us["ours"],
        "GFLOP/s": 2 * M * stored / us["ours"] / 1e3,
        "of_roof": least / us["ours"],
    }


def backward(M: int, block: tuple[int, int], sparsity: float, threads: int) -> dict[str, Any]:
    """Forward and backward together, gradients of x and of the weight."""
    N = K = 1024
    x, dense, mask = case(M, N, K, block, sparsity)
    weight = BlockSparse.from_dense(dense, block, mask)
    x.requires_grad_()
    values = weight.values.detach().requires_grad_()
    stored = BlockSparse(values, weight.crow, weight.col, weight.shape)
    dense.requires_grad_()
    grad = torch.randn(M, N, generator=torch.Generator().manual_seed(1))
    us = side_by_side(
        {
            "ours": lambda: torch.autograd.grad(
                ops.block_sparse_linear(x, stored), (x, values), grad
            ),
            "dense": lambda: torch.autograd.grad(F.linear(x, dense), (x, dense), grad),
        },
        threads,
        rounds=7,
    )
    names = {"M": M, "N": N, "K": K, "block": f"{block[0]}x{block[1]}", "sparsity": sparsity}
    return {**names, **us, "speedup": us["dense"] / us["ours"]}


def main(words: Sequence[str] | None = None) -> None:
    """Prints a machine line, tables in microseconds and lines of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="75 %% sparsity at 1024 x 1024 only")
    parser.add_argument("--save", action="store_true", help="merge into benchmarks/results")
    options = parser.parse_args(words)
    threads, roof = options.threads, measure_roof(options.threads)
    rows = [
        forward(M, N, K, block, sparsity, threads, roof)
        for N, K in (SHAPES[:1] if options.quick else SHAPES)
        for block in (BLOCKS if (N, K) == SHAPES[0] else ((16, 4), (16, 16)))
        for sparsity in ((0.75,) if options.quick else SPARSITIES)
        for M in ROWS
    ]
    rows += [forward(M, 1024, 1024, (16, 1024), 0.0, threads, roof) for M in (1, 8, 64, 128, 512)]
    # Too low for a panel of 16 outputs: right, but slower than dense.
    rows += [forward(M, 1024, 1024, (1, 1), 0.9, threads, roof) for M in ROWS]
    report("block_sparse_linear", threads, roof, rows, options.save)
    if not options.quick:
        both = [
            backward(M, block, sparsity, threads)
            for block in ((16, 4), (16, 16), (64, 64))
            for sparsity in (0.75, 0.9)
            for M in (64, 512)
        ]
        report("block_sparse_linear forward and backward", threads, roof, both, options.save)


if __name__ == "__main__":
    main()
