"""A function's typed parameters as options, with one clear line for each way to get them wrong.

An option takes text on the line and in a YAML file alike. A parameter that is a dataclass has an
option for each field (`--options.steps`); one that is a union of dataclasses is a choice between
classes (`--method 'Heads|Neurons' --method.multiple_of 8`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prunelm.cli import UsageError
from prunelm.cli.arguments.classes import Builder
from prunelm.cli.arguments.given import Given
from prunelm.cli.arguments.help import help_text
from prunelm.cli.arguments.line import read_line
from prunelm.cli.arguments.signature import argument_helps, parameters_of
from prunelm.cli.arguments.tree import Reader, Tree
from prunelm.cli.arguments.values import Commas, Sizes
from prunelm.cli.arguments.yaml_file import read_file

__all__ = ["Commas", "Sizes", "argument_helps", "parse"]


class Arguments(dict[str, Any]):
    """Keyword arguments by name; `places` says which of them a file gave, and on which line."""

    def __init__(self, values: Mapping[str, Any], places: Mapping[str, str]) -> None:
        super().__init__(values)
        self.places = places

    def locate(self, error: Exception) -> None:
        """Puts file and line before "name: expected ..." where a file gave that argument."""
        place = self.places.get(str(error).split(":")[0].split(".")[0], "")
        if place and len(error.args) == 1:
            error.args = (f"{place}{error}",)


def parse(
    program: str, summary: str, command: Callable[..., None], words: Sequence[str]
) -> Arguments | None:
    """Keyword arguments for `command`; None where the user asked for help, which is printed.

    Raises:
        UsageError: words or a file that do not fit, or a class that refuses its settings, in one
            line.
    """
    if any(word in ("-h", "--help") for word in words) or list(words) == ["help"]:
        print(help_text(program, summary, command))
        return None
    parameters = parameters_of(command)
    line = Reader(parameters, program)
    files = Tree()
    allowed: list[str] = []
    for option, given in read_line(words, parameters, program):
        if option == "config":
            for each in _texts(given, option, "a YAML file"):
                files = _read_config(each, parameters, program).over(files)
        elif option == "allow":
            allowed += _texts(given, option, "a module")
        else:
            line.put(option, given)
    tree = line.root.over(files)
    builder = Builder(allowed)
    values = {
        name: builder.value(parameter, tree.parts.get(name, Tree()), name)
        for name, parameter in parameters.items()
    }
    if builder.missing:
        names = ", ".join(f"--{name}" for name in builder.missing)
        raise UsageError(f"{names}: expected a value, got none; see {program} --help")
    return Arguments(values, {name: _place(each) for name, each in tree.parts.items()})


def _place(tree: Tree) -> str:
    """Where the value came from; "" for the line."""
    return tree.given.where if tree.given else tree.where


def _read_config(path: str, parameters: dict[str, Any], program: str) -> Tree:
    reader = Reader(parameters, program)
    seen: set[str] = set()
    for option, given in read_file(path).items():
        name = option.replace("-", "_")
        if name in seen:
            raise UsageError(f"{given.where}{option}: expected once, got it again as {name}")
        seen.add(name)
        if option in ("allow", "config"):
            raise given.refuse(option, "it on the command line only", "it in a file")
        reader.put(option, given)
    return reader.root


def _texts(given: Given, option: str, expected: str) -> list[str]:
    values = given.value if isinstance(given.value, list) else [given]
    texts = [each.value for each in values if isinstance(each.value, str) and each.value]
    if not texts:
        raise given.refuse(option, expected)
    return texts
