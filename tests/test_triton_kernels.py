"""The Triton kernels agree with the references in the interpreter, and compile for GPUs."""

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from prunelm import ops
from prunelm.ops.low_rank_linear import low_rank_linear_reference
from prunelm.sparse import BlockSparse
from prunelm.triton_kernels.low_rank_linear import low_rank_linear

# Where a mask discards it, -inf meets inf in the interpreter's numpy.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")


@pytest.mark.parametrize(
    "M, K, R, N, activation",
    [
        pytest.param(1, 65, 9, 33, None, id="one-row"),
        pytest.param(19, 31, 40, 70, "gelu", id="ragged"),
        pytest.param(2, 9, 0, 5, "silu", id="rank-0"),
        pytest.param(0, 9, 4, 5, None, id="no-rows"),
    ],
)
def test_low_rank_linear(M: int, K: int, R: int, N: int, activation: str | None) -> None:
    x, bias = torch.randn(M, K), torch.randn(N)
    down, up = torch.randn(R, K) / 8, torch.randn(N, R)
    y = low_rank_linear(x, down, up, bias, activation=activation)
    expected = low_rank_linear_reference(x, down, up, bias, activation)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-5)


def test_low_rank_linear_refuses_a_large_rank() -> None:
    with pytest.raises(ValueError, match=r"down: expected at most 512 rows for Triton, got 513"):
        low_rank_linear(torch.ones(1, 4), torch.ones(513, 4), torch.ones(2, 513), None)


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
from prunelm.triton_kernels import low_rank_linear

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

sizes = dict.fromkeys("MKNR", "i32")
for capability in (80, 90):
    ptx(low_rank_linear._kernel, capability,
        {"ROWS": 16, "COLS": 32, "DEPTH": 32, "RANK": 64, "HAS_BIAS": False, "ACTIVATION": "none"},
        {"*bf16": "p_x p_down p_up p_bias p_y"}, sizes)
"""


def test_kernels_compile_to_tensor_core_instructions(tmp_path: Any) -> None:
    """In a process of its own: what was imported for the interpreter cannot be compiled."""
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    kernels = result.stdout.split("KERNEL ")[1:]
    assert len(kernels) == 4
    wanted = [r"mma\.sync.*bf16", r"mma\.sync.*bf16"]
    for kernel, instruction in zip(kernels, wanted, strict=False):
        head = kernel.split("\n", 1)[0]
        assert re.search(instruction, kernel), f"{head}: no {instruction}"
        assert "cp.async" in kernel, f"{head}: no asynchronous copies"
        assert int(head.split()[-1]) <= 99 * 1024, f"{head}: too much shared memory"
