"""A grid measures every cell once, goes on where it stopped, and the demo is such a grid."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from speech_bed import LINES, write_bed

from prunelm.cli import main
from prunelm.data.text import read_lines
from prunelm.data.tokenizer import Tokenizer
from prunelm.metrics.perplexity import perplexity
from prunelm.models.lm import LMConfig, TransformerLM
from prunelm.pruning import Elements, Finetune, Heads, LowRank, Magnitude, Neurons, Random
from prunelm.pruning.schedulers import Incremental, OneShot
from prunelm.study import testbed
from prunelm.study.demo import demo_grid, run_study, study_grid
from prunelm.study.grid import Grid, Measuring, read_transcripts, run_grid
from prunelm.study.results import DENSE, NO_LM, read_results
from prunelm.training.checkpoint import load_model, save_model

QUICK = Measuring(runs=1, rows=4, context=4, batch=4, length=16)


class Heard:
    """Keeps what a grid says, and presses Ctrl-C after `stop` lines."""

    def __init__(self, stop: int = 0) -> None:
        self.stop = stop
        self.said: list[str] = []
        self.under_way: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)
        if len(self.said) == self.stop:
            raise KeyboardInterrupt

    def doing(self, text: str) -> None:
        self.under_way.append(text)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out like prunelm/demo, with untrained models and noise for speech."""
    folder = tmp_path_factory.mktemp("bed")
    write_bed(folder)
    return folder


@pytest.fixture(scope="module")
def demo_folder(bed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a quick demo leaves that was stopped once and gone on with."""
    out = tmp_path_factory.mktemp("demo")
    grid = demo_grid(("80%", "70%", "60%"), steps=2)
    first, second = Heard(stop=7), Heard()
    with pytest.raises(KeyboardInterrupt):
        run_study(out, grid, data=bed_folder, progress=first, title="quick", measuring=QUICK)
    run_study(out, grid, data=bed_folder, progress=second, title="quick", measuring=QUICK)
    for said, search in zip(first.said[:2], ("beam 4, no LM, ", "beam 4, LM weight "), strict=True):
        assert said.startswith(search) and "chosen on 2 validation utterances" in said
    assert "all in" in second.said[-1]
    assert any("pruning to 80%, 70%, 60%" in text for text in first.under_way)
    rows = [text for text in first.said + second.said if text.startswith("[")]
    assert [row.split("]")[0] for row in rows] == [f"[{i}/11" for i in range(1, 12)]
    return out


def test_demo_has_a_row_for_each_model(demo_folder: Path, bed_folder: Path) -> None:
    results = read_results(demo_folder)
    assert [row.series for row in results.rows[:2]] == [NO_LM, DENSE]
    assert [row.target for row in results.rows[2:]] == ["80%", "70%", "60%"] * 3
    dense = results.rows[1]
    lm, tokenizer, _ = load_model(bed_folder / "lm")
    assert dense.parameters == sum(p.numel() for p in lm.parameters())
    expected = perplexity(lm, read_lines(bed_folder / "test.txt"), tokenizer).per_word
    assert dense.perplexity == pytest.approx(expected)
    for row in results.rows[2:]:
        share = int(row.target[:-1]) / 100
        assert 0.9 * share * dense.parameters < row.parameters <= share * dense.parameters
        assert row.flops < dense.flops and row.latency_ms > 0 and row.dense_latency_ms > 0
        assert row.wer_low <= row.wer <= row.wer_high and row.words == results.rows[0].words
        assert 0 <= row.better <= 1 and set(row.seconds) == {"prune", "measure", "decode"}
        assert "Finetune(steps=2" in row.settings["recovery"]


def test_models_lie_beside_their_rows(demo_folder: Path, bed_folder: Path) -> None:
    rows = {row.name: row for row in read_results(demo_folder).rows}
    model, tokenizer, _ = load_model(demo_folder / "models" / "lowrank-60pc-seed0")
    expected = perplexity(model, read_lines(bed_folder / "test.txt"), tokenizer).per_word
    assert rows["LowRank, 60%"].perplexity == pytest.approx(expected)
    heard = read_transcripts(demo_folder / "transcripts" / "lowrank-60pc-seed0.tsv")
    assert sorted(heard) == [f"test-{i}" for i in range(5)]
    assert not (demo_folder / ".prunelm-work").exists()
    assert (demo_folder / "report.html").stat().st_size > 10_000


def test_finished_cells_are_skipped(demo_folder: Path, bed_folder: Path) -> None:
    cells = sorted((demo_folder / "cells").iterdir())
    before = {path: path.stat().st_mtime_ns for path in cells}
    lost = next(path for path in cells if "lowrank-70" in path.name)
    old = json.loads(lost.read_text())
    lost.unlink()
    heard = Heard()
    grid = demo_grid(("80%", "70%", "60%"), steps=2)
    run_study(demo_folder, grid, data=bed_folder, progress=heard, title="quick", measuring=QUICK)
    told = [text for text in heard.said if text.startswith("[")]
    assert len(told) == 1 and "LowRank, 70%" in told[0] and "[11/11]" in told[0]
    new = json.loads(lost.read_text())
    for name in ("parameters", "perplexity", "wer", "flops"):
        assert new[name] == pytest.approx(old[name], rel=1e-5)
    assert all(path.stat().st_mtime_ns == before[path] for path in cells if path != lost)


def test_another_study_is_refused(demo_folder: Path, bed_folder: Path) -> None:
    with pytest.raises(ValueError, match="expected a study with targets '50%', got one with"):
        run_study(
            demo_folder,
            demo_grid(("50%",), steps=2),
            data=bed_folder,
            measuring=QUICK,
            lm_weight=0.3,
        )
    assert len(list((demo_folder / "cells").iterdir())) == 11


def test_utterances_in_which_nobody_speaks_are_tried_too(tmp_path: Path) -> None:
    write_bed(tmp_path)
    for split in ("test", "valid"):
        path = tmp_path / f"{split}.tsv"
        rows = path.read_text().splitlines()
        rows[1] = rows[1].rpartition("\t")[0] + "\t"
        path.write_text("\n".join(rows) + "\n")
    bed = testbed.open_testbed(tmp_path)
    assert [bool(each.text) for each in bed.test] == [False, True, True, True, True]
    assert [bool(each.text) for each in bed.valid] == [False, True]


def test_text_alone_and_every_axis(bed_folder: Path, tmp_path: Path) -> None:
    bed = testbed.open_testbed(bed_folder)
    bed = replace(bed, recogniser=None, test=())
    grid = Grid(
        methods={"Neurons": Neurons(), "Heads": Heads()},
        targets=("70%", "20%"),
        criteria=(Magnitude(), Random()),
        schedules=(OneShot(), Incremental(rounds=2)),
        recovery=Finetune(steps=2),
        seeds=(0, 1),
        ladder=False,
    )
    assert grid.size == 32
    heard = Heard()
    run_grid(bed, replace(grid, seeds=(0,)), tmp_path, title="t", measuring=QUICK, progress=heard)
    results = read_results(tmp_path)
    assert {row.series for row in results.rows} == {DENSE} | {
        f"Neurons, {c}, {s}"
        for c in ("Magnitude", "Random")
        for s in ("OneShot", "Incremental(rounds=2)")
    }
    assert all(row.target in ("", "70%") and row.wer is None for row in results.rows)
    left_out = [text for text in heard.said if "left out" in text]
    assert len(left_out) == 12 and all("target: expected at least" in text for text in left_out)


def test_presets() -> None:
    assert study_grid("laptop").size == 36
    paper = study_grid("paper", targets=("5M",), seeds=(3,), steps=7)
    assert paper.size == 12 and paper.recovery.steps == 7
    with pytest.raises(ValueError, match="preset: expected laptop or paper, got 'x'"):
        study_grid("x")
    assert {type(m) for m in study_grid("paper").methods.values()} >= {Elements, LowRank}


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("lm", "model: expected a file"),
        ("recogniser", "model: expected a file"),
        ("test.tsv", "manifest: expected"),
        ("valid.txt", "text: expected a file"),
        ("recovery.txt", "recovery text: expected a file"),
        ("test1.wav", "1 missing, the first"),
    ],
)
def test_a_missing_part_is_named(
    gone: str, said: str, bed_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bed"
    folder.mkdir()
    for path in bed_folder.iterdir():
        if path.name != gone:
            (folder / path.name).symlink_to(path)
    assert main(["demo", "--data", str(folder), "--out", str(tmp_path / "out")]) == 1
    text = capsys.readouterr().err
    assert said in text and text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_vocabulary_is_refused(
    bed_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Tokenizer.train([*LINES, "x y z q"], 28, "char")
    save_model(tmp_path / "lm", TransformerLM(LMConfig.preset("tiny", other.vocab_size)), other)
    words = ["demo", "--data", str(bed_folder), "--lm", str(tmp_path / "lm")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 1
    text = capsys.readouterr().err
    assert other.fingerprint in text and text.count("\n") == 1


def own_bed(bed_folder: Path, folder: Path) -> Path:
    """The test bed in a folder of its own, to change files of."""
    folder.mkdir()
    for path in bed_folder.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


ONE = Grid(
    methods={"Neurons": Neurons()}, targets=("80%", "70%"), criteria=(Magnitude(),),
    recovery=Finetune(steps=1),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("test.txt", "test_text"),
        ("valid.txt", "valid_text"),
        ("recovery.txt", "recovery_text"),
        ("test.tsv", "test_speech"),
        ("valid.tsv", "valid_speech"),
        ("test1.wav", "test_speech"),
        ("valid1.wav", "valid_speech"),
    ],
)
def test_a_study_of_other_data_is_refused_by_name(
    bed_folder: Path, demo_folder: Path, tmp_path: Path, name: str, fact: str
) -> None:
    """As many sentences and words as before, or recordings of another length."""
    bed = own_bed(bed_folder, tmp_path / "bed")
    (bed / name).unlink()
    if name.endswith(".wav"):
        soundfile.write(bed / name, np.zeros(3000), 16000)
    else:
        text = (bed_folder / name).read_text()
        (bed / name).write_text(text.replace("the", "het"))
    grid, heard = demo_grid(("80%", "70%", "60%"), steps=2), Heard()
    with pytest.raises(ValueError, match=f"expected a study with {fact} '.*', got one with '"):
        run_study(demo_folder, grid, data=bed, title="quick", measuring=QUICK, progress=heard)
    assert not heard.said and not heard.under_way, "refused before any work"
    assert len(list((demo_folder / "cells").iterdir())) == 11


def test_a_study_leaves_the_files_of_the_user(bed_folder: Path, tmp_path: Path) -> None:
    bed = replace(testbed.open_testbed(bed_folder), recogniser=None, test=())
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    run_grid(bed, ONE, tmp_path, title="t", measuring=QUICK, progress=Heard())
    assert (tmp_path / "work" / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cells", "models", "study.json", "work"
    ]  # fmt: skip
    other = tmp_path / "other"
    other.mkdir()
    (other / "report.html").write_text("mine")
    with pytest.raises(ValueError, match=r"expected a folder without report.html, or an earlier"):
        run_grid(bed, ONE, other, title="t", measuring=QUICK, progress=Heard())
    assert [path.name for path in other.iterdir()] == ["report.html"]


def test_a_measured_size_stands_when_the_next_one_fails(
    bed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunelm.training import loop

    bed = replace(testbed.open_testbed(bed_folder), recogniser=None, test=())
    original, calls = loop._Run.one_step, []

    def step(run: loop._Run, batches: object) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("loss: expected a finite number")
        return original(run, batches)

    monkeypatch.setattr(loop._Run, "one_step", step)
    with pytest.raises(ValueError, match=r"number \(stopped at the target 70%; 80% finished befo"):
        run_grid(bed, ONE, tmp_path, title="t", measuring=QUICK, progress=Heard())
    assert [row.target for row in read_results(tmp_path).rows] == ["", "80%"]
    run_grid(bed, ONE, tmp_path, title="t", measuring=QUICK, progress=Heard())
    assert [row.target for row in read_results(tmp_path).rows] == ["", "80%", "70%"]


def test_one_process_studies_in_a_folder(bed_folder: Path, tmp_path: Path) -> None:
    import threading

    bed = replace(testbed.open_testbed(bed_folder), recogniser=None, test=())
    caught: list[str] = []

    class Intruding(Heard):
        def say(self, text: str) -> None:
            super().say(text)
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()

    def intrude() -> None:
        try:
            run_grid(bed, ONE, tmp_path, title="t", measuring=QUICK, progress=Heard())
        except ValueError as error:
            caught.append(str(error))

    run_grid(bed, ONE, tmp_path, title="t", measuring=QUICK, progress=Intruding())
    assert len(caught) == 3 and all("no other process works in" in each for each in caught)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": ()}, "targets: expected falling sizes, got none"),
        ({"targets": ("50%", "50%")}, "targets: expected falling sizes, got 50%, 50%"),
        ({"targets": ("40%", "50%")}, "targets: expected falling sizes, got 40%, 50%"),
        ({"targets": ("0%",)}, "target: expected 1 to "),
        (
            {"targets": ("50%", "50%"), "ladder": False},
            "each once, got Neurons, 50%, seed 0",
        ),
        ({"seeds": (1, 1)}, "expected each once, got Neurons, 80%, seed 1 twice"),
    ],
)
def test_sizes_and_seeds_without_sense_are_refused_before_any_work(
    bed_folder: Path, tmp_path: Path, changes: dict[str, tuple[str, ...]], said: str
) -> None:
    heard, out = Heard(), tmp_path / "out"
    with pytest.raises(ValueError, match=said):
        run_study(out, replace(ONE, **changes), data=bed_folder, progress=heard, measuring=QUICK)
    assert not out.exists() and not heard.said and not heard.under_way


def test_silent_recordings_and_unknown_characters_in_a_bed(
    bed_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "bed"
    folder.mkdir()
    for path in bed_folder.iterdir():
        (folder / path.name).symlink_to(path)
    for name in ("test.tsv", "recovery.txt"):
        (folder / name).unlink()
    rows = (bed_folder / "test.tsv").read_text().splitlines()
    rows[2] = rows[2].rpartition("\t")[0] + "\t"
    (folder / "test.tsv").write_text("\n".join(rows) + "\n")
    (folder / "recovery.txt").write_text("\n".join(line.upper() for line in LINES) + "\n")
    bed = testbed.open_testbed(folder)
    assert [each.text for each in bed.test].count("") == 1
    (record,) = caplog.records
    assert "recovery.txt: 100.0 % of characters are unknown to the tokenizer" in record.message


@pytest.mark.parametrize(("name", "holds"), [("lm", "a model"), (".", "the data")])
def test_a_study_stays_out_of_what_it_reads(
    name: str, holds: str, bed_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(bed_folder.rglob("*"))
    out = str(bed_folder / name)
    assert main(["demo", "--data", str(bed_folder), "--out", out]) == 1
    said = capsys.readouterr().err
    assert "out: expected a folder for the study alone, got" in said
    assert said.endswith(f"with {holds}\n") and sorted(bed_folder.rglob("*")) == before
