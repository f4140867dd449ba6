"""Numbers that make no sense are refused by option, before any work and any folder."""

import re
from pathlib import Path

import pytest
from tiny_commands import LM, PRUNE, SPEECH, words

from prunelm.cli import main

TRAIN_LM = [
    ("layers", "0"), ("layers", "-1"), ("heads", "0"), ("ff", "0"), ("dim", "0"), ("dim", "-8"),
    ("head_dim", "0"), ("head_dim", "3"), ("batch", "0"), ("length", "0"), ("vocab_size", "0"),
    ("dropout", "1.5"), ("dropout", "-0.1"), ("dropout", "nan"), ("threads", "0"),
    ("options__steps", "-1"), ("options__lr", "nan"), ("options__lr", "inf"),
    ("options__lr", "-1"), ("options__warmup", "-1"), ("options__clip", "0"),
    ("options__weight_decay", "nan"), ("options__weight_decay", "-1"),
    ("options__final_lr_fraction", "2"), ("options__accumulate", "0"),
    ("options__average", "1"), ("options__log_every", "-1"), ("options__validate_every", "-1"),
    ("options__checkpoint_every", "-1"), ("options__seed", "9" * 30),
]  # fmt: skip
TRAIN_RECOGNISER = [
    ("layers", "0"), ("dim", "0"), ("heads", "0"), ("heads", "5"), ("heads", "16"), ("ff", "0"),
    ("dropout", "1"), ("seconds", "0"), ("seconds", "nan"), ("seconds", "inf"),
    ("ctc_first", "-1"), ("hold_out", "-1"), ("vocab_size", "0"), ("threads", "-2"),
    ("augmentation__begin", "-1"), ("augmentation__warp", "1"),
    ("augmentation__time_masks", "-1"), ("augmentation__time_share", "2"),
    ("augmentation__bin_masks", "-1"), ("augmentation__bin_width", "-1"),
]  # fmt: skip
PRUNING = [
    ("batch", "0"), ("batch", "-1"), ("length", "0"), ("threads", "0"),
    ("criterion__batches", "0"), ("recovery__steps", "-1"), ("recovery__lr", "nan"),
    ("recovery__lr", "inf"), ("recovery__temperature", "inf"), ("recovery__weight_decay", "-1"),
    ("recovery__last", "nan"), ("recovery__distill", "nan"),
]  # fmt: skip
PLANNING = [("batch", "0"), ("length", "-3"), ("criterion__batches", "0")]
NUMBERS = [
    *(("train lm", LM, *each) for each in TRAIN_LM),
    *(("train recogniser", SPEECH, *each) for each in TRAIN_RECOGNISER),
    *(("prune", PRUNE, *each) for each in PRUNING),
    *(("plan", {n: PRUNE[n] for n in ("model", "target", "text")}, *each) for each in PLANNING),
]


def test_numbers_without_a_meaning_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was done")

    for name in ("texts.text_lines", "training.load_corpus", "training.file_fact",
                 "pruning.file_fact", "pruning.load_pretrained"):  # fmt: skip
        monkeypatch.setattr(f"prunelm.cli.{name}", work)
    for command, options, name, value in NUMBERS:
        capsys.readouterr()
        line = words(command, options, tmp_path / "out", **{name: value})
        line = line[:-2] if command == "plan" else line
        assert main(line) in (1, 2)
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        option = name.replace("__", ".").removeprefix("recovery.").removeprefix("criterion.")
        assert re.match(rf"prunelm: error: (\w+\.)*{re.escape(option)}: expected ", said), said
        assert list(tmp_path.iterdir()) == []
