"""Refuses files for results that would take the place of what is read."""

from collections.abc import Iterable
from pathlib import Path

from prunelm.data.files import require_place


def check_output(
    out: Path | None, suffixes: tuple[str, ...], *, files: Iterable[Path | None],
    folders: Iterable[Path | None],
) -> None:  # fmt: skip
    """Checks the file that a command is to write, before any work.

    Args:
        out: the file; None: none is written.
        suffixes: what its name may end in.
        files: that the command reads; None is one that was not given.
        folders: of models, whose files go together.

    Raises:
        ValueError: another ending, one of `files`, a place in one of `folders`, or one where no
            regular file lies.
    """
    if out is None:
        return
    require_place("out", out)
    if out.suffix not in suffixes:
        raise ValueError(f"out: expected a name ending in {' or '.join(suffixes)}, got {out}")
    place = out.resolve()
    if any(each is not None and each.resolve() == place for each in files):
        raise ValueError(f"out: expected another file than the input, got {out}")
    if any(each is not None and each.resolve() == place.parent for each in folders):
        raise ValueError(f"out: expected a file outside the model's folder, got {out}")
