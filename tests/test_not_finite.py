"""What is not finite goes the same way through every op as through plain torch: NaN stays NaN."""

import math

import pytest
import torch
from torch import Tensor

from prunelm import BlockSparse, ops
from prunelm.ops.activation import activate

WILD = [math.nan, math.inf, -math.inf]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ACTIVATIONS = [None, "relu", "gelu", "silu"]
SIZES = [(1, 16, 64), (3, 40, 60), (7, 33, 21), (17, 64, 128)]  # M, N, K: whole vectors and tails


def same_kind(got: Tensor, want: Tensor) -> None:
    """NaN and infinities at the same places, and close numbers elsewhere."""
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got == math.inf, want == math.inf)
    assert torch.equal(got == -math.inf, want == -math.inf)
    there = want.isfinite()
    error = (got.double() - want.double())[there].abs()
    assert (error <= 2e-2 + 2e-2 * want.double()[there].abs()).all()


def through_activation(before: Tensor, activation: str | None) -> Tensor:
    """In float64: torch's own vectors of float32 make NaN of gelu(inf).

    Of -inf torch makes NaN in gelu and silu; the functions go to 0, and so do the kernels.
    """
    out = activate(before.double(), activation).to(before.dtype)
    return out.masked_fill(before == -math.inf, 0) if activation in ("gelu", "silu") else out


def _full(N: int, K: int, block: tuple[int, int], dtype: torch.dtype) -> BlockSparse:
    mask = torch.ones(-(-N // block[0]), -(-K // block[1]), dtype=torch.bool)
    return BlockSparse.from_dense(torch.randn(N, K).to(dtype), block, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("block", [(16, 4), (16, 16), (32, 16), (8, 5), (1, 1)], ids=str)
def test_block_sparse_linear_keeps_what_is_not_finite(
    block: tuple[int, int], activation: str | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    for M, N, K in SIZES:
        weight = _full(N, K, block, dtype)
        dense = weight.to_dense()
        for at, wild in enumerate(WILD):
            x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
            x[-1, (7 * at + K - 1) % K] = wild
            bias[N // 2 - at] = wild
            before = (x.double() @ dense.double().T + bias.double()).to(dtype)
            for run in (torch.inference_mode, torch.enable_grad):
                with run():
                    got = ops.block_sparse_linear(x, weight, bias, activation)
                    same_kind(got, through_activation(before, activation))
            weight.values[0, 0, 0] = wild
            spoiled = (x.double() @ weight.to_dense().double().T + bias.double()).to(dtype)
            got = ops.block_sparse_linear(x, weight, bias, activation)
            same_kind(got, through_activation(spoiled, activation))
            weight.values[0, 0, 0] = dense[0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_low_rank_linear_keeps_what_is_not_finite(
    activation: str | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    for M, N, K in SIZES:
        down, up = torch.randn(8, K).to(dtype), torch.randn(N, 8).to(dtype)
        for wild in WILD:
            x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
            x[M // 2, K // 3] = wild
            bias[N - 1] = wild
            for wide in (up, up.clone()):
                wide[0, 3] = wild if wide is not up else wide[0, 3]
                before = (x.double() @ down.double().T) @ wide.double().T + bias.double()
                want = through_activation(before.to(dtype), activation)
                same_kind(ops.low_rank_linear(x, down, wide, bias, activation), want)
                factors = [BlockSparse.from_dense(f, (16, f.shape[1])) for f in (down, wide)]
                with torch.inference_mode():
                    same_kind(ops.low_rank_linear(x, *factors, bias, activation), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_keep_what_is_not_finite(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    M, N, K = 5, 32, 24
    weight = BlockSparse.from_dense(torch.randn(N, K).to(dtype), (16, 4))
    down, up = torch.randn(8, K).to(dtype), torch.randn(N, 8).to(dtype)
    for activation in ACTIVATIONS:
        x, grad = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        x[1, 2], grad[3, 4] = math.nan, math.nan
        x.requires_grad_()
        values = weight.values.clone(memory_format=torch.preserve_format).requires_grad_()
        stored = BlockSparse(values, weight.crow, weight.col, weight.shape)
        y = ops.block_sparse_linear(x, stored, None, activation)
        grads = torch.autograd.grad(y, (x, values), grad)
        y = ops.block_sparse_linear(x, stored, None, activation, "reference")
        for got, want in zip(grads, torch.autograd.grad(y, (x, values), grad), strict=True):
            assert torch.equal(got.isnan(), want.isnan())
        thin = down.clone().requires_grad_()
        y = ops.low_rank_linear(x, thin, up, None, activation)
        grads = torch.autograd.grad(y, (x, thin), grad)
        y = ops.low_rank_linear(x, thin, up, None, activation, "reference")
        for got, want in zip(grads, torch.autograd.grad(y, (x, thin), grad), strict=True):
            assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("V", [2, 8, 16, 21], ids=str)
def test_rnnt_loss_keeps_what_is_not_finite(V: int, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    frames, tokens = torch.tensor([4, 3]), torch.tensor([2, 1])
    targets = torch.randint(1, V, (2, 2))
    for wild in WILD:
        for t in range(4):
            for u in range(3):
                for v in (0, V - 1, int(targets[0, min(u, 1)])):
                    logits = torch.randn(2, 4, 3, V, dtype=dtype)
                    logits[0, t, u, v] = wild
                    kernel = logits.clone().requires_grad_()
                    plain = logits.clone().requires_grad_()
                    got = ops.rnnt_loss(kernel, targets, frames, tokens)
                    want = ops.rnnt_loss_reference(plain, targets, frames, tokens)
                    same_kind(got.detach(), want.detach())
                    assert got[1].isfinite()
                    if not wild == -math.inf:
                        assert got[0].isnan()
                    (first,) = torch.autograd.grad(got.sum(), kernel)
                    if got[0].isnan():
                        assert first[0].isnan().all()  # all cells of it are used
                    assert first[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("D", [2, 8, 20])
def test_tree_attention_keeps_what_is_not_finite(D: int, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    R, H, C, P = 6, 2, 40, 19
    path, length = (
        torch.stack([torch.randperm(C)[:P] for _ in range(R)]),
        torch.arange(1, R + 1) * 3,
    )
    for wild in WILD:
        for at in range(P):
            qkv = torch.randn(R, 3, H, D, dtype=dtype)
            angle = torch.rand(R, D // 2, dtype=dtype)
            key, value = torch.randn(2, C, H, D, dtype=dtype)
            key[path[3, at], 1, at % D] = wild
            value[path[2, at], 0, D - 1] = wild
            if at == 5:
                qkv[1, 0, 0, 0] = wild
            out = []
            for backend in ("cpu", "reference"):
                pool = key.clone(), value.clone()
                args = (qkv, angle.cos(), angle.sin(), path, length, *pool)
                out.append(ops.tree_attention(*args, backend=backend))
            same_kind(*out)


@pytest.mark.parametrize("prune", ["late", "early", "after"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("V", [3, 16, 21, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_beam_step_says_what_is_not_finite(
    dtype: torch.dtype, V: int, normalise: bool, prune: str
) -> None:
    torch.manual_seed(6)
    B, W = 3, 2
    for wild in WILD:
        for place in ("score", "am_logits", "rows", "weight", "token_reward"):
            for at in (0, V // 2, V - 1):
                t = {
                    "score": torch.randn(B, W, dtype=dtype),
                    "am_logits": torch.randn(B, W, V, dtype=dtype),
                    "rows": torch.randn(4, V, dtype=dtype),
                    "weight": torch.rand(B, dtype=dtype) + 0.1,
                    "token_reward": torch.rand(B, dtype=dtype),
                }
                row = torch.tensor([[0, 1], [2, 3], [2, 3]])
                spot = {"score": (0, 1), "am_logits": (0, 1, at), "rows": (1, at)}.get(place, (0,))
                t[place][spot] = wild
                outs = []
                for backend in (None, "cpu", "reference"):
                    outs.append(
                        ops.beam_step(
                            t["score"],
                            t["am_logits"],
                            ((t["rows"], row, t["weight"]),),
                            token_reward=t["token_reward"],
                            prune=prune,
                            normalise=normalise,
                            backend=backend,
                        )
                    )
                for got in outs[:2]:
                    assert not got.score.isnan().any() and not (got.score == math.inf).any()
                    assert torch.equal(got.bad, outs[2].bad), (wild, place, at)
                    assert torch.equal(got.token, outs[2].token), (wild, place, at)
                    assert torch.equal(got.parent, outs[2].parent)
                    torch.testing.assert_close(got.score, outs[2].score, rtol=1e-4, atol=1e-5)
                if place in ("score", "am_logits") and wild != -math.inf:
                    assert outs[0].bad.tolist() == [True, False, False]
