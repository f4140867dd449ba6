"""The axes of a run in words, for reports and records."""

from dataclasses import fields, is_dataclass
from typing import Any

from prunelm.pruning.architecture import Architecture
from prunelm.pruning.methods import Joined


def in_words(value: Any) -> str:
    """A method, criterion, schedule or recovery with its settings."""
    if isinstance(value, Joined):
        return " | ".join(in_words(method) for method in value.methods)
    if is_dataclass(value) and not isinstance(value, type):
        changed = [
            f"{f.name}={getattr(value, f.name)!r}"
            for f in fields(value)
            if f.name != "architecture" or getattr(value, f.name) != Architecture()
        ]
        return f"{type(value).__name__}({', '.join(changed)})"
    if value is None or isinstance(value, int):
        return str(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))
