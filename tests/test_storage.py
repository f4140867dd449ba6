"""Tensors whose memory was freed, or shrank, are refused by every op, wherever they stand."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import prunelm._C
from prunelm import BlockSparse, ops

Call = Callable[..., Any]


def freed(tensor: Tensor) -> Tensor:
    """The tensor as it was, without its memory."""
    out = tensor.detach().clone(memory_format=torch.preserve_format)
    out.untyped_storage().resize_(0)
    return out.requires_grad_(tensor.requires_grad)


def shrunk(tensor: Tensor) -> Tensor:
    """One element short, seen from an offset: an address that is not null."""
    count = tensor.numel()
    base = tensor.detach().new_zeros(count + 3)
    out = base.as_strided(tensor.shape, tensor.stride(), 3)
    base.untyped_storage().resize_((count + 2) * tensor.element_size())
    return out.requires_grad_(tensor.requires_grad)


def _weight(N: int, K: int) -> BlockSparse:
    return BlockSparse.from_dense(
        torch.randn(N, K), (16, 4), torch.rand(-(-N // 16), -(-K // 4)) < 0.6
    )


def _inputs(op: str) -> dict[str, Tensor]:
    """Every tensor that an op takes, by name."""
    torch.manual_seed(0)
    if op == "block_sparse_linear":
        w = _weight(40, 60)
        named = {"x": torch.randn(5, 60), "values": w.values, "crow": w.crow, "col": w.col}
        return {**named, "bias": torch.randn(40)}
    if op == "low_rank_linear":
        x, down, up = torch.randn(5, 60), torch.randn(8, 60), torch.randn(40, 8)
        return {"x": x, "down": down, "up": up, "bias": torch.randn(40)}
    if op == "low_rank_linear_blocks":
        out = {"x": torch.randn(5, 60), "bias": torch.randn(40)}
        for name, w in (("down_", _weight(16, 60)), ("up_", _weight(40, 16))):
            out |= {f"{name}values": w.values, f"{name}crow": w.crow, f"{name}col": w.col}
        return out
    if op == "beam_step":
        return {
            "score": torch.randn(2, 3),
            "am_logits": torch.randn(2, 3, 20),
            "rows": torch.randn(4, 20),
            "row": torch.randint(4, (2, 3)),
            "weight": torch.rand(2),
            "slot": torch.zeros(2, 3, dtype=torch.int64),
            "token_reward": torch.rand(2),
        }
    if op == "rnnt_loss":
        return {
            "logits": torch.randn(2, 4, 3, 5),
            "targets": torch.randint(1, 5, (2, 2)),
            "logit_lengths": torch.tensor([4, 3]),
            "target_lengths": torch.tensor([2, 1]),
        }
    out = {"qkv": torch.randn(3, 3, 2, 8), "cos": torch.randn(3, 4), "sin": torch.randn(3, 4)}
    out |= {"path": torch.tensor([[0, 1], [1, 2], [0, 3]]), "length": torch.tensor([2, 2, 2])}
    return {**out, "key": torch.randn(4, 2, 8), "value": torch.randn(4, 2, 8)}


def _block_sparse(t: dict[str, Tensor], **options: Any) -> Tensor:
    w = BlockSparse(t["values"], t["crow"], t["col"], (40, 60))
    return ops.block_sparse_linear(t["x"], w, t["bias"], "relu", **options)


def _low_rank_blocks(t: dict[str, Tensor], **options: Any) -> Tensor:
    down = BlockSparse(t["down_values"], t["down_crow"], t["down_col"], (16, 60))
    up = BlockSparse(t["up_values"], t["up_crow"], t["up_col"], (40, 16))
    return ops.low_rank_linear(t["x"], down, up, t["bias"], **options)


def _beam(t: dict[str, Tensor], **options: Any) -> Tensor:
    terms = ((t["rows"], t["row"], t["weight"]),)
    rest = {"slot": t["slot"], "token_reward": t["token_reward"]}
    return ops.beam_step(t["score"], t["am_logits"], terms, **rest, **options).score


def _rnnt(t: dict[str, Tensor], backend: str | None = None) -> Tensor:
    run = ops.rnnt_loss_reference if backend == "reference" else ops.rnnt_loss
    return run(t["logits"], t["targets"], t["logit_lengths"], t["target_lengths"])


CALLS: dict[str, Call] = {
    "block_sparse_linear": _block_sparse,
    "low_rank_linear": lambda t, **o: ops.low_rank_linear(
        t["x"], t["down"], t["up"], t["bias"], "silu", **o
    ),
    "low_rank_linear_blocks": _low_rank_blocks,
    "beam_step": _beam,
    "rnnt_loss": _rnnt,
    "tree_attention": lambda t, **o: ops.tree_attention(**t, **o),
}
PLACES = [(op, name) for op in CALLS for name in _inputs(op)]
LEARNED = {
    "block_sparse_linear": ("x", "values", "bias"),
    "low_rank_linear": ("x", "down", "up", "bias"),
    "beam_step": ("score", "am_logits", "rows", "weight", "token_reward"),
    "rnnt_loss": ("logits",),
}


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("damage", [freed, shrunk])
@pytest.mark.parametrize(("op", "name"), PLACES, ids=lambda p: str(p))
def test_memory_that_is_gone_is_refused(
    op: str, name: str, damage: Callable[[Tensor], Tensor], backend: str | None
) -> None:
    inputs = _inputs(op)
    options = (
        {} if backend is None or (op == "rnnt_loss" and backend == "cpu") else {"backend": backend}
    )
    with torch.inference_mode():
        CALLS[op](inputs, **options)
        damaged = {**inputs, name: damage(inputs[name])}
        with pytest.raises(RuntimeError, match=r"expected a storage of at least .* bytes, got"):
            CALLS[op](damaged, **options)
    learns = {k: v.clone(memory_format=torch.preserve_format) for k, v in inputs.items()}
    for one in LEARNED.get(op, ()):
        learns[one].requires_grad_()
    damaged = {**learns, name: damage(learns[name])}
    with pytest.raises(RuntimeError, match=r"expected a storage of at least .* bytes, got"):
        CALLS[op](damaged, **options)


def _native(op: str, t: dict[str, Tensor]) -> Any:
    run = getattr(torch.ops.prunelm, op)
    if op == "block_sparse_linear":
        return run(*t.values(), 40, 1)
    if op == "low_rank_linear":
        return run(*t.values(), 1)
    if op == "low_rank_linear_blocks":
        x, bias, *factors = t.values()
        return run(x, *factors, bias, 16, 40, 1)
    if op == "rnnt_loss":
        return run(*t.values(), 0)
    if op == "tree_attention":
        return run(*t.values())
    score, logits, rows, row, weight, slot, reward = t.values()
    return run(score, logits, [rows], [row], [weight], slot, [0], reward, 1.0, 0.0, "late", False)


@pytest.mark.parametrize("damage", [freed, shrunk])
@pytest.mark.parametrize(("op", "name"), PLACES, ids=lambda p: str(p))
def test_the_compiled_op_refuses_it_by_itself(
    op: str, name: str, damage: Callable[[Tensor], Tensor]
) -> None:
    inputs = _inputs(op)
    with torch.inference_mode():
        _native(op, inputs)
        with pytest.raises(RuntimeError, match=r"expected a storage of at least .* bytes, got"):
            _native(op, {**inputs, name: damage(inputs[name])})


@pytest.mark.parametrize("op", LEARNED)
def test_backward_refuses_what_was_freed_since_the_call(op: str) -> None:
    for name in _inputs(op):
        learned = _inputs(op)
        for one in LEARNED[op]:
            learned[one].requires_grad_()
        out = CALLS[op](learned)
        learned[name].untyped_storage().resize_(0)
        if op == "rnnt_loss" or (op, name) in [
            ("beam_step", "score"),
            ("beam_step", "token_reward"),
        ]:
            out.sum().backward()  # not kept for it
            continue
        with pytest.raises(RuntimeError, match=r"expected a storage of at least .* bytes, got 0"):
            out.sum().backward()


@pytest.mark.parametrize("name", ["grad", "values", "crow", "col"])
def test_gradient_ops_refuse_it(name: str) -> None:
    w = _weight(40, 60)
    inputs = {"grad": torch.randn(5, 40), "values": w.values, "crow": w.crow, "col": w.col}
    damaged = {**inputs, name: freed(inputs[name])}
    with pytest.raises(RuntimeError, match=f"{name}: expected a storage of at least"):
        torch.ops.prunelm.block_sparse_linear_grad_x(*damaged.values(), 60)
    if name == "values":
        damaged = {**inputs, "values": freed(torch.randn(5, 60))}
    else:
        damaged["values"] = torch.randn(5, 60)
    with pytest.raises(RuntimeError, match="expected a storage of at least"):
        torch.ops.prunelm.block_sparse_linear_grad_values(*damaged.values(), 16, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to_sparse(), "expected a dense tensor, got one in torch.sparse_coo"),
        (lambda t: t.to("meta"), "expected .* got"),
        (lambda t: t.numpy(), "expected a tensor, got ndarray"),
        (lambda t: torch.nested.nested_tensor([t]), "expected a dense tensor, got a nested one"),
    ],
    ids=["sparse", "meta", "numpy", "nested"],
)
@pytest.mark.parametrize(("op", "name"), PLACES, ids=lambda p: str(p))
def test_what_is_no_plain_tensor_is_refused_by_name(
    op: str, name: str, change: Callable[[Tensor], Any], message: str
) -> None:
    inputs = _inputs(op)
    with torch.inference_mode():
        changed = change(inputs[name].clone())
        for options in ({}, {"backend": "reference"}):
            with pytest.raises((RuntimeError, TypeError), match=message):
                CALLS[op]({**inputs, name: changed}, **options)


@pytest.mark.parametrize(("op", "name"), PLACES, ids=lambda p: str(p))
def test_one_tensor_without_memory_does_not_make_a_result_without_numbers(
    op: str, name: str
) -> None:
    inputs = _inputs(op)
    inputs[name] = inputs[name].to("meta")
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"expected .* got"):
        _native(op, inputs)


def test_readable_is_said_of_plain_tensors_only() -> None:
    readable = prunelm._C.readable
    x = torch.randn(3, 4)
    plain: Sequence[Tensor | None] = [x, x.T, x[1:], x[:0], None, torch.nn.Parameter(x), x[0, 0]]
    assert readable(*plain) and readable()
    assert readable(freed(x)[:0])
    for wrong in (
        freed(x),
        shrunk(x),
        freed(x[2:]),
        x.to_sparse(),
        1,
        torch.zeros(2, device="meta"),
    ):
        assert not readable(x, wrong)  # type: ignore[arg-type]
