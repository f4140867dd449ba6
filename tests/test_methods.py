"""What each method takes, and that joining and rewriting change no function."""

import pytest
import torch
from torch import nn

from prunelm.models.encoder import LayerSizes as EncoderSizes
from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
from prunelm.models.transducer import Transducer, TransducerConfig
from prunelm.pruning.budget import count_parameters, smallest
from prunelm.pruning.compact import remove
from prunelm.pruning.methods import Blocks, Elements, Heads, LowRank, Neurons

CONFIG = LMConfig(19, 12, 4, (LayerSizes(3, 10), LayerSizes(2, 0), LayerSizes(0, 7)))


def lm() -> TransformerLM:
    model = TransformerLM(CONFIG).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_places_and_counts() -> None:
    groups = (Heads() | Neurons()).groups(lm(), {})
    assert [(g.kind, g.place, g.count) for g in groups] == [
        ("head", "blocks.0", 3),
        ("head", "blocks.1", 2),
        ("neuron", "blocks.0", 10),
        ("neuron", "blocks.2", 7),
    ]
    assert groups[0].cost.tolist() == [4 * 12 * 4 + 3 * 4] * 3
    assert groups[2].cost.tolist() == [2 * 12 + 1] * 10


@pytest.mark.parametrize(
    ("method", "kinds"), [(Elements(), 9), (Elements(embedding=False), 8), (Blocks(3, 5), 8)]
)
def test_masks_cover_the_matrices(method, kinds: int) -> None:
    groups = method.groups(lm(), {})
    assert len(groups) == kinds
    assert ("embedding.weight" in {g.place for g in groups}) == (kinds == 9)
    sizes = {n: p.numel() for n, p in lm().named_parameters()}
    assert all(int(g.cost.sum()) == sizes[g.place] for g in groups)


def test_low_rank_rewrites_exactly_and_orders_by_singular_value() -> None:
    model = lm()
    tokens = torch.randint(19, (2, 6))
    expected = model(tokens).detach()
    rewritten = LowRank().prepare(model)
    assert float((rewritten(tokens) - expected).detach().abs().max()) <= 1e-5
    for linear in ("blocks.0.qkv", "blocks.2.ff_out"):
        parameters = dict(rewritten.named_parameters())
        up, down = parameters[f"{linear}.up"], parameters[f"{linear}.down"]
        weight = model.get_parameter(f"{linear}.weight")
        rank = min(weight.shape)
        assert up.shape[1] == down.shape[0] == rank
        assert float((down @ down.T - torch.eye(rank)).abs().max()) <= 1e-5
        assert float((up.norm(dim=0) - torch.linalg.svdvals(weight)).abs().max()) <= 1e-5
    assert count_parameters(rewritten) == count_parameters(model)


def test_factors_are_made_orthogonal_again_without_changing_the_product() -> None:
    model, tokens = lm(), torch.randint(19, (2, 6))
    prepared = LowRank().prepare(model)
    groups = LowRank().groups(prepared, {})
    keep = [torch.arange(g.count) < (g.cap - 1) // int(g.cost[0]) for g in groups]
    smaller, _, _ = remove(prepared, groups, keep, {})
    with torch.no_grad():  # as after fine-tuning: no longer orthogonal
        for parameter in smaller.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    again = LowRank().prepare(smaller)
    assert float((again(tokens) - smaller(tokens)).abs().max()) <= 1e-5
    down = again.blocks[0].qkv.down.detach()
    assert float((down @ down.T - torch.eye(len(down))).abs().max()) <= 1e-5


def test_the_best_rank_r_approximation_is_what_the_largest_components_leave() -> None:
    model = lm()
    prepared = LowRank().prepare(model)
    groups = LowRank().groups(prepared, {})
    keep = [torch.arange(g.count) < 3 for g in groups]
    smaller, _, _ = remove(prepared, groups, keep, {})
    u, s, v = torch.linalg.svd(model.blocks[0].ff_in.weight)
    linear = smaller.blocks[0].ff_in
    assert float((linear.up @ linear.down - (u[:, :3] * s[:3]) @ v[:3]).abs().max()) <= 1e-5
    # Balanced: both factors carry sqrt(s).
    assert float((linear.up.norm(dim=0) - s[:3].sqrt()).abs().max()) <= 1e-5
    assert float((linear.down.norm(dim=1) - s[:3].sqrt()).abs().max()) <= 1e-5


def transducer(encoder: str) -> Transducer:
    config = TransducerConfig(
        vocab_size=9, layers=(EncoderSizes(2, 12), EncoderSizes(3, 8)), dim=16, head_dim=4,
        encoder=encoder, kernel=3, channels=4, predictor="transformer", predictor_dim=8,
        predictor_layers=(EncoderSizes(1, 6),), joiner_dim=8, dropout=0.0,
    )  # fmt: skip
    return Transducer(config).eval()


@pytest.mark.parametrize("encoder", ["transformer", "conformer"])
def test_the_recogniser_is_described_by_the_same_names(encoder: str) -> None:
    model = transducer(encoder)
    method = Heads() | Neurons(min_keep=2)
    groups = method.groups(model, {})
    assert {g.place for g in groups} == {"blocks.0", "blocks.1", "predictor.blocks.0"}
    keep = [torch.arange(g.count) % 2 == 0 for g in groups]
    smaller, _, _ = remove(model, groups, keep, {})
    assert [(s.heads, s.ff) for s in smaller.config.layers] == [(1, 6), (2, 4)]
    assert [(s.heads, s.ff) for s in smaller.config.predictor_layers] == [(1, 3)]
    encoded, _ = smaller.encode(torch.randn(1, 9, 80), torch.tensor([9]))
    assert bool(encoded.isfinite().all())


def test_the_recognisers_linears_become_factors() -> None:
    model, features = transducer("conformer"), torch.randn(1, 9, 80)
    expected, _ = model.encode(features, torch.tensor([9]))
    prepared = LowRank().prepare(model)
    encoded, _ = prepared.encode(features, torch.tensor([9]))
    assert float((encoded - expected).detach().abs().max()) <= 1e-5
    groups = LowRank().groups(prepared, {})
    smaller, _, _ = remove(prepared, groups, [torch.arange(g.count) < 1 for g in groups], {})
    assert smaller.config.ranks["predictor.blocks.0.ff_in"] == 1
    assert smaller.config.ranks["blocks.1.front_out"] == 1


def test_floors_are_respected_and_rounded_to_multiples() -> None:
    model = lm()
    groups = Neurons(multiple_of=4, min_keep=3).groups(model, {})
    assert smallest(model, groups, {}) == count_parameters(model) - (6 + 3) * 25


def test_bad_settings_name_the_key() -> None:
    for make, message in [
        (lambda: Heads(min_keep=-1), "min_keep: expected at least 0, got -1"),
        (lambda: Neurons(multiple_of=0), "multiple_of: expected at least 1, got 0"),
        (lambda: LowRank(min_keep=0), "min_keep: expected at least 1, got 0"),
        (lambda: Blocks(0, 4), "bn: expected at least 1, got 0"),
        (lambda: Elements(min_keep=1.0), r"min_keep: expected a fraction in \[0, 1\), got 1.0"),
        (lambda: Heads() | Heads(min_keep=2), "method: expected each kind once, got Heads"),
        (lambda: LowRank() | Neurons() | Elements(), "method: expected LowRank without Elements"),
        (lambda: Elements().groups(nn.LayerNorm(3), {}), "model: expected 2-d parameters"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make()
