"""Instructions of one forward per CPU op, counted by valgrind: a guard that no other work disturbs.

    python -m prunelm.benchmarks.instructions [--save]

Counts are of the extension's own code, not of Python and torch around it, and fit one compiler and
instruction set, by which results/instructions.json names them. Without --save they are compared
with it: 3 % more in one op is a failure. Kernels that changed on purpose: run with --save.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import prunelm._C
from prunelm import ops
from prunelm.benchmarks.bench_block_sparse_linear import case
from prunelm.benchmarks.harness import RESULTS, commit, table
from prunelm.data.files import replace_file
from prunelm.nn import LowRankLinear, PackedLowRankLinear

COMMITTED = RESULTS / "instructions.json"
SLACK = 1.03  # of the committed count
REPEATABLE = 1.001  # two counts of the same call
ISA = os.environ.get("PRUNELM_ISA") or "avx2"  # valgrind knows none above
N = K = 512
WARM = 3  # calls before the count: what is found once is found, memory is at hand


def linear_ops() -> dict[str, Callable[[], object]]:
    """block_sparse_linear with 90 % zeros and its gradients, low_rank_linear at a quarter."""
    calls: dict[str, Callable[[], object]] = {}
    low_rank: nn.Module = PackedLowRankLinear(LowRankLinear(K, N, N // 4))
    for block in ((16, 4), (16, 16), (1, 1)):
        for M in (1, 8, 64):
            x, _, weight = case(M, N, K, block, 0.9)
            name = f"block_sparse_linear {block[0]}x{block[1]}, M = {M}"
            calls[name] = lambda x=x, weight=weight: ops.block_sparse_linear(x, weight)  # type: ignore[misc]
    for M in (1, 8, 64):
        x = torch.randn(M, K)
        calls[f"low_rank_linear, M = {M}"] = lambda x=x: low_rank(x)  # type: ignore[misc]
    x, _, weight = case(64, N, K, (16, 4), 0.9)
    grad, pattern, op = torch.randn(64, N), (weight.crow, weight.col), torch.ops.prunelm
    calls["block_sparse_linear_grad_x 16x4, M = 64"] = lambda: op.block_sparse_linear_grad_x(
        grad, weight.values, *pattern, K
    )
    calls["block_sparse_linear_grad_values 16x4, M = 64"] = lambda: (
        op.block_sparse_linear_grad_values(grad, x, *pattern, 16, 4)
    )
    return calls


def search_ops() -> dict[str, Callable[[], object]]:
    """What decoding and its training call."""
    B, W, V = 8, 4, 500
    score, am_logits = torch.randn(B, W), 3 * torch.randn(B, W, V)
    rows, row = torch.randn(B * W, V).log_softmax(-1), torch.randperm(B * W).view(B, W)
    terms: tuple[tuple[Tensor, Tensor, Tensor], ...] = ((rows, row, torch.full((B,), 0.3)),)
    logits, targets = torch.randn(2, 20, 11, 29), torch.randint(1, 29, (2, 10))
    frames, tokens = torch.tensor([20, 15]), torch.tensor([10, 7])
    R, H, D, P = 16, 8, 64, 32
    qkv, angles = torch.randn(R, 3, H, D), torch.randn(2, R, D // 2)
    path, length = torch.arange(R * P).view(R, P), torch.full((R,), P)
    key, value = torch.randn(2, R * P, H, D)
    return {
        "beam_step": lambda: ops.beam_step(score, am_logits, terms),
        "rnnt_loss": lambda: ops.rnnt_loss(logits, targets, frames, tokens),
        "tree_attention": lambda: ops.tree_attention(qkv, *angles.sin(), path, length, key, value),
    }


def run() -> None:
    """Under valgrind: dumps the counts of one call, then of two more, of each op."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    calls = {**linear_ops(), **search_ops()}
    with torch.inference_mode():
        for call in calls.values():
            for _ in range(WARM):
                call()
            for count in (1, 2):
                torch._C._valgrind_toggle()
                for _ in range(count):
                    call()
                torch._C._valgrind_toggle_and_dump_stats()
    print(json.dumps(list(calls)))


def count() -> dict[str, int]:
    """Instructions of one forward of each op; a minute or two.

    Raises:
        RuntimeError: valgrind failed, or two counts of one call differ.
    """
    extension = Path(prunelm._C.__file__).resolve()
    environment = {**os.environ, "PRUNELM_ISA": ISA, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", "--compress-pos=no"]
        command += ["--compress-strings=no", f"--callgrind-out-file={folder}/dump"]
        command += [sys.executable, "-m", "prunelm.benchmarks.instructions", "--run"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(f"valgrind: expected counts, got\n{ended.stderr[-2000:]}")
        names = json.loads(ended.stdout.splitlines()[-1])
        dumps = (f"{folder}/dump.{i + 1}" for i in range(2 * len(names)))
        found = [self_cost(Path(dump).read_text(), str(extension)) for dump in dumps]
    counts = {}
    for i, name in enumerate(names):
        once, twice = found[2 * i : 2 * i + 2]
        if not 0 < 2 * once <= twice * REPEATABLE or not twice <= 2 * once * REPEATABLE:
            raise RuntimeError(f"{name}: expected twice {once} instructions, got {twice}")
        counts[name] = twice - once
    return counts


def self_cost(dump: str, binary: str) -> int:
    """Instructions that a callgrind dump counts in one binary, without what it called elsewhere."""
    total, inside, of_callee = 0, False, False
    for line in dump.splitlines():
        if line.startswith("ob="):
            inside = line == f"ob={binary}"
        elif line.startswith("calls="):
            of_callee = True  # the next line is
        elif line[:1].isdigit():
            total += int(line.split()[1]) if inside and not of_callee else 0
            of_callee = False
    return total


def toolchain() -> str:
    """What counts are comparable under."""
    return f"compiler {prunelm._C.build_information()['compiler']}, {ISA}"


def committed() -> dict[str, Any]:
    """Entries by toolchain."""
    found: dict[str, Any] = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    return found


def obstacle() -> str | None:
    """Why no comparison can be made here."""
    if not torch._C._valgrind_supported_platform() or shutil.which("valgrind") is None:
        return "valgrind was not found"
    if toolchain() not in committed():
        return f"expected counts for {' or '.join(committed())}, this is {toolchain()}"
    return None


def compare(now: Mapping[str, int], before: Mapping[str, int]) -> list[dict[str, Any]]:
    """One line per op; the last column says "more" where it took too many, "gone" where none."""
    lines = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        ratio = new / old if old and new else None
        verdict = "new" if old is None else "gone" if new is None else ""
        if ratio is not None and not ratio <= SLACK:
            verdict = "more"
        line = {"op": name, "committed": old, "now": new, "ratio": ratio, "": verdict}
        lines.append(line)
    return lines


def save(counts: Mapping[str, int]) -> None:
    """Puts the counts where this toolchain's are."""
    found = {"commit": commit(), "torch": torch.__version__, "instructions": dict(counts)}
    with replace_file(COMMITTED) as temporary:
        entries = {**committed(), toolchain(): found}
        temporary.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")


def main(words: Sequence[str] | None = None) -> int:
    """Prints a table; 1 where an op took too many."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="keep these counts as the committed")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.run:
        run()
        return 0
    reason = obstacle()
    if reason is not None and not (options.save and shutil.which("valgrind")):
        print(f"instructions: skipped: {reason}")
        return 0
    counts = count()
    lines = compare(counts, committed().get(toolchain(), {}).get("instructions", {}))
    print(f"{toolchain()}: instructions of one forward\n{table(lines)}")
    if options.save:
        save(counts)
        return 0
    return int(any(line[""] in ("more", "gone") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
