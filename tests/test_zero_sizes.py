"""Every size of every op can be 0: forward, backward, past the dispatcher and through it."""

import itertools

import pytest
import torch
from torch import nn

from prunelm import BlockSparse, ops
from prunelm.nn import BlockSparseLinear, LowRankLinear

SHAPES = list(itertools.product((0, 3), (0, 40), (0, 24), (0, 8)))


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"], ids=str)
@pytest.mark.parametrize(("M", "N", "K", "R"), SHAPES, ids=str)
@pytest.mark.parametrize("lead", [(), (2,)], ids=["flat", "batched"])
def test_low_rank_linear(
    M: int, N: int, K: int, R: int, activation: str | None, lead: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    results = []
    x, down, up, bias = (
        torch.randn(*lead, M, K),
        torch.randn(R, K),
        torch.randn(N, R),
        torch.randn(N),
    )
    grad = torch.randn(*lead, M, N)
    for backend in (None, "cpu", "reference"):
        tensors = [t.clone().requires_grad_() for t in (x, down, up, bias)]
        y = ops.low_rank_linear(*tensors, activation, backend)
        results.append([y, *torch.autograd.grad(y, tensors, grad)])
    for got in results[:2]:
        for one, want in zip(got, results[2], strict=True):
            torch.testing.assert_close(one, want, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        y = ops.low_rank_linear(x, down, up, bias, activation)
        factors = [BlockSparse.from_dense(f, (16, max(f.shape[1], 1))) for f in (down, up)]
        for got in (y, ops.low_rank_linear(x, *factors, bias, activation)):
            torch.testing.assert_close(got, results[2][0].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kept", [False, True], ids=["none-stored", "stored"])
@pytest.mark.parametrize("block", [(16, 4), (5, 3), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("M", "N", "K"), list(itertools.product((0, 3), (0, 40), (0, 24))), ids=str
)
def test_block_sparse_linear(M: int, N: int, K: int, block: tuple[int, int], kept: bool) -> None:
    torch.manual_seed(0)
    mask = torch.full((-(-N // block[0]), -(-K // block[1])), kept)
    weight = BlockSparse.from_dense(torch.randn(N, K), block, mask)
    x, bias, grad = torch.randn(M, K), torch.randn(N), torch.randn(M, N)
    for activation in (None, "gelu"):
        results = []
        for backend in (None, "cpu", "reference"):
            tensors = [
                t.detach().clone(memory_format=torch.preserve_format)
                for t in (x, weight.values, bias)
            ]
            tensors = [t.requires_grad_() for t in tensors]
            stored = BlockSparse(tensors[1], weight.crow, weight.col, weight.shape)
            y = ops.block_sparse_linear(tensors[0], stored, tensors[2], activation, backend)
            results.append([y, *torch.autograd.grad(y, tensors, grad)])
        for got in results[:2]:
            for one, want in zip(got, results[2], strict=True):
                torch.testing.assert_close(one, want)
        with torch.inference_mode():
            y = ops.block_sparse_linear(x, weight, bias, activation)
            torch.testing.assert_close(y, results[2][0].detach())


@pytest.mark.parametrize("M", [0, 3])
def test_modules(M: int) -> None:
    torch.manual_seed(0)
    N, K = 40, 24
    modules: list[nn.Module] = [LowRankLinear(K, N, R) for R in (0, 8)]
    modules.append(BlockSparseLinear.from_linear(nn.Linear(K, N), (16, 4)))
    for module in modules:
        x = torch.randn(M, K, requires_grad=True)
        y = module(x)
        assert y.shape == (M, N)
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == (M, K)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
        with torch.inference_mode():
            torch.testing.assert_close(module.eval()(x.detach()), y.detach())


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_the_search_ops(backend: str | None) -> None:
    empty = torch.zeros(0, 2), torch.zeros(0, 2, 5)
    term = (torch.zeros(4, 5), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0))
    out = ops.beam_step(*empty, (term,), backend=backend)
    assert [list(t.shape) for t in out] == [[0, 2], [0, 2], [0, 2], [0, 2, 2], [0]]
    score, logits = torch.zeros(1, 2, requires_grad=True), torch.randn(1, 2, 5, requires_grad=True)
    none = (torch.zeros(0, 5), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1))
    with pytest.raises(RuntimeError, match="row: expected 0 to -1, got 0"):
        ops.beam_step(score, logits, (none,), backend=backend)
    for W, V in ((0, 5), (2, 0)):
        with pytest.raises(RuntimeError, match="am_logits: expected W and V of at least 1, got"):
            ops.beam_step(torch.zeros(1, W), torch.zeros(1, W, V), backend=backend)
    for R, H in ((0, 2), (3, 0)):
        qkv, angle = torch.randn(R, 3, H, 4), torch.zeros(R, 2)
        path, length = torch.zeros(R, 1, dtype=torch.int64), torch.ones(R, dtype=torch.int64)
        pool = torch.zeros(2, 1, H, 4)
        out = ops.tree_attention(qkv, angle, angle, path, length, *pool, backend=backend)
        assert out.shape == (R, H, 4)
    qkv, angle, length = (
        torch.randn(3, 3, 2, 4),
        torch.zeros(3, 2),
        torch.ones(3, dtype=torch.int64),
    )
    pool = torch.zeros(2, 1, 2, 4)
    for path, store, message in (
        (torch.zeros(3, 0, dtype=torch.int64), pool, "length: expected 1 to 0, got 1"),
        (torch.zeros(3, 1, dtype=torch.int64), pool[:, :0], "path: expected 0 to -1, got 0"),
        (torch.full((3, 1), -1), pool, "path: expected 0 to 0, got -1"),
        (torch.full((3, 1), 1), pool, "path: expected 0 to 0, got 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.tree_attention(qkv, angle, angle, path, length, *store, backend=backend)


@pytest.mark.parametrize("run", [ops.rnnt_loss, ops.rnnt_loss_reference])
def test_rnnt_loss(run) -> None:
    def of(B: int, T: int, U: int, V: int) -> torch.Tensor:
        logits = torch.randn(B, T, U + 1, V, requires_grad=True)
        lengths = torch.full((B,), T), torch.full((B,), U)
        loss = run(logits, torch.ones(B, U, dtype=torch.int64), *lengths)
        loss.sum().backward()
        assert logits.grad is None or logits.grad.isfinite().all()
        return loss

    assert of(0, 3, 2, 4).shape == (0,)
    assert of(2, 3, 0, 4).shape == (2,)
    assert of(2, 3, 0, 1).tolist() == [0, 0]
    if run is ops.rnnt_loss:
        for sizes, message in (
            ((2, 0, 2, 4), "logit_lengths: expected 1 to 0, got 0"),
            ((2, 3, 2, 0), r"logits: expected U \+ 1 and V of at least 1"),
        ):
            with pytest.raises(RuntimeError, match=message):
                of(*sizes)
