"""Band-limited resampling of audio, and speed perturbation by it."""

from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

ZERO_CROSSINGS = 16
"""Half width of the interpolating sinc, in periods of the lower rate."""


def resample(audio: Tensor, old_rate: int, new_rate: int) -> Tensor:
    """Resamples by windowed-sinc interpolation, one filter per output phase.

    Args:
        audio: [S] float32.
        old_rate: samples per second of `audio`.
        new_rate: samples per second wanted.

    Returns:
        [ceil(S * new_rate / old_rate)] float32.
    """
    for name, rate in (("old_rate", old_rate), ("new_rate", new_rate)):
        if rate < 1:
            raise ValueError(f"{name}: expected at least 1, got {rate}")
    ratio = Fraction(new_rate, old_rate)
    if ratio == 1 or len(audio) == 0:
        return audio
    filters, before = _filters(ratio.numerator, ratio.denominator)
    width = filters.shape[1]
    size = -(-len(audio) * ratio.numerator // ratio.denominator)
    after = width + ratio.denominator
    padded = F.pad(audio, (before, after))
    out = F.conv1d(padded[None, None], filters[:, None], stride=ratio.denominator)[0]
    return out.T.reshape(-1)[:size].contiguous()


def change_speed(audio: Tensor, speed: float) -> Tensor:
    """Plays audio [S] `speed` times as fast, pitch and all: [ceil(S / speed)]."""
    exact = Fraction(speed).limit_denominator(100)
    if exact <= 0:
        raise ValueError(f"speed: expected above 0, got {speed}")
    return resample(audio, exact.numerator, exact.denominator)


@lru_cache(maxsize=16)
def _filters(up: int, down: int) -> tuple[Tensor, int]:
    """[up, width] float32, row p for output samples p, p + up, ...; and the left padding.

    Output n lies at input position n * down / up; for n = p + m * up that is m * down plus
    p * down / up, so all outputs of one phase share a filter with stride `down`.
    """
    cutoff = min(1.0, up / down) * 0.97  # of the old Nyquist frequency; the rest is the roll-off
    half = int(ZERO_CROSSINGS / cutoff) + 1
    taps = torch.arange(-half, half + down + 1, dtype=torch.float64)
    phase = torch.arange(up, dtype=torch.float64)[:, None] * down / up
    distance = (taps - phase) * cutoff
    window = torch.cos(distance / ZERO_CROSSINGS * torch.pi / 2).square()
    window = window.where(distance.abs() < ZERO_CROSSINGS, 0.0)
    return (torch.sinc(distance) * window * cutoff).float(), half
