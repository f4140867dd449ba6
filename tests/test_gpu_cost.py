"""What runs on a GPU: predicted from sizes, from measurements where there are some, traceable."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prunelm import BlockSparse, ops
from prunelm.benchmarks import gpu_choice
from prunelm.gpu_index import make_gpu_index
from prunelm.nn import BLOCKS, BlockSparseLinear, LowRankLinear
from prunelm.nn.acceleration import _accelerated_on_gpu, _multiplied_out
from prunelm.ops import gpu_cost as model
from prunelm.ops.backend import WITH_CUDA, WITH_TRITON
from prunelm.ops.gpu_cost import KINDS, card_named

H100 = KINDS[9]
BF16, FLOAT = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _unmeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "TABLES", tmp_path)
    model._table.cache_clear()
    yield
    model._table.cache_clear()


@pytest.mark.parametrize(
    ("name", "major", "known"),
    [
        ("NVIDIA H100 80GB HBM3", 9, "H100"),
        ("NVIDIA H100 PCIe", 9, "H100 PCIe"),
        ("NVIDIA H200", 9, "H200"),
        ("NVIDIA A100-SXM4-80GB", 8, "A100 80GB"),
        ("NVIDIA Something", 9, "H100"),
        ("NVIDIA Something", 7, "A100"),
    ],
)
def test_cards_are_known_by_name_or_kind(name: str, major: int, known: str) -> None:
    assert card_named(name, major).name == known


def test_a_decode_step_is_its_bytes_over_the_bandwidth() -> None:
    dense = model.dense_us(H100, 1, 4096, 4096, BF16)
    assert dense.us == pytest.approx(2 + 2 * (4096**2 + 8192) / 3.35e6)
    own = model.block_sparse_us(H100, "cuda", 1, 4096, 4096, 64 * 16, (64, 64), BF16)
    assert own.us == pytest.approx(2 + 2 * 2 * (4096**2 / 4 + 8192) / 3.35e6)
    assert not dense.measured and not own.measured


@pytest.mark.parametrize("M", [1, 8, 64, 512, 4096])
@pytest.mark.parametrize("d", [64, 512, 1024, 4096])
def test_what_is_not_measured_is_chosen_only_with_a_margin(M: int, d: int) -> None:
    for block in BLOCKS:
        for density in (0.05, 0.25, 0.5, 1.0):
            nnz = round(density * d * d / (block[0] * block[1]))
            chosen = model.best_block(H100, (M,), d, d, {block: nnz}, BF16)
            if chosen:
                backend = model.block_sparse_order(H100, M, d, d, nnz, block, BF16)[0]
                own = model.block_sparse_us(H100, backend, M, d, d, nnz, block, BF16)
                assert own.us <= model.MARGIN * model.dense_us(H100, M, d, d, BF16).us
                assert density < 1 and d > 64


@pytest.mark.parametrize(
    ("M", "block", "dtype", "first"),
    [
        (1, (64, 64), BF16, "cuda"),
        (64, (128, 128), BF16, "cuda"),
        (513, (64, 64), BF16, "cuda"),
        (512, (128, 128), BF16, "cuda"),
        (513, (128, 128), BF16, "triton"),
        (4096, (32, 32), BF16, "cuda"),
        (4096, (16, 16), BF16, "cuda"),
        (17, (16, 4), BF16, "triton"),
        (16, (16, 4), BF16, "cuda"),
        (17, (32, 48), BF16, "triton"),
        (512, (16, 8), FLOAT, "cuda"),
        (4096, (32, 32), FLOAT, "triton"),
    ],
)
def test_backends_are_in_order(M: int, block: model.Block, dtype: torch.dtype, first: str) -> None:
    assert model.block_sparse_order(H100, M, 4096, 4096, 100, block, dtype)[0] == first


def test_low_rank_runs_as_two_products_where_these_are_faster() -> None:
    assert model.low_rank_order(H100, 8, 4096, 4096, 128, BF16)[0] == "cuda"
    assert model.low_rank_order(H100, 4096, 4096, 4096, 128, BF16)[0] == "reference"


def measurements() -> gpu_choice.Found:
    """Triton's kernel 2x dense at M = 4096, CUDA's as fast as dense; low rank 1.5x two products."""
    row = {"M": 4096, "N": 4096, "K": 4096, "block": "64x64", "sparsity": 0.5}
    times = {"us": 1.0, "dense_cold_us": 200.0}
    low = {"M": 16, "N": 4096, "K": 4096, "R": 128, "us": 1.0, "two_cold_us": 6.0}
    return {
        "block_sparse_linear": {
            "machine": "a card", "commit": "abc",
            "rows": [
                {**row, **times, "backend": "triton", "cold_us": 100.0},
                {**row, **times, "backend": "cuda", "cold_us": 200.0},
                {**row, "backend": "cuda", "error": "it failed"},
            ],
        },
        "low_rank_linear": {"rows": [{**low, "backend": "cuda", "cold_us": 4.0}]},
    }  # fmt: skip


def test_measured_times_come_back_out(tmp_path: Path) -> None:
    content = gpu_choice.as_json(H100, measurements())
    (tmp_path / "h100.json").write_text(json.dumps(content))
    sizes = (4096, 4096, 4096)
    dense = model.dense_us(H100, *sizes, BF16)
    assert dense.us == pytest.approx(200, rel=1e-3) and dense.measured
    for backend, us in (("triton", 100), ("cuda", 200)):
        own = model.block_sparse_us(H100, backend, *sizes, 2048, (64, 64), BF16)
        assert own.us == pytest.approx(us, rel=1e-3) and own.measured
    assert model.block_sparse_order(H100, *sizes, 2048, (64, 64), BF16)[0] == "triton"
    assert model.best_block(H100, sizes[:1], 4096, 4096, {(64, 64): 2048}, BF16) == (64, 64)
    own = model.low_rank_us(H100, "cuda", 16, 4096, 4096, 128, BF16)
    two = model.low_rank_us(H100, "reference", 16, 4096, 4096, 128, BF16)
    assert own.us == pytest.approx(4, rel=1e-2) and two.us == pytest.approx(6, rel=1e-2)


def test_what_was_measured_as_slower_is_not_chosen(tmp_path: Path) -> None:
    found = measurements()
    found["block_sparse_linear"]["rows"][0]["cold_us"] = 201.0
    (tmp_path / "h100.json").write_text(json.dumps(gpu_choice.as_json(H100, found)))
    assert model.best_block(H100, (4096,), 4096, 4096, {(64, 64): 2048}, BF16) is None
    assert model.block_sparse_order(H100, 4096, 4096, 4096, 2048, (64, 64), BF16)[0] == "cuda"


def test_the_choice_is_written_for_the_package(tmp_path: Path) -> None:
    (tmp_path / "nvidia-h100-80gb-hbm3.json").write_text(json.dumps(measurements()))
    assert gpu_choice.main(["nvidia-h100-80gb-hbm3", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "choice-h100.json").read_text())["rows"]
    assert len(rows) == 5 and all(row["efficiency"] > 0 for row in rows)
    assert gpu_choice.main(["nvidia-other", "--out", str(tmp_path)]) == 1


def pruned(d: int, block: int, density: float, dtype: torch.dtype = BF16) -> nn.Linear:
    linear = nn.Linear(d, d, dtype=dtype)
    mask = torch.rand(d // block, d // block) < density
    with torch.no_grad():
        linear.weight *= mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return linear


def test_accelerate_replaces_linears_where_blocks_win_on_the_card() -> None:
    linear = pruned(2048, 64, 0.1)
    fast = _accelerated_on_gpu(linear, (1, 64), None, H100)
    assert isinstance(fast, BlockSparseLinear) and fast.weight.block == (64, 64)
    assert _accelerated_on_gpu(nn.Linear(2048, 2048, dtype=BF16), (1,), None, H100) is None
    assert _accelerated_on_gpu(pruned(512, 64, 0.1), (1,), None, H100) is None  # a launch is longer
    assert _accelerated_on_gpu(pruned(256, 64, 0.1, torch.float64), (1,), None, H100) is None
    packed = _accelerated_on_gpu(nn.Linear(100, 70, dtype=BF16), (1,), True, H100)
    assert isinstance(packed, BlockSparseLinear) and packed.weight.sparsity == 0


def test_accelerate_keeps_factors_where_they_win_on_the_card() -> None:
    thin = LowRankLinear(2048, 2048, 64, dtype=BF16)
    assert _multiplied_out(thin, (1, 64), H100) is None
    thick = LowRankLinear(256, 256, 200, activation="relu")
    whole = _multiplied_out(thick, (1,), H100)
    assert isinstance(whole, nn.Sequential)
    x = torch.randn(3, 256)
    torch.testing.assert_close(whole(x), thick(x), rtol=1e-4, atol=1e-5)
    plain = _multiplied_out(LowRankLinear(256, 256, 200), (1,), H100)
    assert type(plain) is nn.Linear


def on_card(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, device="cuda", dtype=dtype)


def block_sparse(N: int, K: int, nnz: int, block: int) -> BlockSparse:
    values = on_card(nnz, block, block).transpose(1, 2)
    crow, col = on_card(N // block + 1, dtype=torch.int32), on_card(nnz, dtype=torch.int32)
    # As long as that of such a pattern; on a card it cannot be computed here.
    on_cpu = torch.empty(N // block + 1, dtype=torch.int32), torch.empty(nnz, dtype=torch.int32)
    length = make_gpu_index(*on_cpu, (N, K), (block, block)).numel()
    gpu_index = on_card(length, dtype=torch.int32)
    return BlockSparse(values, crow, col, (N, K), gpu_index)


needs_both = pytest.mark.skipif(
    torch.cuda.is_available() or not (WITH_CUDA and WITH_TRITON), reason="needs both, and no GPU"
)


@needs_both
def test_explain_says_what_would_run_on_a_card(tmp_path: Path) -> None:
    with FakeTensorMode():
        x, weight = on_card(8, 4096), block_sparse(4096, 4096, 1024, 64)
        said = ops.explain(x, weight)
        assert (said.backend, said.predicted_for, said.measured) == ("cuda", "H100", ())
        assert "cuda runs" in str(said) and "predicted on H100: triton" in str(said)
        assert said.predicted_us["dense"] > said.predicted_us["cuda"]
        assert ops.explain(x, weight, "triton").backend == "triton"
        factors = (on_card(128, 4096), on_card(4096, 128))
        assert ops.explain(on_card(4096, 4096), factors).backend == "reference"
        assert "reference" in ops.explain(x, factors).predicted_us
        (tmp_path / "h100.json").write_text(json.dumps(gpu_choice.as_json(H100, measurements())))
        model._table.cache_clear()
        said = ops.explain(on_card(4096, 4096), block_sparse(4096, 4096, 2048, 64))
        assert said.backend == "triton" and set(said.measured) == {"dense", "cuda", "triton"}
        assert "measured on H100: triton 100.0 us" in str(said)


@needs_both
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_choice_is_traced_without_asking_the_device(dynamic: bool) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    with FakeTensorMode():
        weight = block_sparse(4096, 4096, 256, 128)
        down, up = on_card(128, 4096), on_card(4096, 128)
        torch._dynamo.reset()
        call = torch.compile(
            lambda x: ops.block_sparse_linear(x, weight) + ops.low_rank_linear(x, down, up),
            fullgraph=True, dynamic=dynamic, backend=keep,
        )  # fmt: skip
        for M in (8, 5000):
            assert call(on_card(M, 4096)).shape == (M, 4096)
    few, many = graphs
    assert "prunelm.block_sparse_linear.default" in few and "prunelm.low_rank_linear.default" in few
    assert "prunelm.block_sparse_linear_triton.default" in many and len(many) == 4
