"""The Triton beam step agrees with the reference in the interpreter, and compiles for GPUs."""

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from prunelm import ops
from prunelm.ops.beam_step import beam_step_reference
from prunelm.triton_kernels.beam_step import beam_step

# Where a mask discards it, -inf meets inf in the interpreter's numpy.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")


def beam_inputs(B: int, W: int, V: int, terms: int) -> dict[str, Any]:
    weights = torch.randn(3, B)
    kinds = (torch.float32, torch.float16, torch.float32)
    return {
        "score": torch.randn(B, W),
        "am_logits": 2 * torch.randn(B, W, V),
        "terms": [
            (torch.randn(5, V).log_softmax(-1).to(kind), torch.randint(5, (B, W)), weight)
            for kind, weight in zip(kinds, weights, strict=True)
        ][:terms],
    }


def assert_same_step(inputs: dict[str, Any]) -> None:
    score, parent, token, parts, bad = beam_step(**inputs)
    expected = beam_step_reference(**inputs)
    assert torch.equal(parent, expected.parent)
    assert torch.equal(token, expected.token)
    assert torch.equal(bad, expected.bad)
    torch.testing.assert_close(score, expected.score, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(parts, expected.parts, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("prune", ["late", "early", "after"])
@pytest.mark.parametrize(
    "B, W, V, terms, options",
    [
        pytest.param(2, 3, 37, 0, {}, id="no-terms"),
        pytest.param(1, 4, 70, 3, {"silent": (0, 5), "temperature": 1.7}, id="three-terms"),
        pytest.param(3, 2, 33, 2, {"weigh_blank": True, "blank_penalty": 0.7}, id="weigh-blank"),
        pytest.param(1, 9, 5, 1, {"silent": (4,)}, id="wider-than-v"),
        pytest.param(1, 1, 1, 1, {}, id="one-token"),
        pytest.param(0, 2, 7, 1, {}, id="no-utterance"),
    ],
)
def test_beam_step(prune: str, B: int, W: int, V: int, terms: int, options: dict[str, Any]) -> None:
    inputs = {**beam_inputs(B, W, V, terms), **options, "prune": prune}
    slot = torch.tensor([0, 0, 1, 2, 0, 3, 0, 1, 0])[torch.arange(B * W) % 9].view(B, W)
    assert_same_step({**inputs, "slot": slot, "token_reward": torch.randn(B)})


@pytest.fixture
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary takes several stretches."""
    monkeypatch.setattr("prunelm.triton_kernels.beam_step.MAX_COLS", 32)


@pytest.mark.usefixtures("short_stretches")
@pytest.mark.parametrize("prune", ["late", "early", "after"])
@pytest.mark.parametrize("W, V", [(3, 130), (9, 65), (2, 64)])
def test_long_rows(prune: str, W: int, V: int) -> None:
    options = {"prune": prune, "temperature": 0.8, "weigh_blank": W == 2, "silent": (V - 1, 1)}
    assert_same_step({**beam_inputs(2, W, V, 2), **options})


@pytest.mark.usefixtures("short_stretches")
@pytest.mark.parametrize("direction", [1, -1])
def test_ordered_and_repeated_logits(direction: int) -> None:
    inputs = beam_inputs(1, 4, 101, 0)
    inputs["score"][:] = torch.tensor([0.0, -1.0, 0.0, -torch.inf])
    inputs["am_logits"][:] = direction * torch.arange(101).div(5, rounding_mode="floor")
    assert_same_step(inputs)


def test_float64() -> None:
    inputs = {k: v.double() for k, v in beam_inputs(2, 3, 40, 0).items() if k != "terms"}
    assert_same_step(inputs)


@pytest.mark.parametrize("prune", ["late", "early", "after"])
@pytest.mark.parametrize("V", [31, 70])
def test_ties_go_to_the_lowest_parent_then_the_lowest_token(prune: str, V: int) -> None:
    _, parent, token, _, _ = beam_step(torch.zeros(1, 3), torch.zeros(1, 3, V), prune=prune)
    assert parent.tolist() == [[0, 0, 0]]
    assert token.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("prune", ["late", "early", "after"])
def test_nan_infinity_and_dead_slots_touch_their_own_hypothesis_only(prune: str) -> None:
    inputs = beam_inputs(5, 2, 40, 1)
    inputs["am_logits"][0, 1, 33] = torch.nan
    inputs["am_logits"][1, 1] = -torch.inf
    inputs["am_logits"][2, 0, 3] = torch.inf
    inputs["am_logits"][3, 0, :38] = -torch.inf
    inputs["score"][4] = -torch.inf
    assert_same_step({**inputs, "prune": prune})


def test_a_row_out_of_range_is_bad_and_not_read() -> None:
    inputs = beam_inputs(2, 2, 9, 1)
    inputs["terms"][0][1][0, 0] = 5
    slot = torch.tensor([[0, 0], [0, 3]])
    assert beam_step(**inputs, slot=slot)[4].tolist() == [True, False]


def test_gradients_go_through_the_backend() -> None:
    inputs = beam_inputs(1, 3, 20, 1)
    inputs["am_logits"].requires_grad_()
    scores = [ops.beam_step(**inputs, backend=name).score for name in ("triton", "reference")]
    gradients = [torch.autograd.grad(s.sum(), inputs["am_logits"])[0] for s in scores]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from prunelm.triton_kernels.beam_step import _merge, _row

POINTERS = {"p_slot": "*i64", "p_token": "*i64", "p_new_token": "*i64", "p_parent": "*i64",
            "p_spoiled": "*i32", "p_bad": "*i1"}

def compile(kernel, capability, warps, constants, kind):
    types = {**dict.fromkeys(constants, "constexpr"), **dict.fromkeys(("W", "V", "own"), "i32"),
             "terms": (("*fp16", "*fp32"), ("*i64",) * 2, (kind,) * 2, ("i32",) * 2), **POINTERS}
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature={name: types.get(name, kind) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={place: [["tt.divisibility", 16]] for i, name in enumerate(names)
               for place in ([(i,)] if name.startswith("p_") else
                             [(i, 0, 0), (i, 0, 1)] if name == "terms" else [])},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                              options={"num_warps": warps})
    print("KERNEL", kernel.__name__, capability, compiled.metadata.shared)
    print(compiled.asm["ptx"])

for capability, prune, kind in ((80, "late", "*fp32"), (90, "late", "*fp32"),
                                (90, "early", "*fp32"), (90, "after", "*fp64"),
                                (100, "late", "*fp32")):
    shared = {"TERMS": 2, "SILENT": (0, 7), "HAS_REWARD": True, "PRUNE": prune, "BEAM": 8}
    compile(_row, capability, 16, {**shared, "TEMPERATURE": 1.0, "PENALTY": 0.5,
            "WEIGH_BLANK": True, "HAS_SLOT": True, "ALIGNED": 8, "COLS": 8192}, kind)
    compile(_merge, capability, 1, {**shared, "COUNT": 64}, kind)
"""


def test_kernels_compile(tmp_path: Any) -> None:
    """In a process of its own: what was imported for the interpreter cannot be compiled."""
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    kernels = result.stdout.split("KERNEL ")[1:]
    assert len(kernels) == 10
    for kernel in kernels:
        head = kernel.split("\n", 1)[0]
        assert int(head.split()[-1]) <= 48 * 1024, f"{head}: too much shared memory"
        assert ".local" not in kernel, f"{head}: local memory"
        if head.startswith("_row"):
            # Logits come 16 bytes at a time, however many rows lie before them.
            assert re.search(r"ld\.global\S*\.v[248]\.b(32|64)", kernel), f"{head}: narrow loads"
