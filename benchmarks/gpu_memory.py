"""Calls every kernel of a backend on small odd shapes, for compute-sanitizer to look at.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m prunelm.benchmarks.gpu_memory cuda

Without torch's cache each tensor is an allocation of its exact size. Results are held against the
reference only so far that none may be NaN: tests/test_gpu*.py do the rest.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from prunelm import BlockSparse, ops

N, K, R = 200, 150, 33
ROWS = (1, 7, 33, 70)
BLOCKS = ((16, 4), (16, 16), (32, 32), (64, 64), (128, 128), (32, 16))
BEAMS = ((2, 3, 37), (1, 8, 1030), (2, 1, 5))  # B, W, V
DTYPES = (torch.float32, torch.bfloat16)
# Triton compiles for each of these, a second or two.
FEW_ROWS, FEW_BLOCKS = (7, 70), ((16, 16), (64, 64))

Call = tuple[str, Callable[[], Sequence[Tensor]]]


def block_sparse_linear(backend: Any, device: str) -> Iterator[Call]:
    """Forward for all shapes, gradients for some."""
    few = backend == "triton"
    for block, dtype in product(FEW_BLOCKS if few else BLOCKS, DTYPES[few:]):
        mask = torch.rand(-(-N // block[0]), -(-K // block[1])) < 0.5
        weight = BlockSparse.from_dense(torch.randn(N, K, dtype=dtype).to(device), block, mask)
        bias = torch.randn(N, dtype=dtype).to(device)
        for M in FEW_ROWS if few else ROWS:
            x = torch.randn(M, K, dtype=dtype).to(device)
            name = f"block_sparse_linear, {block}, {dtype}, M = {M}"
            yield (
                name,
                lambda x=x, w=weight, b=bias: [  # type: ignore[misc]
                    ops.block_sparse_linear(x, w, b, "gelu", backend=backend)
                ],
            )
            if M in (7, 70):
                yield (
                    f"{name}, gradients",
                    lambda x=x, w=weight, b=bias: _gradients(x, w, b, backend),  # type: ignore[misc]
                )


def _gradients(x: Tensor, weight: BlockSparse, bias: Tensor, backend: Any) -> Sequence[Tensor]:
    inputs = (x.clone().requires_grad_(), weight.values.requires_grad_(), bias.requires_grad_())
    y = ops.block_sparse_linear(inputs[0], weight, bias, "silu", backend=backend)
    return torch.autograd.grad(y, inputs, torch.ones_like(y))


def low_rank_linear(backend: Any, device: str) -> Iterator[Call]:
    few = backend == "triton"
    for dtype, M in product(DTYPES[few:], FEW_ROWS if few else ROWS):
        x, down, up, bias = (
            torch.randn(*shape, dtype=dtype).to(device) for shape in ((M, K), (R, K), (N, R), (N,))
        )
        yield (
            f"low_rank_linear, {dtype}, M = {M}",
            lambda t=(x, down, up, bias): [  # type: ignore[misc]
                ops.low_rank_linear(*t, "silu", backend=backend)
            ],
        )


def beam_step(backend: Any, device: str) -> Iterator[Call]:
    few = backend == "triton"
    for (B, W, V), prune in product(BEAMS[:1] if few else BEAMS, ("late", "early", "after")):
        score = torch.randn(B, W).to(device)
        logits = torch.randn(B, W, V).to(device)
        slot = torch.arange(B * W).view(B, W).remainder(4).to(device)
        rows = torch.randn(4, V).log_softmax(-1).to(device)
        term = (rows, torch.randint(4, (B, W)).to(device), torch.full((B,), 0.3).to(device))
        yield (
            f"beam_step, {(B, W, V)}, {prune}",
            lambda a=(score, logits, (term,)), s=slot, p=prune: ops.beam_step(  # type: ignore[misc]
                *a, slot=s, prune=p, token_reward=0.1, backend=backend
            ),
        )


def main(words: Sequence[str] | None = None) -> None:
    """Runs every call once."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("backend", choices=("cuda", "triton", "cpu"))
    options = parser.parse_args(words)
    device = "cpu" if options.backend == "cpu" else "cuda"
    torch.manual_seed(0)
    count = 0
    for op in (block_sparse_linear, low_rank_linear, beam_step):
        for name, call in op(options.backend, device):
            out = [t.cpu() for t in call()]
            if any(bool(t.isnan().any()) for t in out):
                raise RuntimeError(f"{name}: expected numbers, got NaN")
            count += 1
    print(f"{count} calls of the kernels of {options.backend}")


if __name__ == "__main__":
    main()
