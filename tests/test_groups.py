"""Slices of parameters: folding is exact, masks and positions agree."""

import pytest
import torch
from torch import nn

from prunelm.pruning.architecture import Architecture
from prunelm.pruning.groups import (
    Rows,
    Tiles,
    largest_useful_rank,
    marginal_cost,
    prunable_weights,
)


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        pytest.param((6, 5), Rows("w", 6), id="rows"),
        pytest.param((5, 6), Rows("w", 3, axis=1), id="columns"),
        pytest.param((3 * 4 * 2, 5), Rows("w", 4, outer=3), id="heads-of-qkv"),
        pytest.param((3 * 4 * 2,), Rows("w", 4, outer=3), id="heads-of-bias"),
        pytest.param((7, 5), Tiles("w", (7, 5), (3, 2)), id="ragged-tiles"),
        pytest.param((7, 5), Tiles("w", (7, 5), (1, 1)), id="elements"),
        pytest.param((2, 3), Tiles("w", (2, 3), (16, 16)), id="tile-larger-than-weight"),
    ],
)
def test_fold_puts_each_element_into_the_group_whose_mask_covers_it(shape, part) -> None:
    x = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    folded = part.fold(x)
    covered = torch.zeros(shape)
    for group in range(len(folded)):
        only = torch.zeros(len(folded), dtype=torch.bool)
        only[group] = True
        mask = part.mask(only, shape)
        covered += mask
        assert sorted(x[mask].tolist()) == sorted(v for v in folded[group].tolist() if v)
    assert (covered == 1).all()


def test_qkv_rows_of_a_head_are_its_query_key_and_value() -> None:
    heads, head_dim = 3, 2
    x = torch.arange(3 * heads * head_dim).view(3, heads, head_dim)
    part = Rows("w", heads, outer=3)
    keep = torch.tensor([True, False, True])
    kept = x.flatten()[part.positions(keep, x.numel())]
    assert kept.tolist() == x[:, [0, 2]].flatten().tolist()


def test_break_even_is_the_highest_rank_that_saves() -> None:
    for n, k in [(512, 512), (512, 1024), (7, 5), (1, 9), (3, 3)]:
        rank = largest_useful_rank(n, k)
        assert rank * (n + k) < n * k <= (rank + 1) * (n + k)


def test_masked_elements_cost_nothing() -> None:
    weight = torch.ones(4, 6)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:2, :3] = False
    cost = marginal_cost({"w": weight}, {"w": mask}, [Tiles("w", (4, 6), (2, 4))])
    assert cost.tolist() == [2, 4, 8, 4]


def test_a_tied_weight_is_found_once_and_left_out_as_an_embedding() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    assert list(prunable_weights(model, embedding=True)) == ["0.weight"]
    assert not prunable_weights(model, embedding=False)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model: expected blocks with qkv.*got Linear"):
        list(Architecture().blocks(nn.Linear(2, 2)))
