"""Writes files whole or not at all."""

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
