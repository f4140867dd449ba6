"""The CUDA low-rank linear, run on the CPU (tests/cuda_emulation), agrees with float64."""

import pytest
import torch
from cuda_emulation.emulated import Kernels, assert_accurate

from prunelm.ops.activation import activate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
