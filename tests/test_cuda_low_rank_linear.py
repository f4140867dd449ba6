"""The CUDA low-rank linear, run on the CPU (tests/cuda_emulation), agrees with float64."""

from collections.abc import Iterator

import pytest
import torch
from cuda_emulation.emulated import Kernels, assert_accurate
from torch import Tensor

from prunelm.ops.activation import activate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = [
    pytest.param((90, 132, 16), id="sm_90"),
    pytest.param((90, 132, 0), id="no-clusters"),  # two launches, the second one early
    pytest.param((80, 108, 0), id="sm_80"),
]


@pytest.fixture
def device(kernels: Kernels, request: pytest.FixtureRequest) -> Iterator[None]:
    with kernels.device(*request.param):
        yield


def tensors(M: int, K: int, R: int, N: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, down, up = torch.randn(M, K), torch.randn(R, K) / 8, torch.randn(N, R)
    return tuple(t.to(dtype) for t in (x, down, up, torch.randn(N)))


def assert_right(y: Tensor, tensors: tuple[Tensor, ...], activation: str | None) -> None:
    x, down, up, bias = (t.double() for t in tensors)
    truth = activate(x @ down.T @ up.T + bias, activation)
    assert_accurate(y, truth, x.abs() @ down.abs().T @ up.abs().T + bias.abs())


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, K, R, N, activation",
    [
        pytest.param(1, 65, 9, 33, None, id="one-row"),
        pytest.param(3, 331, 40, 70, "gelu", id="ragged"),
        pytest.param(7, 640, 200, 40, "relu", id="two-tiles-a-warp"),
        pytest.param(8, 1544, 24, 16, None, id="more-chunks-than-stages"),
        pytest.param(33, 272, 16, 136, "silu", id="33-rows"),
        pytest.param(5, 70, 18, 30, None, id="rows-of-4-bytes"),
        pytest.param(65, 64, 8, 24, None, id="65-rows"),
        pytest.param(2, 9, 0, 5, "silu", id="rank-0"),
        pytest.param(2, 0, 3, 5, "silu", id="no-inputs"),
        pytest.param(0, 9, 4, 5, None, id="no-rows"),
        pytest.param(3, 9, 4, 0, None, id="no-outputs"),
    ],
)
def test_low_rank_linear(
    kernels: Kernels,
    device: None,
    dtype: torch.dtype,
    M: int,
    K: int,
    R: int,
    N: int,
    activation: str | None,
) -> None:
    given = tensors(M, K, R, N, dtype)
    y = kernels.low_rank_linear(*given, activation=activation)
    assert_right(y, given, activation)


@pytest.mark.parametrize(
    "device", [*DEVICES[:2], pytest.param((90, 132, 8), id="8")], indirect=True
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_row_does_not_depend_on_the_others(
    kernels: Kernels, device: None, dtype: torch.dtype
) -> None:
    x, *weights = tensors(65, 520, 24, 48, dtype)
    y = kernels.low_rank_linear(x, *weights)
    for rows in (slice(64, 65), slice(0, 9), slice(5, 25), slice(1, 64)):
        assert torch.equal(kernels.low_rank_linear(x[rows], *weights), y[rows])


@pytest.mark.parametrize("R", [300, 5000])
@pytest.mark.parametrize("device", DEVICES[:1], indirect=True)
def test_a_rank_beyond_a_cluster(kernels: Kernels, device: None, R: int) -> None:
    given = tensors(1, 10, R, 3, torch.bfloat16)
    assert_right(kernels.low_rank_linear(*given), given, None)


@pytest.mark.parametrize("device", [pytest.param((90, 132, 2), id="2")], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_chunks_than_stages(kernels: Kernels, device: None, dtype: torch.dtype) -> None:
    given = tensors(3, 1544, 24, 40, dtype)
    assert_right(kernels.low_rank_linear(*given, activation="gelu"), given, "gelu")


@pytest.mark.parametrize("R", [16, 18, 19])
@pytest.mark.parametrize("device", DEVICES[:2], indirect=True)
def test_tensors_that_are_not_aligned(kernels: Kernels, device: None, R: int) -> None:
    def shifted(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    given = tuple(shifted(t) for t in tensors(2, 64, R, 32, torch.float16))
    assert_right(kernels.low_rank_linear(*given), given, None)


def test_a_launch_with_little_memory_leaves_an_earlier_one_its_own(kernels: Kernels) -> None:
    """The emulation refuses what would: a graph may hold the earlier one, of the same kernel."""
    for R in (256, 200):
        given = tensors(33, 64, R, 16, torch.float16)
        assert_right(kernels.low_rank_linear(*given), given, None)
