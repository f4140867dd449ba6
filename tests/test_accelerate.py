"""Accelerated models compute what the models compute, whatever their code asks of its linears."""

import copy
import io
import pickle
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from prunelm import accelerate
from prunelm.decoding.row_independent import row_independent
from prunelm.nn import BlockSparseLinear, LowRankLinear, PackedLowRankLinear, is_accelerated

SPARSE = 0.2  # share of the blocks that stay


def zeroed(model: nn.Module) -> nn.Module:
    """The model with most 16 x 4 blocks of its linears at zero, so that kernels win."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight.dim() == 2:
                N, K = module.weight.shape
                mask = torch.rand(-(-N // 16), -(-K // 4)) < SPARSE
                full = mask.repeat_interleave(16, 0).repeat_interleave(4, 1)[:N, :K]
                if "weight" in module._parameters:
                    module.weight *= full
    return model.eval()


class ReadsWeights(nn.Module):
    """Reads what a linear has, instead of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.low = LowRankLinear(64, 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        fc = self.fc
        assert (fc.in_features, fc.out_features) == (64, 64)
        assert fc.weight.device == x.device and fc.bias.dtype == fc.weight.dtype
        assert fc.weight.shape == (64, 64) and fc.weight.size(1) == 64
        y = F.linear(x.to(fc.weight.dtype), fc.weight, fc.bias)
        y = y + x @ fc.weight.t() + x @ (2 * fc.weight) - x @ fc.weight[:, :].T
        y = y + torch.addmm(fc.bias, x.flatten(0, -2), fc.weight.T).view(y.shape)
        y = (
            y
            + F.linear(x, self.low.weight, self.low.bias)
            + fc.weight.std() * (fc.weight / 2).sum()
        )
        return y + fc(x) + self.low(x) + torch.cat([fc.weight, fc.weight]).abs().mean()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 64)
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 64, bias=False)
        self.two.weight = self.one.weight
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.abs().mul(100).long() % 64
        return self.head(self.two(self.one(self.embedding(tokens[..., 0]) + x)))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.again = self.first
        self.layers = nn.ModuleList([self.first, nn.ReLU(), self.first])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.again(x) + self.first(x)


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(64, 4, 128, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(1))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Transformer(64, 4, 2, 2, 128, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(1))


class Padded(nn.Module):
    """An encoder with padding: torch's fast path makes a nested tensor of it."""

    def __init__(self, change: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        if change >= 0:
            self.encoder.layers[change].linear1 = LowRankLinear(64, 128, 4)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[-1, -1:] = True
        return self.encoder(x, src_key_padding_mask=padding)[:, :-1]


class Attention(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(64, 64, batch_first=True), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0])


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(64, 64)), nn.Linear(64, 64))


def masked_by_torch() -> nn.Module:
    linear = nn.Linear(64, 64)
    prune.l1_unstructured(linear, "weight", 0.5)
    return nn.Sequential(linear)


def normed_by_a_hook() -> nn.Module:
    linear = nn.utils.weight_norm(nn.Linear(64, 64))
    linear(torch.randn(1, 64))  # its weight is a computed tensor now, which deepcopy refuses
    return nn.Sequential(linear)


def overridden() -> nn.Module:
    linear = nn.Linear(64, 64)
    linear.forward = lambda x: x + 1
    return nn.Sequential(linear)


def quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(64, 64)), {nn.Linear})


def with_a_buffer() -> nn.Module:
    linear = nn.Linear(64, 64)
    linear.register_buffer("scale", torch.ones(3))
    return nn.Sequential(linear)


MODELS = {
    "encoder-layer": lambda: nn.TransformerEncoderLayer(64, 4, 128),
    "encoder-layer-batch-first": lambda: nn.TransformerEncoderLayer(64, 4, 128, batch_first=True),
    "encoder-layer-gelu": lambda: nn.TransformerEncoderLayer(
        64, 4, 128, activation="gelu", norm_first=True, batch_first=True
    ),
    "encoder-layer-no-bias": lambda: nn.TransformerEncoderLayer(
        64, 4, 128, bias=False, batch_first=True
    ),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2
    ),
    "encoder-padded": lambda: Padded(-1),
    "encoder-padded-rank-in-first": lambda: Padded(0),
    "encoder-padded-rank-in-second": lambda: Padded(1),
    "decoder-layer": Decoder,
    "transformer": Whole,
    "attention": Attention,
    "attention-other-keys": lambda: Attention(kdim=64, vdim=64, add_bias_kv=True),
    "lstm": Recurrent,
    "weights-read": ReadsWeights,
    "tied": Tied,
    "shared": Shared,
    "subclass": lambda: nn.Sequential(Doubling(64, 64)),
    "parametrized": parametrized,
    "spectral-norm": spectral,
    "weight-norm-hook": normed_by_a_hook,
    "torch-prune": masked_by_torch,
    "own-forward": overridden,
    "quantized": quantized,
    "own-buffer": with_a_buffer,
    "bilinear": lambda: nn.Sequential(nn.Linear(64, 64), nn.Identity()),
    "linear": lambda: nn.Linear(64, 64),
    "module-dict": lambda: nn.Sequential(*nn.ModuleDict({"a": nn.Linear(64, 64)}).values()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("name", MODELS)
def test_accelerated_modules_compute_the_same(name: str, grad: bool) -> None:
    model = zeroed(MODELS[name]())
    x = torch.randn(3, 5, 64)
    with torch.set_grad_enabled(grad):
        expected = model(x)
        for dense in (None, True, False):
            fast = accelerate(model, dense=dense)
            again = accelerate(fast, dense=dense)
            for each in (fast, again, copy.deepcopy(fast)):
                error = (each(x) - expected).abs().max()
                assert error <= 2e-5 * expected.abs().max().clamp_min(1)
    assert not is_accelerated(model)


def test_kernels_run_in_torchs_encoder_layer() -> None:
    """The fused path would read the weights past them."""
    layer = zeroed(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True))
    fast = accelerate(nn.TransformerEncoder(layer, 1), dense=True)
    calls = []
    fast.layers[0].linear1.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        fast(torch.randn(2, 3, 64))
    assert calls == [1]
    assert isinstance(fast.layers[0].linear1, BlockSparseLinear)
    assert layer.activation_relu_or_gelu == 1


def test_hooks_keep_firing_and_notes_stay() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].register_forward_hook(lambda module, args, y: y + 1)
    model[1].note = "mine"
    expected = model(torch.ones(1, 64))
    fast = accelerate(model, dense=True)
    assert type(fast[0]) is nn.Linear and isinstance(fast[1], BlockSparseLinear)
    assert fast[1].note == "mine"
    assert (fast(torch.ones(1, 64)) - expected).abs().max() <= 1e-5
    model[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert type(accelerate(model, dense=True)[1]) is nn.Linear


def test_a_module_in_two_places_stays_one() -> None:
    fast = accelerate(zeroed(Shared()), dense=True)
    assert isinstance(fast.first, BlockSparseLinear)
    assert fast.first is fast.again is fast.layers[0] is fast.layers[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = zeroed(nn.Sequential(nn.Linear(64, 48), nn.GELU(), LowRankLinear(48, 64, 4))).to(dtype)
    fast, x = accelerate(model, dense=True), torch.randn(3, 64, dtype=dtype)
    assert isinstance(fast[0], BlockSparseLinear) and fast(x).dtype == dtype
    tolerance = 1e-10 if dtype == torch.float64 else 3e-2
    assert (fast(x) - model(x)).abs().max() <= tolerance


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(8, 4, device="meta"),
        lambda: LowRankLinear(8, 4, 2, device="meta"),
        lambda: nn.LazyLinear(4),
        lambda: nn.Linear(8, 4, dtype=torch.complex64),
        lambda: nn.Linear(8, 4).to(torch.float8_e4m3fn),
        lambda: nn.Linear(0, 4),
        lambda: nn.Linear(4, 0),
    ],
    ids=["meta", "meta-rank", "lazy", "complex", "float8", "no-inputs", "no-outputs"],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_no_kernel_takes_stays(make) -> None:
    (kept,) = accelerate(nn.Sequential(make()), dense=True)
    assert type(kept) is type(make())
    if kept.in_features == 0 or kept.out_features == 0:
        assert kept(torch.ones(2, kept.in_features)).shape == (2, kept.out_features)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 3, 4, 64)], ids=str)
def test_rows_of_any_shape(shape: tuple[int, ...]) -> None:
    model = zeroed(nn.Sequential(nn.Linear(64, 48), LowRankLinear(48, 20, 3)))
    x = torch.randn(shape)
    y = accelerate(model, dense=True)(x)
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)


def test_accelerated_models_are_copied_saved_and_read() -> None:
    model = zeroed(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), LowRankLinear(48, 64, 3)))
    fast, x = accelerate(model, dense=True), torch.randn(3, 64)
    assert isinstance(fast[2], PackedLowRankLinear)
    other = accelerate(zeroed(copy.deepcopy(model)), dense=True)
    other.load_state_dict(fast.state_dict())
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(file, weights_only=False),
        other,
    ):
        assert torch.equal(twin(x), fast(x))


@pytest.mark.filterwarnings("ignore")
def test_wrapped_models_are_accelerated_and_scripts_refused() -> None:
    model, x = zeroed(nn.Sequential(nn.Linear(64, 48), nn.ReLU())), torch.randn(3, 64)
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        fast = accelerate(wrapped, dense=True)
        assert is_accelerated(fast)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="model: expected a module, got a script of one"):
        accelerate(torch.jit.script(model))


@pytest.mark.filterwarnings("ignore")
def test_accelerated_models_are_traced_and_exported() -> None:
    model = zeroed(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), LowRankLinear(48, 64, 3)))
    x, other = torch.randn(3, 64), torch.randn(3, 64)
    for each in (model, accelerate(model), accelerate(model, dense=True)):
        traced = torch.jit.trace(each, x)
        program = torch.export.export(each, (x,))
        for twin in (traced, program.module()):
            torch.testing.assert_close(twin(other), each(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["weights-read", "encoder-layer-batch-first", "encoder-padded"])
def test_models_in_a_search_compute_the_same(name: str) -> None:
    model, x = zeroed(MODELS[name]()), torch.randn(3, 5, 64)
    hooked = nn.Sequential(nn.Linear(64, 64), model)
    hooked[0].register_forward_hook(lambda module, args, y: y + 1)
    with torch.no_grad():
        torch.testing.assert_close(row_independent(hooked)(x), hooked(x), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["weights-read", "encoder-layer-batch-first"])
def test_modules_that_read_weights_compile_and_export(name: str) -> None:
    fast, x = accelerate(zeroed(MODELS[name]()), dense=True), torch.randn(3, 5, 64)
    torch._dynamo.reset()
    with torch.no_grad():
        for twin in (
            torch.compile(fast, fullgraph=True, backend="aot_eager"),
            torch.export.export(fast, (x,)).module(),
        ):
            torch.testing.assert_close(twin(x), fast(x), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (None, "model: expected a torch.nn.Module, got NoneType"),
        ("runs/lm", "model: expected a torch.nn.Module, got str"),
        (
            types.SimpleNamespace(model=nn.Linear(2, 2)),
            "model: expected a torch.nn.Module, got SimpleNamespace; accelerate its .model",
        ),
    ],
)
def test_only_modules_are_accelerated(model: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}$"):
        accelerate(model)
