"""Measured time: alternatives side by side in one process, medians."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from prunelm.models.lm import KVCache, TransformerLM


@dataclass(frozen=True)
class Latency:
    """Times of one thing, in milliseconds."""

    median_ms: float
    low_ms: float
    """The lower quartile."""
    high_ms: float
    """The upper quartile."""
    runs: int


def latency(
    models: Mapping[str, TransformerLM],
    *,
    rows: int = 32,
    context: int = 32,
    threads: int = 1,
    runs: int = 50,
) -> dict[str, Latency]:
    """Time of one `TransformerLM.step`, as beam search calls it, of each model.

    Every row has its own path of `context` nodes, the last of which is new; the cache holds noise.

    Args:
        models: by name; on one device, which may be the CPU or a GPU.
        rows: hypotheses that step at once.
        context: tokens that a row attends to, the new one among them.
        threads: torch's threads on the CPU meanwhile.
        runs: how often each is timed; see `interleaved`.
    """
    for name, value in (("rows", rows), ("context", context)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    calls = {name: _step_call(model, rows, context) for name, model in models.items()}
    modes = {name: model.training for name, model in models.items()}
    try:
        for model in models.values():
            model.eval()
        with torch.inference_mode():
            return interleaved(calls, threads=threads, runs=runs)
    finally:
        for name, model in models.items():
            model.train(modes[name])


def interleaved(
    calls: Mapping[str, Callable[[], object]], *, threads: int = 1, runs: int = 50, warmup: int = 3
) -> dict[str, Latency]:
    """Time of each call, all of them in turn `runs` times, every other round in reverse.

    So what disturbs the machine for a while disturbs all alike. A GPU is waited for.
    """
    if runs < 1:
        raise ValueError(f"runs: expected at least 1, got {runs}")
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    with _threads(threads):
        for turn in range(warmup + runs):
            for name in names if turn % 2 == 0 else reversed(names):
                _wait()
                begin = time.perf_counter()
                calls[name]()
                _wait()
                if turn >= warmup:
                    times_ms[name].append((time.perf_counter() - begin) * 1e3)
    return {name: _latency(some) for name, some in times_ms.items()}


def _latency(times_ms: list[float]) -> Latency:
    ordered = sorted(times_ms)
    low, high = ordered[(len(ordered) - 1) // 4], ordered[-1 - (len(ordered) - 1) // 4]
    return Latency(statistics.median(ordered), low, high, len(ordered))


def _step_call(model: TransformerLM, rows: int, context: int) -> Callable[[], object]:
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (rows,), generator=generator).to(device)
    path = torch.arange(rows * context, device=device).view(rows, context)
    length = torch.full((rows,), context, device=device)
    cache: KVCache = model.new_cache(rows * context)
    for x in (*cache.key, *cache.value):
        x.copy_(torch.randn(x.shape, generator=generator))
    return lambda: model.step(tokens, path, length, cache)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
