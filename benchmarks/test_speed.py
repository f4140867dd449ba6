"""Each op is as fast beside its torch counterpart as this device's committed results say.

make bench

Both are timed in turn in one process, so that the machine's own speed drops out; what is left of
its noise is in TOLERANCE. A device without results skips.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from prunelm import BlockSparse, ops
from prunelm.benchmarks import bench_beam_step, bench_rnnt_loss, bench_tree_attention
from prunelm.benchmarks.bench_block_sparse_linear import case as product
from prunelm.benchmarks.harness import RESULTS, device, side_by_side
from prunelm.nn import LowRankLinear, PackedLowRankLinear

TOLERANCE = 0.7  # of the committed speed-up
TRIES = 3

Pair = tuple[Callable[[], object], Callable[[], object]]  # ours, torch's


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        bench: the benchmark in the results.
        row: what picks its row there.
        column: the row's speed-up.
    """

    bench: str
    row: dict[str, Any]
    make: Callable[..., Pair]
    column: str = "speedup"

    def __str__(self) -> str:
        sizes = "-".join(str(value) for value in self.row.values())
        return f"{self.bench.replace(' ', '_')}-{sizes}"


def blocks(M: int, N: int, K: int, block: str, sparsity: float, stored: str) -> Pair:
    bn, bk = map(int, block.split("x"))
    x, dense, weight = product(M, N, K, (bn, bk), sparsity)
    values = weight.values.transpose(1, 2).to(getattr(torch, stored)).transpose(1, 2)
    weight = BlockSparse(values, weight.crow, weight.col, weight.shape)
    return lambda: ops.block_sparse_linear(x, weight), lambda: F.linear(x, dense)


def low_rank(M: int, N: int, K: int, R: int) -> Pair:
    plain = LowRankLinear(K, N, R, bias=False).requires_grad_(False)
    packed, x = PackedLowRankLinear(plain), torch.randn(M, K)
    down, up = packed.down, packed.up
    two = (plain.down, plain.up)
    return (
        lambda: ops.low_rank_linear(x, down, up),
        lambda: F.linear(F.linear(x, two[0]), two[1]),
    )


def beam_step(B: int, W: int, V: int) -> Pair:
    score, am_logits, weight = torch.randn(B, W), torch.randn(B, W, V), torch.full((B,), 0.3)
    rows, row = torch.randn(B, W, V).log_softmax(-1), torch.arange(B * W).view(B, W)
    term = ((rows.view(B * W, V), row, weight),)
    return (
        lambda: ops.beam_step(score, am_logits, term),
        lambda: bench_beam_step.in_torch(score, am_logits, rows, weight),
    )


def rnnt_loss(B: int, T: int, U1: int, V: int) -> Pair:
    logits, targets = torch.randn(B, T, U1, V).requires_grad_(), torch.randint(1, V, (B, U1 - 1))
    sizes = (torch.full((B,), T), torch.full((B,), U1 - 1))

    def both(loss: Callable[..., torch.Tensor]) -> object:
        with torch.inference_mode(False), torch.enable_grad():
            return torch.autograd.grad(loss(logits, targets, *sizes).sum(), logits)

    return lambda: both(ops.rnnt_loss), lambda: both(bench_rnnt_loss.in_torch)


def tree_attention(R: int, P: int) -> Pair:
    H, D = bench_tree_attention.HEADS, bench_tree_attention.HEAD_DIM
    qkv, angle = torch.randn(R, 3, H, D), torch.randn(R, D // 2)
    new, (key, value) = (qkv, angle.cos(), angle.sin()), torch.randn(2, R * P, H, D)
    path, length = torch.randperm(R * P).view(R, P), torch.full((R,), P)
    return (
        lambda: ops.tree_attention(*new, path, length, key, value),
        lambda: bench_tree_attention.in_torch(*new, path, key, value),
    )


def weight_row(M: int, block: str, sparsity: float, stored: str = "float32") -> dict[str, Any]:
    sizes = {"M": M, "N": 1024, "K": 1024}
    return {**sizes, "block": block, "sparsity": sparsity, "stored": stored}


CASES = (
    *(Case("block_sparse_linear", weight_row(M, "16x4", 0.9), blocks) for M in (1, 8, 64)),
    *(Case("block_sparse_linear", weight_row(M, "16x16", 0.9), blocks) for M in (1, 8, 64)),
    Case("block_sparse_linear of single weights", weight_row(64, "1x1", 0.9), blocks),
    Case("block_sparse_linear of dense weights", weight_row(8, "16x1024", 0.0), blocks),
    Case(
        "block_sparse_linear of bfloat16 weights", weight_row(8, "16x4", 0.75, "bfloat16"), blocks
    ),
    *(
        Case("low_rank_linear", {"M": M, "N": 1024, "K": 1024, "R": 128}, low_rank, "over_two")
        for M in (1, 8, 64)
    ),
    Case("beam_step", {"B": 8, "W": 4, "V": 1000}, beam_step),
    Case("rnnt_loss", {"B": 32, "T": 80, "U1": 45, "V": 29}, rnnt_loss),
    Case("tree_attention", {"R": 32, "P": 32}, tree_attention),
)  # fmt: skip


def committed(case: Case) -> float:
    """The speed-up in this device's results; skips where there is none."""
    path = RESULTS / f"{device()}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    rows = found.get(f"{case.bench}, 1 threads", {"rows": []})["rows"]
    for row in rows:
        if all(row.get(name) == value for name, value in case.row.items()):
            return float(row[case.column])
    pytest.skip(f"{path.name} holds no such row")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_speed_over_torch(case: Case, benchmark: Any) -> None:
    expected = committed(case)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ours, theirs = case.make(**case.row)
    speedups = []
    with torch.inference_mode():
        for _ in range(TRIES):
            us = side_by_side({"ours": ours, "torch": theirs}, threads=1, rounds=9)
            speedups.append(us["torch"] / us["ours"])
            if speedups[-1] >= TOLERANCE * expected:
                break
        benchmark.extra_info.update(speedup=max(speedups), committed=expected)
        benchmark.group = case.bench
        benchmark(ours)
    assert max(speedups) >= TOLERANCE * expected, f"{expected:.2f} times torch's speed committed"
