"""A whole step of a language model of 20M parameters as one CUDA graph, in the forms that pruning
leaves, against the sum of its layers' rooflines.

python -m prunelm.benchmarks.gpu_model [--full] [--seconds 60] [--out FOLDER]
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunelm.benchmarks.gpu_block_sparse_linear import kept
from prunelm.benchmarks.gpu_harness import (
    REPLAYS,
    Case,
    Roof,
    Timer,
    options_of,
    run_benchmark,
    size_bytes,
)
from prunelm.models.cuda_graph import CudaGraphLM
from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
from prunelm.nn import BlockSparseLinear, LowRankLinear

VOCABULARY, CONTEXT = 500, 32
ROWS, MORE_ROWS = (32,), (1, 256)


def dense(device: str) -> TransformerLM:
    return TransformerLM(LMConfig.preset("paper-20m", VOCABULARY)).to(device, torch.bfloat16).eval()


def block_sparse(device: str, block: int, sparsity: float) -> TransformerLM:
    """Every linear of the blocks block-sparse; none is left to what `accelerate` predicts."""
    model = dense(device)
    for layer in model.blocks:
        for name, linear in list(layer.named_children()):
            if isinstance(linear, nn.Linear):
                shape = (linear.out_features, linear.in_features)
                mask = kept(shape, block, sparsity, device)
                new = BlockSparseLinear.from_linear(linear, (block, block), mask)
                setattr(layer, name, new.requires_grad_(False))
    return model


def low_rank(device: str, rank: int) -> TransformerLM:
    config = LMConfig.preset("paper-20m", VOCABULARY)
    ranks = {name: min(rank, *sizes) for name, sizes in config.linears().items()}
    model = TransformerLM(LMConfig.from_dict({**config.to_dict(), "ranks": ranks}))
    return model.to(device, torch.bfloat16).eval()


def narrow(device: str) -> TransformerLM:
    """A quarter of the heads and of the neurons."""
    config = LMConfig.preset("paper-20m", VOCABULARY)
    layers = tuple(LayerSizes(2, layer.ff // 4) for layer in config.layers)
    model = TransformerLM(LMConfig(VOCABULARY, config.dim, config.head_dim, layers))
    return model.to(device, torch.bfloat16).eval()


MODELS: Mapping[str, Callable[[str], TransformerLM]] = {
    "dense": dense,
    "32x32 blocks, 75% zeros": partial(block_sparse, block=32, sparsity=0.75),
    "32x32 blocks, 90% zeros": partial(block_sparse, block=32, sparsity=0.9),
    "rank 64": partial(low_rank, rank=64),
    "a quarter of heads and neurons": narrow,
}


def roof_us(model: TransformerLM, roof: Roof, rows: int) -> float:
    """The sum over the linears, the attentions and the output layer of the least time of each."""
    total = 0.0
    for module in model.modules():
        if not isinstance(module, (nn.Linear, BlockSparseLinear, LowRankLinear)):
            continue
        weights = [p for p in module.parameters() if p.dim() > 1]
        flops = 2 * rows * sum(p.numel() for p in weights)
        moved = size_bytes(weights) + 2 * rows * (module.in_features + module.out_features)
        total += roof.us(flops, moved)
    for layer in model.config.layers:  # keys and values of every path, read once
        width = layer.heads * model.config.head_dim
        total += roof.us(4 * rows * CONTEXT * width, 2 * 2 * rows * (CONTEXT + 1) * width)
    head = model.embedding.weight
    return total + roof.us(2 * rows * head.numel(), size_bytes(head) + 2 * rows * len(head))


def step_inputs(rows: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Every row has its own path of CONTEXT nodes, the last one new."""
    tokens = torch.randint(VOCABULARY, (rows,), device=device)
    path = torch.arange(rows * CONTEXT, device=device).view(rows, CONTEXT)
    return tokens, path, torch.full((rows,), CONTEXT, device=device)


def step(
    timer: Timer, roof: Roof, known: dict[Any, float], *, name: str, rows: int, device: str = "cuda"
) -> Mapping[str, Any]:
    """One line of the table: the graph's replay, checked against the plain step in float32."""
    torch.manual_seed(0)
    model = MODELS[name](device)
    graphed, inputs = CudaGraphLM(model), step_inputs(rows, device)
    cache = graphed.new_cache(rows * CONTEXT)
    for x in (*cache.inner.key, *cache.inner.value):
        x.normal_()
    wide = copy.deepcopy(model).float()
    wide_cache = wide.new_cache(rows * CONTEXT)
    inner = (*cache.inner.key, *cache.inner.value)
    for to, x in zip((*wide_cache.key, *wide_cache.value), inner, strict=True):
        to.copy_(x[:-1])
    exact = wide.step(*inputs, wide_cache)
    got = graphed.step(*inputs, cache)
    error, size = float((got - exact).abs().max()), float(exact.abs().max())
    if not error <= 0.05 * size:  # bfloat16 through 6 blocks
        raise RuntimeError(f"{name}: expected the plain step's logits, off {error} of {size}")
    (captured,) = cache.steps.values()
    us = statistics.median(timer.elapsed_us(captured.replay, REPLAYS))
    plain_cache = model.new_cache(rows * CONTEXT)
    eager_us = eager(lambda: model.step(*inputs, plain_cache), device)
    known[name, rows] = us
    least = roof_us(model, roof, rows)
    return {
        "us": us,
        "roof_us": least,
        "over_roof": us / least,
        "eager_us": eager_us,
        "speedup": known[MODEL_OF_ALL, rows] / us if (MODEL_OF_ALL, rows) in known else None,
    }


MODEL_OF_ALL = "dense"  # what the others' speed is held against


def eager(call: Callable[[], object], device: str) -> float:
    """Microseconds of a call by a host clock, its launches one by one."""
    found = []
    for _ in range(8):
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(found[3:])


def cases(timer: Timer, roof: Roof, full: bool, device: str = "cuda") -> list[Case]:
    """All lines; dense first, which the others are held against."""
    known: dict[Any, float] = {}
    return [
        (
            {"model": name, "rows": rows},
            partial(step, timer, roof, known, name=name, rows=rows, device=device),
        )
        for rows in (*ROWS, *(MORE_ROWS if full else ()))
        for name in MODELS
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Prints the card, a table in microseconds, and saves it."""
    options = options_of(str(__doc__), words)
    return run_benchmark("model", partial(cases, full=options.full), options)


if __name__ == "__main__":
    sys.exit(main())
