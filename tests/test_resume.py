"""Runs on the command line that are stopped, changed, extended or killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny_commands import LM, PRUNE, SPEECH, contents, refusal, weights, words, write_room

from prunelm.cli import main
from prunelm.data.runs import WORK
from prunelm.data.tokenizer import Tokenizer
from prunelm.models.lm import LMConfig, TransformerLM
from prunelm.pruning.result import load_result
from prunelm.training import loop
from prunelm.training.checkpoint import load_model, save_model


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that commands run in."""
    folder = tmp_path_factory.mktemp("room")
    write_room(folder)
    return folder


@pytest.fixture(autouse=True)
def _inside(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(room)
    torch.set_num_threads(1)


class Stopping:
    """Raises KeyboardInterrupt in the n-th optimizer step from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        original = loop._Run.one_step
        self.left = after

        def step(run: loop._Run, batches: object) -> float:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return original(run, batches)

        self.original, self.monkeypatch = original, monkeypatch
        monkeypatch.setattr(loop._Run, "one_step", step)

    def undo(self) -> None:
        self.monkeypatch.setattr(loop._Run, "one_step", self.original)


CHANGES = [
    ({"text": "other.txt"}, "text digest"),
    ({"valid": "valid2.txt"}, "valid digest"),
    ({"batch": "5"}, "batch 5, got 4"),
    ({"length": "8"}, "length 8, got 16"),
    ({"normalise": "true"}, "normalise True, got False"),
    ({"dropout": "0.2"}, "dropout 0.2, got 0.1"),
    ({"tokenizer": "own.model"}, "vocabulary given, got char, 24"),
    ({"vocab_size": "30"}, "vocabulary char, 30, got char, 24"),
    ({"units": "unigram"}, "vocabulary unigram, 24, got"),
    ({"layers": "1"}, "layers [[2, 64]], got [[2, 64], [2, 64]]"),
    ({"dim": "16"}, "dim 16, got 32"),
    ({"heads": "1"}, "layers [[1, 64]"),
    ({"head_dim": "8"}, "head_dim 8, got 16"),
    ({"ff": "32"}, "layers [[2, 32]"),
    ({"options__lr": "0.5"}, "lr 0.5, got 0.001"),
    ({"options__seed": "3"}, "seed 3, got 0"),
    ({"options__warmup": "2"}, "warmup 2, got 1"),
    ({"options__accumulate": "2"}, "accumulate 2, got 1"),
    ({"options__average": "0.5"}, "average 0.5, got 0.0"),
    ({"options__bf16": "true"}, "bf16 True, got False"),
    ({"options__validate_every": "1"}, "validate_every 1, got 2"),
]


@pytest.mark.parametrize("state", ["at once", "stopped", "finished"])
def test_another_training_of_an_lm_is_refused_by_name(
    tmp_path: Path,
    state: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    if state != "finished":
        stopping = Stopping(monkeypatch, 0 if state == "at once" else 3)
        assert "goes on" in refusal(capsys, words("train lm", LM, out), 130)
        stopping.undo()
    else:
        assert main(words("train lm", LM, out)) == 0
    before = contents(out)
    for change, said in CHANGES:
        found = refusal(capsys, words("train lm", LM, out, **change))
        assert found.startswith(f"{out}: expected a run with {said}"), found
        assert found.endswith("; choose another folder or remove this one")
        assert contents(out) == before
    no_valid = {name: value for name, value in LM.items() if name != "valid"}
    found = refusal(capsys, words("train lm", no_valid, out))
    assert re.search(r"valid none, got digest \w{12} \(valid.txt\)", found)
    found = refusal(capsys, words("train recogniser", SPEECH, out))
    assert "kind train recogniser, got train lm" in found
    found = refusal(capsys, words("prune", PRUNE, out))
    assert f"{out}: expected a run with" in found
    assert contents(out) == before
    run = json.loads((out / "run.json").read_text())
    run["facts"]["processes"] = 2
    (out / "run.json").write_text(json.dumps(run))
    assert "processes 1, got 2" in refusal(capsys, words("train lm", LM, out))


def test_a_stopped_training_goes_on_to_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(words("train lm", LM, whole)) == 0
    for after in (0, 1, 3, 1):
        stopping = Stopping(monkeypatch, after)
        said = refusal(capsys, words("train lm", LM, broken), 130)
        assert said == "stopped; the same command goes on from what is finished"
        stopping.undo()
    assert main(words("train lm", LM, broken, options__log_every="1")) == 0
    assert weights(whole) == weights(broken)
    assert (whole / "tokenizer.model").read_bytes() == (broken / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("after", [3, 99])
def test_more_steps_extend_a_training(
    tmp_path: Path,
    after: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    stopping = Stopping(monkeypatch, after)
    main(words("train lm", LM, out))
    stopping.undo()
    assert main(words("train lm", LM, out, options__steps="7")) == 0
    info = load_model(out)[2]
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert info["extra"]["options"]["steps"] == 7 and records[-1]["step"] == 7
    assert [r["step"] for r in records if "validation" in r] == [2, 4, 6, 7]
    schedule = loop.TrainOptions(steps=7, lr=1e-3, warmup=1)
    assert records[-1]["lr"] == schedule.lr_at(6)
    found = refusal(capsys, words("train lm", LM, out, options__steps="6"))
    assert found == f"steps: expected at least 7, which {out} has done, got 6"


def test_another_training_of_a_recogniser_is_refused_by_name(
    tmp_path: Path, room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(words("train recogniser", SPEECH, out)) == 0
    assert main(words("train recogniser", SPEECH, out)) == 0
    for change, said in [
        ({"corpus": "valid.tsv"}, "corpus digest"),
        ({"valid_split": "valid"}, "valid digest"),
        ({"seconds": "1"}, "seconds 1.0, got 2.0"),
        ({"augmentation__begin": "1"}, "augmentation {"),
        ({"dropout": "0.3"}, "dropout 0.3, got 0.15"),
        ({"encoder": "transformer"}, "encoder transformer, got conformer"),
        ({"ctc_first": "0"}, "loss TransducerLoss(ctc_first=0), got TransducerLoss(ctc_first=1)"),
        ({"init": str(out)}, "init "),
        ({"vocab_size": "30"}, "vocabulary char, 30, got char, 40"),
    ]:
        found = refusal(capsys, words("train recogniser", SPEECH, out, **change))
        assert found.startswith(f"{out}: expected a run with {said}"), found
    audio = (room / "3.wav").read_bytes()
    try:  # a recording of another length under the same name
        soundfile.write(room / "3.wav", np.zeros(5000), 16000)
        found = refusal(capsys, words("train recogniser", SPEECH, out))
        assert "expected a run with corpus digest" in found
    finally:
        (room / "3.wav").write_bytes(audio)


def test_an_untrained_joiner_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words("train recogniser", {**SPEECH, "corpus": "nowhere"}, tmp_path / "out",
                 ctc_first="3")  # fmt: skip
    found = refusal(capsys, line)
    assert found.startswith("ctc_first: expected fewer than the run's 3 batches, got 3: the transd")
    assert not (tmp_path / "out").exists()
    assert main(words("train recogniser", SPEECH, tmp_path / "out", valid_split="valid")) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    rate = re.search(r"best WER ([\d.]+) %(.*)", said)
    assert (float(rate[1]) > 100) == ("above 100 %, since it inserts words" in rate[2])


@pytest.mark.parametrize("state", ["stopped", "finished"])
@pytest.mark.parametrize("criterion", ["Magnitude", "Taylor"])
def test_another_pruning_is_refused_by_name(
    tmp_path: Path,
    state: str,
    criterion: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    options = {n: v for n, v in PRUNE.items() if n != "criterion.batches"}
    options |= {"criterion": criterion}
    if state == "stopped":
        stopping = Stopping(monkeypatch, 1)
        refusal(capsys, words("prune", options, out), 130)
        stopping.undo()
        assert (out / WORK).is_dir()
    else:
        assert main(words("prune", options, out)) == 0
        assert not (out / WORK).exists()
    before = contents(out)
    other = "Taylor" if criterion == "Magnitude" else "Magnitude"
    for change, said in [
        ({"text": "other.txt"}, "text digest"),
        ({"valid": "valid2.txt"}, "valid digest"),
        ({"batch": "5"}, "batch 5, got 4"),
        ({"length": "8"}, "length 8, got 16"),
        ({"normalise": "true"}, "normalise True, got False"),
        ({"target": "60%"}, "target 60%, got 70%"),
        ({"criterion": other}, f"criterion {other}"),
        ({"recovery__steps": "4"}, "recovery Finetune(steps=4"),
        ({"method": "Heads"}, "method Heads"),
        ({"seed": "2"}, "seed 2, got 0"),
        ({"fp16": "true"}, "fp16 True, got False"),
    ]:
        found = refusal(capsys, words("prune", options, out, **change))
        assert found.startswith(f"{out}: expected a run with {said}"), found
        assert contents(out) == before
    torch.manual_seed(5)
    tokenizer = Tokenizer.load(Path("own.model"))
    dense = TransformerLM(LMConfig.preset("tiny", tokenizer.vocab_size))
    save_model(tmp_path / "lm2", dense, tokenizer)
    found = refusal(capsys, words("prune", options, out, model=str(tmp_path / "lm2")))
    assert found.startswith(f"{out}: expected a run with model "), found
    capsys.readouterr()
    assert main(words("prune", options, out)) == 0  # goes on, or says again what was found
    assert "asked" in capsys.readouterr().out
    straight = tmp_path / "straight"
    assert main(words("prune", options, straight)) == 0
    assert weights(out) == weights(straight)
    assert not (out / WORK).exists()


def test_files_of_the_user_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, options in (("prune", PRUNE), ("train lm", LM)):
        out = tmp_path / command.replace(" ", "-")
        (out / "work").mkdir(parents=True)
        (out / "work" / "thesis.txt").write_text("mine")
        (out / "notes.txt").write_text("mine")
        before = contents(out)
        refusal(capsys, words(command, options, out, text="nowhere.txt"))
        refusal(capsys, words(command, options, out, length="4000"))
        assert contents(out) == before
        assert main(words(command, options, out)) == 0
        assert contents(out).items() >= before.items()


@pytest.mark.parametrize(("command", "options"), [("prune", PRUNE), ("train lm", LM)])
def test_a_folder_of_another_model_is_refused(
    tmp_path: Path, command: str, options: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    tokenizer = Tokenizer.load(Path("own.model"))
    save_model(out, TransformerLM(LMConfig.preset("tiny", tokenizer.vocab_size)), tokenizer)
    before = contents(out)
    found = refusal(capsys, words(command, options, out))
    assert found.startswith(f"{out}: expected a folder without model.json, or an earlier run's")
    assert contents(out) == before
    if command == "prune":
        (tmp_path / "ladder").mkdir()
        out.rename(tmp_path / "ladder" / "80pc")
        line = words("prune", PRUNE, tmp_path / "ladder", target="80%,70%")
        assert "80pc: expected a folder without model.json" in refusal(capsys, line)
        assert contents(tmp_path / "ladder" / "80pc") == before


def test_finished_sizes_stand_when_a_later_one_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = words("prune", PRUNE, tmp_path / "out", target="80%,70%,60%")
    original, calls = loop._Run.one_step, []

    def step(run: loop._Run, batches: object) -> float:
        calls.append(1)
        if len(calls) == 5:
            raise ValueError("loss: expected a finite number at step 1, got nan")
        return original(run, batches)

    monkeypatch.setattr(loop._Run, "one_step", step)
    found = refusal(capsys, line)
    assert found.endswith("got nan (stopped at the target 70%; 80% finished before)"), found
    first = load_result(tmp_path / "out" / "80pc")
    assert first.size <= first.asked and not (tmp_path / "out" / "70pc").exists()
    monkeypatch.setattr(loop._Run, "one_step", original)
    assert main(line) == 0
    assert load_result(tmp_path / "out" / "80pc").rounds == first.rounds
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["60pc", "70pc", "80pc", "run.json"]


# Forks children that run a command, kills each at a random moment, and lets the last one finish.
KILLER = """
import json, os, random, signal, sys, time
from prunelm.cli import main
import prunelm.cli.training, prunelm.cli.pruning, prunelm.cli.arguments
words, kills, seed = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def child():
    pid = os.fork()
    if not pid:
        try:
            import torch
            torch.set_num_threads(1)
            os._exit(main(words))
        finally:
            os._exit(9)
    return pid

draw, begin = random.Random(seed), time.monotonic()
first = json.loads(sys.argv[4])
assert os.waitstatus_to_exitcode(os.waitpid(
    (lambda kept: child())(words.__setitem__(slice(None), first)), 0)[1]) == 0
took = time.monotonic() - begin
words[:] = json.loads(sys.argv[1])
killed = 0
for _ in range(kills):
    pid = child()
    time.sleep(draw.uniform(0, took))
    os.kill(pid, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
print("killed", killed)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child(), 0)[1]))
"""


@pytest.mark.parametrize(
    "kills", [pytest.param(4, id="few"), pytest.param(60, id="many", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("command", ["train lm", "prune"])
def test_killed_runs_go_on_to_the_same_bits(
    tmp_path: Path, command: str, kills: int, room: Path
) -> None:
    if command == "prune":
        options = PRUNE | {"target": "80%,60%", "schedule": "Incremental", "schedule.rounds": "2",
                           "recovery.steps": "8"}  # fmt: skip
    else:
        options = LM | {"options.steps": "12", "options.log-every": "3"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    lines = [json.dumps(words(command, options, out)) for out in (broken, whole)]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, lines[0], str(kills), str(kills), lines[1]],
        cwd=room, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    killed = re.search(r"killed (\d+)", done.stdout)
    assert killed and int(killed[1]) >= kills // 2
    names = [path.relative_to(whole) for path in whole.rglob("model.safetensors")]
    assert len(names) == (2 if command == "prune" else 1)
    for name in names:
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    assert {str(p.relative_to(whole)) for p in whole.rglob("*")} == {
        str(p.relative_to(broken)) for p in broken.rglob("*")
    }


def test_ctrl_c_gets_one_line_and_leaves_a_run_that_goes_on(tmp_path: Path, room: Path) -> None:
    line = words("train lm", LM, tmp_path / "out", options__steps="100000")
    process = subprocess.Popen(
        [sys.executable, "-m", "prunelm", *line], cwd=room, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        # A shell has its background jobs ignore SIGINT, and the tests may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    state = tmp_path / "out" / "training.pt"
    while not state.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "prunelm: stopped; the same command goes on from what is finished\n"
    done = torch.load(state, weights_only=True)["step"]
    assert main(words("train lm", LM, tmp_path / "out", options__steps=str(done + 2))) == 0
