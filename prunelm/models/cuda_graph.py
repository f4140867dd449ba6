"""A language model whose step replays as one CUDA graph: at small widths launches are its time."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunelm.models.lm import KVCache, TransformerLM

LEAST_PATH = 16  # paths are padded to a power of two from here on


@dataclass
class _Step:
    """One captured size: what a replay reads and writes.

    Attributes:
        tokens, length: [R], path: [R, P]; rows that nobody asked for are nodes in the spare slot.
        logits: [R, V], what the replay wrote.
        used: rows that the last call filled.
    """

    tokens: Tensor
    path: Tensor
    length: Tensor
    logits: Tensor
    replay: Callable[[], object]
    used: int = 0


@dataclass(frozen=True)
class GraphedCache:
    """A `KVCache` with one more slot, for padding rows, and the graphs that work on it."""

    inner: KVCache
    steps: dict[tuple[int, int], _Step] = field(default_factory=dict)

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.inner.capacity - 1

    def select(self, slots: Tensor, capacity: int | None = None) -> "GraphedCache":
        """As `KVCache.select`; its graphs are captured anew."""
        capacity = len(slots) if capacity is None else capacity
        return GraphedCache(self.inner.select(slots, capacity + 1))


class CudaGraphLM:
    """`TransformerLM`'s stepping with all kernels of a step in one launch, for `Fusion`.

    A graph is captured for each cache and size: rows and path length, each padded to a power of
    two. Weights may be updated in place between calls; the module must stay as it is otherwise.
    Where the model lies on the CPU, the padded step runs as it is.
    """

    def __init__(self, lm: TransformerLM) -> None:
        self.lm = lm.eval()

    def new_cache(self, capacity: int) -> GraphedCache:
        """An empty cache with `capacity` slots."""
        return GraphedCache(self.lm.new_cache(capacity + 1))

    @torch.no_grad()
    def step(self, tokens: Tensor, path: Tensor, length: Tensor, cache: GraphedCache) -> Tensor:
        """As `TransformerLM.step`; the tensors may lie on the CPU too."""
        (R, P), spare = path.shape, cache.capacity
        size = (power_of_two(R), power_of_two(max(P, LEAST_PATH)))
        if size not in cache.steps:
            cache.steps[size] = self._capture(*size, cache.inner)
        step = cache.steps[size]
        if R < step.used:
            step.path[R : step.used].fill_(spare)
            step.length[R : step.used].fill_(1)
        step.used = R
        step.tokens[:R].copy_(tokens)
        step.path[:R, :P].copy_(path)  # what lay past P are valid slots still
        step.length[:R].copy_(length)
        step.replay()
        return step.logits[:R].clone()

    def _capture(self, R: int, P: int, cache: KVCache) -> _Step:
        device, spare = self.lm.embedding.weight.device, cache.capacity - 1
        with torch.inference_mode(False):  # so that later calls may write to them in any mode
            tokens = torch.zeros(R, dtype=torch.int64, device=device)
            path = torch.full((R, P), spare, dtype=torch.int64, device=device)
            length = torch.ones_like(tokens)

        def run() -> Tensor:
            return self.lm.step(tokens, path, length, cache)

        if device.type != "cuda":
            first = run()
            with torch.inference_mode(False):
                logits = torch.empty(first.shape, dtype=first.dtype)
            return _Step(tokens, path, length, logits, lambda: logits.copy_(run()))
        with torch.cuda.device(device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # loads libraries, compiles kernels
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = run()
        return _Step(tokens, path, length, logits, graph.replay)


def power_of_two(size: int) -> int:
    """The least power of two that is not below size."""
    return 1 << max(size - 1, 0).bit_length()
