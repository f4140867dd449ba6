"""Heals a model after a round. A recovery is any callable, see `Recovery`."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from prunelm.pruning.calibration import Calibration, is_main_process, wait_for_all
from prunelm.training.progress import Watch
from prunelm.training.settings import check_types


@dataclass(frozen=True)
class Wound:
    """Where a recovery stands in the run.

    Args:
        round, rounds: this round, counted from 0, of so many to the present target.
        first_step: data steps that earlier rounds have used up.
        seed: of this round.
        dense: the model as it was before the first round, in eval mode.
        folder: for the recovery's own checkpoints, or None.
        watch: is told of each step, or None.
    """

    round: int
    rounds: int
    first_step: int
    seed: int
    dense: nn.Module
    folder: Path | None = None
    watch: Watch | None = None


class Recovery(Protocol):
    """Trains `model` in place, keeps masked weights at zero, returns the data steps it used."""

    def __call__(
        self, model: nn.Module, evidence: Calibration, masks: Mapping[str, Tensor], wound: Wound
    ) -> int: ...


@dataclass(frozen=True)
class Finetune:
    """Fine-tuning by `training.loop.train`, with distillation from the dense model if asked.

    Frozen weights (requires_grad False) stay as they are; a model that has no others is refused.

    Args:
        steps: for one target, shared by its rounds, so that schedules compare at equal cost. The
            learning rate starts anew in each round.
        lr: highest learning rate.
        distill: weight of the dense model's logits in the loss, 0 to 1, where the model maps
            tokens [B, L] to logits [B, L, V]; other parts of a loss of your own then do not count.
        temperature: of the distillation.
        last: the last round's share of the steps, where there are several: the final shape heals
            longest. None: all rounds get the same.
        weight_decay: of AdamW, for matrices only.
        bf16: compute in bfloat16 under autocast.
    """

    steps: int = 200
    lr: float = 1e-3
    distill: float = 0.0
    temperature: float = 2.0
    last: float | None = 0.5
    weight_decay: float = 0.01
    bf16: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if self.steps < 0:
            raise ValueError(f"steps: expected at least 0, got {self.steps}")
        if not self.lr > 0:
            raise ValueError(f"lr: expected more than 0, got {self.lr}")
        for name in ("lr", "temperature", "weight_decay"):
            if math.isinf(getattr(self, name)):
                got = getattr(self, name)
                raise ValueError(f"{name}: expected a finite number, got {got}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: expected 0 or more, got {self.weight_decay}")
        if not 0.0 <= self.distill <= 1.0:
            raise ValueError(f"distill: expected a fraction in [0, 1], got {self.distill}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected more than 0, got {self.temperature}")
        if self.last is not None and not 0.0 <= self.last <= 1.0:
            raise ValueError(f"last: expected a fraction in [0, 1], got {self.last}")

    def share(self, round: int, rounds: int) -> int:
        """Steps of round `round`; they add up to `steps`."""
        if self.last is None or rounds == 1:
            return self.steps * (round + 1) // rounds - self.steps * round // rounds
        final = int(self.steps * self.last)
        if round == rounds - 1:
            return final
        rest, others = self.steps - final, rounds - 1
        return rest * (round + 1) // others - rest * round // others

    def __call__(
        self, model: nn.Module, evidence: Calibration, masks: Mapping[str, Tensor], wound: Wound
    ) -> int:
        """Trains for this round's share of the steps."""
        from prunelm.training.loop import TrainOptions, train

        steps = self.share(wound.round, wound.rounds)
        if not steps:
            return 0
        data = evidence.data
        if data is None:
            raise ValueError("data: expected a function from step to batch, got None")
        options = TrainOptions(
            steps=steps,
            lr=self.lr,
            warmup=max(min(100, steps // 10), 1),
            weight_decay=self.weight_decay,
            bf16=self.bf16,
            seed=wound.seed,
            checkpoint_every=200 if wound.folder is not None else 0,
        )

        watch = wound.watch

        def told(record: Mapping[str, float]) -> None:
            if watch is not None:
                watch("recovery", int(record["step"]), steps)

        loss = evidence.loss
        if self.distill:
            from prunelm.training.distill import distilled_from

            loss = distilled_from(wound.dense, self.distill, self.temperature)
        train(
            model,
            lambda step: data(wound.first_step + step),
            loss,
            options,
            folder=wound.folder,
            masks=masks,
            told=told,
        )
        return steps


def clear(folder: Path) -> None:
    """Removes a recovery's own files, once its round is saved."""
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)
    wait_for_all()
