"""Whether an audio file is as long as its own header says; libsndfile reads what there is."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_UNKNOWN = 0x7FFFF000
"""Sizes from here on are what writers to a pipe put in place of one they cannot know."""

_PLAIN_CODINGS = (b"pcm", b"alaw", b"ulaw", b"mu-law", b"mulaw")
"""NIST SPHERE's names of codings with a fixed number of bytes for a sample."""


def missing_bytes(path: Path) -> int:
    """How many bytes the file lacks by its own header; 0 where it is whole or does not say.

    WAV (RIFF, RIFX, RF64), Sony Wave64, AIFF, AU, NIST SPHERE and Ogg say. The sizes 0 and
    0x7FFFF000 and above of streaming writers say nothing.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            end = _end(file, size)
        except (struct.error, ValueError, IndexError):
            return 0  # not that format after all: libsndfile says so
    return max(end - size, 0)


def streamed_wav(path: Path) -> bytes | None:
    """A WAV whose header says 0 samples though there are some, with the size set; else None."""
    with path.open("rb") as file:
        if file.read(4) != b"RIFF":
            return None
        size = path.stat().st_size
        for name, begin, length in _chunks(file, 12, size, "<"):
            if name == b"data":
                if length or begin >= size or _is_chunked(file, begin, size):
                    return None
                file.seek(0)
                data = bytearray(file.read())
                data[begin - 4 : begin] = struct.pack("<I", min(size - begin, 0xFFFFFFFF))
                return bytes(data)
    return None


def _end(file: BinaryIO, size: int) -> int:
    """Where the header says that the last sample ends."""
    head = file.read(1024)
    magic = head[:4]
    if magic in (b"RIFF", b"RIFX", b"RF64"):
        order = ">" if magic == b"RIFX" else "<"
        return _chunked_end(file, size, b"data", order, head if magic == b"RF64" else b"")
    if magic == b"riff":
        return _wave64_end(file, size)
    if magic == b"FORM":
        return _chunked_end(file, size, b"SSND", ">", b"")
    if magic in (b".snd", b"dns."):
        offset, length = struct.unpack((">" if magic == b".snd" else "<") + "II", head[4:12])
        return int(offset + length) if length < _UNKNOWN else 0
    if magic == b"NIST":
        return _sphere_end(head)
    if magic == b"OggS":
        return _ogg_end(file, size)
    return 0


def _chunked_end(file: BinaryIO, size: int, wanted: bytes, order: str, rf64: bytes) -> int:
    for name, begin, length in _chunks(file, 12, size, order):
        if name == wanted:
            if rf64 and length == 0xFFFFFFFF:
                length = struct.unpack("<Q", rf64[28:36])[0] if rf64[12:16] == b"ds64" else length
                return int(begin + length) if length < 1 << 62 else 0
            return begin + length if length < _UNKNOWN else 0
    return 0


def _wave64_end(file: BinaryIO, size: int) -> int:
    """Chunks have 16 bytes of name and 8 of length; the length counts these 24 as well."""
    place = 40
    while place + 24 <= size:
        file.seek(place)
        name, length = struct.unpack("<16sQ", file.read(24))
        if name.startswith(b"data"):
            return int(place + length) if length < 1 << 62 else 0
        if length < 24:
            return 0
        place += -(-length // 8) * 8
    return 0


def _chunks(file: BinaryIO, place: int, size: int, order: str) -> Iterator[tuple[bytes, int, int]]:
    """(name, where its content begins, the content's bytes) of each chunk."""
    while place + 8 <= size:
        file.seek(place)
        name, length = struct.unpack(order + "4sI", file.read(8))
        yield name, place + 8, length
        place += 8 + length + length % 2


def _is_chunked(file: BinaryIO, place: int, size: int) -> bool:
    """Whether what lies from `place` on are whole chunks, and so no samples."""
    for name, begin, length in _chunks(file, place, size, "<"):
        if not all(32 <= byte < 127 for byte in name) or begin + length > size:
            return False
        place = begin + length + length % 2
    return place >= size


def _sphere_end(head: bytes) -> int:
    lines = [line.split() for line in head.split(b"end_head")[0].split(b"\n")]
    fields = {line[0]: line[2] for line in lines if len(line) == 3}
    if fields.get(b"sample_coding", b"pcm") not in _PLAIN_CODINGS:
        return 0  # compressed: the number of samples does not give the number of bytes
    values = (b"sample_count", b"channel_count", b"sample_n_bytes")
    count, channels, width = (int(fields.get(name, b"1")) for name in values)
    return int(lines[1][0]) + count * channels * width if b"sample_count" in fields else 0


def _ogg_end(file: BinaryIO, size: int) -> int:
    """Where the last page ends."""
    place = 0
    while place < size:
        file.seek(place)
        head = file.read(27)
        if not b"OggS".startswith(head[:4]) or (len(head) >= 4 and head[:4] != b"OggS"):
            return 0  # something else after the pages
        if len(head) < 27:
            return place + 27
        table = file.read(head[26])
        place += 27 + head[26] + sum(table)
    return place
