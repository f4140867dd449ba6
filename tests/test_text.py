import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from prunelm.data.text import (
    TokenBatches,
    TokenIds,
    normalise,
    read_lines,
    sentences,
    text_batches,
    write_token_ids,
)
from prunelm.data.tokenizer import Tokenizer

LINES = ["the cat sat on the mat", "it's a dog", "the quick brown fox jumps over the lazy dog"] * 30


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(LINES, 1000, "char")


@pytest.fixture
def ids(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    write_token_ids(LINES, tokenizer, tmp_path / "ids.bin")
    return tmp_path / "ids.bin"


@pytest.mark.parametrize("name", ["lines.txt", "lines.txt.gz"])
def test_lines_are_read_plain_or_compressed(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    data = "caf\u00e9\n\nlast".encode()
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read_lines(path) == ["caf\u00e9", "", "last"]


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"text: expected a file, got .*/none"):
        read_lines(tmp_path / "none")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt: expected UTF-8, got .* at byte 3"):
        read_lines(tmp_path / "latin.txt")
    whole = gzip.compress(b"some lines\n" * 50)
    (tmp_path / "cut.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut.gz: expected a whole gzip file, got one cut short"):
        read_lines(tmp_path / "cut.gz")
    (tmp_path / "plain.gz").write_bytes(b"not gzip at all")
    with pytest.raises(ValueError, match=r"plain.gz: expected a whole gzip file"):
        read_lines(tmp_path / "plain.gz")


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("  It\u2019s \u201cfine\u201d,  he said. ", "it's fine he said"),
        ("'Tis the boys' o'clock", "tis the boys o'clock"),
        ("Caf\u00e9 na\u00efve \u0152uvre \u00c6on", "cafe naive oeuvre aeon"),
        ("a well-known man & x''y", "a well known man and x y"),
        ("Mr. and Mrs. Drood; Dr. Who", "mister and missus drood doctor who"),
        ("12 ' -- ...", ""),
    ],
)
def test_normalised_text_is_lower_case_words(written: str, spoken: str) -> None:
    assert normalise(written) == spoken
    assert normalise(spoken) == spoken


def test_sentences_end_where_a_capital_follows() -> None:
    paragraph = (
        '"Stop! Go," said Mr. Fox. He went to St. Ives... and back. "Well?" In 1861 it was. No'
    )
    assert sentences(paragraph) == [
        "stop",
        "go said mister fox",
        "he went to st ives and back",
        "well",
        "no",
    ]
    assert sentences("") == []
    assert sentences("... 5!") == []


def test_ids_are_lines_between_boundaries(ids: Path, tokenizer: Tokenizer) -> None:
    source = TokenIds(ids, tokenizer)
    wanted = [0]
    for line in LINES:
        wanted += [*tokenizer.encode(line), 0]
    assert source.ids.tolist() == wanted
    assert source.ids.dtype == np.uint16
    assert (source.tokens, source.lines) == (len(wanted), 90)
    assert source.words == sum(len(line.split()) for line in LINES)
    assert [tokenizer.decode(line) for line in source] == LINES


def test_lines_without_words_are_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_token_ids(iter(["", "a dog", "  ", "5"]), tokenizer, tmp_path / "x.bin")
    source = TokenIds(tmp_path / "x.bin", tokenizer)
    assert (source.lines, source.words, source.unknown) == (2, 3, 1)
    with pytest.raises(ValueError, match="lines: expected at least one with a word"):
        write_token_ids(["", " "], tokenizer, tmp_path / "y.bin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.json"]


def test_texts_without_a_word_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n  \n")
    message = f"{path}: expected at least one line with a word, got none"
    with pytest.raises(ValueError, match=message):
        text_batches(path, tokenizer, tmp_path, batch=1, length=4)
    path.write_text("12\n3\n")
    with pytest.raises(ValueError, match=r"text\.txt: .* with a word of letters a to z, got none"):
        text_batches(path, tokenizer, tmp_path, batch=1, length=4, normalised=True)
    assert list(tmp_path.iterdir()) == [path]


def test_seeds_below_zero_give_batches_as_others(ids: Path, tokenizer: Tokenizer) -> None:
    below, same, other = (TokenBatches(ids, tokenizer, 4, 19, seed) for seed in (-1, -1, 1))
    assert torch.equal(below(3), same(3))
    assert not torch.equal(below(3), other(3))


def test_bad_id_files_are_refused(ids: Path, tokenizer: Tokenizer) -> None:
    other = Tokenizer.train(LINES, 31)
    message = f"ids.bin: expected the vocabulary {other.fingerprint}.*got {tokenizer.fingerprint}"
    with pytest.raises(ValueError, match=message):
        TokenIds(ids, other)
    size = ids.stat().st_size
    ids.write_bytes(ids.read_bytes()[:-2])
    with pytest.raises(ValueError, match=rf"ids.bin: expected {size} bytes, got {size - 2}"):
        TokenIds(ids, tokenizer)
    ids.with_suffix(".json").write_text(json.dumps({"tokens": 3}))
    with pytest.raises(ValueError, match=r"ids.json: expected a header of token ids"):
        TokenIds(ids, tokenizer)
    ids.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match=r"token ids: expected a file, got .*ids.json"):
        TokenIds(ids, tokenizer)


def test_batches_are_a_function_of_seed_and_step(ids: Path, tokenizer: Tokenizer) -> None:
    forward, backward, other = (TokenBatches(ids, tokenizer, 4, 19, seed) for seed in (3, 3, 4))
    there = [forward(step) for step in range(40)]
    back = [backward(step) for step in reversed(range(40))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(there, back, strict=True))
    assert not torch.equal(there[0], other(0))
    assert there[0].shape == (4, 20)
    assert there[0].dtype == torch.int64


def test_processes_share_the_joint_batch(ids: Path, tokenizer: Tokenizer) -> None:
    joint = TokenBatches(ids, tokenizer, 6, 19, 0)
    parts = [TokenBatches(ids, tokenizer, 2, 19, 0, rank, 3) for rank in range(3)]
    for step in (0, 5, 17):
        assert torch.equal(joint(step), torch.cat([part(step) for part in parts]))


def test_an_epoch_sees_nearly_all_and_every_window_is_text(ids: Path, tokenizer: Tokenizer) -> None:
    batches = TokenBatches(ids, tokenizer, 1, 24, 0)
    stream = batches.source.ids.tolist()
    starts = []
    for step in range(batches.windows):
        row = batches(step)[0].tolist()
        places = [i for i in range(len(stream) - 24) if stream[i : i + 25] == row]
        assert places
        starts.append(row[0] == 0)
    # Lines have 11 to 44 tokens here: a start lies within 12 tokens more often than not.
    assert sum(starts) >= 0.5 * batches.windows


def test_windows_longer_than_the_text_are_refused(ids: Path, tokenizer: Tokenizer) -> None:
    tokens = TokenIds(ids, tokenizer).tokens
    most = (tokens - 1) // 2
    TokenBatches(ids, tokenizer, 1, most, 0)(0)
    with pytest.raises(
        ValueError, match=rf"length: expected at most {most} for .*, got {most + 1}"
    ):
        TokenBatches(ids, tokenizer, 1, most + 1, 0)
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
        TokenBatches(ids, tokenizer, 1, 4, 0, 2, 2)
    with pytest.raises(ValueError, match="batch, length: expected at least 1, got 0 and 4"):
        TokenBatches(ids, tokenizer, 0, 4, 0)


def test_ids_out_of_the_vocabulary_are_refused(ids: Path, tokenizer: Tokenizer) -> None:
    stored = np.fromfile(ids, "<u2")
    stored[5] = tokenizer.vocab_size
    stored.tofile(ids)
    size = tokenizer.vocab_size
    message = rf"ids.bin: expected ids from 0 to {size - 1}, got 0 to {size}"
    with pytest.raises(ValueError, match=message):
        TokenIds(ids, tokenizer)


@pytest.mark.parametrize(
    "changes", [{"dtype": "O"}, {"dtype": []}, {"tokens": 1e400}, {"lines": None}, {"words": "x"}]
)
def test_headers_of_other_types_are_refused(
    ids: Path, tokenizer: Tokenizer, changes: dict[str, object]
) -> None:
    header = json.loads(ids.with_suffix(".json").read_text())
    ids.with_suffix(".json").write_text(json.dumps({**header, **changes}))
    with pytest.raises(ValueError, match=r"ids.json: expected a header of token ids"):
        TokenIds(ids, tokenizer)


def test_an_empty_file_of_ids_is_refused(ids: Path, tokenizer: Tokenizer) -> None:
    header = json.loads(ids.with_suffix(".json").read_text())
    ids.with_suffix(".json").write_text(json.dumps({**header, "tokens": 0}))
    ids.write_bytes(b"")
    with pytest.raises(ValueError, match=r"ids.bin: expected at least one id, got none"):
        TokenIds(ids, tokenizer)
