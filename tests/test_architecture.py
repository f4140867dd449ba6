"""Descriptions that do not fit a module are refused by what was expected and found where."""

import pytest
from test_own_modules import (
    DIM,
    GPT_NAMES,
    LLAMA_NAMES,
    Encoder,
    FusedAttention,
    LlamaBlock,
)
from torch import nn

from prunelm import Architecture, Heads, LowRank, Neurons


def bad(change) -> nn.Module:
    block = LlamaBlock(6, 3)
    change(block)
    return nn.Sequential(block)


WRONG = {
    "key-rows": (
        lambda b: setattr(b, "wk", nn.Linear(DIM, 10)),
        "0.wk: expected rows of key heads of 4 that divide 6 heads, got 10",
    ),
    "keys-that-do-not-divide": (
        lambda b: setattr(b, "wk", nn.Linear(DIM, 16)),
        "0.wk: expected rows of key heads of 4 that divide 6 heads, got 16",
    ),
    "value-rows": (
        lambda b: setattr(b, "wv", nn.Linear(DIM, 8)),
        "0.wv: expected 12 rows, as wo has 24 columns for 6 heads, got 8",
    ),
    "head-dim": (
        lambda b: setattr(b, "head_dim", 5),
        "0.wq: expected 20 rows, 4 heads of 5, got 24",
    ),
    "heads": (lambda b: setattr(b, "heads", 5), "0.wq: expected 20 rows, 5 heads of 4, got 24"),
    "kv-heads": (lambda b: setattr(b, "kv_heads", 2), "0: expected kv_heads = 3, got 2"),
    "no-numbers": (
        lambda b: delattr(b, "head_dim"),
        "0: expected an attribute head_dim or heads, got none; Architecture names them",
    ),
    "not-a-number": (
        lambda b: setattr(b, "head_dim", "4"),
        "0: expected head_dim to be a number of at least 1, got '4'",
    ),
    "no-out": (lambda b: delattr(b, "wo"), "0.wo: expected a linear beside wq, got none"),
    "no-linear": (
        lambda b: setattr(b, "wo", nn.LayerNorm(DIM)),
        "0.wo: expected a linear beside wq, got LayerNorm",
    ),
    "gate": (
        lambda b: setattr(b, "up", nn.Linear(DIM, 35)),
        "0.up: expected 36 rows, the rows of gate, got 35",
    ),
    "neurons-read": (
        lambda b: setattr(b, "down", nn.Linear(18, DIM)),
        "0.down: expected 36 columns, the rows of gate, got 18",
    ),
    "tied": (
        lambda b: setattr(b.up, "weight", b.gate.weight),
        "0.gate.weight: expected a weight that one module holds, got one tied to 0.up.weight",
    ),
    "computed": (
        lambda b: nn.utils.parametrizations.weight_norm(b.gate),
        "0.gate.weight: expected a parameter, got a weight that is computed",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_descriptions_that_do_not_fit_name_the_rows(name: str) -> None:
    change, message = WRONG[name]
    method = Heads(architecture=LLAMA_NAMES) | Neurons(architecture=LLAMA_NAMES)
    with pytest.raises(ValueError) as error:
        method.groups(bad(change), {})
    assert str(error.value) == message


def test_fused_rows_that_do_not_fit_are_named() -> None:
    model = nn.Sequential(FusedAttention(4, 4))
    model[0].c_attn = nn.Linear(DIM, 60)
    with pytest.raises(ValueError, match=r"0.c_attn: expected 72 rows, query, key and value of 4 "):
        Heads(architecture=GPT_NAMES).groups(model, {})
    attention = "; torch's MultiheadAttention cannot lose heads, as it ties them to its width"
    with pytest.raises(ValueError, match=f"got Encoder without any{attention}"):
        Heads().groups(Encoder(), {})
    with pytest.raises(ValueError, match=r"0.0: expected a plain nn.Linear, got NonPlain"):
        kind = type("NonPlain", (nn.Linear,), {})
        block = nn.Sequential(kind(4, 6), nn.ReLU(), nn.Linear(6, 4))
        LowRank(architecture=GPT_NAMES).prepare(nn.Sequential(block))
    for wrong in ({"qkv": ("a", "b")}, {"feed_forwards": ("ff_in", "ff_out")}):
        with pytest.raises(ValueError, match=r"expected (one name or three|at least two names)"):
            Architecture(**wrong)
