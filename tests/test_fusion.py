"""Fusion's weights and rows, and the copies that make rows independent of their number."""

import math

import pytest
import torch
from torch import nn

from prunelm.decoding.fusion import Fusion, LMRows, check_names
from prunelm.decoding.prefix_tree import NewRows
from prunelm.decoding.row_independent import row_independent
from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM


def make_lm(vocabulary: int = 11) -> TransformerLM:
    return TransformerLM(LMConfig(vocabulary, 12, 6, (LayerSizes(2, 20),))).eval()


def chain(tokens: list[int], first: int) -> NewRows:
    """The node of 0, tokens, in row first + len(tokens); its ancestors in the rows before."""
    length = len(tokens) + 1
    path = torch.arange(first, first + length)[None]
    return NewRows(path[:, -1], torch.tensor([0, *tokens][-1:]), path, torch.tensor([length]))


def test_rows_are_the_log_probs_of_the_full_forward_and_survive_growth() -> None:
    lm = make_lm()
    rows = LMRows(Fusion(lm, 0.5), 11)
    tokens = [3, 1, 7, 7, 2]
    with torch.inference_mode():
        expected = lm(torch.tensor([[0, *tokens]]))[0].log_softmax(-1)
        for i in range(len(tokens) + 1):
            rows.compute(chain(tokens[:i], 250), 250 + i + 1)
            if i == 2:
                rows.compute(chain([], 1000), 1001)  # larger than the first pool
    assert rows.capacity >= 1001
    assert rows.computed == 7
    assert ((rows.rows[250:256] - expected).abs() <= 1e-5).all()


def test_half_models_have_float_rows() -> None:
    lm = make_lm().bfloat16()
    rows = LMRows(Fusion(lm, 0.5), 11)
    with torch.inference_mode():
        rows.compute(chain([], 0), 1)
    assert rows.rows.dtype == torch.float32
    assert abs(float(rows.rows[0].exp().sum()) - 1) <= 1e-5


def test_weights_are_one_number_or_one_each() -> None:
    assert Fusion(make_lm(), -0.25).weights(3).tolist() == [-0.25] * 3
    assert Fusion(make_lm(), [0.1, 0.2]).weights(2).tolist() == [0.1, 0.2]
    with pytest.raises(
        ValueError, match=r"weight of 'novels': expected one number or 3, got \[2\]"
    ):
        Fusion(make_lm(), [0.1, 0.2], "novels").weights(3)


def test_names_are_distinct() -> None:
    check_names([Fusion(make_lm(), 1, "a"), Fusion(make_lm(), 1, "b")])
    for name in ("am", "reward", "a"):
        with pytest.raises(ValueError, match="fusions: expected distinct names besides am and"):
            check_names([Fusion(make_lm(), 1, "a"), Fusion(make_lm(), 1, name)])


def test_rows_do_not_depend_on_their_number() -> None:
    model = nn.Sequential(
        nn.Linear(37, 50), nn.Tanh(), nn.Sequential(nn.Linear(50, 19, bias=False))
    )
    independent = row_independent(model)
    x = torch.randn(61, 37)
    with torch.inference_mode():
        together = independent(x)
        assert ((together - model(x)).abs() <= 1e-5).all()
        for rows in (1, 2, 3, 8, 17):
            for first in (0, 5, 60 - rows):
                part = slice(first, first + rows)
                assert torch.equal(independent(x[part]), together[part])


def test_a_copy_sees_later_writes_and_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    names = dict(model.named_parameters())
    x = torch.randn(2, 4)
    row_independent(model)(x)
    model[0].weight.data.zero_()  # which no version counter tells
    model[0].bias.data.fill_(math.pi)
    assert (row_independent(model)(x) == math.pi).all()
    assert dict(model.named_parameters()).keys() == names.keys()
    assert type(model[0]) is nn.Linear


def test_what_needs_no_copy_is_returned() -> None:
    other = nn.Sequential(nn.Tanh())
    assert row_independent(other) is other
    once = row_independent(nn.Sequential(nn.Linear(2, 2)))
    assert isinstance(once, nn.Sequential)
    marker = object()
    assert row_independent(marker) is marker
