"""The CUDA tree_attention, run on the CPU (tests/cuda_emulation), agrees with float64."""

import pytest
import torch
from cuda_emulation.emulated import Kernels
from token_trees import CHILD, assert_right, example
from torch import Tensor

from prunelm.ops.tree_attention import tree_attention_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "lengths, H, D",
    [
        pytest.param((300, 1, 2, 33), 2, 64, id="64"),
        pytest.param((33, CHILD, CHILD, 5, CHILD, 18), 1, 32, id="32"),
        pytest.param((300, 33, CHILD), 1, 128, id="128"),
        pytest.param((1, 2, 40), 3, 16, id="16"),
        pytest.param((17, 18, 70), 2, 96, id="lanes-without-numbers"),
        pytest.param((30, CHILD), 1, 256, id="256"),
        pytest.param((1, 2, 33), 1, 2, id="2"),
        pytest.param((33, CHILD, 9), 3, 6, id="6"),
        pytest.param((20, CHILD), 1, 74, id="74"),
        pytest.param((6, CHILD), 1, 512, id="512"),
        pytest.param((1,) * 3, 2, 8, id="roots"),
        pytest.param((), 2, 8, id="no-rows"),
        pytest.param((1, 2), 0, 8, id="no-heads"),
    ],
)
def test_tree_attention(
    kernels: Kernels, dtype: torch.dtype, lengths: tuple[int, ...], H: int, D: int
) -> None:
    before = example(lengths, H, D, dtype)
    before[3:5] = (x.flip(0) for x in before[3:5])  # blocks run in order: ancestors come behind
    key, value = before[5].clone(), before[6].clone()
    out = kernels.tree_attention(*before[:5], key, value)
    assert out.shape == (len(lengths), H, D)
    assert_right(out, before, key, value)


def test_agrees_with_the_reference(kernels: Kernels) -> None:
    given = example((40, CHILD, 3, CHILD, CHILD, 1), 2, 32, torch.float32)
    path, length = given[3], given[4]
    past = torch.arange(path.shape[1]) >= length[:, None]
    pools = [x.clone() for x in given[5:]]
    expected = tree_attention_reference(*given[:3], path.masked_fill(past, 0), length, *pools)
    out = kernels.tree_attention(*given)
    for one, other in zip((out, *given[5:]), (expected, *pools), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("D", [16, 10])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_row_is_the_same_alone_and_in_any_call(
    kernels: Kernels, dtype: torch.dtype, D: int
) -> None:
    # More than 128 rows are stored by a launch of their own.
    given = example((300, CHILD, CHILD, 70, CHILD, *[3, CHILD] * 64), 1, D, dtype)
    qkv, cos, sin, path, length, *pools = given
    assert len(qkv) == 133
    together = [x.clone() for x in pools]
    out = kernels.tree_attention(qkv, cos, sin, path, length, *together)
    for rows in ([slice(0, 128)], [slice(r, r + 1) for r in range(6)]):
        apart = [x.clone() for x in pools]
        for some in rows:
            width = int(length[some].max())  # of the path: its padding does not count
            inputs = (*(x[some] for x in (qkv, cos, sin)), path[some, :width].contiguous())
            got = kernels.tree_attention(*inputs, length[some], *apart)
            assert torch.equal(got, out[some])
        slots = path[torch.arange(6), length[:6] - 1]
        assert all(torch.equal(a[slots], b[slots]) for a, b in zip(apart, together, strict=True))


def test_rows_in_one_slot_have_keys_of_their_own(kernels: Kernels) -> None:
    given = example((1,) * 4, 2, 8, torch.float32)
    given[3][:] = 0
    out = kernels.tree_attention(*given)
    assert torch.equal(out, given[0][:, 2])


@pytest.mark.parametrize("many", [False, True], ids=["one-launch", "two-launches"])
@pytest.mark.parametrize(
    "length, p, slot",
    [
        pytest.param(0, 0, 0, id="length-0"),
        pytest.param(-(2**40), 0, 0, id="length-below-0"),
        pytest.param(8, 0, 0, id="length-beyond-the-path"),
        pytest.param(2**40, 0, 0, id="length-far-beyond"),
        pytest.param(5, 4, -1, id="own-slot"),
        pytest.param(5, 4, 2**40, id="own-slot-far-beyond"),
        pytest.param(5, 1, -3, id="slot-below-0"),
        pytest.param(5, 1, 10**6, id="slot-beyond-the-pool"),
    ],
)
def test_a_row_with_a_wrong_index_is_nan(
    kernels: Kernels, length: int, p: int, slot: int, many: bool
) -> None:
    given = example((5, 5, CHILD, *([2] * 130 if many else [])), 1, 8, torch.float32)
    pools = [x.clone() for x in given[5:]]
    right = kernels.tree_attention(*given[:5], *(x.clone() for x in pools))
    given[4][0] = length
    if p or slot:
        given[3][0, p] = slot
    own = int(example_slot(given, 0)) if 1 <= length <= given[3].shape[1] else -1
    out = kernels.tree_attention(*given)
    assert bool(out[0].isnan().all())
    assert torch.equal(out[1:], right[1:])
    written = {own, *(int(example_slot(given, r)) for r in range(1, len(out)))}
    others = [c for c in range(len(pools[0])) if c not in written]
    assert torch.equal(given[5][others], pools[0][others])


def example_slot(given: list[Tensor], r: int) -> Tensor:
    return given[3][r, given[4][r] - 1]


def test_a_nan_in_the_pool_stays_with_the_rows_that_see_it(kernels: Kernels) -> None:
    given = example((40, 20, 3), 2, 16, torch.bfloat16)
    given[5][given[3][0, 30], 1, 3] = torch.nan
    out = kernels.tree_attention(*given)
    assert bool(out[0, 1].isnan().all())
    assert not bool(out[0, 0].isnan().any()) and not bool(out[1:].isnan().any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_any_size(kernels: Kernels, dtype: torch.dtype) -> None:
    given = example((70, 33, 2), 1, 32, dtype)
    given[5] *= 30
    before = [x.clone() for x in given]
    assert_right(kernels.tree_attention(*given), before, *given[5:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_are_not_aligned(kernels: Kernels, dtype: torch.dtype) -> None:
    def shifted(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    before = example((20, CHILD, 3), 2, 32, dtype)
    given = [shifted(t) for t in before]
    assert_right(kernels.tree_attention(*given), before, *given[5:])


def test_heads_beyond_512_are_refused(kernels: Kernels) -> None:
    with pytest.raises(RuntimeError, match="head_dim: expected at most 512"):
        kernels.tree_attention(*example((2,), 1, 514, torch.float32))
