"""tree_attention against full attention over each path, and row by row against itself."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prunelm.ops.tree_attention import tree_attention

BACKENDS = ["cpu", "reference"]


def example(R: int, H: int, D: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """R new nodes below a random tree of 40 nodes that is in the pool already."""
    g = torch.Generator().manual_seed(R + 10 * H + 100 * D)
    old, capacity = 40, 40 + R + 3
    slots = torch.randperm(capacity, generator=g).tolist()
    paths = [[slots[0]]]
    for node in range(1, old + R):
        above = torch.randint(0, min(node, old), (), generator=g)
        paths.append([*paths[int(above)], slots[node]])
    new = paths[old:]
    width = max((len(p) for p in new), default=0) + 2
    path = torch.tensor([p + [0] * (width - len(p)) for p in new], dtype=torch.int64)
    length = torch.tensor([len(p) for p in new], dtype=torch.int64)
    angle = torch.rand(R, D // 2, generator=g, dtype=torch.float64) * 6
    pool = torch.randn(2, capacity, H, D, generator=g, dtype=torch.float64)
    qkv = 2 * torch.randn(R, 3, H, D, generator=g, dtype=torch.float64)
    floats = [x.to(dtype) for x in (qkv, angle.cos(), angle.sin(), *pool)]
    return [*floats[:3], path.reshape(R, width), length, *floats[3:]]


def by_loops(inputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Complex rotation and one softmax per row and head."""
    qkv, cos, sin, path, length, key, value = (x.clone() for x in inputs)
    out = torch.zeros_like(qkv[:, 0])
    half = qkv.shape[-1] // 2
    turn = torch.complex(cos, sin)[:, None, None]
    turned = torch.complex(qkv[:, :2, :, :half], qkv[:, :2, :, half:]) * turn
    turned = torch.cat([turned.real, turned.imag], -1)
    for r in range(len(qkv)):
        slot = path[r, length[r] - 1]
        key[slot], value[slot] = turned[r, 1], qkv[r, 2]
    for r in range(len(qkv)):
        along = path[r, : length[r]]
        for h in range(qkv.shape[2]):
            weight = (key[along, h] @ turned[r, 0, h] / math.sqrt(2 * half)).softmax(0)
            out[r, h] = weight @ value[along, h]
    return out, key, value


@pytest.mark.parametrize(
    ("R", "H", "D"),
    [
        pytest.param(9, 2, 16, id="whole"),
        pytest.param(5, 3, 6, id="odd"),
        pytest.param(1, 1, 2, id="least"),
        pytest.param(33, 4, 64, id="wide"),
        pytest.param(0, 2, 8, id="no-rows"),
        pytest.param(3, 0, 8, id="no-heads"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_attention_over_each_path(backend: Any, R: int, H: int, D: int) -> None:
    inputs = example(R, H, D)
    expected = by_loops(inputs)
    out = tree_attention(*inputs, backend=backend)
    for got, wanted in zip((out, *inputs[5:]), expected, strict=True):
        assert got.shape == wanted.shape
        assert ((got - wanted).abs() <= 1e-12).all()


def test_float32_is_as_accurate_as_torch() -> None:
    exact = by_loops(example(17, 4, 64))[0]
    errors = [
        (tree_attention(*example(17, 4, 64, torch.float32), backend=backend) - exact).abs().max()
        for backend in BACKENDS
    ]
    assert errors[0] <= 2 * errors[1]


def test_a_new_row_may_descend_from_another() -> None:
    inputs = example(4, 2, 8)
    path, length = inputs[3], inputs[4]
    path[2, : length[1]], path[2, length[1]] = path[1, : length[1]], path[2, length[2] - 1]
    length[2] = length[1] + 1
    expected = by_loops(inputs)[0]
    assert ((tree_attention(*inputs) - expected).abs() <= 1e-12).all()


def test_a_row_is_the_same_alone_and_its_padding_is_not_read() -> None:
    inputs = example(21, 3, 20, torch.float32)
    qkv, cos, sin, path, length, key, value = inputs
    together = tree_attention(qkv, cos, sin, path, length, key.clone(), value.clone())
    for r in (0, 8, 20):
        own = path[r : r + 1, : length[r]]
        alone = tree_attention(
            *(x[r : r + 1] for x in (qkv, cos, sin)),
            own.contiguous(),
            length[r : r + 1],
            key,
            value,
        )
        assert torch.equal(alone[0], together[r])
    past = torch.arange(path.shape[1]) >= length[:, None]
    spoilt = path.masked_fill(past, -1)
    assert torch.equal(tree_attention(qkv, cos, sin, spoilt, length, key, value), together)


def test_opcheck_and_compilation() -> None:
    inputs = example(3, 2, 8, torch.float32)
    torch.library.opcheck(torch.ops.prunelm.tree_attention.default, tuple(inputs))
    compiled = torch.compile(tree_attention, fullgraph=True, backend="aot_eager")
    twice = [x.clone() for x in inputs]
    assert torch.equal(compiled(*inputs), tree_attention(*twice))
    assert torch.equal(inputs[5], twice[5])


def test_a_wanted_gradient_takes_the_reference() -> None:
    inputs = example(3, 2, 8)
    inputs[0].requires_grad_()
    tree_attention(*inputs).sum().backward()
    assert inputs[0].grad is not None and inputs[0].grad[:, 0].abs().sum() > 0
    with pytest.raises(ValueError, match="backend: 'cpu' cannot run this: a gradient is wanted"):
        tree_attention(*inputs, backend="cpu")


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        pytest.param(0, torch.zeros(3, 3, 2, 7), "qkv: expected an even head_dim, got 7", id="odd"),
        pytest.param(1, torch.zeros(3, 3), "cos: expected size 4 in dimension 1", id="cos"),
        pytest.param(4, torch.tensor([1, 0, 1]), "length: expected 1 to ., got 0", id="length"),
        pytest.param(
            5, torch.zeros(46, 2, 8).double(), "key: expected Float, got Double", id="key"
        ),
        pytest.param(6, torch.zeros(9, 2, 8), "value: expected size 46 in dimension 0", id="value"),
    ],
)
def test_wrong_input_is_refused_by_name(index: int, value: Tensor, message: str) -> None:
    inputs = example(3, 2, 8, torch.float32)
    inputs[index] = value
    with pytest.raises(RuntimeError, match=message):
        tree_attention(*inputs)


def test_a_slot_outside_the_pool_is_refused() -> None:
    inputs = example(3, 2, 8)
    inputs[3][1, 0] = 46
    with pytest.raises(RuntimeError, match="path: expected 0 to 45, got 46"):
        tree_attention(*inputs)
    with pytest.raises(
        ValueError, match="backend: expected None, 'reference', 'cpu' or 'cuda', got 'gpu'"
    ):
        tree_attention(*inputs, backend="gpu")  # type: ignore[arg-type]
