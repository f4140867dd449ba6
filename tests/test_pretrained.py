"""One loader for every command: accelerated, finite, and with the search chosen for the models."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from speech_bed import write_bed

import prunelm
from prunelm.nn import BlockSparseLinear
from prunelm.training.checkpoint import load_model, save_model
from prunelm.training.pretrained import (
    ChosenSearch,
    add_chosen,
    chosen_search,
    load_lm,
    load_recogniser,
    read_chosen,
    write_chosen,
)


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bed")
    write_bed(folder)
    return folder


def choice(bed: Path, beam: int = 4, lm: str | None = None, weight: float = 0.5) -> ChosenSearch:
    """An entry for the bed's two models."""
    recogniser, own = (load_model(bed / name)[2]["weights"] for name in ("recogniser", "lm"))
    return ChosenSearch(recogniser, own if lm is None else lm, beam, weight, 1.5, 0.25, 2)


def test_models_are_accelerated_unless_asked_otherwise(bed: Path) -> None:
    for load, name in ((load_lm, "lm"), (load_recogniser, "recogniser")):
        plain, fast = load(bed / name, accelerated=False).model, load(bed / name).model
        assert not any(isinstance(m, BlockSparseLinear) for m in plain.modules())
        assert any(isinstance(m, BlockSparseLinear) for m in fast.modules())
        assert not plain.training and not fast.training
    tokens = torch.randint(2, 20, (3, 7))
    expected = load_lm(bed / "lm", accelerated=False).model(tokens)
    torch.testing.assert_close(load_lm(bed / "lm").model(tokens), expected)


def test_they_are_public() -> None:
    assert prunelm.load_lm is load_lm and prunelm.load_recogniser is load_recogniser


def test_another_kind_and_another_vocabulary_are_refused(bed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lm: expected a model of kind transducer, got lm"):
        load_recogniser(bed / "lm")
    with pytest.raises(FileNotFoundError, match=r"model: expected a file, got .*model\.json"):
        load_lm(tmp_path)
    from prunelm.data.tokenizer import Tokenizer

    other = Tokenizer.train(["some other words"], 20, "char")
    with pytest.raises(ValueError, match=f"expected the vocabulary {other.fingerprint}"):
        load_lm(bed / "lm", tokenizer=other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float, bed: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = load_model(bed / "lm")
    save_model(tmp_path, model, tokenizer)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    weights["blocks.1.out.weight"][3, 5] = bad
    save_file(weights, tmp_path / "model.safetensors")
    info = json.loads((tmp_path / "model.json").read_text())
    import hashlib

    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()[:16]
    (tmp_path / "model.json").write_text(json.dumps({**info, "weights": digest}))
    with pytest.raises(ValueError, match=r"expected finite weights, got .* in blocks\.1\.out\.w"):
        load_lm(tmp_path)


def test_what_was_chosen_lies_beside_the_model(bed: Path, tmp_path: Path) -> None:
    recogniser, lm = load_recogniser(bed / "recogniser"), load_lm(bed / "lm")
    assert chosen_search(recogniser, lm, 4) is None
    entry = choice(bed)
    lm = replace(lm, chosen=(entry,))
    assert chosen_search(recogniser, lm, 4) == entry
    assert chosen_search(recogniser, None, 4) is None  # that is chosen without an LM
    other = replace(recogniser, weights="another")
    assert chosen_search(other, lm, 4) is None


def test_the_nearest_beam_and_the_own_weights_count(bed: Path) -> None:
    recogniser, lm = load_recogniser(bed / "recogniser"), load_lm(bed / "lm")
    inherited = choice(bed, lm="the dense one", weight=0.2)
    wide, own = choice(bed, beam=16, weight=0.6), choice(bed, weight=0.4)
    assert chosen_search(recogniser, replace(lm, chosen=(inherited, wide)), 4) == inherited
    assert chosen_search(recogniser, replace(lm, chosen=(inherited, wide)), 12) == wide
    assert chosen_search(recogniser, replace(lm, chosen=(inherited, wide, own)), 4) == own


def test_settings_are_written_whole_and_replaced(bed: Path, tmp_path: Path) -> None:
    assert read_chosen(tmp_path) == ()
    first, wide = choice(bed), choice(bed, beam=8)
    add_chosen(tmp_path, [first, wide])
    assert read_chosen(tmp_path) == (first, wide)
    better = replace(first, lm_weight=0.7)
    add_chosen(tmp_path, [better])
    assert read_chosen(tmp_path) == (better, wide)
    write_chosen(tmp_path, [])
    assert read_chosen(tmp_path) == () and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace("0.5", "NaN"),
        lambda text: text.replace("0.5", '"0.5"'),
        lambda text: text.replace('"beam"', '"bean"'),
        lambda text: "[]",
    ],
)
def test_damaged_settings_are_refused_by_file(change, bed: Path, tmp_path: Path) -> None:
    add_chosen(tmp_path, [choice(bed)])
    path = tmp_path / "decoding.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=r"decoding\.json: expected search settings of format 1"):
        read_chosen(tmp_path)


def test_a_folder_of_several_models_names_them(bed: Path) -> None:
    said = f"model: .*model.json, which does not exist; models lie in {bed}/lm, {bed}/recogniser$"
    with pytest.raises(FileNotFoundError, match=said):
        prunelm.load_lm(bed)
    with pytest.raises(FileNotFoundError, match=r"which does not exist$"):
        prunelm.load_lm(bed / "none")
