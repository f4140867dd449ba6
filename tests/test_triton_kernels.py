"""The Triton kernels agree with the references in the interpreter, and compile for GPUs."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from prunelm import ops
from prunelm.ops.beam_step import beam_step_reference
from prunelm.sparse import BlockSparse
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


@pytest.mark.parametrize("prune", ["late", "early", "after"])
def test_ties_go_to_the_lowest_parent_then_the_lowest_token(prune: str) -> None:
    _, parent, token, _, _ = beam_step(torch.zeros(1, 3), torch.zeros(1, 3, 70), prune=prune)
    assert parent.tolist() == [[0, 0, 0]]
    assert token.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("prune", ["late", "after"])
def test_nan_infinity_and_dead_slots_touch_their_own_hypothesis_only(prune: str) -> None:
    inputs = beam_inputs(5, 2, 40, 1)
    inputs["am_logits"][0, 1, 33] = torch.nan
    inputs["am_logits"][1, 1] = -torch.inf
    inputs["am_logits"][2, 0, 3] = torch.inf
    inputs["am_logits"][3, 0, :38] = -torch.inf
    inputs["score"][4] = -torch.inf
    assert_same_step({**inputs, "prune": prune})


def test_gradients_and_compile_go_through_the_backend() -> None:
    """Forward in Triton; backward is shared with the other backends."""
    mask = torch.rand(3, 4) < 0.6
    weight = BlockSparse.from_dense(torch.randn(40, 30), (16, 8), mask)
    x, down, up = torch.randn(2, 3, 30), torch.randn(9, 30), torch.randn(40, 9)
    values, bias = weight.values, torch.randn(40)
    leaves = [t.requires_grad_() for t in (x, values, bias, down, up)]

    def run(backend: str) -> torch.Tensor:
        blocks = BlockSparse(values, weight.crow, weight.col, weight.shape)
        y = ops.block_sparse_linear(x, blocks, bias, "gelu", backend=backend)
        return y * ops.low_rank_linear(x, down, up, bias, "silu", backend=backend)

    expected = torch.autograd.grad(run("reference").square().mean(), leaves)
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        got = torch.autograd.grad(function("triton").square().mean(), leaves)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    inputs = beam_inputs(1, 3, 20, 1)
    inputs["am_logits"].requires_grad_()
    scores = [ops.beam_step(**inputs, backend=name).score for name in ("triton", "reference")]
    gradients = [torch.autograd.grad(s.sum(), inputs["am_logits"])[0] for s in scores]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_a_backend_that_cannot_run_says_why() -> None:
    weight = torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"triton cannot run low_rank_linear: x: expected"):
        ops.low_rank_linear(weight, weight, weight, backend="triton")
    with pytest.raises(ValueError, match=r"cuda cannot run low_rank_linear: .*x: expected"):
        ops.low_rank_linear(weight, weight, weight, backend="cuda")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from prunelm.triton_kernels import beam_step

def ptx(kernel, capability, constants, pointers, others):
    types = {**dict.fromkeys(constants, "constexpr"), **others}
    for kind, names in pointers.items():
        types.update(dict.fromkeys(names.split(), kind))
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # Without these, loads go one by one and nothing is copied asynchronously.
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if isinstance(types[name], str) and types[name] != "constexpr"},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    print("KERNEL", kernel.__name__, capability, compiled.metadata.shared)
    print(compiled.asm["ptx"])

options = {"TEMPERATURE": 1.0, "PENALTY": 0.0, "TERMS": 1, "SILENT": (0,), "WEIGH_BLANK": False,
           "HAS_SLOT": True, "HAS_REWARD": False, "BEAM": 4, "PRUNE": "late"}
found = {"*fp32": "p_score p_logits p_reward p_high p_log_sum p_total p_parts",
         "*i64": "p_slot p_key p_parent p_token", "*i32": "p_spoiled", "*i1": "p_bad"}
others = {"terms": (("*fp32",), ("*i64",), ("*fp32",), ("i32",)), "W": "i32", "V": "i32",
          "own": "i32"}
ptx(beam_step._pick, 90, {**options, "COLS": 64}, found, others)
ptx(beam_step._write, 90, options, found, others)
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
    assert len(kernels) == 2
