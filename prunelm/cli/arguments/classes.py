"""Objects of the classes that an option chooses between, each with its own defaults."""

import dataclasses
import importlib
import os
import re
import sys
import typing
from collections.abc import Sequence
from typing import Any

from prunelm.cli import UsageError
from prunelm.cli.arguments.given import Given, did_you_mean, either, plain
from prunelm.cli.arguments.signature import (
    MISSING,
    Choice,
    Parameter,
    choice_of,
    group_of,
    members,
    parameters_of,
)
from prunelm.cli.arguments.tree import Tree, mapping, match, plain_value, put_setting
from prunelm.cli.arguments.values import unquoted
from prunelm.cli.arguments.yaml_file import read_text


@dataclasses.dataclass
class Item:
    """A class that was chosen, and what was given for its settings."""

    kind: Any
    settings: Tree
    where: str = ""
    base: Any = MISSING  # the default object that settings change

    @property
    def name(self) -> str:
        """The class's own."""
        return str(getattr(self.kind, "__name__", self.kind))


class Builder:
    """Makes the values of parameters.

    Args:
        allowed: modules, with all below them, that may be imported for classes of the user's own.
    """

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self.allowed = tuple(allowed)
        self.missing: list[str] = []

    def value(self, parameter: Parameter, tree: Tree, name: str) -> Any:
        """The value of one parameter; what has no value and no default goes to `missing`."""
        group, choice = group_of(parameter.hint), choice_of(parameter.hint)
        if choice:
            return self._chosen(parameter, choice, tree, name)
        if group:
            item = Item(group, tree, tree.where, parameter.default)
            return self._make(item, name) if tree.parts or item.base is MISSING else item.base
        if tree.given is None and not tree.parts and parameter.default is MISSING:
            self.missing.append(name)
        return plain_value(tree, parameter.hint, parameter.default, name)

    def _chosen(self, parameter: Parameter, choice: Choice, tree: Tree, name: str) -> Any:
        items = self._items(parameter, choice, tree, name)
        optional = type(None) in typing.get_args(parameter.hint)
        for key, part in tree.parts.items():
            self._hand_out(items, key, part, name, choice)
        if not items and tree.given is None and parameter.default is MISSING:
            self.missing.append(name)
            return None
        if not items and tree.given is not None and not optional:
            raise tree.given.refuse(name, f"one of {', '.join(choice.kinds)}")
        if len(items) > 1 and not choice.several:
            raise (tree.given or Given(None)).refuse(name, "one class")
        made = [self._make(item, name, choice) for item in items]
        return made if choice.several else made[0] if made else None

    def _items(self, parameter: Parameter, choice: Choice, tree: Tree, name: str) -> list[Item]:
        given = tree.given
        if given is not None:
            return self._read(given, choice, name)
        default = parameter.default
        if default is None and tree.parts:
            if len(choice.kinds) == 1:
                return [Item(next(iter(choice.kinds.values())), Tree(), tree.where)]
            some = f"--{name} {next(iter(choice.kinds))}"
            raise UsageError(
                f"{tree.where}{name}.{next(iter(tree.parts))}: expected a class to set it for, "
                f"such as {some}, got none"
            )
        if default is None or default is MISSING:
            return []
        objects = default if isinstance(default, list) else [default]
        return [Item(type(each), Tree(), "", each) for each in objects]

    def _read(self, given: Given, choice: Choice, name: str) -> list[Item]:
        """The classes in a value, in all the ways that they can be written."""
        value = given.value
        if value is None or value == ():
            return []
        if isinstance(value, list):
            return [item for each in value for item in self._read(each, choice, name)]
        if isinstance(value, dict):
            return self._read_mapping(given, choice, name)
        text = str(value).strip()
        if text[:1] in ("[", "{"):
            return self._read(read_text(text, name), choice, name)
        if text.lower() in ("", "none", "null"):
            return []
        found = []
        for part in split(text, "|,+"):
            call = re.fullmatch(r"([\w.\- ]+?)\s*(?:\((.*)\))?", part.strip(), re.DOTALL)
            if not call:
                raise given.refuse(name, f"one of {', '.join(choice.kinds)}", part.strip())
            kind = self._find(call.group(1).strip(), choice, name, given.where)
            item = Item(kind, Tree(), given.where)
            values = [each for each in split(call.group(2) or "", ",") if each.strip()]
            self._positional(item, [Given(each.strip(), given.where) for each in values], name)
            found.append(item)
        return found

    def _read_mapping(self, given: Given, choice: Choice, name: str) -> list[Item]:
        value = typing.cast(dict[str, Given], given.value)
        if "class_path" in value:
            other = next((key for key in value if key not in ("class_path", "init_args")), None)
            if other:
                raise value[other].refuse(f"{name}.{other}", "class_path and init_args", other)
            path = value["class_path"]
            if not isinstance(path.value, str):
                raise path.refuse(f"{name}.class_path", "a class")
            value = {path.value: value.get("init_args", Given(None, path.where))}
        found = []
        for key, settings in value.items():
            item = Item(self._find(key, choice, name, settings.where), Tree(), settings.where)
            if isinstance(settings.value, list):
                self._positional(item, settings.value, name)
            else:
                for setting, each in mapping(settings, f"{name}.{key}", item.kind).items():
                    put_setting(item.settings, setting.split("."), each)
            found.append(item)
        return found

    def _positional(self, item: Item, values: list[Given], name: str) -> None:
        names = list(parameters_of(item.kind))
        for i, each in enumerate(values):
            text = each.value if isinstance(each.value, str) else ""
            named = re.match(r"([\w-]+)\s*=\s*(.*)", text, re.DOTALL)
            if named:
                each = Given(named.group(2), each.where)
            elif i >= len(names):
                raise each.refuse(name, f"{item.name} with at most {len(names)} settings")
            if isinstance(each.value, str):
                each = Given(unquoted(each.value), each.where)
            setting = named.group(1) if named else names[i]
            put_setting(item.settings, [setting], each)

    def _hand_out(self, items: list[Item], key: str, part: Tree, name: str, choice: Choice) -> None:
        """Gives a setting, or the settings of one class by its name, to the class it is for."""
        having = [item for item in items if match(key, parameters_of(item.kind))[0]]
        if len(having) > 1:
            ways = " or ".join(f"{name}.{item.name}.{key}" for item in having)
            raise UsageError(
                f"{part.where}{name}.{key}: expected one class that has it, got "
                f"{' and '.join(item.name for item in having)}; say {ways}"
            )
        if having:
            below = having[0].settings.parts
            below[key] = part.over(below.get(key, Tree()))
            return
        of_class = [item for item in items if plain(item.name) == plain(key)]
        if not of_class or part.given is not None:
            raise _no_setting(items, key, f"{part.where}{name}", choice)
        for setting, each in part.parts.items():
            self._hand_out(of_class, setting, each, name, choice)

    def _make(self, item: Item, name: str, choice: Choice | None = None) -> Any:
        """The object, from its defaults and what was given."""
        known = parameters_of(item.kind) if isinstance(item.kind, type) else {}
        settings: dict[str, Any] = {}
        for key, part in item.settings.parts.items():
            parameter, negated = match(key, known)
            if parameter is None:
                raise _no_setting([item], key, f"{part.where}{name}", choice)
            if negated:
                part = Tree(Given("no", part.where), {}, part.where)
            if item.base is not MISSING:
                default = getattr(item.base, parameter.name)
                parameter = dataclasses.replace(parameter, default=default)
            if group_of(parameter.hint) and part.given is not None:
                group = typing.cast(type, group_of(parameter.hint))
                for sub, each in mapping(part.given, f"{name}.{key}", group).items():
                    put_setting(part, sub.split("."), each)
                part.given = None
            settings[parameter.name] = self.value(parameter, part, f"{name}.{parameter.name}")
        if item.base is not MISSING and not settings:
            return item.base
        if item.base is MISSING:
            lacking = [n for n, p in known.items() if p.default is MISSING and n not in settings]
            if lacking:
                self.missing += [f"{name}.{each}" for each in lacking]
                return None
        return self._call(item, settings, name, choice)

    def _call(self, item: Item, settings: dict[str, Any], name: str, choice: Choice | None) -> Any:
        where = next((part.where for part in item.settings.parts.values()), item.where)
        try:
            if item.base is not MISSING:
                return dataclasses.replace(item.base, **settings)
            made = item.kind(**settings) if isinstance(item.kind, type) else item.kind
        except Exception as error:  # a class of the user's own may raise anything
            text = " ".join(str(error).split()) or type(error).__name__
            inner = f"{name}.{text}" if re.match(r"\w+: ", text) else f"{name}: {item.name}: {text}"
            raise UsageError(f"{where}{inner}") from error
        if choice and choice.protocol and item.name not in choice.kinds:
            lacking = [each for each in members(choice.protocol) if not hasattr(made, each)]
            if lacking:
                raise UsageError(
                    f"{where}{name}: expected a class with {', '.join(members(choice.protocol))}, "
                    f"got {item.name} without {', '.join(lacking)}"
                )
        return made

    def _named(self, text: str, choice: Choice) -> type | None:
        """A class of this package by its name or path, without an import."""
        for short, kind in choice.kinds.items():
            if plain(text.removesuffix("()")) == plain(short):
                return kind
            parts = kind.__module__.split(".")
            homes = [".".join(parts[: i + 1]) for i in range(len(parts))]
            if text in [f"{home}.{short}" for home in homes]:
                return kind
        return None

    def _find(self, text: str, choice: Choice, name: str, where: str) -> Any:
        kind = self._named(text, choice)
        if kind is not None:
            return kind
        module, _, short = text.rpartition(".")
        own = bool(module) and choice.protocol is not None and not text.startswith("prunelm.")
        if own and any(f"{module}.".startswith(f"{each}.") for each in self.allowed):
            return _imported(module, short, f"{where}{name}")
        near = did_you_mean(short if text.startswith("prunelm.") else text, choice.kinds)
        hint = f"--allow {module} lets it be imported" if own else near
        path = " (or the dotted path of a class of your own)" if choice.protocol else ""
        raise UsageError(
            f"{where}{name}: expected one of {', '.join(choice.kinds)}{path}, got {text}"
            + (f"; {hint}" if hint else "")
        )


def split(text: str, marks: str) -> list[str]:
    """Parts between any of the marks, where these are outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter in marks and not depth:
            parts.append("")
            continue
        parts[-1] += letter
    return parts if text else []


def _no_setting(items: Sequence[Item], key: str, place: str, choice: Choice | None) -> UsageError:
    known = {item.name: list(parameters_of(item.kind)) for item in items}
    takes = [f"{name} takes {', '.join(names) or 'nothing'}" for name, names in known.items()]
    near = did_you_mean(key, [each for names in known.values() for each in names])
    kinds = choice.kinds if choice else {}
    others = [
        short
        for short, kind in kinds.items()
        if short not in known and (plain(key) == plain(short) or match(key, parameters_of(kind))[0])
    ]
    if others:
        near = (
            f"it is for {either(others)}, which {'was' if len(others) == 1 else 'were'} not chosen"
        )
    return UsageError(
        f"{place}: expected a setting of its class, got {key!r} "
        f"({'; '.join(takes) or 'no class was chosen'})" + (f"; {near}" if near else "")
    )


def _imported(module: str, short: str, place: str) -> Any:
    """A class of a module that the user allowed; the folder one is in is searched last."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise UsageError(
            f"{place}: expected a module, got {module}: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(found, short):
        near = did_you_mean(short, [each for each in vars(found) if not each.startswith("_")])
        raise UsageError(
            f"{place}: expected a class in {module}, got {short}" + (f"; {near}" if near else "")
        )
    return getattr(found, short)
