"""What was given for each parameter, settings below it included, from files and from the line."""

from dataclasses import dataclass, field
from typing import Any

from prunelm.cli import UsageError
from prunelm.cli.arguments.given import Given, did_you_mean
from prunelm.cli.arguments.signature import (
    Choice,
    Parameter,
    choice_of,
    group_of,
    is_list,
    option_names,
    parameters_of,
)
from prunelm.cli.arguments.values import convert
from prunelm.cli.arguments.yaml_file import read_text


@dataclass
class Tree:
    """What was given for one parameter.

    Args:
        given: the value as a whole; None where there is none.
        parts: settings below it, by name.
        where: of the key that named it, see `Given`.
    """

    given: Given | None = None
    parts: "dict[str, Tree]" = field(default_factory=dict)
    where: str = ""

    def over(self, below: "Tree") -> "Tree":
        """This on top of what came from a file: a whole value replaces all of it."""
        if self.given is not None:
            return self
        names = dict.fromkeys([*below.parts, *self.parts])
        parts = {
            name: self.parts.get(name, Tree()).over(below.parts.get(name, Tree())) for name in names
        }
        return Tree(below.given, parts, self.where or below.where)


class Reader:
    """Puts options in a `Tree`, and refuses names that do not exist.

    Args:
        parameters: of the command.
        program: to name in messages, such as "prunelm plan".
    """

    def __init__(self, parameters: dict[str, Parameter], program: str) -> None:
        self.parameters, self.program = parameters, program
        self.root = Tree()

    def put(self, option: str, given: Given) -> None:
        """Takes one option, such as "batch", "no-fp16" or "options.lr"."""
        self._put(self.root, option.split("."), given, self.parameters, option)

    def _put(
        self,
        tree: Tree,
        path: list[str],
        given: Given,
        known: dict[str, Parameter],
        option: str,
    ) -> None:
        parameter, negated = match(path[0], known)
        if parameter is None:
            raise self.unknown(option, given.where)
        if negated:
            if given.value not in ((), None) or len(path) > 1:
                raise given.refuse(option, "no value")
            given = Given("no", given.where)
        branch = tree.parts.setdefault(parameter.name, Tree(where=given.where))
        group, choice = group_of(parameter.hint), choice_of(parameter.hint)
        rest = path[1:]
        if rest and group:
            self._put(branch, rest, given, parameters_of(group), option)
        elif rest and choice:
            put_setting(branch, rest, given)
        elif rest:
            raise self.unknown(option, given.where)
        elif group:
            for name, each in mapping(given, option, group).items():
                self._put(branch, name.split("."), each, parameters_of(group), f"{option}.{name}")
        elif choice and (settings := settings_of(given, choice, option)):
            for name, each in settings.items():
                put_setting(branch, name.split("."), each)
        else:
            lists = is_list(parameter.hint) and not given.where
            branch.given = _joined(branch.given, given, lists)

    def unknown(self, option: str, where: str) -> UsageError:
        """The line about a name that no option has."""
        hyphens = "" if where else "--"
        names = [*option_names(self.parameters), "config", "allow", "help"]
        near = did_you_mean(option, names).replace("you mean ", f"you mean {hyphens}")
        hint = near or f"see {self.program} --help"
        return UsageError(f"{where}{hyphens}{option}: expected an option of {self.program}; {hint}")


def match(word: str, known: dict[str, Parameter]) -> tuple[Parameter | None, bool]:
    """The parameter of that name, and whether the word is its "no"."""
    name = word.replace("-", "_")
    if name in known:
        return known[name], False
    positive = known.get(name.removeprefix("no_"))
    if positive is not None and positive.hint is bool:
        return positive, True
    return None, False


def put_setting(tree: Tree, path: list[str], given: Given) -> None:
    """Puts a setting of a class that is not known yet."""
    for part in path:
        tree = tree.parts.setdefault(part.replace("-", "_"), Tree(where=given.where))
    tree.given = given


def mapping(given: Given, name: str, group: type) -> dict[str, Given]:
    """The fields that were given for a dataclass, as a mapping or as YAML on the line."""
    if isinstance(given.value, str) and given.value.strip().startswith("{"):
        given = read_text(given.value, name)
    if given.value is None:
        return {}
    if not isinstance(given.value, dict):
        some = next(iter(parameters_of(group)), "setting")
        raise given.refuse(name, f"settings such as {name}.{some}")
    return given.value


def settings_of(given: Given, choice: Choice, name: str) -> dict[str, Given]:
    """A mapping that names settings but no class: they are for the default; {} for any other."""
    if isinstance(given.value, str) and given.value.strip().startswith("{"):
        given = read_text(given.value, name)
    if not isinstance(given.value, dict):
        return {}
    known = {setting for kind in choice.kinds.values() for setting in parameters_of(kind)}
    first = [key.split(".")[0].replace("-", "_") for key in given.value]
    return given.value if all(each in known for each in first) else {}


def _joined(before: Given | None, now: Given, joins: bool) -> Given:
    """The last of the values that an option was given, or all of them where it is a list."""
    if before is None or not joins or before.value == () or now.value == ():
        return now
    values = [each.value if isinstance(each.value, list) else [each] for each in (before, now)]
    return Given([*values[0], *values[1]])


def plain_value(tree: Tree, hint: Any, default: Any, name: str) -> Any:
    """The value of a parameter that is neither a dataclass nor a choice between classes."""
    if tree.parts:
        setting, part = next(iter(tree.parts.items()))
        raise UsageError(f"{part.where}{name}: expected {name} without settings, got {setting!r}")
    return default if tree.given is None else convert(tree.given, hint, name)
