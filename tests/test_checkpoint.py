import json
from pathlib import Path

import pytest
import torch
from torch import nn

from prunelm.data.tokenizer import Tokenizer
from prunelm.models.lm import LMConfig, TransformerLM
from prunelm.training.checkpoint import load_model, load_state, save_model, save_state

LINES = ["the cat sat on the mat", "it's a dog"] * 10


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(LINES, 100, "char")


@pytest.fixture
def model(tokenizer: Tokenizer) -> TransformerLM:
    layers = LMConfig.preset("tiny", 5).layers
    config = LMConfig(tokenizer.vocab_size, 32, 16, layers, 0.1, {"blocks.0.ff_in": 3})
    return TransformerLM(config)


@pytest.fixture
def folder(model: TransformerLM, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_model(tmp_path / "a" / "lm", model, tokenizer, {"perplexity": 3.5})
    return tmp_path / "a" / "lm"


def test_a_model_comes_back(folder: Path, model: TransformerLM, tokenizer: Tokenizer) -> None:
    again, its_tokenizer, info = load_model(folder)
    assert isinstance(again, TransformerLM)
    assert again.config == model.config
    assert not again.training
    assert its_tokenizer.fingerprint == tokenizer.fingerprint
    assert info["extra"] == {"perplexity": 3.5}
    assert (info["kind"], info["format"]) == ("lm", 1)
    wanted = model.state_dict()
    assert list(again.state_dict()) == list(wanted)
    assert all(torch.equal(x, wanted[name]) for name, x in again.state_dict().items())
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["model.json", "model.safetensors", "tokenizer.model"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_half_precision_takes_half_the_space(
    folder: Path, model: TransformerLM, tokenizer: Tokenizer
) -> None:
    whole = (folder / "model.safetensors").stat().st_size
    save_model(folder, model, tokenizer, dtype=torch.float16)
    assert (folder / "model.safetensors").stat().st_size <= 0.6 * whole
    again, _, info = load_model(folder)
    assert info["extra"] == {}
    for name, x in model.state_dict().items():
        got = again.state_dict()[name]
        assert got.dtype == torch.float32
        assert torch.equal(got, x.half().float())


def test_weights_beyond_half_precision_are_refused(
    folder: Path, model: TransformerLM, tokenizer: Tokenizer
) -> None:
    with torch.no_grad():
        model.norm.bias[0] = 1e6
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"norm.bias: expected finite weights in torch.float16"):
        save_model(folder, model, tokenizer, dtype=torch.float16)
    assert (folder / "model.safetensors").read_bytes() == before


def test_tied_weights_are_stored_once(model: TransformerLM, tokenizer: Tokenizer) -> None:
    from prunelm.training.checkpoint import copy_weights, untied_weights

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 5)
            self.head = nn.Linear(5, 7, bias=False)
            self.head.weight = self.embedding.weight

    first, second = Tied(), Tied()
    weights = untied_weights(first)
    assert list(weights) == ["embedding.weight"]
    copy_weights(second, weights, "here")
    assert second.head.weight is second.embedding.weight
    assert torch.equal(second.head.weight, first.head.weight)


@pytest.mark.parametrize("size", [0, 5, 200, -1], ids=["empty", "header", "json", "last-byte"])
def test_weights_cut_short_are_refused(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    found = path.stat().st_size
    message = rf"model.safetensors: expected whole weights, got {found} bytes cut short"
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_files_of_two_saves_are_refused(
    folder: Path, model: TransformerLM, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with torch.no_grad():
        model.norm.bias += 1
    save_model(tmp_path / "b", model, tokenizer)
    (tmp_path / "b" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: expected the weights .* got "):
        load_model(folder)


def test_another_vocabulary_is_refused(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = Tokenizer.train(["the cat", "zebra"] * 10, 100, "char")
    pair = f"expected the vocabulary {other.fingerprint} .*, got {tokenizer.fingerprint}"
    with pytest.raises(ValueError, match=pair):
        load_model(folder, tokenizer=other)
    other.save(folder / "tokenizer.model")
    with pytest.raises(ValueError, match=rf"model.json: {pair}"):
        load_model(folder)
    config = LMConfig.preset("tiny", other.vocab_size + 1)
    message = f"expected the model's {other.vocab_size + 1} ids, got {other.vocab_size}"
    with pytest.raises(ValueError, match=message):
        save_model(tmp_path / "c", TransformerLM(config), other)
    assert not (tmp_path / "c").exists()


def test_another_kind_is_refused(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a model of kind transducer, got lm"):
        load_model(folder, kind="transducer")
    with pytest.raises(ValueError, match="expected a TransformerLM or a Transducer, got Linear"):
        save_model(tmp_path / "c", nn.Linear(2, 2), tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "expected format 1, got 2"),
        ({"kind": "ngram"}, r"expected a kind of \['lm', 'module', 'transducer'\], got 'ngram'"),
        ({"config": {"dim": 3}}, "config: expected the fields"),
    ],
)
def test_a_foreign_json_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_weights_of_another_config_are_refused(folder: Path) -> None:
    path = folder / "model.json"
    info = json.loads(path.read_text())
    info["config"]["ranks"] = {}
    path.write_text(json.dumps(info))
    message = r"expected \(64, 32\) under blocks.0.ff_in.weight, got nothing"
    with pytest.raises(ValueError, match=message):
        load_model(folder)
    info["config"]["ranks"] = {"blocks.0.ff_in": 4}
    path.write_text(json.dumps(info))
    message = r"expected blocks.0.ff_in.down of shape \(4, 32\), got \(3, 32\)"
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_json_cut_short_or_missing_files_are_refused(folder: Path) -> None:
    path = folder / "model.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=r"model.json: expected JSON, got a file cut short"):
        load_model(folder)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"model.json: expected the fields"):
        load_model(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model: expected a file, got .*model.json"):
        load_model(folder)


def test_states_come_back_or_are_refused(tmp_path: Path) -> None:
    state = {"step": 3, "x": {"a": torch.arange(5)}, "names": ["b"], "best": 1.5}
    path = tmp_path / "new" / "training.pt"
    save_state(path, state)
    again = load_state(path)
    assert torch.equal(again["x"]["a"], torch.arange(5))
    assert (again["step"], again["names"], again["best"]) == (3, ["b"], 1.5)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        message = rf"training.pt: expected a whole training state, got {size} bytes"
        with pytest.raises(ValueError, match=message):
            load_state(path)
    assert [x.name for x in path.parent.iterdir()] == ["training.pt"]


def test_a_config_of_another_size_is_refused_before_memory_is_taken(
    folder: Path, tokenizer: Tokenizer
) -> None:
    path = folder / "model.json"
    values = json.loads(path.read_text())
    for name, value, message in (
        ("layers", [[2, 10**12]], r"model.safetensors: expected blocks.0.*, got"),
        ("dim", 10**15, r"model.(safetensors|json): "),
        ("dim", 1e400, r"model.json: "),
        ("head_dim", "wide", r"model.json: "),
    ):
        path.write_text(json.dumps({**values, "config": {**values["config"], name: value}}))
        with pytest.raises(ValueError, match=message) as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)
