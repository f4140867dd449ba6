"""A whole language model of 20M parameters, pruned and accelerated, against the dense one.

python -m prunelm.benchmarks.bench_model [--full] [--threads 2] [--save]

What is predicted is the dense model's time less what each linear layer, timed alone, saves.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunelm.benchmarks.harness import measure_roof, options_of, report, side_by_side
from prunelm.models.lm import KVCache, LMConfig, TransformerLM
from prunelm.nn import accelerate

VOCABULARY, CONTEXT = 500, 32
BLOCKS, SPARSITIES, RANKS = (16, 4), (0.5, 0.75, 0.9), (64, 128)


def with_zero_blocks(model: TransformerLM, sparsity: float) -> TransformerLM:
    """A copy in which that share of every linear layer's blocks is zero."""
    pruned, g = copy.deepcopy(model), torch.Generator().manual_seed(1)
    for module in pruned.blocks.modules():
        if isinstance(module, nn.Linear):
            (N, K), (bn, bk) = module.weight.shape, BLOCKS
            rows, cols = -(-N // bn), -(-K // bk)
            order = torch.randperm(rows * cols, generator=g)
            kept = (order >= round(sparsity * rows * cols)).view(rows, cols)
            wide = kept.repeat_interleave(bn, 0)[:N].repeat_interleave(bk, 1)[:, :K]
            module.weight.data.mul_(wide)
    return pruned


def with_ranks(config: LMConfig, rank: int) -> TransformerLM:
    """A model all of whose layers have that rank."""
    values = {**config.to_dict(), "ranks": dict.fromkeys(config.linears(), rank)}
    return TransformerLM(LMConfig.from_dict(values)).eval()


def step_of(model: TransformerLM, rows: int, compiled: bool = False) -> Callable[[], Tensor]:
    """One step of beam search: every row has its own path of CONTEXT nodes, the last one new."""
    step = torch.compile(model.step, dynamic=False) if compiled else model.step
    tokens = torch.randint(VOCABULARY, (rows,))
    path = torch.arange(rows * CONTEXT).view(rows, CONTEXT)
    length = torch.full((rows,), CONTEXT)
    cache: KVCache = model.new_cache(rows * CONTEXT)
    for x in (*cache.key, *cache.value):
        x.normal_()
    return lambda: step(tokens, path, length, cache)


def score_of(model: TransformerLM, rows: int, compiled: bool = False) -> Callable[[], Tensor]:
    """Scoring of rows / 64 sentences of 64 tokens."""
    score = torch.compile(model, dynamic=False) if compiled else model
    tokens = torch.randint(VOCABULARY, (rows // 64, 64))
    return lambda: score(tokens)


def layer_us(model: TransformerLM, rows: int, threads: int) -> float:
    """All linear layers of the blocks, each kind timed alone on [rows, K]."""
    linears = [m for b in model.blocks for m in b.children() if hasattr(m, "in_features")]
    kinds: dict[tuple[object, ...], nn.Module] = {}
    count: Counter[tuple[object, ...]] = Counter()
    for module in linears:
        kind = (type(module), module.in_features, module.out_features)
        kinds[kind] = module
        count[kind] += 1
    calls: dict[str, Callable[[], object]] = {}
    for kind, module in kinds.items():
        x = torch.randn(rows, int(str(kind[1])))
        calls[str(kind)] = lambda module=module, x=x: module(x)  # type: ignore[misc]
    us = side_by_side(calls, threads, rounds=5)
    return sum(us[str(kind)] * n for kind, n in count.items())


def measure(
    kind: str, rows: int, models: Mapping[str, TransformerLM], threads: int, compiled: bool
) -> list[dict[str, Any]]:
    """One line per model: measured, and predicted from its layers."""

    def made(model: nn.Module, compiled: bool = False) -> Callable[[], Tensor]:
        torch.manual_seed(1)  # the same inputs for all
        return (step_of if kind == "step" else score_of)(model, rows, compiled)  # type: ignore[arg-type]

    with torch.inference_mode():
        fast = {name: accelerate(model, rows=(rows,)) for name, model in models.items()}
        calls = {name: made(model) for name, model in fast.items() if name != "dense"}
        for name, call in calls.items():
            error = float((call() - made(models[name])()).abs().max())
            if not error <= 1e-4:  # logits are below 1
                raise RuntimeError(
                    f"{kind}, {name}: expected the plain model's logits, off {error}"
                )
        calls["dense"] = made(models["dense"])
        if compiled:
            calls["compiled"] = made(models["dense"], True)
        us = side_by_side(calls, threads, rounds=5)
        dense_layers = layer_us(models["dense"], rows, threads)
        layers = {name: layer_us(model, rows, threads) for name, model in fast.items()}  # type: ignore[arg-type]
    lines = []
    for name in calls:
        line = {"what": kind, "rows": rows, "model": name, "us": us[name]}
        line["speedup"] = us["dense"] / us[name]
        saved = dense_layers - layers[name] if name in layers and name != "dense" else 0.0
        predicted = us["dense"] / (us["dense"] - saved) if saved else None
        line["predicted"] = predicted
        line["of_predicted"] = line["speedup"] / predicted if predicted else None
        lines.append(line)
    return lines


def main(words: Sequence[str] | None = None) -> None:
    """Prints a machine line, a table in microseconds and one line of JSON."""
    options = options_of(str(__doc__), words, "score 2048 rows, torch.compile too")
    torch.manual_seed(0)
    config = LMConfig.preset("paper-20m", VOCABULARY)
    dense = TransformerLM(config).eval()
    models = {"dense": dense}
    for sparsity in SPARSITIES:
        name = f"{BLOCKS[0]}x{BLOCKS[1]} blocks, {sparsity:.0%} zeros"
        models[name] = with_zero_blocks(dense, sparsity)
    models.update({f"rank {rank}": with_ranks(config, rank) for rank in RANKS})
    rows = measure("step", 32, models, options.threads, options.full)
    scored = 2048 if options.full else 256
    rows += measure("score", scored, models, options.threads, options.full)
    report("model", options.threads, measure_roof(options.threads), rows, options.save)


if __name__ == "__main__":
    main()
