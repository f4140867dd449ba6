"""Modules of another make: pruned from a description of their names, saved, filled, accelerated."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_compact import masked
from torch import Tensor, nn

from prunelm import (
    Architecture,
    Blocks,
    Elements,
    Heads,
    LowRank,
    Magnitude,
    Neurons,
    Pruner,
    accelerate,
    count_parameters,
    load_result,
)
from prunelm.pruning.compact import remove

V, DIM = 23, 24
TOKENS = torch.randint(V, (3, 8), generator=torch.Generator().manual_seed(1))


class FusedAttention(nn.Module):
    """As in GPT-2, also with fewer key and value heads."""

    def __init__(self, heads: int = 4, kv: int = 4, head_dim: int = 6) -> None:
        super().__init__()
        self.n_head, self.kv_heads, self.inner = heads, kv, heads * head_dim
        self.c_attn = nn.Linear(DIM, (heads + 2 * kv) * head_dim)
        self.c_proj = nn.Linear(heads * head_dim, DIM)

    def forward(self, x: Tensor) -> Tensor:
        size = self.inner // self.n_head
        shapes = [self.n_head * size, self.kv_heads * size, self.kv_heads * size]
        q, k, v = (
            y.unflatten(-1, (-1, size)).transpose(1, 2) for y in self.c_attn(x).split(shapes, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    def __init__(self, heads: int = 4, kv: int = 4) -> None:
        super().__init__()
        self.wte = nn.Embedding(V, DIM)
        self.h = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(DIM),
                    "attn": FusedAttention(heads, kv),
                    "mlp": nn.Sequential(nn.Linear(DIM, 40), nn.GELU(), nn.Linear(40, DIM)),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(DIM, V, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("scale", torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) * self.scale
        for block in self.h:
            x = x + block["attn"](block["norm"](x))
            x = x + block["mlp"](block["norm"](x))
        return self.head(x)

    def loss(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


GPT_NAMES = Architecture(
    qkv="c_attn", out="c_proj", heads="n_head", widths=("inner",), feed_forwards=(("0", "2"),)
)


class LlamaBlock(nn.Module):
    def __init__(self, heads: int, kv: int, head_dim: int = 4) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.attention_norm, self.ffn_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.wq = nn.Linear(DIM, heads * head_dim, bias=False)
        self.wk = nn.Linear(DIM, kv * head_dim, bias=False)
        self.wv = nn.Linear(DIM, kv * head_dim, bias=False)
        self.wo = nn.Linear(heads * head_dim, DIM, bias=False)
        self.gate = nn.Linear(DIM, 36, bias=False)
        self.up = nn.Linear(DIM, 36, bias=False)
        self.down = nn.Linear(36, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        q, k, v = (
            w(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.wo(y.transpose(1, 2).flatten(2))
        y = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    loss = GPT.loss

    def __init__(self, heads: int = 6, kv: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, DIM)
        self.layers = nn.ModuleDict({str(i): LlamaBlock(heads, kv) for i in "ab"})
        self.lm_head = nn.Linear(DIM, V)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers.values():
            x = layer(x)
        return self.lm_head(x)


LLAMA_NAMES = Architecture(
    qkv=("wq", "wk", "wv"), out="wo", feed_forwards=(("gate", "up", "down"),)
)


class Encoder(nn.Module):
    loss = GPT.loss

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, DIM)
        layer = nn.TransformerEncoderLayer(DIM, 4, 40, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(DIM, V)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)))


ENCODER_NAMES = Architecture(feed_forwards=(("linear1", "linear2"),))


class Convolutions(nn.Module):
    """A feed-forward of two convolutions over time, and a chain of linears beside it."""

    loss = GPT.loss

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, DIM)
        self.first, self.second = nn.Conv1d(DIM, 32, 3, padding=1), nn.Conv1d(32, DIM, 1)
        self.chain = nn.Sequential(
            nn.Linear(DIM, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, V)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.second(self.first(x.transpose(1, 2)).relu()).transpose(1, 2)
        return self.chain(x)


CONVOLUTION_NAMES = Architecture(feed_forwards=(("first", "second"), ("0", "2"), ("2", "4")))

MODELS = {
    "gpt": (GPT, GPT_NAMES),
    "gpt-grouped": (lambda: GPT(4, 2), GPT_NAMES),
    "gpt-one-key-head": (lambda: GPT(4, 1), GPT_NAMES),
    "llama": (Llama, LLAMA_NAMES),
    "llama-as-many": (lambda: Llama(4, 4), LLAMA_NAMES),
    "llama-one-key-head": (lambda: Llama(5, 1), LLAMA_NAMES),
    "encoder": (Encoder, ENCODER_NAMES),
    "convolutions": (Convolutions, CONVOLUTION_NAMES),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(7)
    return MODELS[name][0]().eval()


def methods(name: str) -> dict:
    names = MODELS[name][1]
    found = {"neurons": Neurons(min_keep=1, architecture=names)}
    if name not in ("encoder", "convolutions"):
        found["heads"] = Heads(min_keep=0, architecture=names)
        found["heads+neurons"] = Heads(architecture=names) | Neurons(architecture=names)
        found["all"] = found["heads+neurons"] | LowRank(architecture=names)
    if name != "convolutions":
        found["ranks"] = LowRank(architecture=names)
    return found


CASES = [(name, method) for name in MODELS for method in methods(name)]


def data(step: int) -> Tensor:
    return torch.randint(V, (4, 9), generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize(("name", "method"), CASES)
def test_smaller_modules_compute_what_masked_ones_do(name: str, method: str) -> None:
    how, model = methods(name)[method], built(name)
    before = copy.deepcopy(model.state_dict())
    prepared = how.prepare(model)
    torch.testing.assert_close(prepared(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)
    groups = how.groups(prepared, {})
    assert groups
    generator, keep = torch.Generator().manual_seed(3), []
    for each in groups:
        kept = torch.rand(each.count, generator=generator) < 0.5
        kept[-1] = False
        kept[: each.min_keep] = True
        keep.append(kept)
    assert any(not bool(kept.all()) for kept in keep)
    smaller, _, _ = remove(prepared, groups, keep, {})
    expected = masked(prepared, groups, keep)(TOKENS)
    assert float((smaller(TOKENS) - expected).abs().max()) <= 1e-5
    assert type(smaller) is type(model)
    assert count_parameters(smaller) < count_parameters(model)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(("name", "method"), CASES)
def test_ladders_are_saved_filled_and_accelerated(name: str, method: str, tmp_path: Path) -> None:
    model, how = built(name), methods(name)[method]
    pruner = Pruner(how, Magnitude())
    least = pruner.plan(model, 1).smallest
    dense = count_parameters(model)
    targets = [least + (dense - least) * share // 100 for share in (80, 40, 0)]
    results = pruner.ladder(model, targets, folder=tmp_path / "run")
    again = pruner.ladder(model, targets, folder=tmp_path / "run")
    for result, resumed, target in zip(results, again, targets, strict=True):
        assert result.size == count_parameters(result.model) <= target
        expected = result.model(TOKENS)
        assert torch.equal(resumed.model(TOKENS), expected)
        result.save(tmp_path / "saved")
        for shell in (MODELS[name][0](), result.model):
            loaded = load_result(tmp_path / "saved", shell)
            assert torch.equal(loaded.model(TOKENS), expected)
            assert loaded.size == result.size and not loaded.model.training
        fast = accelerate(result.model, dense=True)
        torch.testing.assert_close(fast(TOKENS), expected, rtol=1e-4, atol=1e-5)
    assert results[-1].size <= least


def test_what_else_a_module_holds_stays() -> None:
    model = GPT().train().double()
    model.h[0].mlp[0].weight.requires_grad_(False)
    model.h[1].attn.c_proj.bias.requires_grad_(False)
    model.h[0].mlp[1].eval()
    calls = []
    model.h[0].mlp[0].register_forward_hook(lambda *args: calls.append(1))
    names = Heads(architecture=GPT_NAMES) | Neurons(architecture=GPT_NAMES)
    for method in (names, LowRank(architecture=GPT_NAMES)):
        prepared = method.prepare(model)
        groups = method.groups(prepared, {})
        keep = [torch.arange(each.count) < 2 for each in groups]
        smaller, _, _ = remove(prepared, groups, keep, {})
        calls.clear()
        smaller(TOKENS)
        assert calls == [1]
        assert smaller.head.weight is smaller.wte.weight is not model.wte.weight
        assert smaller.training and not smaller.h[0].mlp[1].training
        assert {t.dtype for t in smaller.state_dict().values()} == {torch.float64}
        frozen = {n for n, p in smaller.named_parameters() if not p.requires_grad}
        factors = {"h.0.mlp.0.up", "h.0.mlp.0.down"}
        weights = factors if isinstance(method, LowRank) else {"h.0.mlp.0.weight"}
        assert frozen == weights | {"h.1.attn.c_proj.bias"}
    first = names.groups(model, {})
    smaller, _, _ = remove(model, first, [torch.arange(each.count) < 2 for each in first], {})
    attention, linear = smaller.h[0].attn, smaller.h[0].mlp[2]
    assert (attention.n_head, attention.kv_heads, attention.inner) == (2, 2, 12)
    assert (linear.in_features, linear.out_features) == (2, DIM)
    assert (model.h[0].attn.n_head, model.h[0].attn.inner) == (4, 24)


def test_masks_need_no_description(tmp_path: Path) -> None:
    for method in (Elements(), Blocks(4, 4)):
        model = built("llama")
        result = Pruner(method, Magnitude()).run(model, "40%")
        result.save(tmp_path)
        assert not (tmp_path / "tokenizer.model").exists()
        loaded = load_result(tmp_path, Llama())
        assert loaded.masks.keys() == result.masks.keys()
        assert torch.equal(loaded.model(TOKENS), result.model(TOKENS))


def test_groups_of_query_heads_go_with_their_key_head() -> None:
    (first, _) = Heads(architecture=LLAMA_NAMES).groups(Llama(6, 3), {})
    assert first.count == 3 and first.cost.tolist() == [(2 + 1 + 1 + 2) * 4 * DIM] * 3
    (first, _) = Heads(architecture=GPT_NAMES).groups(GPT(4, 2), {})
    assert first.count == 2 and first.cost.tolist() == [(2 + 1 + 1) * 6 * (DIM + 1) + 12 * DIM] * 2


def test_a_single_key_head_stays_and_query_heads_go() -> None:
    for model, names, count, head_dim, bias in (
        (Llama(5, 1), LLAMA_NAMES, 5, 4, 0),
        (GPT(4, 1), GPT_NAMES, 4, 6, 1),
    ):
        (first, _) = Heads(architecture=names).groups(model, {})
        assert first.count == count
        assert first.cost.tolist() == [head_dim * (2 * DIM + bias)] * count


def test_saved_weights_are_refused_by_other_modules(tmp_path: Path) -> None:
    result = Pruner(Neurons(architecture=GPT_NAMES), Magnitude()).run(built("gpt"), "80%")
    result.save(tmp_path)
    with pytest.raises(ValueError, match="model: expected a module to fill with the weights in"):
        load_result(tmp_path)
    with pytest.raises(ValueError, match=r"model: expected .* under embed.weight, got nothing in"):
        load_result(tmp_path, Llama())
    small = GPT()
    small.wte = nn.Embedding(V - 1, DIM)
    small.head.weight = small.wte.weight
    with pytest.raises(ValueError, match=r"expected wte.weight of at least \(23, 24\), .*\(22, 24"):
        load_result(tmp_path, small)
