"""mbs and greedy against slow searches by dictionaries and lists, and bit for bit in any batch."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelm.decoding import Fusion, Hypothesis, greedy, mbs
from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
from prunelm.models.transducer import Transducer, TransducerConfig

V, D = 6, 5
INF = math.inf


class TinyRecogniser(nn.Module):
    """A stateless transducer of two tables and one linear; its encoder is left out."""

    context_size = 2

    def __init__(self, vocabulary: int = V, blank_bias: float = 1.0) -> None:
        super().__init__()
        self.tables = nn.Parameter(torch.randn(2, vocabulary, D, dtype=torch.float64))
        self.out = nn.Parameter(torch.randn(vocabulary, D, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(vocabulary, dtype=torch.float64))
        self.bias.data[0] = blank_bias

    def predict(self, context: Tensor) -> Tensor:
        return self.tables[0, context[:, 0]] + self.tables[1, context[:, 1]]

    def project_encoded(self, encoded: Tensor) -> Tensor:
        return encoded

    def project_predicted(self, predicted: Tensor) -> Tensor:
        return predicted

    def join_projected(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        hidden = torch.tanh(encoded + predicted)
        return 2 * (hidden[..., None, :] * self.out).sum(-1) + self.bias

    def log_probs(self, frame: Tensor, tokens: tuple[int, ...]) -> list[float]:
        context = torch.tensor([(0, 0, *tokens)[-2:]])
        logits: Tensor = self.join_projected(frame, self.predict(context)[0])
        return logits.log_softmax(-1).tolist()  # type: ignore[no-any-return]


def make_lm(vocabulary: int = V, seed: int = 0) -> TransformerLM:
    torch.manual_seed(seed)
    layers = (LayerSizes(2, 16), LayerSizes(0, 8), LayerSizes(1, 0))
    lm = TransformerLM(LMConfig(vocabulary, 12, 4, layers))
    for parameter in lm.parameters():
        nn.init.normal_(parameter, std=0.6)
    return lm.double().eval()


def lm_log_probs(lm: TransformerLM, tokens: tuple[int, ...]) -> list[float]:
    """Of what follows 0, tokens: the whole prefix run again."""
    with torch.no_grad():
        return lm(torch.tensor([(0, *tokens)]))[0, -1].log_softmax(-1).tolist()  # type: ignore[no-any-return]


def log_add(a: float, b: float) -> float:
    high = max(a, b)
    return high if high == -INF else high + math.log(math.exp(a - high) + math.exp(b - high))


def mbs_by_dictionaries(
    model: TinyRecogniser,
    frames: Tensor,
    beam: int,
    lms: list[tuple[TransformerLM, float]],
    silent: tuple[int, ...] = (0,),
    prune: str = "after",
    reward: float = 0.0,
) -> list[tuple[tuple[int, ...], float, tuple[int, ...]]]:
    """The published modified beam search of one utterance; (tokens, score, times), best first."""
    hyps: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {(): (0.0, ())}
    for t, frame in enumerate(frames):
        candidates = []
        for tokens, (score, _) in hyps.items():
            log_probs = model.log_probs(frame, tokens)
            scores = [lm_log_probs(lm, tokens) for lm, _ in lms]
            allowed = range(V)
            if prune == "early":
                allowed = sorted(allowed, key=lambda v: -log_probs[v])[:beam]  # type: ignore[assignment]
            for v in allowed:
                fused = score + log_probs[v]
                if v not in silent:
                    fused += sum(w * s[v] for (_, w), s in zip(lms, scores, strict=True)) + reward
                by = score + log_probs[v] if prune == "after" else fused
                candidates.append((by, fused, tokens, v))
        candidates.sort(key=lambda c: -c[0])
        new: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
        for _, fused, tokens, v in candidates[:beam]:
            times = hyps[tokens][1]
            key = tokens
            if v not in silent:
                key, times = (*tokens, v), (*times, t)
            if key in new:
                new[key] = (log_add(new[key][0], fused), new[key][1])
            else:
                new[key] = (fused, times)
        hyps = new
    ranked = sorted(hyps.items(), key=lambda item: -item[1][0] / (len(item[0]) + 2))
    return [(tokens, score, times) for tokens, (score, times) in ranked]


def assert_same(got: list[Hypothesis], expected: list[Any]) -> None:
    assert [h.tokens for h in got] == [tokens for tokens, _, _ in expected]
    assert [h.times for h in got] == [times for _, _, times in expected]
    for hypothesis, (_, score, _) in zip(got, expected, strict=True):
        assert abs(hypothesis.score - score) <= 1e-9
        assert abs(sum(hypothesis.parts.values()) - score) <= 1e-9


def ragged(lengths: list[int], dim: int = D, dtype: torch.dtype = torch.float64) -> Any:
    encoded = 1.5 * torch.randn(len(lengths), max(lengths), dim, dtype=dtype)
    return encoded, torch.tensor(lengths)


@pytest.mark.parametrize(
    ("beam", "weights", "options"),
    [
        pytest.param(4, [], {}, id="no-lm"),
        pytest.param(4, [0.4], {}, id="lm"),
        pytest.param(3, [0.5, -0.3], {}, id="lm-minus-another"),
        pytest.param(4, [0.4], {"silent": (0, 1)}, id="unk-as-blank"),
        pytest.param(4, [0.4], {"prune": "late"}, id="late"),
        pytest.param(3, [0.4, 0.2], {"prune": "early"}, id="early"),
        pytest.param(8, [0.7], {"reward": 0.3}, id="beam-above-vocabulary"),
    ],
)
def test_mbs_matches_the_published_search(
    beam: int, weights: list[float], options: dict[str, Any]
) -> None:
    model = TinyRecogniser()
    lms = [(make_lm(seed=i), w) for i, w in enumerate(weights)]
    encoded, lengths = ragged([7, 0, 10, 3, 1])
    fusions = [Fusion(lm, weight, f"lm{i}") for i, (lm, weight) in enumerate(lms)]
    given = {("token_reward" if k == "reward" else k): v for k, v in options.items()}
    got = mbs(model, encoded, lengths, beam, fusions, **given)
    merges = 0
    for b, length in enumerate(lengths.tolist()):
        expected = mbs_by_dictionaries(model, encoded[b, :length], beam, lms, **options)
        assert_same(got[b], expected)
        merges += beam - len(expected)
    assert merges > 0  # or the example shows nothing about merging


def test_mbs_matches_on_many_models() -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        model, lm = TinyRecogniser(blank_bias=2.0 * torch.rand(()).item()), make_lm(seed=seed)
        encoded, lengths = ragged([7, 5])
        got = mbs(model, encoded, lengths, 5, [Fusion(lm, 0.6)])
        for b in range(2):
            frames = encoded[b, : lengths[b]]
            assert_same(got[b], mbs_by_dictionaries(model, frames, 5, [(lm, 0.6)]))


def test_a_wide_beam_sums_all_alignments() -> None:
    """With every prefix kept, a score is the sum over alignments of at most one symbol a frame."""
    model = TinyRecogniser(vocabulary=3)
    encoded, lengths = ragged([4])
    totals: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(3), repeat=4):
        tokens: tuple[int, ...] = ()
        score = 0.0
        for frame, v in zip(encoded[0], path, strict=True):
            score += model.log_probs(frame, tokens)[v]
            tokens = (*tokens, v) if v else tokens
        totals[tokens] = log_add(totals.get(tokens, -INF), score)
    found = mbs(model, encoded, lengths, 200)[0]
    assert {h.tokens for h in found} == set(totals)
    for hypothesis in found:
        assert abs(hypothesis.score - totals[hypothesis.tokens]) <= 1e-9
    assert abs(sum(math.exp(h.score) for h in found) - 1) <= 1e-9
    for hypothesis in mbs(model, encoded, lengths, 3)[0]:  # a narrow one is bounded by it
        assert hypothesis.score <= totals[hypothesis.tokens] + 1e-9


def greedy_by_lists(model: TinyRecogniser, frames: Tensor, most: int) -> Any:
    tokens: tuple[int, ...] = ()
    times: tuple[int, ...] = ()
    score = 0.0
    for t, frame in enumerate(frames):
        for _ in range(most):
            log_probs = model.log_probs(frame, tokens)
            v = log_probs.index(max(log_probs))
            score += log_probs[v]
            if v == 0:
                break
            tokens, times = (*tokens, v), (*times, t)
    return tokens, score, times


@pytest.mark.parametrize("most", [1, 2, 5])
def test_greedy_matches_a_search_by_lists(most: int) -> None:
    for bias in (0.0, 1.0, 3.0):
        model = TinyRecogniser(blank_bias=bias)
        encoded, lengths = ragged([30, 0, 8, 17, 1])
        got = greedy(model, encoded, lengths, max_symbols=most)
        for b, length in enumerate(lengths.tolist()):
            assert_same(got[b], [greedy_by_lists(model, encoded[b, :length], most)])


def test_beam_1_is_greedy_with_one_symbol_a_frame() -> None:
    model = TinyRecogniser()
    encoded, lengths = ragged([30, 12, 25])
    narrow = mbs(model, encoded, lengths, 1)
    for wide, one in zip(narrow, greedy(model, encoded, lengths, max_symbols=1), strict=True):
        assert wide[0].tokens == one[0].tokens and wide[0].times == one[0].times
        assert abs(wide[0].score - one[0].score) <= 1e-12
        assert wide[0].confidence == pytest.approx(one[0].confidence, abs=1e-12)


def test_parts_times_and_confidence() -> None:
    model, lm = TinyRecogniser(), make_lm()
    encoded, lengths = ragged([11])
    fusion = Fusion(lm, 0.5, "novels")
    found = mbs(model, encoded, lengths, 4, [fusion], token_reward=0.2, final_eos=True)[0]
    for hypothesis in found:
        prefixes = [hypothesis.tokens[:i] for i in range(len(hypothesis.tokens) + 1)]
        following = [*hypothesis.tokens, 0]
        expected = 0.5 * sum(
            lm_log_probs(lm, p)[v] for p, v in zip(prefixes, following, strict=True)
        )
        assert abs(hypothesis.parts["novels"] - expected) <= 1e-9
        assert hypothesis.parts["reward"] == pytest.approx(0.2 * len(hypothesis.tokens))
        assert abs(sum(hypothesis.parts.values()) - hypothesis.score) <= 1e-9
        assert list(hypothesis.times) == sorted(hypothesis.times)
        for i, (token, time) in enumerate(zip(hypothesis.tokens, hypothesis.times, strict=True)):
            log_prob = model.log_probs(encoded[0, time], hypothesis.tokens[:i])[token]
            assert hypothesis.confidence[i] == pytest.approx(math.exp(log_prob))
    assert (
        mbs(model, encoded, lengths, 4, [fusion], token_reward=0.2, final_eos=True, nbest=2)[0]
        == found[:2]
    )


def test_a_weight_for_each_utterance() -> None:
    model, lm = TinyRecogniser(), make_lm()
    encoded, lengths = ragged([6, 9, 4])
    together = mbs(model, encoded, lengths, 4, [Fusion(lm, [0.2, 0.0, -0.4])])
    for b, weight in enumerate([0.2, 0.0, -0.4]):
        alone = mbs(model, encoded[b : b + 1], lengths[b : b + 1], 4, [Fusion(lm, weight)])[0]
        assert together[b] == alone


class CountingLM:
    """Counts the prefixes that it is run on."""

    def __init__(self, lm: TransformerLM) -> None:
        self.lm, self.seen = lm, 0
        self.new_cache = lm.new_cache

    def step(self, tokens: Tensor, path: Tensor, length: Tensor, cache: Any) -> Tensor:
        self.seen += len(tokens)
        return self.lm.step(tokens, path, length, cache)


def test_the_language_model_runs_once_for_each_prefix_that_is_extended() -> None:
    model = TinyRecogniser()
    encoded, lengths = ragged([12, 12, 12])
    encoded[1] = encoded[0]  # utterances share their prefixes too
    counts = {}
    for prune in ("after", "late"):
        lm = CountingLM(make_lm())
        mbs(model, encoded[:2], lengths[:2], 4, [Fusion(lm, 0.3)], prune=prune)  # type: ignore[arg-type]
        alone = CountingLM(make_lm())
        mbs(model, encoded[:1], lengths[:1], 4, [Fusion(alone, 0.3)], prune=prune)  # type: ignore[arg-type]
        assert lm.seen == alone.seen
        counts[prune] = lm.seen
    assert counts["after"] < counts["late"] < 4 * 12


def test_prefixes_that_left_the_beam_are_forgotten() -> None:
    """300 frames of 4 hypotheses make over a thousand prefixes; the cache holds far fewer."""
    capacities = []

    class Watched(CountingLM):
        def __init__(self, lm: TransformerLM) -> None:
            super().__init__(lm)
            self.new_cache = self.watch  # type: ignore[method-assign, assignment]

        def watch(self, capacity: int) -> Any:
            capacities.append(capacity)
            return self.lm.new_cache(capacity)

        def step(self, tokens: Tensor, path: Tensor, length: Tensor, cache: Any) -> Tensor:
            capacities.append(int(path.max()) + 1)
            return super().step(tokens, path, length, cache)

    model, lm = TinyRecogniser(blank_bias=3.0), Watched(make_lm())
    encoded, lengths = ragged([300, 280])
    found = mbs(model, encoded, lengths, 6, [Fusion(lm, 0.3)])
    tokens = sum(len(one[0].tokens) for one in found)
    assert lm.seen > 3 * tokens
    assert max(capacities[1:]) <= tokens + 6 * 2 * 12
    for b in range(2):
        frames = encoded[b, : lengths[b]][:20]
        assert_same(mbs(model, frames[None], torch.tensor([20]), 6, [Fusion(lm, 0.3)])[0],
                    mbs_by_dictionaries(model, frames, 6, [(lm.lm, 0.3)]))  # fmt: skip


def real_models() -> tuple[Transducer, TransformerLM]:
    torch.manual_seed(1)
    config = TransducerConfig(
        vocab_size=19, layers=(), dim=24, predictor_dim=20, joiner_dim=33, ctc_weight=0.0
    )
    model = Transducer(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    model.join_out.bias.data[0] += 1.5  # type: ignore[operator, union-attr]
    lm = TransformerLM(LMConfig(19, 24, 6, (LayerSizes(3, 37), LayerSizes(2, 50))))
    for parameter in lm.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, lm.eval()


def test_a_batch_gives_what_its_utterances_give_alone_bit_for_bit() -> None:
    model, lm = real_models()
    encoded, lengths = ragged([23, 7, 0, 40, 31, 1, 12], dim=24, dtype=torch.float32)
    fusion = [Fusion(lm, 0.4)]
    for search in (
        lambda e, n: mbs(model, e, n, 4, fusion),
        lambda e, n: mbs(model, e, n, 3, fusion, prune="late"),
        lambda e, n: greedy(model, e, n),
    ):
        together = search(encoded, lengths)
        assert sum(len(one[0].tokens) for one in together) > 20
        for b, length in enumerate(lengths.tolist()):
            assert search(encoded[b : b + 1, :length], lengths[b : b + 1])[0] == together[b]
        shuffled = torch.tensor([4, 0, 6, 2, 1, 5, 3])
        permuted = search(encoded[shuffled], lengths[shuffled])
        assert permuted == [together[b] for b in shuffled.tolist()]
        padded = F.pad(encoded, (0, 0, 0, 9), value=math.nan)
        assert search(padded, lengths) == together


def test_a_transformer_predictor_gets_its_whole_prefix() -> None:
    torch.manual_seed(2)
    config = TransducerConfig(
        vocab_size=7, layers=(), dim=8, predictor="transformer", predictor_dim=8, head_dim=4,
        predictor_layers=(LayerSizes(2, 8),), joiner_dim=8, ctc_weight=0.0,
    )  # fmt: skip
    model = Transducer(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    encoded, lengths = ragged([9, 14], dim=8, dtype=torch.float32)
    for b, found in enumerate(greedy(model, encoded, lengths, max_symbols=1)):
        tokens: list[int] = []
        for frame in encoded[b, : lengths[b]]:
            with torch.no_grad():
                logits = model.join(frame, model.predict(torch.tensor([[0, *tokens]]))[0])
            if int(logits.argmax()):
                tokens.append(int(logits.argmax()))
        assert list(found[0].tokens) == tokens
        assert mbs(model, encoded, lengths, 1)[b][0].tokens == found[0].tokens
    assert sum(len(one[0].tokens) for one in greedy(model, encoded, lengths)) > 5


class RuledOut(CountingLM):
    """Gives no probability to token 2."""

    def step(self, tokens: Tensor, path: Tensor, length: Tensor, cache: Any) -> Tensor:
        logits = super().step(tokens, path, length, cache)
        logits[:, 2] = -INF
        return logits


@pytest.mark.parametrize("prune", ["after", "late", "early"])
def test_what_the_language_model_rules_out_is_not_found(prune: Any) -> None:
    model = TinyRecogniser()
    encoded, lengths = ragged([20, 15])
    found = mbs(model, encoded, lengths, 4, [Fusion(RuledOut(make_lm()), 0.3)], prune=prune)
    assert all(2 not in h.tokens and h.score > -INF for one in found for h in one)
    free = mbs(model, encoded, lengths, 4, [Fusion(RuledOut(make_lm()), 0.0)], prune=prune)
    assert free == mbs(model, encoded, lengths, 4, [Fusion(make_lm(), 0.0)], prune=prune)


def test_no_way_through_gives_one_empty_hypothesis() -> None:
    model = TinyRecogniser()
    model.bias.data[:] = -INF
    encoded, lengths = ragged([3, 0])
    found = mbs(model, encoded, lengths)
    assert [h.score for one in found for h in one] == [-INF, 0.0]
    assert [h.tokens for one in found for h in one] == [(), ()]
    assert mbs(model, encoded[:0], lengths[:0]) == [] == greedy(model, encoded[:0], lengths[:0])


def test_nan_is_refused_by_utterance_and_frame() -> None:
    model = TinyRecogniser()
    encoded, lengths = ragged([3, 8, 5])
    encoded[1, 6] = math.nan
    for search in (mbs, greedy):
        with pytest.raises(ValueError, match=r"NaN .*in utterance 1 at frame 6"):
            search(model, encoded, lengths)  # type: ignore[operator]
    lm = make_lm()
    lm.embedding.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="a language model's score that is NaN"):
        mbs(model, encoded[:1], lengths[:1], 4, [Fusion(lm, 0.3)])


def test_wrong_input_is_refused_by_name() -> None:
    model, lm = TinyRecogniser(), make_lm()
    encoded, lengths = ragged([3, 5])
    cases: list[tuple[Any, str]] = [
        (lambda: mbs(model, encoded[0], lengths), r"encoded: expected \[B, T, D\], got \[5, 5\]"),
        (lambda: mbs(model, encoded, lengths.int()), r"lengths: expected \[2\] int64, got \[2\]"),
        (lambda: mbs(model, encoded, lengths + 1), r"lengths: expected 0 to T = 5, got \[4, 6\]"),
        (lambda: mbs(model, encoded, lengths, 0), "beam: expected at least 1, got 0"),
        (lambda: mbs(model, encoded, lengths, nbest=0), "nbest: expected at least 1, got 0"),
        (lambda: greedy(model, encoded, lengths, max_symbols=0), "max_symbols: expected at least"),
        (lambda: mbs(model, encoded, lengths, 4, [Fusion(lm, 1), Fusion(lm, 1)]), "distinct names"),
        (lambda: mbs(model, encoded, lengths, 4, [Fusion(lm, [1.0])]), "one number or 2, got"),
        (
            lambda: mbs(model, encoded, lengths, 4, [Fusion(make_lm(9), 0.3)]),
            "fusion 'lm': expected a model of 6 tokens like the recogniser's, got 9",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_models_run_in_eval_mode_and_keep_their_own() -> None:
    model = TinyRecogniser()
    lm = TransformerLM(LMConfig(V, 8, 4, (LayerSizes(1, 8),), dropout=0.5)).train()
    encoded, lengths = ragged([9])
    assert mbs(model, encoded, lengths, 4, [Fusion(lm, 1.0)]) == mbs(
        model, encoded, lengths, 4, [Fusion(lm, 1.0)]
    )
    assert lm.training and model.training
