"""The frames of an MP3 file: how much they hold, and whether the last one is whole.

libmpg123, which reads MP3 for libsndfile, estimates the length of a file without a Xing header, at
times as half of it, and reads no further than that.
"""

from pathlib import Path

_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
_FIRST = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)  # kbit/s, MPEG-1
_LATER = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # MPEG-2 and 2.5


def frames(path: Path) -> tuple[int, int] | None:
    """(samples per channel in whole frames, bytes that the last frame lacks); None: no MP3.

    Only files of layer III frames without a gap count, with or without ID3 tags around them.
    """
    with path.open("rb") as file:
        head = file.read(4)
        if not head.startswith(b"ID3") and not _frame(head):
            return None
        data = head + file.read()
    place = 0
    if data[:3] == b"ID3" and len(data) >= 10:
        size = 0
        for byte in data[6:10]:
            size = size << 7 | byte & 127
        place = 10 + size
    samples = 0
    while place < len(data):
        found = _frame(data[place : place + 4])
        if found is None:
            tag = data[place : place + 8]
            whole = tag.startswith(b"TAG") or tag == b"APETAGEX"
            return (samples, 0) if samples and whole else None
        length, count = found
        if place + length > len(data):
            return samples, place + length - len(data)
        samples += count
        place += length
    return (samples, 0) if samples else None


def _frame(head: bytes) -> tuple[int, int] | None:
    """(bytes, samples per channel) of the frame with that header."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return None
    version, rate, bits = head[1] >> 3 & 3, head[2] >> 2 & 3, head[2] >> 4
    if version == 1 or rate == 3 or bits in (0, 15):
        return None
    samples = 1152 if version == 3 else 576
    kbits = (_FIRST if version == 3 else _LATER)[bits]
    return samples // 8 * kbits * 1000 // _RATES[version][rate] + (head[2] >> 1 & 1), samples
