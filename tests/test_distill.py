import math

import pytest
import torch

from prunelm.models.lm import LMConfig, TransformerLM
from prunelm.training.distill import distillation_loss, distilled_from
from prunelm.training.loop import TrainOptions, train


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.3, 2.5), (1.0, 0.5)])
def test_loss_is_the_formula(alpha: float, temperature: float) -> None:
    student, teacher = (3 * torch.randn(2, 3, 7, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(7, (2, 3))
    total = 0.0
    for b in range(2):
        for t in range(3):
            hard = [math.exp(x) for x in student[b, t].tolist()]
            p = [math.exp(x / temperature) for x in teacher[b, t].tolist()]
            q = [math.exp(x / temperature) for x in student[b, t].tolist()]
            truth = -math.log(hard[int(targets[b, t])] / sum(hard))
            divergence = sum(
                x / sum(p) * (math.log(x / sum(p)) - math.log(y / sum(q)))
                for x, y in zip(p, q, strict=True)
            )
            total += (1 - alpha) * truth + alpha * temperature**2 * divergence
    got = distillation_loss(student, teacher, targets, alpha, temperature)
    assert abs(float(got) - total / 6) <= 1e-12


def test_half_precision_is_widened() -> None:
    student, teacher = (30 * torch.randn(4, 50) for _ in range(2))
    targets = torch.randint(50, (4,))
    half = distillation_loss(student.bfloat16(), teacher.bfloat16(), targets, 0.5, 2.0)
    wide = distillation_loss(
        student.bfloat16().float(), teacher.bfloat16().float(), targets, 0.5, 2.0
    )
    assert half.dtype == torch.float32
    assert torch.equal(half, wide)


def test_only_the_student_learns() -> None:
    student, teacher = (torch.randn(2, 5, requires_grad=True) for _ in range(2))
    distillation_loss(student, teacher, torch.tensor([0, 4]), 1.0).backward()
    assert student.grad is not None
    assert teacher.grad is None
    wanted = (student.softmax(-1) - teacher.softmax(-1)).detach() / 2
    assert (student.grad - wanted).abs().max() <= 1e-6


def test_a_student_comes_to_agree_with_its_teacher() -> None:
    config = LMConfig.preset("tiny", 11)
    teacher, student = TransformerLM(config), TransformerLM(config)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    tokens = torch.randint(11, (8, 12))
    teacher.train()
    loss = distilled_from(teacher, alpha=1.0, temperature=2.0)
    assert not teacher.training
    before = float(loss(student, tokens).detach())
    train(student, lambda step: tokens, loss, TrainOptions(steps=80, lr=1e-2, warmup=5))
    assert float(loss(student, tokens).detach()) <= 0.1 * before


@pytest.mark.parametrize(
    ("alpha", "temperature", "message"),
    [
        (1.5, 1.0, "alpha: expected 0 to 1, got 1.5"),
        (math.nan, 1.0, "alpha: expected 0 to 1, got nan"),
        (0.5, 0.0, "temperature: expected more than 0, got 0.0"),
    ],
)
def test_bad_weights_are_refused(alpha: float, temperature: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1), alpha, temperature)


def test_another_vocabulary_is_refused() -> None:
    message = r"teacher_logits: expected shape \(3, 5\), got \(3, 6\)"
    with pytest.raises(ValueError, match=message):
        distillation_loss(torch.zeros(3, 5), torch.zeros(3, 6), torch.zeros(3, dtype=torch.int64))
