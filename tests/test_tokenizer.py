from pathlib import Path

import pytest

import prunelm
from prunelm.data.files import replace_file
from prunelm.data.lines import read_lines
from prunelm.data.tokenizer import Tokenizer

LINES = ["it's a quick brown fox", "jumps over the lazy dog", "zero o'clock, the end"] * 20


@pytest.fixture(scope="module")
def characters() -> Tokenizer:
    return Tokenizer.train(LINES, 1000, "char")


@pytest.fixture(scope="module")
def units() -> Tokenizer:
    return Tokenizer.train(LINES, 36, "unigram")


def test_characters_are_what_training_saw(characters: Tokenizer) -> None:
    seen = {c for line in LINES for c in line if c != " "}
    pieces = [characters.piece(i) for i in range(characters.vocab_size)]
    assert pieces[:2] == ["<s>", "<unk>"]
    assert set(pieces[2:]) == seen | {"▁"}
    assert len(pieces) == len(seen) + 3


def test_unigram_has_the_size_asked(units: Tokenizer) -> None:
    assert units.vocab_size == 36


@pytest.mark.parametrize("kind", ["characters", "units"])
def test_lines_come_back(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    for line in [*LINES[:3], "the fox", ""]:
        ids = tokenizer.encode(line)
        assert tokenizer.decode(ids) == line
        assert all(2 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode("") == []
    assert tokenizer.encode_lines(LINES[:4], 2) == [tokenizer.encode(line) for line in LINES[:4]]


def test_unknown_characters_and_boundaries_are_no_text(characters: Tokenizer) -> None:
    ids = characters.encode("fox 5 <s>")
    assert ids.count(1) == 3
    assert 0 not in ids
    assert characters.decode([0, *characters.encode("fox"), 0]) == "fox"


def test_ids_out_of_vocabulary_are_refused(characters: Tokenizer) -> None:
    size = characters.vocab_size
    with pytest.raises(ValueError, match=f"ids: expected 0 to {size - 1}, got {size}"):
        characters.decode([2, size])
    with pytest.raises(ValueError, match=f"ids: expected 0 to {size - 1}, got -1"):
        characters.decode([-1])


def test_equal_lines_give_equal_tokenizers(characters: Tokenizer, units: Tokenizer) -> None:
    assert Tokenizer.train(iter(LINES), 36, "unigram").fingerprint == units.fingerprint
    assert units.fingerprint != characters.fingerprint
    assert len(units.fingerprint) == 16


def test_saved_tokenizers_are_the_same(units: Tokenizer, tmp_path: Path) -> None:
    units.save(tmp_path / "new" / "tokenizer.model")
    again = Tokenizer.load(tmp_path / "new" / "tokenizer.model")
    assert again.fingerprint == units.fingerprint
    assert again.encode(LINES[0]) == units.encode(LINES[0])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokenizer.model"]


def test_files_that_are_no_tokenizer_are_refused(units: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer: expected a file, got .*/none"):
        Tokenizer.load(tmp_path / "none")
    for size in (0, 11, 300):
        path = tmp_path / f"cut{size}"
        path.write_bytes(units.model[:size])
        message = f"expected a sentencepiece model, got {size} bytes of something else .*cut{size}"
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(path)


def test_models_with_other_first_ids_are_refused() -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=36, minloglevel=2
    )
    with pytest.raises(ValueError, match=r"ids 0 <s> and 1 <unk>, got \['<unk>', '<s>'\]"):
        Tokenizer(model.getvalue())


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size: sentencepiece refuses 5000: .*too high"):
        Tokenizer.train(LINES, 5000)
    for kind in ("char", "unigram"):
        with pytest.raises(ValueError, match="vocab_size: expected at least 31, got 30"):
            Tokenizer.train(LINES, 30, kind)
    with pytest.raises(ValueError, match="lines: expected at least one line that is not empty"):
        Tokenizer.train(["", "  "], 10)
    with pytest.raises(ValueError, match="kind: expected char or unigram, got 'bpe'"):
        Tokenizer.train(LINES, 10, "bpe")  # type: ignore[arg-type]


def test_another_vocabulary_is_named(characters: Tokenizer, units: Tokenizer) -> None:
    units.check(units.fingerprint, "lm")
    message = f"lm: expected the vocabulary {units.fingerprint} .*, got {characters.fingerprint}"
    with pytest.raises(ValueError, match=message):
        units.check(characters.fingerprint, "lm")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), replace_file(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["characters", "units"])
def test_white_space_of_any_kind_is_a_space(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    plain = tokenizer.encode("the lazy dog")
    for space in ("\t", "\u00a0", "\u2003", "\u3000", "\u2028", "\x85", "\x0b", "\r\n", " \t "):
        assert tokenizer.encode(f"the{space}lazy{space}dog{space}") == plain
        assert tokenizer.encode_lines([f"{space}the lazy{space}dog"]) == [plain]
    trained = Tokenizer.train(["a\tb\u00a0c"], 20, "char")
    assert trained.fingerprint == Tokenizer.train(["a b c"], 20, "char").fingerprint


def test_half_a_surrogate_pair_is_refused(characters: Tokenizer) -> None:
    message = "lines: expected Unicode text, got half of a surrogate pair in line "
    with pytest.raises(ValueError, match=message + r"1, 'a\\\\udcff'"):
        characters.encode("a\udcff")
    with pytest.raises(ValueError, match=message + "2"):
        characters.encode_lines(["a", "\ud800"])
    with pytest.raises(ValueError, match=message + "2"):
        Tokenizer.train(["a", "\ud800"], 10)


def test_clean_text_has_the_ids_that_sentencepiece_gives() -> None:
    import sentencepiece

    demo = Path(prunelm.__file__).parent / "demo"
    tokenizer = Tokenizer.load(demo / "lm" / "tokenizer.model")
    plain = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    lines = [*read_lines(demo / "test.txt"), "  two  spaces ", "Capitals, too", "caf\u00e9"]
    assert [tokenizer.encode(line) for line in lines] == [plain.EncodeAsIds(x) for x in lines]
    assert tokenizer.encode_lines(lines, 2) == [plain.EncodeAsIds(x) for x in lines]


def test_a_line_without_end_trains_as_its_parts_do() -> None:
    words = [f"word{i % 97}" for i in range(100_000)]
    parts = [" ".join(words[i : i + 50]) for i in range(0, len(words), 50)]
    for kind in ("char", "unigram"):
        tokenizer = Tokenizer.train([" ".join(words)], 22, kind)
        assert tokenizer.decode(tokenizer.encode(parts[7])) == parts[7]
