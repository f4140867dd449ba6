"""Long work says how far it is: a bar with the time left on a terminal, plain lines elsewhere."""

import re
from pathlib import Path

import pytest
import torch

from prunelm.cli import main
from prunelm.data.tokenizer import Tokenizer
from prunelm.metrics.perplexity import perplexity
from prunelm.models.lm import LMConfig, TransformerLM
from prunelm.pruning import Finetune, Incremental, Neurons, Pruner, Taylor
from prunelm.training import progress
from prunelm.training.checkpoint import save_model
from prunelm.training.loop import TrainOptions, train

LINES = ["a cab fed a bad bee", "dead beef", "face a cafe", "egg bag"] * 5
TOKENIZER = Tokenizer.train(LINES, 20, "char")


def fresh() -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(LMConfig.preset("tiny", TOKENIZER.vocab_size))


def data(step: int) -> torch.Tensor:
    return torch.randint(8, (4, 9), generator=torch.Generator().manual_seed(step))


def own(model: TransformerLM, rows: torch.Tensor) -> torch.Tensor:
    return model.loss(rows)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


def screen(text: str) -> str:
    """What was written, without colours and movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")


def test_a_pruner_tells_each_stage_to_its_end() -> None:
    told: list[tuple[str, int, int]] = []
    work = Pruner(Neurons(), Taylor(batches=3), Incremental(2), Finetune(steps=6))
    work.ladder(fresh(), ["80%", "70%"], data, watch=lambda *each: told.append(each))
    stages = list(dict.fromkeys(what for what, _, _ in told))
    rounds = [f"{target}, round {i} of 2" for target in ("80%", "70%") for i in (1, 2)]
    first, later = ("loss", "gradient", "recovery"), ("gradient", "loss", "recovery")
    assert stages == [
        f"{where}: {what}" for where in rounds for what in (first if where == rounds[0] else later)
    ]
    for what in stages:
        counts = [(done, of) for each, done, of in told if each == what]
        assert counts[-1][0] == counts[-1][1] == 3


def test_perplexity_counts_its_tokens() -> None:
    told: list[tuple[int, int]] = []
    found = perplexity(
        fresh(), LINES, TOKENIZER, batch_tokens=40, progress=lambda *x: told.append(x)
    )
    assert found == perplexity(fresh(), LINES, TOKENIZER, batch_tokens=40)
    total = found.tokens + found.lines
    assert told[-1] == (total, total) and len(told) > 3
    assert [done for done, _ in told] == sorted({done for done, _ in told})


@pytest.mark.parametrize("command", ["prune", "plan"])
def test_a_terminal_shows_a_bar_and_the_time_left(
    tmp_path: Path, terminal: None, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "lm", fresh(), TOKENIZER)
    (tmp_path / "text.txt").write_text("\n".join(LINES) + "\n")
    text = str(tmp_path / "text.txt")
    line = [command, str(tmp_path / "lm"), "70%", "--text", text, "--batch", "2", "--length", "8",
            "--method", "Neurons"]  # fmt: skip
    if command == "prune":
        line += ["--out", str(tmp_path / "out"), "--valid", text, "--recovery", "Finetune",
                 "--recovery.steps", "5"]  # fmt: skip
    assert main(line) == 0
    said = capsys.readouterr()
    shown = screen(said.err)
    wanted = ["gradient"]
    if command == "prune":
        wanted = [
            "perplexity of valid", "round 1 of 1: gradient", "round 1 of 1: recovery",
        ]  # fmt: skip
    assert all(what in shown for what in wanted)
    assert re.search(r"\d+/16\s+left\s+[-\d]", shown)
    assert "left" not in said.out and "\x1b" not in said.out


def test_elsewhere_there_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress.stages() as watch:
        watch("gradient", 1, 2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    with progress.stages() as watch:
        watch("gradient", 1, 2000)
    assert capsys.readouterr() == ("", "gradient 1/2,000  0 s\n")


def test_validation_shows_in_the_bar(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []

    def validate(model: torch.nn.Module) -> float:
        seen.append(screen(capsys.readouterr().err).splitlines()[-1])
        return 1.0

    options = TrainOptions(steps=4, lr=1e-3, validate_every=2)
    train(fresh(), data, own, options, validate=validate, describe="small")
    assert all("small" in line and "validating" in line for line in seen)
    assert "2/4" in seen[0] and "4/4" in seen[1]
