"""On an NVIDIA GPU: the CUDA and Triton backends agree with float64."""

import copy
from typing import Any

import pytest
import torch

from prunelm import ops
from prunelm.nn import BlockSparseLinear
from prunelm.ops.backend import WITH_CUDA, WITH_TRITON
from prunelm.sparse import BlockSparse

BACKENDS = [
    pytest.param("cuda", marks=pytest.mark.skipif(not WITH_CUDA, reason="built without CUDA")),
    pytest.param("triton", marks=pytest.mark.skipif(not WITH_TRITON, reason="no triton")),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.gpu


def assert_accurate(
    y: torch.Tensor, dense: torch.Tensor, truth: torch.Tensor, times: float = 2
) -> None:
    """The error against float64 is at most twice that of torch's dense op in the same dtype."""
    floor = torch.finfo(y.dtype).eps * truth.abs().max()
    allowed = times * (dense.double() - truth).abs().max() + floor
    error = (y.double() - truth).abs().max()
    assert bool(error <= allowed), f"error {error}, allowed {allowed}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "M, K, N, block",
    [
        pytest.param(1, 512, 512, (16, 16), id="one-row"),
        pytest.param(77, 130, 259, (16, 4), id="ragged"),
        pytest.param(200, 300, 520, (128, 128), id="large-blocks"),
        pytest.param(5, 33, 65, (1, 1), id="elements"),
        pytest.param(0, 32, 32, (16, 16), id="no-rows"),
    ],
)
def test_block_sparse_linear(
    backend: str, dtype: torch.dtype, M: int, K: int, N: int, block: tuple[int, int]
) -> None:
    mask = torch.rand(-(-N // block[0]), -(-K // block[1])) < 0.5
    weight = BlockSparse.from_dense(torch.randn(N, K, dtype=dtype, device="cuda"), block, mask)
    x = torch.randn(M, K, dtype=dtype, device="cuda")
    bias = torch.randn(N, dtype=dtype, device="cuda")
    y = ops.block_sparse_linear(x, weight, bias, "gelu", backend=backend)
    assert y.shape == (M, N)
    if M == 0:
        return
    dense = weight.to_dense()
    truth = torch.nn.functional.gelu(x.double() @ dense.double().T + bias.double())
    assert_accurate(y, torch.nn.functional.gelu(x @ dense.T + bias), truth)

    def run(x: torch.Tensor) -> torch.Tensor:
        return ops.block_sparse_linear(x, weight, bias, "gelu", backend=backend)

    if backend == "triton" and dtype != torch.bfloat16:
        return  # each new size compiles a kernel
    # Triton may use other instructions for M below 64.
    assert torch.equal(run(x[:63])[:3], torch.stack([run(r) for r in x[:3]])), "a row depends on M"
    if M > 64:
        assert torch.equal(run(x[:64])[:3], y[:3]), "a row depends on M"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "M, K, R, N",
    [
        pytest.param(1, 512, 64, 512, id="one-row"),
        pytest.param(7, 4096, 256, 4096, id="wide"),
        pytest.param(64, 4096, 200, 1000, id="64-rows"),
        pytest.param(77, 130, 33, 259, id="ragged"),
        pytest.param(16, 300, 600, 64, id="rank-600"),
        pytest.param(300, 1024, 64, 2048, id="many-rows"),
        pytest.param(8400, 512, 64, 256, id="one-launch"),
        pytest.param(3, 64, 0, 40, id="rank-0"),
        pytest.param(0, 8, 4, 8, id="no-rows"),
    ],
)
def test_low_rank_linear(backend: str, dtype: torch.dtype, M: int, K: int, R: int, N: int) -> None:
    x = torch.randn(M, K, dtype=dtype, device="cuda")
    down = torch.randn(R, K, dtype=dtype, device="cuda") / 8
    up = torch.randn(N, R, dtype=dtype, device="cuda") / 8
    bias = torch.randn(N, dtype=dtype, device="cuda")
    y = ops.low_rank_linear(x, down, up, bias, "silu", backend=backend)
    assert y.shape == (M, N)
    if M == 0:
        return
    truth = torch.nn.functional.silu(x.double() @ down.double().T @ up.double().T + bias.double())
    assert_accurate(y, torch.nn.functional.silu(x @ down.T @ up.T + bias), truth)
    few = x[:40] if backend == "triton" else x  # beyond 63 rows Triton takes other instructions
    y = ops.low_rank_linear(few, down, up, bias, "silu", backend=backend)
    for rows in (slice(0, 1), slice(2, 3), slice(1, 12)):
        one = ops.low_rank_linear(few[rows].clone(), down, up, bias, "silu", backend=backend)
        assert torch.equal(one, y[rows]), "a row depends on M"


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend: str) -> None:
    mask = torch.rand(5, 9) < 0.5
    dense = torch.randn(70, 35, device="cuda")
    weight = BlockSparse.from_dense(dense, (16, 4), mask)
    x = torch.randn(13, 35, device="cuda", requires_grad=True)
    values = weight.values.requires_grad_()
    weight = BlockSparse(values, weight.crow, weight.col, weight.shape)
    gradients = [
        torch.autograd.grad(
            ops.block_sparse_linear(x, weight, None, "silu", backend=name).square().sum(),
            (x, values),
        )
        for name in (backend, "reference")
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "M, K, N, block, dtype, tf32",
    [
        pytest.param(2100, 512, 384, (64, 64), torch.bfloat16, False, id="64x64"),
        pytest.param(2100, 512, 384, (64, 64), torch.float32, True, id="64x64-tf32"),
        pytest.param(700, 512, 1024, (16, 16), torch.bfloat16, False, id="16x16"),
        pytest.param(700, 512, 1024, (16, 16), torch.float32, True, id="16x16-tf32"),
        pytest.param(130, 300, 520, (128, 128), torch.float16, False, id="ragged-128x128"),
        pytest.param(33, 260, 250, (32, 64), torch.float32, False, id="few-rows"),
        pytest.param(70, 33, 65, (7, 3), torch.float32, False, id="odd"),
        pytest.param(5, 64, 64, (16, 16), torch.bfloat16, False, id="all-pruned"),
    ],
)
def test_gradients_in_triton(
    M: int, K: int, N: int, block: tuple[int, int], dtype: torch.dtype, tf32: bool
) -> None:
    if not WITH_TRITON:
        pytest.skip("no triton")
    keep = 0.0 if M == 5 else 0.5
    mask = torch.rand(-(-N // block[0]), -(-K // block[1])) < keep
    weight = BlockSparse.from_dense(torch.randn(N, K, dtype=dtype, device="cuda"), block, mask)
    x = torch.randn(M, K, dtype=dtype, device="cuda")
    grad = torch.randn(M, N, dtype=dtype, device="cuda")

    def gradients(to: torch.dtype, backend: str) -> tuple[torch.Tensor, ...]:
        leaves = [t.detach().to(to).requires_grad_() for t in (x, weight.values)]
        own = BlockSparse(leaves[1], weight.crow, weight.col, weight.shape, weight.gpu_index)
        y = ops.block_sparse_linear(leaves[0], own, backend=backend)
        return y, *torch.autograd.grad(y, leaves, grad.to(to))

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        got, again = gradients(dtype, "triton"), gradients(dtype, "triton")
        dense = gradients(dtype, "reference")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    exact = gradients(torch.float64, "reference")
    for one, other, expected, truth in zip(got, again, dense, exact, strict=True):
        assert one.dtype == dtype and torch.equal(one, other)
        if one.numel():
            # TF32 drops bits of x that a library may have rounded: twice the error.
            assert_accurate(one, expected, truth, 4 if tf32 else 2)


def test_a_module_takes_its_schedule_along() -> None:
    linear = torch.nn.Linear(96, 80)
    module = BlockSparseLinear.from_linear(linear, (16, 16), torch.rand(5, 6) < 0.5)
    assert module.gpu_index is None
    module.cuda()
    other = BlockSparseLinear.from_linear(linear, (16, 16), torch.rand(5, 6) < 0.9).cuda()
    for assign in (False, True):
        state = {name: t.clone() for name, t in module.state_dict().items()}
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other.gpu_index, module.gpu_index)
    assert torch.equal(copy.deepcopy(module).gpu_index, module.gpu_index)
    assert module.bfloat16().gpu_index.dtype == torch.int32
    assert module.cpu().gpu_index is None


def test_a_schedule_does_not_wait_for_the_device() -> None:
    weight = BlockSparse.from_dense(torch.randn(80, 96, device="cuda"), (16, 16))
    bare = BlockSparse(weight.values, weight.crow, weight.col, weight.shape)
    assert bare.with_gpu_index().gpu_index is not None  # kernels are loaded
    torch.use_deterministic_algorithms(False)  # whose own ops may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = bare.with_gpu_index().gpu_index
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.equal(again, weight.gpu_index)


def test_triton_in_a_graph() -> None:
    if not WITH_TRITON:
        pytest.skip("no triton")
    mask = torch.rand(8, 8) < 0.5
    weight = BlockSparse.from_dense(torch.randn(128, 128, device="cuda"), (16, 16), mask)
    x = torch.randn(70, 128, device="cuda")
    with torch.no_grad():
        expected = ops.block_sparse_linear(x, weight, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.block_sparse_linear(x, weight, backend="triton")
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


def beam_inputs(B: int, W: int, V: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Two terms, one of them in 16 bits; the second half is in slots of all kinds."""
    kinds = (dtype, torch.bfloat16)
    slot = torch.zeros(B, W, dtype=torch.int64)
    slot[B // 2 :] = torch.tensor([0, 0, 1, 2, 0, 3, 0, 1, 0])[torch.arange(B * W) % 9].view(B, W)[
        B // 2 :
    ]
    return {
        "score": torch.randn(B, W, dtype=dtype, device=device),
        "am_logits": 2 * torch.randn(B, W, V, dtype=dtype, device=device),
        "terms": [
            (
                torch.randn(5, V, device=device).log_softmax(-1).to(kind),
                torch.randint(5, (B, W), device=device),
                torch.randn(B, dtype=dtype, device=device),
            )
            for kind in kinds
        ],
        "slot": slot.to(device),
    }


def wide(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same on the CPU, in float64."""
    return {
        "score": inputs["score"].double().cpu(),
        "am_logits": inputs["am_logits"].double().cpu(),
        "terms": [
            (rows.double().cpu(), row.cpu(), weight.double().cpu())
            for rows, row, weight in inputs["terms"]
        ],
        "slot": inputs["slot"].cpu(),
    }


BEAM_OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param(
        {"temperature": 1.3, "blank_penalty": 0.5, "silent": (1, 4), "token_reward": 0.2},
        id="scaled",
    ),
    pytest.param({"weigh_blank": True}, id="weigh-blank"),
]


@pytest.mark.parametrize("options", BEAM_OPTIONS)
@pytest.mark.parametrize("prune", ["late", "early", "after"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "B, W, V",
    [
        pytest.param(32, 8, 500, id="one-launch"),
        pytest.param(3, 9, 37, id="odd"),
        pytest.param(2, 1, 5000, id="one-hypothesis"),
        pytest.param(8, 8, 5003, id="two-launches"),
        pytest.param(2, 33, 150, id="wide"),
        pytest.param(2, 12, 7, id="wider-than-v"),
        pytest.param(2, 3, 40001, id="rows-beyond-shared-memory"),
        pytest.param(0, 2, 7, id="no-utterance"),
    ],
)
def test_beam_step(
    backend: Any, dtype: torch.dtype, prune: Any, options: Any, B: int, W: int, V: int
) -> None:
    inputs = beam_inputs(B, W, V, dtype, "cuda")
    got = ops.beam_step(**inputs, **options, prune=prune, backend=backend)
    expected = ops.beam_step(**wide(inputs), **options, prune=prune)
    assert torch.equal(got.parent.cpu(), expected.parent)
    assert torch.equal(got.token.cpu(), expected.token)
    assert torch.equal(got.bad.cpu(), expected.bad)
    eps = torch.finfo(dtype).eps
    for one, other in ((got.score, expected.score), (got.parts, expected.parts)):
        torch.testing.assert_close(one.double().cpu(), other, rtol=16 * eps, atol=64 * eps)
    again = ops.beam_step(**inputs, **options, prune=prune, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V", [300, 3000])
def test_beam_step_says_what_is_bad_and_breaks_ties(backend: Any, V: int) -> None:
    inputs = beam_inputs(6, 4, V, torch.float32, "cuda")
    inputs["slot"][:] = 0
    inputs["am_logits"][0, 1, V - 1] = torch.nan
    inputs["am_logits"][1, 2] = -torch.inf
    inputs["am_logits"][2, 0, 3] = torch.inf
    inputs["am_logits"][3] = 0
    inputs["score"][3] = 0
    inputs["score"][4] = -torch.inf
    inputs["terms"][0][1][5, 1] = 5  # out of range
    for term in inputs["terms"]:
        term[2][3] = 0
    got = ops.beam_step(**inputs, backend=backend)
    assert got.bad.tolist() == [True, False, True, False, False, True]
    assert got.parent[3].tolist() == [0, 0, 0, 0]
    assert got.token[3].tolist() == [0, 1, 2, 3]
    assert got.parent[4].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B, W, V", [(4, 8, 500), (4, 8, 5001)])
def test_beam_step_in_a_graph(backend: Any, B: int, W: int, V: int) -> None:
    """Both launches, with what runs before and after them on the stream, on changed inputs."""
    inputs = beam_inputs(B, W, V, torch.float32, "cuda")

    def step() -> list[torch.Tensor]:
        scaled = {**inputs, "am_logits": inputs["am_logits"] * 0.5}
        first = ops.beam_step(**scaled, backend=backend)
        second = ops.beam_step(**{**scaled, "score": first.score}, backend=backend)
        return [*first, *second, second.score * 2]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for _ in range(3):
        changed = beam_inputs(B, W, V, torch.float32, "cuda")
        inputs["score"].copy_(changed["score"])
        inputs["am_logits"].copy_(changed["am_logits"])
        for term, other in zip(inputs["terms"], changed["terms"], strict=True):
            for tensor, value in zip(term, other, strict=True):
                tensor.copy_(value)
        graph.replay()
        expected = step()
        assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


def test_runs_on_the_current_stream_and_in_a_graph() -> None:
    if not WITH_CUDA:
        pytest.skip("built without CUDA")
    x, down, up = (torch.randn(32, 32, device="cuda") for _ in range(3))
    expected = ops.low_rank_linear(x, down, up, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.low_rank_linear(x, down, up, backend="cuda")
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
