"""The CUDA kernels, run on the CPU (tests/cuda_emulation), agree with the references."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prunelm.ops.activation import activate
from prunelm.ops.beam_step import DEAD, beam_step_reference
from prunelm.sparse import BlockSparse

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
from emulated import Kernels, compile_kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    compile_kernels("calls.cpp", library, "-shared", "-fPIC", "-O1")
    return Kernels(library)


def assert_accurate(y: Tensor, truth: Tensor, size: Tensor) -> None:
    """y [M, N] against float64; `size` [M, N] is what it sums over, all positive."""
    allowed = 4 * torch.finfo(y.dtype).eps * size + 1e-6
    error = (y.double() - truth).abs()
    assert bool((error <= allowed).all()), f"largest error {error.max()}"


def random_blocks(N: int, K: int, block: tuple[int, int], keep: float) -> BlockSparse:
    bn, bk = block
    mask = torch.rand(-(-N // bn), -(-K // bk)) < keep
    return BlockSparse.from_dense(torch.randn(N, K), block, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, K, N, block, keep, activation",
    [
        pytest.param(1, 37, 51, (16, 4), 0.4, None, id="one-row"),
        pytest.param(9, 33, 65, (16, 16), 0.5, "gelu", id="ragged"),
        pytest.param(3, 13, 7, (1, 1), 0.3, "relu", id="elements"),
        pytest.param(2, 70, 40, (40, 70), 1.0, "silu", id="one-block"),
        pytest.param(4, 20, 33, (7, 3), 0.0, "gelu", id="all-pruned"),
        pytest.param(0, 8, 8, (4, 4), 0.5, None, id="no-rows"),
    ],
)
def test_block_sparse_linear(
    kernels: Kernels,
    dtype: torch.dtype,
    M: int,
    K: int,
    N: int,
    block: tuple[int, int],
    keep: float,
    activation: str | None,
) -> None:
    weight = random_blocks(N, K, block, keep)
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    values = weight.values.to(dtype)
    y = kernels.block_sparse_linear(
        x, values, weight.crow, weight.col, bias, out_features=N, activation=activation
    )
    dense = BlockSparse(values, weight.crow, weight.col, (N, K)).to_dense().double()
    truth = activate(x.double() @ dense.T + bias, activation)
    assert_accurate(y, truth, x.double().abs() @ dense.abs().T + bias.abs())


@pytest.mark.parametrize(
    "M, K, N, block, keep",
    [
        pytest.param(5, 37, 51, (16, 4), 0.4, id="ragged"),
        pytest.param(3, 13, 7, (1, 1), 0.3, id="elements"),
        pytest.param(4, 20, 33, (7, 3), 0.0, id="all-pruned"),
        pytest.param(0, 8, 9, (4, 4), 0.5, id="no-rows"),
    ],
)
def test_block_sparse_linear_gradients(
    kernels: Kernels, M: int, K: int, N: int, block: tuple[int, int], keep: float
) -> None:
    weight = random_blocks(N, K, block, keep)
    x, grad = torch.randn(M, K), torch.randn(M, N)
    stored = (weight.values, weight.crow, weight.col)
    got = kernels.block_sparse_linear_gradients(grad, x, *stored)
    x = x.double().requires_grad_()
    values = weight.values.double().requires_grad_()
    wide = BlockSparse(values, weight.crow, weight.col, (N, K))
    expected = torch.autograd.grad(x @ wide.to_dense().T, (x, values), grad.double())
    for one, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, K, R, N, activation",
    [
        pytest.param(1, 65, 9, 33, None, id="one-row"),
        pytest.param(3, 31, 40, 10, "gelu", id="ragged"),
        pytest.param(2, 9, 0, 5, "silu", id="rank-0"),
        pytest.param(0, 9, 4, 5, None, id="no-rows"),
    ],
)
def test_low_rank_linear(
    kernels: Kernels, dtype: torch.dtype, M: int, K: int, R: int, N: int, activation: str | None
) -> None:
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    down, up = torch.randn(R, K).to(dtype), torch.randn(N, R).to(dtype)
    y = kernels.low_rank_linear(x, down, up, bias, activation=activation)
    middle = x.double() @ down.double().T
    truth = activate(middle @ up.double().T + bias, activation)
    size = (x.double().abs() @ down.double().abs().T) @ up.double().abs().T + bias.abs()
    assert_accurate(y, truth, size)


def beam_inputs(B: int, W: int, V: int, terms: int, dtype: torch.dtype) -> dict[str, object]:
    score = torch.randn(B, W, dtype=dtype)
    return {
        "score": score,
        "am_logits": 2 * torch.randn(B, W, V, dtype=dtype),
        "terms": [
            (torch.randn(5, V).log_softmax(-1).to(kind), torch.randint(5, (B, W)), weight)
            for kind, weight in zip(
                (dtype, torch.float16, torch.bfloat16), torch.randn(3, B, dtype=dtype), strict=True
            )
        ][:terms],
    }


def assert_same_step(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    score, parent, token, parts, bad = got
    assert torch.equal(parent, expected[1])
    assert torch.equal(token, expected[2])
    assert torch.equal(bad, expected[4])
    eps = torch.finfo(score.dtype).eps
    torch.testing.assert_close(score, expected[0], rtol=16 * eps, atol=64 * eps)
    torch.testing.assert_close(parts, expected[3], rtol=16 * eps, atol=64 * eps)


@pytest.mark.parametrize("prune", ["late", "early", "after"])
@pytest.mark.parametrize(
    "B, W, V, terms, options",
    [
        pytest.param(2, 3, 37, 0, {}, id="no-terms"),
        pytest.param(1, 4, 70, 3, {"silent": (0, 5), "temperature": 1.7}, id="three-terms"),
        pytest.param(3, 2, 33, 2, {"weigh_blank": True, "blank_penalty": 0.7}, id="weigh-blank"),
        pytest.param(1, 9, 5, 1, {"silent": (4,)}, id="wider-than-v"),
        pytest.param(2, 1, 1, 1, {}, id="one-token"),
        pytest.param(0, 2, 7, 1, {}, id="no-utterance"),
    ],
)
def test_beam_step(
    kernels: Kernels, prune: str, B: int, W: int, V: int, terms: int, options: dict[str, object]
) -> None:
    inputs = beam_inputs(B, W, V, terms, torch.float32)
    slot = torch.tensor([0, 0, 1, 2, 0, 3, 0, 1, 0])[torch.arange(B * W) % 9].view(B, W)
    for extra in ({}, {"slot": slot, "token_reward": torch.randn(B)}):
        got = kernels.beam_step(**inputs, **options, **extra, prune=prune)
        assert_same_step(got, beam_step_reference(**inputs, **options, **extra, prune=prune))


def test_beam_step_in_float64(kernels: Kernels) -> None:
    inputs = beam_inputs(2, 3, 40, 3, torch.float64)
    assert_same_step(kernels.beam_step(**inputs), beam_step_reference(**inputs))


@pytest.mark.parametrize("prune", ["late", "early", "after"])
def test_ties_go_to_the_lowest_parent_then_the_lowest_token(kernels: Kernels, prune: str) -> None:
    score, logits = torch.zeros(1, 3), torch.zeros(1, 3, 65)
    _, parent, token, _, bad = kernels.beam_step(score, logits, prune=prune)
    assert parent.tolist() == [[0, 0, 0]]
    assert token.tolist() == [[0, 1, 2]]
    assert not bad.item()


@pytest.mark.parametrize("prune", ["late", "early", "after"])
def test_nan_infinity_and_dead_slots_touch_their_own_hypothesis_only(
    kernels: Kernels, prune: str
) -> None:
    inputs = beam_inputs(5, 4, 40, 1, torch.float32)
    inputs["am_logits"][0, 1, 33] = torch.nan
    inputs["am_logits"][1, 2] = -torch.inf
    inputs["am_logits"][2, 0, 3] = torch.inf
    inputs["am_logits"][3, 0, :38] = -torch.inf
    inputs["score"][4] = -torch.inf
    got = kernels.beam_step(**inputs, prune=prune)
    assert_same_step(got, beam_step_reference(**inputs, prune=prune))
    assert got[4].tolist() == [True, False, True, False, False]
    assert got[1][4].tolist() == [0, 1, 2, 3]


def test_a_row_out_of_range_is_bad_and_not_read(kernels: Kernels) -> None:
    inputs = beam_inputs(2, 2, 9, 1, torch.float32)
    inputs["terms"][0][1][0, 0] = 5
    slot = torch.tensor([[0, 0], [0, DEAD]])
    assert kernels.beam_step(**inputs, slot=slot)[4].tolist() == [True, False]
