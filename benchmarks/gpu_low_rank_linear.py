"""low_rank_linear on a GPU against two of torch's dense layers and the one that it replaces.

python -m prunelm.benchmarks.gpu_low_rank_linear [--full] [--seconds 60] [--out FOLDER]
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prunelm import ops
from prunelm.benchmarks.gpu_harness import (
    Call,
    Case,
    Dense,
    Roof,
    Timer,
    best,
    compiled,
    options_of,
    replayed,
    run_benchmark,
    size_bytes,
    times,
)
from prunelm.benchmarks.harness import check

N, K = 4096, 4096
RANKS, ROWS = (64, 128, 256), (16, 1, 64, 8, 4096, 256, 1024)
COMPILED_ROWS = (16, 64)  # elsewhere the two calls as they are


def two_linears(x: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """Two calls of cuBLAS and a relu."""
    return F.linear(F.linear(x, down), up, bias).relu()


def two_fused(x: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """Two calls, the second with its epilogue."""
    y: Tensor = torch._addmm_activation(bias, F.linear(x, down), up.T)
    return y


def forward(
    timer: Timer, dense: Dense, roof: Roof, *, M: int, R: int,
    backend: Literal["cuda", "triton"], device: str = "cuda",
) -> Mapping[str, Any]:  # fmt: skip
    """One line of the table: one kernel, checked, beside the two calls and the dense layer."""
    torch.manual_seed(R)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16) * scale

    down, up = drawn(R, K, scale=K**-0.5), drawn(N, R, scale=R**-0.5)
    bias, x, full = drawn(N), drawn(M, K), drawn(N, K, scale=K**-0.5)
    inputs = (x, down, up, bias)

    def run(*tensors: Tensor) -> Tensor:
        return ops.low_rank_linear(*tensors, "relu", backend=backend)

    got = replayed(timer, run, inputs)
    check(got, two_linears(*inputs), two_linears(*(t.double() for t in inputs)), backend)
    ways: dict[str, Call] = {"two": two_linears, "two fused": two_fused}
    if M in COMPILED_ROWS and dense.left_s > 0:
        made, seconds = compiled(two_linears, inputs, dense.left_s)
        dense.left_s -= seconds
        ways |= {} if made is None else {"compiled": made}
    own, (two, way) = times(timer, run, inputs), best(timer, ways, inputs)
    one, _ = dense.times(M, x, full, bias)
    moved = size_bytes(inputs) + 2 * M * N
    return {
        "us": own.warm_us,
        "cold_us": own.cold_us,
        "two_us": two.warm_us,
        "two_cold_us": two.cold_us,
        "two": way,
        "dense_us": one.warm_us,
        "over_two": two.warm_us / own.warm_us,
        "over_two_cold": two.cold_us / own.cold_us,
        "over_dense": one.warm_us / own.warm_us,
        "of_roof_cold": roof.us(2 * M * R * (N + K), moved) / own.cold_us,
    }


def cases(timer: Timer, roof: Roof, device: str = "cuda") -> list[Case]:
    """All lines, the goals' first."""
    dense = Dense(timer, compile_s=20)
    return [
        (
            {"backend": backend, "M": M, "N": N, "K": K, "R": R},
            partial(forward, timer, dense, roof, M=M, R=R, backend=backend, device=device),
        )
        for M, R, backend in product(ROWS, RANKS, ("cuda", "triton"))
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Prints the card, a table in microseconds, and saves it."""
    options = options_of(str(__doc__), words)
    return run_benchmark("low_rank_linear", cases, options)


if __name__ == "__main__":
    sys.exit(main())
