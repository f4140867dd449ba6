import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunelm import BlockSparse
from prunelm.metrics.flops import flops_per_token
from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
from prunelm.nn import BlockSparseLinear, LowRankLinear

LAYERS = (LayerSizes(2, 50), LayerSizes(0, 7), LayerSizes(3, 0))


@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize(
    "config",
    [LMConfig.preset("small", 500), LMConfig(37, 24, 10, LAYERS)],
    ids=["small", "ragged"],
)
def test_the_formula_is_what_torch_counts(config: LMConfig, length: int) -> None:
    model = TransformerLM(config).eval()
    # The counter knows no formula for the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randint(37, (1, length)))
    assert flops_per_token(model, length) * length == counter.get_total_flops()


def test_each_context_token_costs_two_products_per_head() -> None:
    model = TransformerLM(LMConfig(37, 24, 10, LAYERS))
    assert flops_per_token(model, 9) - flops_per_token(model, 8) == 4 * 5 * 10


def test_factors_and_blocks_count_what_they_store() -> None:
    dense = TransformerLM(LMConfig(37, 24, 10, LAYERS))
    factored = TransformerLM(LMConfig(37, 24, 10, LAYERS, ranks={"blocks.0.ff_in": 3}))
    assert isinstance(factored.blocks[0].ff_in, LowRankLinear)
    saved = 2 * (24 * 50 - 3 * (24 + 50))
    assert flops_per_token(dense, 5) - flops_per_token(factored, 5) == saved
    weight = torch.zeros(50, 24)
    weight[:8, :4] = 1
    before = flops_per_token(dense, 5)
    dense.blocks[0].ff_in = BlockSparseLinear(BlockSparse.from_dense(weight, block=(8, 4)))
    assert before - flops_per_token(dense, 5) == 2 * (24 * 50 - 32)


def test_zeros_can_be_left_out() -> None:
    model = TransformerLM(LMConfig(37, 24, 10, LAYERS))
    before = flops_per_token(model, 5)
    assert flops_per_token(model, 5, zeros=False) == before
    with torch.no_grad():
        model.blocks[0].qkv.weight[:20] = 0
        model.embedding.weight[3] = 0
    assert flops_per_token(model, 5) == before
    assert before - flops_per_token(model, 5, zeros=False) == 2 * (20 * 24 + 24)


def test_an_empty_context_is_refused() -> None:
    with pytest.raises(ValueError, match="context: expected at least 1, got 0"):
        flops_per_token(TransformerLM(LMConfig(37, 24, 10, LAYERS)), 0)
