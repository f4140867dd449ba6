"""Distillation (Hinton et al. 2015, arXiv 1503.02531): a student learns what a teacher expects."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    alpha: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """(1 - alpha) CE(student, targets) + alpha T^2 KL(teacher || student), T dividing KL's logits.

    The mean over positions, computed in float32 or wider. The teacher gets no gradient. T^2 keeps
    the gradient's scale (Hinton et al., section 2).

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V].
        targets: [...] int64.
        alpha: 0 (targets only) to 1 (teacher only).
        temperature: T, more than 0.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: expected 0 to 1, got {alpha}")
    if not temperature > 0.0:
        raise ValueError(f"temperature: expected more than 0, got {temperature}")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits: expected shape {tuple(student_logits.shape)}, "
            f"got {tuple(teacher_logits.shape)}"
        )
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    student = student_logits.flatten(0, -2).to(wide)
    teacher = teacher_logits.detach().flatten(0, -2).to(wide)
    truth = F.cross_entropy(student, targets.flatten())
    divergence = F.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - alpha) * truth + alpha * temperature**2 * divergence


def distilled_from(
    teacher: nn.Module, alpha: float = 0.5, temperature: float = 1.0
) -> Callable[[nn.Module, Tensor], Tensor]:
    """A loss for `train`: `distillation_loss` on ids [B, L + 1], the teacher in eval mode."""
    teacher.eval()

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        if not isinstance(tokens, Tensor) or tokens.dim() != 2:
            got = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"distill: expected batches of token ids [B, L + 1], got {got}")
        with torch.no_grad():
            wanted = teacher(tokens[:, :-1])
        return distillation_loss(model(tokens[:, :-1]), wanted, tokens[:, 1:], alpha, temperature)

    return loss
