"""Sizes are exact: never above the target, short of it by less than the cheapest group left."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
from prunelm.pruning.budget import Ledger, count_parameters, parse_target, smallest
from prunelm.pruning.compact import remove
from prunelm.pruning.criteria import Magnitude
from prunelm.pruning.groups import Groups, Tiles
from prunelm.pruning.methods import Blocks, Elements, Heads, LowRank, Neurons
from prunelm.pruning.pruner import Pruner
from prunelm.pruning.selection import choose

CONFIG = LMConfig(23, 16, 4, (LayerSizes(3, 40), LayerSizes(5, 24)))
METHODS = {
    "heads": Heads(),
    "neurons": Neurons(min_keep=1),
    "neurons-by-8": Neurons(multiple_of=8),
    "heads+neurons": Heads() | Neurons(),
    "heads+neurons-by-4": Heads() | Neurons(multiple_of=4, min_keep=4),
    "all-may-go": Heads(min_keep=0) | Neurons(min_keep=0),
    "ranks": LowRank(),
    "heads+neurons+ranks": Heads() | Neurons() | LowRank(),
    "elements": Elements(),
    "blocks": Blocks(3, 4),
    "elements+heads": Elements() | Heads(),
    "blocks+neurons": Blocks(4, 4, embedding=True) | Neurons(),
    "elements+blocks": Elements() | Blocks(2, 8),
}


def prepared(method):
    model = method.prepare(TransformerLM(CONFIG))
    groups = method.groups(model, {})
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(each.count, generator=generator) for each in groups]
    return model, groups, scores


def cheapest_left(model: nn.Module, groups, keep, masks) -> int:
    """The least by which the model would become smaller by losing what a kind loses at a time."""
    ledger = Ledger(model, groups, masks)
    size = ledger.size(keep)
    least = size
    for i, (each, kept) in enumerate(zip(groups, keep, strict=True)):
        alive = kept.nonzero()[:, 0]
        steps = range(1, len(alive) + 1) if each.cap or each.multiple_of > 1 else [1]
        for step in steps:
            if len(alive) - step < each.min_keep or (len(alive) - step) % each.multiple_of:
                continue
            fewer = [k.clone() for k in keep]
            fewer[i][alive[:step]] = False
            if ledger.size(fewer) < size:
                least = min(least, size - ledger.size(fewer))
                break
    return least


@pytest.mark.parametrize(("name", "percent"), list(product(METHODS, (97, 71, 50))))
def test_sizes_are_exact(name: str, percent: int) -> None:
    model, groups, scores = prepared(METHODS[name])
    target = count_parameters(model) * percent // 100
    if target < smallest(model, groups, {}):
        pytest.skip("out of this method's reach")
    keep = choose(model, groups, scores, {}, target)
    pruned, masks, _ = remove(model, groups, keep, {})
    parameters = pruned.named_parameters()
    size = sum(int(masks[n].sum()) if n in masks else p.numel() for n, p in parameters)
    assert size == count_parameters(pruned, masks) == Ledger(model, groups, {}).size(keep)
    assert size <= target
    # Where kinds overlap, the cost of what is left depends on what else goes: within a neuron.
    bound = 33 if name == "heads+neurons+ranks" else cheapest_left(model, groups, keep, {})
    assert target - size < bound
    for each, kept in zip(groups, keep, strict=True):
        assert int(kept.sum()) >= each.min_keep


def test_the_order_is_that_of_score_per_parameter() -> None:
    model = nn.Linear(4, 3, bias=False)
    part = Tiles("weight", (3, 4), (2, 3))  # blocks of 6, 2, 3 and 1 elements
    cost = torch.tensor([6, 2, 3, 1])
    groups = [Groups("block", "weight", (part,), cost, torch.ones(4, dtype=torch.bool), False)]
    scores = [torch.tensor([6.0, 1.0, 2.4, 3.0])]  # per parameter 1, 0.5, 0.8, 3
    for target, kept in ((12, "1111"), (10, "1011"), (7, "1001"), (1, "0001")):
        keep = choose(model, groups, scores, {}, target)[0]
        assert "".join(str(int(k)) for k in keep) == kept, target


def test_a_large_group_gives_way_to_small_ones() -> None:
    model = nn.ModuleDict({"large": nn.Linear(10, 1, False), "small": nn.Linear(1, 10, False)})
    groups = [
        Groups("large", "large", (Tiles("large.weight", (1, 10), (1, 10)),),
               torch.tensor([10]), torch.tensor([True]), False),
        Groups("small", "small", (Tiles("small.weight", (10, 1), (1, 1)),),
               torch.ones(10, dtype=torch.int64), torch.ones(10, dtype=torch.bool), False),
    ]  # fmt: skip
    scores = [torch.tensor([1.0]), torch.arange(1.0, 11.0)]
    keep = choose(model, groups, scores, {}, 17)  # the large one is cheapest but takes 10 of 3
    assert keep[0].tolist() == [True]
    assert int(keep[1].sum()) == 7 and not bool(keep[1][:3].any())


def test_ranks_go_together_down_to_break_even() -> None:
    model, groups, _ = prepared(LowRank())
    scores = [torch.ones(g.count) for g in groups]
    keep = choose(model, groups, scores, {}, count_parameters(model) - 1)
    changed = [(g, k) for g, k in zip(groups, keep, strict=True) if not bool(k.all())]
    assert len(changed) == 1
    each, kept = changed[0]
    assert each.cap is not None
    rank, cost = int(kept.sum()), int(each.cost[0])
    assert rank * cost < each.cap <= (rank + 1) * cost


def test_an_unreachable_target_names_the_smallest_and_what_would_lower_it() -> None:
    model, groups, scores = prepared(Heads() | Neurons())
    least = smallest(model, groups, {})
    choose(model, groups, scores, {}, least)
    with pytest.raises(ValueError, match=f"target: expected at least {least:,} parameters") as e:
        choose(model, groups, scores, {}, least - 1)
    assert "adding LowRank()" in str(e.value) and "a smaller embedding.weight (368)" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("count", [True, False], ids=["tied", "two"])
def test_a_tied_weight_counts_once(count: bool) -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    if count:
        model[1].weight = model[0].weight
    assert count_parameters(model) == (15 if count else 30)
    mask = torch.arange(15).view(5, 3) % 2 == 0
    assert count_parameters(model, {"0.weight": mask}) == (8 if count else 23)


@pytest.mark.parametrize(
    ("target", "size"),
    [
        pytest.param("5M", 5_000_000, id="millions"),
        pytest.param("1.25m", 1_250_000, id="fraction"),
        pytest.param("800k", 800_000, id="thousands"),
        pytest.param("29%", 2_900_000, id="percent"),
        pytest.param("33.3%", 3_330_000, id="fraction-of-a-percent"),
        pytest.param(123, 123, id="number"),
        pytest.param("123", 123, id="digits"),
        pytest.param(" 5 M ", 5_000_000, id="spaces"),
        pytest.param("0.005G", 5_000_000, id="giga"),
        pytest.param("0.005b", 5_000_000, id="billions"),
        pytest.param("5,000,000", 5_000_000, id="commas"),
        pytest.param("5_000_000", 5_000_000, id="underscores"),
        pytest.param("1e6", 1_000_000, id="exponent"),
        pytest.param("2.5E+6", 2_500_000, id="exponent-and-fraction"),
        pytest.param(1e6, 1_000_000, id="float"),
        pytest.param(np.int64(7), 7, id="numpy"),
        pytest.param("0.5", 5_000_000, id="share"),
        pytest.param(".29", 2_900_000, id="share-without-zero"),
        pytest.param(0.29, 2_900_000, id="float-share"),
        pytest.param("50 %", 5_000_000, id="percent-and-space"),
        pytest.param("1.23456k", 1_234, id="rounded-down"),
    ],
)
def test_targets(target: str | int, size: int) -> None:
    assert parse_target(target, 10_000_000) == size


@pytest.mark.parametrize(
    "target",
    [
        "20 MFLOP", "2 ms", "", "M", "-5M", True, None, 1.5, "1.5", "5,00", "1,5M", "5.M", "5__0",
        ".", "nan", "inf", float("nan"), float("inf"), "1e999", "9" * 5000, "5M%", b"5M", [5],
        "half",
    ],
    ids=lambda each: repr(each)[:12],
)  # fmt: skip
def test_what_is_no_size_is_refused(target) -> None:
    with pytest.raises(ValueError, match='target: expected "5M", "40%" or a number of parameters'):
        parse_target(target, 100)


@pytest.mark.parametrize(
    "target",
    ["0%", 0, -3, "101%", 101, "0", "0.0", "1e30", 10**5000],
    ids=lambda each: str(each)[:9] if isinstance(each, str) else f"int-{each % 97}",
)
def test_sizes_out_of_range_are_refused(target) -> None:
    with pytest.raises(ValueError, match="target: expected 1 to 100 parameters"):
        parse_target(target, 100)


def test_scores_that_are_not_finite_are_refused() -> None:
    model, groups, scores = prepared(Neurons())
    scores[0][3] = torch.nan
    with pytest.raises(ValueError, match=r"scores: .* finite numbers for neurons of blocks\.0"):
        choose(model, groups, scores, {}, 1000)


def test_only_a_bare_number_may_have_been_meant_in_percent() -> None:
    torch.manual_seed(0)
    small = TransformerLM(LMConfig.preset("tiny", 50))
    pruner = Pruner(Neurons(), Magnitude())
    for target, hint in (
        ("50", '; did you mean "50%"?'),
        (50, '; did you mean "50%"?'),
        ("0.3%", ""),
    ):
        said = pruner.plan(small, target).advice
        assert said.endswith(hint) and ("did you mean" in said) == bool(hint)
