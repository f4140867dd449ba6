"""From recordings to words: the encoder, then a search, for recordings of any length."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from prunelm.data.speech import Utterance, read_audio, split_long
from prunelm.data.tokenizer import Tokenizer
from prunelm.decoding.fusion import Fusion
from prunelm.decoding.greedy import greedy
from prunelm.decoding.options import DEFAULT_SEARCH, SearchOptions, suitable_options
from prunelm.decoding.search import Hypothesis, mbs
from prunelm.models.features import LogMel
from prunelm.models.lm import TransformerLM
from prunelm.models.transducer import Transducer
from prunelm.training.pretrained import LoadedLM, LoadedRecogniser

CHUNK_SECONDS = 30.0
"""Longer recordings are cut into pieces of at most this length, each decoded on its own."""

FRAME_SECONDS = 0.04
"""One frame of the encoder's output: four frames of features of 10 ms."""

_BATCH_FRAMES = 60_000  # frames of features in a batch, padding among them; bounds the memory
_BATCH = 64

Audio = Path | str | Tensor | np.ndarray
_ONE = (Path, str, Tensor, np.ndarray)


@dataclass(frozen=True)
class EncodedBatch:
    """A batch of utterances after the encoder.

    Args:
        encoded: [B, T, D].
        lengths: [B] int64.
        ids: of the utterances.
    """

    encoded: Tensor
    lengths: Tensor
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Transcript:
    """What a recording says.

    Attributes:
        id: of the recording; its path where it has no other.
        text: the best hypothesis as words; "" where `error` says why there is none.
        nbest: hypotheses, the best first. Those of a recording that was cut into pieces are joined,
            and their times count from the recording's start.
        error: why the recording could not be decoded; "" where it was.
    """

    id: str
    text: str
    nbest: tuple[Hypothesis, ...] = ()
    error: str = ""

    def __str__(self) -> str:
        return self.text


def encode(
    recogniser: Transducer, utterances: Sequence[Utterance], batch: int = _BATCH
) -> list[EncodedBatch]:
    """Runs the encoder once over all utterances, `batch` of similar length at a time.

    Raises:
        FileNotFoundError: a recording is missing.
        ValueError: one cannot be read or is too short.
    """
    log_mel = LogMel(bins=recogniser.config.bins)
    features = [_features(log_mel, each, read_audio(each.audio_path)) for each in utterances]
    order = sorted(range(len(features)), key=lambda i: len(features[i]))
    batches = []
    for begin in range(0, len(order), batch):
        some = order[begin : begin + batch]
        ids = tuple(utterances[i].id for i in some)
        batches.append(_encoded(recogniser, [features[i] for i in some], ids))
    return batches


def search(
    recogniser: Transducer,
    batches: Sequence[EncodedBatch],
    lm: TransformerLM | None = None,
    options: SearchOptions = DEFAULT_SEARCH,
) -> dict[str, list[Hypothesis]]:
    """utterance id -> its hypotheses, the best first, in the order of the batches."""
    found: dict[str, list[Hypothesis]] = {}
    for batch in batches:
        nbest = _searched(recogniser, batch, lm, options)
        found.update(zip(batch.ids, nbest, strict=True))
    return found


def best_words(found: dict[str, list[Hypothesis]], tokenizer: Tokenizer) -> dict[str, str]:
    """utterance id -> the best hypothesis's words."""
    return {name: tokenizer.decode(list(nbest[0].tokens)) for name, nbest in found.items()}


@overload
def transcribe(
    recogniser: LoadedRecogniser,
    audio: Audio,
    lm: LoadedLM | None = None,
    options: SearchOptions | None = None,
) -> Transcript: ...


@overload
def transcribe(
    recogniser: LoadedRecogniser,
    audio: list[Audio],
    lm: LoadedLM | None = None,
    options: SearchOptions | None = None,
) -> list[Transcript]: ...


def transcribe(
    recogniser: LoadedRecogniser,
    audio: Audio | list[Audio],
    lm: LoadedLM | None = None,
    options: SearchOptions | None = None,
) -> Transcript | list[Transcript]:
    """The words of one recording, or of several in a list.

    Args:
        recogniser: from `prunelm.load_recogniser`.
        audio: a file, or samples [S] float32 in [-1, 1] at 16,000 a second, as a tensor or an
            array; or a list of them.
        lm: from `prunelm.load_lm`, of the recogniser's tokenizer; fused into the search.
        options: None: beam 4 with the LM weight and token reward that were chosen for the models.

    Raises:
        FileNotFoundError: a recording is missing.
        ValueError: a recording cannot be read, or the models have different tokenizers.
    """
    if not isinstance(recogniser, LoadedRecogniser):
        got = type(recogniser).__name__
        raise ValueError(f"recogniser: expected what prunelm.load_recogniser gives, got {got}")
    if lm is not None:
        if not isinstance(lm, LoadedLM):
            raise ValueError(f"lm: expected what prunelm.load_lm gives, got {type(lm).__name__}")
        recogniser.tokenizer.check(lm.tokenizer.fingerprint, str(lm.folder))
    if options is None:
        options, _ = suitable_options(recogniser, lm)
    one = isinstance(audio, _ONE)
    if not one and not isinstance(audio, Iterable):
        raise _no_audio(audio)
    each = [audio] if isinstance(audio, _ONE) else list(audio)
    recordings = [_recording(value, i) for i, value in enumerate(each)]
    found = list(transcribe_each(recogniser, recordings, lm, options))
    for transcript in found:
        if transcript.error:
            raise ValueError(transcript.error)
    return found[0] if one else found


@dataclass
class _Recording:
    """A recording on its way through `transcribe_each`."""

    id: str
    found: list[list[Hypothesis] | None] = field(default_factory=list)  # one per piece
    read: bool = False
    error: str = ""

    @property
    def done(self) -> bool:
        return bool(self.error) or (self.read and all(each is not None for each in self.found))


@dataclass(frozen=True)
class _Piece:
    """A stretch of a recording as features [T, F]; `frame` is its place in encoder frames."""

    recording: _Recording
    index: int
    features: Tensor
    frame: int


def transcribe_each(
    recogniser: LoadedRecogniser,
    utterances: Iterable[Utterance | tuple[str, Tensor]],
    lm: LoadedLM | None = None,
    options: SearchOptions = DEFAULT_SEARCH,
    *,
    channel: int | None = None,
) -> Iterator[Transcript]:
    """Transcripts in the order of the recordings, each as soon as its batch is decoded.

    A recording that cannot be read or decoded gives a transcript whose `error` is not empty, and
    the others go on. Memory holds one recording's samples and a batch of features.

    Args:
        utterances: recordings; or (id, samples [S] at 16,000 a second).
        options: `lm_weight` 0 leaves the LM out.
        channel: of recordings with several, counted from 0; None: their mean.
    """
    log_mel = LogMel(bins=recogniser.model.config.bins)
    waiting: deque[_Recording] = deque()
    pieces: list[_Piece] = []

    def decode() -> None:
        _decode(recogniser.model, pieces, None if lm is None else lm.model, options)
        pieces.clear()

    def finished() -> Iterator[Transcript]:
        while waiting and waiting[0].done:
            yield _transcript(waiting.popleft(), recogniser.tokenizer, options.nbest)

    for utterance in utterances:
        name = utterance.id if isinstance(utterance, Utterance) else utterance[0]
        recording = _Recording(name)
        waiting.append(recording)
        try:
            if isinstance(utterance, Utterance):
                audio = read_audio(utterance.audio_path, log_mel.rate, channel=channel)
            else:
                audio = utterance[1]
            for begin, end in split_long(audio, log_mel.rate, CHUNK_SECONDS):
                features = _features(log_mel, utterance, audio[begin:end])
                frame = round(begin / log_mel.rate / FRAME_SECONDS)
                pieces.append(_Piece(recording, len(recording.found), features, frame))
                recording.found.append(None)
                if _is_full(pieces):
                    decode()
        except (ValueError, OSError) as error:
            recording.error = _reason(error)
        recording.read = True
        if _is_full(pieces):
            decode()
        yield from finished()
    decode()
    yield from finished()


def _is_full(pieces: Sequence[_Piece]) -> bool:
    return len(pieces) >= _BATCH or sum(len(each.features) for each in pieces) >= _BATCH_FRAMES


def _decode(
    model: Transducer, pieces: Sequence[_Piece], lm: TransformerLM | None, options: SearchOptions
) -> None:
    """Puts the hypotheses of all pieces where they belong."""
    left = sorted(
        (each for each in pieces if not each.recording.error), key=lambda p: -len(p.features)
    )
    while left:
        count = max(_BATCH_FRAMES // len(left[0].features), 1)  # the longest comes first
        some, left = left[:count], left[count:]
        try:
            batch = _encoded(model, [each.features for each in some], ("",) * len(some))
            found = _searched(model, batch, lm, options)
        except ValueError as error:
            if len(some) > 1:  # whose fault it is shows one by one
                for each in some:
                    _decode(model, [each], lm, options)
            else:
                some[0].recording.error = f"{some[0].recording.id}: {_reason(error)}"
            continue
        for piece, nbest in zip(some, found, strict=True):
            piece.recording.found[piece.index] = [
                replace(each, times=tuple(piece.frame + time for time in each.times))
                for each in nbest
            ]


def _transcript(recording: _Recording, tokenizer: Tokenizer, nbest: int) -> Transcript:
    if recording.error:
        return Transcript(recording.id, "", error=recording.error)
    joined = _joined([each or [] for each in recording.found], nbest)
    text = tokenizer.decode(list(joined[0].tokens))
    return Transcript(recording.id, text, tuple(joined))


def _joined(pieces: Sequence[Sequence[Hypothesis]], nbest: int) -> list[Hypothesis]:
    """The best ways to take one hypothesis of each piece, ranked by the sum of places.

    Each piece's list is in the search's own order, so the first of all is the best of each.
    """
    ways = list(enumerate(pieces[0]))
    for piece in pieces[1:]:
        longer = [
            (rank + more, _followed(first, second))
            for rank, first in ways
            for more, second in enumerate(piece)
        ]
        ways = sorted(longer, key=lambda way: way[0])[:nbest]
    return [each for _, each in ways]


def _followed(first: Hypothesis, second: Hypothesis) -> Hypothesis:
    names = [*dict.fromkeys([*first.parts, *second.parts])]
    parts = {name: first.parts.get(name, 0.0) + second.parts.get(name, 0.0) for name in names}
    return Hypothesis(
        first.tokens + second.tokens, first.score + second.score, parts,
        first.times + second.times, first.confidence + second.confidence,
    )  # fmt: skip


def _features(log_mel: LogMel, utterance: Utterance | tuple[str, Tensor], audio: Tensor) -> Tensor:
    name = utterance.audio_path if isinstance(utterance, Utterance) else utterance[0]
    try:
        return log_mel(audio)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _encoded(
    recogniser: Transducer, features: Sequence[Tensor], ids: tuple[str, ...]
) -> EncodedBatch:
    padded = torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True)
    lengths = torch.tensor([len(each) for each in features])
    with torch.inference_mode():
        encoded, lengths = recogniser.encode(padded, lengths)
    return EncodedBatch(encoded, lengths, ids)


def _searched(
    recogniser: Transducer,
    batch: EncodedBatch,
    lm: TransformerLM | None,
    options: SearchOptions,
) -> list[list[Hypothesis]]:
    if options.beam == 0:
        if lm is not None:
            raise ValueError("beam: expected at least 1 with a language model, got 0")
        return greedy(recogniser, batch.encoded, batch.lengths)
    fusions = () if lm is None or not options.lm_weight else (Fusion(lm, options.lm_weight),)
    return mbs(
        recogniser, batch.encoded, batch.lengths, options.beam, fusions,
        nbest=options.nbest, token_reward=options.token_reward,
    )  # fmt: skip


def _recording(value: Audio, index: int) -> Utterance | tuple[str, Tensor]:
    if not isinstance(value, _ONE):
        raise _no_audio(value)
    if isinstance(value, Tensor | np.ndarray):
        name = f"audio[{index}]"
        samples = torch.as_tensor(value).detach()
        if not samples.is_floating_point():
            got = str(samples.dtype).removeprefix("torch.")
            raise ValueError(f"{name}: expected floating samples in [-1, 1], got {got}")
        if not samples.numel():
            raise ValueError(f"{name}: expected samples, got none")
        return name, samples
    return Utterance(str(value), Path(value), None)


def _no_audio(value: object) -> ValueError:
    got = type(value).__name__
    return ValueError(f"audio: expected a file, samples [S], or a list of them, got {got}")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
