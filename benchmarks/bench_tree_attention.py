"""tree_attention against torch's attention over gathered paths, eager and compiled.

python -m prunelm.benchmarks.bench_tree_attention [--full] [--threads 2] [--save]
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunelm.benchmarks.harness import Roof, check, measure_roof, options_of, report, side_by_side
from prunelm.ops.tree_attention import tree_attention, tree_attention_reference

HEADS, HEAD_DIM = 8, 128  # of the model in bench_model.py
NODES, DEPTHS = (8, 32, 128), (32, 128)


def in_torch(
    qkv: Tensor, cos: Tensor, sin: Tensor, path: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """The same where every path is full; keys and values are gathered for torch's own attention."""
    query, new_key, new_value = qkv.unbind(1)
    cos, sin = cos[:, None], sin[:, None]

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    slot = path[:, -1]
    key[slot], value[slot] = turn(new_key), new_value
    over = (key[path].transpose(1, 2), value[path].transpose(1, 2))  # [R, H, P, D]
    return F.scaled_dot_product_attention(turn(query)[:, :, None], *over)[:, :, 0]


def measure(R: int, P: int, *, threads: int, roof: Roof, compiled: bool) -> dict[str, Any]:
    """One line of the table: R new nodes, each P deep on a path of its own."""
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(R, 3, HEADS, HEAD_DIM, generator=g)
    angle = torch.randn(R, HEAD_DIM // 2, generator=g)
    cos, sin = angle.cos(), angle.sin()
    path = torch.randperm(R * P, generator=g).view(R, P)
    length = torch.full((R,), P)
    key, value = torch.randn(2, R * P, HEADS, HEAD_DIM, generator=g)
    rotated = (qkv, cos, sin)
    wide = tree_attention_reference(
        *(t.double() for t in rotated), path, length, key.double(), value.double()
    )
    ours = tree_attention(*rotated, path, length, key, value)
    check(ours, in_torch(*rotated, path, key, value), wide, f"tree_attention at R={R} P={P}")
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: tree_attention(*rotated, path, length, key, value),
        "torch": lambda: in_torch(*rotated, path, key, value),
    }
    if compiled:
        one = torch.compile(in_torch, dynamic=False)
        calls["torch_compiled"] = lambda: one(*rotated, path, key, value)
    with torch.inference_mode():
        us = side_by_side(calls, threads)
    numbers = R * P * HEADS * HEAD_DIM
    return {
        "R": R,
        "P": P,
        **us,
        "speedup": us["torch"] / us["ours"],
        "of_roof": roof.us(4 * numbers, 4 * 2 * numbers) / us["ours"],
    }


def main(words: Sequence[str] | None = None) -> None:
    """Prints a machine line, a table in microseconds and one line of JSON."""
    options = options_of(str(__doc__), words, "torch.compile too")
    roof = measure_roof(options.threads)
    rows = [
        measure(R, P, threads=options.threads, roof=roof, compiled=options.full)
        for R in NODES
        for P in DEPTHS
    ]
    report("tree_attention", options.threads, roof, rows, options.save)


if __name__ == "__main__":
    main()
