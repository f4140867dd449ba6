"""Batches of features for training a recogniser: length buckets, speeds, augmentation, caching."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prunelm.data.audio import audio_seconds, read_audio
from prunelm.data.files import shown
from prunelm.data.manifest import Utterance
from prunelm.data.resampling import change_speed, check_speed
from prunelm.data.tokenizer import UNKNOWN, Tokenizer
from prunelm.models.features import LogMel, spec_augment, warp_bins


@dataclass(frozen=True)
class SpeechBatch:
    """What `Transducer.loss` takes.

    Attributes:
        features: [B, T, F] float32, zero past the lengths.
        lengths: [B] int64.
        targets: [B, U] int64, zero past the lengths.
        target_lengths: [B] int64.
        number: the batch's own, counted from 0 over all processes.
    """

    features: Tensor
    lengths: Tensor
    targets: Tensor
    target_lengths: Tensor
    number: int = 0


@dataclass(frozen=True)
class Augmentation:
    """What is done to training features; the defaults suit less than 100 hours of speech.

    Attributes:
        speeds: one of these is drawn for each utterance and epoch.
        begin: batches before this one only have their speed changed, so that alignments form early.
        warp: mel axes are stretched by up to this fraction either way, as other speakers would.
        time_masks: stretches of frames that are set to the mean, for each utterance.
        time_share: longest stretch of frames, as a share of the utterance.
        bin_masks: bands of mel bins that are set to the mean, for each utterance.
        bin_width: widest band of mel bins, in bins.
    """

    speeds: tuple[float, ...] = (0.85, 0.92, 1.0, 1.08, 1.15)
    begin: int = 0
    warp: float = 0.12
    time_masks: int = 4
    time_share: float = 0.05
    bin_masks: int = 2
    bin_width: int = 15

    def __post_init__(self) -> None:
        if not self.speeds:
            raise ValueError("speeds: expected at least one, got none")
        for speed in self.speeds:
            check_speed(speed, "speeds")
        if not 0 <= self.warp < 1:
            raise ValueError(f"warp: expected a fraction in [0, 1), got {self.warp}")
        for name in ("begin", "time_masks", "bin_masks", "bin_width"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if not 0 <= self.time_share <= 1:
            raise ValueError(f"time_share: expected a fraction in [0, 1], got {self.time_share}")

    def __call__(self, features: Tensor, lengths: Tensor, generator: torch.Generator) -> Tensor:
        """features [B, T, F], lengths [B] -> [B, T, F]."""
        if self.warp:
            draws = torch.rand(len(lengths), generator=generator)
            features = warp_bins(features, 1 + (2 * draws - 1) * self.warp)
        return spec_augment(
            features,
            lengths,
            generator,
            time_masks=self.time_masks,
            time_share=self.time_share,
            bin_masks=self.bin_masks,
            bin_width=self.bin_width,
        )


class FeatureCache:
    """Features of utterances at several speeds, computed when first asked for, kept as float16."""

    def __init__(self, log_mel: LogMel) -> None:
        self.log_mel = log_mel
        self._kept: dict[tuple[str, float], Tensor] = {}

    def __call__(self, utterance: Utterance, speed: float = 1.0) -> Tensor:
        """[T, F] float32; ValueError names the recording that gives no features."""
        key = (str(utterance.audio_path), speed)
        if key not in self._kept:
            audio = read_audio(utterance.audio_path, self.log_mel.rate)
            try:
                self._kept[key] = self.log_mel(change_speed(audio, speed)).half()
            except ValueError as error:
                raise ValueError(f"{utterance.audio_path}: {error}") from None
        return self._kept[key].float()


class SpeechBatches:
    """`batches(step)`: a pure function of the step and the seed, so that resuming is exact.

    Every epoch draws a speed for each utterance, sorts by length, cuts `count` batches of about
    equally many frames and shuffles them. The first `short_first` of all go from short to long,
    which is how alignments are found soonest (arXiv 1512.02595).
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        tokenizer: Tokenizer,
        *,
        seconds: float = 48.0,
        short_first: int = 500,
        augmentation: Augmentation | None = None,
        cache: FeatureCache | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Plans batches.

        Args:
            utterances: at least one.
            seconds: audio in a batch, about. A batch ends where its share of an epoch is reached,
                so that it holds at most 1.5 `seconds` and one utterance more; a recording that
                is longer than a batch is neither cut nor left out.
            short_first: batches that are sorted by length, at most an epoch's.
            augmentation: None: the features as they are.
            cache: to share among several; None: a new one.
            rank: this process's number of `world`, each of which takes every `world`th batch.

        Raises:
            ValueError: no utterances, or a transcript with characters that the tokenizer lacks.
        """
        if not utterances:
            raise ValueError("utterances: expected at least one, got none")
        if not 0 < seconds < math.inf:
            raise ValueError(f"seconds: expected a number above 0, got {seconds}")
        self.utterances, self.augmentation = list(utterances), augmentation
        self.cache = cache or FeatureCache(LogMel())
        self.seed, self.rank, self.world = seed, rank, world
        self.short_first = short_first
        self.tokens = [token_ids(each, tokenizer) for each in utterances]
        self.seconds = [length_seconds(each) for each in utterances]
        wanted = math.fsum(self.seconds) / seconds
        self.count = round(min(max(wanted, 1), len(self.utterances)))
        self._epoch = -1
        self._batches: list[list[tuple[int, float]]] = []

    def __call__(self, step: int) -> SpeechBatch:
        """The batch of one step, counted from 0."""
        number = step * self.world + self.rank
        epoch, place = divmod(number, self.count)
        if epoch != self._epoch:
            self._batches, self._epoch = self.plan(epoch), epoch
        members = self._batches[place]
        batch = collate(
            [self.cache(self.utterances[i], speed) for i, speed in members],
            [self.tokens[i] for i, _ in members],
        )
        features = batch.features
        if self.augmentation is not None and number >= self.augmentation.begin:
            generator = _generator(self.seed, "batch", number)
            features = self.augmentation(features, batch.lengths, generator)
        return replace(batch, features=features, number=number)

    def plan(self, epoch: int) -> list[list[tuple[int, float]]]:
        """(utterance's number, speed) of every member of every batch of an epoch."""
        generator = _generator(self.seed, "epoch", epoch)
        size = len(self.utterances)
        speeds = self.augmentation.speeds if self.augmentation else (1.0,)
        drawn = torch.randint(len(speeds), (size,), generator=generator).tolist()
        members = [(i, speeds[d]) for i, d in enumerate(drawn)]
        lengths = [self.seconds[i] / speed for i, speed in members]
        # Noise, so that neighbours in length are not the same in every epoch.
        noise = (0.4 * torch.rand(size, generator=generator)).tolist()
        order = sorted(range(size), key=lambda i: lengths[i] + noise[i])
        cumulative = torch.tensor([lengths[i] for i in order], dtype=torch.float64).cumsum(0)
        share = float(cumulative[-1]) / self.count
        ends = [0]
        for b in range(1, self.count):
            end = int(torch.searchsorted(cumulative, b * share))
            ends.append(min(max(end, ends[-1] + 1), size - self.count + b))
        groups = [order[begin:end] for begin, end in zip(ends, [*ends[1:], size], strict=True)]
        shuffled = torch.randperm(self.count, generator=generator).tolist()
        if epoch == 0:
            shuffled[: self.short_first] = sorted(shuffled[: self.short_first])
        return [[members[i] for i in groups[b]] for b in shuffled]


def collate(features: Sequence[Tensor], tokens: Sequence[Sequence[int]]) -> SpeechBatch:
    """Pads features [T_i, F] and tokens into one batch."""
    targets = pad_sequence([torch.tensor(t, dtype=torch.int64) for t in tokens], batch_first=True)
    return SpeechBatch(
        pad_sequence(list(features), batch_first=True),
        torch.tensor([len(each) for each in features]),
        targets,
        torch.tensor([len(each) for each in tokens]),
    )


def _generator(seed: int, kind: str, number: int) -> torch.Generator:
    # Hashed, because torch's CPU generator reads 32 bits of its seed only.
    digest = hashlib.sha256(f"{seed} {kind} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def token_ids(utterance: Utterance, tokenizer: Tokenizer) -> list[int]:
    """The transcript's ids; ValueError names an utterance with none or with unknown characters."""
    ids = tokenizer.encode(utterance.text)
    if UNKNOWN in ids:
        letters = {letter for letter in utterance.text if not letter.isspace()}
        unknown = sorted(letter for letter in letters if UNKNOWN in tokenizer.encode(letter))
        raise ValueError(
            f"{utterance.id}: expected a transcript within the tokenizer's characters, "
            f"got {shown(' '.join(unknown))!r} in {shown(utterance.text)!r}"
        )
    return ids


def length_seconds(utterance: Utterance) -> float:
    """The utterance's length, from its file's header where the corpus does not say.

    Raises:
        FileNotFoundError, ValueError: the file is missing or no audio; names it.
    """
    if utterance.seconds is not None:
        return utterance.seconds
    return audio_seconds(utterance.audio_path)
