"""Word error rate with a bootstrap interval, and a paired comparison of two systems."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Ints = NDArray[np.int64]
_DRAWS = 10_000


@dataclass(frozen=True)
class WER:
    """Word errors of a test set.

    Attributes:
        rate: errors / words, a fraction.
        low, high: 95 % interval of the rate, bootstrapped over utterances (Bisani and Ney, ICASSP
            2004), not below 0.
        errors: insertions + deletions + substitutions.
        words: in the references.
    """

    rate: float
    low: float
    high: float
    errors: int
    words: int
    insertions: int
    deletions: int
    substitutions: int


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same utterances.

    Attributes:
        difference: rate of b minus rate of a; below 0 where b is better.
        low, high: its 95 % interval, bootstrapped over utterances.
        better: the share of bootstrap draws in which b makes fewer errors than a.
    """

    difference: float
    low: float
    high: float
    better: float


def word_error_rate(refs: Sequence[str], hyps: Sequence[str]) -> WER:
    """WER of hypotheses against references, words split at white space.

    An empty reference counts its hypothesis's words as insertions, an empty hypothesis its
    reference's words as deletions.

    Args:
        refs: one transcript for each utterance.
        hyps: what was recognised, in the same order.

    Raises:
        ValueError: the lists differ in length, or the references hold no word.
    """
    from kaldialign import bootstrap_wer_ci

    references, hypotheses = _split("refs", refs), _split("hyps", hyps)
    edits = _edits(references, hypotheses)
    insertions, deletions, substitutions, words = (int(x) for x in edits.sum(0))
    errors = insertions + deletions + substitutions
    rate = errors / words
    found = bootstrap_wer_ci(references, hypotheses, replications=_DRAWS)
    low, high = max(rate - found["ci95"], 0.0), rate + found["ci95"]
    if not np.isfinite(found["wer"]):  # it drew a sample without any word
        drawn = _draw(edits)
        low, high = _percentiles(drawn[:, :3].sum(1), drawn[:, 3])
    return WER(rate, low, high, errors, words, insertions, deletions, substitutions)


def compare(refs: Sequence[str], hyps_a: Sequence[str], hyps_b: Sequence[str]) -> Comparison:
    """Whether system b makes fewer word errors than system a, paired by utterance.

    Raises:
        ValueError: the lists differ in length, or the references hold no word.
    """
    references = _split("refs", refs)
    a = _edits(references, _split("hyps_a", hyps_a), "hyps_a")
    b = _edits(references, _split("hyps_b", hyps_b), "hyps_b")
    pairs = np.stack([a[:, :3].sum(1), b[:, :3].sum(1), a[:, 3]], 1)
    drawn = _draw(pairs)
    change = drawn[:, 1] - drawn[:, 0]
    low, high = _percentiles(change, drawn[:, 2])
    errors_a, errors_b, words = pairs.sum(0)
    better = float((change < 0).mean())
    return Comparison(float((errors_b - errors_a) / words), low, high, better)


def _split(name: str, texts: Sequence[str]) -> list[list[str]]:
    if isinstance(texts, str):
        raise ValueError(f"{name}: expected a list of transcripts, got one string")
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise ValueError(f"{name}: expected text, got {text!r} as transcript {number}")
    return [text.split() for text in texts]


def _edits(refs: list[list[str]], hyps: list[list[str]], name: str = "hyps") -> _Ints:
    """[utterances, 4] int64: insertions, deletions, substitutions, reference words."""
    from kaldialign import edit_distance

    if len(refs) != len(hyps):
        raise ValueError(f"{name}: expected {len(refs)} transcripts as in refs, got {len(hyps)}")
    if not any(refs):
        raise ValueError(f"refs: expected at least one word, got none in {len(refs)} transcripts")
    each = [edit_distance(ref, hyp) for ref, hyp in zip(refs, hyps, strict=True)]
    return np.array([[e["ins"], e["del"], e["sub"], e["ref_len"]] for e in each], np.int64)


def _draw(counts: _Ints) -> _Ints:
    """Sums over utterances drawn with replacement, [draws, columns]; the same draws every time."""
    generator = np.random.default_rng(0)
    at_once = max(min(100, 10_000_000 // len(counts)), 1)  # for memory; any number draws the same
    sizes = [min(at_once, _DRAWS - begin) for begin in range(0, _DRAWS, at_once)]
    sums = [
        [column[chosen].sum(1) for column in counts.T]
        for chosen in (generator.integers(len(counts), size=(n, len(counts))) for n in sizes)
    ]
    return np.concatenate(sums, 1).T


def _percentiles(change: _Ints, words: _Ints) -> tuple[float, float]:
    low, high = np.percentile(change[words > 0] / words[words > 0], [2.5, 97.5])
    return float(low), float(high)
