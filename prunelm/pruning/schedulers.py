"""How much goes when. A schedule is a class with `sizes`, see `groups.Schedule`."""

from dataclasses import dataclass
from typing import Literal

from prunelm.training.settings import check_types


@dataclass(frozen=True)
class OneShot:
    """Everything at once."""

    def sizes(self, start: int, target: int) -> tuple[int, ...]:
        """(target,)."""
        return (target,)


@dataclass(frozen=True)
class Incremental:
    """In several rounds, with recovery between them.

    "cubic": steep first, t the fraction of rounds done: start + (target - start) (1 - (1 - t)^3)
    (Zhu and Gupta 2017, arXiv 1710.01878). "linear": equal numbers. "geometric": equal ratios.

    Args:
        rounds: how many.
        shape: how the sizes fall from round to round.
    """

    rounds: int = 8
    shape: Literal["cubic", "linear", "geometric"] = "cubic"

    def __post_init__(self) -> None:
        check_types(self)
        if self.rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {self.rounds}")
        if self.shape not in ("cubic", "linear", "geometric"):
            raise ValueError(f"shape: expected cubic, linear or geometric, got {self.shape!r}")

    def sizes(self, start: int, target: int) -> tuple[int, ...]:
        """Parameters after each round, from `start` down; the last is `target`."""
        sizes = []
        for done in range(1, self.rounds):
            t = done / self.rounds
            if self.shape == "geometric":
                size = start * (max(target, 1) / max(start, 1)) ** t
            else:
                size = start + (target - start) * (1 - (1 - t) ** 3 if self.shape == "cubic" else t)
            sizes.append(round(size))
        return (*sizes, target)
