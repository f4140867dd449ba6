"""What a dry run says."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What a dry run says. `advice` tells why a target cannot be reached; "" where it can."""

    target: str | int
    asked: int
    size: int
    dense_size: int
    smallest: int
    gone: Mapping[str, int]
    places: Mapping[str, tuple[int, int]]  # "head blocks.0" -> (kept, of)
    advice: str = ""

    @property
    def reachable(self) -> bool:
        """Whether the target can be reached."""
        return not self.advice

    def __str__(self) -> str:
        if self.advice:
            return self.advice
        lines = [f"{self.size:,} of {self.dense_size:,} parameters; smallest {self.smallest:,}"]
        lines += [f"{place}: {kept} of {count}" for place, (kept, count) in self.places.items()]
        return "\n".join(lines)
