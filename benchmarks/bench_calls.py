"""What a call costs beside its work: the smallest products, and an op that does nothing.

python -m prunelm.benchmarks.bench_calls [--save]
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prunelm import BlockSparse, ops
from prunelm.benchmarks.harness import measure_roof, options_of, report, side_by_side
from prunelm.nn import BlockSparseLinear, LowRankLinear, PackedLowRankLinear


def calls(mode: str) -> list[dict[str, Any]]:
    """Microseconds of each call on [1, 16] and a weight of one 16 x 16 block.

    Args:
        mode: "inference_mode" or "no_grad".
    """
    x, dense, bias = torch.randn(1, 16), torch.randn(16, 16), torch.randn(16)
    weight = BlockSparse.from_dense(dense, (16, 16))
    block, linear = BlockSparseLinear(weight, bias), nn.Linear(16, 16)
    packed = PackedLowRankLinear(LowRankLinear(16, 16, 16))
    down, up = packed.down, packed.up
    empty = torch.ops.prunelm.block_sparse_linear_empty.default
    tensors = (weight.values, weight.crow, weight.col, bias)
    with torch.inference_mode() if mode == "inference_mode" else torch.no_grad():
        us = side_by_side(
            {
                "empty C++ op": lambda: empty(x, *tensors, 16, 0),
                "F.linear": lambda: F.linear(x, dense, bias),
                "block_sparse_linear": lambda: ops.block_sparse_linear(x, weight, bias),
                "low_rank_linear": lambda: ops.low_rank_linear(x, down, up, bias),
                "nn.Linear": lambda: linear(x),
                "BlockSparseLinear": lambda: block(x),
                "PackedLowRankLinear": lambda: packed(x),
            },
            threads=1,
            rounds=41,
        )
    first = us["empty C++ op"]
    return [{"mode": mode, "call": k, "us": v, "over_empty": v - first} for k, v in us.items()]


def main(words: Sequence[str] | None = None) -> None:
    """Prints a machine line, a table in microseconds and one line of JSON."""
    options = options_of(str(__doc__), words, "the same: it is short; one thread calls")
    rows = [row for mode in ("inference_mode", "no_grad") for row in calls(mode)]
    report("calls", 1, measure_roof(1), rows, options.save)


if __name__ == "__main__":
    main()
