"""block_sparse_linear on a GPU against torch's best dense layer, by kernel, block and sparsity.

python -m prunelm.benchmarks.gpu_block_sparse_linear [--full] [--seconds 60] [--out FOLDER]
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prunelm import BlockSparse, ops
from prunelm.benchmarks.gpu_harness import (
    Case,
    Dense,
    Roof,
    Timer,
    options_of,
    replayed,
    run_benchmark,
    size_bytes,
    times,
)
from prunelm.benchmarks.harness import check

Backend = Literal["cuda", "triton"]

N, K = 4096, 4096
BLOCKS, SPARSITIES = (16, 32, 64, 128), (0.5, 0.75, 0.9, 0.95)
# The goals' rows first; then what the choice of path needs for every bucket.
ROWS = (16, 4096, 1, 64, 8, 256, 1024)
SMALL = ((1024, 1024), (512, 2048))  # N, K with --full


def kept(shape: tuple[int, int], block: int, sparsity: float, device: str) -> Tensor:
    """A mask of exactly that sparsity, its blocks drawn at random."""
    rows, cols = -(-shape[0] // block), -(-shape[1] // block)
    order = torch.randperm(rows * cols, generator=torch.Generator().manual_seed(block))
    return (order >= round(sparsity * rows * cols)).view(rows, cols).to(device)


class Layer:
    """A block-sparse layer of random numbers, and the same with its zeros.

    Attributes:
        weight, dense: the same weight [N, K].
        bias: [N].
    """

    def __init__(self, shape: tuple[int, int], block: int, sparsity: float, device: str) -> None:
        torch.manual_seed(0)
        full = torch.randn(*shape, device=device, dtype=torch.bfloat16) * shape[1] ** -0.5
        mask = kept(shape, block, sparsity, device)
        self.weight = BlockSparse.from_dense(full, (block, block), mask)
        self.dense = self.weight.to_dense()
        self.bias = torch.randn(shape[0], device=device, dtype=torch.bfloat16)

    def check(self, x: Tensor, got: Tensor, what: str) -> None:
        """Holds relu(x @ weight.T + bias) against float64."""
        wide = (t.double() for t in (x, self.dense, self.bias))
        check(got, F.linear(x, self.dense, self.bias).relu(), F.linear(*wide).relu(), what)


def forward(
    timer: Timer, dense: Dense, roof: Roof, layer_of: Callable[..., Layer], *, M: int,
    shape: tuple[int, int], block: int, sparsity: float, backend: Backend, device: str = "cuda",
) -> Mapping[str, Any]:  # fmt: skip
    """One line of the table: one kernel, checked, beside the best dense layer."""
    layer = layer_of(shape, block, sparsity)
    torch.manual_seed(M)
    x = torch.randn(M, shape[1], device=device, dtype=torch.bfloat16)

    def run(x: Tensor, weight: BlockSparse, bias: Tensor) -> Tensor:
        return ops.block_sparse_linear(x, weight, bias, "relu", backend=backend)

    inputs = (x, layer.weight, layer.bias)
    layer.check(x, replayed(timer, run, inputs), f"block_sparse_linear on {backend}")
    own = times(timer, run, inputs)
    peer, way = dense.times((M, shape, sparsity), x, layer.dense, layer.bias)
    weights = layer.weight.values.numel()
    moved = size_bytes((x, layer.weight.values, layer.bias)) + 2 * M * shape[0]
    return {
        "us": own.warm_us,
        "cold_us": own.cold_us,
        "dense_us": peer.warm_us,
        "dense_cold_us": peer.cold_us,
        "dense": way,
        "speedup": peer.warm_us / own.warm_us,
        "speedup_cold": peer.cold_us / own.cold_us,
        "of_roof_cold": roof.us(2 * M * weights, moved) / own.cold_us,
    }


def cases(timer: Timer, roof: Roof, full: bool, device: str = "cuda") -> list[Case]:
    """All lines, the goals' first."""
    dense = Dense(timer, compile_s=25)
    layer_of = cache(partial(Layer, device=device))  # 16 of 40 MB with their zeros
    found = []
    for shape, M, block, sparsity, backend in product(
        ((N, K), *(SMALL if full else ())), ROWS, BLOCKS, SPARSITIES, ("cuda", "triton")
    ):
        labels = {"backend": backend, "M": M, "N": shape[0], "K": shape[1]}
        labels |= {"block": f"{block}x{block}", "sparsity": sparsity}
        run = partial(
            forward, timer, dense, roof, layer_of, M=M, shape=shape, block=block,
            sparsity=sparsity, backend=backend, device=device,
        )  # fmt: skip
        found.append((labels, run))
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Prints the card, a table in microseconds, and saves it."""
    options = options_of(str(__doc__), words)
    return run_benchmark("block_sparse_linear", partial(cases, full=options.full), options)


if __name__ == "__main__":
    sys.exit(main())
