"""Corpora in their public layouts, audio files, batches; and one clear line for what is wrong."""

import logging
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import soundfile
import torch

from prunelm.data import speech
from prunelm.data.speech import (
    Utterance,
    hold_out_speakers,
    load_corpus,
    read_audio,
    read_manifest,
    write_manifest,
)
from prunelm.data.speech_batches import Augmentation, FeatureCache, SpeechBatches
from prunelm.data.tokenizer import Tokenizer
from prunelm.models.features import LogMel


def record(path: Path, seconds: float = 0.3, rate: int = 16000, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = 0.1 * torch.randn(int(seconds * rate), channels)
    soundfile.write(path, audio.numpy(), rate, subtype="PCM_16")


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def librispeech(folder: Path) -> None:
    for speaker, name, text in (("19", "0000", "NORTHANGER ABBEY"), ("26", "0001", "IT'S SO")):
        chapter = folder / "dev" / speaker / "198"
        write(chapter / f"{speaker}-198.trans.txt", f"{speaker}-198-{name} {text}")
        record(chapter / f"{speaker}-198-{name}.flac")


def an4(folder: Path) -> None:
    write(folder / "etc" / "an4_dev.fileids", "an4_clstk/fash/an251-fash-b", "an4test/mjwl/cen8")
    write(
        folder / "etc" / "an4_dev.transcription",
        "<s> YES </s> (an251-fash-b)",
        "ENTER  <sil> G ++NOISE++ TWO (cen8)",
    )
    record(folder / "wav" / "an4_clstk" / "fash" / "an251-fash-b.wav")
    record(folder / "wav" / "an4test" / "mjwl" / "cen8.sph".replace("sph", "flac"))


def ljspeech(folder: Path) -> None:
    write(
        folder / "metadata.csv",
        'LJ001-0001|Printed in 1455, "well"|Printed in fourteen fifty-five, "well"',
        "LJ001-0002|Dr. Who|Dr. Who",
    )
    record(folder / "wavs" / "LJ001-0001.wav")
    record(folder / "wavs" / "LJ001-0002.wav")


def manifest(folder: Path) -> None:
    write(
        folder / "dev.tsv",
        "id\tpath\tseconds\tspeaker\ttext",
        "a\tx/a.wav\t0.300\tjoe\tenter  two",
        'b\tx/b.wav\t\t\tsay "go"',
    )
    record(folder / "x" / "a.wav")
    record(folder / "x" / "b.wav")


CORPORA = [
    pytest.param(
        "librispeech",
        "dev",
        librispeech,
        [("19-198-0000", "northanger abbey", "19"), ("26-198-0001", "it's so", "26")],
        id="librispeech",
    ),
    pytest.param(
        "an4",
        "dev",
        an4,
        [("an251-fash-b", "yes", "fash"), ("cen8", "enter g two", "mjwl")],
        id="an4",
    ),
    pytest.param(
        "ljspeech",
        "all",
        ljspeech,
        [
            ("LJ001-0001", "printed in fourteen fifty five well", "ljspeech"),
            ("LJ001-0002", "doctor who", "ljspeech"),
        ],
        id="ljspeech",
    ),
    pytest.param(
        "manifest", "dev", manifest, [("a", "enter two", "joe"), ("b", 'say "go"', "")], id="tsv"
    ),
]


@pytest.mark.parametrize(("kind", "split", "make", "expected"), CORPORA)
def test_corpora_are_read_in_their_own_layouts(
    tmp_path: Path,
    kind: str,
    split: str,
    make: Callable[[Path], None],
    expected: list[tuple[str, str, str]],
) -> None:
    make(tmp_path)
    found = load_corpus(kind, tmp_path, split)
    assert [(each.id, each.text, each.speaker) for each in found] == expected
    assert all(len(read_audio(each.audio_path)) == 4800 for each in found)
    found[0].audio_path.unlink()
    with pytest.raises(FileNotFoundError, match="expected 2 recordings, got 1 missing, the first"):
        load_corpus(kind, tmp_path, split)


@pytest.mark.parametrize(
    ("kind", "split", "message"),
    [
        ("librispeech", "dev", r"librispeech: expected .*/dev/<speaker>/<chapter>/\*.trans.txt, "),
        ("an4", "train", "an4: expected .*/etc/an4_train.fileids, got no such file"),
        ("ljspeech", "all", "ljspeech: expected .*/metadata.csv, got no such file"),
        ("manifest", "dev", "manifest: expected .*/dev.tsv, got no such file"),
    ],
)
def test_a_folder_without_the_corpus_is_named(
    tmp_path: Path, kind: str, split: str, message: str
) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        load_corpus(kind, tmp_path, split)
    with pytest.raises(FileNotFoundError, match=r"expected a folder, got .*nowhere"):
        load_corpus(kind, tmp_path / "nowhere", split)
    with pytest.raises(ValueError, match=r"kind: expected one of librispeech, an4, .* got 'timit'"):
        load_corpus("timit", tmp_path, split)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["id\tpath"], "expected the columns id, path and text, got no rows"),
        (["id\tpath", "a\tb"], "expected the columns id, path and text, got id, path"),
        (["id\tpath\ttext", "a\tb"], "dev.tsv, line 2: expected 3 columns, got fewer"),
        (["id\tpath\ttext", "a\tb\tc", "a\tb\tc"], "line 3: expected a new id, got a again"),
        (
            ["id\tpath\ttext\tseconds", "a\tb\tc\tlong"],
            "line 2: expected seconds as a number, got 'long'",
        ),
        (
            ["id\tpath\ttext", "a\tb\tc", "d\te\t "],
            "expected a transcript for each of 2 utterances, got 1 empty, the first of d",
        ),
    ],
    ids=["empty", "columns", "short", "twice", "seconds", "transcript"],
)
def test_bad_manifests_are_refused_in_one_line(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    write(tmp_path / "dev.tsv", *lines)
    with pytest.raises(ValueError, match=message) as caught:
        load_corpus("manifest", tmp_path, "dev")
    assert "\n" not in str(caught.value)


def test_a_transcription_that_does_not_fit_its_list_is_refused(tmp_path: Path) -> None:
    an4(tmp_path)
    transcripts = tmp_path / "etc" / "an4_dev.transcription"
    write(transcripts, "YES (an251-fash-b)", "NO (cen9)")
    with pytest.raises(ValueError, match=r"line 2: expected \(cen8\), got \(cen9\)"):
        load_corpus("an4", tmp_path, "dev")
    write(transcripts, "YES (an251-fash-b)")
    with pytest.raises(ValueError, match=r"expected 2 lines, as in an4_dev.fileids, got 1"):
        load_corpus("an4", tmp_path, "dev")


def test_ljspeech_lines_and_splits(tmp_path: Path) -> None:
    write(tmp_path / "metadata.csv", "LJ001-0001|Only this")
    with pytest.raises(ValueError, match=r"line 1: expected id\|text\|normalised text, got LJ001"):
        load_corpus("ljspeech", tmp_path, "all")
    with pytest.raises(ValueError, match=r"split: expected all, .* got 'train'"):
        load_corpus("ljspeech", tmp_path, "train")


def test_manifests_are_written_as_they_are_read(tmp_path: Path) -> None:
    manifest(tmp_path)
    before = read_manifest(tmp_path / "dev.tsv")
    write_manifest(tmp_path / "other" / "copy.tsv", before)
    assert read_manifest(tmp_path / "other" / "copy.tsv") == before


def test_audio_at_another_rate_is_resampled_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    speech._said().clear()
    for name in ("a.wav", "b.wav"):
        record(tmp_path / name, 0.5, 22050)
    with caplog.at_level(logging.WARNING):
        found = [read_audio(tmp_path / name) for name in ("a.wav", "b.wav")]
    assert [len(each) for each in found] == [8000, 8000]
    assert [each.getMessage() for each in caplog.records] == [
        f"audio in {tmp_path}: expected 16000 Hz, got 22050 Hz; resampling"
    ]


def test_bad_audio_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no audio")
    record(tmp_path / "stereo.wav", channels=2)
    record(tmp_path / "nothing.wav", 0.0)
    for name, message in (
        ("text.wav", "text.wav: expected an audio file, got "),
        ("stereo.wav", "stereo.wav: expected one channel, got 2"),
        ("nothing.wav", "nothing.wav: expected samples, got none"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            read_audio(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"audio: expected a file, got .*none.wav"):
        read_audio(tmp_path / "none.wav")
    record(tmp_path / "short.wav", 0.001)
    with pytest.raises(ValueError, match=r"short.wav: audio: expected at least one 10 ms frame"):
        FeatureCache(LogMel())(Utterance("a", tmp_path / "short.wav", "a"))


def test_whole_speakers_are_held_out() -> None:
    everybody = [Utterance(f"{s}{i}", Path("x"), "a", None, s) for s in "abcde" for i in range(3)]
    rest, held = hold_out_speakers(everybody, 2, seed=3)
    assert len(rest) == 9 and len(held) == 6
    assert not {each.speaker for each in rest} & {each.speaker for each in held}
    assert hold_out_speakers(everybody, 2, seed=3)[1] == held
    assert hold_out_speakers(everybody, 0) == (everybody, [])
    with pytest.raises(ValueError, match="count: expected 0 to 4 speakers, got 5"):
        hold_out_speakers(everybody, 5)


@pytest.fixture
def corpus(tmp_path: Path) -> list[Utterance]:
    utterances = []
    for i, seconds in enumerate([0.2, 0.9, 0.4, 0.3, 1.1, 0.25, 0.6, 0.5, 0.7]):
        record(tmp_path / f"{i}.wav", seconds)
        utterances.append(Utterance(str(i), tmp_path / f"{i}.wav", "abc"[: i % 3 + 1]))
    return utterances


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["abc cab"], 20, "char")


def test_every_epoch_has_every_utterance_once(
    corpus: list[Utterance], tokenizer: Tokenizer
) -> None:
    batches = SpeechBatches(corpus, tokenizer, seconds=1.5, augmentation=Augmentation())
    assert batches.count == 3
    plans = [batches.plan(epoch) for epoch in range(4)]
    for plan in plans:
        assert len(plan) == 3 and all(plan)
        assert sorted(i for group in plan for i, _ in group) == list(range(9))
        assert {speed for group in plan for _, speed in group} <= set(Augmentation().speeds)
        ends = sorted(
            (min(batches.seconds[i] for i, _ in group), max(batches.seconds[i] for i, _ in group))
            for group in plan
        )
        # Neighbours in length lie together, up to the noise and the speeds.
        assert all(later[0] >= earlier[1] - 0.8 for earlier, later in pairwise(ends))
    assert plans[0] != plans[1]
    longest = [max(batches.seconds[i] / speed for i, speed in group) for group in plans[0]]
    assert longest[0] < longest[1] < longest[2], "the first epoch goes from short to long"


def test_the_first_batches_go_from_short_to_long(tokenizer: Tokenizer) -> None:
    many = [Utterance(str(i), Path("none.wav"), "a", float(1 + i)) for i in range(40)]
    batches = SpeechBatches(many, tokenizer, seconds=41.0, short_first=7)
    first, second = (
        [max(batches.seconds[i] for i, _ in g) for g in batches.plan(e)] for e in (0, 1)
    )
    assert len(first) == 20 and max(first) == 40
    # They are drawn from short and long alike, and the rest is shuffled.
    assert first[:7] == sorted(first[:7]) and max(first[:7]) > min(first[7:])
    assert first[7:] != sorted(first[7:]) and second[:7] != sorted(second[:7])


def test_augmentation_begins_when_it_is_told(corpus: list[Utterance], tokenizer: Tokenizer) -> None:
    augmentation = Augmentation(speeds=(1.0,), begin=2)
    late = SpeechBatches(corpus, tokenizer, seconds=1.5, augmentation=augmentation)
    plain = SpeechBatches(corpus, tokenizer, seconds=1.5)
    for step in range(4):
        same = torch.equal(late(step).features, plain(step).features)
        assert same == (step < 2) and late(step).number == step


def test_a_batch_is_a_function_of_seed_and_step(
    corpus: list[Utterance], tokenizer: Tokenizer
) -> None:
    def make(seed: int, **more: int) -> SpeechBatches:
        return SpeechBatches(
            corpus, tokenizer, seconds=1.5, augmentation=Augmentation(), seed=seed, **more
        )

    first, second, other = make(1), make(1), make(2)
    later = [first(step) for step in range(7)]
    again = second(6)
    assert torch.equal(later[6].features, again.features)
    assert torch.equal(later[6].targets, again.targets)
    assert not torch.equal(later[6].features, other(6).features)
    parts = [make(1, rank=rank, world=2) for rank in (0, 1)]
    for step in range(3):
        for rank in (0, 1):
            assert torch.equal(parts[rank](step).features, later[2 * step + rank].features)


def test_batches_hold_the_features_and_tokens_of_their_members(
    corpus: list[Utterance], tokenizer: Tokenizer
) -> None:
    batches = SpeechBatches(corpus, tokenizer, seconds=1.5)
    log_mel = LogMel()
    for step in range(batches.count):
        batch, members = batches(step), batches.plan(0)[step]
        assert batch.features.shape[1] == int(batch.lengths.max())
        for row, (i, speed) in enumerate(members):
            assert speed == 1.0
            expected = log_mel(read_audio(corpus[i].audio_path))
            length, tokens = int(batch.lengths[row]), int(batch.target_lengths[row])
            assert length == len(expected) == math.floor(batches.seconds[i] * 100 + 0.5)
            assert float((batch.features[row, :length] - expected).abs().max()) <= 4e-3  # float16
            assert bool((batch.features[row, length:] == 0).all())
            assert batch.targets[row, :tokens].tolist() == tokenizer.encode(corpus[i].text)


def test_what_batches_refuse(corpus: list[Utterance], tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="utterances: expected at least one, got none"):
        SpeechBatches([], tokenizer)
    strange = Utterance("7", corpus[0].audio_path, "abx z")
    with pytest.raises(
        ValueError, match=r"7: expected a transcript within .* got 'x z' in 'abx z'"
    ):
        SpeechBatches([strange], tokenizer)
    with pytest.raises(ValueError, match=r"speeds: expected numbers above 0, got \[0.0\]"):
        Augmentation(speeds=(0.0,))
