"""Settings are checked for their type when they are made."""

import types
import typing
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import numpy as np


def check_types(settings: Any) -> None:
    """Checks the whole numbers, numbers and booleans among a dataclass's fields.

    Numpy's scalars become Python's own, so that equal settings are written alike. Fields of any
    other type are left alone.

    Raises:
        ValueError: a value is of another type; names the field.
    """
    for name, kinds in _kinds(type(settings)).items():
        value = getattr(settings, name)
        if value is None and type(None) in kinds:
            continue
        expected, fitting = _read(value, kinds)
        if fitting is None:
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
        if type(fitting) is not type(value):
            object.__setattr__(settings, name, fitting)


def _read(value: Any, kinds: tuple[type, ...]) -> tuple[str, bool | int | float | None]:
    """What is expected, and the value as one of Python's own; None: it does not fit."""
    boolean = isinstance(value, bool | np.bool_)
    if bool in kinds:
        return "True or False", bool(value) if boolean else None
    if float in kinds:
        if boolean or not isinstance(value, Real):
            return "a number", None
        return "a number", value if isinstance(value, int) else float(value)
    return "a whole number", int(value) if isinstance(value, Integral) and not boolean else None


def _kinds(settings: Any) -> dict[str, tuple[type, ...]]:
    """Field name -> the types it may have, for those that hold a boolean or one number."""
    hints, found = typing.get_type_hints(settings), {}
    for each in fields(settings):
        hint = hints[each.name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = typing.get_args(hint) if union else (hint,)
        if set(kinds) <= {bool, int, float, type(None)}:
            found[each.name] = kinds
    return found
