"""Models that are frozen, accelerated, broken or empty: pruned, or refused in one line."""

import copy
from pathlib import Path

import pytest
import torch
from test_own_modules import GPT, GPT_NAMES
from torch import nn

from prunelm import (
    Blocks,
    Elements,
    Finetune,
    Heads,
    LowRank,
    Magnitude,
    Neurons,
    Pruner,
    Random,
    Taylor,
    accelerate,
)
from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
from prunelm.training.checkpoint import save_model
from prunelm.training.loop import TrainOptions, train

V = 17
CONFIG = LMConfig(V, 16, 4, (LayerSizes(3, 24), LayerSizes(4, 32)))


def lm() -> TransformerLM:
    torch.manual_seed(7)
    return TransformerLM(CONFIG)


def data(step: int) -> torch.Tensor:
    return torch.randint(V, (4, 9), generator=torch.Generator().manual_seed(step))


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


METHODS = [Heads() | Neurons(), LowRank(), Elements(), Blocks(4, 4)]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("frozen", ["blocks.0", ""], ids=["one-block", "all"])
def test_frozen_weights_are_scored_like_others_and_stay_frozen(method, frozen: str) -> None:
    model = lm()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    before = flags(model)
    pruner = Pruner(method, Taylor(batches=2))
    with torch.no_grad():
        result = pruner.run(model, "60%", data)
    free = pruner.run(lm(), "60%", data)
    assert flags(model) == before
    for name, parameter in result.model.named_parameters():
        assert parameter.requires_grad == (not name.startswith(frozen)), name
        assert torch.equal(parameter, free.model.get_parameter(name))


def test_fine_tuning_leaves_frozen_weights_and_refuses_where_all_are() -> None:
    model = lm()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("blocks.1"))
    work = Pruner(Elements(), Taylor(batches=2), recovery=Finetune(steps=3, lr=1e-2))
    result = work.run(model, "60%", data)
    for name, parameter in result.model.named_parameters():
        mask = result.masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        same = torch.equal(parameter, model.get_parameter(name) * mask)
        assert same != name.startswith("blocks.1"), name
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="model: expected weights that require gradients, got non"):
        work.run(model, "60%", data)


def test_accelerated_models_are_refused_everywhere(tmp_path: Path) -> None:
    fast = accelerate(lm(), dense=True)
    work, line = Pruner(Elements(), Magnitude()), "model: expected a model before accelerate, got"
    for attempt in (
        lambda: work.run(fast, "50%"),
        lambda: work.ladder(fast, ["50%"], folder=tmp_path / "run"),
        lambda: work.plan(fast, "50%"),
        lambda: Pruner(LowRank(), Magnitude()).run(nn.Sequential(fast), "50%"),
    ):
        with pytest.raises(ValueError, match=line):
            attempt()
    result = work.run(lm(), "50%")
    result = copy.copy(result)
    object.__setattr__(result, "model", accelerate(result.model, dense=True))
    with pytest.raises(ValueError, match=line):
        result.save(tmp_path / "result")
    with pytest.raises(ValueError, match=line):
        save_model(tmp_path / "model", fast, None)
    with pytest.raises(ValueError, match=r"got none; train the original and acc"):
        train(fast, data, lambda m, b: m.loss(b), TrainOptions(steps=1, lr=0.1), folder=tmp_path)
    assert not list(tmp_path.iterdir())
    ranks = Pruner(LowRank(), Magnitude()).run(lm(), "50%").model
    with pytest.raises(ValueError, match=line):
        work.run(accelerate(ranks), "40%")


def broken(name: str, value: float) -> nn.Module:
    model = lm()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    return model


def never(step: int) -> torch.Tensor:
    raise AssertionError("asked for data")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (broken("norm.bias", torch.nan), "finite weights, got NaN or infinity in norm.bias"),
        (broken("blocks.1.qkv.weight", torch.inf), "got NaN or infinity in blocks.1.qkv.weight"),
        (nn.ReLU(), "expected parameters, got ReLU without any"),
        (nn.Linear(3, 3, device="meta"), "expected weights, got weight without any yet"),
        (nn.LazyLinear(3), "expected weights, got weight without any yet"),
        (nn.LayerNorm(5), "expected 2-d parameters, got LayerNorm without any"),
    ],
    ids=["nan", "inf", "empty", "meta", "lazy", "vectors"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_cannot_be_pruned_is_refused_before_any_work(
    model: nn.Module, message: str, tmp_path: Path
) -> None:
    work = Pruner(Elements(), Taylor(batches=2))
    for attempt in (
        lambda: work.plan(model, "50%", never),
        lambda: work.ladder(model, ["50%"], never, folder=tmp_path / "run"),
    ):
        with pytest.raises(ValueError, match=f"model: .*{message}"):
            attempt()
    assert not (tmp_path / "run").exists()


def test_data_and_losses_that_do_not_fit_are_named() -> None:
    work = Pruner(Neurons(), Taylor(batches=2))
    for shift, wrong in ((5, r"\d\d"), (-30, r"-\d+")):
        line = f"data: expected ids of the model's vocabulary, 0 to 16, got {wrong}"
        with pytest.raises(ValueError, match=line):
            work.run(lm(), "80%", lambda step, shift=shift: data(step) + shift + V * (shift > 0))
    with pytest.raises(ValueError, match=r"a scalar tensor, got \[4, 8, 17\]"):
        work.run(lm(), "80%", data, loss=lambda m, b: m(b[:, :-1]))
    with pytest.raises(ValueError, match="a scalar tensor, got float"):
        work.run(lm(), "80%", data, loss=lambda m, b: 1.0)
    with pytest.raises(ValueError, match="loss: expected a value computed from the weights"):
        work.run(lm(), "80%", data, loss=lambda m, b: torch.ones(()))


def test_targets_at_above_and_without_a_size() -> None:
    work, model = Pruner(Neurons(), Magnitude()), lm()
    size = sum(p.numel() for p in model.parameters())
    assert work.run(model, size).size == size == work.plan(model, "100%").size
    with pytest.raises(ValueError, match=f"target: expected 1 to {size:,} parameters"):
        work.run(model, size + 1)
    with pytest.raises(ValueError, match="targets: expected a list of sizes, got '50%'"):
        work.ladder(model, "50%")
    with pytest.raises(ValueError, match="targets: expected falling sizes, got"):
        work.ladder(model, [])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_caller_in_inference_mode_gets_the_same(method) -> None:
    work = Pruner(method, Taylor(batches=2), recovery=Finetune(steps=2))
    expected, model = work.run(lm(), "60%", data), lm()
    with torch.inference_mode():
        result, plan = work.run(model, "60%", data), work.plan(model, "60%", data)
    assert plan.size == result.rounds[0].size == expected.size
    for name, parameter in result.model.named_parameters():
        assert torch.equal(parameter, expected.model.get_parameter(name))
        assert not parameter.is_inference()


@pytest.mark.parametrize("criterion", [Random(), Magnitude(), Taylor(batches=2)], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_plan_has_the_numbers_of_the_run(method, criterion) -> None:
    work = Pruner(method, criterion, seed=3)
    plan, result = work.plan(lm(), "60%", data), work.run(lm(), "60%", data)
    assert (plan.size, plan.asked, plan.dense_size) == (
        result.size, result.asked, result.dense_size,
    )  # fmt: skip
    assert plan.gone == result.rounds[0].gone
    if result.masks:
        for name, mask in result.masks.items():
            (place,) = (kept for key, kept in plan.places.items() if key.endswith(name))
            assert isinstance(method, Blocks) or place == (int(mask.sum()), mask.numel())


def test_a_forward_of_fixed_sizes_is_named() -> None:
    class Fixed(GPT):
        def forward(self, tokens):
            for block in self.h:
                block["attn"].inner = 24
            return super().forward(tokens)

    work = Pruner(Heads(architecture=GPT_NAMES), Taylor(batches=1))
    line = "model: expected Fixed to run at smaller sizes, got .*attributes that Architecture names"
    with pytest.raises(ValueError, match=line):
        work.run(Fixed(), "90%", data)
