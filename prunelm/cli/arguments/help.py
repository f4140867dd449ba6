"""What `prunelm COMMAND --help` shows."""

import dataclasses
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from prunelm.cli.arguments.signature import (
    MISSING,
    Parameter,
    choice_of,
    group_of,
    is_list,
    parameters_of,
    required,
    summary_of,
)
from prunelm.cli.arguments.values import kind_of

_WIDEST = 100  # columns
_COMMON = {
    "--config <file>": "a YAML file with any of these options; what is on the line wins",
    "--allow <module>": "a module that may be imported for a class of your own, named by "
    "its dotted path; the folder you are in is searched too; can be given again",
    "--help": "show this",
}


def help_text(program: str, summary: str, command: Callable[..., None]) -> str:
    """All options of a command, each with its kind, its default and what it does."""
    parameters = parameters_of(command)
    needed = required(parameters.values())
    lists = [n for n, p in parameters.items() if is_list(p.hint) and not choice_of(p.hint)]
    words = [*map(str.upper, needed), *(f"[{name.upper()} ...]" for name in lists[:1])]
    lines = [" ".join(["usage:", program, *words, "[--option VALUE ...]"]), ""]
    lines += [*_wrapped(summary_of(command.__doc__) or summary, 0), ""]
    if needed:
        lines.append("needed, also without their names, in this order:")
        for name in needed:
            lines += _option(parameters[name], f"--{name}")
        lines.append("")
    lines.append("options:")
    for name, each in parameters.items():
        if name not in needed:
            lines += _option(each, f"--{name}")
    choices = any(getattr(choice_of(each.hint), "protocol", None) for each in parameters.values())
    for option, text in _COMMON.items():
        if choices or "--allow" not in option:
            lines += _entry(option, text)
    lines += ["", *_wrapped("Of an option that is given again the last counts; a list gathers.", 0)]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A default as it would be written on the line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return (" | " if _is_object(value[:1]) else ",").join(map(shown, value)) or "none"
    if _is_object([value]):
        return type(value).__name__
    if isinstance(value, (int, float, Path)):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return str(value) or "none"


def _is_object(values: Any) -> bool:
    return bool(values) and dataclasses.is_dataclass(values[0])


def _option(parameter: Parameter, name: str) -> list[str]:
    group, choice = group_of(parameter.hint), choice_of(parameter.hint)
    if group:
        lines = _entry(f"{name}.SETTING VALUE", parameter.text)
        for each in _settings(group, parameter.default).values():
            lines += _option(each, f"{name}.{each.name}")
        return lines
    if not choice:
        kind = _kind(parameter.hint)
        if "folder" in parameter.text and "manifest" not in parameter.text:
            kind = kind.replace("file or folder", "folder")
        elif "folder" not in parameter.text:
            kind = kind.replace("file or folder", "file")
        said = parameter.default in (None, "") and "by default" in parameter.text
        return _entry(f"{name} {kind}", parameter.text, MISSING if said else parameter.default)
    lines = _entry(name + (" CLASS|CLASS" if choice.several else " CLASS"), parameter.text,
                   parameter.default)  # fmt: skip
    lines += _wrapped(f"Settings: '{name} CLASS(setting=value)' or {name}.setting value.", 8)
    for short, each_kind in choice.kinds.items():
        lines += _wrapped(f"{short}: {summary_of(each_kind.__doc__)}", 10, 12)
        for each in parameters_of(each_kind).values():
            lines += _setting(each, each.name)
    return lines


def _setting(parameter: Parameter, name: str) -> list[str]:
    group = group_of(parameter.hint)
    if group:
        text = parameter.text or summary_of(group.__doc__)
        fields = ", ".join(parameters_of(group))
        return _wrapped(f".{name}.SETTING: {text.rstrip('.')} ({fields})", 14, 16)
    kind = _kind(parameter.hint)
    text = f".{name} {kind}: {parameter.text.rstrip('.')}"
    return _wrapped(f"{text} (default: {shown(parameter.default)})", 14, 16)


def _settings(group: type, default: Any) -> dict[str, Parameter]:
    """A dataclass's fields with the defaults that they have in `default`."""
    found = parameters_of(group)
    if default is MISSING or default is None:
        return found
    return {
        name: dataclasses.replace(each, default=getattr(default, name))
        for name, each in found.items()
    }


def _kind(hint: Any) -> str:
    """yes|no, cubic|linear, <whole number>, <number>|auto."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return "yes|no"
    if origin is Annotated:
        return f"<{parts[1]}>"
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return "|".join(_kind(each) for each in parts if each is not type(None))
    return f"<{kind_of(hint, article=False)}>"


def _entry(option: str, text: str, default: Any = MISSING) -> list[str]:
    tail = "" if default is MISSING else f" (default: {shown(default)})"
    return [*_wrapped(option, 2, 6), *_wrapped(text.rstrip(".") + tail, 8)]


def _wrapped(text: str, indent: int, later: int | None = None) -> list[str]:
    width = max(min(shutil.get_terminal_size().columns, _WIDEST), 40)
    text = re.sub(r"\bNone\b", "none", text)
    return textwrap.wrap(
        text, width, initial_indent=" " * indent, break_on_hyphens=False,
        subsequent_indent=" " * (indent if later is None else later),
    )  # fmt: skip
