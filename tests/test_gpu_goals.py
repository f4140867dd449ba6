"""The GPU's goals are read off its results as they are meant, measured or not."""

import json
from pathlib import Path
from typing import Any

import pytest

from prunelm.benchmarks import goals, gpu_goals


def by_name(lines: Any) -> dict[str, gpu_goals.Goal]:
    return {one.warm.what: one for one in lines}


def found(name: str, *rows: dict[str, Any]) -> dict[str, Any]:
    return {name: {"machine": "a card", "commit": "abc", "rows": list(rows)}}


def test_a_shape_is_held_against_its_goal_by_its_faster_kernel() -> None:
    row = {"N": 4096, "K": 4096, "block": "64x64", "sparsity": 0.75, "M": 1}
    rows = [
        {**row, "backend": "cuda", "speedup": 3.0, "speedup_cold": 2.0},
        {**row, "backend": "triton", "speedup": 1.0, "speedup_cold": 2.6},
        {**row, "M": 64, "backend": "cuda", "speedup": 2.6, "speedup_cold": 2.7},
        {**row, "M": 8, "backend": "cuda", "error": "it failed"},
        {**row, "N": 1024, "backend": "cuda", "speedup": 0.1, "speedup_cold": 0.1},
    ]
    lines = by_name(gpu_goals.block_sparse(found("block_sparse_linear", *rows)))
    one = lines["M <= 64, 64x64, 75% zeros"]
    assert one.warm.reached == pytest.approx((3.0 * 2.6) ** 0.5) and one.warm.cases == 2
    assert (one.warm.worst, one.warm.verdict()) == (2.6, "yes")
    assert one.cold is not None and (one.cold.worst, one.cold.verdict()) == (2.6, "yes")
    assert lines["M >= 4096, 64x64, 75% zeros"].warm.verdict() == "-"


def test_torchs_kernel_is_set_beside_the_same_shape() -> None:
    row = {"N": 4096, "K": 4096, "block": "32x32", "sparsity": 0.9, "M": 4096}
    own = {**row, "backend": "triton", "us": 10.0, "cold_us": 20.0}
    theirs = {**row, "us": 31.0, "cold_us": 58.0}
    both = {**found("block_sparse_linear", own), **found("torch BSR", theirs)}
    one = by_name(gpu_goals.torch_bsr(both))["M = 4096, 32x32, over torch's BSR"]
    assert one.warm.reached == pytest.approx(3.1) and one.warm.verdict() == "yes"
    assert one.cold is not None and one.cold.verdict() == "no"  # 2.9 of 3


def test_beam_step_is_held_against_bandwidth_and_torch() -> None:
    large = {"B": 64, "W": 8, "V": 5000, "prune": "late", "of_bandwidth": 1.2}
    small = {"B": 32, "W": 8, "V": 500, "prune": "late", "speedup": 6.0, "speedup_cold": 4.0}
    rows = ({**large, "of_bandwidth_cold": 0.7, "speedup": 9.0}, small)
    first, second = gpu_goals.beam_step(found("beam_step", *rows))
    assert first.warm.verdict() == "yes" and first.cold and first.cold.verdict() == "no"
    assert second.warm.verdict() == "yes" and second.cold and second.cold.verdict() == "no"


def test_goals_of_a_card_are_shown_measured_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(goals, "RESULTS", tmp_path)
    goals.main(["nvidia-h100-80gb-hbm3"])
    said = capsys.readouterr().out
    names = [one.warm.what for goals_of in gpu_goals.GOALS for one in goals_of({})]
    assert len(names) > 40 and all(name in said for name in names) and "not yet measured" in said
    rows = [{"model": "dense", "rows": 32, "us": 90.0, "roof_us": 30.0}, {"error": "bad"}]
    step = found("model", *rows)
    (tmp_path / "nvidia-h100-80gb-hbm3.json").write_text(json.dumps(step))
    goals.main(["nvidia-h100-80gb-hbm3"])
    said = capsys.readouterr().out
    assert "a card, commit abc" in said and "a step of TransformerLM as one graph" in said


def test_all_goals_fit_into_the_end_of_a_log() -> None:
    assert len(gpu_goals.text({})) < 7000
