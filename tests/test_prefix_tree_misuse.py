"""Whatever is passed to the prefix tree: an answer or one clear refusal, which changes nothing."""

import math
import random
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch

from prunelm import _C
from prunelm.decoding.prefix_tree import PrefixTree
from prunelm.ops.beam_step import BeamStep

INF = math.inf


def step(parents: Any, tokens: Any, scores: Any, width: int = 1) -> BeamStep:
    score = torch.tensor(scores, dtype=torch.float64)
    parts = torch.zeros(*score.shape, width, dtype=torch.float64)
    bad = torch.zeros(len(score), dtype=torch.bool)
    return BeamStep(score, torch.tensor(parents), torch.tensor(tokens), parts, bad)


GOOD = step([[0, 0]], [[1, 0]], [[-1.0, -2.0]])


def tree_of() -> PrefixTree:
    """Two utterances of two slots; the first has moved once, the second has a dead slot."""
    tree = PrefixTree(2, 2, terms=1, vocabulary=4, silent=[0])
    tree.advance(0, GOOD)
    return tree


def state(tree: PrefixTree) -> list[Any]:
    return [
        tree.score.tolist(),
        tree.parts.tolist(),
        tree.node.tolist(),
        tree.row.tolist(),
        (tree.node_capacity, tree.row_capacity, tree.live_nodes),
        [tree.emissions(b, w) for b in range(2) for w in range(2)],
    ]


def shrunk(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, 2, 0, 4, [0]), r"utterances: expected 0 to .*, got -1"),
        ((2**62, 4, 3, 4, [0]), r"utterances: expected 0 to .*, got 4611686018427387904"),
        ((1, 0, 0, 4, [0]), r"beam: expected 1 to .*, got 0"),
        ((1, -3, 0, 4, [0]), r"beam: expected 1 to .*, got -3"),
        ((1, 2, -1, 4, [0]), r"terms: expected 0 to .*, got -1"),
        ((1, 2, 2**62, 4, [0]), "terms: expected 0 to"),
        ((2**20, 2**20, 1, 4, [0]), r"utterances x beam x \(1 \+ terms\): expected at most"),
        ((2**16, 2**16, 2**16, 4, [0]), r"utterances x beam x \(1 \+ terms\): expected at most"),
        ((1, 2, 0, 0, []), "vocabulary: expected 1 to 2147483647, got 0"),
        ((1, 2, 0, -5, [0]), "vocabulary: expected 1 to 2147483647, got -5"),
        ((1, 2, 0, 2**31, [0]), "vocabulary: expected 1 to 2147483647, got 2147483648"),
        ((1, 2, 0, 4, [4]), "silent: expected 0 to 3, got 4"),
        ((1, 2, 0, 4, [-1]), "silent: expected 0 to 3, got -1"),
    ],
)
def test_no_such_tree_is_made(sizes: tuple[int, int, int, int, list[int]], message: str) -> None:
    B, W, terms, V, silent = sizes
    with pytest.raises(ValueError, match=message):
        PrefixTree(B, W, terms=terms, vocabulary=V, silent=silent)


def _advance(**changes: Any) -> Callable[[PrefixTree], object]:
    return lambda tree: tree.advance(1, GOOD._replace(**changes))


WRONG: list[tuple[type[Exception], str, Callable[[PrefixTree], object]]] = [
    (IndexError, "utterance: expected 0 to 1, got 10000000", lambda t: t.release(10**7)),
    (IndexError, "utterance: expected 0 to 1, got -1", lambda t: t.release(-1)),
    (IndexError, "utterance: expected 0 to 1, got 2", lambda t: t.emissions(2, 0)),
    (IndexError, "slot: expected 0 to 1, got 5", lambda t: t.emissions(0, 5)),
    (IndexError, "slot: expected 0 to 1, got -1", lambda t: t.emissions(0, -1)),
    (IndexError, "begin: expected 0 to 2, got -1", lambda t: t.plan_live(-1, 1)),
    (IndexError, "end: expected 0 to 2, got 3", lambda t: t.plan_live(0, 3)),
    (IndexError, "end: expected 2 to 2, got 1", lambda t: t.plan_live(2, 1)),
    (ValueError, r"context: expected 0 to .*, got -1", lambda t: t.take_new(-1)),
    (ValueError, "context: expected 0 to", lambda t: t.take_new(2**60)),
    (ValueError, r"path: expected at most .* numbers, got 2 rows of", lambda t: t.take_new(2**28)),
    (ValueError, "time: expected 0 to 2147483647, got -1", lambda t: t.advance(-1, GOOD)),
    (ValueError, "time: expected 0 to 2147483647, got", lambda t: t.advance(2**31, GOOD)),
    (
        TypeError,
        "step: expected a BeamStep, got NoneType",
        lambda t: t.advance(1, cast(BeamStep, None)),
    ),
    (TypeError, "parent: expected a tensor, got NoneType", _advance(parent=None)),
    (
        ValueError,
        "parent: expected int64 numbers, got float32",
        _advance(parent=GOOD.score.float()),
    ),
    (ValueError, r"parent: expected \[0, 2\], got \[\]", _advance(parent=torch.tensor(0))),
    (ValueError, r"parent: expected \[0, 2\], got \[0\]", _advance(parent=GOOD.parent[0, :0])),
    (ValueError, r"parent: expected at most 2 utt.*, got 3", _advance(parent=GOOD.parent[[0] * 3])),
    (ValueError, r"parent: expected \[1, 2\], got \[1, 1\]", _advance(parent=GOOD.parent[:, :1])),
    (ValueError, "token: expected 2 elements, got 1", _advance(token=GOOD.token[:, :1])),
    (ValueError, r"token: expected \[1, 2\], got \[2\]", _advance(token=GOOD.token[0])),
    (ValueError, "score: expected 2 elements, got 0", _advance(score=GOOD.score[:0])),
    (ValueError, r"score: .*on the CPU, got meta", _advance(score=GOOD.score.to("meta"))),
    (ValueError, r"score: .* got torch.bfloat16", _advance(score=GOOD.score.bfloat16())),
    (
        ValueError,
        r"score: .*storage of at least 16 bytes, got 0",
        _advance(score=shrunk(GOOD.score)),
    ),
    (ValueError, r"parts: expected \[1, 2, 1\], got \[4\]", _advance(parts=torch.zeros(4))),
    (ValueError, r"parts: .*expected 1 to 2, got 0", _advance(parts=GOOD.parts[..., :0])),
    (ValueError, r"parts: .*expected 1 to 2, got 3", _advance(parts=GOOD.parts[..., [0] * 3])),
    (
        ValueError,
        r"values: expected \[1, 1, 2\], got \[2\]",
        lambda t: t.advance(1, GOOD, torch.zeros(2)),
    ),
]
STEPS: list[tuple[type[Exception], str, BeamStep]] = [
    (
        IndexError,
        "parent of utterance 0, slot 1: expected 0 to 1, got 2",
        step([[0, 2]], [[1, 0]], [[-1.0, -2.0]]),
    ),
    (
        IndexError,
        "parent of utterance 0, slot 0: expected 0 to 1, got -1",
        step([[-1, 0]], [[1, 0]], [[-1.0, -2.0]]),
    ),
    (
        IndexError,
        "token of utterance 0, slot 0: expected 0 to 3, got 4",
        step([[0, 0]], [[4, 0]], [[-1.0, -2.0]]),
    ),
    (
        IndexError,
        "token of utterance 0, slot 0: expected 0 to 3, got -9",
        step([[0, 0]], [[-9, 0]], [[math.nan, 0.0]]),
    ),
    (
        ValueError,
        r"parent of utterance 1, slot 0: expected a live .*, got slot 1, which is dead",
        step([[0, 0], [1, 0]], [[1, 0]] * 2, [[-1.0, -2.0]] * 2),
    ),
]
WRONG += [(kind, text, lambda t, s=s: t.advance(1, s)) for kind, text, s in STEPS]
WRONG += [(kind, text, lambda t, s=s: t.plan(s)) for kind, text, s in STEPS]


@pytest.mark.parametrize(("kind", "message", "call"), WRONG, ids=range(len(WRONG)))
def test_misuse_is_refused_and_changes_nothing(
    kind: type[Exception], message: str, call: Callable[[PrefixTree], object]
) -> None:
    tree, same = tree_of(), tree_of()
    before = state(tree)
    with pytest.raises(kind, match=message) as refusal:
        call(tree)
    assert "\n" not in str(refusal.value)
    assert state(tree) == before
    # And what cannot be looked at: both go on alike.
    for one in (tree, same):
        one.advance(1, GOOD)
    ways = [(one.plan_live(0, 2), one.take_new(None)) for one in (tree, same)]
    assert [[t.tolist() for t in new] for new in ways[0]] == [
        [t.tolist() for t in new] for new in ways[1]
    ]
    assert state(tree) == state(same)


def test_what_is_dead_is_not_read() -> None:
    tree = tree_of()
    assert tree.plan(step([[0, 77]], [[1, -7]], [[-1.0, -INF]])) is not None
    assert tree.advance(1, step([[0, 77]], [[1, -7]], [[-1.0, -INF]])) == -1
    assert tree.score[0].tolist() == [-1.0, -INF]


def test_counts_that_would_overflow_are_refused_by_name() -> None:
    tree = _C.PrefixTree(1, 2, 0, 4, [0], most=7)
    now = [a.numpy() for a in (GOOD.parent, GOOD.token, GOOD.score, GOOD.parts)]
    for time in range(3):
        assert tree.advance(time, *now, None) == -1
    live = tree.live_nodes()
    with pytest.raises(ValueError, match=r"nodes: expected at most 7, got .* and up to 2 more"):
        for time in range(3, 9):
            tree.advance(time, *now, None)
    assert tree.live_nodes() >= live
    for most in (0, 2**31):
        with pytest.raises(ValueError, match="most: expected 1 to 2147483647"):
            _C.PrefixTree(1, 2, 0, 4, [0], most=most)
    # A prefix that leaves and comes back needs no other node, but emits once more.
    tree = _C.PrefixTree(1, 2, 0, 4, [0], most=11)
    both, tokens = np.zeros((1, 2), np.int64), np.array([[0, 1]])
    with pytest.raises(ValueError, match="emissions: expected at most 11, got 10 and up to 2 more"):
        for time in range(20):
            tree.advance(time, both, tokens, *now[2:], None)


def test_a_deep_tree_is_walked_without_recursion() -> None:
    depth = 60_000
    tree = _C.PrefixTree(1, 1, 0, 4, [0])
    parent, token = np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64)
    score, parts = np.full((1, 1), -1.0), np.zeros((1, 1, 1))
    for time in range(depth):
        tree.advance(time, parent, token, score, parts, None)
        if time % 10_000 == 0:
            assert tree.take_new(1)[0].size > 0
    assert len(tree.emissions(0, 0)[0]) == depth
    # A row for each ancestor, with its whole path, is more than any machine has.
    for refused in (lambda: tree.plan_live(0, 1), lambda: tree.plan(parent, token, score)):
        with pytest.raises(ValueError, match=rf"path: expected at most .*, got {depth + 1} rows"):
            refused()
    assert tree.row_capacity() == 0
    tree.release(0)
    nothing = np.full((1, 1), -INF)
    for time in range(20):
        tree.advance(depth + time, parent, token, nothing, parts, None)
    assert tree.live_nodes() == 1


def test_thousands_of_random_calls_end_in_an_answer_or_a_refusal() -> None:
    draw = random.Random(1)
    integers = [-(2**63), -(2**31), -7, -1, 0, 0, 1, 1, 2, 3, 5, 10**7, 2**31, 2**62, 2**63 - 1]
    floats = [-INF, INF, math.nan, 0.0, -1.0, -2.5, 1e300]

    def shape() -> tuple[int, ...]:
        usual = (draw.randrange(4), 2)
        return (
            usual if draw.random() < 0.7 else tuple(draw.choices([0, 1, 2, 3], k=draw.randrange(4)))
        )

    def whole(like: tuple[int, ...]) -> torch.Tensor:
        wild = draw.random() < 0.2
        numbers = [draw.choice(integers if wild else [0, 0, 1, 2]) for _ in range(math.prod(like))]
        out = torch.tensor(numbers, dtype=torch.int64).view(like)
        return out.int() if draw.random() < 0.1 else out

    def real(like: tuple[int, ...]) -> torch.Tensor:
        numbers = [draw.choice(floats) for _ in range(math.prod(like))]
        out = torch.tensor(numbers, dtype=torch.float64).view(like)
        return shrunk(out) if draw.random() < 0.05 else out

    def random_step() -> BeamStep:
        size = shape()
        sizes = [size if draw.random() < 0.9 else shape() for _ in range(4)]
        width = draw.choice([1, 1, 2, 0, 3])
        parts = real((*sizes[3], width))
        return BeamStep(real(sizes[0]), whole(sizes[1]), whole(sizes[2]), parts, torch.zeros(1))

    calls: list[Callable[[PrefixTree], object]] = [
        lambda t: t.release(draw.choice(integers)),
        lambda t: t.emissions(draw.choice(integers), draw.choice(integers)),
        lambda t: t.plan_live(draw.choice(integers), draw.choice(integers)),
        lambda t: t.take_new(draw.choice([None, 0, 1, 3, -1, 2**29, 2**62, -(2**63)])),
        lambda t: t.plan(random_step()),
        lambda t: t.advance(draw.choice(integers), random_step()),
        lambda t: t.advance(draw.choice([0, 1]), random_step()),
        lambda t: t.advance(draw.choice([0, 1]), random_step(), real((1, *shape()))),
    ]
    tree, refused, answered = tree_of(), 0, 0
    for i in range(6000):
        if i % 40 == 0:
            small = [-1, 0, 1, 2, 3, 2**40, 2**62]
            try:
                sizes = [draw.choice(small) for _ in range(4)]
                PrefixTree(
                    sizes[0],
                    sizes[1],
                    terms=sizes[2],
                    vocabulary=sizes[3],
                    silent=[draw.choice(small)],
                )
            except (ValueError, IndexError):
                pass
            tree = PrefixTree(3, 2, terms=1, vocabulary=3, silent=[0])
        try:
            draw.choice(calls)(tree)
            answered += 1
        except (IndexError, ValueError, TypeError):
            refused += 1
    assert refused > 2000 and answered > 500
