"""beam_step against a search by lists and loops; its ties, NaN, gradients and compilation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prunelm.ops.beam_step import beam_step

BACKENDS = ["cpu", "reference"]
INF = math.inf


def by_loops(
    score: Tensor,
    am_logits: Tensor,
    terms: Any = (),
    slot: Any = None,
    silent: tuple[int, ...] = (0,),
    token_reward: Any = None,
    temperature: float = 1.0,
    blank_penalty: float = 0.0,
    prune: str = "late",
    weigh_blank: bool = False,
) -> list[list[tuple[float, int, int, list[float]]]]:
    """The contract by lists: per utterance what was chosen, as (score, parent, token, parts)."""
    results = []
    B, W, V = am_logits.shape
    for b in range(B):
        candidates = []
        for w in range(W):
            code = 0 if slot is None else int(slot[b, w])
            base = float(score[b, w])
            if code == 3 or base == -INF:
                continue
            if code == 2:
                candidates.append((base, base, w, silent[0], [0.0] * (1 + len(terms))))
                continue
            y = [float(x) for x in am_logits[b, w]]
            y[silent[0]] -= blank_penalty
            y = [x / temperature for x in y]
            high = max(y)
            if high == -INF:
                continue
            normaliser = high + math.log(math.fsum(math.exp(x - high) for x in y))
            lp = [x - normaliser for x in y]
            tokens = [v for v in range(V) if lp[v] > -INF and (code == 0 or v == silent[0])]
            if prune == "early":
                tokens = sorted(tokens, key=lambda v: (-lp[v], v))[:W]
            for v in tokens:
                parts, reward = [lp[v]], 0.0
                for rows, row, weight in terms:
                    factor, part = float(weight[b]), 0.0
                    if factor and v not in silent:
                        part = factor * float(rows[int(row[b, w]), v])
                        if weigh_blank:
                            part += factor * math.log(max(1 - math.exp(lp[silent[0]]), 0.01))
                    elif factor and v == silent[0] and weigh_blank:
                        part = factor * lp[v]
                    parts.append(part)
                if token_reward is not None and v not in silent:
                    reward = float(token_reward[b])
                total = base + sum(parts) + reward
                chosen_by = base + lp[v] if prune == "after" else total
                candidates.append((chosen_by, total, w, v, parts))
        candidates.sort(key=lambda c: (-c[0], c[2], c[3]))
        results.append([c[1:] for c in candidates[:W] if c[1] > -INF])
    return results


def example(B: int, W: int, V: int, n: int = 2, L: int = 6, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    score = normal(B, W)
    score[torch.rand(B, W, generator=g) < 0.15] = -INF
    terms = tuple(
        (normal(L, V).log_softmax(-1), torch.randint(0, L, (B, W), generator=g), normal(B))
        for _ in range(n)
    )
    slot = torch.randint(0, 4, (B, W), generator=g) * (torch.rand(B, W, generator=g) < 0.3)
    return {
        "score": score,
        "am_logits": 2 * normal(B, W, V),
        "terms": terms,
        "slot": slot,
        "token_reward": normal(B),
    }


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(cast(v, dtype) for v in value)
    return value


def assert_same(got: Any, expected: Any, blank: int, tolerance: float) -> None:
    score, parent, token, parts, bad = got
    assert not bad.any()
    for b, rows in enumerate(expected):
        for w in range(score.shape[1]):
            if w >= len(rows):
                assert score[b, w] == -INF and parent[b, w] == w and token[b, w] == blank
                assert (parts[b, w] == 0).all()
                continue
            total, from_w, v, pieces = rows[w]
            assert (int(parent[b, w]), int(token[b, w])) == (from_w, v)
            assert abs(float(score[b, w]) - total) <= tolerance
            for got_part, piece in zip(parts[b, w].tolist(), pieces, strict=True):
                assert abs(got_part - piece) <= tolerance


SHAPES = [
    pytest.param(3, 4, 37, id="odd"),
    pytest.param(1, 1, 1, id="one"),
    pytest.param(0, 4, 5, id="no-utterance"),
    pytest.param(2, 8, 3, id="beam-above-vocabulary"),
    pytest.param(5, 3, 500, id="units"),
    pytest.param(2, 5, 64, id="whole-lanes"),
]


@pytest.mark.parametrize("prune", ["late", "early", "after"])
@pytest.mark.parametrize(("B", "W", "V"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_a_search_by_loops(backend: Any, B: int, W: int, V: int, prune: Any) -> None:
    for seed in range(3):
        values = example(B, W, V, seed=seed)
        for extra in (
            {},
            {"silent": (V - 1, 0)[: min(V, 2)], "blank_penalty": 0.7, "temperature": 1.3},
            {"weigh_blank": True},
        ):
            expected = by_loops(**values, **extra, prune=prune)  # type: ignore[arg-type]
            got = beam_step(**values, **extra, prune=prune, backend=backend)  # type: ignore[arg-type]
            blank = extra.get("silent", (0,))[0]  # type: ignore[attr-defined]
            assert_same(got, expected, blank, 1e-9)


@pytest.mark.parametrize("prune", ["late", "early", "after"])
@pytest.mark.parametrize("score_dtype", [torch.float32, torch.float64], ids=["s32", "s64"])
def test_float32_matches_and_rows_may_be_half(score_dtype: torch.dtype, prune: Any) -> None:
    values = example(6, 4, 501, seed=4)
    values = {name: cast(value, torch.float32) for name, value in values.items()}
    (rows, row, weight), second = values["terms"]
    values["terms"] = ((rows.bfloat16(), row, weight.to(score_dtype)), second)
    values["score"] = values["score"].to(score_dtype)
    got = beam_step(**values, prune=prune, backend="cpu")
    assert got.score.dtype == got.parts.dtype == score_dtype
    assert_same(got, by_loops(**values, prune=prune), 0, 3e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prune", ["late", "early", "after"])
def test_ties_go_to_the_lowest_parent_then_the_lowest_token(backend: Any, prune: Any) -> None:
    got = beam_step(torch.zeros(1, 3), torch.zeros(1, 3, 40), prune=prune, backend=backend)
    assert got.parent.tolist() == [[0, 0, 0]]
    assert got.token.tolist() == [[0, 1, 2]]
    narrow = beam_step(torch.zeros(1, 5), torch.zeros(1, 5, 2), prune=prune, backend=backend)
    assert narrow.parent.tolist() == [[0, 0, 1, 1, 2]]
    assert narrow.token.tolist() == [[0, 1, 0, 1, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_impossible_token_is_dead_and_nothing_left_is_empty(backend: Any) -> None:
    am_logits = torch.full((2, 2, 3), -INF)
    am_logits[0, 1, 2] = 4.0
    rows = torch.tensor([[0.0, 0.0, INF]])  # an impossible token stays dead whatever a term says
    terms = ((rows[:, [2, 2, 0]], torch.zeros(2, 2, dtype=torch.int64), torch.ones(2)),)
    got = beam_step(torch.zeros(2, 2), am_logits, terms, backend=backend)
    assert got.score.tolist() == [[0.0, -INF], [-INF, -INF]]
    assert got.parent.tolist() == [[1, 1], [0, 1]]
    assert got.token.tolist() == [[2, 0], [0, 0]]
    assert not got.bad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prune", ["late", "after"])
def test_a_term_of_minus_infinity_kills_and_the_rest_move_up(backend: Any, prune: Any) -> None:
    am_logits = torch.tensor([[[0.0, 3.0, 2.0], [0.0, 0.0, 0.0]]])
    rows = torch.tensor([[-1.0, -INF, -1.0]])
    terms = ((rows, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1)),)
    got = beam_step(torch.tensor([[0.0, -INF]]), am_logits, terms, prune=prune, backend=backend)
    assert got.token.tolist() == [[2, 0]]
    assert got.parent.tolist() == [[0, 0 if prune == "late" else 1]]
    assert not got.bad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prune", ["late", "early", "after"])
@pytest.mark.parametrize("where", ["score", "logits", "rows", "plus-inf"])
def test_nan_is_flagged_and_stays_with_its_utterance(backend: Any, prune: Any, where: str) -> None:
    clean = example(3, 4, 19, n=1, seed=2)
    clean["slot"] = None
    clean["score"] = clean["score"].where(clean["score"] != -INF, -1.0)
    spoilt = {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in clean.items()
    }
    if where == "score":
        spoilt["score"][1, 2] = torch.nan
    elif where == "logits":
        spoilt["am_logits"][1, 2, 5] = torch.nan
    elif where == "plus-inf":
        spoilt["am_logits"][1, 2, 5] = INF
    else:
        rows, row, weight = clean["terms"][0]
        row = row % (len(rows) - 1)
        clean["terms"] = ((rows, row, weight),)
        rows, row = rows.clone(), row.clone()
        rows[-1] = torch.nan
        row[1] = len(rows) - 1
        spoilt["terms"] = ((rows, row, weight),)
    before = beam_step(**clean, prune=prune, backend=backend)
    after = beam_step(**spoilt, prune=prune, backend=backend)
    assert after.bad.tolist() == [False, True, False]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[[0, 2]], new[[0, 2]])
    assert not after.score.isnan().any() and not (after.score == INF).any()


def test_what_is_not_looked_at_may_hold_anything() -> None:
    values = example(2, 3, 11, n=1)
    values["slot"] = torch.tensor([[0, 3, 2], [1, 0, 3]])
    values["score"][:] = -1.0
    expected = beam_step(**values)
    values["am_logits"][0, 1:] = torch.nan
    values["am_logits"][1, 2] = torch.nan
    rows, row, weight = values["terms"][0]
    row[0, 1:], row[1, 0], row[1, 2] = -7, 99, 99
    rows = torch.cat([rows, torch.full_like(rows[:1], torch.nan)])
    off = (rows, torch.full_like(row, len(rows) - 1), torch.zeros(2, dtype=torch.float64))
    got = beam_step(**{**values, "terms": ((rows, row, weight), off)})
    for old, new in zip(expected, got, strict=True):
        assert torch.equal(old, new[..., :2] if new.dim() == 3 else new)


@pytest.mark.parametrize("prune", ["late", "early", "after"])
def test_an_utterance_is_the_same_alone_and_in_a_batch(prune: Any) -> None:
    values = example(40, 4, 700, seed=3)  # large enough for several threads
    values = {name: cast(value, torch.float32) for name, value in values.items()}
    together = beam_step(**values, prune=prune)
    for b in (0, 7, 39):
        one = slice(b, b + 1)
        alone = beam_step(
            values["score"][one],
            values["am_logits"][one],
            tuple((rows, row[one], weight[one]) for rows, row, weight in values["terms"]),
            slot=values["slot"][one],
            token_reward=values["token_reward"][one],
            prune=prune,
        )
        for whole, single in zip(together, alone, strict=True):
            assert torch.equal(whole[one], single)


VALUES = [-2.0, -1.0, -0.0, 0.0, 0.5, -INF]  # few, so that totals are equal often


@pytest.mark.parametrize("prune", ["late", "early", "after"])
@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 63, 64, 65, 130, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ties_and_the_impossible_in_rows_of_any_length(
    dtype: torch.dtype, V: int, prune: Any
) -> None:
    g = torch.Generator().manual_seed(V)
    for W in (1, 4, 40):

        def some(*shape: int) -> Tensor:
            picks = torch.randint(0, len(VALUES), shape, generator=g)
            return torch.tensor(VALUES, dtype=dtype)[picks]

        am_logits, score = some(6, W, V), some(6, W)
        am_logits[0] = -INF
        am_logits[1] = 0.5
        score[2] = -0.0
        terms = tuple(
            (some(5, V), torch.randint(0, 5, (6, W), generator=g), torch.full((6,), 0.5).to(dtype))
            for _ in range(2)
        )
        for n in range(3):
            for silent in ((0,), tuple(dict.fromkeys((V - 1, V // 2)))):
                arguments: dict[str, Any] = {"silent": silent, "prune": prune}
                want = beam_step(score, am_logits, terms[:n], **arguments, backend="reference")
                got = beam_step(score, am_logits, terms[:n], **arguments, backend="cpu")
                assert torch.equal(got.bad, want.bad)
                assert torch.equal(got.score.isinf(), want.score.isinf())
                filled = ~want.score.isinf()
                gap = (got.score - want.score)[filled].abs().max() if filled.any() else 0
                assert gap <= 1e-5
                # Equal logits give equal totals, to the bit; else rounding orders neighbours.
                assert torch.equal(got.parent[1], want.parent[1]) or n
                assert torch.equal(got.token[1], want.token[1]) or n


@pytest.mark.parametrize("prune", ["late", "early", "after"])
def test_two_candidates_alike_in_all_come_in_order(prune: Any) -> None:
    g = torch.Generator().manual_seed(0)
    am_logits = torch.randn(1, 1, 300, generator=g).expand(1, 3, 300).clone()
    am_logits[..., 1::2] = am_logits[..., ::2]  # each token has a twin
    rows = torch.randn(1, 300, generator=g)
    rows[:, 1::2] = rows[:, ::2]
    term = (rows, torch.zeros(1, 3, dtype=torch.int64), torch.ones(1))
    got = beam_step(torch.tensor([[0.25, 0.25, 0.25]]), am_logits, (term,), prune=prune)
    pairs = list(zip(got.parent[0].tolist(), got.token[0].tolist(), strict=True))
    assert pairs == sorted(pairs) and len(set(pairs)) == 3
    assert pairs[0][1] % 2 == 0 and pairs[1] == (0, pairs[0][1] + 1) and pairs[2][0] == 1


def test_the_best_hypothesis_may_stand_anywhere() -> None:
    values = {name: cast(x, torch.float32) for name, x in example(9, 12, 333, seed=8).items()}
    best = beam_step(**values)
    turned = torch.randperm(12)
    moved = {name: values[name][:, turned] for name in ("score", "am_logits", "slot")}
    terms = tuple((rows, row[:, turned], weight) for rows, row, weight in values["terms"])
    got = beam_step(**{**values, **moved, "terms": terms})
    assert torch.equal(got.score, best.score) and torch.equal(got.token, best.token)
    filled = best.score != -INF
    assert torch.equal(turned[got.parent][filled], best.parent[filled])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rows_of_other_dtypes_are_those_numbers(
    dtype: torch.dtype, rows_dtype: torch.dtype
) -> None:
    for V in (5, 100):
        values = {name: cast(x, dtype) for name, x in example(3, 4, V, seed=1).items()}
        stored = [(rows.to(rows_dtype), row, weight) for rows, row, weight in values["terms"]]
        wide = [(rows.to(dtype), row, weight) for rows, row, weight in stored]
        got = beam_step(**{**values, "terms": stored})
        for one, other in zip(got, beam_step(**{**values, "terms": wide}), strict=True):
            assert torch.equal(one, other)


def test_sums_that_overflow_are_no_reason_to_call_a_row_bad() -> None:
    am_logits = torch.full((1, 2, 600), 3e38)
    am_logits[0, :, 400:] = -INF
    rows = torch.full((1, 600), 3e38)
    rows[0, 3] = -INF
    term = (rows, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1))
    want = beam_step(torch.zeros(1, 2), am_logits, (term,), backend="reference")
    got = beam_step(torch.zeros(1, 2), am_logits, (term,))
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    assert not got.bad.any()


def test_log_probs_are_as_accurate_as_torch() -> None:
    am_logits = torch.randn(8, 1, 5000) * 6
    exact = am_logits.double().log_softmax(-1)
    got = beam_step(torch.zeros(8, 1), am_logits)
    error = (got.parts[..., 0] - exact.gather(2, got.token[..., None])[..., 0]).abs().max()
    assert error <= 2 * max(float((am_logits.log_softmax(-1) - exact).abs().max()), 1e-7)


def leaves(values: dict[str, Any]) -> list[Tensor]:
    parts = [values["score"], values["am_logits"], values["token_reward"]]
    return parts + [x for rows, _, weight in values["terms"] for x in (rows, weight)]


@pytest.mark.parametrize("weigh_blank", [False, True], ids=["plain", "weigh-blank"])
@pytest.mark.parametrize("prune", ["late", "early", "after"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_what_was_chosen(backend: Any, prune: Any, weigh_blank: bool) -> None:
    values = example(2, 3, 7, seed=6)
    values["score"] = values["score"].where(values["score"] != -INF, 0.1)
    inputs = leaves(values)
    for x in inputs:
        x.requires_grad_()

    def chosen(score: Tensor, am: Tensor, reward: Tensor, *terms: Tensor) -> tuple[Tensor, ...]:
        rows = [row for _, row, _ in values["terms"]]
        out = beam_step(
            score,
            am,
            tuple(zip(terms[::2], rows, terms[1::2], strict=True)),
            slot=values["slot"],
            token_reward=reward,
            silent=(0, 3),
            temperature=1.4,
            blank_penalty=0.3,
            prune=prune,
            weigh_blank=weigh_blank,
            backend=backend,
        )
        filled = out.score != -INF
        return out.score.where(filled, 0), out.parts

    assert torch.autograd.gradcheck(chosen, inputs)


def test_opcheck() -> None:
    values = {name: cast(value, torch.float32) for name, value in example(2, 3, 9).items()}
    for x in leaves(values)[1:]:
        x.requires_grad_()
    rows, row, weight = zip(*values["terms"], strict=True)
    args = (values["score"], values["am_logits"], list(rows), list(row), list(weight))
    rest = (values["slot"], [0], values["token_reward"], 1.0, 0.5, "late", False)
    torch.library.opcheck(torch.ops.prunelm.beam_step.default, (*args, *rest))


def test_compiles_whole() -> None:
    values = {name: cast(value, torch.float32) for name, value in example(2, 3, 9).items()}
    compiled = torch.compile(beam_step, fullgraph=True, backend="aot_eager")
    for plain, traced in zip(beam_step(**values), compiled(**values), strict=True):
        assert torch.equal(plain, traced)


ZEROS = torch.zeros
REFUSED = [
    pytest.param("score", ZEROS(2, 4), r"expected size 3 in dimension 1, got \[2, 4\]", id="score"),
    pytest.param("am_logits", ZEROS(2, 3), "expected 3 dimensions", id="logits"),
    pytest.param("am_logits", ZEROS(2, 3, 0), "expected W and V of at least 1", id="no-tokens"),
    pytest.param("silent", (), "expected at least the blank token, got none", id="no-blank"),
    pytest.param("silent", (0, 9), "expected tokens from 0 to 8, got 9", id="silent"),
    pytest.param("temperature", 0.0, "expected a number above 0", id="temperature"),
    pytest.param("slot", torch.full((2, 3), 4), "expected 0 to 3, got 4", id="slot"),
    pytest.param("slot", ZEROS(2, 3), "expected Long, got Float", id="slot-dtype"),
    pytest.param("token_reward", ZEROS(3), "expected size 2 in dimension 0", id="reward"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_wrong_input_is_refused_by_name(name: str, value: Any, message: str) -> None:
    values = {"score": torch.zeros(2, 3), "am_logits": torch.zeros(2, 3, 9)}
    with pytest.raises(RuntimeError, match=f"{name}: {message}"):
        beam_step(**{**values, name: value})


def test_wrong_terms_backend_and_prune_are_refused() -> None:
    score, am_logits = torch.zeros(2, 3), torch.zeros(2, 3, 9)
    row, weight = torch.full((2, 3), 6), torch.ones(2)
    with pytest.raises(RuntimeError, match="row: expected 0 to 5, got 6"):
        beam_step(score, am_logits, ((torch.zeros(6, 9), row, weight),))
    with pytest.raises(RuntimeError, match=r"rows: expected size 9 in dimension 1, got \[6, 8\]"):
        beam_step(score, am_logits, ((torch.zeros(6, 8), row, weight),))
    with pytest.raises(ValueError, match="prune: expected late, early or after, got 'never'"):
        beam_step(score, am_logits, prune="never")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"backend: expected None, 'cpu', .*, got 'gpu'"):
        beam_step(score, am_logits, backend="gpu")  # type: ignore[arg-type]
