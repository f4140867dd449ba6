"""From recordings to words: the encoder once, then as many searches as are asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunelm.data.speech import Utterance, read_audio
from prunelm.data.tokenizer import Tokenizer
from prunelm.decoding import Fusion, Hypothesis, greedy, mbs
from prunelm.models.features import LogMel
from prunelm.models.lm import TransformerLM
from prunelm.models.transducer import Transducer


@dataclass(frozen=True)
class Searching:
    """How to search.

    Args:
        beam: hypotheses kept; 0 is greedy search, which takes no LM.
        weight: of the LM in shallow fusion.
        reward: added to the score for each token; not in greedy search.
        nbest: hypotheses returned, at most.
    """

    beam: int = 4
    weight: float = 0.3
    reward: float = 0.0
    nbest: int = 1

    def __post_init__(self) -> None:
        if self.beam < 0:
            raise ValueError(f"beam: expected at least 0, got {self.beam}")
        if self.nbest < 1:
            raise ValueError(f"nbest: expected at least 1, got {self.nbest}")


@dataclass(frozen=True)
class Encoded:
    """A batch of utterances after the encoder.

    Args:
        encoded: [B, T, D].
        lengths: [B] int64.
        ids: of the utterances.
    """

    encoded: Tensor
    lengths: Tensor
    ids: tuple[str, ...]


def encode(
    recogniser: Transducer, utterances: Sequence[Utterance], batch: int = 64
) -> list[Encoded]:
    """Runs the encoder once over all utterances, `batch` of similar length at a time.

    Raises:
        FileNotFoundError: a recording is missing.
        ValueError: one cannot be read or is too short.
    """
    log_mel = LogMel(bins=recogniser.config.bins)
    features = []
    for utterance in utterances:
        audio = read_audio(utterance.audio_path, log_mel.rate)
        try:
            features.append(log_mel(audio))
        except ValueError as error:
            raise ValueError(f"{utterance.audio_path}: {error}") from None
    order = sorted(range(len(features)), key=lambda i: len(features[i]))
    batches = []
    for begin in range(0, len(order), batch):
        some = order[begin : begin + batch]
        padded = torch.nn.utils.rnn.pad_sequence([features[i] for i in some], batch_first=True)
        lengths = torch.tensor([len(features[i]) for i in some])
        with torch.inference_mode():
            encoded, lengths = recogniser.encode(padded, lengths)
        batches.append(Encoded(encoded, lengths, tuple(utterances[i].id for i in some)))
    return batches


def search(
    recogniser: Transducer,
    batches: Sequence[Encoded],
    lm: TransformerLM | None = None,
    how: Searching = Searching(),
) -> dict[str, list[Hypothesis]]:
    """utterance id -> its hypotheses, the best first, in the order of the batches."""
    if how.beam == 0 and lm is not None:
        raise ValueError("beam: expected at least 1 with a language model, got 0")
    fusions = () if lm is None else (Fusion(lm, how.weight),)
    found: dict[str, list[Hypothesis]] = {}
    for batch in batches:
        if how.beam == 0:
            nbest = greedy(recogniser, batch.encoded, batch.lengths)
        else:
            nbest = mbs(
                recogniser, batch.encoded, batch.lengths, how.beam, fusions,
                nbest=how.nbest, token_reward=how.reward,
            )  # fmt: skip
        found.update(zip(batch.ids, nbest, strict=True))
    return found


def transcribe(
    recogniser: Transducer,
    tokenizer: Tokenizer,
    batches: Sequence[Encoded],
    lm: TransformerLM | None = None,
    how: Searching = Searching(),
) -> dict[str, str]:
    """utterance id -> the best hypothesis's words, in the order of the batches."""
    found = search(recogniser, batches, lm, how)
    return {name: tokenizer.decode(list(nbest[0].tokens)) for name, nbest in found.items()}
