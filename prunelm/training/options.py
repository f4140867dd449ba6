"""How a run is trained, and what it went through."""

import math
from dataclasses import dataclass, field

from prunelm.training.settings import check_types

CADENCE = ("log_every", "validate_every", "checkpoint_every")


@dataclass(frozen=True)
class TrainOptions:
    """How long and how fast to train.

    The learning rate rises linearly to its highest, then falls as a half cosine.

    Args:
        steps: updates of the weights. More of them than a finished or stopped run had extend it:
            the learning rate then follows the schedule of the longer run from the present step on.
        lr: highest learning rate.
        warmup: steps over which the learning rate rises.
        final_lr_fraction: where the learning rate ends, as a share of the highest.
        weight_decay: of AdamW, for matrices only.
        clip: largest norm of the gradient of all weights together.
        bf16: compute in bfloat16 under autocast.
        seed: of everything random; equal seeds give equal runs.
        log_every: steps between lines of the log; 0: only at the end.
        validate_every: steps between validations; 0: only at the end.
        checkpoint_every: steps between checkpoints; 0: only at the end.
        accumulate: batches that make a step.
        average: above 0, such as 0.998: the running mean mean = average * mean + (1 - average) *
            weights is what is validated and returned; its first steps forget faster.
    """

    steps: int
    lr: float
    warmup: int = 100
    final_lr_fraction: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    bf16: bool = False
    seed: int = 0
    log_every: int = 50
    validate_every: int = 0
    checkpoint_every: int = 0
    accumulate: int = 1
    average: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "warmup", *CADENCE):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if math.isinf(self.lr):
            raise ValueError(f"lr: expected a finite number, got {self.lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected 0 or more, got {self.weight_decay}")
        if not 0 <= self.final_lr_fraction <= 1:
            got = self.final_lr_fraction
            raise ValueError(f"final_lr_fraction: expected a fraction in [0, 1], got {got}")
        if self.accumulate < 1:
            raise ValueError(f"accumulate: expected at least 1, got {self.accumulate}")
        if not 0 <= self.average < 1:
            raise ValueError(f"average: expected a fraction in [0, 1), got {self.average}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: expected a number of 64 bits, got {self.seed}")

    def lr_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * (self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine)


@dataclass
class History:
    """What a run went through; `records` are the lines of log.jsonl."""

    records: list[dict[str, float]] = field(default_factory=list)
    best: float = math.inf
    best_step: int = 0
    seconds: float = 0.0

    @property
    def losses(self) -> list[float]:
        """Mean training loss of each logging window."""
        return [record["loss"] for record in self.records if "loss" in record]

    @property
    def validations(self) -> list[float]:
        """What `validate` returned, in order."""
        return [record["validation"] for record in self.records if "validation" in record]
