"""Without gradients the ops go past the dispatcher: same numbers, and only where none can tell."""

import copy
import gc
import pickle
import resource
import sys
import threading
import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

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


def test_values_turned_over_in_place_are_seen() -> None:
    weight, x = weight_of(48, 64, (16, 16), torch.float32), torch.randn(3, 64)
    with torch.inference_mode():
        ops.block_sparse_linear(x, weight)
        weight.values.transpose_(1, 2)
        want = torch.nn.functional.linear(x, weight.to_dense())
        torch.testing.assert_close(ops.block_sparse_linear(x, weight), want, rtol=1e-4, atol=1e-4)


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


def test_a_parametrized_bias_is_seen() -> None:
    linear = BlockSparseLinear(weight_of(48, 64, (16, 4), torch.float32), torch.randn(48))
    for module in (linear, PackedLowRankLinear(LowRankLinear(64, 48, 8))):
        x = torch.randn(3, 64)
        with torch.inference_mode():
            want = module(x)
            parametrize.register_parametrization(module, "bias", nn.Identity())
            assert torch.equal(module(x), want)


def test_a_result_is_a_tensor_like_any_other() -> None:
    weight, x = weight_of(48, 64, (16, 4), torch.float32), torch.randn(2, 3, 64)
    with torch.no_grad():
        y = direct(x, weight)
    assert y is not None and type(y) is Tensor and y.shape == (2, 3, 48)
    assert (
        y.is_contiguous() and not y.requires_grad and y.grad_fn is None and y.data_ptr() % 64 == 0
    )
    want = through_dispatcher(x, weight, None, 0)
    for made in (copy.deepcopy(y), pickle.loads(pickle.dumps(y)), y.share_memory_()):
        assert torch.equal(made, want)
    kept = y[1, 2]
    del y
    other = direct_without_gradients(torch.randn(2, 3, 64), weight)  # may take freed memory
    assert torch.equal(kept, want[1, 2]) and not torch.equal(kept, other[1, 2])
    factor = torch.ones(48, requires_grad=True)
    (kept * factor).sum().backward()
    assert torch.equal(factor.grad, want[1, 2])


def direct_without_gradients(x: Tensor, weight: BlockSparse) -> Tensor:
    with torch.no_grad():
        y = direct(x, weight)
    assert y is not None
    return y


def test_a_call_keeps_nothing() -> None:
    weight, x = weight_of(512, 512, (16, 4), torch.float32), torch.randn(512, 512)
    bias = torch.randn(512)
    given = (x, weight.values, weight.crow, weight.col, weight.shape, bias)
    before = [sys.getrefcount(t) for t in given]
    gc.collect()
    objects = len(gc.get_objects())
    for _ in range(20):
        direct_without_gradients(x, weight)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200):
        with torch.no_grad():
            y = direct(x, weight, bias)
            assert y is not None
            del y
            assert direct(x, weight, x) is None
    gained = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak  # KiB; a result is 1 MiB
    assert gained < 100 * 1024
    assert [sys.getrefcount(t) for t in given] == before
    gc.collect()
    assert len(gc.get_objects()) < objects + 100


def test_threads_call_at_once() -> None:
    weight = weight_of(512, 512, (16, 4), torch.float32)
    xs = [torch.randn(m, 512) for m in (1, 3, 64, 200)]
    wants = [through_dispatcher(x, weight, None, 0) for x in xs]
    right = [0] * 8

    def run(i: int) -> None:
        for turn in range(40):
            at = (i + turn) % len(xs)
            right[i] += torch.equal(direct_without_gradients(xs[at], weight), wants[at])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [40] * 8


def test_others_run_beside_a_long_product() -> None:
    weight, x = weight_of(2048, 2048, (16, 16), torch.float32), torch.randn(2048, 2048)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (direct_without_gradients(x, weight), done.set()))
    turns = 0
    thread.start()
    while not done.is_set():
        turns += 1
        time.sleep(0)
    thread.join()
    assert turns > 100
