"""block_sparse_linear against the dense product in float64, row by row, and through torch."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_as_accurate
from torch import Tensor

from prunelm import BlockSparse, ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FUNCTIONS = {None: lambda x: x, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}

# N, K, block, density. Rows of blocks with over 64 terms cross the points where a sum starts anew.
SHAPES = [
    pytest.param(64, 1024, (16, 16), 0.25, id="16x16"),
    pytest.param(33, 1030, (16, 4), 0.3, id="16x4-ragged"),
    pytest.param(48, 700, (16, 1), 0.3, id="16x1"),
    pytest.param(70, 600, (32, 32), 0.5, id="32x32-ragged"),
    pytest.param(130, 520, (128, 128), 0.6, id="128x128-ragged"),
    pytest.param(40, 1100, (16, 1100), 1.0, id="panels"),
    pytest.param(64, 1500, (16, 100), 0.5, id="blocks-across-sums"),
    pytest.param(50, 1000, (16, 128), 0.5, id="16x128-ragged"),
    pytest.param(9, 600, (1, 1), 0.2, id="1x1"),
    pytest.param(21, 130, (1, 16), 0.5, id="1x16"),
    pytest.param(35, 100, (3, 1), 0.5, id="3x1"),
    pytest.param(40, 200, (17, 3), 0.5, id="17x3"),
    pytest.param(21, 50, (8, 5), 0.5, id="8x5"),
    pytest.param(7, 3, (16, 16), 1.0, id="smaller-than-a-block"),
]


def weight_of(
    N: int, K: int, block: tuple[int, int], density: float, dtype: torch.dtype
) -> BlockSparse:
    mask = torch.rand(-(-N // block[0]), -(-K // block[1])) < density
    mask[len(mask) // 2] = False  # an empty row of blocks, and an empty column
    mask[:, mask.shape[1] // 2] &= mask.shape[1] < 2
    return BlockSparse.from_dense((torch.randn(N, K) / K**0.5).to(dtype), block, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "block", "density"), SHAPES)
def test_as_accurate_as_dense(N, K, block, density, dtype) -> None:
    weight = weight_of(N, K, block, density, dtype)
    bias = torch.randn(N).to(dtype)
    for M in (1, 2, 3, 7, 16, 100):
        x = torch.randn(M, K).to(dtype)
        for name, function in FUNCTIONS.items():
            dense = function(F.linear(x, weight.to_dense(), bias))
            exact = function(F.linear(x.double(), weight.to_dense().double(), bias.double()))
            got = ops.block_sparse_linear(x, weight, bias, name)
            assert_as_accurate(got, dense, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stored_in_16_bits_beside_float32(dtype) -> None:
    weight = weight_of(64, 600, (16, 4), 0.4, dtype)
    x, bias = torch.randn(9, 600), torch.randn(64, dtype=dtype)
    wide = weight.to_dense().float()
    exact = F.linear(x.double(), wide.double(), bias.double())
    got = ops.block_sparse_linear(x, weight, bias)
    assert got.dtype == torch.float32
    assert_as_accurate(got, F.linear(x, wide, bias.float()), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "block", "density"), SHAPES)
def test_a_row_does_not_depend_on_its_neighbours(N, K, block, density, dtype) -> None:
    weight = weight_of(N, K, block, density, dtype)
    x = torch.randn(200, K).to(dtype)
    whole = ops.block_sparse_linear(x, weight)
    for M in [*range(1, 71), 97, 199]:
        start = (M * 7) % (200 - M + 1)
        part = ops.block_sparse_linear(x[start : start + M], weight)
        assert torch.equal(part, whole[start : start + M]), M


def test_rows_do_not_depend_on_threads() -> None:
    weight = weight_of(512, 1030, (16, 4), 0.4, torch.float32)
    x = torch.randn(70, 1030)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([ops.block_sparse_linear(x[:M], weight) for M in range(1, 71)])
    finally:
        torch.set_num_threads(before)
    for several in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], several, strict=True))


@pytest.mark.parametrize("block", [(16, 16), (1, 1)], ids=str)
def test_empty(block) -> None:
    bias = torch.randn(32)
    nothing = BlockSparse.from_dense(torch.zeros(32, 48), block)
    x = torch.randn(5, 48)
    assert torch.equal(ops.block_sparse_linear(x, nothing, bias), bias.expand(5, 32))
    some = BlockSparse.from_dense(torch.randn(32, 48), block)
    assert ops.block_sparse_linear(x[:0], some).shape == (0, 32)
    assert ops.block_sparse_linear(torch.randn(2, 0, 48), some).shape == (2, 0, 32)
    values = some.values.detach().requires_grad_()
    stored = BlockSparse(values, some.crow, some.col, some.shape)
    ops.block_sparse_linear(x[:0], stored).sum().backward()
    assert values.grad is not None and not values.grad.any()
    none = BlockSparse.from_dense(torch.zeros(32, 0), block)
    assert torch.equal(ops.block_sparse_linear(torch.zeros(3, 0), none, bias), bias.expand(3, 32))


def test_any_leading_dimensions_and_strides() -> None:
    weight = weight_of(32, 20, (16, 4), 0.5, torch.float32)
    x = torch.randn(20, 3, 4).permute(2, 1, 0)
    assert torch.equal(
        ops.block_sparse_linear(x, weight),
        ops.block_sparse_linear(x.reshape(12, 20), weight).view(4, 3, 32),
    )
    assert ops.block_sparse_linear(x[0, 0], weight).shape == (32,)
    rows = BlockSparse(weight.values.contiguous(), weight.crow, weight.col, weight.shape)
    assert torch.equal(ops.block_sparse_linear(x, rows), ops.block_sparse_linear(x, weight))


def test_what_lies_past_the_edge_is_not_read() -> None:
    weight = BlockSparse.from_dense(torch.randn(18, 21), (16, 16))
    x = torch.randn(4, 21)
    expected = ops.block_sparse_linear(x, weight)
    weight.values[1::2, :, 5:] = torch.nan
    weight.values[2:, 2:] = torch.nan
    assert torch.equal(ops.block_sparse_linear(x, weight), expected)


def test_infinity_meets_stored_blocks_only() -> None:
    weight = BlockSparse.from_dense(torch.eye(4), (2, 2))
    x = torch.tensor([[torch.inf, 0, 1, 1]])
    assert ops.block_sparse_linear(x, weight)[0, 2:].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", list(FUNCTIONS), ids=str)
def test_activations_far_from_zero_and_of_what_is_no_number(activation, dtype) -> None:
    """As torch's in float64: to 1e-6 of the number itself, or of 1 where the result is small."""
    edges = [0.0, 1e-40, 1e-30, 1e-4, 0.99999, 1.0, 1.00001, 3.99, 4.0, 4.01, 6.0, 20.0, 86.9]
    edges += [87.0, 87.1, 88.0, 89.0, 104.0, 1e4, 1e30, 3e38, torch.inf]
    x = torch.tensor([*edges, *(-e for e in edges), torch.nan], dtype=dtype)
    x = torch.cat([x, torch.linspace(-12, 12, 1001, dtype=dtype)])[:, None]
    weight = BlockSparse.from_dense(torch.ones(16, 1, dtype=dtype), (16, 1))
    with torch.inference_mode():
        y = ops.block_sparse_linear(x, weight, activation=activation).double()
    wanted = FUNCTIONS[activation](x.double())
    # Of -inf torch makes NaN; the functions go to 0.
    if activation in ("gelu", "silu"):
        wanted[x == -torch.inf] = 0
    assert (y == y[:, :1]).logical_or(y.isnan()).all()
    assert torch.equal(y[:, :1].isnan(), x.isnan())
    numbers = wanted.isfinite()
    assert torch.equal(y[:, :1][~x.isnan() & ~numbers], wanted[~x.isnan() & ~numbers])
    error = (y[:, :1] - wanted)[numbers].abs()
    assert (error <= 1e-6 * wanted[numbers].abs().clamp(min=1.0)).all()


@pytest.mark.parametrize("activation", list(FUNCTIONS), ids=str)
@pytest.mark.parametrize(
    ("N", "K", "block"), [(18, 21, (16, 4)), (9, 7, (2, 3)), (5, 6, (1, 1))], ids=str
)
def test_gradients(N, K, block, activation) -> None:
    weight = weight_of(N, K, block, 0.6, torch.float64)
    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    values = weight.values.detach().requires_grad_()
    bias = torch.randn(N, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        stored = BlockSparse(values, weight.crow, weight.col, weight.shape)
        return ops.block_sparse_linear(x, stored, bias, activation)

    torch.autograd.gradcheck(run, (x, values, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [(16, 16), (16, 4), (16, 1), (17, 3), (3, 5), (1, 1)], ids=str)
def test_gradients_are_as_accurate_as_dense(block, dtype) -> None:
    weight = weight_of(70, 150, block, 0.5, dtype)
    x, grad = torch.randn(2, 110, 150).to(dtype), torch.randn(2, 110, 70).to(dtype)

    def gradients(x: Tensor, values: Tensor, own: bool) -> tuple[Tensor, ...]:
        x, values = x.detach().requires_grad_(), values.detach().requires_grad_()
        stored = BlockSparse(values, weight.crow, weight.col, weight.shape)
        if own:
            y = ops.block_sparse_linear(x, stored)
        else:
            y = ops.block_sparse_linear_reference(x, stored)
        return torch.autograd.grad(y, (x, values), grad.to(x.dtype))

    got = gradients(x, weight.values, True)
    dense = gradients(x, weight.values, False)
    exact = gradients(x.double(), weight.values.double(), False)
    for one in zip(got, dense, exact, strict=True):
        assert_as_accurate(*one)


@pytest.mark.parametrize("activation", [0, 2])
def test_opcheck(activation) -> None:
    weight = weight_of(18, 21, (16, 4), 0.6, torch.float32)
    x = torch.randn(3, 21, requires_grad=True)
    values = weight.values.detach().requires_grad_()
    bias = torch.randn(18, requires_grad=True)
    arguments = (x, values, weight.crow, weight.col, bias, 18, activation)
    torch.library.opcheck(torch.ops.prunelm.block_sparse_linear.default, arguments)
    grad = torch.randn(3, 18)
    torch.library.opcheck(
        torch.ops.prunelm.block_sparse_linear_grad_x.default,
        (grad, weight.values, weight.crow, weight.col, 21),
    )
    torch.library.opcheck(
        torch.ops.prunelm.block_sparse_linear_grad_values.default,
        (grad, x.detach(), weight.crow, weight.col, 16, 4),
    )


def test_autocast_gives_its_dtype() -> None:
    weight = weight_of(32, 64, (16, 4), 0.5, torch.float32)
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.block_sparse_linear(x, weight)
        dense = F.linear(x, weight.to_dense())
    assert_as_accurate(got, dense, F.linear(x.double(), weight.to_dense().double()))


def test_backend_that_cannot_run_gives_all_reasons() -> None:
    weight, x = weight_of(32, 64, (16, 4), 0.5, torch.float32), torch.randn(2, 64)
    with pytest.raises(ValueError, match=r"cuda cannot .*: .*x: expected a cuda.*values: exp"):
        ops.block_sparse_linear(x, weight, backend="cuda")
    with pytest.raises(
        ValueError, match=r"cpu cannot run .*x: expected one of float32.*values: exp"
    ):
        ops.block_sparse_linear(x.long(), weight, backend="cpu")
    with pytest.raises(ValueError, match=r"backend: expected one of .* got 'gpu'"):
        ops.block_sparse_linear(x, weight, backend="gpu")
    named = ops.block_sparse_linear(x, weight, backend="cpu")
    assert torch.equal(named, ops.block_sparse_linear(x, weight))
    close = ops.block_sparse_linear(x, weight, backend="reference")
    assert (named - close).abs().max() <= 1e-5


def test_explain_names_what_runs_and_why_not_the_rest() -> None:
    weight, x = weight_of(512, 512, (16, 4), 0.2, torch.float32), torch.randn(2, 4, 512)
    told = ops.explain(x, weight)
    assert told.backend == "cpu" and "cuda" in told.refusals and "cpu" not in told.refusals
    assert told.predicted_us["cpu"] < told.predicted_us["dense"]
    assert str(told).startswith("cpu runs\ncuda cannot: ") and "predicted: dense" in str(told)
    assert ops.explain(x, weight, "reference").backend == "reference"


def change(name: str, value: object) -> dict[str, object]:
    weight = BlockSparse.from_dense(torch.ones(4, 6), (2, 3))
    arguments: dict[str, object] = {
        "x": torch.ones(2, 6),
        "values": weight.values,
        "crow": weight.crow,
        "col": weight.col,
        "bias": torch.ones(4),
    }
    return arguments | {name: value}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.ones(2, 5), r"x: expected \[..., 6\], got \[2, 5\]"),
        ("x", torch.ones(2, 6).double(), "values: expected the dtype of x"),
        ("x", torch.ones(2, 6).int(), "x: expected float32, float64, bfloat16 or float16"),
        ("values", torch.ones(4, 2), r"values: expected 3 dimensions, got \[4, 2\]"),
        ("values", torch.ones(3, 2, 3), r"col: expected size 3 in dimension 0, got \[4\]"),
        ("crow", torch.tensor([0, 2, 5]).int(), "crow: expected 0 to nnz, never falling"),
        ("crow", torch.tensor([0, 9, 4]).int(), "crow: expected 0 to nnz, never falling"),
        ("crow", torch.tensor([0, 4]).int(), "crow: expected size 3 in dimension 0"),
        ("crow", torch.tensor([0, 2, 4]), "crow: expected Int, got Long"),
        ("col", torch.tensor([0, 2, 0, 1]).int(), r"col: expected columns in \[0, 2\)"),
        ("col", torch.tensor([-1, 1, 0, 1]).int(), r"col: expected columns in \[0, 2\)"),
        ("col", torch.tensor([1, 0, 0, 1]).int(), "ascending in each row"),
        ("bias", torch.ones(5), r"bias: expected size 4 in dimension 0, got \[5\]"),
        ("bias", torch.ones(4).double(), "bias: expected x's Float, got Double"),
    ],
)
def test_bad_input_is_refused_by_name(name, value, message) -> None:
    a = change(name, value)
    weight = BlockSparse(a["values"], a["crow"], a["col"], (4, 6))
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.block_sparse_linear(a["x"], weight, a["bias"])


def test_unknown_activation_is_refused() -> None:
    weight = BlockSparse.from_dense(torch.ones(4, 6), (2, 3))
    with pytest.raises(ValueError, match=r"activation: expected one of .* got 'tanh'"):
        ops.block_sparse_linear(torch.ones(1, 6), weight, activation="tanh")


def test_more_rows_of_blocks_than_int32_counts_are_refused() -> None:
    none = torch.empty(0, 1, 1)
    crow = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="weight: expected at most 2147483647 rows of blocks"):
        ops.block_sparse_linear(torch.ones(1, 1), BlockSparse(none, crow, crow[:0], (2**31, 1)))
