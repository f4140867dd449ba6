"""low_rank_linear against two dense linears and the one that it replaces, on this machine.

python -m prunelm.benchmarks.bench_low_rank_linear [--full] [--threads 2] [--save]
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from prunelm import ops
from prunelm.benchmarks.bench_block_sparse_linear import compiled_linear, empty_call
from prunelm.benchmarks.harness import Roof, check, measure_roof, options_of, report, side_by_side
from prunelm.nn import LowRankLinear, PackedLowRankLinear

# Square layers of width d, at a sixteenth, an eighth and a quarter of full rank.
WIDTHS = (512, 1024, 4096)
SHARES = (16, 8, 4)
ROWS = (1, 8, 64, 512)


def forward(
    M: int, d: int, R: int, *, threads: int, roof: Roof, beside: bool = False
) -> dict[str, Any]:
    """One line of the table: every way to compute the same, checked first.

    Args:
        beside: also the two linears, and the dense one, compiled.
    """
    N = K = d
    torch.manual_seed(0)
    plain = LowRankLinear(K, N, R, bias=False).requires_grad_(False)
    packed, x = PackedLowRankLinear(plain), torch.randn(M, K)
    down, up, dense = plain.down, plain.up, plain.up @ plain.down
    thin, wide = packed.down, packed.up
    exact = F.linear(F.linear(x.double(), down.double()), up.double())
    two = F.linear(F.linear(x, down), up)
    check(ops.low_rank_linear(x, thin, wide), two, exact, "low_rank_linear in blocks")
    check(ops.low_rank_linear(x, down, up), two, exact, "low_rank_linear")
    peers: dict[str, Callable[[], object]] = {}
    if beside:
        torch.compiler.reset()  # few shapes may be compiled of one function
        linears = torch.compile(lambda x: F.linear(F.linear(x, down), up), dynamic=False)
        linear = compiled_linear()
        peers["two_compiled"] = lambda: linears(x)
        peers["dense_compiled"] = lambda: linear(x, dense)
    with torch.inference_mode():
        us = side_by_side(
            {
                "empty": empty_call(x, wide),
                "blocks": lambda: ops.low_rank_linear(x, thin, wide),
                "plain": lambda: ops.low_rank_linear(x, down, up),
                "two_linears": lambda: F.linear(F.linear(x, down), up),
                "dense": lambda: F.linear(x, dense),
                **peers,
            },
            threads,
            rounds=7 if M * d * d > 2**31 else 15,
        )
    work = R * (K + N)
    least = roof.us(2 * M * work, 4 * (work + M * (N + K)))
    return {
        "M": M,
        "K": K,
        "N": N,
        "R": R,
        **us,
        **{name: us.get(name) for name in ("two_compiled", "dense_compiled")},
        "over_two": us["two_linears"] / us["blocks"],
        "over_dense": us["dense"] / us["blocks"],
        "GFLOP/s": 2 * M * work / us["blocks"] / 1e3,
        "of_roof": least / us["blocks"],
    }


def main(words: Sequence[str] | None = None) -> None:
    """Prints a machine line, a table in microseconds and one line of JSON."""
    options = options_of(str(__doc__), words, "also width 4096, torch.compile")
    roof = measure_roof(options.threads)
    rows = [
        forward(M, d, d // share, threads=options.threads, roof=roof, beside=options.full)
        for d in (WIDTHS if options.full else WIDTHS[:2])
        for share in SHARES
        for M in ROWS
    ]
    report("low_rank_linear", options.threads, roof, rows, options.save)


if __name__ == "__main__":
    main()
