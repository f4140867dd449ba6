"""What a typed function, or a class that an option makes, takes."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Union

MISSING: Any = inspect.Parameter.empty


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter: its type, its default (`MISSING` without one), what its docstring says."""

    name: str
    hint: Any
    default: Any
    text: str


@dataclasses.dataclass(frozen=True)
class Choice:
    """A parameter that is an object of one of several classes.

    Args:
        kinds: the classes by name.
        protocol: what a class of the user's own must satisfy; None where none is taken.
        several: whether it is a list of objects.
    """

    kinds: dict[str, type]
    protocol: type | None
    several: bool


def parameters_of(target: Callable[..., Any]) -> dict[str, Parameter]:
    """By name, in order. A dataclass gives its fields, another class what `__init__` takes."""
    helps = argument_helps(target.__doc__)
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # some classes written in C
        return {}
    if dataclasses.is_dataclass(target):
        hints = _hints(target)
        defaults = {f.name: _default(f) for f in dataclasses.fields(target)}
    else:
        source = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        hints = _hints(source)
        defaults = {name: each.default for name, each in signature.parameters.items()}
    return {
        name: Parameter(
            name, hints.get(name, Any), defaults.get(name, MISSING), helps.get(name, "")
        )
        for name, each in signature.parameters.items()
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    }


def _hints(source: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(source, include_extras=True)
    except (NameError, TypeError, AttributeError):  # names that only a type checker imports
        return {}


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING


def group_of(hint: Any) -> type | None:
    """The dataclass whose fields are options of their own; None where a hint is no such."""
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def choice_of(hint: Any) -> Choice | None:
    """The classes that a hint chooses between; None where it is no choice between classes."""
    if group_of(hint) is not None:
        return None
    kinds: dict[str, type] = {}
    protocol, several, pending = None, False, [hint]
    while pending:
        each = pending.pop(0)
        origin = typing.get_origin(each)
        if origin in (Union, types.UnionType, list):
            pending += typing.get_args(each)
            several = several or origin is list
        elif group_of(each) is not None:
            kinds[each.__name__] = each
        elif getattr(each, "_is_protocol", False):
            protocol = each
    return Choice(kinds, protocol, several) if kinds else None


def is_list(hint: Any) -> bool:
    """Whether an option takes several words."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return any(is_list(each) for each in typing.get_args(hint))
    return typing.get_origin(hint) is list


def required(parameters: Iterable[Parameter]) -> list[str]:
    """Names of those without a default."""
    return [each.name for each in parameters if each.default is MISSING]


def members(protocol: type) -> list[str]:
    """What an object must have to satisfy a protocol."""
    names = {**vars(protocol), **inspect.get_annotations(protocol)}
    return [name for name in names if not name.startswith("_") or name == "__call__"]


def option_names(parameters: dict[str, Parameter], prefix: str = "") -> list[str]:
    """All names that an option can have: method, method.min_keep, options.steps."""
    names = []
    for name, each in parameters.items():
        names.append(prefix + name)
        group, choice = group_of(each.hint), choice_of(each.hint)
        kinds = [group] if group else list(choice.kinds.values()) if choice else []
        for kind in kinds:
            names += option_names(parameters_of(kind), f"{prefix}{name}.")
    return list(dict.fromkeys(names))


def summary_of(docstring: str | None) -> str:
    """A docstring's first paragraph, as one line."""
    return " ".join(inspect.cleandoc(docstring or "").split("\n\n")[0].split())


def argument_helps(docstring: str | None) -> dict[str, str]:
    """name -> text from the Args or Attributes section of a docstring."""
    text = inspect.cleandoc(docstring or "")
    section = re.search(r"(?:Args|Attributes):\n(.*?)(?:\n\s*\n|\Z)", text, re.DOTALL)
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.group(1).splitlines() if section else []:
        start = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if start:
            names = start.group(1).split(", ")
        for name in names:
            text = start.group(2) if start else line.strip()
            found[name] = f"{found[name]} {text}" if name in found else text
    return found
