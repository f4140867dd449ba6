import copy
import json

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunelm.models.lm import KVCache, LayerSizes, LMConfig, TransformerLM

LAYERS = (LayerSizes(2, 50), LayerSizes(0, 7), LayerSizes(3, 0), LayerSizes(0, 0))
RAGGED = LMConfig(37, 24, 10, LAYERS)
TINY = LMConfig.preset("tiny", 29)


def noisy(config: LMConfig, dtype: torch.dtype = torch.float64) -> TransformerLM:
    """A model in which no bias is 0 and no norm is 1."""
    model = TransformerLM(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def reference(model: TransformerLM, line: Tensor) -> Tensor:
    """Logits [L, V] of one line [L] from the formulas, a position and a head at a time."""
    p = {name: x.detach().double() for name, x in model.state_dict().items()}
    config, length = model.config, len(line)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = x.mean(), x.var(unbiased=False)
        return (x - mean) / (variance + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def turn(x: Tensor, position: int) -> Tensor:
        half = config.head_dim // 2
        exponent = torch.arange(half, dtype=torch.float64) / half
        turned = torch.polar(torch.ones(half, dtype=torch.float64), position / 10000**exponent)
        product = torch.complex(x[:half], x[half:]) * turned
        return torch.cat([product.real, product.imag])

    x = [p["embedding.weight"][t] for t in line]
    for i, sizes in enumerate(config.layers):
        if sizes.heads:
            name, size = f"blocks.{i}", config.head_dim
            mixed = [torch.zeros(sizes.heads, size, dtype=torch.float64) for _ in x]
            rows = [
                p[f"{name}.qkv.weight"] @ norm(v, f"{name}.attention_norm") + p[f"{name}.qkv.bias"]
                for v in x
            ]
            for h in range(sizes.heads):
                parts = [r.view(3, sizes.heads, size)[:, h] for r in rows]
                for t in range(length):
                    query = turn(parts[t][0], t)
                    score = torch.stack([query @ turn(parts[s][1], s) for s in range(t + 1)])
                    weight = (score / size**0.5).softmax(0)
                    mixed[t][h] = sum(weight[s] * parts[s][2] for s in range(t + 1))
            out, bias = p[f"{name}.out.weight"], p[f"{name}.out.bias"]
            x = [v + out @ m.flatten() + bias for v, m in zip(x, mixed, strict=True)]
        if sizes.ff:
            name = f"blocks.{i}"
            for t, v in enumerate(x):
                h = p[f"{name}.ff_in.weight"] @ norm(v, f"{name}.ff_norm") + p[f"{name}.ff_in.bias"]
                h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
                x[t] = v + p[f"{name}.ff_out.weight"] @ h + p[f"{name}.ff_out.bias"]
    return torch.stack([p["embedding.weight"] @ norm(v, "norm") for v in x])


@pytest.mark.parametrize("config", [TINY, RAGGED], ids=["tiny", "ragged"])
def test_forward_is_the_formula(config: LMConfig) -> None:
    model = noisy(config)
    tokens = torch.randint(config.vocab_size, (3, 11))
    logits = model(tokens)
    for line, got in zip(tokens, logits, strict=True):
        error = (got - reference(model, line)).abs().max()
        assert error <= 1e-6  # the angles are float32


def test_loss_is_the_mean_over_next_tokens() -> None:
    model = noisy(TINY)
    tokens = torch.randint(29, (2, 8))
    log_probs = torch.stack([reference(model, line[:-1]) for line in tokens]).log_softmax(-1)
    wanted = -log_probs.gather(-1, tokens[:, 1:, None]).mean()
    assert (model.loss(tokens) - wanted).abs() <= 1e-6


def test_later_tokens_change_nothing_before_them() -> None:
    model = noisy(RAGGED)
    tokens = torch.randint(37, (1, 9))
    changed = tokens.clone()
    changed[0, 5] = (tokens[0, 5] + 1) % 37
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def random_tree(nodes: int, vocab: int) -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    """tokens [N], path [N, N] of scattered slots with junk past length, length [N], each line."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab, (nodes,), generator=generator)
    slot = torch.randperm(3 * nodes, generator=generator)[:nodes]
    path = torch.randint(3 * nodes, (nodes, nodes), generator=generator)
    ancestors: list[list[int]] = []
    for i in range(nodes):
        parent = int(torch.randint(-1, i, (), generator=generator)) if i else -1
        ancestors.append([*(ancestors[parent] if parent >= 0 else []), i])
        path[i, : len(ancestors[i])] = slot[ancestors[i]]
    length = torch.tensor([len(a) for a in ancestors])
    return tokens, path, length, [tokens[a].tolist() for a in ancestors]


def empty_cache(model: TransformerLM, capacity: int) -> KVCache:
    """A cache that shows when a slot is read that was never written."""
    cache = model.new_cache(capacity)
    for x in (*cache.key, *cache.value):
        x.fill_(1e30)
    return cache


@pytest.mark.parametrize("together", [True, False], ids=["one-call", "node-by-node"])
@pytest.mark.parametrize("config", [TINY, RAGGED], ids=["tiny", "ragged"])
def test_steps_on_a_tree_agree_with_forward(config: LMConfig, together: bool) -> None:
    model = noisy(config)
    tokens, path, length, lines = random_tree(17, config.vocab_size)
    cache = empty_cache(model, 51)
    if together:
        logits = model.step(tokens, path, length, cache)
    else:
        rows = [slice(i, i + 1) for i in range(17)]
        logits = torch.cat([model.step(tokens[r], path[r], length[r], cache) for r in rows])
    for line, got in zip(lines, logits, strict=True):
        error = (got - model(torch.tensor([line]))[0, -1]).abs().max()
        assert error <= 1e-10


def test_a_step_without_rows_is_empty() -> None:
    model = noisy(TINY)
    none = torch.zeros(0, dtype=torch.int64)
    logits = model.step(none, none.view(0, 3), none, model.new_cache(4))
    assert logits.shape == (0, 29)


def test_a_row_hardly_depends_on_the_others() -> None:
    model = noisy(TINY, torch.float32)
    tokens, path, length, _ = random_tree(17, 29)
    together = model.step(tokens, path, length, empty_cache(model, 51))
    cache = empty_cache(model, 51)
    rows = [slice(i, i + 1) for i in range(17)]
    alone = [model.step(tokens[r], path[r], length[r], cache) for r in rows]
    # Not bit for bit: torch's matmul chooses a kernel by the number of rows.
    assert (together - torch.cat(alone)).abs().max() <= 1e-5


def test_a_cache_moves_with_its_slots() -> None:
    model = noisy(TINY)
    line, other = torch.randint(29, (2, 5))
    cache = model.new_cache(10)
    model.step(line, torch.arange(5).repeat(5, 1), torch.arange(1, 6), cache)
    model.step(other, 5 + torch.arange(5).repeat(5, 1), torch.arange(1, 6), cache)
    moved = cache.select(torch.tensor([3, 1, 0, 7, 2]), capacity=9)
    assert moved.capacity == 9
    logits = model.step(line[4:], torch.tensor([[2, 1, 4, 0, 7]]), torch.tensor([5]), moved)
    assert (logits[0] - model(line[None])[0, -1]).abs().max() <= 1e-10
    with pytest.raises(ValueError, match="capacity: expected at least 4, got 3"):
        cache.select(torch.arange(4), capacity=3)


def test_low_rank_linears_are_their_products() -> None:
    ranks = {"blocks.0.qkv": 5, "blocks.1.ff_in": 0, "blocks.1.ff_out": 7}
    factored = noisy(LMConfig(29, 32, 16, TINY.layers, ranks=ranks), torch.float32)
    assert sum(p.numel() for p in factored.parameters()) == factored.config.parameter_count
    weights = factored.state_dict()
    for name in ranks:
        weights[f"{name}.weight"] = weights.pop(f"{name}.up") @ weights.pop(f"{name}.down")
    dense = TransformerLM(TINY).eval()
    dense.load_state_dict(weights)
    tokens = torch.randint(29, (2, 9))
    assert (factored(tokens) - dense(tokens)).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("name", "vocab_size", "low", "high"),
    [
        ("paper-20m", 500, 19_990_000, 20_000_000),
        ("paper-20m", 5000, 19_990_000, 20_000_000),
        ("small", 500, 2_900_000, 3_100_000),
        ("tiny", 29, 0, 20_000),
    ],
)
def test_presets_have_their_size(name: str, vocab_size: int, low: int, high: int) -> None:
    config = LMConfig.preset(name, vocab_size)
    with torch.device("meta"):
        model = TransformerLM(config)
    assert low <= config.parameter_count <= high
    assert sum(p.numel() for p in model.parameters()) == config.parameter_count


def test_configs_survive_json() -> None:
    config = LMConfig(37, 24, 10, RAGGED.layers, 0.1, {"blocks.0.ff_in": 3})
    assert LMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_parameters_have_the_promised_names() -> None:
    model = TransformerLM(LMConfig(5, 4, 2, (LayerSizes(1, 3),)))
    names = [name for name, _ in model.named_parameters()]
    parts = ("attention_norm", "qkv", "out", "ff_norm", "ff_in", "ff_out")
    block = [f"blocks.0.{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    assert names == ["embedding.weight", *block, "norm.weight", "norm.bias"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: expected at least 1, got 0"),
        ({"head_dim": 7}, "head_dim: expected an even number, got 7"),
        ({"dropout": 1.0}, r"dropout: expected a fraction in \[0, 1\), got 1.0"),
        ({"layers": [[-1, 3]]}, r"layers\[0\]: expected sizes of at least 0"),
        ({"ranks": {"blocks.9.qkv": 1}}, "ranks: expected names of linears, got 'blocks.9.qkv'"),
        ({"ranks": {"blocks.0.ff_in": 99}}, r"ranks\['blocks.0.ff_in'\]: expected 0 to 32, got 99"),
        ({"width": 3}, "config: expected the fields .*'vocab_size'.*, got .*'width'"),
    ],
)
def test_bad_configs_are_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LMConfig.from_dict(TINY.to_dict() | change)


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(ValueError, match="preset: expected paper-20m, small or tiny, got 'big'"):
        LMConfig.preset("big", 10)
    with pytest.raises(ValueError, match="vocab_size: expected 20M to leave room, got 50000"):
        LMConfig.preset("paper-20m", 50000)


def test_the_loss_can_be_differentiated_twice() -> None:
    model = noisy(LMConfig(11, 8, 4, (LayerSizes(2, 6),)))
    tokens = torch.randint(11, (2, 6))
    parameters = list(model.parameters())
    direction = [torch.randn_like(p) for p in parameters]

    def gradient() -> list[Tensor]:
        return list(torch.autograd.grad(model.loss(tokens), parameters, create_graph=True))

    with sdpa_kernel(SDPBackend.MATH):
        product = sum((g * d).sum() for g, d in zip(gradient(), direction, strict=True))
        exact = torch.autograd.grad(product, parameters)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=sign * 1e-5)
            ends.append([g.detach() for g in gradient()])
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.sub_(d, alpha=sign * 1e-5)
    for up, down, wanted in zip(*ends, exact, strict=True):
        error = ((up - down) / 2e-5 - wanted).abs().max()
        assert error <= 1e-7 * max(float(wanted.abs().max()), 1.0)


def test_one_graph_and_deep_copies() -> None:
    model = noisy(RAGGED)
    tokens = torch.randint(37, (2, 7))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens), model(tokens))
    assert torch.equal(torch.compile(twin, fullgraph=True, backend="eager")(tokens), model(tokens))
