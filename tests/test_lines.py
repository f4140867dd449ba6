"""Text files as users have them: marks, line ends, damage, lines that are far too long."""

import gzip
import logging
import os
import zlib
from pathlib import Path

import pytest

from prunelm.data.lines import LONGEST_LINE, cut_line, read_lines, split_lines
from prunelm.data.text import read_lines as read_lines_of_text

ENDS = {"unix": "\n", "windows": "\r\n", "old-mac": "\r"}


def test_text_has_the_same_reader() -> None:
    assert read_lines_of_text is read_lines


@pytest.mark.parametrize("end", list(ENDS.values()), ids=list(ENDS))
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["bare", "marked"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_marks_and_ends_are_no_text(tmp_path: Path, end: str, mark: str, packed: bool) -> None:
    data = (mark + end.join(["one", "", "two"]) + end).encode()
    for name in ("a.txt", "a.gz") if packed else ("a.txt",):
        (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
        assert read_lines(tmp_path / name) == ["one", "", "two"]
        (tmp_path / name).write_bytes(gzip.compress(data * 2) if packed else data * 2)
        assert read_lines(tmp_path / name) == ["one", "", "two"] * 2


@pytest.mark.parametrize("letter", "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\ufeff")
def test_nothing_else_ends_a_line(tmp_path: Path, letter: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(f"a{letter}b\nc", encoding="utf-8")
    assert read_lines(path) == [f"a{letter}b", "c"]


def test_files_without_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for data, lines in ((b"", []), (b"\n", [""]), (b"\xef\xbb\xbf", []), (b"a\r\n\r", ["a", ""])):
        path.write_bytes(data)
        assert read_lines(path) == lines, data
    path.write_bytes(gzip.compress(b""))
    assert read_lines(path) == []
    assert split_lines("") == []


WIDE = "two lines\nof text\n"
BROKEN = {
    "utf-16": (WIDE.encode("utf-16"), "expected UTF-8 text, got what looks like UTF-16"),
    "utf-16-be": (b"\xfe\xff" + WIDE.encode("utf-16-be"), "got what looks like UTF-16"),
    "utf-16-unmarked": (WIDE.encode("utf-16-le"), "got what looks like UTF-16"),
    "utf-32": (WIDE.encode("utf-32"), "got what looks like UTF-32"),
    "zip": (b"PK\x03\x04" + bytes(9), "got what looks like a zip archive"),
    "latin": (b"a\nb\ncaf\xe9 au lait", "expected UTF-8, got .* at byte 7, line 3"),
    "surrogate": (b"ab\xed\xa0\x80", "expected UTF-8, got .* at byte 2, line 1"),
    "nul": (b"one\r\ntwo\r\nth\0ree", "line 3: expected text, got a NUL character"),
    "nul-packed": (gzip.compress(b"\0"), "line 1: expected text, got a NUL character"),
}


@pytest.mark.parametrize(("data", "message"), list(BROKEN.values()), ids=list(BROKEN))
def test_what_is_no_text_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_lines(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def damaged() -> dict[str, tuple[bytes, str]]:
    whole = gzip.compress(b"some lines\n" * 50)
    flipped = bytearray(whole)
    flipped[10] ^= 0x06  # the kind of the first block, which then is none
    wrong_sum = bytearray(whole)
    wrong_sum[-7] ^= 0xFF
    with pytest.raises(zlib.error):
        gzip.decompress(bytes(flipped))
    return {
        "half": (whole[: len(whole) // 2], "got one cut short"),
        "two-bytes": (whole[:2], "got one cut short"),
        "nothing": (b"", "got one cut short"),
        "flipped": (bytes(flipped), "got a damaged one"),
        "checksum": (bytes(wrong_sum), "got a damaged one: CRC check failed"),
        "tail": (whole + b"and more", "got a damaged one: Not a gzipped file"),
        "plain": (b"plain words", "got a damaged one: plain content under the name .gz"),
    }


@pytest.mark.parametrize(("data", "message"), list(damaged().values()), ids=list(damaged()))
def test_damaged_gzip_files_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="expected a whole gzip file, " + message) as caught:
        read_lines(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"text: expected a file, got {tmp_path}, which is"):
        read_lines(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match=r"got .*/pipe, which is a pipe or a device"):
        read_lines(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match=r"got .*/a\\nb, which does not exist"):
        read_lines(tmp_path / "a\nb")


def test_long_lines_are_cut_and_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [f"word{i}" for i in range(600_000)]
    long = " ".join(words)
    assert len(long) > 5_000_000
    (tmp_path / "a.txt").write_text(f"first\n{long}\nlast\n")
    with caplog.at_level(logging.WARNING, "prunelm"):
        lines = read_lines(tmp_path / "a.txt")
    assert max(map(len, lines)) <= LONGEST_LINE
    assert (lines[0], lines[-1]) == ("first", "last")
    assert " ".join(lines[1:-1]).split() == words
    [record] = caplog.records
    assert record.getMessage() == (
        f"{tmp_path / 'a.txt'}, line 2: expected at most 20000 characters, got {len(long)}; "
        "it is cut at white space"
    )
    assert read_lines(tmp_path / "a.txt", longest=None) == ["first", long, "last"]


def test_where_lines_are_cut() -> None:
    assert cut_line("ab cd efg", 5) == ["ab cd", "efg"]
    assert cut_line("ab cd efg", 4) == ["ab", "cd", "efg"]
    assert cut_line("abcdefg h", 3) == ["abc", "def", "g h"]
    assert cut_line("abc", 3) == ["abc"]
    with pytest.raises(ValueError, match="longest: expected at least 1, got 0"):
        cut_line("abc", 0)
