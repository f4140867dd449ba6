"""Sizes over random small models: exact, and no group that went would still have fitted."""

import itertools
import random

import pytest
import torch
from test_compact import masked

from prunelm import Magnitude, Pruner, Random
from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
from prunelm.pruning.budget import Ledger, count_parameters, smallest
from prunelm.pruning.compact import remove
from prunelm.pruning.methods import Blocks, Elements, Heads, LowRank, Neurons
from prunelm.pruning.selection import choose


def random_model(draw: random.Random) -> TransformerLM:
    layers = [
        LayerSizes(draw.randint(0, 4), draw.randint(0, 24)) for _ in range(draw.randint(1, 3))
    ]
    layers[0] = LayerSizes(draw.randint(1, 4), draw.randint(1, 24))
    torch.manual_seed(draw.randint(0, 10**6))
    config = LMConfig(draw.randint(3, 17), draw.choice([5, 8, 12]), 2, tuple(layers))
    model = TransformerLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double()


def random_method(draw: random.Random):
    structured = [
        Heads(min_keep=draw.randint(0, 2)),
        Neurons(multiple_of=draw.choice([1, 1, 2, 4]), min_keep=draw.randint(0, 5)),
    ]
    ranks = LowRank(multiple_of=draw.choice([1, 1, 2]), min_keep=draw.randint(1, 2))
    masks = [
        Blocks(draw.randint(1, 5), draw.randint(1, 5), min_keep=draw.choice([0, 0.02, 0.3])),
        Elements(min_keep=draw.choice([0, 0.02, 0.3]), embedding=draw.random() < 0.5),
    ]
    pool = structured + draw.choice([[ranks], masks, masks[:1]])
    chosen = draw.sample(pool, draw.randint(1, len(pool)))
    method = chosen[0]
    for other in chosen[1:]:
        method = method | other
    return method


def put_back(each, kept):
    """Every way in which the least that the method allows comes back to one place."""
    gone = (each.kept & ~kept).nonzero()[:, 0]
    if each.cap is None and each.multiple_of == 1:
        for group in gone.tolist():
            more = kept.clone()
            more[group] = True
            yield more
        return
    for count in range(1, len(gone) + 1):
        left = int(kept.sum()) + count
        if left % each.multiple_of == 0 or count == len(gone):
            more = kept.clone()
            more[gone[:count]] = True
            yield more
            return


@pytest.mark.parametrize("seed", range(200))
def test_sizes_over_random_models_and_methods(seed: int) -> None:
    draw = random.Random(seed)
    model, method = random_model(draw), random_method(draw)
    model = method.prepare(model)
    groups = method.groups(model, {})
    least, dense = smallest(model, groups, {}), count_parameters(model)
    share = draw.choice([0.0, 0.02, draw.random(), draw.random()])
    target = least + int(share * (dense - least))
    scores = Random().score(model, groups, Pruner(method, seed=seed))
    keep = choose(model, groups, scores, {}, target)
    size = Ledger(model, groups, {}).size(keep)
    smaller, masks, _ = remove(model, groups, keep, {})
    shrunk = sum(
        int(masks[name].sum()) if name in masks else parameter.numel()
        for name, parameter in smaller.named_parameters()
    )
    assert shrunk == count_parameters(smaller, masks) == size <= target
    if target == least:
        assert size == least
    for i, (each, kept) in enumerate(zip(groups, keep, strict=True)):
        staying = int(kept.sum())
        assert staying >= min(each.min_keep, each.count)
        assert staying % each.multiple_of == 0 or bool(kept[each.kept].all()) or each.cap
        for more in put_back(each, kept):
            fuller = Ledger(model, groups, {}).size([*keep[:i], more, *keep[i + 1 :]])
            assert fuller > target or (fuller == size and not each.shrinks), each.place
    tokens = torch.randint(model.config.vocab_size, (2, 5))
    expected = masked(model, groups, keep)(tokens)
    assert float((smaller(tokens) - expected).detach().abs().max()) <= 1e-5


@pytest.mark.parametrize(
    "method",
    [
        Blocks(3, 4),
        Blocks(16, 16, min_keep=0.3),
        Elements(),
        Heads() | Neurons(),
        Heads(min_keep=0) | Neurons(min_keep=0),
        LowRank(),
        Heads() | Neurons(multiple_of=4) | LowRank(),
        Blocks(3, 4) | Neurons() | Elements(min_keep=0.1),
    ],
    ids=str,
)
def test_the_smallest_size_is_reached_and_one_less_refused(method) -> None:
    model = TransformerLM(LMConfig(23, 16, 4, (LayerSizes(3, 41), LayerSizes(5, 23))))
    for criterion, seed in itertools.product((Magnitude(), Random()), range(3)):
        pruner = Pruner(method, criterion, seed=seed)
        least = pruner.plan(model, 1).smallest
        assert pruner.plan(model, least).size == least
        assert pruner.run(model, least).size == least
        with pytest.raises(ValueError, match=f"target: expected at least {least:,} parameters"):
            pruner.run(model, least - 1)


def test_ladders_go_on_where_every_block_is_empty() -> None:
    model = TransformerLM(LMConfig(23, 16, 4, (LayerSizes(3, 40), LayerSizes(5, 24))))
    pruner = Pruner(Heads(min_keep=0) | Neurons(min_keep=0), Magnitude())
    least = pruner.plan(model, 1).smallest
    assert least == 23 * 16 + 2 * 16
    results = pruner.ladder(model, [least + 82, least + 81, least + 80, least + 5, least])
    assert [result.size for result in results] == [least + 81, least + 81, *[least] * 3]
    assert pruner.run(results[-1].model, least).size == least
    with pytest.raises(ValueError, match=f"target: expected {least} parameters, as nothing can go"):
        pruner.run(results[-1].model, least - 1)
    again = Pruner(LowRank(), Magnitude()).run(results[-1].model, least)
    assert again.size == least
