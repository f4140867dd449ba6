"""Log-mel features of speech and their augmentation; what the recogniser sees."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PIECE = 1 << 18  # samples
_LOUDEST = 1e9  # float32 holds the energies of samples 1,000 times as loud


@dataclass(frozen=True)
class LogMel:
    """Audio to log-mel energies as Kaldi computes them: 25 ms windows every 10 ms, no dither.

    Every bin has mean 0 and variance 1 over the utterance, so that 0 is a neutral fill.
    """

    rate: int = 16000
    bins: int = 80

    def __call__(self, audio: Tensor | np.ndarray[Any, Any]) -> Tensor:
        """Returns [T, bins] float32 features, T = samples / (rate / 100), rounded.

        Args:
            audio: [S] samples in [-1, 1] at `rate`; any float dtype.

        Raises:
            ValueError: `audio` is not one channel, is too short for one frame, is not finite, or is
                so loud that energies overflow.
        """
        import kaldi_native_fbank

        samples = np.asarray(audio, dtype=np.float32)
        if samples.ndim != 1:
            raise ValueError(f"audio: expected one channel [S], got shape {list(samples.shape)}")
        if not np.isfinite(samples).all():
            raise ValueError("audio: expected finite samples, got NaN or infinity")
        loudest = np.abs(samples).max(initial=0.0)
        if loudest > _LOUDEST:
            raise ValueError(f"audio: expected samples in [-1, 1], got up to {loudest:.3g}")
        options = kaldi_native_fbank.FbankOptions()
        options.frame_opts.samp_freq = self.rate
        options.frame_opts.dither = 0.0
        options.frame_opts.snip_edges = False
        options.mel_opts.num_bins = self.bins
        computer = kaldi_native_fbank.OnlineFbank(options)
        parts = []
        done = 0
        # A piece at a time, so that the binding's copies stay small beside the recording.
        for begin in range(0, len(samples), _PIECE):
            piece = samples[begin : begin + _PIECE] * np.float32(32768)  # Kaldi's int16 range
            computer.accept_waveform(self.rate, piece)
            if begin + _PIECE >= len(samples):
                computer.input_finished()
            ready = computer.num_frames_ready
            if ready > done:
                parts.append(np.stack([computer.get_frame(i) for i in range(done, ready)]))
                computer.pop(ready - done)
                done = ready
        if not parts:
            raise ValueError(
                f"audio: expected at least one 10 ms frame, got {len(samples)} samples"
            )
        return normalise(torch.from_numpy(np.concatenate(parts)))


def normalise(features: Tensor) -> Tensor:
    """Gives each column of features [T, F] mean 0 and variance 1; a constant column becomes 0."""
    centred = features - features.mean(0)
    deviation = centred.square().mean(0).sqrt()
    return centred / deviation.clamp_min(1e-3)


def spec_augment(
    features: Tensor,
    lengths: Tensor,
    generator: torch.Generator,
    *,
    time_masks: int = 2,
    time_share: float = 0.05,
    bin_masks: int = 2,
    bin_width: int = 15,
) -> Tensor:
    """SpecAugment without time warping (Park et al. 2019, arXiv 1904.08779): zeros in random bands.

    Args:
        features: [B, T, F], normalised (0 is the mean).
        lengths: [B] int64 frames of each utterance.
        generator: the only source of chance.
        time_masks: stretches of frames hidden per utterance.
        time_share: longest stretch, as a fraction of the utterance.
        bin_masks: bands of neighbouring bins hidden per utterance.
        bin_width: widest band.

    Returns:
        [B, T, F], a copy.
    """
    batch, frames, bins = features.shape
    time_limit = lengths.float() * time_share
    bin_limit = torch.full((batch,), float(bin_width))
    hidden_time = _spans(frames, time_masks, time_limit, lengths.float(), generator)
    hidden_bin = _spans(bins, bin_masks, bin_limit, torch.full((batch,), float(bins)), generator)
    return features.masked_fill(hidden_time[:, :, None] | hidden_bin[:, None, :], 0.0)


def _spans(
    size: int, count: int, limit: Tensor, length: Tensor, generator: torch.Generator
) -> Tensor:
    """[B, size] bool: the union of `count` random spans of at most limit [B] inside length [B]."""
    chance = torch.rand(2, len(limit), count, generator=generator)
    width = (chance[0] * (limit[:, None].floor() + 1)).floor()
    begin = (chance[1] * (length[:, None] - width + 1).clamp_min(1)).floor()
    place = torch.arange(size)
    inside = (place >= begin[..., None]) & (place < (begin + width)[..., None])
    return inside.any(1)


def warp_bins(features: Tensor, factors: Tensor) -> Tensor:
    """Stretches the mel axis of each utterance, as a longer or shorter vocal tract would.

    Args:
        features: [B, T, F].
        factors: [B], 1 is no change; bin f is read at f * factor, held at the last bin.

    Returns:
        [B, T, F], interpolated linearly.
    """
    bins = features.shape[2]
    place = (torch.arange(bins) * factors[:, None]).clamp_max(bins - 1)
    low = place.floor().long().clamp_max(bins - 2)
    share = (place - low)[:, None, :].to(features.dtype)
    index = low[:, None, :].expand(features.shape)
    return features.gather(2, index) * (1 - share) + features.gather(2, index + 1) * share
