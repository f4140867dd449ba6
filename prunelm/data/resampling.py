"""Band-limited resampling of audio by libsoxr, and speed perturbation by it."""

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

SPEEDS = (0.1, 10.0)
"""The slowest and the fastest speed that `change_speed` takes."""


def resample(audio: Tensor, old_rate: int, new_rate: int) -> Tensor:
    """Resamples with libsoxr's high quality, whose error is below that of 16-bit samples.

    Args:
        audio: [S] float32, taken as silent before and after.
        old_rate: samples per second of `audio`.
        new_rate: samples per second wanted.

    Returns:
        [ceil(S * new_rate / old_rate)] float32; `audio` itself where the rates are equal.
    """
    for name, rate in (("old_rate", old_rate), ("new_rate", new_rate)):
        if rate < 1:
            raise ValueError(f"{name}: expected at least 1, got {rate}")
    return _stretch(audio, Fraction(new_rate, old_rate))


def change_speed(audio: Tensor, speed: float) -> Tensor:
    """Plays audio [S] `speed` times as fast, pitch and all: [ceil(S / speed)].

    `speed` is rounded to four decimals and lies within `SPEEDS`.
    """
    check_speed(speed)
    return _stretch(audio, 1 / Fraction(round(speed * 10_000), 10_000))


def check_speed(speed: float, name: str = "speed") -> None:
    """ValueError, under this name, unless `change_speed` takes it."""
    if not SPEEDS[0] <= speed <= SPEEDS[1]:
        raise ValueError(f"{name}: expected {SPEEDS[0]:g} to {SPEEDS[1]:g}, got {speed}")


def _stretch(audio: Tensor, ratio: Fraction) -> Tensor:
    if ratio == 1 or len(audio) == 0:
        return audio
    import soxr

    size = math.ceil(len(audio) * ratio)
    # libsoxr rounds the length: silence at the end gives it enough to cut from.
    padded = np.zeros(len(audio) + 2 * math.ceil(1 / ratio) + 2, np.float32)
    padded[: len(audio)] = audio.numpy()
    out = soxr.resample(padded, float(ratio.denominator), float(ratio.numerator), quality="HQ")
    return torch.from_numpy(out[:size])
