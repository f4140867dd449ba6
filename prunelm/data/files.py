"""Writes files whole or not at all, and says in one line what is wrong with a file's name."""

import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

_TEMPORARY = re.compile(r"\.prunelm-[0-9a-f]{8}\..+")


@contextmanager
def replace_file(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes its place when the block succeeds.

    Folders are made as needed, and a link stays a link, to the file that is written. When the
    block raises, `path` stays as it was and nothing is left. What a killed process leaves is
    removed by `sweep`.

    Raises:
        OSError: the file cannot be written, such as on a full disk; `filename` is `path`.
        ValueError: `path` is a folder, a pipe or a device.
    """
    path = require_place("file", path)
    target = path.resolve() if path.is_symlink() else path
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not hidden behind another suffix: some writers look at it.
    temporary = target.with_name(f".prunelm-{secrets.token_hex(4)}.{target.name}")
    handle = -1
    try:
        # The lock, which ends with the process, tells `sweep` that somebody still writes.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        _lock(handle)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        if error.filename in (None, temporary, str(temporary)) and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    finally:
        if handle >= 0:
            os.close(handle)
        temporary.unlink(missing_ok=True)


def replace_files(folder: Path | str, contents: Mapping[str, bytes | None]) -> None:
    """Writes files that belong together: all of them, or none where one cannot be written.

    Args:
        contents: by name, in the order in which they take their places; None removes a file. A
            process killed in between leaves the last ones as they were.

    Raises:
        OSError: a file cannot be written; `filename` is its path.
    """
    with ExitStack() as stack:
        for name, data in reversed(list(contents.items())):  # the stack unwinds the other way round
            path = Path(folder) / name
            if data is None:
                stack.enter_context(_removed(path))
                continue
            temporary = stack.enter_context(replace_file(path))
            try:
                temporary.write_bytes(data)
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


@contextmanager
def _removed(path: Path) -> Iterator[None]:
    yield
    path.unlink(missing_ok=True)


def sweep(folder: Path | str, depth: int = 0) -> None:
    """Removes the temporary files that killed processes left, and nothing else.

    Args:
        depth: levels of folders below `folder` to look into; links are not followed.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if depth > 0:
                sweep(entry.path, depth - 1)
        elif _TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            _remove_unless_locked(entry.path)


def _remove_unless_locked(path: str) -> None:
    try:
        handle = os.open(path, os.O_RDWR)  # some file systems lock only what may be written
    except OSError:
        return
    try:
        if _lock(handle):
            os.unlink(path)
    except OSError:
        pass  # a file of another user, or gone meanwhile
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Whether an open file is locked now: not where another holds it, or files cannot be locked."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


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


def require_place(what: str, path: Path | str) -> Path:
    """`path`, if a file can take its place there: nothing lies there yet, or a regular file.

    Args:
        what: what the file is for, such as "out"; the message begins with it.

    Raises:
        ValueError: a folder, a pipe or a device lies there, which no file must replace.
        OSError: the system refuses to look, such as PermissionError.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        found = "a folder" if path.is_dir() else "a pipe or a device"
        raise ValueError(
            f"{what}: expected a place for a file, got {shown(path)}, which is {found}"
        )
    return path


def digest_of_file(path: Path | str) -> str:
    """12 hex digits that change with any byte of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def shown(value: object, longest: int = 200) -> str:
    """A value as text for one line of a message: printable and at most `longest` characters."""
    text = str(value)
    if len(text) > longest:
        text = text[: longest - 1] + "\u2026"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
