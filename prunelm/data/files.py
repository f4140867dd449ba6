"""Writes files whole or not at all, and says in one line what is wrong with a file's name."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_file(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes its place when the block succeeds.

    Folders are made as needed. When the block raises, `path` stays as it was and nothing is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not hidden behind another suffix: some writers look at it.
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require_file(what: str, path: Path | str) -> Path:
    """`path`, if a regular file lies there.

    Args:
        what: what the file is for, such as "audio"; the message begins with it.

    Raises:
        FileNotFoundError: nothing lies there, or a folder, a pipe or a device.
        OSError: the system refuses to look, such as PermissionError.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        found = "which is a folder"
    elif path.exists():
        found = "which is a pipe or a device: save it as a file first"
    else:
        found = "which does not exist"
    raise FileNotFoundError(f"{what}: expected a file, got {shown(path)}, {found}")


def shown(value: object, longest: int = 200) -> str:
    """A value as text for one line of a message: printable and at most `longest` characters."""
    text = str(value)
    if len(text) > longest:
        text = text[: longest - 1] + "\u2026"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
