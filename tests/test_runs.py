"""Folders of runs: whose they are, who holds them, what is removed and what stays."""

import csv
import json
import logging
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from prunelm.data.files import replace_file, replace_files, sweep
from prunelm.data.manifest import Utterance, write_manifest
from prunelm.data.runs import (
    WORK,
    claim,
    file_fact,
    hold,
    named,
    prepared,
    refuse_other_run,
    remove_work,
    work_folder,
)
from prunelm.data.text import write_token_ids
from prunelm.data.tokenizer import Tokenizer
from prunelm.models.lm import LMConfig, TransformerLM
from prunelm.pruning.result import write_masks
from prunelm.study.grid import write_transcripts
from prunelm.study.results import write_json
from prunelm.training.checkpoint import load_state, save_model, save_state, save_weights


def forked(work: Callable[[], None]) -> "multiprocessing.Process":
    """A process that does `work` and then waits to be killed."""
    ready = multiprocessing.get_context("fork").Event()

    def run() -> None:
        work()
        ready.set()
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    assert ready.wait(30)
    return process


def kill(process: "multiprocessing.Process") -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)


def test_a_folder_of_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("a")
    second.write_text("b")
    out = tmp_path / "out"
    claim(out, {"text": file_fact(first), "batch": 4})
    claim(out, {"text": file_fact(first), "batch": 4})
    a, b = file_fact(first)["digest"], file_fact(second)["digest"]
    end = "; choose another folder or remove this one$"
    message = (
        rf"^{out}: expected a run with text digest {b} \(second.txt\), "
        rf"got digest {a} \(first.txt\){end}"
    )
    with pytest.raises(ValueError, match=message):
        claim(out, {"text": file_fact(second), "batch": 4})
    with pytest.raises(ValueError, match=message):
        refuse_other_run(out, {"text": file_fact(second)})
    with pytest.raises(ValueError, match=rf"expected a run with batch 5, got 4{end}"):
        claim(out, {"text": file_fact(first), "batch": 5})
    with pytest.raises(ValueError, match=rf"expected a run with batch none, got 4{end}"):
        claim(out, {"text": file_fact(first)})
    with pytest.raises(ValueError, match=rf"expected a run with init 7, got none{end}"):
        claim(out, {"text": file_fact(first), "batch": 4, "init": 7})
    second.write_text("a")  # equal bytes under another name are the same text
    claim(out, {"text": file_fact(second), "batch": 4})


def test_what_changes_the_last_bits_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    claim(tmp_path, {}, noted={"threads": 1})
    with caplog.at_level(logging.WARNING):
        claim(tmp_path, {}, noted={"threads": 1})
        assert not caplog.records
        claim(tmp_path, {}, noted={"threads": 2})
    assert [each.getMessage() for each in caplog.records] == [
        f"{tmp_path}: began with threads 1, goes on with 2; results may differ in the last bits"
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"facts": {}}', '{"program": "prunelm"'])
def test_a_record_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run.json: expected (JSON|the record of a run), got"):
        claim(tmp_path, {})
    assert (tmp_path / "run.json").read_text() == text


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("mine")
    with pytest.raises(ValueError, match=r"expected a folder without model.json, or an earlier"):
        claim(tmp_path, {}, makes=("log.jsonl", "model.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]
    claim(tmp_path, {}, makes=("log.jsonl",))


def test_functions_and_settings_have_names_without_addresses() -> None:
    assert named(file_fact) == "file_fact"
    assert " at 0x" not in named(lambda: 0) and " at 0x" not in named(object())


def test_one_process_works_in_a_folder(tmp_path: Path) -> None:
    def holding() -> None:
        holder = hold(tmp_path)
        holder.__enter__()
        globals()["_kept"] = holder

    other = forked(holding)
    try:
        with pytest.raises(ValueError, match=f"^{tmp_path}: expected a folder that no other"):
            with hold(tmp_path):
                pass
    finally:
        kill(other)
    with hold(tmp_path):  # a killed process leaves no lock
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_thread_may_hold_again_and_another_may_not(tmp_path: Path) -> None:
    caught: list[str] = []

    def other() -> None:
        try:
            with hold(tmp_path):
                pass
        except ValueError as error:
            caught.append(str(error))

    with hold(tmp_path):
        with hold(tmp_path):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(caught) == 1 and "got one in use" in caught[0]
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(caught) == 1


def test_leftovers_of_killed_processes_go_and_nothing_else(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    theirs = [
        tmp_path / ".0123abcd.model.json", tmp_path / ".prunelm-0123.x",
        tmp_path / ".prunelm-notes", tmp_path / "prunelm-01234567.x", deep / "c.txt",
    ]  # fmt: skip
    for path in theirs:
        path.write_text("mine")
    (tmp_path / ".prunelm-00000000.folder").mkdir()

    def writing(folder: Path) -> None:
        writer = replace_file(folder / "x.bin")
        writer.__enter__().write_bytes(b"half")
        globals()["_writer"] = writer

    dead = [forked(lambda folder=folder: writing(folder)) for folder in (tmp_path, deep)]
    live = forked(lambda: writing(deep))
    before = sorted(tmp_path.rglob(".prunelm-*.x.bin"))
    assert len(before) == 3
    sweep(tmp_path, depth=2)
    assert sorted(tmp_path.rglob(".prunelm-*.x.bin")) == before, "their writers live"
    for process in dead:
        kill(process)
    with hold(tmp_path):
        left = sorted(tmp_path.rglob(".prunelm-*.x.bin"))
    assert len(left) == 1 and left[0].parent == deep
    kill(live)
    with hold(tmp_path):
        assert not list(tmp_path.rglob(".prunelm-*.x.bin"))
    assert all(path.read_text() == "mine" for path in theirs)
    assert (tmp_path / ".prunelm-00000000.folder").is_dir()


def test_a_refused_run_takes_back_what_it_made(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"

    def refused(*, progress: bool) -> None:
        with pytest.raises(ValueError, match="no"), prepared(out):
            claim(out, {"x": 1})
            (work_folder(out) / "ids.bin").write_bytes(b"1")
            (out / "log.jsonl").write_text("")
            if progress:
                (out / "training.pt").write_bytes(b"1")
            raise ValueError("no")

    refused(progress=False)
    assert list(tmp_path.iterdir()) == []
    out.mkdir(parents=True)
    (out / "work").mkdir()
    (out / "work" / "thesis.txt").write_text("mine")
    (out / "log.jsonl").write_text("mine")
    refused(progress=False)
    assert sorted(path.name for path in out.rglob("*")) == ["log.jsonl", "thesis.txt", "work"]
    refused(progress=True)
    assert (out / "run.json").is_file() and (out / WORK / "ids.bin").is_file()


def test_a_stopped_run_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), prepared(out):
        claim(out, {"x": 1})
        raise KeyboardInterrupt
    assert (out / "run.json").is_file()


def test_a_working_folder_of_something_else_stays(tmp_path: Path) -> None:
    theirs = tmp_path / WORK / "thesis.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    with pytest.raises(ValueError, match=r"work: expected a folder of prunelm's own, got another"):
        work_folder(tmp_path)
    remove_work(tmp_path)
    assert theirs.read_text() == "mine"
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / WORK).symlink_to(theirs.parent)
    with pytest.raises(ValueError, match="expected a folder of prunelm's own"):
        work_folder(tmp_path / "x")


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """No file may grow past `size` bytes, which fails as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


LINES = ["a cab fed a bad bee", "dead beef"] * 2000
TOKENIZER = Tokenizer.train(LINES[:2], 20, "char")
MODEL = TransformerLM(LMConfig.preset("tiny", TOKENIZER.vocab_size))
UTTERANCES = [Utterance(str(i), Path(f"{i}.wav"), "a", 1.0) for i in range(500)]
WRITERS: dict[str, Callable[[Path], None]] = {
    "training.pt": lambda path: save_state(path, {"weights": torch.ones(9999), "step": 1}),
    "model.safetensors": lambda path: save_model(path.parent, MODEL, TOKENIZER),
    "masks.safetensors": lambda path: write_masks(path, {"x": torch.ones(9999).bool()}),
    "tokenizer.model": lambda path: Tokenizer.save(TOKENIZER, path),
    "ids.bin": lambda path: write_token_ids(LINES, TOKENIZER, path),
    "cells.json": lambda path: write_json(path, {"x": list(range(3000))}),
    "heard.tsv": lambda path: write_transcripts(
        path, *[{str(i): "a b c d" for i in range(999)}] * 2
    ),
    "corpus.tsv": lambda path: write_manifest(path, UTTERANCES),
    "run.json": lambda path: claim(path.parent, {"x": list(range(3000))}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_with_the_file_and_the_old_file_stays(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    if name != "run.json":
        path.write_text("old")
    message = rf"^\[Errno 27\] File too large: '{path}'$"
    with little_room(2000 if name != "tokenizer.model" else 100):
        with pytest.raises(OSError, match=message):
            WRITERS[name](path)
    assert [each.name for each in tmp_path.iterdir()] == ([] if name == "run.json" else [name])
    assert name == "run.json" or path.read_text() == "old"
    WRITERS[name](path)
    assert path.stat().st_size > 150


def test_other_errors_of_torch_pass(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        save_state(tmp_path / "x.pt", {"x": lambda: 0})
    assert not list(tmp_path.iterdir())
    save_state(tmp_path / "x.pt", {"x": torch.arange(3), "y": [1, {"z": "w"}]})
    assert load_state(tmp_path / "x.pt")["y"] == [1, {"z": "w"}]


def test_pipes_devices_and_folders_are_not_replaced_and_links_stay(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tsv")
    (tmp_path / "folder.tsv").mkdir()
    for name, what in (("pipe", "a pipe or a device"), ("folder", "a folder")):
        path = tmp_path / f"{name}.tsv"
        message = f"file: expected a place for a file, got {path}, which is {what}$"
        with pytest.raises(ValueError, match=message):
            write_transcripts(path, {}, {})
    assert (tmp_path / "pipe.tsv").is_fifo() and len(list(tmp_path.iterdir())) == 2
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "elsewhere" / "x.json")
    for value in (1, 2):
        write_json(tmp_path / "link.json", {"a": value})
        assert (tmp_path / "link.json").is_symlink()
        assert json.loads((tmp_path / "elsewhere" / "x.json").read_text()) == {"a": value}
    assert len(list(tmp_path.rglob("*"))) == 5


def test_files_that_are_written_are_whole(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_json(tmp_path / "x.json", {"a": 1})
    finally:
        os.umask(old)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o640
    write_transcripts(tmp_path / "x.tsv", {"1": "a"}, {"1": "b"})
    with (tmp_path / "x.tsv").open() as file:
        assert next(csv.DictReader(file, delimiter="\t")) == {"id": "1", "text": "a", "heard": "b"}


@pytest.mark.parametrize("room", [200, 3000, 60_000])
def test_a_model_that_does_not_fit_leaves_the_model_before_whole(tmp_path: Path, room: int) -> None:
    """Whichever of its files is the one that does not fit."""
    save_model(tmp_path, MODEL, TOKENIZER, {"which": "first"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = Tokenizer.train([*LINES[:2], "xyz"], 30, "char")
    config = LMConfig.preset("tiny", other.vocab_size)
    masks = {"x": torch.ones(250, 300).bool()}
    extra = {"which": "second", "long": list(range(500))}
    with little_room(room):
        with pytest.raises(OSError, match="File too large: ") as caught:
            model = TransformerLM(config)
            save_weights(tmp_path, model, config.to_dict(), other, extra, masks=masks)
    assert Path(str(caught.value.filename)).name in ("model.json", "masks.safetensors")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save_weights(tmp_path, TransformerLM(config), config.to_dict(), other, extra, masks=masks)
    assert (tmp_path / "masks.safetensors").is_file()
    save_model(tmp_path, MODEL, TOKENIZER, {"which": "first"})  # no masks of another model
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_that_belong_together_take_their_places_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    original = os.replace

    def noting(source: Path, to: Path) -> None:
        order.append(to.name)
        original(source, to)

    monkeypatch.setattr(os, "replace", noting)
    (tmp_path / "c").write_text("old")
    replace_files(tmp_path, {"b": b"1", "c": None, "a": b"2"})
    assert order == ["b", "a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
