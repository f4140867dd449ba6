"""Without gradients the ops go past the dispatcher: same numbers, and only where none can tell."""

import copy
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import prunelm._C
from prunelm import BlockSparse, ops
from prunelm.nn import BlockSparseLinear, LowRankLinear, PackedLowRankLinear

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ACTIVATIONS = (None, "relu", "gelu", "silu")
OP = torch.ops.prunelm.block_sparse_linear.default


def direct(
    x: Tensor, w: BlockSparse, bias: Tensor | None = None, activation: str | None = None
) -> Tensor | None:
    return prunelm._C.block_sparse_linear(x, w.values, w.crow, w.col, w.shape, bias, activation)


def direct_low_rank(
    x: Tensor,
    down: BlockSparse,
    up: BlockSparse,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | None:
    factors = [(w.values, w.crow, w.col, w.shape) for w in (down, up)]
    return prunelm._C.low_rank_linear(x, *factors[0], *factors[1], bias, activation)


def weight_of(N: int, K: int, block: tuple[int, int], dtype: torch.dtype) -> BlockSparse:
    mask = torch.rand(-(-N // block[0]), -(-K // block[1])) < 0.4
    return BlockSparse.from_dense(torch.randn(N, K).to(dtype), block, mask)


def through_dispatcher(x: Tensor, w: BlockSparse, bias: Tensor | None, code: int) -> Tensor:
    y: Tensor = OP(x, w.values, w.crow, w.col, bias, w.shape[0], code)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [(16, 4), (1, 1), (17, 3)], ids=str)
def test_the_same_numbers(block: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weight_of(50, 70, block, dtype)
    for shape in ((70,), (1, 70), (3, 33, 70)):
        for bias in (None, torch.randn(50).to(dtype)):
            for code, name in enumerate(ACTIVATIONS):
                x = torch.randn(shape).to(dtype)
                with torch.no_grad():
                    plain = direct(x, weight, bias, name)
                    assert plain is not None and not plain.is_inference()
                with torch.inference_mode():
                    got = direct(x, weight, bias, name)
                    assert got is not None and got.is_inference() and torch.equal(got, plain)
                    assert torch.equal(got, through_dispatcher(x, weight, bias, code))
                    assert torch.equal(got, ops.block_sparse_linear(x, weight, bias, name))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [torch.float32, "stored"], ids=str)
def test_the_same_numbers_from_16_bit_weights(stored: torch.dtype, bias: object) -> None:
    weight, x = weight_of(40, 60, (16, 4), stored), torch.randn(5, 60)
    added = torch.randn(40).to(stored if bias == "stored" else torch.float32)
    with torch.inference_mode():
        got = direct(x, weight, added, "gelu")
        assert got is not None and torch.equal(got, through_dispatcher(x, weight, added, 2))


def test_the_same_numbers_from_factors_in_blocks() -> None:
    for dtype in DTYPES:
        low = LowRankLinear(70, 50, 12, activation="gelu", dtype=dtype)
        packed, x = PackedLowRankLinear(low), torch.randn(9, 70).to(dtype)
        want = packed(x)
        with torch.inference_mode():
            got = direct_low_rank(x, packed.down, packed.up, packed.bias, "gelu")
            assert got is not None and torch.equal(got, want) and torch.equal(packed(x), want)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "context",
    [
        nullcontext,
        forward_ad.dual_level,
        lambda: torch.autocast("cpu", torch.bfloat16),
        Watching,
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    ],
    ids=["grad", "forward_ad", "autocast", "dispatch_mode", "profiler"],
)
def test_whoever_listens_gets_the_op(context) -> None:
    weight, x = weight_of(40, 60, (16, 4), torch.float32), torch.randn(5, 60)
    without = nullcontext() if context is nullcontext else torch.no_grad()
    with without, context():
        assert direct(x, weight) is None
        got = ops.block_sparse_linear(x, weight)
    want = through_dispatcher(x, weight, None, 0)
    if got.dtype == torch.bfloat16:
        torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-1)
    else:
        assert torch.equal(got, want)


def test_transforms_and_tracing_get_the_op() -> None:
    weight, x = weight_of(40, 60, (16, 4), torch.float32), torch.randn(5, 60)
    seen: list[bool] = []

    def run(rows: Tensor) -> Tensor:
        seen.append(direct(rows, weight) is None)
        return through_dispatcher(rows, weight, None, 0)

    with torch.inference_mode():
        torch.func.functionalize(run)(x)
        torch.jit.trace(run, x, check_trace=False)

        def noted(rows: Tensor) -> Tensor:
            seen.append(direct(rows, weight) is None)
            return rows

        torch.vmap(noted)(x[:, None])

        def weighed(values: Tensor) -> Tensor:
            other = BlockSparse(values, weight.crow, weight.col, weight.shape)
            seen.append(direct(x, other) is None)
            return values

        torch.vmap(weighed)(torch.stack([weight.values, weight.values]))
    assert len(seen) == 4 and all(seen)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: BlockSparse(w.values.contiguous(), w.crow, w.col, w.shape),
        lambda w: BlockSparse(w.values, w.crow.repeat_interleave(2)[::2], w.col, w.shape),
    ],
    ids=["values", "crow"],
)
def test_other_layouts_go_through_the_op_and_are_right(change) -> None:
    weight, x = weight_of(40, 60, (16, 4), torch.float32), torch.randn(5, 60)
    other = change(weight)
    with torch.inference_mode():
        assert direct(x, other) is None
        strided = torch.randn(60, 5).T
        assert direct(strided, weight) is None
        assert torch.equal(
            ops.block_sparse_linear(strided, weight),
            ops.block_sparse_linear(strided.contiguous(), weight),
        )
    if other.values is not weight.values:
        with torch.inference_mode():
            assert torch.equal(
                ops.block_sparse_linear(x, other), ops.block_sparse_linear(x, weight)
            )


@pytest.mark.parametrize(
    "x",
    [torch._neg_view(torch.randn(5, 60)), torch._efficientzerotensor((5, 60))],
    ids=["neg", "0"],
)
def test_rows_whose_memory_says_something_else_go_through_the_op(x: Tensor) -> None:
    weight = weight_of(40, 60, (16, 4), torch.float32)
    with torch.inference_mode():
        assert direct(x, weight) is None
        want = ops.block_sparse_linear(x.clone(), weight)
        assert torch.equal(ops.block_sparse_linear(x, weight), want)


def test_values_turned_over_in_place_are_seen() -> None:
    weight, x = weight_of(48, 64, (16, 16), torch.float32), torch.randn(3, 64)
    with torch.inference_mode():
        ops.block_sparse_linear(x, weight)
        weight.values.transpose_(1, 2)
        want = torch.nn.functional.linear(x, weight.to_dense())
        torch.testing.assert_close(ops.block_sparse_linear(x, weight), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.randn(5, 61), None, r"x: expected \[\.\.\., 60\], got \[5, 61\]"),
        (torch.randn(5, 60).double(), None, "values: expected the dtype of x"),
        (torch.randn(5, 60), torch.randn(41), "bias: expected size 40 in dimension 0"),
        (torch.randn(5, 60), torch.randn(40).half(), "bias: expected x's Float"),
    ],
    ids=["columns", "dtype", "bias", "bias-dtype"],
)
def test_bad_input_is_refused_as_by_the_op(x: Tensor, bias: Tensor | None, message: str) -> None:
    weight = weight_of(40, 60, (16, 4), torch.float32)
    with torch.inference_mode(), pytest.raises((ValueError, RuntimeError), match=message):
        ops.block_sparse_linear(x, weight, bias)


def test_a_damaged_pattern_is_refused() -> None:
    weight, x = weight_of(40, 60, (16, 4), torch.float32), torch.randn(5, 60)
    with torch.inference_mode():
        ops.block_sparse_linear(x, weight)
        weight.col[0] = 1000
        with pytest.raises(RuntimeError, match="col: expected columns in"):
            ops.block_sparse_linear(x, weight)


def test_tensors_exchanged_under_a_module_are_seen() -> None:
    module = BlockSparseLinear(weight_of(48, 64, (16, 4), torch.float32))
    x = torch.randn(3, 64)
    with torch.inference_mode():
        module(x)
    other = BlockSparseLinear(weight_of(48, 64, (16, 4), torch.float32))
    module.load_state_dict(other.state_dict())  # another number of blocks in the same parameter
    with torch.inference_mode():
        assert torch.equal(module(x), other(x))
        module.values.mul_(2)
        assert torch.equal(module(x), other(2 * x))
        module.values.data = module.values.data.contiguous()  # a layout that is copied
        assert torch.equal(module(x), other(2 * x))
    module.to(torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(module(x.double()).float(), other(2 * x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="values"), torch.inference_mode():
        module(x)


def test_modules_that_have_run_are_copied_and_pickled() -> None:
    for module in (
        BlockSparseLinear(weight_of(48, 64, (16, 4), torch.float32)),
        PackedLowRankLinear(LowRankLinear(64, 48, 8)),
    ):
        x = torch.randn(3, 64)
        with torch.inference_mode():
            want = module(x)
            for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert isinstance(made, nn.Module) and torch.equal(made(x), want)
                for tensor in (*made.parameters(), *made.buffers()):
                    if tensor.is_floating_point():
                        tensor.mul_(0)
                assert torch.equal(module(x), want) and not torch.equal(made(x), want)
