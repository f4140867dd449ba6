"""On an NVIDIA GPU: tree_attention agrees with float64, in graphs too, whatever is in one call."""

from collections.abc import Sequence

import pytest
import torch
from token_trees import CHILD, assert_right, example
from torch import Tensor

from prunelm import ops
from prunelm.ops.backend import WITH_CUDA

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not WITH_CUDA, reason="built without CUDA"),
]


def on_gpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.cuda() for x in tensors]


def on_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.cpu() for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "lengths, H, D",
    [
        pytest.param((50,) * 64, 8, 64, id="64"),
        pytest.param((300, 1, 2, 33, *[CHILD] * 30), 8, 128, id="128"),
        pytest.param((33, CHILD, CHILD, 5, CHILD, 18), 3, 32, id="32"),
        pytest.param((17, 18, 70), 2, 96, id="lanes-without-numbers"),
        pytest.param((30, CHILD), 2, 256, id="256"),
        pytest.param((33, CHILD, 9), 3, 6, id="6"),
        pytest.param((6, CHILD), 1, 512, id="512"),
        pytest.param((1000,), 1, 64, id="a-long-path"),
        pytest.param((20, *[CHILD, 7] * 100), 4, 64, id="two-launches"),
        pytest.param((), 2, 8, id="no-rows"),
        pytest.param((1, 2), 0, 8, id="no-heads"),
    ],
)
def test_agrees_with_float64(dtype: torch.dtype, lengths: tuple[int, ...], H: int, D: int) -> None:
    before = example(lengths, H, D, dtype)
    order = torch.randperm(len(lengths))  # ancestors among the rows in any order
    before[3:5] = (x[order] for x in before[3:5])
    given = on_gpu(before)
    out = ops.tree_attention(*given)
    assert out.shape == (len(lengths), H, D)
    assert_right(out.cpu(), before, *on_cpu(given[5:]))
    pools = on_gpu(before[5:])
    assert torch.equal(ops.tree_attention(*given[:5], *pools, backend="cuda"), out)


@pytest.mark.parametrize("D", [64, 10])
def test_a_row_is_the_same_alone_and_in_any_call(D: int) -> None:
    given = on_gpu(example((300, CHILD, CHILD, 70, CHILD, *[3, CHILD] * 64), 2, D, torch.bfloat16))
    qkv, cos, sin, path, length, *pools = given
    out = ops.tree_attention(qkv, cos, sin, path, length, *(x.clone() for x in pools))
    for rows in ([slice(0, 128)], [slice(r, r + 1) for r in range(6)]):
        apart = [x.clone() for x in pools]
        for some in rows:
            inputs = [x[some] for x in (qkv, cos, sin)]
            own = path[some, : int(length[some].max())].contiguous()
            got = ops.tree_attention(*inputs, own, length[some], *apart)
            assert torch.equal(got, out[some])


@pytest.mark.parametrize("rows", [64, 200], ids=["one-launch", "two-launches"])
def test_a_graph_replays_on_new_inputs(rows: int) -> None:
    torch.use_deterministic_algorithms(False)  # a graph would hold its fills of memory
    try:

        def draw() -> list[Tensor]:
            drawn = torch.randint(2, 40, (rows,)).tolist()
            lengths = [CHILD if r % 3 == 1 else length for r, length in enumerate(drawn)]
            return example([40, *lengths[1:]], 8, 64, torch.bfloat16)

        def padded(tensors: list[Tensor]) -> list[Tensor]:
            path = torch.nn.functional.pad(tensors[3], (0, 64 - tensors[3].shape[1]))
            return on_gpu([*tensors[:3], path, *tensors[4:]])

        inputs = padded(draw())
        ops.tree_attention(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.tree_attention(*inputs)
        for _ in range(3):
            drawn = draw()
            for tensor, new in zip(inputs, padded(drawn), strict=True):
                tensor.copy_(new)
            out.zero_()
            graph.replay()
            assert_right(out.cpu(), drawn, *on_cpu(inputs[5:]))
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def test_does_not_wait_for_the_device() -> None:
    given = on_gpu(example((5, CHILD, 3), 2, 32, torch.float16))
    ops.tree_attention(*given)  # kernels are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.tree_attention(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_row_with_a_wrong_index_is_nan_and_writes_nowhere() -> None:
    given = on_gpu(example((5, 5, 5, 5), 2, 16, torch.float32))
    right = ops.tree_attention(*given[:5], *(x.clone() for x in given[5:]))
    given[3][0, 1] = 10**12
    given[3][1, 4] = -1
    given[4][2] = 10**12
    out = ops.tree_attention(*given)
    assert bool(out[:3].isnan().all())
    assert torch.equal(out[3], right[3])


def test_the_registered_op_passes_opcheck() -> None:
    given = on_gpu(example((5, CHILD, 3), 2, 32, torch.float32))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.prunelm.tree_attention.default, tuple(given), test_utils=checks)


def test_what_the_kernels_cannot_take_runs_in_torch() -> None:
    for dtype, D, why in ((torch.float64, 8, "qkv is"), (torch.float32, 514, "head_dim is 514")):
        given = example((5, CHILD, 3), 1, D, torch.float32)
        given = [x.to(dtype) if x.is_floating_point() else x.clamp(min=0) for x in given]
        moved = on_gpu(given)
        with pytest.raises(ValueError, match=f"backend: 'cuda' cannot run this: {why}"):
            ops.tree_attention(*moved, backend="cuda")
        expected = ops.tree_attention(*given)
        torch.testing.assert_close(ops.tree_attention(*moved).cpu(), expected, rtol=1e-4, atol=1e-5)
