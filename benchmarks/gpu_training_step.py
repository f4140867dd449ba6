"""Forward and both gradients of a block-sparse layer on a GPU against the dense layer's.

python -m prunelm.benchmarks.gpu_training_step [--full] [--seconds 60] [--out FOLDER]
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prunelm import BlockSparse, ops
from prunelm.benchmarks.gpu_block_sparse_linear import Layer
from prunelm.benchmarks.gpu_harness import (
    Case,
    Roof,
    Timer,
    options_of,
    replayed,
    run_benchmark,
    times,
)
from prunelm.benchmarks.harness import check

M, N, K = 8192, 4096, 4096
CASES = ((64, 0.75), (64, 0.9))  # block, sparsity: the goals'
MORE = ((64, 0.5), (128, 0.75), (128, 0.9), (32, 0.75), (32, 0.9))  # with --full


def dense_step(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """y, and the gradients to x and weight, in torch's three products."""
    return F.linear(x, weight), grad @ weight, grad.T @ x


def step(
    timer: Timer, roof: Roof, *, rows: int, shape: tuple[int, int], block: int, sparsity: float,
    backend: Literal["cuda", "triton"], device: str = "cuda",
) -> Mapping[str, Any]:  # fmt: skip
    """One line of the table, every result checked."""
    layer = Layer(shape, block, sparsity, device)
    x = torch.randn(rows, shape[1], device=device, dtype=torch.bfloat16)
    grad = torch.randn(rows, shape[0], device=device, dtype=torch.bfloat16)

    def run(x: Tensor, weight: BlockSparse, grad: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            values = weight.values.detach().requires_grad_()
            weight = dataclasses.replace(weight, values=values)
            y = ops.block_sparse_linear(x, weight, backend=backend)
            return y, *torch.autograd.grad(y, (x, values), grad)

    inputs = (x, layer.weight, grad)
    got = replayed(timer, run, inputs)
    dense = (x, layer.dense, grad)
    plain, exact = dense_step(*dense), dense_step(*(t.double() for t in dense))
    mask, blocks = stored(layer.weight), (block, block)
    for i, what in enumerate(("y", "gradient to x", "gradient to values")):
        both = [plain[i], exact[i]]
        if i == 2:  # at the stored blocks, in their order
            both = [BlockSparse.from_dense(full, blocks, mask).values for full in both]
        check(got[i].detach(), *both, f"{what}, on {backend}")
    del plain, exact
    own, peer = times(timer, run, inputs), times(timer, dense_step, dense)
    weights = layer.weight.values.numel()
    return {
        "us": own.warm_us,
        "dense_us": peer.warm_us,
        "speedup": peer.warm_us / own.warm_us,
        "of_roof": roof.us(6 * rows * weights, 0) / own.warm_us,
    }


def stored(weight: BlockSparse) -> Tensor:
    """[rows, columns] of blocks, True where one is stored."""
    (N, K), (bn, bk) = weight.shape, weight.block
    mask = torch.zeros(-(-N // bn), -(-K // bk), dtype=torch.bool, device=weight.col.device)
    row = torch.arange(len(mask), device=mask.device).repeat_interleave(weight.crow.diff())
    mask[row, weight.col.long()] = True
    return mask


def cases(timer: Timer, roof: Roof, full: bool) -> list[Case]:
    """All lines, the goals' first."""
    return [
        (
            {"backend": backend, "M": M, "N": N, "K": K, "block": f"{b}x{b}", "sparsity": s},
            partial(
                step, timer, roof, rows=M, shape=(N, K), block=b, sparsity=s, backend=backend
            ),
        )
        for (b, s), backend in product((*CASES, *(MORE if full else ())), ("triton", "cuda"))
    ]  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Prints the card, a table in microseconds, and saves it."""
    options = options_of(str(__doc__), words)
    return run_benchmark("training step", partial(cases, full=options.full), options)


if __name__ == "__main__":
    sys.exit(main())
