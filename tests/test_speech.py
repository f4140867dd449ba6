"""Corpora in their public layouts, audio files, batches; and one clear line for what is wrong."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import soundfile
import torch

from prunelm.data.speech import (
    Utterance,
    hold_out_speakers,
    load_corpus,
    read_audio,
)
from prunelm.data.speech_batches import Augmentation, FeatureCache, SpeechBatches, length_seconds
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
        (
            "an4",
            "train",
            "an4: expected a file, got .*/etc/an4_train.fileids, which does not exist",
        ),
        ("ljspeech", "all", "ljspeech: expected a file, got .*/metadata.csv"),
        ("manifest", "dev", "manifest: expected a file, got .*/dev.tsv"),
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


def test_a_recording_too_short_for_a_frame_is_named(tmp_path: Path) -> None:
    record(tmp_path / "short.wav", 0.001)
    with pytest.raises(ValueError, match=r"short.wav: audio: expected at least one 10 ms frame"):
        FeatureCache(LogMel())(Utterance("a", tmp_path / "short.wav", "a"))


WITHOUT = [
    pytest.param("librispeech", "dev", librispeech, "*/*/*/*.trans.txt", id="librispeech"),
    pytest.param("an4", "dev", an4, "etc/*.transcription", id="an4"),
    pytest.param("ljspeech", "all", ljspeech, "metadata.csv", id="ljspeech"),
]


@pytest.mark.parametrize(("kind", "split", "make", "pattern"), WITHOUT)
def test_recordings_without_transcripts_are_found(
    tmp_path: Path, kind: str, split: str, make: Callable[[Path], None], pattern: str
) -> None:
    make(tmp_path)
    before = load_corpus(kind, tmp_path, split, "optional")
    assert before == load_corpus(kind, tmp_path, split)
    for path in tmp_path.glob(pattern):
        path.unlink()
    found = load_corpus(kind, tmp_path, split, "optional")
    assert [(each.id, each.audio_path) for each in found] == [
        (each.id, each.audio_path) for each in before
    ]
    assert [each.speaker for each in found] == [each.speaker for each in before]
    assert [each.transcript for each in found] == [None, None]
    with pytest.raises(ValueError, match=f"{found[0].id}: expected a transcript, got none"):
        _ = found[0].text
    for transcripts in ("required", "allow_empty"):
        with pytest.raises(FileNotFoundError, match=f"{kind}: expected "):
            load_corpus(kind, tmp_path, split, transcripts)


def test_recordings_that_a_list_leaves_out_come_without_transcript(tmp_path: Path) -> None:
    librispeech(tmp_path)
    record(tmp_path / "dev" / "19" / "198" / "19-198-0009.flac")
    found = load_corpus("librispeech", tmp_path, "dev", "optional")
    assert [(each.id, each.transcript) for each in found] == [
        ("19-198-0000", "northanger abbey"),
        ("19-198-0009", None),
        ("26-198-0001", "it's so"),
    ]
    assert len(load_corpus("librispeech", tmp_path, "dev")) == 2


def silent_librispeech(folder: Path) -> None:
    librispeech(folder)
    write(folder / "dev" / "19" / "198" / "19-198.trans.txt", "19-198-0000")


def silent_an4(folder: Path) -> None:
    an4(folder)
    write(folder / "etc" / "an4_dev.transcription", "<s> </s> (an251-fash-b)", "ENTER (cen8)")


def silent_ljspeech(folder: Path) -> None:
    ljspeech(folder)
    write(folder / "metadata.csv", "LJ001-0001||", "LJ001-0002|Who|Who")


@pytest.mark.parametrize(
    ("kind", "split", "make"),
    [
        pytest.param("librispeech", "dev", silent_librispeech, id="librispeech"),
        pytest.param("an4", "dev", silent_an4, id="an4"),
        pytest.param("ljspeech", "all", silent_ljspeech, id="ljspeech"),
    ],
)
def test_silence_is_a_transcript_where_it_is_allowed(
    tmp_path: Path, kind: str, split: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path)
    found = load_corpus(kind, tmp_path, split, "allow_empty")
    assert found[0].text == "" and found[1].text
    with pytest.raises(ValueError, match=r"expected a transcript for each of 2 .* the first of "):
        load_corpus(kind, tmp_path, split)
    with pytest.raises(ValueError, match=r"transcripts: expected one of required, .* got 'none'"):
        load_corpus(kind, tmp_path, split, "none")  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "split", "make", "expected"), CORPORA)
def test_marks_windows_line_ends_and_blank_lines_change_nothing(
    tmp_path: Path,
    kind: str,
    split: str,
    make: Callable[[Path], None],
    expected: list[tuple[str, str, str]],
) -> None:
    make(tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.suffix not in (".wav", ".flac"):
            text = path.read_text(encoding="utf-8").replace("\n", "\r\n")
            path.write_bytes(b"\xef\xbb\xbf" + text.rstrip().encode() + b"\r\n\r\n \r\n")
    found = load_corpus(kind, tmp_path, split)
    assert [(each.id, each.text, each.speaker) for each in found] == expected


def test_ids_that_come_twice_are_refused_in_every_layout(tmp_path: Path) -> None:
    librispeech(tmp_path)
    write(tmp_path / "dev" / "26" / "198" / "26-198.trans.txt", "26-1 A", "19-198-0000 B")
    with pytest.raises(ValueError, match=r"26-198.trans.txt, line 2: expected a new id, got 19-"):
        load_corpus("librispeech", tmp_path, "dev")
    write(tmp_path / "metadata.csv", "a|A|A", "a|B|B")
    with pytest.raises(ValueError, match=r"metadata.csv, line 2: expected a new id, got a again"):
        load_corpus("ljspeech", tmp_path, "all")
    an4(tmp_path)
    write(tmp_path / "etc" / "an4_dev.fileids", "x/a", "y/a")
    write(tmp_path / "etc" / "an4_dev.transcription", "A (a)", "A (a)")
    with pytest.raises(ValueError, match=r"an4_dev.fileids, line 2: expected a new id, got a"):
        load_corpus("an4", tmp_path, "dev")


def test_whole_speakers_are_held_out() -> None:
    everybody = [Utterance(f"{s}{i}", Path("x"), "a", None, s) for s in "abcde" for i in range(3)]
    rest, held = hold_out_speakers(everybody, 2, seed=3)
    assert len(rest) == 9 and len(held) == 6
    assert not {each.speaker for each in rest} & {each.speaker for each in held}
    assert hold_out_speakers(everybody, 2, seed=3)[1] == held
    assert hold_out_speakers(everybody, 0) == (everybody, [])
    with pytest.raises(ValueError, match="count: expected 0 to 4 speakers, got 5"):
        hold_out_speakers(everybody, 5)
    unknown = [Utterance(name, Path("x"), "a") for name in "ab"]
    with pytest.raises(ValueError, match="a: expected a speaker, to hold out 1, got none"):
        hold_out_speakers(unknown, 1)
    assert hold_out_speakers([], 0) == ([], [])
    with pytest.raises(ValueError, match="count: expected 0 to 0 speakers, got 1"):
        hold_out_speakers([], 1)


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


@pytest.mark.parametrize("seconds", [1.0, 5.0, 48.0, 1e-300])
def test_recordings_longer_than_a_batch_are_neither_cut_nor_lost(
    tokenizer: Tokenizer, seconds: float
) -> None:
    lengths = [60.0, 50.0, 50.0, *[0.5] * 20]
    many = [Utterance(str(i), Path("none.wav"), "a", length) for i, length in enumerate(lengths)]
    batches = SpeechBatches(many, tokenizer, seconds=seconds)
    for epoch in range(3):
        plan = batches.plan(epoch)
        assert sorted(i for group in plan for i, _ in group) == list(range(len(many)))
        for group in plan:
            held = sum(lengths[i] for i, _ in group)
            assert held <= 1.5 * seconds + max(lengths[i] for i, _ in group)


def test_lengths_come_from_the_header_or_name_the_file(tmp_path: Path) -> None:
    record(tmp_path / "a.wav", 0.25)
    assert length_seconds(Utterance("a", tmp_path / "a.wav", "a")) == 0.25
    assert length_seconds(Utterance("a", tmp_path / "none.wav", "a", 7.0)) == 7.0
    with pytest.raises(FileNotFoundError, match=r"audio: expected a file, got .*none.wav"):
        length_seconds(Utterance("a", tmp_path / "none.wav", "a"))
    (tmp_path / "text.wav").write_text("text")
    with pytest.raises(ValueError, match=r"text.wav: expected an audio file, got"):
        length_seconds(Utterance("a", tmp_path / "text.wav", "a"))


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
    silent = Utterance("8", corpus[0].audio_path, None)
    with pytest.raises(ValueError, match="8: expected a transcript, got none"):
        SpeechBatches([silent], tokenizer)
    for seconds in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="seconds: expected a number above 0, got"):
            SpeechBatches(corpus, tokenizer, seconds=seconds)
    with pytest.raises(ValueError, match=r"^speeds: expected 0.1 to 10, got 0.0"):
        Augmentation(speeds=(1.0, 0.0))
