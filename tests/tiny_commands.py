"""Training and pruning commands that take a moment, and the files that they work on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from prunelm.cli import main
from prunelm.data.tokenizer import Tokenizer
from prunelm.models.lm import LMConfig, TransformerLM
from prunelm.training.checkpoint import save_model

LINES = [f"{a} the {b} {c}" for a in ("turn on", "dim", "close") for b in ("red", "big", "old")
         for c in ("door", "lamp", "fan")]  # fmt: skip


def write_room(folder: Path) -> None:
    """Writes texts, lm/ and a corpus of noise."""
    (folder / "text.txt").write_text("\n".join(LINES * 4) + "\n")
    (folder / "other.txt").write_text("\n".join(LINES[1:] * 4) + "\n")
    (folder / "valid.txt").write_text("\n".join(LINES[::5]) + "\n")
    (folder / "valid2.txt").write_text("\n".join(LINES[::7]) + "\n")
    torch.manual_seed(1)
    tokenizer = Tokenizer.train(LINES, 24, "char")
    tokenizer.save(folder / "own.model")
    save_model(
        folder / "lm", TransformerLM(LMConfig.preset("tiny", tokenizer.vocab_size)), tokenizer
    )
    generator = np.random.default_rng(0)
    rows = ["id\tpath\tspeaker\ttext"]
    for i in range(6):
        audio = 0.1 * generator.standard_normal(6000 + 500 * i)
        soundfile.write(folder / f"{i}.wav", audio, 16000)
        rows.append(f"u{i}\t{i}.wav\ts{i % 3}\t{LINES[i]}")
    (folder / "train.tsv").write_text("\n".join(rows) + "\n")
    (folder / "valid.tsv").write_text("\n".join(rows[:3]) + "\n")


LM = {
    "text": "text.txt", "valid": "valid.txt", "preset": "tiny", "units": "char",
    "vocab-size": "24", "batch": "4", "length": "16", "dropout": "0.1", "options.steps": "4",
    "options.warmup": "1", "options.checkpoint-every": "2", "options.validate-every": "2",
}  # fmt: skip
SPEECH = {
    "corpus": ".", "layers": "1", "dim": "16", "heads": "2", "ff": "16", "seconds": "2",
    "ctc-first": "1", "options.steps": "3", "options.checkpoint-every": "2",
    "augmentation.begin": "0",
}  # fmt: skip
PRUNE = {
    "model": "lm", "target": "70%", "text": "text.txt", "valid": "valid.txt", "method": "Neurons",
    "criterion.batches": "2", "recovery": "Finetune", "recovery.steps": "3", "batch": "4",
    "length": "16",
}  # fmt: skip


def words(command: str, options: dict[str, str], out: Path, **changes: str) -> list[str]:
    """A command line; `changes` with _ for - and __ for a dot."""
    named = {k.replace("__", ".").replace("_", "-"): v for k, v in changes.items()}
    given = {**options, **named, "out": str(out)}
    return [*command.split(), *(w for k, v in given.items() for w in (f"--{k}", v))]


def refusal(capsys: pytest.CaptureFixture[str], line: Sequence[str], code: int = 1) -> str:
    """The one line on stderr of a command that fails."""
    capsys.readouterr()
    assert main(list(line)) == code
    said = capsys.readouterr().err
    assert said.startswith("prunelm: ") and said.count("\n") == 1, said
    return said.removeprefix("prunelm: ").removeprefix("error: ").rstrip()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()
