"""What a user wrote, before it becomes an object: text, lists and mappings, with their places."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, Union

from prunelm.cli import UsageError

_LONGEST = 60  # characters of a value that a message repeats


@dataclass(frozen=True)
class Given:
    """A value as it was written.

    Args:
        value: text; None for YAML's null; a list; a mapping by key; () for an option that came
            without a value.
        where: "" for the line, "file.yaml, line 3: " for a file; it starts messages.
    """

    value: "Value"
    where: str = ""

    def __str__(self) -> str:
        if isinstance(self.value, str):
            plain_text = self.value.isprintable() and self.value.strip() == self.value != ""
            text = self.value if plain_text else repr(self.value)
        elif isinstance(self.value, dict):
            text = "{" + ", ".join(f"{key}: {each}" for key, each in self.value.items()) + "}"
        elif self.value is None:
            text = "nothing"
        else:
            text = "[" + ", ".join(map(str, self.value)) + "]" if self.value else "no value"
        return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."

    def refuse(self, name: str, expected: str, got: str = "", hint: str = "") -> UsageError:
        """The one line about a value that does not fit."""
        tail = f"; {hint}" if hint else ""
        return UsageError(f"{self.where}{name}: expected {expected}, got {got or self}{tail}")


Value: TypeAlias = Union[str, "list[Given]", "dict[str, Given]", tuple[()], None]


def plain(name: str) -> str:
    """A name without what people spell differently: case, hyphens, underscores, spaces."""
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """The hint "did you mean lm_weight?"; "" where no name is near.

    Near is a name that reads the same, whose last part is the word, that starts with it, or that
    differs by few letters.
    """
    names = list(dict.fromkeys(names))
    short = plain(word)
    if not short:
        return ""
    near = [name for name in names if plain(name) == short]
    near = near or [name for name in names if plain(name.split(".")[-1]) == short]
    starts = [name for name in names if plain(name).startswith(short)]
    near = near or (starts if len(starts) == 1 else [])
    if not near:
        by_short = {plain(name): name for name in names}
        near = [by_short[each] for each in difflib.get_close_matches(short, by_short, 1, 0.6)]
    return f"did you mean {near[0]}?" if near else ""


def either(names: Sequence[str]) -> str:
    """a, b or c."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
