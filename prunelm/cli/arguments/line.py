"""The words of a command line as options with their values."""

import re
from collections.abc import Mapping, Sequence

from prunelm.cli import UsageError
from prunelm.cli.arguments.given import Given
from prunelm.cli.arguments.signature import Parameter, choice_of, is_list, required

_NUMBER = re.compile(r"-\.?\d.*|-inf|-\.?")  # also "-", as in "standard input"


def read_line(
    words: Sequence[str], parameters: Mapping[str, Parameter], program: str
) -> list[tuple[str, Given]]:
    """(option without its hyphens, value) in order.

    Leading words, and those after --, are the required parameters in their order, and a list's if
    more of them come. An option takes the words up to the next option.

    Raises:
        UsageError: words that belong to nothing.
    """
    leading: list[str] = []
    groups: list[tuple[str, list[str], bool]] = []
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        if word == "--":
            leading += words[i + 1 :]
            break
        if word.startswith("--"):
            groups.append((option[2:], [value] if equals else [], bool(equals)))
        elif word.startswith("-") and not _NUMBER.fullmatch(word):
            near = option.lstrip("-")
            known = near.replace("-", "_").split(".")[0] in parameters
            hint = f"did you mean --{near}?" if known else f"see {program} --help"
            raise UsageError(f"{option}: expected an option of {program}; {hint}")
        elif groups and not groups[-1][2]:
            groups[-1][1].append(word)
        elif groups:
            raise UsageError(f"{word}: expected an option, got a word after --{groups[-1][0]}=...")
        else:
            leading.append(word)
    found = _positional(leading, parameters, program)
    for option, values, _ in groups:
        several = [Given(value) for value in values]
        found.append((option, several[0] if len(several) == 1 else Given(several or ())))
    return found


def _positional(
    words: Sequence[str], parameters: Mapping[str, Parameter], program: str
) -> list[tuple[str, Given]]:
    needed = required(parameters.values())
    found = [(name, Given(word)) for name, word in zip(needed, words, strict=False)]
    more = [Given(word) for word in words[len(needed) :]]
    lists = [n for n, p in parameters.items() if is_list(p.hint) and not choice_of(p.hint)]
    if more and not lists:
        option = f"--{next(iter(parameters))}" if parameters else "--help"
        raise UsageError(f"{more[0]}: expected an option such as {option}, got a word")
    if more:
        found.append((lists[0], Given(more)))
    return found
