"""What a person wrote for a command, as the command's arguments or as the line that refuses it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunelm.cli import UsageError
from prunelm.cli.arguments import parse
from prunelm.cli.pruning import prune
from prunelm.cli.speech import decode
from prunelm.cli.studies import study
from prunelm.cli.training import train_lm, train_recogniser

LEADING: dict[Any, list[str]] = {
    prune: ["m", "5M", "o"],
    train_lm: ["t", "o"],
    train_recogniser: ["c", "o"],
    decode: ["r"],
    study: ["o"],
}


def read(command: Callable[..., None], words: list[str], yaml: str | None = None) -> dict[str, Any]:
    """Keyword arguments for a command, from words and the text of a YAML file."""
    if yaml is not None:
        Path("my.yaml").write_text(yaml)
        words = [*words, "--config", "my.yaml"]
    found = parse("prunelm x", "Does x.", command, [*LEADING.get(command, []), *words])
    assert found is not None
    return found


def refused(command: Callable[..., None], words: list[str], yaml: str | None = None) -> str:
    """The one line about words or YAML that do not fit."""
    with pytest.raises(UsageError) as error:
        read(command, words, yaml)
    assert "\n" not in str(error.value)
    return str(error.value)
