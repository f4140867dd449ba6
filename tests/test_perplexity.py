import math

import pytest
import torch
from torch import Tensor, nn

from prunelm.data.tokenizer import Tokenizer
from prunelm.metrics.perplexity import UNKNOWN, Perplexity, line_nll, perplexity
from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM

LINES = ["the cat sat on the mat", "it's a dog", "a", "", "the quick brown fox jumps over 5 dogs"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([line.replace("5", "") for line in LINES], 100, "char")


@pytest.fixture
def model(tokenizer: Tokenizer) -> TransformerLM:
    model = TransformerLM(LMConfig.preset("tiny", tokenizer.vocab_size, dropout=0.5))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def nll_of(model: TransformerLM, ids: list[int]) -> float:
    """-log P token by token, each from a forward pass over all that comes before it."""
    total = 0.0
    line = [0, *ids, 0]
    for i in range(1, len(line)):
        log_probs = model(torch.tensor([line[:i]]))[0, -1].double().log_softmax(-1)
        total -= float(log_probs[line[i]])
    return total


def test_it_is_the_sum_over_tokens_and_ends(model: TransformerLM, tokenizer: Tokenizer) -> None:
    result = perplexity(model, LINES, tokenizer)
    model.eval()
    kept = [tokenizer.encode(line) for line in LINES if line]
    nll = sum(nll_of(model, ids) for ids in kept)
    tokens = sum(map(len, kept))
    assert abs(result.nll - nll) <= 1e-5 * nll
    assert (result.lines, result.words, result.tokens, result.unknown) == (4, 18, tokens, 1)
    assert result.per_token == pytest.approx(math.exp(nll / (tokens + 4)), rel=1e-5)
    assert result.per_word == pytest.approx(math.exp(nll / (18 + 4)), rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 25, 60, 10_000])
def test_batches_change_nothing(
    model: TransformerLM, tokenizer: Tokenizer, batch_tokens: int
) -> None:
    ids = [tokenizer.encode(line) for line in [*LINES, *LINES[::-1]]]
    apart = torch.cat([line_nll(model, [line]) for line in ids])
    together = line_nll(model, ids, batch_tokens=batch_tokens)
    assert together.dtype == torch.float64
    assert (together - apart).abs().max() <= 1e-4
    assert (together[3] - together[6]).abs() <= 1e-6  # the empty line: its end is predicted too
    assert together[3] > 0


def test_no_batch_is_larger_than_asked(tokenizer: Tokenizer) -> None:
    sizes = []

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 50)

        def forward(self, tokens: Tensor) -> Tensor:
            sizes.append(tokens.numel())
            return self.embedding(tokens)  # type: ignore[no-any-return]

    ids = [[2] * n for n in (3, 9, 1, 30, 0, 9, 5, 5)]
    line_nll(Watch(), ids, batch_tokens=20)
    assert max(sizes[1:]) <= 20
    assert sizes[0] == 31  # alone, though longer
    assert len(sizes) < len(ids)


def test_a_model_that_knows_nothing_has_the_vocabularys_size(tokenizer: Tokenizer) -> None:
    model = TransformerLM(LMConfig.preset("tiny", tokenizer.vocab_size))
    with torch.no_grad():
        model.embedding.weight.zero_()
    result = perplexity(model, LINES, tokenizer)
    assert result.per_token == pytest.approx(tokenizer.vocab_size)


def test_the_mode_is_left_as_it_was(model: TransformerLM, tokenizer: Tokenizer) -> None:
    model.train()
    first = perplexity(model, LINES, tokenizer)
    assert model.training
    assert first == perplexity(model.eval(), LINES, tokenizer)
    assert not model.training


def test_bad_input_is_refused(model: TransformerLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lines: expected at least one with a word, got none"):
        perplexity(model, ["", " "], tokenizer)
    other = Tokenizer.train(["abc"], 100, "char")
    message = f"tokenizer: expected the model's {tokenizer.vocab_size} ids, got {other.vocab_size}"
    with pytest.raises(ValueError, match=message):
        perplexity(model, LINES, other)
    with pytest.raises(ValueError, match="batch_tokens: expected at least 1, got 0"):
        line_nll(model, [[2]], batch_tokens=0)


def test_a_long_line_is_read_in_windows(
    model: TransformerLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunelm.metrics.perplexity.WINDOW", 8)
    generator = torch.Generator().manual_seed(1)
    lines = [torch.randint(2, 20, (size,), generator=generator).tolist() for size in (7, 8, 29, 40)]
    found = line_nll(model, lines, batch_tokens=20)
    model.eval()
    for line, nll in zip(lines, found.tolist(), strict=True):
        whole = [0, *line, 0]
        expected = 0.0
        for i in range(1, len(whole)):
            # The window that predicts token i first: it begins at a multiple of 4, ends 8 later.
            begin = 0 if i <= 8 else 4 * math.ceil((i - 8) / 4)
            log_probs = model(torch.tensor([whole[begin:i]]))[0, -1].double().log_softmax(-1)
            expected -= float(log_probs[whole[i]])
            assert i - begin > 4 or begin == 0
        assert nll == pytest.approx(expected, rel=1e-5)


def test_a_line_of_many_tokens_stays_small(tokenizer: Tokenizer) -> None:
    model = TransformerLM(LMConfig(tokenizer.vocab_size, 8, 4, (LayerSizes(1, 8),)))
    longest = 0
    forward = model.forward

    def watch(tokens: Tensor) -> Tensor:
        nonlocal longest
        longest = max(longest, tokens.numel())
        return forward(tokens)

    model.forward = watch  # type: ignore[method-assign]
    found = line_nll(model, [[2] * 100_000])
    assert longest <= 8192
    assert float(found) == pytest.approx(100_001 * math.log(tokenizer.vocab_size), rel=0.1)


def test_numbers_that_are_none_are_refused_by_line(
    model: TransformerLM, tokenizer: Tokenizer
) -> None:
    with torch.no_grad():
        model.embedding.weight[tokenizer.encode("q")[-1]] = math.nan
    assert UNKNOWN not in tokenizer.encode("q")
    with pytest.raises(ValueError, match="expected finite log-probabilities, got NaN in line 2"):
        perplexity(model, ["", "a"], tokenizer)
    with torch.no_grad():
        model.embedding.weight.zero_()
        model.embedding.weight[0] = math.inf
    with pytest.raises(ValueError, match=r"expected finite log-probabilities, got .* in line 1"):
        perplexity(model, ["a"], tokenizer)


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    found = Perplexity(nll=1e6, tokens=1, words=1, lines=1, unknown=0)
    assert found.per_token == found.per_word == math.inf
