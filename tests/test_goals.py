"""Goals are read off results as they are meant, and each is named where nothing was measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from prunelm.benchmarks import goals


def by_name(lines: Any) -> dict[str, goals.Line]:
    return {line.what: line for line in lines}


def test_blocks_are_held_against_the_mean_and_the_worst_shape() -> None:
    row = {"block": "16x4", "M": 8, "sparsity": 0.75}
    rows = [{**row, "N": N, "K": K, "speedup": 14.0} for N, K in ((1024, 1024), (2048, 512))]
    rows[1]["speedup"] = 7.0
    other = {**rows[0], "N": 30, "speedup": 0.1}
    line = by_name(goals.block_sparse([*rows, other]))["16x4 blocks, M = 8, 75% zeros"]
    assert line.reached == pytest.approx(98**0.5)
    assert (line.asked, line.worst, line.cases, line.verdict()) == (7.0, 7.0, 2, "yes")
    rows[1]["speedup"] = 5.5  # the mean still is enough, this shape is not
    line = by_name(goals.block_sparse(rows))["16x4 blocks, M = 8, 75% zeros"]
    assert line.reached is not None and line.reached > line.asked and line.verdict() == "no"


@pytest.mark.parametrize(
    ("us", "verdict"), [pytest.param(5.4, "yes", id="within"), pytest.param(5.6, "no", id="over")]
)
def test_small_weights_may_take_an_empty_call_and_a_roofline(us: float, verdict: str) -> None:
    roof = 2.0  # so that 3 + 1.25 * 2 = 5.5 are allowed
    row = {"block": "16x4", "M": 1, "N": 512, "K": 512, "sparsity": 0.9, "speedup": 1.0}
    measured = {**row, "ours": us, "empty": 3.0, "of_roof": roof / us}
    name = "512 x 512, M = 1: of the allowed time"
    line = by_name(goals.block_sparse([measured]))[name]
    assert line.reached == pytest.approx(us / 5.5) and line.verdict() == verdict
    assert by_name(goals.block_sparse([row]))[name].verdict() == "-"  # no empty call beside it


def test_a_rank_is_held_against_the_multiply_adds_that_it_saves() -> None:
    row = {"M": 64, "K": 1024, "N": 1024, "R": 128, "over_two": 1.0, "blocks": 9.0, "of_roof": 1.0}
    name = "low rank, M = 64: of the ratio of multiply-adds"
    for over_dense, verdict in ((3.5, "yes"), (3.3, "no")):  # 1024 / 256 = 4 times fewer
        line = by_name(goals.low_rank([{**row, "over_dense": over_dense}]))[name]
        assert line.reached == pytest.approx(over_dense / 4) and line.verdict() == verdict


def test_times_have_upper_bounds() -> None:
    rows = [{"M": 64, "grad_x/forward": t, "grad_values/forward": 1.0} for t in (1.0, 1.29, 1.31)]
    lines = by_name(goals.gradients(rows))
    assert lines["grad_values, M = 64: over forward"].verdict() == "yes"
    line = lines["grad_x, M = 64: over forward"]
    assert line.worst == 1.31 and line.verdict() == "no"


def test_a_model_is_held_against_its_layers_and_against_compiled() -> None:
    row = {"what": "step", "rows": 32, "model": "rank 64", "us": 50.0, "of_predicted": 0.9}
    dense = {**row, "model": "dense", "us": 100.0, "of_predicted": None}
    compiled = {**dense, "model": "compiled", "us": 45.0}
    lines = by_name(goals.model([row, dense, compiled]))
    assert lines["model, step of 32 rows: of the predicted speed"].verdict() == "yes"
    over = lines["model, step of 32 rows, over dense compiled"]
    assert (over.reached, over.verdict()) == (pytest.approx(0.9), "no")


def test_a_nan_is_no_success() -> None:
    assert goals.line("x", 1.0, [float("nan")]).verdict() == "no"
    assert goals.line("x", 1.0, [float("nan")], most=True).verdict() == "no"


@pytest.mark.parametrize(
    ("speeds", "density"),
    [
        pytest.param((4.0, 2.0, 0.5), 2**-0.5 / 2, id="between"),
        pytest.param((4.0, 2.0, 1.0), 0.5, id="everywhere"),
        pytest.param((0.9, 0.5, 0.1), None, id="nowhere"),
    ],
)
def test_blocks_break_even_where_the_lines_cross(
    speeds: tuple[float, ...], density: float | None
) -> None:
    row = {"block": "16x4", "M": 8, "N": 1024, "K": 1024}
    at = zip((0.9, 0.75, 0.5), speeds, strict=True)
    (line,) = goals.break_even([{**row, "sparsity": s, "speedup": speed} for s, speed in at])
    assert line["break-even density"] == (density and pytest.approx(density))


def test_every_goal_is_shown_whether_measured_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(goals, "RESULTS", tmp_path)
    (tmp_path / "some-chip.json").write_text(json.dumps({}))
    goals.main(["some-chip"])
    said = capsys.readouterr().out
    shown = [line.what for lines_of in goals.GOALS.values() for line in lines_of([])]
    assert len(shown) > 100 and all(what in said for what in shown)
    assert said.count("not measured") == len(goals.GOALS)
    with pytest.raises(SystemExit):
        goals.main(["another-chip"])
    assert "expected one of some-chip" in capsys.readouterr().err


def test_goals_are_read_off_committed_results(capsys: pytest.CaptureFixture[str]) -> None:
    found = sorted(p.stem for p in goals.RESULTS.glob("*-*.json"))
    devices = [device for device in found if not device.startswith("nvidia-")]
    assert devices
    for device in devices:
        goals.main([device])
        shown = capsys.readouterr().out
        assert "16x4 blocks" in shown and "over two linears" in shown
