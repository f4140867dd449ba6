"""What losing a group would cost. A criterion is a class with `score`, see `groups.Criterion`.

Scores are per group and add up; the budget divides them by what the group costs, which makes kinds
of different size comparable. Groups that have gone already get any score: nobody reads it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from prunelm.pruning.groups import Evidence, Groups
from prunelm.training.settings import check_types


@dataclass(frozen=True)
class Random:
    """Uniform scores from the run's seed: the baseline that every other criterion must beat."""

    in_loss_units: ClassVar[bool] = False
    batches: ClassVar[int] = 0

    def score(self, model: nn.Module, groups: Sequence[Groups], evidence: Evidence) -> list[Tensor]:
        """One [count] tensor per `Groups`; a group's score grows with its cost."""
        generator = torch.Generator().manual_seed(evidence.seed)
        return [torch.rand(g.count, generator=generator) * g.cost for g in groups]


@dataclass(frozen=True)
class Magnitude:
    """||w_G||_p^p: aggregated over the group after the power, and so additive over groups.

    Within a kind the order is that of the norm; per parameter it is the mean of |w|^p, which lets
    groups of different size be compared. A rank component s u v' is represented by s u.

    Args:
        p: power of the absolute weights, above 0.
    """

    p: float = 2.0
    in_loss_units: ClassVar[bool] = False
    batches: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_types(self)
        if not self.p > 0:
            raise ValueError(f"p: expected more than 0, got {self.p}")
        if math.isinf(self.p):
            raise ValueError(f"p: expected a finite number, got {self.p}")

    def score(self, model: nn.Module, groups: Sequence[Groups], evidence: Evidence) -> list[Tensor]:
        """One [count] tensor per `Groups`."""
        power = {n: w.detach().float().abs().pow(self.p) for n, w in model.named_parameters()}
        return [g.fold(power).sum(1).cpu() for g in groups]


@dataclass(frozen=True)
class Taylor:
    """|sum over the group of g w| = |dL/dm_G|, m the group's mask, g the mean gradient.

    The first-order change of the loss over all samples of the first `batches` batches; frozen
    weights (requires_grad False) are scored like others and stay frozen. Summed
    inside the group before the absolute value (Molchanov et al. 2019, arXiv 1906.10771, without
    the square).

    Args:
        order: of the expansion; 1.
        batches: of data whose mean gradient is taken.
    """

    order: int = 1
    batches: int = 16
    in_loss_units: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_types(self)
        if self.order != 1:
            raise ValueError(f"order: expected 1, got {self.order}")
        if self.batches < 1:
            raise ValueError(f"batches: expected at least 1, got {self.batches}")

    def score(self, model: nn.Module, groups: Sequence[Groups], evidence: Evidence) -> list[Tensor]:
        """One [count] tensor per `Groups`."""
        gradient = evidence.mean_gradient(model, self.batches)
        product = {
            name: weight.detach().float() * gradient[name]
            for name, weight in model.named_parameters()
            if name in gradient
        }
        return [g.fold(product).sum(1).abs().cpu() for g in groups]
