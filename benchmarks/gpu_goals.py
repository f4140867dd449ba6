"""What the GPU kernels are to reach on an H100, beside what the results say that they reach.

    python -m prunelm.benchmarks.goals nvidia-h100-80gb-hbm3
    python -m prunelm.benchmarks.gpu_goals [--out FOLDER]  (this card's file in the folder)

bfloat16, N = K = 4096, one launch with bias and activation, speeds over the best of cuBLAS and
torch.compile. Every shape is held against the goal by its faster kernel, with its data in the L2
("warm") and not ("cold"). What was not measured is shown as "-".
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunelm.benchmarks.goals import Line, line
from prunelm.benchmarks.harness import RESULTS, table

Row = Mapping[str, Any]
Found = Mapping[str, Mapping[str, Any]]

SQUARE = 4096
DECODE = {0.5: 1.6, 0.75: 2.5, 0.9: 3.5, 0.95: 4.2}  # M <= 64, every block
LARGE = {  # M >= 4096, by block
    128: {0.5: 1.7, 0.75: 3.3, 0.9: 6.5, 0.95: 7.5},
    64: {0.5: 1.5, 0.75: 2.8, 0.9: 5.5, 0.95: 6.5},
    32: {0.5: 1.1, 0.75: 2.0, 0.9: 4.2, 0.95: 5.0},
    16: {0.5: 0.8, 0.75: 1.5, 0.9: 3.0, 0.95: 4.0},
}
OVER_BSR = {128: 1.3, 64: 1.7, 32: 3.0, 16: 5.0}
OVER_BSR_DECODE = 2.0
TRAINING = {0.75: 1.9, 0.9: 3.5}  # block 64
LOW_RANK_OVER_TWO = 1.4  # M <= 64
BEAM_OF_BANDWIDTH = 0.8  # B 64, W 8, V 5000
BEAM_OVER_TORCH = 5.0  # B 32, W 8, V 500


@dataclass(frozen=True)
class Goal:
    """One goal, with what was reached warm and cold."""

    warm: Line
    cold: Line | None = None


def goal(what: str, asked: float, rows: Iterable[Row], of: str, cold: str | None) -> Goal:
    """The rows' column `of` held against what is asked, and the column `cold`."""
    best = faster(rows, of)
    warm = line(what, asked, (row[of] for row in best))
    return Goal(
        warm, line(what, asked, (row[cold] for row in faster(rows, cold))) if cold else None
    )


def faster(rows: Iterable[Row], of: str) -> list[Row]:
    """Of the kernels measured for one shape, the one with the largest `of`."""
    found: dict[Any, Row] = {}
    for row in rows:
        if of not in row:
            continue  # it failed
        shape = tuple(row.get(name) for name in ("M", "N", "K", "R", "B", "W", "V", "block",
                                                 "sparsity", "prune"))  # fmt: skip
        if shape not in found or row[of] > found[shape][of]:
            found[shape] = row
    return list(found.values())


def rows_of(found: Found, name: str) -> list[Row]:
    return list(found.get(name, {}).get("rows", ()))


def block_sparse(found: Found) -> Iterator[Goal]:
    """Decoding and large M, a line for each block and sparsity."""
    rows = [r for r in rows_of(found, "block_sparse_linear") if r["N"] == r["K"] == SQUARE]
    for few, name in ((True, "M <= 64"), (False, "M >= 4096")):
        for block, goals in LARGE.items():
            for sparsity, asked in (DECODE if few else goals).items():
                same = [
                    row
                    for row in rows
                    if (row["block"], row["sparsity"]) == (f"{block}x{block}", sparsity)
                    and (row["M"] <= 64 if few else row["M"] >= 4096)
                ]
                what = f"{name}, {block}x{block}, {sparsity:.0%} zeros"
                yield goal(what, asked, same, "speedup", "speedup_cold")


def torch_bsr(found: Found) -> Iterator[Goal]:
    """Over torch's own kernel for block-sparse weights, tuned here; all sparsities."""
    own = rows_of(found, "block_sparse_linear")
    pairs = []
    for theirs in rows_of(found, "torch BSR"):
        for row in own:
            same = all(row.get(n) == theirs.get(n) for n in ("M", "N", "K", "block", "sparsity"))
            if same and "us" in row and "us" in theirs:
                over = {"over": theirs["us"] / row["us"]}
                pairs.append({**row, **over, "over_cold": theirs["cold_us"] / row["cold_us"]})
    for few, name in ((True, "M = 16"), (False, "M = 4096")):
        for block, asked in OVER_BSR.items():
            same_block = [
                row
                for row in pairs
                if row["block"] == f"{block}x{block}" and (row["M"] <= 64) == few
            ]
            what = f"{name}, {block}x{block}, over torch's BSR"
            wanted = OVER_BSR_DECODE if few else asked
            yield goal(what, wanted, same_block, "over", "over_cold")


def training_step(found: Found) -> Iterator[Goal]:
    """Forward and both gradients, over dense."""
    for sparsity, asked in TRAINING.items():
        same = [
            row
            for row in rows_of(found, "training step")
            if (row["block"], row["sparsity"]) == ("64x64", sparsity)
        ]
        yield goal(f"training step, 64x64, {sparsity:.0%} zeros", asked, same, "speedup", None)


def low_rank(found: Found) -> Iterator[Goal]:
    """Over two calls of cuBLAS."""
    rows = [row for row in rows_of(found, "low_rank_linear") if row["M"] <= 64]
    for rank in sorted({row["R"] for row in rows}) or (64, 128, 256):
        same = [row for row in rows if row["R"] == rank]
        what = f"low rank {rank}, M <= 64, over two linears"
        yield goal(what, LOW_RANK_OVER_TWO, same, "over_two", "over_two_cold")


def beam_step(found: Found) -> Iterator[Goal]:
    """Share of the memory's speed at large V, over torch's ops at small V."""
    rows = [row for row in rows_of(found, "beam_step") if row["prune"] == "late"]
    large = [row for row in rows if (row["B"], row["W"], row["V"]) == (64, 8, 5000)]
    what = "beam_step, B 64, W 8, V 5000: of the memory's speed"
    yield goal(what, BEAM_OF_BANDWIDTH, large, "of_bandwidth", "of_bandwidth_cold")
    small = [row for row in rows if (row["B"], row["W"], row["V"]) == (32, 8, 500)]
    what = "beam_step, B 32, W 8, V 500, over torch"
    yield goal(what, BEAM_OVER_TORCH, small, "speedup", "speedup_cold")


GOALS = (block_sparse, torch_bsr, training_step, low_rank, beam_step)


def shown(one: Goal) -> dict[str, Any]:
    """A line of the table."""
    cold = one.cold
    return {
        "what": one.warm.what,
        "asked": one.warm.asked,
        "warm": one.warm.reached,
        "worst": one.warm.worst,
        "": one.warm.verdict(),
        "cold": cold.reached if cold else None,
        "worst cold": cold.worst if cold else None,
        " ": cold.verdict() if cold else "",
        "cases": one.warm.cases,
    }


def steps(found: Found) -> list[dict[str, Any]]:
    """Whole steps of the language model as one graph, beside the sum of rooflines."""
    names = ("model", "rows", "us", "roof_us", "over_roof", "eager_us", "speedup")
    return [
        {name: row.get(name) for name in names}
        for row in rows_of(found, "model")
        if "error" not in row
    ]


def text(found: Found) -> str:
    """All goals, and the model's steps, which have none."""
    first = next(iter(found.values()), None)
    about = f"{first['machine']}, commit {first['commit']}" if first else "not yet measured"
    lines = [shown(one) for goals_of in GOALS for one in goals_of(found)]
    parts = [about, table(lines)]
    if steps(found):
        parts.append(f"a step of TransformerLM as one graph\n{table(steps(found))}")
    return "\n".join(parts)


def load(folder: Path, device: str) -> Found:
    """A device's results; {} where nothing was measured."""
    path = folder / f"{device}.json"
    found: Found = json.loads(path.read_text()) if path.is_file() else {}
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Prints the goals beside what the card's file in the folder says."""
    from prunelm.benchmarks.gpu_harness import device_name

    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("device", nargs="?", help="a file of the folder; this card's if not given")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder")
    options = parser.parse_args(words)
    print(text(load(options.out, options.device or device_name())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
