"""RNN-T loss against a sum over all alignments that are written out one by one."""

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from prunelm.ops.rnnt_loss import rnnt_loss, rnnt_loss_reference


def brute_force(log_probs: Tensor, targets: list[int], blank: int) -> Tensor:
    """-log of the sum over alignments: T + U steps in any order that ends with a blank."""
    frames, tokens = log_probs.shape[0], len(targets)
    scores = []
    for places in combinations(range(frames + tokens - 1), tokens):
        t, u, score = 0, 0, log_probs.new_zeros(())
        for step in range(frames + tokens):
            if step in places:
                score, u = score + log_probs[t, u, targets[u]], u + 1
            else:
                score, t = score + log_probs[t, u, blank], t + 1
        scores.append(score)
    return -torch.stack(scores).logsumexp(0)


def batch(
    shape: tuple[int, int, int, int], *, blank: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random logits and targets; the first utterance is full, the others have random lengths."""
    B, T, U1, V = shape
    logits = torch.randn(shape, dtype=dtype) * 2
    targets = torch.randint(1, V, (B, U1 - 1)) if V > 1 else torch.zeros(B, 0, dtype=torch.int64)
    targets = (targets + blank) % V
    frames, tokens = torch.randint(1, T + 1, (B,)), torch.randint(0, U1, (B,))
    if B:
        frames[0], tokens[0] = T, U1 - 1
    return logits, targets, frames, tokens


SHAPES = [
    pytest.param((1, 1, 1, 2), id="one-frame-no-token"),
    pytest.param((2, 1, 4, 3), id="one-frame"),
    pytest.param((3, 5, 1, 4), id="no-tokens"),
    pytest.param((4, 6, 4, 5), id="ragged"),
    pytest.param((2, 3, 5, 33), id="more-tokens-than-frames"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blank", [0, 1])
def test_it_is_the_sum_over_alignments(shape: tuple[int, int, int, int], blank: int) -> None:
    logits, targets, frames, tokens = batch(shape, blank=blank)
    logits.requires_grad_()
    loss = rnnt_loss(logits, targets, frames, tokens, blank)
    expected = torch.stack(
        [
            brute_force(row[:t].log_softmax(-1), y[:u].tolist(), blank)
            for row, y, t, u in zip(logits, targets, frames, tokens, strict=True)
        ]
    )
    assert float((loss - expected).detach().abs().max()) <= 1e-10
    weight = torch.rand(shape[0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss, logits, weight)
    (wanted,) = torch.autograd.grad(expected, logits, weight)
    assert float((gradient - wanted).abs().max()) <= 1e-10


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((5, 23, 12, 29), id="characters"),
        pytest.param((2, 9, 7, 501), id="units"),
        pytest.param((3, 17, 8, 16), id="one-vector"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_agrees_with_the_reference(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    logits, targets, frames, tokens = batch(shape, dtype=dtype)
    exact = logits.double().requires_grad_()
    wanted = rnnt_loss_reference(exact, targets, frames, tokens)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), exact)
    logits.requires_grad_()
    loss = rnnt_loss(logits, targets, frames, tokens)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    allowed = 1e-6 if dtype == torch.float32 else 1e-12
    assert loss.dtype == gradient.dtype == dtype
    assert float(((loss - wanted) / wanted).detach().abs().max()) <= allowed
    assert float((gradient - wanted_gradient).abs().max()) <= allowed


def test_padding_is_not_read_and_has_no_gradient() -> None:
    logits, targets, frames, tokens = batch((3, 7, 5, 6), dtype=torch.float32)
    frames, tokens = torch.tensor([7, 4, 1]), torch.tensor([4, 2, 0])
    clean = rnnt_loss(logits, targets, frames, tokens)
    for b in range(3):
        logits[b, frames[b] :] = math.nan
        logits[b, :, tokens[b] + 1 :] = math.nan
        targets[b, tokens[b] :] = 99
    logits.requires_grad_()
    loss = rnnt_loss(logits, targets, frames, tokens)
    assert torch.equal(loss, clean)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert bool((gradient[logits.isnan()] == 0).all()) and bool(gradient.isfinite().all())


def test_a_gradient_sums_to_zero_over_the_vocabulary() -> None:
    logits, targets, frames, tokens = batch((4, 31, 9, 29), dtype=torch.float32)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(rnnt_loss(logits, targets, frames, tokens).sum(), logits)
    assert float(gradient.sum(-1).abs().max()) <= 1e-6


def test_long_lattices_and_large_logits_stay_finite() -> None:
    logits, targets, frames, tokens = batch((1, 900, 121, 5), dtype=torch.float32)
    logits = (logits * 40).requires_grad_()
    loss = rnnt_loss(logits, targets, frames, tokens)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    exact = rnnt_loss(logits.double(), targets, frames, tokens)
    assert float(((loss - exact) / exact).detach().abs().max()) <= 1e-6
    assert bool(gradient.isfinite().all())


def test_an_utterance_without_an_alignment_costs_infinity() -> None:
    logits = torch.zeros(1, 2, 2, 3)
    logits[:, :, :, 0] = -math.inf
    loss = rnnt_loss(logits, torch.tensor([[1]]), torch.tensor([2]), torch.tensor([1]))
    assert loss.tolist() == [math.inf]


def test_a_batch_gives_what_its_utterances_give_alone() -> None:
    logits, targets, frames, tokens = batch((4, 12, 6, 29), dtype=torch.float32)
    together = rnnt_loss(logits, targets, frames, tokens)
    for b in range(4):
        one = slice(b, b + 1)
        alone = rnnt_loss(logits[one], targets[one], frames[one], tokens[one])
        assert torch.equal(alone, together[one])


def test_no_utterances() -> None:
    loss = rnnt_loss(*batch((0, 3, 2, 4)))
    assert loss.shape == (0,)


def test_gradcheck() -> None:
    logits, targets, frames, tokens = batch((2, 4, 3, 4))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rnnt_loss(x, targets, frames, tokens), logits)


def test_opcheck_and_compile() -> None:
    logits, targets, frames, tokens = batch((2, 4, 3, 4), dtype=torch.float32)
    logits.requires_grad_()
    torch.library.opcheck(torch.ops.prunelm.rnnt_loss.default, (logits, targets, frames, tokens, 0))
    compiled = torch.compile(rnnt_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(logits, targets, frames, tokens)
    assert torch.equal(loss, rnnt_loss(logits, targets, frames, tokens))
    loss.sum().backward()
    assert logits.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 3, 4)}, r"logits: expected 4 dimensions, got \[2, 3, 4\]"),
        ({0: torch.zeros(2, 4, 3, 4).half()}, "logits: expected float32 or float64, got Half"),
        ({1: torch.zeros(2, 3, dtype=torch.int64)}, r"targets: expected size 2 in dimension 1"),
        ({1: torch.tensor([[1, 2], [0, 3]])}, "targets: expected tokens .* without blank, got 0"),
        ({1: torch.tensor([[1, 2], [4, 3]])}, "targets: expected tokens .* without blank, got 4"),
        ({1: torch.ones(2, 2)}, "targets: expected Long, got Float"),
        ({2: torch.tensor([4, 5])}, "logit_lengths: expected 1 to 4, got 5 at 1"),
        ({2: torch.tensor([0, 4])}, "logit_lengths: expected 1 to 4, got 0 at 0"),
        ({3: torch.tensor([2, 3])}, "target_lengths: expected 0 to 2, got 3 at 1"),
        ({4: 4}, "blank: expected 0 to 3, got 4"),
    ],
    ids=lambda x: x.split(",")[0] if isinstance(x, str) else "",
)
def test_wrong_arguments_are_refused_by_name(change: dict[int, object], message: str) -> None:
    arguments: list[object] = [
        torch.zeros(2, 4, 3, 4),
        torch.tensor([[1, 2], [3, 3]]),
        torch.tensor([4, 2]),
        torch.tensor([2, 2]),
        0,
    ]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        rnnt_loss(*arguments)  # type: ignore[arg-type]
