"""Scores against slow definitions: a mask's gradient, a norm, a seed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
from prunelm.pruning.calibration import Calibration
from prunelm.pruning.criteria import Magnitude, Random, Taylor
from prunelm.pruning.groups import Groups
from prunelm.pruning.methods import Blocks, Elements, Heads, LowRank, Neurons


def small_lm() -> TransformerLM:
    config = LMConfig(11, 8, 4, (LayerSizes(3, 7), LayerSizes(2, 5)))
    model = TransformerLM(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tokens(step: int) -> torch.Tensor:
    rows = [4, 1, 3][step % 3]
    return torch.randint(11, (rows, 7), generator=torch.Generator().manual_seed(step))


def exact_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """In float64 throughout, so that differences say something."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def mean_loss(model: nn.Module, batches: int) -> torch.Tensor:
    return exact_loss(model, torch.cat([tokens(step) for step in range(batches)]))


def mask_gradient(model: nn.Module, groups: Groups, index: int, batches: int) -> float:
    """dL/dm by a central difference: the scored parts of one group scaled by 1 +- h."""
    parameters = dict(model.named_parameters())
    only = torch.arange(groups.count) == index
    losses = []
    for m in (1 + 1e-5, 1 - 1e-5):
        saved = {part.name: parameters[part.name].detach().clone() for part in groups.parts}
        with torch.no_grad():
            for part in groups.parts:
                if part.scored:
                    weight = parameters[part.name]
                    weight.mul_(1 + (m - 1) * part.mask(only, weight.shape).double())
            losses.append(float(mean_loss(model, batches)))
            for name, old in saved.items():
                parameters[name].copy_(old)
    return (losses[0] - losses[1]) / 2e-5


@pytest.mark.parametrize(
    "method",
    [Heads(), Neurons(), Blocks(3, 4), LowRank(), Elements()],
    ids=["heads", "neurons", "blocks", "ranks", "elements"],
)
def test_taylor_is_the_gradient_of_the_groups_mask_over_all_samples(method) -> None:
    model = method.prepare(small_lm())
    groups = method.groups(model, {})
    scores = Taylor(batches=3).score(model, groups, Calibration(tokens, exact_loss))
    for each, score in list(zip(groups, scores, strict=True))[::2]:
        for index in {0, each.count // 2, each.count - 1}:
            expected = abs(mask_gradient(model, each, index, 3))
            assert abs(float(score[index]) - expected) <= 1e-6 + 1e-4 * expected


def test_taylor_sums_before_the_absolute_value() -> None:
    model = small_lm()
    groups = Neurons().groups(model, {})[0]
    gradient = Calibration(tokens).mean_gradient(model, 2)
    products = {n: p.detach() * gradient[n] for n, p in model.named_parameters()}
    expected = groups.fold(products).sum(1).abs()
    score = Taylor(batches=2).score(model, [groups], Calibration(tokens))[0]
    assert float((score - expected).abs().max()) <= 1e-7
    assert (score < groups.fold(products).abs().sum(1)).all()


def test_gradient_counts_every_sample_once_whatever_its_batch() -> None:
    model = small_lm()
    gradient = Calibration(tokens).mean_gradient(model, 3)
    mean_loss(model, 3).backward()
    for name, parameter in model.named_parameters():
        assert float((gradient[name] - parameter.grad).abs().max()) <= 1e-6
    assert (
        abs(Calibration(tokens).mean_loss(model, 3) - float(mean_loss(model, 3).detach())) <= 1e-6
    )


def test_scoring_leaves_gradients_modes_and_weights_alone() -> None:
    model = small_lm().train()
    model.blocks[0].eval()
    before = [p.detach().clone() for p in model.parameters()]
    Taylor(batches=1).score(model, Neurons().groups(model, {}), Calibration(tokens))
    assert model.training and not model.blocks[0].training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_magnitude_is_the_norm_over_the_whole_group(p: float) -> None:
    model = small_lm()
    block = model.blocks[1]
    score = Magnitude(p).score(model, Heads().groups(model, {})[1:], Calibration(None))[0]
    for head in range(2):
        rows = slice(head * 4, head * 4 + 4)
        parts = [
            block.qkv.weight.view(3, 8, 8)[:, rows],
            block.qkv.bias.view(3, 8)[:, rows],
            block.out.weight[:, rows],
        ]
        expected = torch.cat([part.detach().flatten() for part in parts]).norm(p) ** p
        assert abs(float(score[head]) - float(expected)) <= 1e-4


def test_magnitude_of_a_rank_component_is_its_squared_singular_value() -> None:
    model = LowRank().prepare(small_lm())
    groups = LowRank().groups(model, {})[0]
    score = Magnitude().score(model, [groups], Calibration(None))[0]
    singular = torch.linalg.svdvals(small_weight())
    assert float((score - singular**2).abs().max()) <= 1e-4


def small_weight() -> torch.Tensor:
    torch.manual_seed(0)
    return small_lm().blocks[0].qkv.weight.detach()


def test_random_follows_its_seed() -> None:
    model = small_lm()
    groups = Neurons().groups(model, {})
    first, again, other = (
        Random().score(model, groups, Calibration(None, seed=seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


def test_bad_settings_name_the_key() -> None:
    with pytest.raises(ValueError, match="order: expected 1, got 2"):
        Taylor(order=2)
    with pytest.raises(ValueError, match="batches: expected at least 1, got 0"):
        Taylor(batches=0)
    with pytest.raises(ValueError, match="p: expected more than 0, got 0"):
        Magnitude(0)
    with pytest.raises(ValueError, match="data: expected a function from step to batch, got None"):
        Taylor().score(small_lm(), [], Calibration(None))


def test_a_gradient_that_is_not_finite_is_refused_by_name() -> None:
    model = small_lm()
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"gradient: .* finite numbers for embedding\.weight"):
        Taylor(batches=1).score(model, [], Calibration(tokens))
