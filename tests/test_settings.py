"""Settings, the parts of a pruner and its data are checked before anything is done."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import prunelm
from prunelm.decoding.transcribe import SearchOptions
from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
from prunelm.pruning.calibration import Calibration
from prunelm.training.options import TrainOptions
from prunelm.training.settings import check_types

TOKENS = torch.arange(34).reshape(2, 17) % 20


def small_lm() -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(LMConfig(20, 16, 8, (LayerSizes(2, 32),)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: prunelm.Heads(min_keep=None), "min_keep: expected a whole number, got None"),
        (lambda: prunelm.Heads(min_keep=True), "min_keep: expected a whole number, got True"),
        (lambda: prunelm.Neurons(multiple_of=1.5), "multiple_of: expected a whole number, got 1.5"),
        (lambda: prunelm.LowRank(min_keep="1"), "min_keep: expected a whole number, got '1'"),
        (lambda: prunelm.Blocks(bn=2.0), "bn: expected a whole number, got 2.0"),
        (lambda: prunelm.Blocks(embedding="no"), "embedding: expected True or False, got 'no'"),
        (lambda: prunelm.Elements(min_keep="a"), "min_keep: expected a number, got 'a'"),
        (lambda: prunelm.Taylor(batches=None), "batches: expected a whole number, got None"),
        (lambda: prunelm.Magnitude(p="2"), "p: expected a number, got '2'"),
        (lambda: prunelm.Magnitude(p=float("inf")), "p: expected a finite number, got inf"),
        (lambda: prunelm.Incremental(rounds=2.5), "rounds: expected a whole number, got 2.5"),
        (lambda: prunelm.Finetune(steps=1.5), "steps: expected a whole number, got 1.5"),
        (lambda: prunelm.Finetune(bf16="no"), "bf16: expected True or False, got 'no'"),
        (lambda: prunelm.Finetune(last="a"), "last: expected a number, got 'a'"),
        (lambda: TrainOptions(1, lr="fast"), "lr: expected a number, got 'fast'"),
        (lambda: SearchOptions(beam=2.5), "beam: expected a whole number, got 2.5"),
        (lambda: SearchOptions(lm_weight=None), "lm_weight: expected a number, got None"),
    ],
)
def test_settings_of_another_type_are_refused_by_name(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        make()


def test_numpy_scalars_become_pythons_own() -> None:
    blocks = prunelm.Blocks(bn=np.int64(4), min_keep=np.float32(0.5), embedding=np.bool_(True))
    assert repr(blocks) == "Blocks(bn=4, bk=16, min_keep=0.5, embedding=True)"
    assert repr(prunelm.Finetune(last=None)).count("last=None") == 1


def test_fields_of_other_types_are_left_alone() -> None:
    @dataclass(frozen=True)
    class Own:
        words: str = "a"
        sizes: tuple[int, ...] = (1,)
        either: int | str = "b"

        def __post_init__(self) -> None:
            check_types(self)

    assert Own(words=3, sizes=None, either=2.5).either == 2.5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "Heads"}, "method: expected an object, such as Heads() | Neurons(), got 'Head"),
        ({"method": prunelm.Heads}, "got the class Heads; did you mean Heads()?"),
        ({"method": [prunelm.Heads()]}, "method: expected an object"),
        ({"criterion": None}, "criterion: expected an object, such as Taylor(), got None"),
        ({"criterion": prunelm.Taylor}, "got the class Taylor; did you mean Taylor()?"),
        ({"schedule": prunelm.Incremental}, "did you mean Incremental()?"),
        ({"recovery": 3}, "recovery: expected an object, such as Finetune(), or None, got 3"),
        ({"recovery": prunelm.Finetune}, "did you mean Finetune()?"),
        ({"seed": 1.5}, "seed: expected a whole number, got 1.5"),
    ],
)
def test_parts_of_a_pruner_are_checked(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        prunelm.Pruner(**{"method": prunelm.Neurons(), **settings})


@pytest.mark.parametrize("other", [3, "Neurons", prunelm.Neurons])
def test_only_methods_are_joined(other: Any) -> None:
    with pytest.raises(ValueError, match=r"^method: expected an object"):
        prunelm.Heads() | other


@pytest.mark.parametrize("data", [[TOKENS], TOKENS, "text.txt", iter([TOKENS])])
def test_data_must_be_a_function(data: Any, tmp_path: Path) -> None:
    pruner = prunelm.Pruner(prunelm.Neurons())
    said = "^data: expected a function of the step, which gives a batch, got "
    with pytest.raises(ValueError, match=said):
        pruner.run(small_lm(), "80%", data, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=said):
        pruner.plan(small_lm(), "80%", data)


def test_the_loss_must_be_a_function() -> None:
    with pytest.raises(ValueError, match=r"^loss: expected a function of a model and a batch, got"):
        prunelm.Pruner(prunelm.Neurons()).run(small_lm(), "80%", lambda i: TOKENS, loss="own")  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", [None, "80%", 0.8, b"80%", np.array(0.8)])
def test_targets_must_be_a_list(targets: Any) -> None:
    with pytest.raises(ValueError, match=r"^targets: expected a list of sizes, got "):
        prunelm.Pruner(prunelm.Neurons(), prunelm.Magnitude()).ladder(small_lm(), targets)


def test_targets_may_come_from_a_generator() -> None:
    pruner = prunelm.Pruner(prunelm.Neurons(), prunelm.Magnitude())
    results = pruner.ladder(small_lm(), (size for size in ("90%", "80%")))  # type: ignore[arg-type]
    assert [each.target for each in results] == ["90%", "80%"]


@pytest.mark.parametrize("model", [None, "folder/lm", 3])
def test_the_model_must_be_one(model: Any) -> None:
    said = f"model: expected a torch.nn.Module or what prunelm.load_lm gives, got {model!r}"
    with pytest.raises(ValueError, match=re.escape(said)):
        prunelm.Pruner(prunelm.Neurons()).run(model, "80%")


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        (TOKENS.float(), "float32 [2, 17]"),
        (TOKENS.int(), "int32 [2, 17]"),
        (TOKENS[0], "int64 [17]"),
        (TOKENS[:0], "int64 [0, 17]"),
        (TOKENS[:, :1], "int64 [2, 1]"),
        (TOKENS.numpy(), "ndarray"),
        (None, "NoneType"),
    ],
)
def test_batches_that_a_language_model_cannot_predict(batch: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"^tokens: expected .*, got {re.escape(got)}"):
        prunelm.Pruner(prunelm.Neurons()).run(small_lm(), "80%", lambda i: batch)


def test_batches_without_samples_give_no_mean() -> None:
    evidence = Calibration(lambda i: torch.zeros(0, 3), lambda model, batch: model(batch).sum())
    for mean in (evidence.mean_loss, evidence.mean_gradient):
        with pytest.raises(ValueError, match=r"^data: expected samples, got batches without any$"):
            mean(nn.Linear(3, 1), 2)


def test_blocks_larger_than_a_weight_need_no_more_memory() -> None:
    lm, whole = small_lm(), prunelm.Magnitude()
    huge = prunelm.Pruner(prunelm.Blocks(10**9, 10**9, min_keep=0), whole).run(lm, "60%")
    fitting = prunelm.Pruner(prunelm.Blocks(48, 48, min_keep=0), whole).run(lm, "60%")
    assert huge.size == fitting.size < fitting.dense_size
    for name, mask in fitting.masks.items():
        assert torch.equal(huge.masks[name], mask)


def test_a_model_of_embeddings_alone_is_told_how() -> None:
    said = "model: expected 2-d parameters beside embeddings, got Embedding without any; see embedd"
    with pytest.raises(ValueError, match=said):
        prunelm.Pruner(prunelm.Blocks(), prunelm.Magnitude()).run(nn.Embedding(8, 8), "50%")
