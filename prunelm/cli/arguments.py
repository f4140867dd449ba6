"""A function's typed parameters as options, with one clear line for each way to get them wrong."""

import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from prunelm.cli import UsageError


def parse(
    program: str, summary: str, command: Callable[..., None], words: Sequence[str]
) -> dict[str, Any] | None:
    """Keyword arguments for `command`; None where the user asked for help.

    A default that is an instance of a choice's class (a union of classes) becomes the class's name
    and settings, so that single settings can be given on the line.

    Raises:
        UsageError: words that do not fit, or a class that refuses its settings, in one line.
    """
    parser = build(program, summary, command)
    options = _options(parser)
    try:
        parsed = parser.parse_args(_spelled_out(words, command))
        values = parser.instantiate(parsed)
    except ArgumentError as error:
        raise UsageError(_explain(str(error.message), program, command, options)) from None
    except ValueError as error:
        raise UsageError(_refusal(str(error))) from None
    except SystemExit as stop:
        if stop.code:
            raise UsageError(f"{program}: expected options as in {program} --help") from None
        return None
    names = inspect.signature(command).parameters
    return {name: getattr(values, name) for name in names}


def build(program: str, summary: str, command: Callable[..., None]) -> ArgumentParser:
    """The parser of a command."""
    parser = ArgumentParser(prog=program, description=f"{summary}.", exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file with any of these options")
    parser.add_function_arguments(command, as_group=False, as_positional=False)
    signature = inspect.signature(command)
    defaults = {
        name: _as_settings(parameter.default)
        for name, parameter in signature.parameters.items()
        if _is_choice(parameter.default) and choices(command, name)
    }
    if defaults:
        parser.set_defaults(defaults)
    helps = argument_helps(command.__doc__)
    for name, hint in typing.get_type_hints(command).items():
        if dataclasses.is_dataclass(hint):
            helps |= {f"{name}.{k}": v for k, v in argument_helps(hint.__doc__).items()}
    for action in parser._actions:
        if action.dest in helps:
            kept = f" ({str(action.help)[str(action.help).index('(') + 1:]}" if "(" in str(
                action.help) else ""  # fmt: skip
            action.help = helps[action.dest].replace("%", "%%") + kept
    return parser


def argument_helps(docstring: str | None) -> dict[str, str]:
    """name -> text from the Args section of a docstring."""
    section = re.search(r"Args:\n(.*?)(?:\n\s*\n|\Z)", inspect.cleandoc(docstring or ""), re.DOTALL)
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


def choices(command: Callable[..., None], name: str) -> dict[str, type]:
    """The classes that a parameter may be, by name; {} where it is no choice between classes."""
    hint = typing.get_type_hints(command).get(name)
    found = {}
    pending = [hint]
    while pending:
        each = pending.pop(0)
        if typing.get_origin(each) in (typing.Union, types.UnionType, list):
            pending += typing.get_args(each)
        elif dataclasses.is_dataclass(each) and isinstance(each, type):
            found[each.__name__] = each
    return found if len(found) > 1 or (found and hint not in found.values()) else {}


def _is_choice(default: Any) -> bool:
    some = default[0] if isinstance(default, list) and default else default
    return dataclasses.is_dataclass(some) and not isinstance(some, type)


def _as_settings(default: Any) -> Any:
    if isinstance(default, list):
        return [_as_settings(each) for each in default]
    kind = type(default)
    settings = {
        f.name: getattr(default, f.name)
        for f in dataclasses.fields(default)
        if not dataclasses.is_dataclass(getattr(default, f.name))
    }
    return {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": settings}


def _spelled_out(words: Sequence[str], command: Callable[..., None]) -> list[str]:
    """Writes as jsonargparse wants it what is easier to type.

    Leading words are the required parameters in their order, and a list's if more of them come;
    `--lm-weight` is `--lm_weight`, `--flag` alone is true, `--audio a b` and `--method A|B` are
    lists.
    """
    hints = typing.get_type_hints(command)
    hints.pop("return", None)
    lists = {name for name, hint in hints.items() if _is_list(hint)}
    result: list[str] = []
    for option, values in _grouped(words, command, lists):
        name = option.removeprefix("--").replace("-", "_") if option.startswith("--") else ""
        if not name:
            result += [option, *values]
        elif hints.get(name) is bool and not values:
            result += [f"--{name}", "true"]
        elif name in lists and values:
            split = choices(command, name) and len(values) == 1
            result += [f"--{name}", _as_list(values[0]) if split else json.dumps(values)]
        else:
            result += [f"--{name}", *values]
    return result


def _grouped(
    words: Sequence[str], command: Callable[..., None], lists: set[str]
) -> list[tuple[str, list[str]]]:
    """(option, its words) in order."""
    required = [
        name
        for name, parameter in inspect.signature(command).parameters.items()
        if parameter.default is inspect.Parameter.empty
    ]
    leading = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    groups = [(f"--{n}", [word]) for n, word in zip(required, words[:leading], strict=False)]
    more = list(words[len(required) : leading])
    plain = [name for name in lists if not choices(command, name)]
    if more and not plain:
        raise UsageError(f"{more[0]}: expected an option such as --{required[0]}, got a word")
    if more:
        groups.append((f"--{plain[0]}", more))
    for word in words[leading:]:
        option, equals, value = word.partition("=")
        if word.startswith("-") and not re.fullmatch(r"-\d.*", word):
            groups.append((option, [value] if equals else []))
        else:
            groups[-1][1].append(word)
    return groups


def _is_list(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_is_list(each) for each in typing.get_args(hint))
    return typing.get_origin(hint) is list


def _as_list(text: str) -> str:
    text = text.strip()
    if text.startswith("["):
        return text
    return "[" + ", ".join(part.strip().removesuffix("()") for part in text.split("|")) + "]"


def _options(parser: ArgumentParser) -> list[str]:
    return [word for action in parser._actions for word in action.option_strings]


def _explain(
    message: str, program: str, command: Callable[..., None], options: Sequence[str]
) -> str:
    """jsonargparse's message as one line that names the key and what it takes."""
    missing = re.match(r"the following arguments are required: (.*)", message)
    if missing:
        names = ", ".join(f"--{name.strip()}" for name in missing.group(1).split(","))
        return f"{names}: expected a value, got none; see {program} --help"
    unknown = re.match(r"unrecognized arguments: (\S+)", message)
    if unknown:
        word = unknown.group(1).split("=")[0]
        close = difflib.get_close_matches(word, options, 1)
        hint = f"did you mean {close[0]}?" if close else f"see {program} --help"
        return f"{word}: expected an option of {program}; {hint}"
    keyed = re.match(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL)
    if not keyed:
        return " ".join(message.split())
    key, rest = keyed.groups()
    given = re.search(r"Given value: (.*)|Got value: (.*)", rest)
    got = next((text for text in given.groups() if text), "") if given else ""
    kinds = choices(command, key.split(".")[0])
    if kinds:
        return _explain_choice(key, rest, got, kinds)
    plain = re.search(r"Expected a <class '(?:\w+\.)*(\w+)'>", rest)
    if plain and got:
        return f"{key}: expected {_kind(plain.group(1))}, got {got}"
    return f"{key}: " + " ".join(rest.split()).replace("Given value type", "; given value type")


def _refusal(message: str) -> str:
    """What a class said to its settings, out of what jsonargparse says of all classes."""
    own = re.findall(r"^\s*- (\w+: expected .*)$", message, re.MULTILINE)
    return str(own[0]) if own else " ".join(message.split())


def _explain_choice(key: str, rest: str, got: str, kinds: dict[str, type]) -> str:
    refused = re.search(r"Option '([^']+)' is not accepted", rest)
    if refused:
        named = re.findall(r"'class_path': '([^']+)'", got) or re.findall(
            r"class_path '([^']+)':\s*\n?\s*Option", rest
        )
        name = named[-1].split(".")[-1] if named else ""
        some = {name: kinds[name]} if name in kinds else kinds
        takes = "; ".join(
            f"{each} takes {', '.join(f.name for f in dataclasses.fields(kind)) or 'nothing'}"
            for each, kind in some.items()
        )
        return f"{key}: expected a setting of its class, got {refused.group(1)!r} ({takes})"
    return (
        f"{key}: expected one of {', '.join(kinds)} (or the dotted path of a class of your own), "
        f"got {got}"
    )


def _kind(name: str) -> str:
    return {"int": "a whole number", "float": "a number", "bool": "true or false"}.get(name, name)
