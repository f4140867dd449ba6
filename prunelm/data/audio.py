"""Reads recordings as mono samples at one rate, and cuts long ones at quiet places."""

import io
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunelm.data import mp3
from prunelm.data.containers import missing_bytes, streamed_wav
from prunelm.data.files import require_file
from prunelm.data.resampling import resample

RATES = (1000, 1_000_000)
"""The lowest and highest rate of a file that is read, in Hz; a header with another is damaged."""

_BLOCK = 1 << 20  # samples of all channels that are read at a time
_QUIET_SECONDS = 0.1  # of the stretch whose energy says how quiet a place is


def read_audio(path: Path | str, rate: int = 16000, channel: int | None = None) -> Tensor:
    """[S] float32 samples at `rate`, in [-1, 1] but for files of floats that hold more.

    A file at another rate is resampled. The first file of each other rate, and the first of several
    channels that are mixed, is reported in a log message.

    Args:
        channel: which to read, counted from 0; None: the mean of all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not audio, cut short, without samples, NaN or infinity among them, a rate out of
            `RATES`, or no such channel.
    """
    path = require_file("audio", path)
    with _opened(path) as file:
        if channel is not None and not 0 <= channel < file.channels:
            raise ValueError(f"{path}: channel: expected 0 to {file.channels - 1}, got {channel}")
        found, channels, declared = file.samplerate, file.channels, file.frames
        samples = np.concatenate([*_blocks(file, channel), np.zeros(0, np.float32)])
    layers = mp3.frames(path)
    # Encoders put up to three frames around what they were given, which decoders take away.
    if layers is not None and len(samples) < layers[0] - 4 * 1152:
        raise ValueError(
            f"{path}: expected about {layers[0]} samples, got {len(samples)} from libsndfile, "
            "which misreads an MP3 file without a Xing header; convert it to WAV or FLAC"
        )
    if len(samples) < declared < 1 << 62:
        raise ValueError(
            f"{path}: expected {declared} samples, as its header says, got {len(samples)}: "
            "the file is cut short"
        )
    if not len(samples):
        raise ValueError(f"{path}: expected samples, got none")
    finite = np.isfinite(samples)
    if not finite.all():
        first = int(np.argmin(finite))
        raise ValueError(
            f"{path}: expected finite samples, got {samples[first]} at {first / found:.2f} s"
        )
    if channels > 1 and channel is None:
        _say_once(f"audio in {path.parent}: expected 1 channel, got {channels}; mixing them",
                  ("channels", channels))  # fmt: skip
    if found != rate:
        _say_once(f"audio in {path.parent}: expected {rate} Hz, got {found} Hz; resampling",
                  ("rate", found, rate))  # fmt: skip
    return resample(torch.from_numpy(samples), found, rate)


def audio_seconds(path: Path | str) -> float:
    """The length of a recording in seconds, from its header where that says it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not audio, or cut short.
    """
    path = require_file("audio", path)
    with _opened(path) as file:
        frames = int(file.frames)
        if frames >= 1 << 62:  # from a pipe: nobody knew when the header was written
            frames = sum(len(block) for block in _blocks(file, 0))
        return frames / int(file.samplerate)


def split_long(audio: Tensor, rate: int, seconds: float = 30.0) -> list[tuple[int, int]]:
    """Parts of a recording of at most `seconds` each, as ranges of samples that partition it.

    Each cut lies in the middle of the quietest 100 ms (by energy, the latest of equals) between
    half and the whole of `seconds` after the cut before it. It leaves at least a third of `seconds`
    to the last part, so no part but a whole short recording is shorter than that.

    Args:
        audio: [S] samples at `rate`.
        seconds: of the longest part; at least 0.3.

    Returns:
        (begin, end) of each part in order; none of an empty recording.
    """
    if audio.ndim != 1:
        raise ValueError(f"audio: expected one channel [S], got shape {list(audio.shape)}")
    if rate < 10:
        raise ValueError(f"rate: expected at least 10 Hz, got {rate}")
    if not 0.3 <= seconds < math.inf:
        raise ValueError(f"seconds: expected at least 0.3, got {seconds}")
    limit, size = int(seconds * rate), len(audio)
    parts = []
    begin = 0
    while size - begin > limit:
        low = begin + limit // 2
        high = min(begin + limit, size - limit // 3)
        end = low + _quietest(audio[low:high], max(int(_QUIET_SECONDS * rate), 1))
        parts.append((begin, end))
        begin = end
    return [*parts, (begin, size)] if size else []


def _quietest(audio: Tensor, width: int) -> int:
    """The middle of the stretch of `width` samples with the least energy, the latest of equals."""
    width = min(width, len(audio))
    total = torch.zeros(len(audio) + 1, dtype=torch.float64)
    # Rounded to whole numbers, whose sums are exact: equal stretches must have equal energy.
    squares = (audio.double().square() * 2.0**30).round()
    torch.cumsum(squares, 0, out=total[1:])
    energy = total[width:] - total[:-width]
    latest = len(energy) - 1 - int(energy.flip(0).argmin())
    return latest + width // 2


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The recording, opened by libsndfile; ValueError names it if it is none or cut short."""
    import soundfile

    class Stream(soundfile.SoundFile):  # type: ignore[misc]
        # After each read of a file that can be sought, soundfile seeks to where the read should
        # have ended, which fails at the end of a file whose header does not know its length.
        def seekable(self) -> bool:
            return False

    missing = missing_bytes(path)
    layers = mp3.frames(path)
    if layers is not None:
        missing = layers[1]
    if missing:
        raise ValueError(f"{path}: expected {missing} more bytes of audio: the file is cut short")
    streamed = streamed_wav(path)
    try:
        with Stream(io.BytesIO(streamed) if streamed else path) as file:
            if not RATES[0] <= file.samplerate <= RATES[1]:
                raise ValueError(
                    f"{path}: expected a rate of {RATES[0]} to {RATES[1]} Hz, got {file.samplerate}"
                )
            yield file
    except soundfile.LibsndfileError as error:
        reason = str(error).rpartition(": ")[2] or str(error)
        reason = " ".join(reason.removeprefix("Error : ").split()).rstrip(".")
        raise ValueError(f"{path}: expected an audio file, got libsndfile's {reason!r}") from None
    except TypeError:  # soundfile's answer to a name that ends in .raw
        raise ValueError(f"{path}: expected an audio file with a header, got raw samples") from None


def _blocks(file: Any, channel: int | None) -> Iterator[np.ndarray[Any, Any]]:
    """[S] float32 pieces of the file, however long its header says that it is."""
    size = max(_BLOCK // file.channels, 1)
    while len(block := file.read(size, dtype="float32", always_2d=True)):
        if block.shape[1] == 1:
            yield block[:, 0]
        elif channel is not None:
            yield block[:, channel].copy()
        else:
            yield block.mean(1, dtype=np.float64).astype(np.float32)


@lru_cache(maxsize=1)
def _said() -> set[tuple[str | int, ...]]:
    return set()


def _say_once(message: str, kind: tuple[str | int, ...]) -> None:
    if kind not in _said():
        _said().add(kind)
        logging.getLogger("prunelm").warning("%s", message)
