"""The CUDA beam step, run on the CPU (tests/cuda_emulation), agrees with the reference."""

from collections.abc import Callable
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


# Bytes of shared memory for which rows stay in global memory, and for which they do not but two
# launches are needed.
NO_ROW, NO_BEAM = 4000, 8000


@pytest.mark.parametrize("prune", ["late", "early", "after"])
@pytest.mark.parametrize(
    "W, V, options",
    [
        pytest.param(3, 1030, {}, id="a-block-a-hypothesis"),
        pytest.param(5, 1500, {"most_shared": NO_ROW, "temperature": 0.7}, id="rows-not-staged"),
        pytest.param(2, 777, {"most_shared": NO_ROW, "weigh_blank": True}, id="odd-not-staged"),
        pytest.param(33, 150, {"blank_penalty": 0.3, "silent": (149, 2)}, id="wide"),
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


@pytest.mark.parametrize(
    "W, V, high",
    [
        pytest.param(16, 1024, lambda v: v // 4 % 32 < 8, id="few-lanes-hold-the-best"),
        pytest.param(65, 600, lambda v: v >= 0, id="wider-than-the-team"),
    ],
)
def test_more_candidates_than_a_team_lists(
    kernels: Kernels, W: int, V: int, high: Callable[[Tensor], Tensor]
) -> None:
    inputs = beam_inputs(1, W, V, 1, torch.float32)
    inputs["score"][:, 2:] = -torch.inf
    inputs["am_logits"] += 20 * high(torch.arange(V))
    assert_same_step(kernels.beam_step(**inputs), beam_step_reference(**inputs))


@pytest.mark.parametrize("V", [37, 600, 1100])
@pytest.mark.parametrize("direction", [1, -1])
def test_ordered_and_repeated_logits(kernels: Kernels, V: int, direction: int) -> None:
    """The best lie side by side, and many are equal."""
    inputs = beam_inputs(1, 4, V, 0, torch.float32)
    inputs["score"][:] = torch.tensor([0.0, -1.0, 0.0, -torch.inf])
    inputs["am_logits"][:] = direction * torch.arange(V).div(5, rounding_mode="floor")
    assert_same_step(kernels.beam_step(**inputs), beam_step_reference(**inputs))


@pytest.mark.parametrize("V, most_shared", [(40, 1 << 16), (1029, 1 << 16), (1029, NO_ROW)])
def test_beam_step_in_float64(kernels: Kernels, V: int, most_shared: int) -> None:
    inputs = beam_inputs(2, 3, V, 3, torch.float64)
    got = kernels.beam_step(**inputs, most_shared=most_shared)
    assert_same_step(got, beam_step_reference(**inputs))


@pytest.mark.parametrize("logits, scores", [("float32", "float64"), ("float64", "float32")])
def test_scores_and_logits_of_two_widths(kernels: Kernels, logits: str, scores: str) -> None:
    inputs = beam_inputs(2, 3, 50, 3, getattr(torch, scores))
    inputs["am_logits"] = inputs["am_logits"].to(getattr(torch, logits))
    score, parent, token, parts, bad = kernels.beam_step(**inputs)
    expected = beam_step_reference(**inputs)
    assert torch.equal(parent, expected.parent)
    assert torch.equal(token, expected.token)
    torch.testing.assert_close(score, expected.score, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts, expected.parts, rtol=1e-5, atol=1e-5)
    assert not bad.any()


@pytest.mark.parametrize("most_shared", [1 << 16, NO_ROW])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_rows_that_begin_anywhere(kernels: Kernels, offset: int, most_shared: int) -> None:
    """Views whose memory is aligned to an element, and to nothing more."""
    inputs = beam_inputs(1, 2, 1032, 3, torch.float32)

    def moved(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape)

    inputs["am_logits"] = moved(inputs["am_logits"])
    inputs["terms"] = [(moved(rows), row, weight) for rows, row, weight in inputs["terms"]]
    got = kernels.beam_step(**inputs, most_shared=most_shared)
    assert_same_step(got, beam_step_reference(**inputs))


@pytest.mark.parametrize("prune", ["late", "early", "after"])
@pytest.mark.parametrize("V", [65, 1100])
def test_ties_go_to_the_lowest_parent_then_the_lowest_token(
    kernels: Kernels, prune: str, V: int
) -> None:
    score, logits = torch.zeros(1, 3), torch.zeros(1, 3, V)
    _, parent, token, _, bad = kernels.beam_step(score, logits, prune=prune)
    assert parent.tolist() == [[0, 0, 0]]
    assert token.tolist() == [[0, 1, 2]]
    assert not bad.item()


@pytest.mark.parametrize("prune", ["late", "early", "after"])
@pytest.mark.parametrize("most_shared", [1 << 16, NO_BEAM, NO_ROW])
def test_nan_infinity_and_dead_slots_touch_their_own_hypothesis_only(
    kernels: Kernels, prune: str, most_shared: int
) -> None:
    inputs = beam_inputs(5, 4, 40, 1, torch.float32)
    inputs["am_logits"][0, 1, 33] = torch.nan
    inputs["am_logits"][1, 2] = -torch.inf
    inputs["am_logits"][2, 0, 3] = torch.inf
    inputs["am_logits"][3, 0, :38] = -torch.inf
    inputs["score"][4] = -torch.inf
    got = kernels.beam_step(**inputs, prune=prune, most_shared=most_shared)
    assert_same_step(got, beam_step_reference(**inputs, prune=prune))
    assert got[4].tolist() == [True, False, True, False, False]
    assert got[1][4].tolist() == [0, 1, 2, 3]


def test_a_row_out_of_range_is_bad_and_not_read(kernels: Kernels) -> None:
    inputs = beam_inputs(2, 2, 9, 1, torch.float32)
    inputs["terms"][0][1][0, 0] = 5
    slot = torch.tensor([[0, 0], [0, DEAD]])
    assert kernels.beam_step(**inputs, slot=slot)[4].tolist() == [True, False]
