"""README says what the committed results say."""

import json
from pathlib import Path

import pytest

from prunelm.benchmarks import goals, readme
from prunelm.study.results import Results, Row, in_order, save_results

ROOT = Path(__file__).parent.parent


def test_readme_says_what_the_committed_results_say() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.filled(text) == text


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(
        "a\n<!-- results: demo -->\nstale\n<!-- end -->\n"
        "b\n<!-- results: kernels -->\n<!-- end -->\n"
    )
    return tmp_path


def test_regions_are_filled_and_the_rest_stays(elsewhere: Path) -> None:
    dense = Row("dense LM", "", 1000, perplexity=40.0, latency_ms=2.0, dense_latency_ms=2.0)
    half = Row("Heads | Neurons", "50%", 500, perplexity=50.0, latency_ms=1, dense_latency_ms=2)
    results = Results("demo", {}, {"processor": "a processor"}, in_order([half, dense]))
    save_results(elsewhere / "run", results)
    row = {"N": 1024, "K": 1024, "block": "16x4", "sparsity": 0.75}
    rows = [{**row, "M": M, "speedup": 1.25 * M} for M in (1, 8, 64)] + [{**row, "M": 7}]
    found = {"machine": "another", "commit": "abc", "rows": rows}
    (elsewhere / "results" / "chip.json").write_text(
        json.dumps({"block_sparse_linear, 1 threads": found})
    )
    readme.main(["--demo", str(elsewhere / "run")])
    text = (elsewhere / "README.md").read_text()
    assert text.startswith("a\n<!-- results: demo -->\n![") and "stale" not in text
    assert "<!-- end -->\nb\n<!-- results: kernels -->\n" in text
    assert "| Heads \\| Neurons, 50% | 500 (50%) | 50.0 |" in text and "| 2.00" in text
    assert "| 16x4 blocks, 75 % zeros | 1.2x | 10.0x | 80.0x |" in text
    assert "another; 1 thread, medians, commit abc" in text
    assert readme.filled(text) == text
    assert "<svg" in (elsewhere / "results" / "demo.svg").read_text()


def test_a_device_measured_at_every_density_gets_a_plot(elsewhere: Path) -> None:
    rows = [
        {"N": 1024, "K": 1024, "block": "16x4", "sparsity": s, "M": M, "speedup": 1 / (1.1 - s)}
        for s in (0.0, 0.5, 0.75, 0.9, 0.95)
        for M in (1, 8, 64)
    ]
    found = {"machine": "another", "commit": "abc", "rows": rows}
    (elsewhere / "results" / "chip.json").write_text(
        json.dumps({"block_sparse_linear, 1 threads": found})
    )
    readme.main([])
    plot = (elsewhere / "results" / "chip.svg").read_text()
    assert plot.startswith("<svg style") and all(f"M = {M}" in plot for M in (1, 8, 64))
    assert "](benchmarks/results/chip.svg)" in (elsewhere / "README.md").read_text()


def test_a_readme_without_the_region_is_refused(elsewhere: Path) -> None:
    (elsewhere / "README.md").write_text("no regions\n")
    with pytest.raises(ValueError, match="expected a line '<!-- results: kernels -->', found none"):
        readme.main([])


def test_goals_are_held_against_the_mean_and_the_worst_shape() -> None:
    row = {"block": "16x4", "M": 8, "sparsity": 0.75}
    rows = [{**row, "N": N, "K": K, "speedup": 14.0} for N, K in ((1024, 1024), (2048, 512))]
    rows[1]["speedup"] = 7.0
    (line,) = goals.block_sparse([*rows, {**rows[0], "N": 30, "speedup": 0.1}])
    assert line["reached"] == pytest.approx(98**0.5) and line["worst shape"] == 7.0
    assert (line["asked"], line["shapes"], line[""]) == (7.0, 2, "yes")
    rows[1]["speedup"] = 5.5  # the mean still is enough, this shape is not
    assert goals.block_sparse(rows)[0][""] == "no"


def test_goals_are_read_off_committed_results(capsys: pytest.CaptureFixture[str]) -> None:
    goals.main(["amd-epyc-avx2"])
    shown = capsys.readouterr().out
    assert "16x4 blocks" in shown and "over two linears" in shown
