"""Word error rates against hand-made answers, and their intervals against known spreads."""

import math
import random

import pytest

from prunelm.metrics.wer import WER, Comparison, compare, word_error_rate


@pytest.mark.parametrize(
    ("ref", "hyp", "counts"),
    [
        pytest.param("a b c", "a b c", (0, 0, 0, 3), id="right"),
        pytest.param("a b c", "a x c", (0, 0, 1, 3), id="substitution"),
        pytest.param("a b c", "a c", (0, 1, 0, 3), id="deletion"),
        pytest.param("a b c", " a b  b c ", (1, 0, 0, 3), id="insertion"),
        pytest.param("a b c", "", (0, 3, 0, 3), id="nothing-heard"),
        pytest.param("ab", "a b", (1, 0, 1, 1), id="words-not-letters"),
    ],
)
def test_counts(ref: str, hyp: str, counts: tuple[int, int, int, int]) -> None:
    found = word_error_rate([ref], [hyp])
    assert (found.insertions, found.deletions, found.substitutions, found.words) == counts
    assert found.errors == sum(counts[:3])
    assert found.rate == found.low == found.high == sum(counts[:3]) / counts[3]


def test_an_empty_reference_counts_insertions() -> None:
    found = word_error_rate(["", "a b"], ["x", "a b"])
    assert (found.insertions, found.errors, found.words, found.rate) == (1, 1, 2, 0.5)
    assert 0 <= found.low <= found.rate <= found.high < math.inf


def test_mostly_silent_references_count_insertions() -> None:
    refs, hyps = [""] * 40 + ["a b"], ["x y"] * 40 + ["a"]
    found = word_error_rate(refs, hyps)
    assert (found.insertions, found.deletions, found.words, found.rate) == (80, 1, 2, 40.5)
    assert 0 <= found.low <= found.rate <= found.high < math.inf
    assert compare(refs, hyps, [""] * 40 + ["a b"]).difference == -40.5


def test_the_interval_has_the_width_of_independent_errors() -> None:
    """1,000 words, one to an utterance: 1.96 standard deviations of a share."""
    draw = random.Random(0)
    hyps = ["a" if draw.random() < 0.8 else "b" for _ in range(1000)]
    found = word_error_rate(["a"] * 1000, hyps)
    half = 1.96 * math.sqrt(found.rate * (1 - found.rate) / 1000)
    assert abs(found.rate - found.low - half) <= 0.05 * half
    assert abs(found.high - found.rate - half) <= 0.05 * half
    assert found == word_error_rate(["a"] * 1000, hyps)


def test_no_error_has_no_negative_bound() -> None:
    found = word_error_rate(["a b"] * 5, ["a b"] * 4 + ["a"])
    assert found.low >= 0
    assert word_error_rate(["a"] * 9, ["a"] * 9) == WER(0.0, 0.0, 0.0, 0, 9, 0, 0, 0)


def test_a_paired_comparison_sees_what_intervals_hide() -> None:
    draw = random.Random(1)
    refs = ["a b c d e f g h i j"] * 200
    hyps_a = [" ".join(w for w in ref.split() if draw.random() < 0.7) for ref in refs]
    hyps_b = [
        hyp + " j" if not hyp.endswith("j") and i % 4 == 0 else hyp for i, hyp in enumerate(hyps_a)
    ]
    a, b = word_error_rate(refs, hyps_a), word_error_rate(refs, hyps_b)
    assert b.high > a.low  # the intervals overlap
    found = compare(refs, hyps_a, hyps_b)
    assert found.difference == pytest.approx(b.rate - a.rate)
    assert found.low <= found.difference <= found.high < 0
    assert found.better == 1.0
    assert compare(refs, hyps_b, hyps_a).better == 0.0
    assert compare(refs, hyps_a, hyps_a) == Comparison(0.0, 0.0, 0.0, 0.0)


def test_wrong_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="hyps: expected 2 transcripts as in refs, got 1"):
        word_error_rate(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="hyps_b: expected 1 transcripts as in refs, got 2"):
        compare(["a"], ["a"], ["a", "b"])
    with pytest.raises(ValueError, match="refs: expected at least one word, got none in 2"):
        word_error_rate(["", " "], ["a", ""])
    with pytest.raises(ValueError, match="refs: expected at least one word, got none in 0"):
        word_error_rate([], [])
    with pytest.raises(ValueError, match="refs: expected text, got None as transcript 2"):
        word_error_rate(["a", None], ["a", "b"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="refs: expected a list of transcripts, got one string"):
        word_error_rate("a b", ["a b"])
