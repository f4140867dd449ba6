"""beam_step past the dispatcher: the op's own results, and the op where only that will do."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from listeners import LISTENERS, listening
from torch import Tensor

import prunelm._C
from prunelm.ops.beam_step import beam_step

OP = torch.ops.prunelm.beam_step.default
Arguments = dict[str, Any]


def example(B: int = 3, W: int = 4, V: int = 70, dtype: torch.dtype = torch.float32) -> Arguments:
    g = torch.Generator().manual_seed(V)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    terms = tuple(
        (normal(6, V), torch.randint(0, 6, (B, W), generator=g), normal(B)) for _ in range(2)
    )
    return {
        "score": normal(B, W),
        "am_logits": normal(B, W, V),
        "terms": terms,
        "slot": torch.randint(0, 4, (B, W), generator=g),
        "silent": (0, V - 1),
        "token_reward": normal(B),
        "temperature": 1.5,
        "blank_penalty": 0.25,
        "prune": "late",
        "weigh_blank": False,
        "normalise": False,
    }


def direct(values: Arguments) -> tuple[Tensor, ...] | None:
    return prunelm._C.beam_step(*values.values())


def through_dispatcher(values: Arguments) -> tuple[Tensor, ...]:
    score, am_logits, terms, slot, silent, reward, *rest, normalise = values.values()
    rows, row, weight = (list(x) for x in zip(*terms, strict=True)) if terms else ([], [], [])
    if isinstance(reward, float):
        reward = score.new_full(score.shape[:1], reward)
    assert not normalise
    out: tuple[Tensor, ...] = OP(
        score, am_logits, rows, row, weight, slot, list(silent), reward, *rest
    )
    return out


CHANGES: list[Arguments] = [
    {},
    {"prune": "early"},
    {"prune": "after", "slot": None},
    {"weigh_blank": True, "token_reward": None},
    {"token_reward": -0.75},
    {"token_reward": 0.0, "temperature": 1.0, "blank_penalty": 0.0},
    {"terms": ()},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_same_numbers(dtype: torch.dtype, change: Arguments) -> None:
    for V in (3, 70):
        values = {**example(V=V, dtype=dtype), **change}
        want = through_dispatcher(values)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                got = direct(values)
                called = beam_step(**values)
            assert got is not None
            for one, named, other in zip(got, called, want, strict=True):
                assert torch.equal(one, other) and torch.equal(named, other)
                assert one.dtype == other.dtype and one.stride() == other.stride()
                assert one.is_inference() == (mode is torch.inference_mode)


def test_scores_may_be_wider_than_logits_and_rows_narrower() -> None:
    values = example()
    values["terms"] = tuple((r.bfloat16(), row, w.double()) for r, row, w in values["terms"])
    values |= {"score": values["score"].double(), "token_reward": values["token_reward"].double()}
    with torch.no_grad():
        got = direct(values)
    assert got is not None
    assert all(torch.equal(a, b) for a, b in zip(got, through_dispatcher(values), strict=True))


@pytest.mark.parametrize("prune", ["late", "early", "after"])
@pytest.mark.parametrize("V", [1, 3, 16, 70, 500])
@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_of_logits_are_normalised(
    dtype: torch.dtype, rows_dtype: torch.dtype, V: int, prune: str
) -> None:
    values = {**example(V=V, dtype=dtype), "prune": prune, "silent": (0,), "normalise": True}
    (rows, row, weight), second = values["terms"]
    # A term of weight 0 is not read.
    weight[1] = 0
    values["terms"] = ((10 * rows.to(rows_dtype) + 30, row, -weight.abs()), second)
    with torch.no_grad():
        got = direct(values)
        called = beam_step(**values)
    assert got is not None
    exact = [(r.double().log_softmax(-1), row, weight) for r, row, weight in values["terms"]]
    plain = {**values, "terms": exact, "normalise": False, "backend": "reference"}
    for want in (beam_step(**plain), beam_step(**values)):
        for one, named, other in zip(got, called, want, strict=True):
            assert torch.equal(one, named)
            if one.dtype.is_floating_point:
                torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-5)
            else:
                assert torch.equal(one, other)


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_row_without_a_softmax_is_bad(spoilt: float) -> None:
    for prune in ("late", "early", "after"):
        values = {**example(), "slot": None, "prune": prune, "normalise": True}
        rows, row, _ = values["terms"][0]
        row[0], row[1:] = 5, 0
        rows[5] = spoilt
        with torch.no_grad():
            got = direct(values)
        want = beam_step(**values, backend="reference")
        assert got is not None and got[4].tolist() == [True, False, False]
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other)


def test_gradients_reach_rows_of_logits() -> None:
    values = {**example(dtype=torch.float64), "normalise": True}
    (rows, row, weight), second = values["terms"]

    def parts(logits: Tensor) -> Tensor:
        return beam_step(**{**values, "terms": ((logits, row, weight), second)}).parts

    assert torch.autograd.gradcheck(parts, rows.requires_grad_())


def test_each_result_lives_alone_and_can_be_written() -> None:
    values = example()
    want = through_dispatcher(values)
    for i in range(5):
        with torch.no_grad():
            got = direct(values)
        assert got is not None
        kept = got[i]
        del got
        gc.collect()
        with torch.no_grad():
            for _ in range(20):
                direct(values)
        assert torch.equal(kept, want[i])
        kept.zero_()
        assert not kept.any()


@pytest.mark.parametrize("kind", LISTENERS)
def test_whoever_listens_gets_the_op(kind: str) -> None:
    values = example()
    want = through_dispatcher(values)
    with listening(kind):
        assert direct(values) is None
        got = beam_step(**values)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def _first_term(values: Arguments, at: int, tensor: Tensor) -> Arguments:
    term = list(values["terms"][0])
    term[at] = tensor
    return {"terms": (tuple(term), *values["terms"][1:])}


OTHERS: dict[str, Callable[[Arguments], Arguments]] = {
    "half-logits": lambda v: {"am_logits": v["am_logits"].half()},
    "strided-logits": lambda v: {"am_logits": v["am_logits"].mT.contiguous().mT},
    "strided-score": lambda v: {"score": v["score"].T.contiguous().T},
    "neg-score": lambda v: {"score": torch._neg_view(-v["score"])},
    "strided-rows": lambda v: _first_term(v, 0, v["terms"][0][0].T.contiguous().T),
    "strided-row": lambda v: _first_term(v, 1, v["terms"][0][1].T.contiguous().T),
    "neg-rows": lambda v: _first_term(v, 0, torch._neg_view(-v["terms"][0][0])),
    "wide-weight": lambda v: _first_term(v, 2, v["terms"][0][2].double()),
    "wide-reward": lambda v: {"token_reward": v["token_reward"].double()},
    "whole-reward": lambda v: {"token_reward": 2},
    "no-utterance": lambda v: example(B=0),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_kernel_does_not_read_as_it_is_goes_through_the_dispatcher(name: str) -> None:
    values = example()
    values |= OTHERS[name](values)
    want = beam_step(**values, backend="cpu")
    with torch.no_grad():
        assert direct(values) is None
        got = beam_step(**values)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


BAD: dict[str, tuple[Callable[[Arguments], Arguments], str]] = {
    "score": (lambda v: {"score": v["score"][:, :3].clone()}, "score: expected size"),
    "logits": (lambda v: {"am_logits": v["am_logits"][0]}, "am_logits: expected 3 dimensions"),
    "slot": (lambda v: {"slot": v["slot"] + 4}, "slot: expected 0 to 3"),
    "slot-dtype": (lambda v: {"slot": v["slot"].int()}, "slot: expected Long, got Int"),
    "rows": (lambda v: _first_term(v, 0, torch.zeros(6, 69)), "rows: expected size 70"),
    "row": (lambda v: {"slot": None, **_first_term(v, 1, v["terms"][0][1] + 6)},
            "row: expected 0 to 5"),
    "negative-row": (lambda v: {"slot": None, **_first_term(v, 1, v["terms"][0][1] - 6)},
                     "row: expected 0 to 5"),
    "weight": (lambda v: _first_term(v, 2, torch.zeros(2)), "weight: expected size 3"),
    "reward": (lambda v: {"token_reward": torch.zeros(4)}, "token_reward: expected size 3"),
    "silent": (lambda v: {"silent": (0, 70)}, "silent: expected tokens from 0 to 69, got 70"),
    "no-blank": (lambda v: {"silent": ()}, "silent: expected at least the blank token"),
    "temperature": (lambda v: {"temperature": 0.0}, "temperature: expected a number above 0"),
    "nan": (lambda v: {"temperature": float("nan")}, "temperature: expected a number above 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused_by_name_without_gradients_too(name: str) -> None:
    values = example()
    change, message = BAD[name]
    values |= change(values)
    with torch.no_grad():
        assert direct(values) is None
        with pytest.raises(RuntimeError, match=message):
            beam_step(**values)
        with pytest.raises(ValueError, match="prune: expected late, early or after"):
            beam_step(**{**example(), "prune": "never"})


def test_wrong_numbers_of_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="expected 11 arguments, got 1"):
        prunelm._C.beam_step(torch.zeros(1))  # type: ignore[call-arg]
