"""Models inside torch's wrappers are trained, saved and pruned as they are, or refused at once."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelm import Finetune, Heads, Incremental, Magnitude, Neurons, Pruner, Taylor
from prunelm.data.tokenizer import Tokenizer
from prunelm.models.lm import LMConfig, TransformerLM
from prunelm.pruning.calibration import samples_in
from prunelm.training.batches import batch_digest
from prunelm.training.checkpoint import load_model
from prunelm.training.distill import distilled_from
from prunelm.training.loop import TrainOptions, train

TOKENIZER = Tokenizer.train(["a cab fed a bad bee", "dead beef"], 20, "char")
OPTIONS = TrainOptions(steps=3, lr=1e-2, warmup=1)


def fresh() -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(LMConfig.preset("tiny", TOKENIZER.vocab_size))


def data(step: int) -> Tensor:
    return torch.randint(8, (4, 9), generator=torch.Generator().manual_seed(step))


def loss(model: nn.Module, rows: Tensor) -> Tensor:
    logits = model(rows[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def never(step: int) -> Tensor:
    raise AssertionError("asked for data")


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def test_a_compiled_model_is_trained_and_saved_as_what_is_inside(tmp_path: Path) -> None:
    plain, inner = fresh(), fresh()
    train(plain, data, loss, OPTIONS)
    calls = []
    inner.register_forward_pre_hook(lambda *_: calls.append(1))
    wrapped = compiled(inner)
    train(wrapped, data, loss, OPTIONS, folder=tmp_path, tokenizer=TOKENIZER)
    saved = load_model(tmp_path)[0].state_dict()
    assert saved.keys() == plain.state_dict().keys()
    for name, x in plain.state_dict().items():
        assert float((saved[name] - x).abs().max()) <= 1e-6
    assert calls and not inner.training and not wrapped.training
    again = fresh()  # the run goes on without the wrapper, and the other way round
    train(again, never, loss, OPTIONS, folder=tmp_path, tokenizer=TOKENIZER)
    assert torch.equal(again.embedding.weight, inner.embedding.weight)


def test_what_torch_compile_made_is_what_runs() -> None:
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.append(graph)
        return graph.forward

    train(torch.compile(fresh(), backend=backend), data, loss, OPTIONS)
    assert seen


@pytest.mark.parametrize("outer", ["compile", "ddp", "both"])
def test_wrapped_models_are_pruned_as_what_is_inside(alone: Any, outer: str) -> None:
    model: nn.Module = fresh()
    work = Pruner(Heads() | Neurons(), Taylor(batches=2), recovery=Finetune(steps=2))
    expected = work.run(model, "70%", data)
    wrapped = nn.parallel.DistributedDataParallel(model) if outer != "compile" else model
    wrapped = compiled(wrapped) if outer != "ddp" else wrapped
    result = work.run(wrapped, "70%", data)
    assert type(result.model) is TransformerLM
    state = result.model.state_dict()
    assert all(torch.equal(state[n], x) for n, x in expected.model.state_dict().items())
    assert work.plan(wrapped, "70%", data).size == result.size


def test_ddp_is_trained_as_what_is_inside(alone: Any, tmp_path: Path) -> None:
    plain, inner = fresh(), fresh()
    train(plain, data, loss, OPTIONS)
    wrapped = nn.parallel.DistributedDataParallel(inner)
    train(wrapped, data, loss, OPTIONS, folder=tmp_path / "out", tokenizer=TOKENIZER)
    saved = load_model(tmp_path / "out")[0].state_dict()
    assert all(torch.equal(saved[name], x) for name, x in plain.state_dict().items())


class FSDPModule:
    """Named like the class that torch's fully_shard puts among a module's."""


def sharded() -> nn.Module:
    model = fresh()
    model.blocks[0].__class__ = type("FSDPBlock", (FSDPModule, type(model.blocks[0])), {})
    return model


def partly_compiled() -> nn.Module:
    model = fresh()
    model.blocks[1] = compiled(model.blocks[1])
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.DataParallel(fresh()), "got DataParallel;"),
        (lambda: compiled(nn.DataParallel(fresh())), "got DataParallel;"),
        (sharded, r"got blocks\.0 in FSDPModule;"),
        (partly_compiled, r"got blocks\.1 in torch\.compile;"),
    ],
    ids=["data-parallel", "compiled-data-parallel", "fsdp", "partly-compiled"],
)
def test_other_wrappers_are_refused_before_any_work(make: Any, said: str, tmp_path: Path) -> None:
    message = rf"^model: expected a plain one, or one in torch\.compile or .* {said} hand over"
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        train(make(), never, loss, OPTIONS, folder=out)
    work = Pruner(Neurons())
    with pytest.raises(ValueError, match=message):
        work.run(make(), "70%", never, folder=out)
    with pytest.raises(ValueError, match=message):
        work.plan(make(), "70%", never)
    assert not out.exists()


def test_what_cannot_be_saved_is_refused_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "out"
    own = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="model: expected a TransformerLM or a Transducer, got Li"):
        train(own, never, loss, OPTIONS, folder=out, tokenizer=TOKENIZER)
    other = Tokenizer.train(["ab"], 20, "char")
    message = f"tokenizer: expected the model's {TOKENIZER.vocab_size} ids, got {other.vocab_size}"
    with pytest.raises(ValueError, match=message):
        train(fresh(), never, loss, OPTIONS, folder=out, tokenizer=other)
    with pytest.raises(ValueError, match=message):
        Pruner(Neurons()).run(fresh(), "70%", never, folder=out, tokenizer=other)
    assert not out.exists()


@dataclass
class Rows:
    name: str
    scale: float
    rows: Tensor


class Slotted:
    __slots__ = ("empty", "rows")

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows


BATCHES = {
    "dict": (lambda x: {"lang": "en", "n": 3, "x": {"rows": x}}, lambda b: b["x"]["rows"]),
    "dataclass": (lambda x: Rows("a", 0.5, x), lambda b: b.rows),
    "slots": (Slotted, lambda b: b.rows),
    "list": (lambda x: ["en", [x, 1]], lambda b: b[1][0]),
    "nested": (lambda x: ({"y": [None, Rows("a", 1.0, x)]}, 3), lambda b: b[0]["y"][1].rows),
    "array": (lambda x: {"x": x.numpy()}, lambda b: torch.from_numpy(b["x"])),
}


@pytest.mark.parametrize("name", BATCHES)
def test_any_batch_that_the_loss_takes_is_pruned_and_trained_with(name: str) -> None:
    """Batches of unequal size weigh as their rows do, however they are packed."""
    pack, rows_of = BATCHES[name]

    def uneven(step: int) -> Tensor:
        return data(step)[: 1 + step % 4]

    work = Pruner(Neurons(), Taylor(batches=4), Incremental(2), Finetune(steps=4))
    expected = work.run(fresh(), "80%", uneven, loss=loss)
    result = work.run(
        fresh(), "80%", lambda step: pack(uneven(step)), loss=lambda m, b: loss(m, rows_of(b))
    )
    state = result.model.state_dict()
    assert all(torch.equal(state[n], x) for n, x in expected.model.state_dict().items())
    assert samples_in(pack(uneven(2))) == 3


def test_batches_without_a_tensor_weigh_one() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert [samples_in(x) for x in ({}, ["text"], 3, None, torch.tensor(2.0), loop)] == [1] * 6
    assert samples_in(torch.zeros(5)) == samples_in(torch.zeros(5, 4, 3)) == 5
    assert samples_in(torch.zeros(5, 4)) == 15


def test_distillation_needs_tokens() -> None:
    lost = distilled_from(fresh())
    with pytest.raises(ValueError, match=r"^distill: expected batches of token ids .*, got dict$"):
        lost(fresh(), {"rows": data(0)})
    with pytest.raises(ValueError, match=r"got \[4\]$"):
        lost(fresh(), torch.zeros(4))


def test_facts_of_the_caller_are_kept(tmp_path: Path) -> None:
    facts = {"text": {"digest": "abc", "name": "a.txt"}}
    other = {"text": {"digest": "def", "name": "b.txt"}}
    message = r"expected a run with text digest def \(b.txt\), got digest abc \(a.txt\); choose"
    train(fresh(), data, loss, OPTIONS, folder=tmp_path / "lm", facts=facts)
    with pytest.raises(ValueError, match=message):
        train(fresh(), never, loss, OPTIONS, folder=tmp_path / "lm", facts=other)
    for criterion in (Magnitude(), Taylor(batches=1)):
        work, folder = Pruner(Neurons(), criterion), tmp_path / type(criterion).__name__
        work.run(fresh(), "80%", data, folder=folder, facts=facts)
        with pytest.raises(ValueError, match=message):
            work.run(fresh(), "80%", never, folder=folder, facts=other)
        with pytest.raises(ValueError, match="expected a run with loss loss, got own_loss"):
            work.run(fresh(), "80%", never, loss=loss, folder=folder, facts=facts)


def test_other_masks_losses_and_frozen_weights_are_another_run(tmp_path: Path) -> None:
    masks = {"blocks.0.ff_in.weight": torch.arange(64 * 32).view(64, 32) % 3 > 0}
    train(fresh(), data, loss, OPTIONS, folder=tmp_path, masks=masks)
    train(fresh(), never, loss, OPTIONS, folder=tmp_path, masks=masks)
    changed = {name: ~mask for name, mask in masks.items()}
    for given in (changed, None):
        with pytest.raises(ValueError, match=r"expected a run with masks \w+, got \w+"):
            train(fresh(), never, loss, OPTIONS, folder=tmp_path, masks=given)
    frozen = fresh()
    frozen.embedding.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"expected a run with weights \w+, got"):
        train(frozen, never, loss, OPTIONS, folder=tmp_path, masks=masks)
    with pytest.raises(ValueError, match=r"expected a run with validation True, got False"):
        train(fresh(), never, loss, OPTIONS, folder=tmp_path, masks=masks, validate=lambda m: 1.0)


def test_a_run_holds_its_folder(tmp_path: Path) -> None:
    """A run within the run would write to the same files; a thread stands for another process."""
    import threading

    caught: list[str] = []
    calls = [lambda: train(fresh(), never, loss, OPTIONS, folder=tmp_path / "a")]

    def intrude() -> None:
        for call in calls:
            try:
                call()
            except ValueError as error:
                caught.append(str(error))

    def watching(step: int) -> Tensor:
        if step == 1:
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()
        return data(step)

    train(fresh(), watching, loss, OPTIONS, folder=tmp_path / "a")
    assert len(caught) == 1 and caught[0].startswith(f"{tmp_path / 'a'}: expected a folder that no")
    caught.clear()
    calls[:] = [lambda: Pruner(Neurons(), Magnitude()).run(fresh(), "80%", folder=tmp_path / "b")]
    Pruner(Neurons(), Taylor(batches=2)).run(fresh(), "70%", watching, folder=tmp_path / "b")
    assert any(f"{tmp_path / 'b'}: expected a folder that no" in each for each in caught)


@pytest.mark.parametrize("pack", [lambda x: x, lambda x: {"rows": x, "lang": "en"}])
def test_other_batches_are_another_run_whoever_calls(tmp_path: Path, pack: Any) -> None:
    """Also where the caller records nothing."""

    def rows(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch["rows"] if isinstance(batch, dict) else batch)

    def stopping(at: int) -> Any:
        def call(step: int) -> Any:
            if step == at:
                raise KeyboardInterrupt
            return pack(data(step))

        return call

    def other(step: int) -> Any:
        return pack(data(step + 100))

    options = TrainOptions(steps=6, lr=1e-2, warmup=1, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), stopping(5), rows, options, folder=tmp_path / "lm")
    message = r"expected a run with batch \d of digest \w{12}, got \w{12}: .* remove this one$"
    with pytest.raises(ValueError, match=message):
        train(fresh(), other, rows, options, folder=tmp_path / "lm")
    train(fresh(), stopping(99), rows, options, folder=tmp_path / "lm")
    with pytest.raises(ValueError, match=message):  # longer, and with other batches
        train(fresh(), other, rows, replace(options, steps=9), folder=tmp_path / "lm")
    for criterion in (Magnitude(), Taylor(batches=1)):
        work = Pruner(Neurons(), criterion, Incremental(2), Finetune(steps=6))
        folder = tmp_path / type(criterion).__name__
        with pytest.raises(KeyboardInterrupt):
            work.run(fresh(), "70%", stopping(3), loss=rows, folder=folder)
        with pytest.raises(ValueError, match=message):
            work.run(fresh(), "70%", other, loss=rows, folder=folder)
        work.run(fresh(), "70%", stopping(99), loss=rows, folder=folder)
        work.run(fresh(), "70%", never, loss=rows, folder=folder)


def test_a_digest_changes_with_anything_in_a_batch() -> None:
    made = [
        data(0), data(1), data(0).int(), data(0)[:2], data(0).bfloat16(), {"x": data(0), "y": "a"},
        {"x": data(0), "y": "b"}, Rows("a", 0.5, data(0)), Rows("a", 0.25, data(0)),
        torch.tensor(3), torch.zeros(0, 3), [data(0).numpy(), 2],
    ]  # fmt: skip
    assert len({batch_digest(batch) for batch in made}) == len(made)
    assert batch_digest(data(0)) == batch_digest(data(0).t().contiguous().t())
