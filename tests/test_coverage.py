"""What a tokenizer does not know is counted and shown."""

import pytest

from prunelm.data.coverage import UnknownCharacters, unknown_characters
from prunelm.data.text import normalise
from prunelm.data.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=["char", "unigram"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    lines = ["the cafe is open", "a dog sat", "no"] * 9
    return Tokenizer.train(lines, 40 if request.param == "char" else 17, request.param)


def test_known_text_says_nothing(tokenizer: Tokenizer) -> None:
    assert unknown_characters(["the dog", "a\tcafe\u00a0is\u2028open", ""], tokenizer) is None
    assert unknown_characters([], tokenizer) is None


def test_unknown_characters_are_counted_with_an_example(tokenizer: Tokenizer) -> None:
    lines = ["the cafe", "The Café", "is OPÉN, É!"]
    found = unknown_characters(lines, tokenizer)
    # T, C, é; O, P, É, N, the comma, É, the exclamation mark: 10 of 7 + 7 + 9.
    assert found == UnknownCharacters(10, 23, "É", 3)
    assert found is not None and found.share == 10 / 23
    assert str(found) == (
        "43.5 % of characters are unknown to the tokenizer, such as 'É' (U+00C9) in line 3"
    )
    again = unknown_characters([normalise(line) for line in lines], tokenizer)
    assert again is None


def test_a_few_and_invisible_ones_are_said_too(tokenizer: Tokenizer) -> None:
    found = unknown_characters(["a dog " * 1000, "a\u200bdog"], tokenizer)
    assert str(found) == (
        "less than 0.1 % of characters are unknown to the tokenizer, such as (U+200B) in line 2"
    )
