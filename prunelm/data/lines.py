"""Reads text files, plain or compressed by gzip, as lines."""

import gzip
import logging
import re
import zlib
from pathlib import Path

from prunelm.data.files import require_file

LONGEST_LINE = 20_000
"""Characters of the longest line that `read_lines` gives; over 20 minutes of speech."""

_GZIP = b"\x1f\x8b"
_LINE_END = re.compile("\r\n|\n|\r")
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ\x00": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"%PDF": "a PDF",
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def read_lines(path: Path | str, longest: int | None = LONGEST_LINE) -> list[str]:
    r"""Lines of a UTF-8 file, plain or compressed by gzip, without their ends.

    Lines end at \n, \r\n or \r and nowhere else. A byte order mark at a line's start is left out.
    A line of more than `longest` characters is cut into several, at white space where there is
    some, and a log message says so: nothing but the white space at the cut is lost.

    Args:
        longest: most characters in a line; None: lines are never cut.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, holds NUL characters, or is a damaged gzip file.
    """
    path = Path(path)
    lines = split_lines(read_text(path))
    if longest is None or all(len(line) <= longest for line in lines):
        return lines
    long = [number for number, line in enumerate(lines, 1) if len(line) > longest]
    logging.getLogger("prunelm").warning(
        "%s, line %d: expected at most %d characters, got %d; %s cut at white space",
        path, long[0], longest, len(lines[long[0] - 1]),
        f"{len(long)} such lines are" if len(long) > 1 else "it is",
    )  # fmt: skip
    return [part for line in lines for part in cut_line(line, longest)]


def read_text(path: Path | str) -> str:
    """A whole UTF-8 file, plain or compressed by gzip, whatever its name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, holds NUL characters, or is a damaged gzip file.
    """
    path = require_file("text", path)
    data = path.read_bytes()
    if data.startswith(_GZIP) or path.suffix == ".gz":
        data = _decompress(data, path)
    for magic, name in _OTHER_FORMATS.items():
        if data.startswith(magic):
            raise ValueError(f"{path}: expected UTF-8 text, got what looks like {name}")
    if _is_wide(data[:1000]):
        raise ValueError(f"{path}: expected UTF-8 text, got what looks like UTF-16")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = len(_LINE_END.findall(data[: error.start].decode("utf-8"))) + 1
        raise ValueError(
            f"{path}: expected UTF-8, got {error.reason} at byte {error.start}, line {line}"
        ) from None
    place = text.find("\0")
    if place >= 0:
        line = len(_LINE_END.findall(text, 0, place)) + 1
        raise ValueError(f"{path}, line {line}: expected text, got a NUL character")
    return text


def split_lines(text: str) -> list[str]:
    r"""Lines of a text without their ends \n, \r\n or \r and without byte order marks before."""
    text = text.lstrip("\ufeff")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    if "\ufeff" in text:  # at later lines where files with a mark were joined
        lines = [line.lstrip("\ufeff") for line in lines]
    return lines


def cut_line(line: str, longest: int) -> list[str]:
    """A line in parts of at most `longest` characters, cut at the last white space that fits."""
    if longest < 1:
        raise ValueError(f"longest: expected at least 1, got {longest}")
    parts = []
    begin = 0
    while len(line) - begin > longest:
        end = begin + longest
        while end > begin and not line[end].isspace():
            end -= 1
        if end > begin:
            parts.append(line[begin:end])
            begin = end + 1
        else:  # one word
            parts.append(line[begin : begin + longest])
            begin += longest
    return [*parts, line[begin:]]


def _decompress(data: bytes, path: Path) -> bytes:
    try:
        if not data.startswith(_GZIP[: len(data)]):
            raise gzip.BadGzipFile("plain content under the name .gz")
        if not data:
            raise EOFError
        return gzip.decompress(data)
    except EOFError:
        raise ValueError(f"{path}: expected a whole gzip file, got one cut short") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: expected a whole gzip file, got a damaged one: {error}"
        ) from None


def _is_wide(head: bytes) -> bool:
    """Whether every other byte is mostly 0, as in UTF-16 without a byte order mark."""
    return len(head) >= 4 and any(
        2 * head[parity::2].count(0) > len(head[parity::2]) and not head[1 - parity :: 2].count(0)
        for parity in (0, 1)
    )
