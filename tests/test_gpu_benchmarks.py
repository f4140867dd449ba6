"""The GPU benchmarks, their timer replaced by one that runs on the CPU: what they check and say."""

import argparse
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prunelm import BlockSparse, ops
from prunelm.benchmarks import (
    gpu_beam_step,
    gpu_block_sparse_linear,
    gpu_harness,
    gpu_low_rank_linear,
    gpu_model,
    gpu_torch_bsr,
    gpu_training_step,
)
from prunelm.benchmarks.gpu_harness import Dense, Roof, Times
from prunelm.models.lm import LayerSizes, LMConfig

ROOF = Roof(tflops=800, gbytes=3000, floor_us=2)


def refresh(out: Any, new: Any) -> None:
    """Writes what ran again into the tensors of the first run, as a graph's replay does."""
    if isinstance(out, Tensor):
        out.copy_(new)
    elif out is not None:
        for one, other in zip(out, new, strict=True):
            refresh(one, other)


class FakeTimer:
    """Runs on the CPU; a replay takes 10 us for each call of what was captured."""

    l2_bytes = 5000

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        out = run()
        return lambda: refresh(out, run()), out

    def elapsed_us(self, replay: Callable[[], None], replays: int) -> list[float]:
        return [10.0] * replays


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes longer than all else here."""
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: call)


def test_block_sparse_linear_is_checked_and_set_beside_dense() -> None:
    layer_of = cache(partial(gpu_block_sparse_linear.Layer, device="cpu"))
    run = partial(
        gpu_block_sparse_linear.forward, FakeTimer(), Dense(FakeTimer()), ROOF, layer_of,
        M=5, shape=(96, 64), block=16, sparsity=0.5, backend="cpu", device="cpu",
    )  # fmt: skip
    row = run()
    assert row["dense"] in ("cuBLAS", "cuBLASLt", "compiled")
    assert 0 < row["of_roof_cold"] < 1 and row["speedup"] > 0
    layer = layer_of((96, 64), 16, 0.5)
    assert layer.weight.sparsity == pytest.approx(0.5, abs=0.03)
    layer.dense = -layer.dense
    with pytest.raises(RuntimeError, match="block_sparse_linear on cpu: expected an error"):
        run()


def test_low_rank_linear_is_checked_and_set_beside_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_low_rank_linear, "N", 48)
    monkeypatch.setattr(gpu_low_rank_linear, "K", 40)
    run = partial(
        gpu_low_rank_linear.forward, FakeTimer(), Dense(FakeTimer()), ROOF, M=16, R=8,
        backend="cpu", device="cpu",
    )  # fmt: skip
    assert run()["over_two"] > 0
    monkeypatch.setattr(
        ops, "low_rank_linear", lambda x, down, up, bias, *_, **__: bias + x @ (down.T @ up.T)
    )  # no relu
    with pytest.raises(RuntimeError, match="cpu: expected an error"):
        run()


@pytest.mark.parametrize("prune", gpu_beam_step.PRUNE)
def test_beam_step_is_checked_and_set_beside_torch(prune: gpu_beam_step.Prune) -> None:
    row = gpu_beam_step.step(
        FakeTimer(), ROOF, {}, B=3, W=2, V=50, prune=prune, backend="cpu", device="cpu"
    )
    assert row["speedup"] > 0 and 0 < row["of_bandwidth_cold"] < 1


def test_a_training_step_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    run = partial(
        gpu_training_step.step, FakeTimer(), ROOF, rows=20, shape=(64, 96), block=16,
        sparsity=0.75, backend="cpu", device="cpu",
    )  # fmt: skip
    with torch.no_grad():
        assert run()["speedup"] == pytest.approx(1.0)
        full = gpu_training_step.dense_step
        wrong = lambda x, w, g: (*full(x, w, g)[:2], 2 * full(x, w, g)[2])  # noqa: E731
        monkeypatch.setattr(gpu_training_step, "dense_step", wrong)
        with pytest.raises(RuntimeError, match="gradient to values, on cpu: expected an error"):
            run()


def test_steps_of_a_model_are_checked_and_set_beside_their_roof(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = (LayerSizes(4, 64),) * 2
    config = LMConfig(gpu_model.VOCABULARY, 64, 16, layers)
    monkeypatch.setattr(LMConfig, "preset", staticmethod(lambda *_: config))
    monkeypatch.setattr(gpu_model, "CONTEXT", 4)
    with torch.no_grad():
        found = gpu_harness.run_cases(gpu_model.cases(FakeTimer(), ROOF, False, "cpu"), 60)
    rows, failed = found
    assert failed == 0, rows
    assert [row["model"] for row in rows] == list(gpu_model.MODELS)
    assert all(row["us"] == 10.0 and row["speedup"] == 1.0 for row in rows)
    # The dense layers of 64 x 64 numbers: 2 (12 + 8) 2 64^2 bytes, the head, keys and values.
    dense, blocks = rows[0]["roof_us"], rows[1]["roof_us"]
    weights = 2 * 2 * (4 + 2) * 64**2 + 2 * 500 * 64
    assert weights / 3e6 < dense < 3 * weights / 3e6 and blocks < dense


def test_stored_blocks_are_found_again() -> None:
    mask = torch.rand(5, 7) < 0.4
    weight = BlockSparse.from_dense(torch.randn(70, 100), (16, 16), mask)
    assert torch.equal(gpu_training_step.stored(weight), mask)


def test_copies_have_memory_of_their_own_and_the_same_strides() -> None:
    weight = BlockSparse.from_dense(torch.randn(32, 32), (16, 16))
    x = torch.randn(3, 32)
    copied_x, copied = gpu_harness.cloned((x, weight))
    assert isinstance(copied, BlockSparse) and copied.values.stride() == weight.values.stride()
    assert copied.col.data_ptr() != weight.col.data_ptr() and torch.equal(copied_x, x)
    expected = x.numel() * 4 + weight.values.numel() * 4 + (3 + 4) * 4
    assert gpu_harness.size_bytes((x, weight)) == expected
    bsr = weight.to_dense().to_sparse_bsr((16, 16))
    assert gpu_harness.size_bytes(bsr) == weight.values.numel() * 4


def test_cold_calls_go_round_copies_that_exceed_the_cache() -> None:
    seen: list[int] = []
    x = torch.zeros(250)  # 1000 bytes, of 5000 in the cache
    found = gpu_harness.times(FakeTimer(), lambda x: seen.append(x.data_ptr()), (x,))
    assert len(set(seen)) == 16 and seen[-16:] == list(dict.fromkeys(seen[-16:]))
    assert found == Times(10 / 40, 10 / 16)


def test_an_element_that_a_graph_leaves_unwritten_is_seen() -> None:
    class Forgetful(FakeTimer):
        def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            return lambda: None, run()

    got = gpu_harness.replayed(Forgetful(), lambda x: x + 1, (torch.ones(3),))
    assert bool(got.isnan().all())
    got = gpu_harness.replayed(FakeTimer(), lambda x: x + 1, (torch.ones(3),))
    assert torch.equal(got, torch.full((3,), 2.0))


def test_a_case_that_fails_is_a_row_and_the_next_one_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad() -> Any:
        raise ValueError("too large\nand more")

    cases = [({"M": 1}, bad), ({"M": 2}, lambda: {"us": 3.0})]
    rows, failed = gpu_harness.run_cases(cases, 60)
    assert rows == [{"M": 1, "error": "ValueError: too large"}, {"M": 2, "us": 3.0}] and failed == 1
    saved: list[int] = []
    monkeypatch.setattr(gpu_harness, "SAVE_S", -1.0)
    gpu_harness.run_cases(cases, 60, lambda rows: saved.append(len(rows)))
    assert saved == [1, 2]
    assert gpu_harness.run_cases(cases, -1) == ([], 0)
    assert "no time for 2 of 2 cases" in capsys.readouterr().out


def test_nothing_goes_on_where_cuda_is_lost() -> None:
    def bad() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rows, failed = gpu_harness.run_cases([({"M": 1}, bad), ({"M": 2}, lambda: {})], 60)
    assert len(rows) == failed == 1


def test_without_times_all_cases_run_and_nothing_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Dry(gpu_harness.Dry):
        capture = FakeTimer.capture

    def cases(timer: gpu_harness.Timer, roof: Roof) -> list[gpu_harness.Case]:
        x = torch.ones(3)
        return [({"M": 1}, lambda: {"us": gpu_harness.times(timer, run, (x,)).cold_us})]

    ran: list[int] = []
    run = ran.append
    monkeypatch.setattr(gpu_harness, "Dry", Dry)
    options = argparse.Namespace(dry=True, seconds=60, out=tmp_path)
    assert gpu_harness.run_benchmark("one", cases, options) == 0
    assert len(ran) == 4 and not list(tmp_path.iterdir())
    assert capsys.readouterr().out == "1 cases ran, 0 of them failed\n"


def test_results_are_merged_under_the_cards_name(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    about = {"machine": "a card", "clocks": "1 MHz", "commit": "abc", "device": "card"}
    for name in ("one", "two"):
        rows = [{"us": 1.23456}, {"M": 1, "error": "bad"}]
        gpu_harness.report(gpu_harness.save_rows(name, about, ROOF, tmp_path, rows), ROOF)
    found = json.loads((tmp_path / "nvidia-h100-80gb-hbm3.json").read_text())
    assert set(found) == {"one", "two"} and found["one"]["rows"][0] == {"us": 1.235}
    assert found["two"]["roof"] == {"tflops": 800, "gbytes": 3000, "floor_us": 2}


def test_the_roof_is_what_was_timed() -> None:
    roof = gpu_harness.measure_roof(FakeTimer(), "cpu", size=64)
    assert roof.tflops == pytest.approx(2 * 64**3 / (10 / 3) / 1e6)
    assert roof.gbytes == pytest.approx(2 * 4 * 4 * 64**2 / (10 / 3) / 1e3)
    assert roof.us(8e8, 0) == pytest.approx(8e8 / roof.tflops / 1e6)


def test_torchs_kernels_fit_into_shared_memory() -> None:
    for M in gpu_torch_bsr.ROWS:
        for block in gpu_torch_bsr.BLOCKS:
            found = list(gpu_torch_bsr.metas(M, block, full=True))
            assert found and all(M % meta["SPLIT_N"] == 0 for meta in found)
