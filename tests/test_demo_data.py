"""What ships for `prunelm demo`: whole, of the promised size, and apart from training."""

import csv
import gzip
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

import prunelm
from prunelm.training.checkpoint import load_model

soundfile = pytest.importorskip("soundfile")

DEMO = Path(prunelm.__file__).parent / "demo"
ROOT = DEMO.parents[1]
SPLITS = ("valid", "test")


def manifest(split: str) -> list[dict[str, str]]:
    with (DEMO / f"{split}.tsv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def sentences(split: str) -> list[str]:
    return (DEMO / f"{split}.txt").read_text(encoding="utf-8").splitlines()


def test_size_of_the_package_data() -> None:
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 25_000_000


def test_test_speech_has_enough_words() -> None:
    assert sum(len(row["text"].split()) for row in manifest("test")) >= 1500


@pytest.mark.parametrize("split", SPLITS)
def test_manifest_reads_the_sentences_in_order(split: str) -> None:
    rows = manifest(split)
    assert [row["text"] for row in rows] == sentences(split)
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["path"] for row in rows} == {
        path.relative_to(DEMO).as_posix() for path in (DEMO / split).iterdir()
    }


@pytest.mark.parametrize("split", SPLITS)
def test_audio_is_whole_and_level(split: str) -> None:
    for row in manifest(split):
        audio, rate = soundfile.read(DEMO / row["path"], dtype="float32")
        assert rate == 16000 and audio.ndim == 1
        assert abs(len(audio) / rate - float(row["seconds"])) <= 0.001
        assert 8 <= len(row["text"]) / float(row["seconds"]) <= 25  # characters a second
        assert 0.2 <= np.abs(audio).max() <= 0.99
        assert np.sqrt(np.mean(audio**2)) >= 0.02


def test_sentences_are_distinct_and_plain() -> None:
    lines = sentences("test") + sentences("valid")
    assert len(set(lines)) == len(lines)
    assert all(re.fullmatch(r"[a-z']+( [a-z']+){3,11}", line) for line in lines)


def test_voices_of_the_splits_are_disjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ROOT / "recipes" / "demo"
    if not recipe.is_dir():
        pytest.skip("installed without the recipes")
    monkeypatch.syspath_prepend(str(recipe))
    made = importlib.import_module("make_speech")
    train = {voice.speaker for voice, _ in made.TRAIN}
    assert len(train) == len(made.TRAIN) and sum(share for _, share in made.TRAIN) == pytest.approx(
        1
    )
    valid, test = ({row["speaker"] for row in manifest(split)} for split in SPLITS)
    assert valid == {voice.speaker for voice in made.VALID}
    assert test == {voice.speaker for voice in made.TEST}
    assert len(test) >= 4 and not train & valid and not (train | valid) & test


def test_models_share_the_vocabulary_and_are_stored_small() -> None:
    lm, tokenizer, _ = load_model(DEMO / "lm", kind="lm")
    recogniser, _, _ = load_model(DEMO / "recogniser", kind="transducer", tokenizer=tokenizer)
    for model, name in ((lm, "lm"), (recogniser, "recogniser")):
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count <= 3_000_000
        assert (DEMO / name / "model.safetensors").stat().st_size <= 2.1 * count


def test_recovery_text_is_plain_and_apart_from_the_sentences() -> None:
    with gzip.open(DEMO / "recovery.txt.gz", "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    assert len(lines) >= 5000
    assert all(re.fullmatch(r"[a-z']+( [a-z']+)*", line) for line in lines)
    assert not set(lines) & {*sentences("test"), *sentences("valid")}


def test_origins_are_named() -> None:
    notice = ROOT / "NOTICE"
    if not notice.is_file():
        pytest.skip("installed without NOTICE beside the package")
    text = notice.read_text(encoding="utf-8")
    for name in ("awb", "en-us+f5", "joe-medium", "en+f2", "ked", "SLURP", "CLINC150", "SNIPS"):
        assert name in text
