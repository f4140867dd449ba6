"""What the CPU kernels are to reach, beside what results/ says that they reach.

    python -m prunelm.benchmarks.goals [DEVICE]

The goals are ours: about what a processor's arithmetic and caches allow, one thread, float32.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from prunelm.benchmarks.bench_block_sparse_linear import BLOCKS, SHAPES
from prunelm.benchmarks.harness import RESULTS, table

# Speed over torch's dense linear, by rows M and sparsity; geometric means over SHAPES.
BLOCK_SPARSE = {
    1: {0.5: 2.5, 0.75: 5.0, 0.9: 13.0, 0.95: 22.0},
    8: {0.5: 3.5, 0.75: 7.0, 0.9: 15.0, 0.95: 28.0},
    64: {0.5: 2.0, 0.75: 4.0, 0.9: 10.0, 0.95: 19.0},
    512: {0.5: 2.0, 0.75: 3.9, 0.9: 9.0, 0.95: 17.0},
}
SHARE_16X1 = 0.85  # of the above
LEAST_SHAPE = 0.8  # of the above, for the worst shape
SINGLE = {0.5: 1.0, 0.75: 1.8, 0.9: 4.5, 0.95: 9.0}  # single weights, M >= 8, over dense
SINGLE_OVER_CSR = 1.3
LOW_RANK_OVER_TWO = {1: 2.0, 8: 1.5, 64: 0.98, 512: 0.98}


def block_sparse(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per block, M and sparsity: the mean over shapes, and the worst shape."""
    lines = []
    for block in BLOCKS:
        name = f"{block[0]}x{block[1]}"
        share = SHARE_16X1 if block[1] == 1 else 1.0
        for M, goals in BLOCK_SPARSE.items():
            for sparsity, goal in goals.items():
                found = [
                    row["speedup"]
                    for row in rows
                    if (row["block"], row["M"], row["sparsity"]) == (name, M, sparsity)
                    and (row["N"], row["K"]) in SHAPES
                ]
                if not found:
                    continue
                mean = math.exp(math.fsum(map(math.log, found)) / len(found))
                worst = min(found)
                reached = mean >= share * goal and worst >= LEAST_SHAPE * share * goal
                lines.append(
                    {
                        "what": f"{name} blocks",
                        "M": M,
                        "sparsity": sparsity,
                        "asked": share * goal,
                        "reached": mean,
                        "worst shape": worst,
                        "shapes": len(found),
                        "": "yes" if reached else "no",
                    }
                )
    return lines


def single(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Single weights, over dense and over torch's CSR."""
    lines = []
    for row in rows:
        if row["M"] < 8:
            continue
        for what, goal, reached in (
            ("1x1 over dense", SINGLE[row["sparsity"]], row["speedup"]),
            ("1x1 over torch CSR", SINGLE_OVER_CSR, row["torch_csr"] / row["ours"]),
        ):
            names = {"what": what, "M": row["M"], "sparsity": row["sparsity"]}
            verdict = "yes" if reached >= goal else "no"
            lines.append({**names, "asked": goal, "reached": reached, "": verdict})
    return lines


def low_rank(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Over two linears, widths from 1024."""
    return [
        {
            "what": f"rank {row['R']} of {row['N']}, over two linears",
            "M": row["M"],
            "asked": LOW_RANK_OVER_TWO[row["M"]],
            "reached": row["over_two"],
            "": "yes" if row["over_two"] >= LOW_RANK_OVER_TWO[row["M"]] else "no",
        }
        for row in rows
        if row["N"] >= 1024 and row["M"] in LOW_RANK_OVER_TWO
    ]


def main(words: Sequence[str] | None = None) -> None:
    """Prints tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", nargs="?", default="amd-epyc-avx2", help="a file in results/")
    options = parser.parse_args(words)
    found = json.loads((RESULTS / f"{options.device}.json").read_text())
    for name, lines_of in (
        ("block_sparse_linear", block_sparse),
        ("block_sparse_linear of single weights", single),
        ("low_rank_linear", low_rank),
    ):
        one = found.get(f"{name}, 1 threads")
        lines = lines_of(one["rows"]) if one else []
        if lines:
            print(f"{name}: {one['machine']}, commit {one['commit']}\n{table(lines)}\n")


if __name__ == "__main__":
    main()
