"""What the kernel benchmarks share: times, the machine's roof, a table, where results go."""

import argparse
import json
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunelm import BlockSparse, ops
from prunelm.data.files import replace_file
from prunelm.study.machine import describe, one_line

RESULTS = Path(__file__).parent / "results"

# What chooses instruction sets and threads. MKL heeds its variable on Intel's processors only: on
# AMD's its float32 products keep to AVX2, and to SSE at M = 1, whatever it says.
ENVIRONMENT = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "PRUNELM_ISA",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
)


def options_of(doc: str, words: Sequence[str] | None, full: str) -> argparse.Namespace:
    """--threads, --full and --save, which all kernel benchmarks take, so that one line runs all.

    Args:
        doc: the benchmark's docstring; its first line is shown.
        full: what --full does there.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full", action="store_true", help=full)
    parser.add_argument("--save", action="store_true", help="merge into benchmarks/results")
    options = parser.parse_args(words)
    if options.threads < 1:
        parser.error(f"threads: expected at least 1, got {options.threads}")
    return options


def check(got: Tensor, dense: Tensor, exact: Tensor, what: str) -> None:
    """RuntimeError unless got errs at most twice as much as torch's dense op, against float64."""
    error = float((got.double() - exact).abs().max())
    allowed = 2 * float((dense.double() - exact).abs().max())
    allowed += torch.finfo(got.dtype).eps * float(exact.abs().max())
    if not error <= allowed:
        raise RuntimeError(f"{what}: expected an error of at most {allowed:.3g}, got {error:.3g}")


def side_by_side(
    calls: Mapping[str, Callable[[], object]], threads: int, rounds: int = 15
) -> dict[str, float]:
    """Median microseconds of each call, all in turn in every round, every other round reversed.

    On one thread it is the thread's own CPU time, which other work on the machine lengthens least;
    on more it is wall time. A call runs in groups of about 300 us, its data warm in the caches.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        repeats = {}
        for name, call in calls.items():
            call()
            begin = clock()
            call()
            repeats[name] = max(1, min(100, round(300e-6 / max(clock() - begin, 1e-6))))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds):
            for name in list(calls) if turn % 2 == 0 else reversed(list(calls)):
                for _ in range(2):  # bring its own data back into the caches, the last one too
                    calls[name]()
                begin = clock()
                for _ in range(repeats[name]):
                    calls[name]()
                times[name].append((clock() - begin) / repeats[name] * 1e6)
    finally:
        torch.set_num_threads(before)
    return {name: statistics.median(some) for name, some in times.items()}


@dataclass(frozen=True)
class Roof:
    """What the machine was measured to reach: multiply-adds, and reads of what lies in cache."""

    gflops: float
    gbytes: float

    def us(self, flops: float, size_bytes: float) -> float:
        """The least time for so much work."""
        return max(flops / self.gflops, size_bytes / self.gbytes) / 1e3


def measure_roof(threads: int) -> Roof:
    """The faster of torch's product of 1024 x 1024 matrices and ours, and torch's sum of 512 x 512
    numbers."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    weight, small = BlockSparse.from_dense(b, (16, 1024)), torch.randn(512, 512)
    with torch.inference_mode():
        us = side_by_side(
            {
                "torch": lambda: a @ b,
                "ours": lambda: ops.block_sparse_linear(a, weight),
                "read": lambda: small.sum(),
            },
            threads,
        )
    product = min(us["torch"], us["ours"])
    return Roof(2 * 1024**3 / product / 1e3, small.numel() * 4 / us["read"] / 1e3)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys, right-aligned under their names."""
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)


def report(name: str, threads: int, roof: Roof, rows: Sequence[dict[str, Any]], save: bool) -> None:
    """Prints the machine, the table and a last line of JSON; saves it if asked to."""
    machine = describe()
    found = {
        "bench": name,
        "machine": one_line(machine),
        "commit": commit(),
        "torch": torch.__version__,
        "instruction_sets": {
            name: machine[f"instruction set of {name}"].lower() for name in ("torch", "prunelm")
        },
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "threads": threads,
        "roof": {"gflops": round(roof.gflops, 1), "gbytes": round(roof.gbytes, 1)},
        "rows": [
            {k: round(v, 3) if isinstance(v, float) else v for k, v in r.items()} for r in rows
        ],
    }
    print(f"{found['machine']}; commit {found['commit']}; {threads} threads, medians, us")
    print(f"roof: {roof.gflops:.0f} GFLOP/s, {roof.gbytes:.0f} GB/s")
    print(table(rows))
    if save:
        merge(f"{name}, {threads} threads", found)
    print(json.dumps(found))


def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        run = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../csrc", "../prunelm"])
    except OSError:
        return "unknown"
    if run.returncode:
        return "unknown"
    return run.stdout.strip() + ("+changes" if changed.returncode else "")


def merge(name: str, found: dict[str, Any]) -> None:
    """Puts one benchmark's results into this device's file, beside what others measured."""
    path = RESULTS / f"{device()}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = found
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def device() -> str:
    """The stem of this device's file: the processor and the instruction set, of both where torch
    and the kernels here differ in it."""
    machine = describe()
    theirs, ours = (machine[f"instruction set of {name}"].lower() for name in ("torch", "prunelm"))
    sets = ours if ours == theirs else f"torch {theirs} prunelm {ours}"
    return re.sub(r"[^a-z0-9]+", "-", f"{machine['processor']} {sets}".lower()).strip("-")
