"""Texts that a user names for a language model: read, normalised if asked, and looked at."""

import logging
from pathlib import Path

from prunelm.data.coverage import unknown_characters
from prunelm.data.text import text_lines
from prunelm.data.tokenizer import Tokenizer


def known_lines(path: Path, tokenizer: Tokenizer, normalised: bool) -> list[str]:
    """Lines of a text, after a warning where the tokenizer does not know all its characters.

    Args:
        normalised: whether lines are written as a recogniser writes them.
    """
    lines = written_lines(path, normalised)
    warn_of_unknown(lines, tokenizer, path, normalised)
    return lines


def written_lines(path: Path, normalised: bool) -> list[str]:
    """Lines of a text, as they are or as a recogniser writes them; some have a word."""
    return text_lines(path, normalised=normalised)


def warn_of_unknown(lines: list[str], tokenizer: Tokenizer, path: Path, normalised: bool) -> None:
    """A log message with the share of unknown characters and an example, if there are any."""
    found = unknown_characters(lines, tokenizer)
    if found is not None:
        hint = "" if normalised else "; --normalise writes lines as the recogniser does"
        logging.getLogger("prunelm").warning("%s: %s%s", path, found, hint)
