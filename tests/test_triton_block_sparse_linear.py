"""block_sparse_linear in Triton: right in the interpreter, compiled as it should be for GPUs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tolerance import assert_as_accurate

from prunelm import ops
from prunelm.benchmarks.tune_block_sparse import M_BUCKETS, tune
from prunelm.nn import BlockSparseLinear
from prunelm.ops.block_sparse_linear import block_sparse_linear_reference
from prunelm.sparse import BlockSparse
from prunelm.triton_kernels.block_sparse_gradient import block_sparse_linear_grad_values
from prunelm.triton_kernels.block_sparse_linear import (
    block_sparse_linear,
    block_sparse_linear_grad_x,
)

HERE = Path(__file__).parent
SHAPES = [
    pytest.param(1, 37, 51, (16, 4), 0.4, None, id="one-row"),
    pytest.param(70, 33, 65, (16, 16), 0.5, "gelu", id="ragged"),
    pytest.param(63, 100, 96, (32, 16), 0.3, "silu", id="few-rows-of-rectangles"),
    pytest.param(65, 200, 96, (64, 32), 0.5, None, id="rectangles"),
    pytest.param(130, 256, 192, (64, 64), 0.5, "relu", id="two-rows-of-blocks-together"),
    pytest.param(3, 13, 7, (1, 1), 0.3, "relu", id="elements"),
    pytest.param(5, 20, 33, (7, 3), 0.5, None, id="no-power-of-two"),
    pytest.param(2, 170, 140, (140, 100), 0.6, "silu", id="blocks-beyond-a-tile"),
    pytest.param(9, 300, 290, (128, 256), 0.7, None, id="deep-blocks"),
    pytest.param(4, 20, 33, (7, 3), 0.0, "gelu", id="all-pruned"),
    pytest.param(0, 8, 8, (4, 4), 0.5, None, id="no-rows"),
    pytest.param(3, 0, 8, (4, 4), 0.5, "relu", id="no-columns"),
]


def weight_of(
    N: int, K: int, block: tuple[int, int], keep: float, dtype: torch.dtype = torch.float32
) -> BlockSparse:
    mask = torch.rand(-(-N // block[0]), -(-K // block[1])) < keep
    return BlockSparse.from_dense((torch.randn(N, K)).to(dtype), block, mask)


def exactly(weight: BlockSparse) -> BlockSparse:
    return BlockSparse(weight.values.double(), weight.crow, weight.col, weight.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("M, K, N, block, keep, activation", SHAPES)
def test_forward(
    M: int,
    K: int,
    N: int,
    block: tuple[int, int],
    keep: float,
    activation: str | None,
    dtype: torch.dtype,
) -> None:
    weight = weight_of(N, K, block, keep, dtype)
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    parts = (weight.values, weight.crow, weight.col)
    for b in (bias, None):
        y = block_sparse_linear(x, *parts, b, out_features=N, activation=activation)
        dense = block_sparse_linear_reference(x, weight, b, activation)
        exact = block_sparse_linear_reference(x.double(), exactly(weight), b, activation)
        assert_as_accurate(y, dense, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("M, K, N, block, keep, activation", SHAPES)
def test_gradients(
    M: int,
    K: int,
    N: int,
    block: tuple[int, int],
    keep: float,
    activation: str | None,
    dtype: torch.dtype,
) -> None:
    weight = weight_of(N, K, block, keep, dtype)
    x, grad = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)

    def expected(x: Tensor, weight: BlockSparse, grad: Tensor) -> tuple[Tensor, ...]:
        x, values = x.detach().requires_grad_(), weight.values.detach().requires_grad_()
        stored = BlockSparse(values, weight.crow, weight.col, weight.shape)
        return torch.autograd.grad(block_sparse_linear_reference(x, stored), (x, values), grad)

    pattern = (weight.crow, weight.col, weight.with_gpu_index().gpu_index)
    got = (
        block_sparse_linear_grad_x(grad, weight.values, *pattern, in_features=K),
        block_sparse_linear_grad_values(grad, x, *pattern, block=block),
    )
    dense = expected(x, weight, grad)
    exact = expected(x.double(), exactly(weight), grad.double())
    for one in zip(got, dense, exact, strict=True):
        assert_as_accurate(*one)
    assert got[1].transpose(1, 2).is_contiguous()


def test_rows_are_shared_out_where_blocks_are_few() -> None:
    """The gradient to values sums over rows in several programs, always in the same order."""
    weight = weight_of(32, 32, (16, 16), 0.6)
    x, grad = torch.randn(1100, 32), torch.randn(1100, 32)
    got, again = (
        block_sparse_linear_grad_values(grad, x, weight.crow, weight.col, block=(16, 16))
        for _ in range(2)
    )
    dense = (grad.double().T @ x.double()).float()
    at = BlockSparse.from_dense(dense, (16, 16), weight.to_dense()[::16, ::16] != 0)
    torch.testing.assert_close(got, at.values, rtol=1e-5, atol=1e-4)
    assert torch.equal(got, again)


def test_what_lies_past_the_edge_is_not_read_and_gets_no_gradient() -> None:
    weight = weight_of(18, 21, (16, 16), 1.0)
    x, grad = torch.randn(4, 21), torch.full((4, 18), torch.nan)
    expected = block_sparse_linear_reference(x, weight)
    weight.values[1::2, :, 5:] = torch.nan
    weight.values[2:, 2:] = torch.nan
    y = block_sparse_linear(x, weight.values, weight.crow, weight.col, None, out_features=18)
    torch.testing.assert_close(y, expected)
    got = block_sparse_linear_grad_values(grad, x, weight.crow, weight.col, block=(16, 16))
    assert not got[1::2, :, 5:].any() and not got[2:, 2:].any()
    assert got[0].isnan().all()


@pytest.mark.parametrize("block", [(16, 16), (64, 64), (7, 3)], ids=str)
def test_a_row_does_not_depend_on_its_neighbours(block: tuple[int, int]) -> None:
    weight, x = weight_of(130, 200, block, 0.4), torch.randn(150, 200)
    parts = (weight.values, weight.crow, weight.col, None, weight.with_gpu_index().gpu_index)
    for Ms in ((1, 2, 17, 40, 63), (64, 65, 150)):
        whole = block_sparse_linear(x[: Ms[-1]], *parts, out_features=130)
        for M in Ms:
            assert torch.equal(block_sparse_linear(x[:M], *parts, out_features=130), whole[:M]), (
                f"M = {M}"
            )


def test_gradients_and_compile_go_through_the_backend() -> None:
    weight = weight_of(40, 30, (16, 8), 0.6)
    x, values, bias = torch.randn(2, 3, 30), weight.values, torch.randn(40)
    leaves = [t.requires_grad_() for t in (x, values, bias)]

    def run(backend: str, gpu_index: Tensor | None = None) -> Tensor:
        blocks = BlockSparse(values, weight.crow, weight.col, weight.shape, gpu_index)
        y = ops.block_sparse_linear(x, blocks, bias, "gelu", backend=backend)
        return y.square().mean()

    expected = torch.autograd.grad(run("reference"), leaves)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for function in (run, compiled):
        for gpu_index in (None, weight.with_gpu_index().gpu_index):
            got = torch.autograd.grad(function("triton", gpu_index), leaves)
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("indexed", [False, True])
def test_opcheck(indexed: bool) -> None:
    weight = weight_of(18, 21, (16, 4), 0.6)
    gpu_index = weight.with_gpu_index().gpu_index if indexed else None
    x, bias = torch.randn(3, 21, requires_grad=True), torch.randn(18, requires_grad=True)
    values, grad = weight.values.detach().requires_grad_(), torch.randn(3, 18)
    pattern, op = (weight.crow, weight.col), torch.ops.prunelm
    for name, arguments in (
        ("block_sparse_linear", (x, values, *pattern, bias, 18, 2, gpu_index)),
        ("block_sparse_linear_triton", (x, values, *pattern, bias, 18, 2, gpu_index)),
        ("block_sparse_linear_grad_x_triton", (grad, weight.values, *pattern, 21, gpu_index)),
        ("block_sparse_linear_grad_values_triton", (grad, x.detach(), *pattern, 16, 4, gpu_index)),
    ):
        torch.library.opcheck(getattr(op, name).default, arguments)


def test_a_schedule_of_another_pattern_is_refused() -> None:
    weight, other = weight_of(18, 21, (16, 4), 0.6), weight_of(18, 21, (16, 4), 0.9)
    wrong = BlockSparse(
        weight.values, weight.crow, weight.col, weight.shape, other.with_gpu_index().gpu_index
    )
    with pytest.raises(ValueError, match=r"gpu_index: expected int32 \[\d+\] for \d+ blocks, got"):
        ops.block_sparse_linear(torch.ones(1, 21), wrong, backend="triton")


def test_an_unscheduled_module_trains() -> None:
    module = BlockSparseLinear(weight_of(33, 50, (16, 4), 0.5), torch.zeros(33))
    assert module.gpu_index is None and "gpu_index" not in module.state_dict()
    y = ops.block_sparse_linear(torch.randn(4, 50), module.weight, module.bias, backend="triton")
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


SHARED = {80: 163, 90: 227, 100: 227}  # KB that a program may have


def check_compiled(facts: dict[str, Any]) -> None:
    name, capability, bn = facts["name"], facts["capability"], facts["block"][0]
    assert facts["stack"] == facts["local"] == 0, f"{name}: spills"
    assert facts["shared"] <= SHARED[capability] * 1024, f"{name}: shared memory"
    assert not facts["serialised"], f"{name}: wgmma instructions wait for each other"
    if facts["dtype"] == "torch.float32" and not facts["tf32"]:
        assert facts["mma"] + facts["wgmma"] + facts["tcgen05"] == 0, f"{name}: not exact"
    elif bn >= 16:
        unit = {80: "mma", 90: "wgmma", 100: "tcgen05"}[capability]
        few = 0 < facts["M"] < 64 and facts["dtype"] == "torch.float32"
        assert facts[unit] or (few and facts["mma"]), f"{name}: no {unit}"
    if bn >= 16 and facts["even"]:
        assert facts["copies"], f"{name}: no asynchronous copies"
        if facts["dtype"] != "torch.float32" and min(facts["block"]) >= 16:
            assert facts["wide"] == facts["copies"], f"{name}: copies of less than 16 bytes"


@pytest.mark.parametrize("which", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_compiled_for_gpus(which: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(HERE / "compiled_block_sparse.py"), which],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert len(lines) >= 13
    for line in lines:
        check_compiled(json.loads(line))


def test_tuning_puts_the_fastest_tile_first() -> None:
    calls: list[float] = []

    def time_us(call: Callable[[], object]) -> float:
        call()
        calls.append(float(-len(calls)))
        return calls[-1]

    found = tune((16, 16), torch.float32, (32, 48), seconds=0.0, time_us=time_us)
    assert [len(times) for times in found.values()] == [1] * len(M_BUCKETS)
    found = tune((16, 16), torch.float32, (16, 16), seconds=0.1, time_us=time_us)
    for times in found.values():
        assert [us for _, us in times] == sorted(us for _, us in times)
