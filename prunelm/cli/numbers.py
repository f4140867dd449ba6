"""Refuses numbers that make no sense, by option, before any work is done."""

import math
from collections.abc import Mapping


def at_least(least: int, options: Mapping[str, int | None]) -> None:
    """ValueError that names the first option below `least`; None is an option not given."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def above_zero(options: Mapping[str, float | None]) -> None:
    """ValueError that names the first option that is not a finite number above 0."""
    for name, value in options.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a number above 0, got {value}")


def fraction(options: Mapping[str, float]) -> None:
    """ValueError that names the first option outside [0, 1)."""
    for name, value in options.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}: expected a fraction in [0, 1), got {value}")
