"""Recordings as users have them: cut short, stereo, from a pipe, at any rate; and long ones cut."""

import itertools
import logging
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from prunelm.data import audio
from prunelm.data.audio import audio_seconds, read_audio, split_long


@pytest.fixture(autouse=True)
def _nothing_said() -> None:
    audio._said().clear()


def tones(channels: int = 1, seconds: float = 0.5, rate: int = 16000) -> np.ndarray:
    time = np.arange(int(seconds * rate)) / rate
    return np.stack([0.3 * np.sin(2 * np.pi * 200 * (c + 1) * time) for c in range(channels)], 1)


def test_another_rate_is_resampled_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, tones(rate=22254), 22254)
    with caplog.at_level(logging.WARNING):
        found = [read_audio(tmp_path / name) for name in ("a.wav", "b.wav")]
    assert [len(each) for each in found] == [8000, 8000]
    assert float((found[0] - torch.from_numpy(tones()[:, 0]))[200:-200].abs().max()) <= 1e-3
    assert [each.getMessage() for each in caplog.records] == [
        f"audio in {tmp_path}: expected 16000 Hz, got 22254 Hz; resampling"
    ]


def test_channels_are_mixed_and_said_once_or_chosen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wave = tones(3)
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, wave, 16000, subtype="FLOAT")
    with caplog.at_level(logging.WARNING):
        found = [read_audio(tmp_path / name) for name in ("a.wav", "b.wav")]
    assert float((found[0] - torch.from_numpy(wave.mean(1))).abs().max()) <= 1e-6
    assert [each.getMessage() for each in caplog.records] == [
        f"audio in {tmp_path}: expected 1 channel, got 3; mixing them"
    ]
    for channel in range(3):
        chosen = read_audio(tmp_path / "a.wav", channel=channel)
        assert torch.equal(chosen, torch.from_numpy(wave[:, channel]).float())
    for channel in (3, -1):
        message = f"a.wav: channel: expected 0 to 2, got {channel}"
        with pytest.raises(ValueError, match=message):
            read_audio(tmp_path / "a.wav", channel=channel)


FORMATS = [
    ("WAV", "PCM_16"), ("WAV", "PCM_U8"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"),
    ("WAVEX", "PCM_16"), ("RF64", "PCM_16"), ("W64", "PCM_16"), ("W64", "IMA_ADPCM"),
    ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("NIST", "PCM_16"), ("NIST", "ULAW"), ("NIST", "ALAW"),
    ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "subtype"), FORMATS, ids=["-".join(each) for each in FORMATS])
def test_whole_files_are_read_and_cut_ones_refused(tmp_path: Path, kind: str, subtype: str) -> None:
    wave = tones(seconds=1.0)
    path = tmp_path / "a.audio"
    soundfile.write(path, wave, 16000, format=kind, subtype=subtype)
    found = read_audio(path)
    assert abs(len(found) - 16000) <= 600  # ADPCM comes in blocks
    assert audio_seconds(path) == len(found) / 16000
    assert float((found[2000:14000] - torch.from_numpy(wave[2000:14000, 0])).abs().max()) <= 0.1
    whole = path.read_bytes()
    for share in (0.99, 0.5, 0.2):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"a\.audio: expected ") as caught:
            read_audio(path)
        assert "\n" not in str(caught.value)
        if subtype in ("PCM_16", "FLOAT") and kind != "FLAC":
            assert str(caught.value).endswith("the file is cut short")


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFF000, 0x80000000])
@pytest.mark.parametrize("tail", [b"", b"LIST\4\0\0\0abcd"], ids=["bare", "with-a-list"])
def test_a_wav_from_a_pipe_is_read(tmp_path: Path, size: int, tail: bytes) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tones(), 16000, subtype="PCM_16")
    expected = read_audio(path)
    data = bytearray(path.read_bytes())
    data[40:44] = struct.pack("<I", size)
    path.write_bytes(bytes(data) + tail)
    assert torch.equal(read_audio(path)[:8000], expected)


def test_a_flac_from_a_pipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, tones(), 16000)
    expected = read_audio(path)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)  # samples unknown
    path.write_bytes(data)
    assert torch.equal(read_audio(path), expected)
    assert audio_seconds(path) == 0.5
    data[21] |= 0x0F  # many more than there are
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"expected 64424509440 samples, .* the file is cut short"):
        read_audio(path)


def test_an_mp3_without_its_length_is_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    for rate in (16000, 44100):
        soundfile.write(path, tones(seconds=2.0, rate=rate), rate, format="MP3")
        data = path.read_bytes()
        assert b"Xing" in data[:200] or b"Info" in data[:200]
        assert len(read_audio(path, rate)) == 2 * rate
        bare = data[data.index(data[:2], 2) :]
        for tail in (b"", b"TAG" + bytes(125)):
            path.write_bytes(bare + tail)
            try:
                assert len(read_audio(path, rate)) >= 1.9 * rate
            except ValueError as error:
                assert "misreads an MP3 file without a Xing header" in str(error)
        path.write_bytes(bare[: len(bare) // 2])
        with pytest.raises(ValueError, match=r"a.mp3: expected \d+ more bytes .* is cut short"):
            read_audio(path)
        path.write_bytes(b"ID3\4\0\0\0\0\0\4abcd" + data)
        assert len(read_audio(path, rate)) == 2 * rate


def test_what_is_no_recording_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "a.raw").write_bytes(bytes(100))
    soundfile.write(tmp_path / "nothing.wav", tones(seconds=0), 16000)
    for name, message in (
        ("text.wav", "expected an audio file, got libsndfile's 'Format not recognised'"),
        ("empty.wav", "expected an audio file, got"),
        ("a.raw", "expected an audio file with a header, got raw samples"),
        ("nothing.wav", "expected samples, got none"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            read_audio(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
    for path in (tmp_path, tmp_path / "none.wav"):
        with pytest.raises(FileNotFoundError, match=f"audio: expected a file, got {path}, which"):
            read_audio(path)


def test_samples_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    for value, said in ((math.nan, "nan"), (math.inf, "inf")):
        wave = tones()
        wave[4000] = value
        soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
        with pytest.raises(ValueError, match=rf"a.wav: expected finite .* got {said} at 0.25 s"):
            read_audio(tmp_path / "a.wav")


def test_floats_beyond_one_are_kept(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", 10 * tones(), 16000, subtype="FLOAT")
    assert (
        float((read_audio(tmp_path / "a.wav") / 10 - torch.from_numpy(tones()[:, 0])).abs().max())
        <= 1e-6
    )


@pytest.mark.parametrize("rate", [0, 1, 999, 1_000_001, 2**31 - 1])
def test_rates_that_cannot_be_meant_are_refused(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tones(), 16000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[24:28] = struct.pack("<I", rate)
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(ValueError, match=r"a.wav: expected (a rate of 1000 to|an audio file)"):
        read_audio(tmp_path / "a.wav")


def recording(*parts: tuple[float, float]) -> Tensor:
    """Noise of (seconds, loudness), one part after the other, at 1 kHz."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat(
        [level * torch.randn(int(1000 * s), generator=generator) for s, level in parts]
    )


def check_partition(parts: list[tuple[int, int]], size: int, limit: int) -> None:
    assert parts[0][0] == 0 and parts[-1][1] == size
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    assert all(limit // 3 <= end - begin <= limit for begin, end in parts)


def test_long_recordings_are_cut_in_their_pauses() -> None:
    speech = recording((25, 0.1), (0.6, 0.0), (22, 0.1), (0.4, 0.001), (9, 0.1), (1, 0.0), (7, 0.1))
    parts = split_long(speech, 1000)
    check_partition(parts, len(speech), 30_000)
    assert 25_000 < parts[0][1] < 25_600
    assert 47_600 < parts[1][1] < 48_000
    assert len(parts) == 3
    assert parts == split_long(speech.clone(), 1000)


@pytest.mark.parametrize("size", [30_001, 30_100, 59_999, 60_001, 95_000, 400_003])
@pytest.mark.parametrize("level", [0.0, 0.1])
def test_parts_have_the_length_promised(size: int, level: float) -> None:
    parts = split_long(level * torch.randn(size), 1000)
    check_partition(parts, size, 30_000)


def test_short_recordings_stay_whole() -> None:
    assert split_long(torch.zeros(30_000), 1000) == [(0, 30_000)]
    assert split_long(torch.zeros(0), 1000) == []
    with pytest.raises(ValueError, match=r"seconds: expected at least 0.3, got 0.1"):
        split_long(torch.zeros(5), 1000, 0.1)
    with pytest.raises(ValueError, match=r"audio: expected one channel \[S\], got shape \[2, 5\]"):
        split_long(torch.zeros(2, 5), 1000)
    with pytest.raises(ValueError, match="rate: expected at least 10 Hz, got 0"):
        split_long(torch.zeros(5), 0)
