"""The Triton low-rank linear agrees with the reference in the interpreter; it compiles for GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from prunelm import ops
from prunelm.ops.low_rank_linear import low_rank_linear_reference
from prunelm.triton_kernels.low_rank_linear import (
    FUSED_SHARED,
    SHORTEST_PART,
    Device,
    fuses,
    low_rank_linear,
    tiles,
)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "M, K, R, N, activation",
    [
        pytest.param(1, 65, 9, 33, None, id="one-row"),
        pytest.param(19, 1031, 40, 70, "gelu", id="ragged-parts"),
        pytest.param(70, 700, 33, 65, "relu", id="many-rows"),
        pytest.param(2, 9, 0, 5, "silu", id="rank-0"),
        pytest.param(3, 0, 4, 5, "silu", id="no-inputs"),
        pytest.param(0, 9, 4, 5, None, id="no-rows"),
        pytest.param(3, 9, 4, 0, None, id="no-outputs"),
    ],
)
def test_low_rank_linear(
    M: int, K: int, R: int, N: int, activation: str | None, dtype: torch.dtype, fused: bool
) -> None:
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    down, up = (torch.randn(R, K) / 8).to(dtype), torch.randn(N, R).to(dtype)
    for b in (bias, None):
        y = low_rank_linear(x, down, up, b, activation=activation, fused=fused)
        wide = (x.double(), down.double(), up.double(), None if b is None else b.double())
        truth = low_rank_linear_reference(*wide, activation)
        size = wide[0].abs() @ wide[1].abs().T @ wide[2].abs().T + 1
        allowed = 4 * torch.finfo(dtype).eps * size
        assert bool(((y.double() - truth).abs() <= allowed).all())


def test_a_rank_beyond_one_launch() -> None:
    x, down, up = torch.randn(2, 40), torch.randn(521, 40) / 8, torch.randn(7, 521)
    y = low_rank_linear(x, down, up, None)
    expected = low_rank_linear_reference(x, down, up)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=r"down: expected at most 256 rows if fused, got 521"):
        low_rank_linear(x, down, up, None, fused=True)


def test_gradients_and_compile_go_through_the_backend() -> None:
    """Forward in Triton; backward is shared with the other backends."""
    x, down, up = torch.randn(2, 3, 30), torch.randn(9, 30), torch.randn(40, 9)
    leaves = [t.requires_grad_() for t in (x, down, up, torch.randn(40))]

    def run(backend: str) -> torch.Tensor:
        return ops.low_rank_linear(*leaves, "silu", backend=backend)

    expected = torch.autograd.grad(run("reference").square().mean(), leaves)
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        got = torch.autograd.grad(function("triton").square().mean(), leaves)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_one_launch_where_it_fills_the_device() -> None:
    for M, R, device, expected in (
        (132 * 64, 256, Device(), True),
        (133 * 64, 256, Device(), False),  # a second wave for one program
        (25000, 256, Device(), True),
        (4096, 256, Device(), False),
        (132 * 64, 257, Device(), False),
        (132 * 64, 256, Device(132, 99 * 1024), False),
    ):
        assert fuses(M, R, 2, device) == expected


@pytest.mark.parametrize("M", [1, 16, 40, 64, 130, 700, 5000])
@pytest.mark.parametrize("R", [1, 33, 100, 256, 1000])
def test_tiles_divide_the_parts(M: int, R: int) -> None:
    for parts in (1, 2, 3, 8):
        for tile in tiles(M, 4096, R, 4096, parts, 2, Device()):
            assert SHORTEST_PART % tile.depth == 0
            assert tile.rows * tile.cols // (32 * tile.warps) <= 128  # float32 sums of a thread


def test_kernels_compile_to_tensor_core_instructions(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "compiled_low_rank.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) == 19
    large = {80: "mma", 90: "wgmma", 100: "tcgen05"}
    for kernel in kernels:
        few = "M=1 " in kernel["label"] or "M=33 " in kernel["label"]
        instruction = "mma" if few else large[kernel["sm"]]
        assert kernel[instruction] > 0, kernel
        assert kernel["copies"] > 0, kernel
        assert kernel["STACK"] == kernel["LOCAL"] == 0, kernel
        fused = kernel["label"].startswith("fused")
        assert kernel["shared"] <= (FUSED_SHARED if fused else 99 * 1024), kernel
