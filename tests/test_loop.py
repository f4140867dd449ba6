import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from prunelm.data.tokenizer import Tokenizer
from prunelm.models.lm import LMConfig, TransformerLM
from prunelm.training.checkpoint import load_model
from prunelm.training.loop import History, TrainOptions, train

LINES = ["the cat sat on the mat", "it's a dog"] * 10


def fresh(dropout: float = 0.2) -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(LMConfig.preset("tiny", 17, dropout))


def batches(step: int) -> Tensor:
    """Batch `step`: lines that count upwards, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(17, (4, 1), generator=generator)
    return (first + torch.arange(9)) % 17


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    value: Tensor = model.loss(batch)  # type: ignore[operator]
    return value


def validate(model: nn.Module) -> float:
    return float(loss(model, batches(10_000)))


def dying_at(step: int) -> Callable[[int], Tensor]:
    def call(at: int) -> Tensor:
        if at == step:
            raise KeyboardInterrupt
        return batches(at)

    return call


OPTIONS = TrainOptions(
    steps=20, lr=3e-3, warmup=5, log_every=3, checkpoint_every=5, validate_every=4
)


def assert_same(a: object, b: object) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key != "seconds":
                assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    straight = fresh()
    history = train(straight, batches, loss, OPTIONS, folder=whole, validate=validate)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), dying_at(13), loss, OPTIONS, folder=broken, validate=validate)
    assert torch.load(broken / "training.pt", weights_only=True)["step"] == 10
    torch.manual_seed(99)
    resumed = TransformerLM(straight.config)
    again = train(resumed, batches, loss, OPTIONS, folder=broken, validate=validate)
    assert_same(straight.state_dict(), resumed.state_dict())
    states = [torch.load(x / "training.pt", weights_only=True) for x in (whole, broken)]
    assert len(states[0]["optimizer"]["state"]) == len(list(straight.parameters()))
    assert_same(*states)
    assert again.losses == history.losses
    assert again.validations == history.validations
    lines = [json.loads(line) for line in (broken / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 12, 15, 16, 18, 20]
    assert lines == again.records


def test_the_running_mean_is_validated_and_returned(tmp_path: Path) -> None:
    plain = replace(OPTIONS, validate_every=0, checkpoint_every=0)
    trail: list[dict[str, Tensor]] = []

    def watched(model: nn.Module, batch: Tensor) -> Tensor:
        trail.append({name: x.detach().clone() for name, x in model.named_parameters()})
        return loss(model, batch)

    last = fresh()
    train(last, batches, watched, plain)
    trail.append({name: x.detach().clone() for name, x in last.named_parameters()})
    mean = trail[0]
    for step, weights in enumerate(trail[1:], 1):
        kept = min(0.6, step / (step + 10))
        mean = {name: kept * x + (1 - kept) * weights[name] for name, x in mean.items()}
    averaged = fresh()
    seen: list[dict[str, Tensor]] = []

    def watch(model: nn.Module) -> float:
        seen.append({name: x.detach().clone() for name, x in model.named_parameters()})
        return -len(seen)  # the last is the best

    train(averaged, batches, loss, replace(OPTIONS, average=0.6), validate=watch)
    for name, x in averaged.named_parameters():
        assert torch.equal(x, seen[-1][name])
        assert float((x - mean[name]).detach().abs().max()) <= 1e-6
    assert any(bool((x != mean[name]).any()) for name, x in last.named_parameters())
    unvalidated = fresh()
    train(unvalidated, batches, loss, replace(plain, average=0.6))
    assert_same(unvalidated.state_dict(), averaged.state_dict())


def test_a_resumed_mean_is_bit_equal(tmp_path: Path) -> None:
    options = replace(OPTIONS, average=0.9)
    straight, resumed = fresh(), fresh()
    train(straight, batches, loss, options, folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), dying_at(13), loss, options, folder=tmp_path / "broken")
    train(resumed, batches, loss, options, folder=tmp_path / "broken")
    assert_same(straight.state_dict(), resumed.state_dict())
    with pytest.raises(ValueError, match=r"average: expected a fraction in \[0, 1\), got 1.0"):
        replace(OPTIONS, average=1.0)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = train(fresh(), batches, loss, OPTIONS, folder=tmp_path)
    second = train(fresh(), dying_at(0), loss, OPTIONS, folder=tmp_path)
    assert second == first


def test_luck_stays_inside_a_step() -> None:
    """Neither validation nor the caller's random numbers change what is trained."""
    plain, watched = fresh(), fresh()
    train(plain, batches, loss, OPTIONS)
    torch.manual_seed(5)

    seen: list[float] = []

    def noisy(model: nn.Module) -> float:
        seen.append(float(torch.rand(1)))
        return -len(seen)

    train(watched, batches, loss, OPTIONS, validate=noisy)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert_same(plain.state_dict(), watched.state_dict())


def test_it_learns_and_keeps_the_best() -> None:
    model = fresh(0.0)
    values = iter([3.0, 1.0, 2.0])
    kept: list[dict[str, Tensor]] = []

    def scripted(model: nn.Module) -> float:
        assert not model.training
        kept.append({name: x.clone() for name, x in model.state_dict().items()})
        return next(values)

    options = TrainOptions(steps=120, lr=1e-2, warmup=5, log_every=20, validate_every=40)
    history = train(model, batches, loss, options, validate=scripted)
    assert history.losses[-1] <= 0.5 * history.losses[0]
    assert (history.best, history.best_step) == (1.0, 80)
    assert not model.training
    assert_same(dict(model.state_dict()), kept[1])


def test_steps_are_adamw_by_hand() -> None:
    model, twin = fresh(0.0), fresh(0.0)
    options = TrainOptions(steps=4, lr=1e-2, warmup=2, weight_decay=0.1, clip=0.5)
    train(model, batches, loss, options)
    moments = {name: torch.zeros(2, *p.shape) for name, p in twin.named_parameters()}
    for step in range(4):
        twin.zero_grad()
        loss(twin, batches(step)).backward()
        norm = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                gradient = p.grad * min(1.0, 0.5 / float(norm))
                first, second = moments[name]
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.98).add_(0.02 * gradient**2)
                p.mul_(1 - options.lr_at(step) * (0.1 if p.ndim >= 2 else 0.0))
                correct = second / (1 - 0.98 ** (step + 1))
                change = first / (1 - 0.9 ** (step + 1)) / (correct.sqrt() + 1e-8)
                p.sub_(options.lr_at(step) * change)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p - q).abs().max() <= 2e-4, name


def test_the_learning_rate_rises_then_falls() -> None:
    options = TrainOptions(steps=110, lr=1.0, warmup=10, final_lr_fraction=0.2)
    rates = [options.lr_at(step) for step in range(111)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.6)
    assert rates[110] == pytest.approx(0.2)
    assert TrainOptions(steps=5, lr=1.0, warmup=0).lr_at(0) == 1.0


def test_accumulated_batches_are_one_big_batch() -> None:
    def joint(step: int) -> Tensor:
        return torch.cat([batches(2 * step), batches(2 * step + 1)])

    big, small = fresh(0.0), fresh(0.0)
    whole = train(big, joint, loss, TrainOptions(steps=6, lr=1e-3, warmup=1))
    parts = train(small, batches, loss, TrainOptions(steps=6, lr=1e-3, warmup=1, accumulate=2))
    assert parts.losses == pytest.approx(whole.losses, abs=1e-5)
    for p, q in zip(big.parameters(), small.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-5


def test_masked_weights_stay_zero(tmp_path: Path) -> None:
    model = fresh()
    names = ("blocks.0.ff_in.weight", "embedding.weight")
    masks = {name: torch.rand(model.get_parameter(name).shape) < 0.5 for name in names}
    with pytest.raises(KeyboardInterrupt):
        train(model, dying_at(13), loss, OPTIONS, folder=tmp_path, masks=masks)
    train(model, batches, loss, OPTIONS, folder=tmp_path, masks=masks)
    order = [name for name, p in model.named_parameters() if p.ndim >= 2]
    state = torch.load(tmp_path / "training.pt", weights_only=True)["optimizer"]["state"]
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert bool((weight[~mask] == 0).all())
        assert bool((weight[mask] != 0).all())
        for moment in ("exp_avg", "exp_avg_sq"):
            assert bool((state[order.index(name)][moment][~mask] == 0).all())


def test_what_is_no_function_is_refused_before_any_work(tmp_path: Path) -> None:
    options, folder = TrainOptions(steps=1, lr=0.1), tmp_path / "run"
    with pytest.raises(ValueError, match="batches: expected a function, got list"):
        train(fresh(), [batches(0)], loss, options, folder=folder)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss: expected a function, got NoneType"):
        train(fresh(), batches, None, options, folder=folder)  # type: ignore[arg-type]
    assert not folder.exists()


def test_masks_that_fit_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="masks: expected names of parameters, got 'head'"):
        train(fresh(), batches, loss, OPTIONS, masks={"head": torch.ones(3, dtype=torch.bool)})
    message = r"masks\['norm.bias'\]: expected bool of shape \(32,\), got torch.float32 of shape"
    with pytest.raises(ValueError, match=message):
        train(fresh(), batches, loss, OPTIONS, masks={"norm.bias": torch.ones(32)})


def test_bf16_trains_in_float32_weights() -> None:
    model = fresh(0.0)
    history = train(model, batches, loss, TrainOptions(steps=60, lr=1e-2, bf16=True, log_every=20))
    assert history.losses[-1] <= 0.8 * history.losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, bad: float) -> None:
    model = fresh()

    def breaking(model: nn.Module, batch: Tensor) -> Tensor:
        return loss(model, batch) * (bad if torch.equal(batch, batches(12)) else 1.0)

    message = (
        rf"^loss: expected a finite number at step 12, got {bad} with lr 0\.00\d+; lower lr; "
        r".*training.pt of an earlier step stands$"
    )
    with pytest.raises(ValueError, match=message):
        train(model, batches, breaking, OPTIONS, folder=tmp_path)
    assert torch.load(tmp_path / "training.pt", weights_only=True)["step"] == 10
    assert sorted(x.name for x in tmp_path.iterdir()) == ["log.jsonl", "run.json", "training.pt"]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    def breaking(model: nn.Module, batch: Tensor) -> Tensor:
        return loss(model, batch) + (0.0 * model.norm.bias).sum().abs().sqrt()  # type: ignore

    model = fresh()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    options = TrainOptions(steps=2, lr=1e-3, bf16=True)
    message = "gradient norm: expected a finite number at step 0, got nan .* or turn bf16 off$"
    with pytest.raises(ValueError, match=message):
        train(model, batches, breaking, options)
    assert_same(dict(model.state_dict()), before)


def test_a_folder_of_other_options_is_refused(tmp_path: Path) -> None:
    train(fresh(), batches, loss, OPTIONS, folder=tmp_path)
    other = TrainOptions(**{**OPTIONS.__dict__, "lr": 1e-3})
    with pytest.raises(ValueError, match=r"expected a run with lr 0\.001, got 0\.003; choose"):
        train(fresh(), batches, loss, other, folder=tmp_path)
    calmer = TrainOptions(**{**OPTIONS.__dict__, "log_every": 10})
    train(fresh(), batches, loss, calmer, folder=tmp_path)
    state = (tmp_path / "training.pt").read_bytes()
    (tmp_path / "training.pt").write_bytes(state[: len(state) // 2])
    with pytest.raises(ValueError, match=r"training.pt: expected a whole training state"):
        train(fresh(), batches, loss, OPTIONS, folder=tmp_path)


def test_the_result_is_saved_with_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(LINES, 100, "char")
    model = TransformerLM(LMConfig.preset("tiny", tokenizer.vocab_size))
    train(model, lambda s: batches(s) % 9, loss, OPTIONS, folder=tmp_path, tokenizer=tokenizer)
    again, _, info = load_model(tmp_path, tokenizer=tokenizer)
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    assert info["extra"]["options"]["lr"] == OPTIONS.lr
    assert History(**info["extra"]["history"]).losses[-1] > 0


def test_progress_is_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    train(fresh(), batches, loss, OPTIONS, describe="small")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("small  step 3/20  loss 2.")
    train(fresh(), batches, loss, OPTIONS)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps: expected at least 0, got -1"),
        ({"lr": 0.0}, "lr: expected more than 0, got 0.0"),
        ({"clip": math.nan}, "clip: expected more than 0, got nan"),
        ({"accumulate": 0}, "accumulate: expected at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainOptions(**({"steps": 1, "lr": 1.0} | change))  # type: ignore[arg-type]


WORKER = """
import sys, torch
from pathlib import Path
from tests.test_loop import OPTIONS, batches, fresh, loss, validate
from prunelm.training.loop import train
import os
rank = int(os.environ["RANK"])
model = fresh(0.0)
masks = {"blocks.0.qkv.weight": torch.arange(96 * 32).view(96, 32) % 3 > 0}
train(model, lambda step: batches(step)[2 * rank : 2 * rank + 2], loss, OPTIONS,
      folder=Path(sys.argv[1]), validate=validate, masks=masks)
torch.save(model.state_dict(), Path(sys.argv[1]) / f"rank{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_are_one_with_the_joint_batch(tmp_path: Path) -> None:
    masks = {"blocks.0.qkv.weight": torch.arange(96 * 32).view(96, 32) % 3 > 0}
    alone = fresh(0.0)
    history = train(alone, batches, loss, OPTIONS, validate=validate, masks=masks)
    (tmp_path / "worker.py").write_text(WORKER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    root = str(Path(__file__).parents[1])
    workers = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "worker.py"), str(tmp_path)],
            env=os.environ
            | shared
            | {"RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
            cwd=root,
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    states = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    assert_same(*map(dict, states))
    for name, x in alone.state_dict().items():
        assert (x - states[0][name]).abs().max() <= 1e-4, name
    assert bool((states[0]["blocks.0.qkv.weight"][~masks["blocks.0.qkv.weight"]] == 0).all())
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses == pytest.approx(history.losses, abs=1e-5)
