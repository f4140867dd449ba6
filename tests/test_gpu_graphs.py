"""On an NVIDIA GPU: every op replays in a graph on new inputs, and its registrations hold."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prunelm import ops
from prunelm.ops.backend import WITH_CUDA, WITH_TRITON
from prunelm.sparse import BlockSparse

pytestmark = pytest.mark.gpu

BACKENDS = [
    pytest.param("cuda", marks=pytest.mark.skipif(not WITH_CUDA, reason="built without CUDA")),
    pytest.param("triton", marks=pytest.mark.skipif(not WITH_TRITON, reason="no triton")),
]
Ways = tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]]]


@pytest.fixture(autouse=True)
def _plain_memory() -> Iterator[None]:
    """Without fills and checks of the deterministic mode, which a graph would hold too; new
    numbers at each run, named where a test fails."""
    torch.use_deterministic_algorithms(False)
    print("seed", torch.seed())
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


def weight_of(block: int, N: int = 320, K: int = 256) -> BlockSparse:
    mask = torch.rand(-(-N // block), -(-K // block)) < 0.4
    dense = torch.randn(N, K, dtype=torch.bfloat16, device="cuda")
    return BlockSparse.from_dense(dense, (block, block), mask)


def block_sparse(M: int, block: int, backend: Any) -> Ways:
    weight = weight_of(block)
    bias = torch.randn(320, dtype=torch.bfloat16, device="cuda")

    def call(x: Tensor) -> Tensor:
        return ops.block_sparse_linear(x, weight, bias, "gelu", backend=backend)

    return call, lambda: (torch.randn(M, 256, dtype=torch.bfloat16, device="cuda"),)


def low_rank(M: int, R: int, backend: Any) -> Ways:
    down, up = (torch.randn(*s, dtype=torch.bfloat16, device="cuda") for s in ((R, 256), (320, R)))

    def call(x: Tensor) -> Tensor:
        return ops.low_rank_linear(x, down, up, None, "silu", backend=backend)

    return call, lambda: (torch.randn(M, 256, dtype=torch.bfloat16, device="cuda"),)


def beam(W: int, V: int, backend: Any) -> Ways:
    row, weight = torch.arange(4 * W, device="cuda").view(4, W), torch.rand(4, device="cuda")

    def call(score: Tensor, logits: Tensor, rows: Tensor) -> Any:
        return ops.beam_step(score, logits, ((rows, row, weight),), backend=backend)

    def draw() -> tuple[Tensor, ...]:
        sizes = ((4, W), (4, W, V), (4 * W, V))
        return tuple(torch.randn(*size, device="cuda") for size in sizes)

    return call, draw


def gradients(M: int, block: int, backend: Any) -> Ways:
    weight = weight_of(block)

    def call(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        x, values = x.detach().requires_grad_(), weight.values.detach().requires_grad_()
        leaf = dataclasses.replace(weight, values=values)
        y = ops.block_sparse_linear(x, leaf, backend=backend)
        return torch.autograd.grad(y, (x, values), grad)

    def draw() -> tuple[Tensor, ...]:
        return tuple(torch.randn(M, n, dtype=torch.bfloat16, device="cuda") for n in (256, 320))

    return call, draw


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "make, sizes",
    [
        *[pytest.param(block_sparse, s, id=f"block-sparse-{s}") for s in ((1, 16), (16, 64))],
        *[pytest.param(block_sparse, s, id=f"block-sparse-{s}") for s in ((64, 128), (200, 32))],
        *[pytest.param(low_rank, s, id=f"low-rank-{s}") for s in ((1, 64), (16, 128), (200, 64))],
        *[pytest.param(beam, s, id=f"beam-{s}") for s in ((8, 500), (3, 5001))],
        *[pytest.param(gradients, s, id=f"gradients-{s}") for s in ((33, 16), (200, 64))],
    ],
)
def test_a_graph_replays_on_new_inputs(make: Any, sizes: tuple[int, int], backend: Any) -> None:
    call, draw = make(*sizes, backend)
    inputs = draw()
    call(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*inputs)
    out = (out,) if isinstance(out, Tensor) else tuple(out)
    for _ in range(3):
        for tensor, new in zip(inputs, draw(), strict=True):
            tensor.copy_(new)
        for tensor in out:
            tensor.zero_()
        graph.replay()
        expected = call(*inputs)
        expected = (expected,) if isinstance(expected, Tensor) else tuple(expected)
        for one, other in zip(out, expected, strict=True):
            assert torch.equal(one, other)
        if all(tensor.is_floating_point() for tensor in out):
            assert all(bool(tensor.any()) for tensor in out)


class Calls(TorchDispatchMode):
    """Records what the public ops hand to the registered ones."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prunelm":
            self.found.append((func, args, kwargs))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "make, sizes",
    [
        pytest.param(block_sparse, (5, 16), id="block-sparse-16"),
        pytest.param(block_sparse, (70, 64), id="block-sparse-64"),
        pytest.param(low_rank, (5, 64), id="low-rank"),
        pytest.param(beam, (3, 50), id="beam"),
        pytest.param(gradients, (33, 16), id="gradients"),
    ],
)
def test_the_registered_ops_pass_opcheck(make: Any, sizes: tuple[int, int], backend: Any) -> None:
    call, draw = make(*sizes, backend)
    with Calls() as calls:
        call(*draw())
    assert calls.found
    checks = ("test_schema", "test_faketensor")
    for func, args, kwargs in calls.found:
        args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(func, args, kwargs or {}, test_utils=checks)


@pytest.mark.parametrize("M", [1, 64, 65, 4096])
def test_the_chosen_backend_runs(M: int) -> None:
    weight, x = weight_of(64), torch.randn(M, 256, dtype=torch.bfloat16, device="cuda")
    said = ops.explain(x, weight)
    named = ops.block_sparse_linear(x, weight, backend=said.backend)  # type: ignore[arg-type]
    assert torch.equal(ops.block_sparse_linear(x, weight), named)
    assert said.predicted_for and set(said.predicted_us) == {"dense", "cuda", "triton"}
