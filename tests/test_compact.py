"""A smaller model computes what the masked one does, and the optimizer follows it."""

import copy

import pytest
import torch
from torch import nn

from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
from prunelm.pruning.compact import follow, remove
from prunelm.pruning.methods import Blocks, Elements, Heads, LowRank, Neurons

CONFIG = LMConfig(19, 12, 4, (LayerSizes(3, 10), LayerSizes(4, 9)))
TOKENS = torch.randint(19, (3, 8), generator=torch.Generator().manual_seed(1))
SHRINKING = {
    "heads": Heads(),
    "neurons": Neurons(min_keep=1),
    "heads+neurons": Heads() | Neurons(),
    "ranks": LowRank(),
    "heads+neurons+ranks": Heads() | Neurons() | LowRank(),
    "elements+heads": Elements() | Heads(),
    "blocks+neurons": Blocks(4, 4) | Neurons(),
    "nothing-left-of-a-half": Heads(min_keep=0) | Neurons(min_keep=0),
}


def lm() -> TransformerLM:
    model = TransformerLM(CONFIG).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_keep(groups, empty: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    keep = []
    for i, each in enumerate(groups):
        kept = torch.rand(each.count, generator=generator) < 0.6
        kept[0] = True
        keep.append(kept & (i % 2 == 1) if empty else kept)
    return keep


def masked(model: nn.Module, groups, keep) -> nn.Module:
    """The same by zeros: the slow definition of what is gone."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for each, kept in zip(groups, keep, strict=True):
            for part in each.parts:
                weight = parameters[part.name]
                weight.mul_(part.mask(kept, weight.shape))
            if not bool(kept.any()):
                for name in each.whole:
                    parameters[name].zero_()
    return model


@pytest.mark.parametrize("name", SHRINKING)
def test_compacted_output_is_masked_output(name: str) -> None:
    method = SHRINKING[name]
    model = method.prepare(lm())
    before = copy.deepcopy(model.state_dict())
    groups = method.groups(model, {})
    keep = random_keep(groups, empty=name.startswith("nothing"))
    smaller, masks, _ = remove(model, groups, keep, {})
    expected = masked(model, groups, keep)(TOKENS)
    assert float((smaller(TOKENS) - expected).abs().max()) <= 1e-6
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    for parameter, mask in masks.items():
        assert not bool(smaller.get_parameter(parameter)[~mask].any())
    if name.startswith("nothing"):
        assert smaller.config.layers == (
            LayerSizes(0, 0),
            LayerSizes(*(int(keep[i].sum()) for i in (1, 3))),
        )


@pytest.mark.parametrize("name", ["heads+neurons", "elements+heads", "ranks"])
def test_no_parameter_is_renamed_and_no_hook_is_left(name: str) -> None:
    method, model = SHRINKING[name], lm()
    prepared = method.prepare(model)
    groups = method.groups(prepared, {})
    smaller, _, _ = remove(prepared, groups, random_keep(groups), {})
    factors = {f"{n}.{leaf}" for n in smaller.config.ranks for leaf in ("up", "down")}
    dense = {f"{n}.weight" for n in smaller.config.ranks}
    assert set(smaller.state_dict()) == set(model.state_dict()) - dense | factors
    assert bool(factors) == (name == "ranks")
    for module in smaller.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._backward_hooks
    assert type(smaller) is TransformerLM


def test_factors_at_or_above_break_even_become_dense_again() -> None:
    prepared = LowRank().prepare(lm())
    groups = LowRank().groups(prepared, {})
    keep = [torch.arange(g.count) < g.count - 1 for g in groups]
    smaller, _, _ = remove(prepared, groups, keep, {})
    assert not smaller.config.ranks
    expected = masked(prepared, groups, keep)(TOKENS)
    assert float((smaller(TOKENS) - expected).abs().max()) <= 1e-6


def test_ties_stay_ties() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    groups = Elements(min_keep=0).groups(model, {})
    smaller, masks, _ = remove(model, groups, random_keep(groups), {})
    assert list(masks) == ["0.weight"]
    assert smaller[0].weight is smaller[1].weight
    assert smaller[0].weight is not model[0].weight


def test_modes_dtypes_and_frozen_weights_carry_over() -> None:
    model = lm().train().to(torch.bfloat16)
    model.embedding.weight.requires_grad_(False)
    groups = Heads().groups(model, {})
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    smaller, _, _ = remove(model, groups, random_keep(groups), {})
    assert torch.equal(torch.rand(3), expected)  # building the smaller model draws no numbers
    assert smaller.training and smaller.blocks[0].qkv.weight.dtype == torch.bfloat16
    assert [n for n, p in smaller.named_parameters() if not p.requires_grad] == ["embedding.weight"]


def trained(model: nn.Module) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": rest}], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(TOKENS).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", ["heads+neurons", "elements+heads"])
def test_optimizer_state_is_sliced_with_the_weights(name: str) -> None:
    method, model = SHRINKING[name], lm()
    optimizer = trained(model)
    groups = method.groups(model, {})
    keep = random_keep(groups)
    old = {n: optimizer.state[p] for n, p in model.named_parameters()}
    smaller, masks, removal = remove(model, groups, keep, {})
    follow(optimizer, model, smaller, removal, masks)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in smaller.parameters()}
    assert len(optimizer.param_groups[0]["params"]) == 9
    # The slow definition: moments masked like the weights, then everything that stayed.
    for key in ("exp_avg", "exp_avg_sq"):
        for parameter_name, parameter in smaller.named_parameters():
            full = old[parameter_name][key].clone()
            touched = torch.ones_like(full, dtype=torch.bool)
            for each, kept in zip(groups, keep, strict=True):
                for part in each.parts:
                    if part.name == parameter_name:
                        mask = part.mask(kept, full.shape)
                        full = full * mask
                        touched &= mask if each.shrinks else True
            state = optimizer.state[parameter][key]
            assert state.shape == parameter.shape
            assert torch.equal(state.flatten(), full[touched])
    optimizer.zero_grad()
    smaller.loss(TOKENS).backward()
    optimizer.step()


def test_new_factors_join_the_group_of_their_weight() -> None:
    model = lm()
    optimizer = trained(model)
    prepared = LowRank().prepare(model)
    groups = LowRank().groups(prepared, {})
    smaller, masks, removal = remove(
        prepared, groups, [torch.arange(g.count) < 2 for g in groups], {}
    )
    follow(optimizer, model, smaller, removal, masks)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in smaller.parameters())
    assert len(optimizer.param_groups[0]["params"]) == 17  # the embedding and 8 x (up, down)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = lm(), lm()
    groups = Heads().groups(model, {})
    smaller, masks, removal = remove(model, groups, random_keep(groups), {})
    with pytest.raises(ValueError, match="optimizer: expected parameters of the model only"):
        follow(trained(other), model, smaller, removal, masks)
