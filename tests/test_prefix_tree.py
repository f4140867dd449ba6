"""The prefix tree against dictionaries of token tuples, over random searches."""

import math
import random

import pytest
import torch

from prunelm.decoding.prefix_tree import PrefixTree
from prunelm.ops.beam_step import BeamStep

INF = math.inf


def step(parents: list[list[int]], tokens: list[list[int]], scores: list[list[float]]) -> BeamStep:
    score = torch.tensor(scores, dtype=torch.float64)
    parts = torch.arange(score.numel(), dtype=torch.float64).view(*score.shape, 1) / -100
    bad = torch.zeros(len(score), dtype=torch.bool)
    return BeamStep(score, torch.tensor(parents), torch.tensor(tokens), parts, bad)


def test_merging_adds_probabilities_and_keeps_the_first_times() -> None:
    tree = PrefixTree(1, 3, terms=0, vocabulary=4, silent=[0])
    tree.advance(0, step([[0, 0, 0]], [[2, 0, 1]], [[-1.0, -2.0, -3.0]]))
    tree.advance(1, step([[1, 0, 2]], [[2, 0, 0]], [[-2.5, -2.6, -INF]]))
    assert tree.emissions(0, 0) == ([2], [1], [0.0])
    assert float(tree.score[0, 0]) == pytest.approx(math.log(math.exp(-2.5) + math.exp(-2.6)))
    assert tree.score[0, 1:].tolist() == [-INF, -INF]
    before = -0.01  # the part that slot 1 had; the rest of the merged score is acoustic too
    merged = float(tree.score[0, 0]) + 2.5
    assert float(tree.parts[0, 0, 0]) == pytest.approx(before + merged)


def test_silent_tokens_extend_nothing() -> None:
    tree = PrefixTree(1, 2, terms=0, vocabulary=4, silent=[3, 1])
    tree.advance(0, step([[0, 0]], [[1, 3]], [[-1.0, -1.0]]))
    assert tree.emissions(0, 0) == ([], [], [])
    assert float(tree.score[0, 0]) == pytest.approx(-1 + math.log(2))


def test_random_searches_agree_with_tuples() -> None:
    """Nodes, rows, paths and predictor contexts are those of the prefixes, also when reused."""
    draw = random.Random(0)
    B, W, V = 3, 4, 5
    tree = PrefixTree(B, W, terms=1, vocabulary=V, silent=[0])
    hyps: list[list[tuple[int, ...]]] = [[()] for _ in range(B)]
    has_row: dict[int, tuple[int, ...]] = {}  # row -> prefix
    context: dict[int, tuple[int, ...]] = {}  # node -> last two tokens
    largest = 0
    for time in range(400):
        new = tree.take_new(2)
        for node, tokens in zip(new.place.tolist(), new.path.tolist(), strict=True):
            context[node] = tuple(tokens)
        for b in range(B):
            for w, prefix in enumerate(hyps[b]):
                assert context[int(tree.node[b, w])] == (0, 0, *prefix)[-2:]
                assert tuple(tree.emissions(b, w)[0]) == prefix
        parents, tokens, scores = [], [], []
        for b in range(B):
            pairs = {
                (draw.randrange(len(hyps[b])), draw.choice([0, 0, 0, 1, 2, 3])) for _ in range(W)
            }
            chosen = sorted(pairs)
            extra = W - len(chosen)
            parents.append([p for p, _ in chosen] + [0] * extra)
            tokens.append([v for _, v in chosen] + [0] * extra)
            scores.append([-float(i) for i in range(len(chosen))] + [-INF] * extra)
        now = step(parents, tokens, scores)
        planned = tree.plan(now)
        values = None
        if planned is not None:
            new, flat = planned
            for r, row in enumerate(new.place.tolist()):
                path = new.path[r, : new.length[r]].tolist()
                assert path[-1] == row
                has_row[row] = (*has_row[path[-2]], int(new.tokens[r])) if len(path) > 1 else ()
                assert [has_row[p] for p in path] == [has_row[row][:i] for i in range(len(path))]
            for b in range(B):
                for w in range(W):
                    at = int(flat[b, w])
                    if scores[b][w] == -INF or tokens[b][w] == 0:
                        assert at == -1
                    else:
                        assert has_row[at // V] == hyps[b][parents[b][w]]
                        assert at % V == tokens[b][w]
            assert max(new.place.tolist(), default=0) < tree.row_capacity
            values = torch.zeros(1, B, W, dtype=torch.float64)
        assert tree.advance(time, now, values) == -1
        for b in range(B):
            found: dict[tuple[int, ...], None] = {}
            for parent, token, score in zip(parents[b], tokens[b], scores[b], strict=True):
                if score > -INF:
                    prefix = hyps[b][parent]
                    found[(*prefix, token) if token else prefix] = None
            hyps[b] = list(found)
        needed = {prefix[:i] for one in hyps for prefix in one for i in range(len(prefix) + 1)}
        assert tree.live_nodes >= len(needed)
        largest = max(largest, tree.live_nodes - len(needed))
    assert largest <= B * W * 9 + 1  # what left the beam in the last frames
    for b in range(B):
        tree.release(b)
    for time in range(400, 2000):
        tree.advance(time, _nothing(B, W))
    assert tree.live_nodes == 1


def _nothing(B: int, W: int) -> BeamStep:
    return step([[0] * W] * B, [[0] * W] * B, [[-INF] * W] * B)


def test_a_whole_prefix_stands_behind_one_start_token() -> None:
    tree = PrefixTree(1, 2, terms=0, vocabulary=4, silent=[0])
    assert tree.take_new(None).path.tolist() == [[0]]
    tree.advance(0, step([[0, 0]], [[2, 0]], [[-1.0, -2.0]]))
    tree.advance(1, step([[0, 1]], [[3, 1]], [[-1.0, -2.0]]))
    new = tree.take_new(None)
    assert new.path.tolist() == [[0, 0, 2], [0, 2, 3], [0, 0, 1]]
    assert new.length.tolist() == [2, 3, 2]
    assert tree.take_new(None).place.tolist() == []


def test_a_value_that_is_no_number_is_reported() -> None:
    tree = PrefixTree(2, 2, terms=1, vocabulary=4, silent=[0])
    now = step([[0, 0]] * 2, [[1, 0]] * 2, [[-1.0, -2.0]] * 2)
    values = torch.zeros(1, 2, 2, dtype=torch.float64)
    values[0, 1, 0] = math.nan
    assert tree.advance(0, now, values) == 1
    assert tree.score[1].tolist() == [-2.0, -INF]


def test_wrong_sizes_are_refused_by_name() -> None:
    tree = PrefixTree(1, 2, terms=1, vocabulary=4, silent=[0])
    now = step([[0, 0]], [[1, 0]], [[-1.0, -2.0]])
    with pytest.raises(ValueError, match="values: expected 2 elements, got 3"):
        tree.advance(0, now, torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="token: expected 2 elements, got 1"):
        tree.plan(now._replace(token=now.token[:, :1]))
