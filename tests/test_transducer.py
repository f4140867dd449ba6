"""Transducer: padding, prefixes, the decoder's contract, both encoders and both predictors."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prunelm.data.speech_batches import SpeechBatch
from prunelm.models.lm import LayerSizes
from prunelm.models.transducer import Transducer, TransducerConfig
from prunelm.nn import LowRankLinear
from prunelm.training.recogniser import TransducerLoss

SMALL = TransducerConfig(
    vocab_size=7,
    layers=(LayerSizes(2, 24), LayerSizes(1, 10)),
    dim=16,
    head_dim=6,
    kernel=5,
    bins=13,
    channels=3,
    predictor_dim=12,
    predictor_layers=(LayerSizes(2, 20), LayerSizes(0, 8), LayerSizes(1, 0)),
    joiner_dim=9,
    dropout=0.2,
)


def model_of(encoder: str, predictor: str) -> Transducer:
    return Transducer(replace(SMALL, encoder=encoder, predictor=predictor)).eval()  # type: ignore[arg-type]


ENCODERS = pytest.mark.parametrize("encoder", ["conformer", "transformer"])
PREDICTORS = pytest.mark.parametrize("predictor", ["stateless", "transformer"])


@ENCODERS
@pytest.mark.parametrize("frames", [1, 4, 5, 18, 31])
@torch.no_grad()
def test_padding_changes_nothing(encoder: str, frames: int) -> None:
    model = model_of(encoder, "stateless")
    features = torch.randn(2, 31, 13)
    lengths = torch.tensor([31, frames])
    together, counts = model.encode(features, lengths)
    features[1, frames:] = 1e3  # whatever is there
    other, _ = model.encode(features, lengths)
    alone, count = model.encode(features[1:, :frames], lengths[1:])
    assert counts.tolist() == [8, -(-frames // 4)] and count[0] == counts[1]
    assert alone.shape == (1, int(count), 16) and together.shape == (2, 8, 16)
    assert torch.equal(together, other)
    assert float((together[1, : int(count)] - alone[0]).abs().max()) <= 1e-5
    assert bool((together[1, int(count) :] == 0).all())


@ENCODERS
def test_every_frame_counts(encoder: str) -> None:
    model = model_of(encoder, "stateless")
    features = torch.randn(1, 21, 13, requires_grad=True)
    encoded, _ = model.encode(features, torch.tensor([21]))
    encoded[0, -1, 0].backward()  # a sum over D would be constant after the norm
    assert features.grad is not None
    assert bool((features.grad.abs().amax(-1) > 0).all())


@PREDICTORS
@torch.no_grad()
def test_one_prefix_at_a_time_is_all_prefixes_at_once(predictor: str) -> None:
    model = model_of("conformer", predictor)
    targets = torch.randint(1, 7, (3, 5))
    together = model.predict_all(targets)
    assert together.shape == (3, 6, 12)
    for u in range(6):
        start = torch.zeros(3, model.context_size or 1, dtype=torch.int64)
        one = model.predict(torch.cat((start, targets[:, :u]), 1))
        assert float((one - together[:, u]).abs().max()) <= 1e-5


@PREDICTORS
@torch.no_grad()
def test_prefixes_of_many_lengths_are_filled_up_with_blanks_at_the_left(predictor: str) -> None:
    model = model_of("conformer", predictor)
    prefixes = [[], [3], [3, 6, 1], [2, 2, 2, 5]]
    alone = [model.predict(torch.tensor([[0, 0, *prefix]]))[0] for prefix in prefixes]
    context = torch.tensor([[0] * (6 - len(prefix)) + prefix for prefix in prefixes])
    together = model.predict(context)
    assert float((together - torch.stack(alone)).abs().max()) <= 1e-5


@torch.no_grad()
def test_join_broadcasts() -> None:
    model = model_of("conformer", "stateless")
    encoded, predicted = torch.randn(2, 4, 16), torch.randn(2, 3, 12)
    grid = model.join(encoded[:, :, None], predicted[:, None])
    assert grid.shape == (2, 4, 3, 7)
    assert float((grid[1, 2, 0] - model.join(encoded[1, 2], predicted[1, 0])).abs().max()) <= 1e-5


@ENCODERS
@PREDICTORS
def test_loss_ignores_padding_and_reaches_every_parameter(encoder: str, predictor: str) -> None:
    model = model_of(encoder, predictor)
    features, lengths = torch.randn(3, 40, 13), torch.tensor([40, 22, 9])
    targets = torch.tensor([[1, 2, 2, 6, 5], [4, 3, 1, 0, 0], [0, 0, 0, 0, 0]])
    target_lengths = torch.tensor([5, 3, 0])
    loss = model.loss(features, lengths, targets, target_lengths)
    alone = [
        model.loss(
            features[b : b + 1, : lengths[b]],
            lengths[b : b + 1],
            targets[b : b + 1, : target_lengths[b]],
            target_lengths[b : b + 1],
        )
        for b in range(3)
    ]
    assert float((loss - torch.stack(alone).mean()).detach().abs()) <= 1e-5
    targets[2] = 6  # past the length
    assert torch.equal(loss, model.loss(features, lengths, targets, target_lengths))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


def test_loss_is_rnnt_and_ctc() -> None:
    both = model_of("conformer", "stateless")
    batch = (
        torch.randn(2, 33, 13),
        torch.tensor([33, 30]),
        torch.tensor([[1, 2, 3], [4, 5, 0]]),
        torch.tensor([3, 2]),
    )
    rnnt = Transducer(replace(both.config, ctc_weight=0.0)).eval()
    missing = rnnt.load_state_dict(both.state_dict(), strict=False)
    assert sorted(missing.unexpected_keys) == ["ctc_out.bias", "ctc_out.weight"]
    encoded, lengths = both.encode(batch[0], batch[1])
    log_probs = both.ctc_out(encoded).log_softmax(-1).transpose(0, 1)
    ctc = torch.nn.functional.ctc_loss(log_probs, batch[2], lengths, batch[3])  # mean per token
    assert float((both.loss(*batch, ctc_weight=1.0) - ctc).detach().abs()) <= 1e-5
    with pytest.raises(ValueError, match=r"ctc_weight: expected 0, as in the config, got 0.5"):
        rnnt.loss(*batch, ctc_weight=0.5)
    expected = 0.7 * rnnt.loss(*batch) + 0.3 * ctc
    assert float((both.loss(*batch) - expected).detach().abs()) <= 1e-5


def test_ctc_comes_first_and_reaches_every_parameter() -> None:
    model = Transducer(replace(SMALL, dropout=0.0)).train()
    batch = SpeechBatch(
        torch.randn(2, 33, 13),
        torch.tensor([33, 30]),
        torch.tensor([[1, 2, 3], [4, 5, 0]]),
        torch.tensor([3, 2]),
        number=4,
    )
    loss = TransducerLoss(ctc_first=5)(model, batch)
    loss.backward()
    for name, parameter in model.named_parameters():  # DDP waits for all of them
        assert parameter.grad is not None, name
        quiet = name.startswith(("predictor", "join"))
        assert bool((parameter.grad == 0).all()) == quiet, name
    later = TransducerLoss(ctc_first=5)(model, replace(batch, number=5))
    both = model.loss(batch.features, batch.lengths, batch.targets, batch.target_lengths)
    assert torch.equal(later, both) and not torch.equal(later, loss)
    with pytest.raises(ValueError, match="ctc_first: expected at least 0 batches, got -1"):
        TransducerLoss(-1)


def test_training_fits_a_batch() -> None:
    torch.manual_seed(3)
    model = Transducer(replace(SMALL, dropout=0.0)).train()
    batch = (
        torch.randn(2, 40, 13),
        torch.tensor([40, 36]),
        torch.tensor([[1, 2, 3], [4, 5, 0]]),
        torch.tensor([3, 2]),
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss: Tensor = model.loss(*batch)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) <= 0.2


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    from prunelm.models.encoder import Dropout

    dropout = Dropout(0.25)
    x = torch.ones(1001, 33)
    y = dropout(x)
    assert abs(float((y == 0).float().mean()) - 0.25) <= 0.01
    assert bool(((y == 0) | (y == 1 / 0.75)).all())
    assert torch.equal(dropout.eval()(x), x)
    torch.manual_seed(5)
    first = dropout.train()(x)
    torch.manual_seed(5)
    assert torch.equal(first, dropout(x))


@ENCODERS
@PREDICTORS
def test_config_survives_its_dict(encoder: str, predictor: str) -> None:
    config = replace(SMALL, encoder=encoder, predictor=predictor, ranks={"blocks.0.ff_in": 3})  # type: ignore[arg-type]
    assert TransducerConfig.from_dict(config.to_dict()) == config
    model = Transducer(config)
    assert isinstance(model.blocks[0].ff_in, LowRankLinear)
    assert model.blocks[0].ff_in.rank == 3


def test_halves_of_size_zero_are_left_out() -> None:
    for encoder in ("conformer", "transformer"):
        layers = (LayerSizes(0, 8), LayerSizes(2, 0), LayerSizes(0, 0))
        model = Transducer(replace(SMALL, encoder=encoder, layers=layers)).eval()  # type: ignore[arg-type]
        names = {name for name, _ in model.named_parameters()}
        assert "blocks.0.qkv.weight" not in names and "blocks.1.ff_in.weight" not in names
        encoded, _ = model.encode(torch.randn(1, 9, 13), torch.tensor([9]))
        assert bool(encoded.isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "lstm"}, "encoder: expected conformer or transformer, got 'lstm'"),
        ({"predictor": "lstm"}, "predictor: expected stateless or transformer, got 'lstm'"),
        ({"kernel": 4}, "kernel: expected an odd width, got 4"),
        ({"head_dim": 3}, "head_dim: expected an even number, got 3"),
        ({"ctc_weight": 1.0}, "ctc_weight: expected a share in \\[0, 1\\), got 1.0"),
        ({"dim": 0}, "dim: expected at least 1, got 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_configs_are_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(SMALL, **change)  # type: ignore[arg-type]


def test_wrong_input_is_refused_by_name() -> None:
    model = model_of("conformer", "stateless")
    with pytest.raises(ValueError, match=r"features: expected \[B, T, 13\], got \[2, 9, 80\]"):
        model.encode(torch.zeros(2, 9, 80), torch.tensor([9, 9]))
    with pytest.raises(ValueError, match=r"lengths: expected 1 to T = 9, got \[9, 10\]"):
        model.encode(torch.zeros(2, 9, 13), torch.tensor([9, 10]))
    with pytest.raises(ValueError, match=r"context: expected \[R, at least 2\], got \[4, 1\]"):
        model.predict(torch.zeros(4, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="config: expected fields of TransducerConfig, got"):
        TransducerConfig.from_dict({"vocab_size": 3, "layers": [], "width": 3})
    with pytest.raises(ValueError, match=r"ranks: expected names of linears, got .blocks\.9\.qkv."):
        Transducer(replace(SMALL, ranks={"blocks.9.qkv": 3}))
