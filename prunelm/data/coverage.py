"""How much of a text a tokenizer knows."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from prunelm.data.tokenizer import UNKNOWN, Tokenizer


@dataclass(frozen=True)
class UnknownCharacters:
    """Characters of a text that a tokenizer has no piece for, each of which reads as `<unk>`.

    Attributes:
        count: of them, spaces never among them.
        characters: of the whole text, white space left out.
        example: the most frequent of them.
        line: the first line with it, counted from 1.
    """

    count: int
    characters: int
    example: str
    line: int

    @property
    def share(self) -> float:
        """count / characters, a fraction above 0."""
        return self.count / self.characters

    def __str__(self) -> str:
        percent = 100 * self.share
        shown = f"{percent:.1f}" if percent >= 0.1 else "less than 0.1"
        name = f" '{self.example}'" if self.example.isprintable() else ""
        return (
            f"{shown} % of characters are unknown to the tokenizer, such as{name} "
            f"(U+{ord(self.example):04X}) in line {self.line}"
        )


def unknown_characters(lines: Iterable[str], tokenizer: Tokenizer) -> UnknownCharacters | None:
    """What of `lines` the tokenizer reads as `<unk>`; None where it knows every character.

    `str()` of the answer is a sentence for a warning. White space of any kind reads as a space, so
    it is never unknown. Text that was written with capitals, accents, digits or punctuation becomes
    known by `prunelm.data.text.normalise`, if the tokenizer was trained on such text.
    """
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        found = Counter(line)
        counts.update(found)
        for character in found.keys() - first.keys():
            first[character] = number
    seen = {c: n for c, n in counts.items() if not c.isspace()}
    unknown = {c: n for c, n in seen.items() if UNKNOWN in tokenizer.encode(c)}
    if not unknown:
        return None
    example = max(unknown, key=lambda c: (unknown[c], -first[c], -ord(c)))
    return UnknownCharacters(sum(unknown.values()), sum(seen.values()), example, first[example])
