"""Features: frames and scale, SpecAugment, mel warping, resampling."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from prunelm.data.resampling import change_speed, resample
from prunelm.models.features import LogMel, normalise, spec_augment, warp_bins


def tone(hertz: float, seconds: float = 0.5, rate: int = 16000) -> Tensor:
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(int(seconds * rate)) / rate)


def mel_energies(audio: Tensor) -> Tensor:
    """[T, 80] straight from the definition, with torch's FFT and the edges mirrored."""
    frames, width, shift = (len(audio) + 80) // 160, 400, 160
    samples = audio.double() * 32768
    place = torch.arange(frames)[:, None] * shift + shift // 2 - width // 2 + torch.arange(width)
    place = torch.where(place < 0, -place - 1, place)
    place = torch.where(place >= len(audio), 2 * len(audio) - 1 - place, place)
    windows = samples[place]
    windows = windows - windows.mean(1, keepdim=True)
    previous = torch.cat((windows[:, :1], windows[:, :-1]), 1)
    hann = 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(width) / (width - 1))
    power = torch.fft.rfft((windows - 0.97 * previous) * hann**0.85, 512).abs().square()

    def mel(hertz: Tensor) -> Tensor:
        return 1127 * torch.log(1 + hertz / 700)

    low, high = mel(torch.tensor([20.0, 8000.0], dtype=torch.float64)).tolist()
    edges = torch.linspace(low, high, 82, dtype=torch.float64)
    place = mel(torch.arange(257, dtype=torch.float64) * 16000 / 512)
    rise = (place - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - place) / (edges[2:] - edges[1:-1])[:, None]
    filters = torch.minimum(rise, fall).clamp_min(0)
    filters[:, 256] = 0  # the bin at the Nyquist frequency is not used
    return (power @ filters.T).clamp_min(2.0**-23).log()


def test_log_mel_follows_its_definition() -> None:
    audio = 0.1 * torch.randn(5321)
    found = LogMel()(audio)
    assert found.shape == (33, 80) and found.dtype == torch.float32
    assert float((found - normalise(mel_energies(audio))).abs().max()) <= 1e-2


def test_log_mel_takes_numpy_and_torch_and_repeats_itself() -> None:
    audio = 0.1 * torch.randn(4000)
    first = LogMel()(audio)
    assert torch.equal(first, LogMel()(audio.numpy()))
    assert torch.equal(first, LogMel()(audio.numpy().astype(np.float64)))
    assert LogMel(bins=23)(audio).shape == (25, 23)


@pytest.mark.parametrize("size", [2 * 262_144, 262_144 + 79, 600_001])
def test_long_audio_comes_in_pieces_without_a_seam(size: int) -> None:
    audio = 0.1 * torch.randn(size)
    found = LogMel()(audio)
    assert float((found - normalise(mel_energies(audio))).abs().max()) <= 1e-2


def test_loudness_changes_nothing() -> None:
    audio = 0.1 * torch.randn(8000)
    assert float((LogMel()(audio) - LogMel()(audio / 4)).abs().max()) <= 1e-2


def test_every_column_is_normalised_and_silence_is_zero() -> None:
    features = normalise(torch.randn(50, 7) * 3 + 5)
    assert float(features.mean(0).abs().max()) <= 1e-5
    assert float((features.square().mean(0) - 1).abs().max()) <= 1e-5
    assert bool((LogMel()(torch.zeros(1600)) == 0).all())


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (torch.zeros(2, 1600), r"audio: expected one channel \[S\], got shape \[2, 1600\]"),
        (torch.zeros(7), "audio: expected at least one 10 ms frame, got 7 samples"),
        (torch.full((1600,), 1e34), r"audio: expected samples in \[-1, 1\], got up to 1e\+34"),
        (torch.tensor([0.0, math.nan] * 800), "audio: expected finite samples, got NaN"),
    ],
    ids=["stereo", "short", "loud", "nan"],
)
def test_bad_audio_is_refused(audio: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogMel()(audio)


def test_spec_augment_hides_bands_within_their_limits() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.ones(200, 60, 30)
    lengths = torch.randint(20, 61, (200,), generator=generator)
    hidden = spec_augment(
        features, lengths, generator, time_masks=1, time_share=0.2, bin_masks=1, bin_width=7
    ) == 0  # fmt: skip
    for b in range(200):
        frames, bins = hidden[b].all(1), hidden[b].all(0)
        assert torch.equal(hidden[b], frames[:, None] | bins[None])
        for line in (frames, bins):
            edges = line.int().diff().abs().sum() + line[0] + line[-1]
            assert int(edges) in (0, 2), "one stretch"
        assert not frames[lengths[b] :].any()
        assert int(frames.sum()) <= 0.2 * int(lengths[b]) and int(bins.sum()) <= 7
    assert int(hidden.all(1).sum(1).max()) == 7 and int(hidden.all(1).sum(1).min()) == 0
    assert bool((features == 1).all())


def test_spec_augment_depends_on_its_generator_only() -> None:
    features, lengths = torch.randn(3, 40, 20), torch.tensor([40, 30, 9])
    first, second, third = (
        spec_augment(features, lengths, torch.Generator().manual_seed(seed), bin_width=9)
        for seed in (4, 4, 5)
    )
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_warp_reads_each_bin_at_its_stretched_place() -> None:
    features = torch.arange(10.0).square().repeat(3, 2, 1)
    warped = warp_bins(features, torch.tensor([1.0, 0.95, 1.2]))
    assert torch.equal(warped[0], features[0])
    for b, factor in enumerate((1.0, 0.95, 1.2)):
        places = np.minimum(np.arange(10) * factor, 9)
        expected = np.interp(places, np.arange(10), np.arange(10.0) ** 2)
        assert float((warped[b, 1] - torch.from_numpy(expected)).abs().max()) <= 1e-4


RATES = [
    (22050, 16000), (8000, 16000), (44100, 16000), (16000, 22050), (22254, 16000), (192000, 16000),
    (16000, 15999), (11025, 48000),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), RATES)
def test_resampling_keeps_a_tone(old: int, new: int) -> None:
    found = resample(tone(440, rate=old), old, new)
    assert found.dtype == torch.float32 and len(found) == math.ceil(old // 2 * new / old)
    expected = tone(440, 0.6, new)[: len(found)]
    assert float((found - expected)[300:-300].abs().max()) <= 1e-3


def test_resampling_removes_what_the_new_rate_cannot_hold() -> None:
    found = resample(tone(9500, rate=44100), 44100, 16000)
    assert float(found[300:-300].abs().max()) <= 1e-3


@pytest.mark.parametrize(("old", "new"), [(192000, 16000), (44100, 16000), (16000, 22050), (3, 7)])
def test_a_few_samples_give_as_many_as_the_rates_say(old: int, new: int) -> None:
    for size in (1, 2, 3, 7, 100):
        assert len(resample(torch.ones(size), old, new)) == math.ceil(size * new / old)


def test_resampling_repeats_itself_and_leaves_its_input() -> None:
    audio = 0.1 * torch.randn(4000)
    before = audio.clone()
    assert torch.equal(resample(audio, 22254, 16000), resample(audio, 22254, 16000))
    assert torch.equal(audio, before)


@pytest.mark.parametrize("speed", [0.5, 0.85, 0.9137, 1.1, 1.25, 2.0])
def test_speed_changes_length_and_pitch(speed: float) -> None:
    found = change_speed(tone(400), speed)
    assert len(found) == math.ceil(8000 / speed - 1e-9)
    expected = tone(400 * speed, 1.5)[: len(found)]
    assert float((found - expected)[300:-300].abs().max()) <= 1e-3
    assert torch.equal(change_speed(tone(400), 1.0), tone(400))


@pytest.mark.parametrize("speed", [0.0, -1.0, 11.0, math.nan, math.inf])
def test_speeds_that_cannot_be_meant_are_refused(speed: float) -> None:
    with pytest.raises(ValueError, match=f"speed: expected 0.1 to 10, got {speed}"):
        change_speed(tone(400), speed)


def test_resampling_nothing_is_nothing() -> None:
    assert len(resample(torch.zeros(0), 8000, 16000)) == 0
    audio = tone(100)
    assert resample(audio, 16000, 16000) is audio
    with pytest.raises(ValueError, match="new_rate: expected at least 1, got 0"):
        resample(audio, 16000, 0)
