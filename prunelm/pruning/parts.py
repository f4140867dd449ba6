"""What a pruner is given is checked before anything is done or written."""

from collections.abc import Iterable
from typing import Any

_NEEDED = {
    "method": (("prepare", "groups"), "such as Heads() | Neurons()"),
    "criterion": (("score", "batches", "in_loss_units"), "such as Taylor()"),
    "schedule": (("sizes",), "such as OneShot()"),
    "recovery": (("__call__",), "such as Finetune(), or None"),
}


def check_part(name: str, value: Any) -> None:
    """ValueError unless `value` can be a pruner's `name`: its method, criterion and so on."""
    attributes, example = _NEEDED[name]
    if isinstance(value, type):
        raise ValueError(
            f"{name}: expected an object, {example}, got the class {value.__name__}; "
            f"did you mean {value.__name__}()?"
        )
    if not all(hasattr(value, attribute) for attribute in attributes):
        raise ValueError(f"{name}: expected an object, {example}, got {value!r}")


def check_function(name: str, value: Any, arguments: str) -> None:
    """ValueError unless `value` can be called."""
    if not callable(value):
        raise ValueError(f"{name}: expected a function of {arguments}, got {_short(value)}")


def listed(targets: Any) -> list[Any]:
    """The sizes of a ladder; ValueError for what is no list of them."""
    try:
        if isinstance(targets, str | bytes) or not isinstance(targets, Iterable):
            raise TypeError
        return list(targets)
    except TypeError:
        raise ValueError(f"targets: expected a list of sizes, got {targets!r}") from None


def _short(value: Any) -> str:
    """The value where that is a word or two, else its type."""
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else type(value).__name__
