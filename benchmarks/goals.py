"""What the CPU kernels are to reach, beside what results/ says that they reach.

    python -m prunelm.benchmarks.goals [DEVICE]

The goals are ours: about what a processor's arithmetic and caches allow, one thread, float32. What
`prunelm bench kernels --full --save` has not measured yet is shown as "-". For an NVIDIA card, a
name that begins with "nvidia-", they are those of gpu_goals.py.
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunelm.benchmarks.bench_beam_step import VOCABULARIES
from prunelm.benchmarks.bench_block_sparse_linear import BLOCKS, SHAPES, SMALL, SQUARE
from prunelm.benchmarks.harness import RESULTS, device, table

Row = Mapping[str, Any]

# Speed over torch's dense linear, by rows M and sparsity; geometric means over SHAPES.
BLOCK_SPARSE = {
    1: {0.5: 2.5, 0.75: 5.0, 0.9: 13.0, 0.95: 22.0},
    8: {0.5: 3.5, 0.75: 7.0, 0.9: 15.0, 0.95: 28.0},
    64: {0.5: 2.0, 0.75: 4.0, 0.9: 10.0, 0.95: 19.0},
    512: {0.5: 2.0, 0.75: 3.9, 0.9: 9.0, 0.95: 17.0},
}
SHARE_16X1 = 0.85  # of the above
LEAST_SHAPE = 0.8  # of the above, for the worst shape
OVER_ROOF = 1.25  # beside an empty call, where the call itself weighs in
SINGLE = {0.5: 1.0, 0.75: 1.8, 0.9: 4.5, 0.95: 9.0}  # single weights, M >= 8, over dense
SINGLE_OVER_CSR = 1.3
FEW_ROWS, FEW_ROWS_OVER_DENSE, NEVER_BELOW = (2, 4, 8, 16), 1.6, 0.97
LOW_RANK_OVER_TWO = {1: 2.0, 8: 1.5, 64: 0.98, 512: 0.98}
OF_RATIO = 0.85  # of the multiply-adds that a rank saves, M >= 64
STORED_16 = {1: ("speedup", 1.8, "float32"), 64: ("over_16", 3.0, "bfloat16")}
OVER_FORWARD = 1.3  # time of each gradient, M >= 64
TRAINING_STEP = 5.0
BEAM = {"speedup_from_logits": 3.0, "speedup": 4.0}  # the second: rows already normalised
OVER_EMPTY_US = 1.5
OF_PREDICTED = 0.85


@dataclass(frozen=True)
class Line:
    """One goal; reached is None where it was not measured.

    Attributes:
        reached: what is held against the goal, a mean where several cases are.
        worst: of the cases that `reached` is made of.
        cases: how many they are.
        least: what the worst must reach; asked, where not given.
        most: asked and least are upper bounds (times), not lower ones (speeds).
    """

    what: str
    asked: float
    reached: float | None = None
    worst: float | None = None
    cases: int = 0
    least: float | None = None
    most: bool = False

    def verdict(self) -> str:
        """yes, no, or - where nothing is known."""
        if self.reached is None or self.worst is None:
            return "-"
        least = self.asked if self.least is None else self.least
        if self.most:
            return "yes" if self.reached <= self.asked and self.worst <= least else "no"
        return "yes" if self.reached >= self.asked and self.worst >= least else "no"


def line(
    what: str, asked: float, found: Iterable[float], least: float | None = None, most: bool = False
) -> Line:
    """The geometric mean of what was found, and its worst; of times the largest, where `most`."""
    values = list(found)
    if not values:
        return Line(what, asked, most=most)
    mean = math.exp(math.fsum(math.log(max(v, 1e-9)) for v in values) / len(values))
    worst = max(values) if most else min(values)
    return Line(what, asked, mean, worst, len(values), least, most)


def block_sparse(rows: Sequence[Row]) -> Iterator[Line]:
    """One line per block, M and sparsity, over SHAPES; small weights by their time."""
    for block in BLOCKS:
        name = f"{block[0]}x{block[1]}"
        share = SHARE_16X1 if block[1] == 1 else 1.0
        same = [row for row in rows if row["block"] == name]
        for M, goals in BLOCK_SPARSE.items():
            for sparsity, goal in goals.items():
                found = [
                    row["speedup"]
                    for row in same
                    if (row["M"], row["sparsity"]) == (M, sparsity)
                    and (row["N"], row["K"]) in SHAPES
                ]
                what = f"{name} blocks, M = {M}, {sparsity:.0%} zeros"
                yield line(what, share * goal, found, LEAST_SHAPE * share * goal)
    for N, K in SMALL:
        for M in BLOCK_SPARSE:
            same = [row for row in rows if (row["M"], row["N"], row["K"]) == (M, N, K)]
            times = over_allowed(same, "ours")
            yield line(f"{N} x {K}, M = {M}: of the allowed time", 1.0, times, most=True)


def over_allowed(rows: Sequence[Row], name: str) -> Iterator[float]:
    """The named time over that of an empty call and the roofline with its slack."""
    for row in rows:
        if "empty" in row:
            yield row[name] / (row["empty"] + OVER_ROOF * row["of_roof"] * row[name])


def single(rows: Sequence[Row]) -> Iterator[Line]:
    """Single weights, over dense and over torch's CSR."""
    for sparsity, goal in SINGLE.items():
        same = [row for row in rows if row["M"] >= 8 and row["sparsity"] == sparsity]
        name = f"1x1, M >= 8, {sparsity:.0%} zeros"
        yield line(f"{name}, over dense", goal, (row["speedup"] for row in same))
        over = (row["torch_csr"] / row["ours"] for row in same)
        yield line(f"{name}, over torch's CSR", SINGLE_OVER_CSR, over)


def dense_weights(rows: Sequence[Row]) -> Iterator[Line]:
    """Weights without zeros through the same op."""
    few = [r for r in rows if r["M"] in FEW_ROWS and (r["N"], r["K"]) == SQUARE]
    speeds = (row["speedup"] for row in few)
    yield line("dense 1024 x 1024, M = 2 to 16", FEW_ROWS_OVER_DENSE, speeds)
    yield line("dense, any M and shape", NEVER_BELOW, (row["speedup"] for row in rows))


def low_rank(rows: Sequence[Row]) -> Iterator[Line]:
    """Over two linears and over dense from width 1024, by its time at 512."""
    for M, goal in LOW_RANK_OVER_TWO.items():
        same = [row for row in rows if row["M"] == M]
        wide = [row for row in same if row["N"] >= 1024]
        for N in (1024, 4096):
            speeds = (row["over_two"] for row in wide if row["N"] == N)
            yield line(f"low rank {N}, M = {M}, over two linears", goal, speeds)
        if M >= 64:
            shares = (
                row["over_dense"] * row["R"] * (row["N"] + row["K"]) / (row["N"] * row["K"])
                for row in wide
            )
            yield line(f"low rank, M = {M}: of the ratio of multiply-adds", OF_RATIO, shares)
        small = over_allowed([row for row in same if row["N"] == 512], "blocks")
        yield line(f"low rank 512, M = {M}: of the allowed time", 1.0, small, most=True)


def stored_16(rows: Sequence[Row]) -> Iterator[Line]:
    """Weights without zeros, stored as bfloat16 beside float32 rows."""
    for M, (name, goal, other) in STORED_16.items():
        for N in (4096,) if M == 1 else (1024, 4096):
            same = [row for row in rows if (row["M"], row["N"], row["sparsity"]) == (M, N, 0)]
            over = (r["dense_16"] / r["ours"] if name == "over_16" else r[name] for r in same)
            yield line(f"bfloat16 weights {N}, M = {M}, over torch's {other}", goal, over)


def gradients(rows: Sequence[Row]) -> Iterator[Line]:
    """Time of each gradient over that of the forward product."""
    for name in ("grad_x", "grad_values"):
        for M in (64, 512):
            over = (row[f"{name}/forward"] for row in rows if row["M"] == M)
            yield line(f"{name}, M = {M}: over forward", OVER_FORWARD, over, most=True)


def training_step(rows: Sequence[Row]) -> Iterator[Line]:
    """Forward, both gradients and Adam of a large layer."""
    large = [row for row in rows if row["M"] == row["N"] == row["K"] == 2048]
    yield line("training step 2048, 90 % zeros", TRAINING_STEP, (r["speedup"] for r in large))


def beam_step(rows: Sequence[Row]) -> Iterator[Line]:
    """Over the expression in torch, for each vocabulary."""
    for name, goal in BEAM.items():
        rows_are = "normalised in it" if name == "speedup_from_logits" else "normalised"
        for V in VOCABULARIES:
            speeds = (row[name] for row in rows if row["V"] == V and name in row)
            yield line(f"beam_step, V = {V}, LM rows {rows_are}", goal, speeds)


def calls(rows: Sequence[Row]) -> Iterator[Line]:
    """Microseconds beside an empty op."""
    for name in ("block_sparse_linear", "low_rank_linear"):
        what = f"call of {name}, us over an empty op"
        found = [
            row["over_empty"]
            for row in rows
            if (row["mode"], row["call"]) == ("inference_mode", name)
        ]
        # Below an empty op it is negative, of which there is no geometric mean.
        worst = max(found, default=None)
        yield Line(what, OVER_EMPTY_US, worst, worst, len(found), most=True)


def model(rows: Sequence[Row]) -> Iterator[Line]:
    """What the layers' figures predict, and what is gained over torch compiled."""
    for kind, count in (("step", 32), ("score", 2048)):
        same = [row for row in rows if (row["what"], row["rows"]) == (kind, count)]
        shares = (row["of_predicted"] for row in same if row["of_predicted"] is not None)
        yield line(f"model, {kind} of {count} rows: of the predicted speed", OF_PREDICTED, shares)
        compiled = [row["us"] for row in same if row["model"] == "compiled"]
        over = (compiled[0] / row["us"] for row in same if compiled and row["of_predicted"])
        yield line(f"model, {kind} of {count} rows, over dense compiled", 1.0, over)


GOALS = {
    "block_sparse_linear": block_sparse,
    "block_sparse_linear of single weights": single,
    "block_sparse_linear of dense weights": dense_weights,
    "low_rank_linear": low_rank,
    "block_sparse_linear of bfloat16 weights": stored_16,
    "block_sparse_linear gradients": gradients,
    "block_sparse_linear training step": training_step,
    "beam_step": beam_step,
    "calls": calls,
    "model": model,
}


def break_even(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The share of 16x4 blocks up to which they are faster than torch's dense linear, by M."""
    square = [r for r in rows if r["block"] == "16x4" and (r["N"], r["K"]) == SQUARE]
    lines = []
    for M in sorted({row["M"] for row in square}):
        points = sorted((1 - r["sparsity"], r["speedup"]) for r in square if r["M"] == M)
        density = points[-1][0] if points[0][1] >= 1 else None
        for (low, fast), (high, slow) in itertools.pairwise(points):
            if slow < 1 <= fast:  # a straight line between the logarithms
                density = low * (high / low) ** (math.log(fast) / math.log(fast / slow))
                break
        lines.append({"M": M, "break-even density": density, "measured up to": points[-1][0]})
    return lines


def main(words: Sequence[str] | None = None) -> None:
    """Prints a table per benchmark, and at which density blocks break even."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", nargs="?", help="a file in results/; this device's if not given")
    options = parser.parse_args(words)
    if (options.device or "").startswith("nvidia-"):
        from prunelm.benchmarks import gpu_goals

        print(gpu_goals.text(gpu_goals.load(RESULTS, options.device)))
        return
    path = RESULTS / f"{options.device or device()}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RESULTS.glob("*-*.json")))
        parser.error(f"device: expected one of {known}, found no results of {path.stem}")
    found = json.loads(path.read_text())
    for name, lines_of in GOALS.items():
        one = found.get(f"{name}, 1 threads", {"rows": []})
        where = f": {one['machine']}, commit {one['commit']}" if one["rows"] else ": not measured"
        print(f"{name}{where}\n{table([shown(goal) for goal in lines_of(one['rows'])])}\n")
    rows = found.get("block_sparse_linear, 1 threads", {"rows": []})["rows"]
    if rows:
        print(f"16x4 blocks over dense, 1024 x 1024\n{table(break_even(rows))}")


def shown(goal: Line) -> dict[str, Any]:
    """A line of the table."""
    return {
        "what": goal.what,
        "asked": f"{'at most ' if goal.most else ''}{goal.asked:.3g}",
        "reached": goal.reached,
        "worst": goal.worst,
        "cases": goal.cases,
        "": goal.verdict(),
    }


if __name__ == "__main__":
    main()
