"""Turns a card's results into the efficiencies by which the ops choose there.

python -m prunelm.benchmarks.gpu_choice [DEVICE] [--out FOLDER]

It writes choice-<card>.json into the folder; as prunelm/ops/gpu_times/<card>.json it is part of the
package. Of several shapes in a bucket the lowest efficiency counts, of dense the highest, so that
what is chosen by it loses nowhere.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prunelm.benchmarks.gpu_goals import Found, Row, load, rows_of
from prunelm.benchmarks.harness import RESULTS
from prunelm.data.files import replace_file
from prunelm.ops.gpu_cost import (
    Card,
    Key,
    card_named,
    density_bucket,
    dtype_name,
    roof_us,
    row_bucket,
)

DTYPE = torch.bfloat16  # what is measured


def efficiency(card: Card, flops: float, moved: float, us: float) -> float:
    """Of the roofline, what lies beyond a launch; as gpu_cost.py takes it."""
    return roof_us(card, flops, moved, DTYPE) / max(us - card.launch_us, 0.1)


def measured(card: Card, found: Found) -> Iterator[tuple[Key, float]]:
    """Every measured time as an efficiency under its key: the slower of warm and cold."""
    size, dtype = DTYPE.itemsize, dtype_name(DTYPE)
    for row in good(rows_of(found, "block_sparse_linear"), "us"):
        M, N, K = row["M"], row["N"], row["K"]
        bn, bk = (int(b) for b in row["block"].split("x"))
        density = 1 - row["sparsity"]
        stored = round(density * -(-N // bn) * -(-K // bk)) * bn * bk
        moved = size * M * (N + K)
        for name, weights, us, key in (
            (f"block_sparse_linear {row['backend']}", stored, row["cold_us"],
             (row["block"], row_bucket(M), density_bucket(density))),
            ("dense", N * K, row["dense_cold_us"], ("", row_bucket(M), 0)),
        ):  # fmt: skip
            reached = efficiency(card, 2 * M * weights, moved + size * weights, us)
            yield (name, dtype, *key), reached
    for row in good(rows_of(found, "low_rank_linear"), "us"):
        M, weights = row["M"], row["R"] * (row["N"] + row["K"])
        moved = size * (weights + M * (row["N"] + row["K"]))
        density = weights / (row["N"] * row["K"])
        for backend, us in ((row["backend"], row["cold_us"]), ("reference", row["two_cold_us"])):
            name = f"low_rank_linear {backend}"
            key = (name, dtype, "", row_bucket(M), density_bucket(density))
            yield key, efficiency(card, 2 * M * weights, moved, us)


def good(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if name in row]


def table(card: Card, found: Found) -> dict[Key, float]:
    """One efficiency for each key: of ways of ours the lowest, of dense ways the highest."""
    kept: dict[Key, float] = {}
    for key, reached in measured(card, found):
        theirs = key[0] in ("dense", "low_rank_linear reference")
        kept[key] = (max if theirs else min)(reached, kept.get(key, reached))
    return kept


def as_json(card: Card, found: Found) -> dict[str, Any]:
    """The file's content."""
    names = ("what", "dtype", "block", "rows", "density")
    rows = [
        {**dict(zip(names, key, strict=True)), "efficiency": round(reached, 4)}
        for key, reached in sorted(table(card, found).items())
    ]
    first: Mapping[str, Any] = next(iter(found.values()), {})
    return {name: first.get(name, "") for name in ("machine", "commit")} | {"rows": rows}


def main(words: Sequence[str] | None = None) -> int:
    """Writes the file; says how many efficiencies it holds."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("device", nargs="?", help="a file of the folder; this card's if not given")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder")
    options = parser.parse_args(words)
    if options.device is None:
        from prunelm.benchmarks.gpu_harness import device_name

        options.device = device_name()
    found = load(options.out, options.device)
    if not found:
        print(f"{options.device}: nothing was measured")
        return 1
    card = card_named(options.device.replace("-", " "), 9)
    content = as_json(card, found)
    path = options.out / f"choice-{card.name.lower().replace(' ', '-')}.json"
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{path.name}: {len(content['rows'])} efficiencies")
    return 0


if __name__ == "__main__":
    sys.exit(main())
