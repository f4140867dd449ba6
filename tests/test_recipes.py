"""The recipes' command lines work on small data of the layout that they expect."""

from pathlib import Path

import pytest
import soundfile
import torch

from prunelm.cli import main
from prunelm.models.lm import LayerSizes, TransformerLM
from prunelm.models.transducer import Transducer
from prunelm.training.checkpoint import load_model

RECIPES = Path(__file__).parent.parent / "recipes"
CONFIG = RECIPES / "an4" / "config.yaml"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder, names, lines = tmp_path / "an4", [], []
    for speaker in ("fash", "mjwl", "fbbh"):
        for number, text in enumerate(("YES", "ENTER G TWO", "GO")):
            name = f"an{number}-{speaker}-b"
            names.append(f"an4_clstk/{speaker}/{name}")
            lines.append(f"<s> {text} </s> ({name})")
            audio = folder / "wav" / f"{names[-1]}.wav"
            audio.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(audio, 0.1 * torch.randn(16000).numpy(), 16000)
    (folder / "etc").mkdir()
    for name, content in (("fileids", names), ("transcription", lines)):
        (folder / "etc" / f"an4_train.{name}").write_text("\n".join(content) + "\n")
    return folder


def train(corpus: Path, out: Path, *more: str) -> int:
    words = ["train", "recogniser", "--config", str(CONFIG), "--corpus", str(corpus), "--out"]
    small = ["--layers", "1", "--dim", "12", "--heads", "1", "--ff", "8", "--seconds", "4"]
    return main([*words, str(out), *small, "--options.steps", "3", "--ctc_first", "2", *more])


def test_the_an4_recipe_trains_and_its_result_loads(corpus: Path, tmp_path: Path) -> None:
    assert train(corpus, tmp_path / "out", "--hold_out", "1", "--threads", "1") == 0
    model, tokenizer, info = load_model(tmp_path / "out", kind="transducer")
    assert isinstance(model, Transducer) and model.config.encoder == "conformer"
    assert tokenizer.decode(tokenizer.encode("enter two")) == "enter two"
    history = info["extra"]["history"]
    assert [record["step"] for record in history["records"]] == [3]
    assert history["records"][0]["validation"] >= 0


def test_what_the_an4_recipe_misses_is_one_line(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / "wav" / "an4_clstk" / "fash" / "an0-fash-b.wav").unlink()
    assert train(corpus, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert said.startswith("prunelm: error: an4 train in ") and said.count("\n") == 1
    assert "expected 9 recordings, got 1 missing, the first" in said
    assert not (tmp_path / "out").exists()


def test_the_demo_recipes_train_a_recogniser_and_an_lm_of_one_vocabulary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = RECIPES / "demo"
    lines = [f"{verb} the {noun}" for verb in ("open", "close", "dim") for noun in ("door", "lamp")]
    (tmp_path / "text.txt").write_text("\n".join(lines * 3) + "\n")
    small = ["--layers", "1", "--dim", "12", "--heads", "1", "--ff", "8", "--options.steps", "2"]
    lm = ["--text", str(tmp_path / "text.txt"), "--valid", str(tmp_path / "text.txt")]
    tiny = [*small, "--vocab_size", "18", "--batch", "2", "--length", "8", "--threads", "1"]
    out = str(tmp_path / "lm")
    assert main(["train", "lm", "--config", str(demo / "lm.yaml"), *lm, "--out", out, *tiny]) == 0
    model, tokenizer, _ = load_model(out, kind="lm")
    assert isinstance(model, TransformerLM)
    assert model.config.layers == (LayerSizes(1, 8),) and model.config.head_dim == 32
    for split in ("train", "all", "valid"):
        rows = ["id\tpath\ttext"]
        for number, line in enumerate(lines):
            soundfile.write(tmp_path / f"{number}.wav", 0.1 * torch.randn(16000).numpy(), 16000)
            rows.append(f"{number}\t{number}.wav\t{line}")
        (tmp_path / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    place = ["--corpus", str(tmp_path), "--tokenizer", out, "--seconds", "2", "--threads", "1"]
    first, second = tmp_path / "first", tmp_path / "second"
    words = ["train", "recogniser", "--config", str(demo / "recogniser.yaml"), *small, *place]
    assert main([*words, "--out", str(first), "--ctc_first", "1"]) == 0
    loaded, same, _ = load_model(first, kind="transducer", tokenizer=tokenizer)
    assert isinstance(loaded, Transducer) and same.fingerprint == tokenizer.fingerprint
    words[3] = str(demo / "recogniser-voices.yaml")
    still = ["--out", str(second), "--options.lr", "1e-12", "--options.average", "0"]
    assert main([*words, *still, "--init", str(first)]) == 0
    started, _, _ = load_model(second, kind="transducer")
    for name, weight in loaded.state_dict().items():
        assert torch.allclose(started.state_dict()[name], weight, atol=1e-6), name
    other = ["--dim", "24", "--out", str(tmp_path / "third"), "--init", str(first)]
    assert main([*words, *other]) == 1
    said = capsys.readouterr().err
    assert said.startswith("prunelm: error: init ") and "expected" in said
