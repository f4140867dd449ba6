"""A graphed step equals the plain one, and nothing in a step on a GPU waits for the device."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prunelm.models.cuda_graph import CudaGraphLM, power_of_two
from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
from prunelm.nn import BlockSparseLinear

VOCABULARY, BLOCK = 50, 16
FORMS = ("dense", "block-sparse", "low-rank", "heads-and-neurons")


def model_of(form: str) -> TransformerLM:
    """A small model as pruning leaves it; on the CPU."""
    torch.manual_seed(1)
    config = LMConfig.preset("tiny", VOCABULARY)
    if form == "low-rank":
        values = {**config.to_dict(), "ranks": dict.fromkeys(config.linears(), 8)}
        return TransformerLM(LMConfig.from_dict(values)).eval()
    if form == "heads-and-neurons":
        layers = (LayerSizes(1, 48), LayerSizes(0, 16), LayerSizes(2, 0))
        return TransformerLM(LMConfig(VOCABULARY, 32, 16, layers)).eval()
    model = TransformerLM(config).eval()
    return with_blocks(model) if form == "block-sparse" else model


def with_blocks(model: TransformerLM) -> TransformerLM:
    """Every linear of the blocks as a block-sparse one, half of its blocks kept."""
    for block in model.blocks:
        for name, linear in list(block.named_children()):
            if isinstance(linear, nn.Linear):
                rows, cols = linear.out_features // BLOCK, linear.in_features // BLOCK
                mask = torch.arange(rows * cols).view(rows, cols) % 2 == 0
                new = BlockSparseLinear.from_linear(linear, (BLOCK, BLOCK), mask)
                setattr(block, name, new)
    return model


def batches(g: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Nodes of a tree, level by level: sizes grow and shrink, paths get longer."""
    slots = [[i] for i in range(3)]
    used = 3
    tokens = torch.randint(VOCABULARY, (3,), generator=g)
    yield tokens, torch.tensor(slots), torch.ones(3, dtype=torch.int64)
    for width in (9, 2, 1, 7, 5):
        before = slots
        chosen = torch.randint(len(slots), (width,), generator=g).tolist()
        slots = [[*slots[c], used + i] for i, c in enumerate(chosen)]
        used += width
        if width == 5:  # a slot that the last call filled, from a row that this one pads
            slots[0][-1] = before[6][-1]
        P = len(slots[0]) + 2
        path = torch.tensor([s + [0] * (P - len(s)) for s in slots])
        tokens = torch.randint(VOCABULARY, (width,), generator=g)
        yield tokens, path, torch.tensor([len(s) for s in slots])


def assert_equal_steps(model: TransformerLM, device: str, tolerance: float) -> None:
    model = copy.deepcopy(model).to(device)
    graphed, capacity = CudaGraphLM(model), 40
    plain_cache, cache = model.new_cache(capacity), graphed.new_cache(capacity)
    for i, batch in enumerate(batches(torch.Generator().manual_seed(2))):
        if i == 3:  # more slots, as a search that grows asks for them
            every = torch.arange(capacity)
            plain_cache = plain_cache.select(every, 64)
            cache = cache.select(every, 64)
            assert cache.capacity == 64
        with torch.no_grad():
            expected = model.step(*(t.to(device) for t in batch), plain_cache)
        got = graphed.step(*batch, cache)
        assert got.shape == expected.shape
        assert bool((got - expected).abs().max() <= tolerance), i
    keys = zip(cache.inner.key, plain_cache.key, strict=True)
    assert all(bool((a[:-1] - b).abs().max() <= tolerance) for a, b in keys if a.shape[1])


@pytest.mark.parametrize("form", FORMS)
def test_padded_steps_equal_plain_ones(form: str) -> None:
    assert_equal_steps(model_of(form), "cpu", 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_replays_equal_plain_steps(form: str) -> None:
    torch.use_deterministic_algorithms(False)  # a graph cannot hold what that warns of
    try:
        assert_equal_steps(model_of(form), "cuda", 1e-4)
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.mark.gpu
def test_weights_updated_in_place_are_seen() -> None:
    torch.use_deterministic_algorithms(False)
    try:
        model = model_of("dense").to("cuda")
        graphed = CudaGraphLM(model)
        cache = graphed.new_cache(4)
        batch = (torch.tensor([1]), torch.tensor([[0]]), torch.tensor([1]))
        before = graphed.step(*batch, cache)
        with torch.no_grad():
            model.blocks[0].ff_in.weight.mul_(3)
        after = graphed.step(*batch, cache)
        assert not torch.equal(before, after)
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


class OnDevice(TorchDispatchMode):
    """Refuses what a graph cannot hold: a tensor of the CPU, for which the device would wait.

    On the meta device, where tensors have no data, whatever asks for a value or for a shape that
    depends on one fails by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += 1
        for tensor in (*args, out):
            assert not isinstance(tensor, Tensor) or tensor.device.type == "meta", func
        return out


def step_without_data(model: TransformerLM) -> int:
    """A step on the meta device; how many ops it was."""
    model = model.to("meta")
    cache = model.new_cache(64)
    tokens, length = (torch.ones(8, dtype=torch.int64, device="meta") for _ in range(2))
    path = torch.zeros(8, 16, dtype=torch.int64, device="meta")
    with torch.no_grad(), OnDevice() as seen:
        logits = model.step(tokens, path, length, cache)
    assert logits.shape == (8, VOCABULARY)
    return seen.count


@pytest.mark.parametrize("form", FORMS)
def test_nothing_in_a_step_waits_for_the_device(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Unknown for the meta device. The ops themselves are traced in test_gpu_cost.py.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    assert step_without_data(model_of(form)) > 20


@pytest.mark.parametrize(
    "waits",
    [
        pytest.param(lambda x: x * float(x.sum()), id="value"),
        pytest.param(lambda x: x + x[x > 0].sum(), id="shape"),
        pytest.param(lambda x: x + torch.ones(1).to(x.device), id="copy"),
    ],
)
def test_what_waits_would_be_seen(waits: Any) -> None:
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = waits(x)
            return y

    model = model_of("dense")
    model.blocks[0].activation = Waits()
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        step_without_data(model)


def test_a_step_may_be_captured_in_inference_mode_and_used_outside() -> None:
    graphed = CudaGraphLM(model_of("dense"))
    batch = (torch.tensor([1]), torch.tensor([[0]]), torch.tensor([1]))
    with torch.inference_mode():
        cache = graphed.new_cache(4)
        first = graphed.step(*batch, cache)
    graphed = CudaGraphLM(model_of("dense"))
    cache = graphed.new_cache(4)
    with torch.inference_mode():
        graphed.step(*batch, cache)
    second = graphed.step(torch.tensor([1]), *batch[1:], cache)
    assert torch.equal(first, second)


def test_sizes_are_powers_of_two() -> None:
    assert [power_of_two(n) for n in (0, 1, 2, 3, 16, 17)] == [1, 1, 2, 4, 16, 32]


def test_a_graphed_model_fuses_like_a_plain_one() -> None:
    from prunelm.decoding.fusion import Fusion, LMRows
    from prunelm.decoding.prefix_tree import NewRows

    model = model_of("dense")
    rows = [LMRows(Fusion(lm, 0.3), VOCABULARY) for lm in (model, CudaGraphLM(model))]
    with torch.inference_mode():
        for i, (tokens, path, length) in enumerate(batches(torch.Generator().manual_seed(3))):
            place = path.gather(1, length[:, None] - 1)[:, 0]
            new = NewRows(tokens=tokens, path=path, length=length, place=place)
            for one in rows:
                one.compute(new, 40 if i < 3 else 600)  # the second grows the cache
            error = (rows[0].rows[place] - rows[1].rows[place]).abs().max()
            assert bool(error <= 1e-5)
