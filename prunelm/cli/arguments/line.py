"""The words of a command line as options with their values."""

import re
import typing
from collections.abc import Mapping, Sequence

from prunelm.cli import UsageError
from prunelm.cli.arguments.given import Given
from prunelm.cli.arguments.signature import (
    Parameter,
    choice_of,
    group_of,
    is_list,
    parameters_of,
    required,
)
from prunelm.cli.arguments.values import BOOLEANS

_NUMBER = re.compile(r"-\.?\d.*|-inf|-\.?")  # also "-", as in "standard input"


def read_line(
    words: Sequence[str], parameters: Mapping[str, Parameter], program: str
) -> list[tuple[str, Given]]:
    """(option without its hyphens, value) in order.

    A list takes the words up to the next option, yes or no may be left out, any other option takes
    one word. What is left, and all after --, are the required parameters that no option names, in
    their order, and a list's if more of them come.

    Raises:
        UsageError: words that belong to nothing.
    """
    free: list[tuple[str, str]] = []  # (word, the option before it)
    groups: list[tuple[str, list[str]]] = []
    open_ = False  # whether the last option takes a word
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        if word == "--":
            free += [(each, "") for each in words[i + 1 :]]
            break
        if word.startswith("--"):
            groups.append((option[2:], [value] if equals else []))
            open_ = not equals
        elif word.startswith("-") and not _NUMBER.fullmatch(word):
            near = option.lstrip("-")
            known = near.replace("-", "_").split(".")[0] in parameters
            hint = f"did you mean --{near}?" if known else f"see {program} --help"
            raise UsageError(f"{option}: expected an option of {program}; {hint}")
        elif open_ and _takes(groups[-1][0], parameters, word):
            groups[-1][1].append(word)
            open_ = _takes_many(groups[-1][0], parameters)
        else:
            free.append((word, groups[-1][0] if groups else ""))
    named = {option.replace("-", "_") for option, _ in groups}
    found = _positional(free, named, parameters)
    for option, values in groups:
        several = [Given(value) for value in values]
        found.append((option, several[0] if len(several) == 1 else Given(several or ())))
    return found


def _positional(
    words: Sequence[tuple[str, str]], named: set[str], parameters: Mapping[str, Parameter]
) -> list[tuple[str, Given]]:
    needed = [name for name in required(parameters.values()) if name not in named]
    found = [(name, Given(word)) for name, (word, _) in zip(needed, words, strict=False)]
    more = words[len(needed) :]
    lists = [n for n, p in parameters.items() if is_list(p.hint) and not choice_of(p.hint)]
    if more and not lists:
        word, before = more[0]
        option = f"--{next(iter(parameters))}" if parameters else "--help"
        after = f" after --{before}" if before else ""
        raise UsageError(f"{Given(word)}: expected an option such as {option}, got a word{after}")
    if more:
        found.append((lists[0], Given([Given(word) for word, _ in more])))
    return found


def _takes(option: str, parameters: Mapping[str, Parameter], word: str) -> bool:
    found = _parameter(option.replace("-", "_").split("."), parameters)
    return found is None or found.hint is not bool or word.lower() in BOOLEANS


def _takes_many(option: str, parameters: Mapping[str, Parameter]) -> bool:
    found = _parameter(option.replace("-", "_").split("."), parameters)
    if found is None:
        return False
    return is_list(found.hint) or typing.get_origin(found.hint) in (tuple, typing.Annotated)


def _parameter(path: list[str], parameters: Mapping[str, Parameter]) -> Parameter | None:
    """What a dotted option names; in a choice between classes, the first that has it."""
    found = parameters.get(path[0]) or parameters.get(path[0].removeprefix("no_"))
    if found is None or len(path) == 1:
        return found
    group, choice = group_of(found.hint), choice_of(found.hint)
    kinds = [group] if group else list(choice.kinds.values()) if choice else []
    if choice and path[1] in choice.kinds and len(path) > 2:
        kinds, path = [choice.kinds[path[1]]], path[1:]
    below = (_parameter(path[1:], parameters_of(kind)) for kind in kinds)
    return next((each for each in below if each is not None), None)
