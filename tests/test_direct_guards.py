"""What must not go past the dispatcher does not, and is as right or as refused as by the op."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from listeners import LISTENERS, listening
from torch import Tensor, nn

import prunelm._C
from prunelm import BlockSparse, ops
from prunelm.nn import BlockSparseLinear, LowRankLinear, PackedLowRankLinear

OP = torch.ops.prunelm.block_sparse_linear.default


def weight_of(dtype: torch.dtype = torch.float32) -> BlockSparse:
    """[40, 60] in blocks of 16 x 4."""
    return BlockSparse.from_dense(torch.randn(40, 60).to(dtype), (16, 4), torch.rand(3, 15) < 0.4)


def direct(x: Tensor, w: BlockSparse, bias: Tensor | None = None) -> Tensor | None:
    return prunelm._C.block_sparse_linear(x, w.values, w.crow, w.col, w.shape, bias, None)


def direct_low_rank(
    x: Tensor, down: BlockSparse, up: BlockSparse, bias: Tensor | None = None
) -> Tensor | None:
    factors = [(w.values, w.crow, w.col, w.shape) for w in (down, up)]
    return prunelm._C.low_rank_linear(x, *factors[0], *factors[1], bias, None)


def through_dispatcher(x: Tensor, w: BlockSparse) -> Tensor:
    y: Tensor = OP(x, w.values, w.crow, w.col, None, w.shape[0], 0)
    return y


@pytest.mark.parametrize("kind", LISTENERS)
def test_whoever_listens_gets_the_op(kind: str) -> None:
    weight, x = weight_of(), torch.randn(5, 60)
    packed = PackedLowRankLinear(LowRankLinear(60, 40, 8))
    with listening(kind):
        assert direct(x, weight) is None and direct_low_rank(x, packed.down, packed.up) is None
        got = ops.block_sparse_linear(x, weight)
    want = through_dispatcher(x, weight)
    if got.dtype == torch.bfloat16:
        torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-1)
    else:
        assert torch.equal(got, want)


def test_transforms_and_tracing_get_the_op() -> None:
    weight, x = weight_of(), torch.randn(5, 60)
    seen: list[bool] = []

    def run(rows: Tensor) -> Tensor:
        seen.append(direct(rows, weight) is None)
        return through_dispatcher(rows, weight)

    with torch.inference_mode():
        torch.func.functionalize(run)(x)
        torch.jit.trace(run, x, check_trace=False)

        def noted(rows: Tensor) -> Tensor:
            seen.append(direct(rows, weight) is None)
            return rows

        torch.vmap(noted)(x[:, None])

        def beside(rows: Tensor) -> Tensor:
            seen.append(direct(x, weight) is None)
            return rows

        torch.vmap(beside)(x)

        def weighed(values: Tensor) -> Tensor:
            other = BlockSparse(values, weight.crow, weight.col, weight.shape)
            seen.append(direct(x, other) is None)
            return values

        torch.vmap(weighed)(torch.stack([weight.values, weight.values]))
    assert len(seen) == 5 and all(seen)


def _modules() -> tuple[nn.Module, nn.Module]:
    return BlockSparseLinear(weight_of()), PackedLowRankLinear(LowRankLinear(60, 40, 8))


@pytest.mark.parametrize("name", ["block-sparse", "low-rank"])
def test_compilers_get_the_op(name: str) -> None:
    module, x = _modules()[name == "low-rank"], torch.randn(5, 60)

    def run(rows: Tensor) -> Tensor:
        if isinstance(module, PackedLowRankLinear):
            return ops.low_rank_linear(rows, module.down, module.up, module.bias)
        return ops.block_sparse_linear(rows, module.weight, module.bias)

    with torch.no_grad():
        want = module(x)
        for calls in (module, run):
            compiled = torch.compile(calls, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(x), want)
        exported = torch.export.export(module, (x,), strict=False)
        assert torch.equal(exported.module()(x), want)
        assert any("prunelm" in str(node.target) for node in exported.graph.nodes)


def _neg(t: Tensor) -> Tensor:
    """The same numbers in memory that holds their opposite."""
    return torch._neg_view(-t)


class Special(Tensor):
    """A subclass that may hold anything."""


ROWS: dict[str, Callable[[Tensor], Any]] = {
    "strided": lambda x: x.T.contiguous().T,
    "neg": _neg,
    "zeros": lambda x: torch._efficientzerotensor(x.shape),
    "subclass": lambda x: x.as_subclass(Special),
    "many-dimensions": lambda x: x.view(*[1] * 16, *x.shape),
    "no-rows": lambda x: x[:0],
}


@pytest.mark.parametrize("kind", ROWS)
def test_other_rows_go_through_the_op_and_are_right(kind: str) -> None:
    weight, plain = weight_of(), torch.randn(5, 60)
    packed = PackedLowRankLinear(LowRankLinear(60, 40, 8))
    with torch.inference_mode():
        x = ROWS[kind](plain)
        assert direct(x, weight) is None and direct_low_rank(x, packed.down, packed.up) is None
        got = torch.Tensor(ops.block_sparse_linear(x, weight))
        same = torch.zeros_like(plain) if kind == "zeros" else plain[: x.shape[-2]]
        assert torch.equal(got.view(-1, 40), through_dispatcher(same, weight))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(5, 61),
        torch.tensor(1.0),
        torch.randn(5, 60).double(),
        torch.randn(5, 60).half(),
        torch.randn(5, 60).to(torch.complex64),
        torch.randn(5, 60).to(torch.float8_e4m3fn),
        torch.ones(5, 60, dtype=torch.int32),
        torch.randn(5, 60).to_sparse(),
        torch.randn(5, 60).to_sparse_csr(),
        torch.randn(5, 60).to_mkldnn(),
        torch.nested.nested_tensor([torch.randn(5, 60)]),
        torch.randn(5, 60, device="meta"),
        torch._to_functional_tensor(torch.randn(5, 60)),
        nn.UninitializedParameter(),
        None,
        [[1.0] * 60],
    ],
    ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', '')}-{getattr(x, 'layout', '')}",
)
def test_no_such_rows_are_read(x: Any) -> None:
    weight = weight_of()
    with torch.inference_mode():
        assert direct(x, weight) is None


def _with(w: BlockSparse, **changed: Any) -> BlockSparse:
    return BlockSparse(**{**w.__dict__, **changed})


def _spread(t: Tensor) -> Tensor:
    """The same numbers with others between them."""
    return t.repeat_interleave(2, 0)[::2]


WEIGHTS: dict[str, Callable[[BlockSparse], BlockSparse]] = {
    "bk-fastest": lambda w: _with(w, values=w.values.contiguous()),
    "blocks-apart": lambda w: _with(w, values=_spread(w.values.transpose(1, 2)).transpose(1, 2)),
    "bn-apart": lambda w: _with(w, values=w.values.repeat_interleave(2, 1)[:, ::2]),
    "neg": lambda w: _with(w, values=_neg(w.values)),
    "zeros": lambda w: _with(
        w, values=torch._efficientzerotensor(w.values.mT.shape).transpose(1, 2)
    ),
    "subclass": lambda w: _with(w, values=w.values.as_subclass(Special)),
    "list": lambda w: _with(w, shape=list(w.shape)),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_other_weights_go_through_the_op_and_are_right(kind: str) -> None:
    weight, x = weight_of(), torch.randn(5, 60)
    packed = PackedLowRankLinear(LowRankLinear(60, 40, 33))
    with torch.inference_mode():
        other = WEIGHTS[kind](weight)
        assert direct(x, other) is None
        same = _with(weight, values=0 * weight.values) if kind == "zeros" else weight
        got = torch.Tensor(ops.block_sparse_linear(x, other))
        assert torch.equal(got, through_dispatcher(x, same))
        assert direct_low_rank(x, packed.down, packed.up) is not None
        if packed.down.nnz > 1 and packed.up.nnz > 1:
            assert direct_low_rank(x, WEIGHTS[kind](packed.down), packed.up) is None
            assert direct_low_rank(x, packed.down, WEIGHTS[kind](packed.up)) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda w: _with(w, crow=_spread(w.crow)),
        lambda w: _with(w, col=_spread(w.col)),
        lambda w: _with(w, crow=w.crow.long()),
        lambda w: _with(w, col=w.col.long()),
        lambda w: _with(w, crow=w.crow.view(torch.uint32)),
        lambda w: _with(w, crow=w.crow[:-1]),
        lambda w: _with(w, crow=w.crow[None]),
        lambda w: _with(w, col=w.col[:-1]),
        lambda w: _with(w, values=w.values[0]),
        lambda w: _with(w, values=w.values[..., None]),
        lambda w: _with(w, values=w.values.int()),
        lambda w: _with(w, values=None),
        lambda w: _with(w, values=w.values[:, :, :0]),
        lambda w: _with(w, values=w.values[:, :0]),
        lambda w: _with(w, values=w.values[:0, :, :0], crow=0 * w.crow, col=w.col[:0]),
        lambda w: _with(w, values=w.values[:0, :0], crow=0 * w.crow, col=w.col[:0]),
        lambda w: _with(w, shape=(40,)),
        lambda w: _with(w, shape=(40.0, 60)),
        lambda w: _with(w, shape=(40, 60.0)),
        lambda w: _with(w, shape=(torch.tensor(40), 60)),
        lambda w: _with(w, shape=(-1, 60)),
        lambda w: _with(w, shape=(40, 56)),
        lambda w: _with(w, shape=(2**64, 60)),
        lambda w: _with(w, shape=(2**63 - 1, 60)),
        lambda w: _with(w, crow=w.crow.to("meta")),
    ],
    ids=range(25),
)
def test_no_such_weight_is_read(change) -> None:
    weight, x = weight_of(), torch.randn(5, 60)
    packed = PackedLowRankLinear(LowRankLinear(60, 60, 8))
    with torch.inference_mode():
        assert direct(x, change(weight)) is None
        assert direct_low_rank(x, change(weight), packed.up) is None


def test_indices_that_only_look_right_are_not_read() -> None:
    x, one = torch.randn(5, 4), torch.randn(16, 4)
    single = BlockSparse.from_dense(one, (16, 4))
    none = BlockSparse.from_dense(0 * one, (16, 4))
    with torch.inference_mode():
        assert direct(x, single) is not None and direct(x, none) is not None
        assert direct(x, _with(single, col=single.col[None])) is None
        assert direct(x, _with(single, col=single.col.long())) is None
        assert direct(x, _with(none, crow=none.crow.long())) is None


def test_a_single_block_is_read_only_where_bn_is_fastest() -> None:
    single = BlockSparse.from_dense(torch.randn(16, 4), (16, 4))
    column = BlockSparse.from_dense(torch.randn(16, 1), (16, 1))
    columns_apart = _spread(single.values[0].T).T[None]
    outputs_apart = _spread(column.values[0])[None]
    with torch.inference_mode():
        assert direct(torch.randn(5, 4), _with(single, values=columns_apart)) is None
        assert direct(torch.randn(5, 1), _with(column, values=outputs_apart)) is None


@pytest.mark.gpu
def test_memory_of_a_gpu_is_not_read() -> None:
    weight, x = weight_of(), torch.randn(5, 60)
    packed = PackedLowRankLinear(LowRankLinear(60, 40, 8)).cuda()
    there = BlockSparse(weight.values.cuda(), weight.crow.cuda(), weight.col.cuda(), weight.shape)
    with torch.inference_mode():
        assert direct(x.cuda(), there) is None and direct(x.cuda(), weight) is None
        assert direct(x, there) is None and direct(x, weight, torch.randn(40).cuda()) is None
        assert direct_low_rank(x.cuda(), packed.down, packed.up) is None


def test_sizes_that_overflow_and_empty_ones_go_through_the_op() -> None:
    tall, none = 2**20, torch.zeros(2, dtype=torch.int32)
    col, x = none[:0], torch.randn(2**11, 1)
    weight = BlockSparse(torch.empty(0, 1, tall).transpose(1, 2), none, col, (tall, 1))
    huge = BlockSparse(torch.empty(0, 1, 2**40).transpose(1, 2), none, col, (16, 1))
    wide = BlockSparse(torch.empty(0, 2**40, 16).transpose(1, 2), none, col, (16, 1))
    no_columns = BlockSparse(torch.empty(0, 1, 16).transpose(1, 2), none, col, (16, 0))
    no_rows = BlockSparse(torch.empty(0, 1, 16).transpose(1, 2), none[:1], col, (0, 1))
    with torch.inference_mode():
        assert direct(x, weight) is None  # 2^31 numbers
        assert direct(x, huge) is None and direct(x, wide) is None
        assert direct(x[:, :0], no_columns) is None and direct(x[:1, :0], no_columns) is None
        assert direct(x, no_rows) is None
        assert ops.block_sparse_linear(x[:, :0], no_columns).count_nonzero() == 0
        assert ops.block_sparse_linear(x, no_rows).shape == (2**11, 0)


@pytest.mark.parametrize("change", [_neg, lambda b: b.as_subclass(Special)], ids=["neg", "sub"])
def test_other_biases_go_through_the_op_and_are_right(change) -> None:
    weight, x, plain = weight_of(), torch.randn(5, 60), torch.randn(40)
    packed = PackedLowRankLinear(LowRankLinear(60, 40, 8))
    with torch.inference_mode():
        bias = change(plain)
        assert direct(x, weight, bias) is None
        assert direct_low_rank(x, packed.down, packed.up, bias) is None
        got = torch.Tensor(ops.block_sparse_linear(x, weight, bias))
        assert torch.equal(got, ops.block_sparse_linear(x, weight, plain))


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.randn(5, 61), None, r"x: expected \[\.\.\., 60\], got \[5, 61\]"),
        (torch.randn(5, 60).double(), None, "values: expected the dtype of x"),
        (torch.randn(5, 60), torch.randn(41), "bias: expected size 40 in dimension 0"),
        (torch.randn(5, 60), torch.randn(1, 40), "bias: expected 1 dimensions"),
        (torch.randn(5, 60), torch.randn(40).half(), "bias: expected x's Float"),
        (torch.randn(5, 60), torch.ones(40).int(), "bias: expected x's Float"),
        (torch.randn(5, 60), _spread(torch.randn(40)), "bias: expected a contiguous"),
        (torch.randn(5, 60), torch._efficientzerotensor(40), "bias: expected a contiguous"),
    ],
    ids=["columns", "dtype", "bias", "bias-row", "bias-dtype", "bias-int", "bias-apart", "bias-0"],
)
def test_bad_input_is_refused_as_by_the_op(x: Tensor, bias: Tensor | None, message: str) -> None:
    weight = weight_of()
    with torch.inference_mode():
        assert direct(x, weight, bias) is None
        with pytest.raises((ValueError, RuntimeError), match=message):
            ops.block_sparse_linear(x, weight, bias)


def test_an_unknown_activation_is_refused() -> None:
    module, packed = _modules()
    with torch.inference_mode(), pytest.raises(ValueError, match="activation: expected one of"):
        ops.block_sparse_linear(torch.randn(5, 60), module.weight, None, "tanh")
    with torch.inference_mode(), pytest.raises(ValueError, match="activation: expected one of"):
        ops.low_rank_linear(torch.randn(5, 60), packed.down, packed.up, None, "tanh")


def test_factors_that_do_not_fit_are_refused_as_by_the_op() -> None:
    x = torch.randn(5, 60)
    packed, other = PackedLowRankLinear(LowRankLinear(60, 40, 8)), weight_of()
    half = PackedLowRankLinear(LowRankLinear(60, 40, 8).half())
    with torch.inference_mode():
        assert direct_low_rank(x, other, packed.up) is None
        with pytest.raises(RuntimeError):
            ops.low_rank_linear(x, other, packed.up)
        assert direct_low_rank(x, packed.down, half.up) is None
        with pytest.raises(RuntimeError, match="up_values"):
            ops.low_rank_linear(x, packed.down, half.up)
