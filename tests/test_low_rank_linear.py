"""low_rank_linear against the product in float64, row by row, and through torch."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_accurate
from torch import Tensor

from prunelm import BlockSparse, ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FUNCTIONS = {None: lambda x: x, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}

# K, N, R. Over 512 the sums are cut.
SHAPES = [
    pytest.param(64, 64, 16, id="whole"),
    pytest.param(1031, 33, 7, id="ragged"),
    pytest.param(50, 700, 40, id="wide"),
    pytest.param(600, 5, 530, id="thick"),
    pytest.param(9, 3, 1, id="rank-1"),
    pytest.param(9, 3, 0, id="rank-0"),
]


def factors(K: int, N: int, R: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    down, up = torch.randn(R, K) / K**0.5, torch.randn(N, R) / max(R, 1) ** 0.5
    return down.to(dtype), up.to(dtype), torch.randn(N).to(dtype)


def in_blocks(factor: Tensor) -> BlockSparse:
    N, K = factor.shape
    everything = torch.ones(-(-N // 16), min(K, 1), dtype=torch.bool)
    return BlockSparse.from_dense(factor, (16, max(K, 1)), everything)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("K", "N", "R"), SHAPES)
def test_as_accurate_as_two_dense_products(K, N, R, dtype) -> None:
    down, up, bias = factors(K, N, R, dtype)
    wide = [t.double() for t in (down, up, bias)]
    for M in (1, 2, 3, 4, 7, 16, 100):
        x = torch.randn(M, K).to(dtype)
        for name, function in FUNCTIONS.items():
            dense = function(F.linear(F.linear(x, down), up, bias))
            exact = function(F.linear(F.linear(x.double(), wide[0]), *wide[1:]))
            assert_as_accurate(ops.low_rank_linear(x, down, up, bias, name), dense, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("K", "N", "R"), SHAPES)
def test_a_row_does_not_depend_on_its_neighbours_nor_on_the_layout(K, N, R, dtype) -> None:
    down, up, bias = factors(K, N, R, dtype)
    x = torch.randn(200, K).to(dtype)
    whole = ops.low_rank_linear(x, down, up, bias)
    for M in [*range(1, 71), 97, 199]:
        start = (M * 7) % (200 - M + 1)
        rows, expected = x[start : start + M], whole[start : start + M]
        assert torch.equal(ops.low_rank_linear(rows, down, up, bias), expected), M
        blocks = ops.low_rank_linear(rows, in_blocks(down), in_blocks(up), bias)
        assert torch.equal(blocks, expected), M


def test_rows_do_not_depend_on_threads() -> None:
    down, up, _ = factors(1030, 1000, 200, torch.float32)
    x = torch.randn(70, 1030)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([ops.low_rank_linear(x[:M], down, up) for M in range(1, 71)])
    finally:
        torch.set_num_threads(before)
    for several in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], several, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stored_in_16_bits_beside_float32(dtype) -> None:
    down, up, bias = factors(100, 40, 20, dtype)
    x, wide = torch.randn(9, 100), [t.float() for t in (down, up, bias)]
    exact = F.linear(F.linear(x.double(), down.double()), up.double(), bias.double())
    got = ops.low_rank_linear(x, down, up, bias)
    assert_as_accurate(got, F.linear(F.linear(x, wide[0]), *wide[1:]), exact)
    assert torch.equal(got, ops.low_rank_linear(x, in_blocks(down), in_blocks(up), bias))


def test_any_shape_and_strides() -> None:
    down, up, bias = factors(20, 32, 6, torch.float32)
    x = torch.randn(20, 3, 4).permute(2, 1, 0)
    expected = ops.low_rank_linear(x.reshape(12, 20), down, up, bias).view(4, 3, 32)
    assert torch.equal(ops.low_rank_linear(x, down, up, bias), expected)
    turned = [t.T.contiguous().T for t in (down, up)]
    assert torch.equal(ops.low_rank_linear(x, *turned, bias), expected)
    assert ops.low_rank_linear(x[:0], down, up).shape == (0, 3, 32)
    assert ops.low_rank_linear(x[0, 0], down, up).shape == (32,)


@pytest.mark.parametrize("activation", list(FUNCTIONS), ids=str)
@pytest.mark.parametrize("blocks", [False, True], ids=["plain", "blocks"])
def test_gradients(activation, blocks) -> None:
    down, up, bias = (t.requires_grad_() for t in factors(7, 5, 3, torch.float64))
    x = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
        if blocks:
            return ops.low_rank_linear(x, in_blocks(down), in_blocks(up), bias, activation)
        return ops.low_rank_linear(x, down, up, bias, activation)

    torch.autograd.gradcheck(run, (x, down, up, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_as_accurate_as_dense(dtype) -> None:
    given = [torch.randn(110, 70).to(dtype), *factors(70, 50, 20, dtype)]
    grad = torch.randn(110, 50).to(dtype)

    def gradients(dtype: torch.dtype, function) -> tuple[Tensor, ...]:
        tensors = [t.to(dtype).requires_grad_() for t in given]
        return torch.autograd.grad(function(*tensors), tensors, grad.to(dtype))

    got = gradients(dtype, ops.low_rank_linear)
    dense = gradients(dtype, ops.low_rank_linear_reference)
    exact = gradients(torch.float64, ops.low_rank_linear_reference)
    for one in zip(got, dense, exact, strict=True):
        assert_as_accurate(*one)


@pytest.mark.parametrize("activation", [0, 1])
def test_opcheck(activation) -> None:
    down, up, bias = (t.requires_grad_() for t in factors(21, 18, 5, torch.float32))
    x = torch.randn(3, 21, requires_grad=True)
    torch.library.opcheck(
        torch.ops.prunelm.low_rank_linear.default, (x, down, up, bias, activation)
    )
    if activation:
        return
    thin, wide = in_blocks(down.detach()), in_blocks(up.detach())
    torch.library.opcheck(
        torch.ops.prunelm.low_rank_linear_blocks.default,
        (
            *(x.detach(), thin.values, thin.crow, thin.col),
            *(wide.values, wide.crow, wide.col, bias.detach(), 5, 18, activation),
        ),
    )


def test_backends() -> None:
    down, up, bias = factors(20, 30, 6, torch.float32)
    x = torch.randn(4, 20)
    got = ops.low_rank_linear(x, down, up, bias, backend="cpu")
    close = ops.low_rank_linear(x, down, up, bias, backend="reference")
    assert (got - close).abs().max() <= 1e-5
    with pytest.raises(ValueError, match=r"cuda cannot run low_rank_linear: .*x: expected a"):
        ops.low_rank_linear(x, down, up, backend="cuda")
    told = ops.explain(x, (down, up))
    assert told.backend == "cpu" and set(told.predicted_us) == {"cpu", "dense"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.ones(2, 5), r"down: expected size 5 in dimension 1, got \[2, 6\]"),
        ("x", torch.ones(2, 6).double(), "down: expected the dtype of x"),
        ("down", torch.ones(6), "down: expected 2 dimensions"),
        ("down", torch.ones(3, 6), r"up: expected size 3 in dimension 1, got \[4, 2\]"),
        ("up", torch.ones(4, 2).half(), "up: expected down's Float, got Half"),
        ("bias", torch.ones(3), r"bias: expected size 4 in dimension 0, got \[3\]"),
        ("up", in_blocks(torch.ones(4, 2)), "down, up: expected both in blocks or none"),
        ("activation", "tanh", r"activation: expected one of .* got 'tanh'"),
    ],
)
def test_bad_input_is_refused_by_name(name, value, message) -> None:
    given = {"x": torch.ones(2, 6), "down": torch.ones(2, 6), "up": torch.ones(4, 2)}
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.low_rank_linear(**{**given, name: value})
