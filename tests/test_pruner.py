"""Whole runs: sizes, masks that hold, equal seeds, resumption, saving, processes."""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from prunelm import (
    Blocks,
    Elements,
    Finetune,
    Heads,
    Incremental,
    LowRank,
    Magnitude,
    Neurons,
    OneShot,
    Pruner,
    Random,
    Taylor,
    accelerate,
    count_parameters,
    load_result,
)
from prunelm.data.tokenizer import Tokenizer
from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
from prunelm.training.checkpoint import load_model

V = 17
CONFIG = LMConfig(V, 16, 4, (LayerSizes(3, 24), LayerSizes(4, 32)), dropout=0.1)
METHODS = {
    "heads+neurons": Heads() | Neurons(multiple_of=2),
    "ranks": LowRank(),
    "blocks": Blocks(4, 4),
    "elements": Elements(),
}


def lm() -> TransformerLM:
    torch.manual_seed(7)
    return TransformerLM(CONFIG)


def data(step: int) -> torch.Tensor:
    start = torch.randint(V, (4, 1), generator=torch.Generator().manual_seed(step))
    return (start + 3 * torch.arange(9)) % V


def metric(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model.loss(data(1000)).exp())


def pruner(method, **changes) -> Pruner:
    start = Pruner(method, Taylor(batches=2), Incremental(2), Finetune(steps=6, lr=1e-2))
    return replace(start, **changes)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("name", METHODS)
def test_a_ladder_gives_every_size_and_leaves_the_model_alone(name: str) -> None:
    model = lm().train()
    before = copy.deepcopy(model.state_dict())
    results = pruner(METHODS[name]).ladder(model, ["80%", 2900], data, validate=metric)
    dense = count_parameters(model)
    for result, asked, rounds in zip(results, (dense * 80 // 100, 2900), (2, 4), strict=True):
        assert asked - 150 < result.size <= asked
        assert result.size == count_parameters(result.model, result.masks)
        assert len(result.rounds) == rounds and result.rounds[-1].size == result.size
        assert not result.model.training
        assert bool(result.model(data(0)[:, :-1]).isfinite().all())
        for parameter, mask in result.masks.items():
            assert not bool(result.model.get_parameter(parameter)[~mask].any())
    assert model.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_zeros_stay_zero_through_fine_tuning_and_kept_weights_move() -> None:
    start = pruner(Elements(), schedule=OneShot(), recovery=None).run(lm(), "40%", data)
    result = pruner(Elements(), schedule=OneShot()).run(lm(), "40%", data)
    moved = 0
    for name, mask in result.masks.items():
        assert torch.equal(mask, start.masks[name])
        weight = result.model.get_parameter(name)
        assert not bool(weight[~mask].any())
        moved += int((weight != start.model.get_parameter(name)).sum())
    assert moved > 0


def test_masks_of_a_run_are_kept_by_the_next() -> None:
    first = pruner(Elements()).run(lm(), "60%", data)
    second = pruner(Elements()).run(first.model, "50%", data, masks=first.masks)
    assert second.dense_size == first.size
    assert second.size == first.size // 2
    for name, mask in second.masks.items():
        assert not bool((mask & ~first.masks[name]).any())


def test_equal_seeds_give_equal_results() -> None:
    for criterion in (Random(), Taylor(batches=2)):
        first, again, other = (
            pruner(Heads() | Neurons(), criterion=criterion, seed=seed).run(lm(), "60%", data)
            for seed in (1, 1, 2)
        )
        assert same_weights(first.model, again.model)
        assert first.rounds == again.rounds
        assert not same_weights(first.model, other.model)


def test_a_run_draws_no_random_numbers_of_its_caller() -> None:
    model = lm()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    pruner(LowRank()).run(model, "60%", data)
    assert torch.equal(torch.rand(2), expected)


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("after", [3, 14])
def test_a_resumed_run_is_bit_equal_to_an_unbroken_one(
    name: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, work = ["80%", "60%"], pruner(METHODS[name])
    unbroken = work.ladder(lm(), targets, data, validate=metric)
    calls = 0

    def failing(step: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Stop
        return data(step)

    with pytest.raises(Stop):
        work.ladder(lm(), targets, failing, validate=metric, folder=tmp_path)
    resumed = work.ladder(lm(), targets, data, validate=metric, folder=tmp_path)
    again = work.ladder(lm(), targets, failing, validate=metric, folder=tmp_path)
    for results in (resumed, again):  # the second reads everything and computes nothing
        for a, b in zip(unbroken, results, strict=True):
            assert same_weights(a.model, b.model)
            assert a.to_dict() == b.to_dict()
            assert all(torch.equal(mask, b.masks[n]) for n, mask in a.masks.items())


def test_resuming_inside_fine_tuning_is_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prunelm.training.loop as loop

    original = loop.TrainOptions
    monkeypatch.setattr(loop, "TrainOptions", lambda **k: original(**{**k, "checkpoint_every": 2}))
    work = pruner(Neurons(), schedule=OneShot())
    unbroken = work.run(lm(), "80%", data)

    def failing(step: int) -> torch.Tensor:
        if step == 5:
            raise Stop
        return data(step)

    with pytest.raises(Stop):
        work.run(lm(), "80%", failing, folder=tmp_path)
    assert list(tmp_path.glob("*/recovery/training.pt"))
    assert same_weights(work.run(lm(), "80%", data, folder=tmp_path).model, unbroken.model)
    assert not list(tmp_path.glob("*/recovery"))


def test_a_folder_of_another_run_is_refused_by_key(tmp_path: Path) -> None:
    work = pruner(Neurons(), recovery=None)
    work.run(lm(), "80%", data, folder=tmp_path)
    with pytest.raises(ValueError, match=r": expected a run with targets \[.*\], got \["):
        work.run(lm(), "70%", data, folder=tmp_path)
    with pytest.raises(ValueError, match=r"expected a run with criterion Magnitude\(p=2.0\)"):
        replace(work, criterion=Magnitude()).run(lm(), "80%", data, folder=tmp_path)
    other = lm()
    with torch.no_grad():
        other.norm.bias[0] = 1.0
    with pytest.raises(ValueError, match="expected a run with model "):
        work.run(other, "80%", data, folder=tmp_path)
    weights = next(tmp_path.glob("round-*/weights.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"weights\.safetensors: expected whole weights, got"):
        work.run(lm(), "80%", data, folder=tmp_path)


def test_saved_is_loaded(tmp_path: Path) -> None:
    lines = ["a cab fed a bad bee", "dead beef", "face a cafe", "egg bag"] * 5
    tokenizer = Tokenizer.train(lines, 10, kind="char")
    model = TransformerLM(replace(CONFIG, vocab_size=tokenizer.vocab_size))
    batches = lambda step: data(step) % tokenizer.vocab_size  # noqa: E731
    for name, method in METHODS.items():
        result = pruner(method, recovery=None).run(
            model, "70%", batches, tokenizer=tokenizer, folder=tmp_path / "runs" / name
        )
        folder = tmp_path / "runs" / name / f"size-{result.asked}"
        back = load_result(folder)
        assert same_weights(back.model, result.model)
        assert back.to_dict() == result.to_dict()
        assert back.masks.keys() == result.masks.keys()
        assert all(torch.equal(back.masks[n], mask) for n, mask in result.masks.items())
        stored = sum(t.numel() for t in result.model.parameters())
        size = (folder / "model.safetensors").stat().st_size
        assert 4 * stored <= size <= 4 * stored + 8192
        result.save(tmp_path / "half", dtype=torch.float16)
        if result.masks:
            half = load_result(tmp_path / "half")
            assert count_parameters(half.model, half.masks) == result.size
    replace(result, tokenizer=None).save(tmp_path / "half")
    assert not (tmp_path / "half" / "tokenizer.model").exists()
    back = load_result(tmp_path / "half")
    assert back.tokenizer is None and same_weights(back.model, result.model)
    with pytest.raises(ValueError, match=r"got one saved without a tokenizer; prunelm.load_result"):
        load_model(tmp_path / "half")
    with pytest.raises(ValueError, match=r"model: expected None, as .* its lm, got TransformerLM"):
        load_result(tmp_path / "half", model)
    masks = folder / "masks.safetensors"
    masks.write_bytes(masks.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"masks\.safetensors: expected whole masks"):
        load_result(folder)
    plain = json.loads((folder / "model.json").read_text())
    plain["extra"] = {}
    (folder / "model.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match="expected a pruned model"):
        load_result(folder)


def test_the_report_says_what_happened() -> None:
    result = pruner(Heads() | Neurons()).run(lm(), "60%", data, validate=metric)
    text = result.report()
    assert f"asked {result.asked:,} (60%), reached {result.size:,} of {result.dense_size:,}" in text
    gone = sum(each.gone["neuron"] for each in result.rounds)
    assert f"{gone:,} neurons" in text and "predicted rise" in text
    assert f"recovered {result.metric:.4g}" in text
    first, second = result.rounds
    assert first.loss_recovered == second.loss_before
    assert first.predicted is not None and first.rise is not None
    assert first.steps + second.steps == 6
    assert result.metric == metric(result.model)
    json.dumps(result.to_dict())


def test_taylor_predicts_the_real_rise_of_a_small_removal() -> None:
    """First order: exact in the limit of removing little."""
    model = lm().double()
    with torch.no_grad():  # nearly dead neurons, so that removal is a small step
        for block in model.blocks:
            block.ff_out.weight.mul_(1e-3)
    work = pruner(Neurons(), schedule=OneShot(), recovery=None)
    record = work.run(model, count_parameters(model) - 33, data).rounds[0]
    assert record.gone == {"neuron": 1}
    assert abs(abs(record.rise) - record.predicted) <= 0.05 * record.predicted + 1e-7


def test_a_plan_promises_what_a_run_gives_and_changes_nothing() -> None:
    model, work = lm(), pruner(Heads() | Neurons(), schedule=OneShot(), recovery=None)
    plan = work.plan(model, "60%", data)
    result = work.run(model, "60%", data)
    assert plan.reachable and plan.size == result.size
    assert plan.gone == result.rounds[0].gone
    assert plan.places["head blocks.0"] == (result.model.config.layers[0].heads, 3)
    assert "neuron blocks.1: " in str(plan)
    without_data = work.plan(model, "60%")
    assert without_data.asked - without_data.size < 33


def test_an_unreachable_target_is_refused_before_anything_runs() -> None:
    work = pruner(Heads() | Neurons())
    plan = work.plan(lm(), 500)
    assert not plan.reachable and f"expected at least {plan.smallest:,}" in str(plan)

    def never(step: int) -> torch.Tensor:
        raise AssertionError("asked for data")

    with pytest.raises(ValueError, match=f"target: expected at least {plan.smallest:,} param"):
        work.ladder(lm(), ["80%", 500], never)
    assert work.run(lm(), plan.smallest, data).size == plan.smallest


def test_bad_arguments_name_the_key() -> None:
    for targets in ([], ["50%", "50%"], ["40%", "50%"]):
        with pytest.raises(ValueError, match="targets: expected falling sizes"):
            pruner(Neurons()).ladder(lm(), targets, data)
    with pytest.raises(ValueError, match="data: expected a function from step to batch, got None"):
        pruner(Neurons()).run(lm(), "80%")
    with pytest.raises(ValueError, match="data: expected a function from step to batch, got None"):
        pruner(Neurons(), criterion=Random()).run(lm(), "80%")
    rows = [torch.zeros(4, 9, dtype=torch.int64)]
    with pytest.raises(ValueError, match="data: expected a function of the step"):
        pruner(Neurons()).run(lm(), "80%", rows)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss: expected a function of a model and a batch, got"):
        pruner(Neurons()).run(lm(), "80%", data, loss="mse")  # type: ignore[arg-type]
    message = "tokens: expected an int64 tensor, got dict; other batches need a loss of their own"
    with pytest.raises(ValueError, match=message):
        pruner(Neurons()).run(lm(), "80%", lambda step: {"ids": data(step)})
    for make, message in [
        (lambda: Finetune(steps=-1), "steps: expected at least 0, got -1"),
        (lambda: Finetune(lr=0), "lr: expected more than 0, got 0"),
        (lambda: Finetune(distill=1.5), "distill: expected a fraction in"),
        (lambda: Finetune(temperature=0), "temperature: expected more than 0, got 0"),
        (lambda: Finetune(last=2), "last: expected a fraction in"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_magnitude_needs_no_data() -> None:
    result = pruner(Neurons(), criterion=Magnitude(), recovery=None).run(lm(), "80%")
    assert result.rounds[0].loss_before is None and result.rounds[0].predicted is None
    assert "-" not in result.report().splitlines()[0]


@pytest.mark.parametrize("last", [None, 0.5])
@pytest.mark.parametrize("rounds", [1, 3, 7])
def test_rounds_share_the_steps(last: float | None, rounds: int) -> None:
    recovery = Finetune(steps=100, last=last)
    shares = [recovery.share(i, rounds) for i in range(rounds)]
    assert sum(shares) == 100
    if last and rounds > 1:
        assert shares[-1] == 50


def test_distillation_pulls_towards_the_dense_model() -> None:
    dense = lm().eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))

    def distance(alpha: float) -> float:
        work = pruner(
            Neurons(), schedule=OneShot(), criterion=Magnitude(),
            recovery=Finetune(steps=40, lr=1e-2, distill=alpha),
        )  # fmt: skip
        student = work.run(dense, "70%", data).model
        with torch.no_grad():
            tokens = data(500)[:, :-1]
            wanted, got = dense(tokens).log_softmax(-1), student(tokens).log_softmax(-1)
            return float((wanted.exp() * (wanted - got)).sum(-1).mean())

    assert distance(1.0) < 0.5 * distance(0.0)


def test_a_new_criterion_and_a_new_recovery_are_one_small_thing_each() -> None:
    @dataclass(frozen=True)
    class First:
        """The first groups go first."""

        in_loss_units = False
        batches = 0

        def score(self, model, groups, evidence):
            return [torch.arange(float(g.count)) for g in groups]

    seen = []

    def recovery(model, evidence, masks, wound) -> int:
        seen.append((wound.round, wound.rounds))
        return 0

    work = Pruner(Heads(), First(), Incremental(2), recovery)
    result = work.run(lm(), "90%", data)
    assert seen == [(0, 2), (1, 2)]
    assert torch.equal(result.model.blocks[1].out.weight, lm().blocks[1].out.weight[:, 4:])
    assert "recovery" in result.settings["recovery"]


@pytest.mark.parametrize("name", ["heads+neurons", "ranks"])
def test_results_can_be_copied_and_compiled(name: str) -> None:
    result = pruner(METHODS[name], recovery=None).run(lm(), "60%", data)
    tokens = data(0)[:, :-1]
    copied = copy.deepcopy(result.model)
    assert torch.equal(copied(tokens), result.model(tokens))
    compiled = torch.compile(result.model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert float((compiled(tokens) - result.model(tokens)).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", ["ranks", "blocks"])
def test_accelerate_takes_results_as_they_are(name: str) -> None:
    result = pruner(METHODS[name], recovery=None).run(lm(), "40%", data)
    tokens = data(0)[:, :-1]
    with torch.no_grad():
        fast = accelerate(result.model)
        assert float((fast(tokens) - result.model(tokens)).abs().max()) <= 1e-4


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    share = lambda step: data(step)[rank::2]  # noqa: E731
    work = Pruner(Elements(), Taylor(batches=3), OneShot(), Finetune(steps=4, lr=1e-2))
    result = work.run(lm(), "50%", share)
    torch.save((result.masks, result.model.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_agree_on_the_mask_of_all_samples(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_work, (str(tmp_path),), nprocs=2)
    (masks, state), (masks_1, state_1) = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    assert all(torch.equal(mask, masks_1[n]) for n, mask in masks.items())
    assert all(torch.equal(t, state_1[n]) for n, t in state.items())
    alone = Pruner(Elements(), Taylor(batches=3)).run(lm(), "50%", data)
    differing = sum(int((mask != masks[n]).sum()) for n, mask in alone.masks.items())
    assert differing <= 4  # ties by rounding
