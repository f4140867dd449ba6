"""The CUDA beam step, run on the CPU (tests/cuda_emulation), agrees with the reference."""

from typing import Any

import pytest
import torch
from cuda_emulation.emulated import Kernels
from torch import Tensor

from prunelm.ops.beam_step import DEAD, beam_step_reference


def beam_inputs(B: int, W: int, V: int, terms: int, dtype: torch.dtype) -> dict[str, Any]:
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
    kernels: Kernels, prune: str, B: int, W: int, V: int, terms: int, options: dict[str, Any]
) -> None:
    inputs = beam_inputs(B, W, V, terms, torch.float32)
    slot = torch.tensor([0, 0, 1, 2, 0, 3, 0, 1, 0])[torch.arange(B * W) % 9].view(B, W)
    for extra in ({}, {"slot": slot, "token_reward": torch.randn(B)}):
        got = kernels.beam_step(**inputs, **options, **extra, prune=prune)
        assert_same_step(got, beam_step_reference(**inputs, **options, **extra, prune=prune))


SMALL = 5000  # bytes of shared memory: one of 5 rows of V = 600 and none of 1500 fits


@pytest.mark.parametrize("prune", ["late", "early", "after"])
@pytest.mark.parametrize(
    "W, V, options",
    [
        pytest.param(3, 1030, {}, id="a-block-a-hypothesis"),
        pytest.param(5, 1500, {"most_shared": SMALL, "temperature": 0.7}, id="rows-not-staged"),
        pytest.param(2, 777, {"most_shared": SMALL, "weigh_blank": True}, id="odd-not-staged"),
        pytest.param(33, 150, {"blank_penalty": 0.3, "silent": (149, 2)}, id="wide"),
        pytest.param(70, 600, {}, id="wider-than-the-team"),
        pytest.param(20, 7, {}, id="wider-than-v"),
    ],
)
def test_a_launch_a_hypothesis_and_one_that_merges(
    kernels: Kernels, prune: str, W: int, V: int, options: dict[str, Any]
) -> None:
    inputs = beam_inputs(2, W, V, 3, torch.float32)
    inputs["slot"] = torch.tensor([0, 1, 2, 0, 3, 0, 0, 0, 0])[torch.arange(2 * W) % 9].view(2, W)
    most_shared = options.pop("most_shared", 96 * 1024)
    got = kernels.beam_step(**inputs, **options, prune=prune, most_shared=most_shared)
    assert_same_step(got, beam_step_reference(**inputs, **options, prune=prune))


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
