"""README says what the committed results say."""

import json
from pathlib import Path

import pytest

from prunelm.benchmarks import harness, readme
from prunelm.study.machine import processor_of
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
    assert text.startswith("a\n<!-- results: demo -->\n`prunelm demo`: ") and "stale" not in text
    assert "<!-- end -->\nb\n<!-- results: kernels -->\n" in text
    assert "| Heads \\| Neurons, 50% | 500 (50%) | 50.0 |" in text and "| 2.00" in text
    assert "| 16x4 blocks, 75 % zeros | 1.2x | 10.0x | 80.0x |" in text
    assert "another; 1 thread, medians, commit abc" in text
    assert readme.filled(text) == text
    assert "<svg" in (elsewhere / "results" / "demo.svg").read_text()


def test_a_card_shows_what_it_reaches_beside_what_is_asked(elsewhere: Path) -> None:
    about = {"machine": "a card", "commit": "abc"}
    row = {"N": 4096, "K": 4096, "block": "64x64", "sparsity": 0.75, "M": 1, "backend": "cuda"}
    rows = [{**row, "speedup": 3.14159, "speedup_cold": 2.5}]
    step = {"model": "dense", "rows": 32, "us": 312.4, "roof_us": 14.2, "eager_us": 2000.0}
    found = {"block_sparse_linear": {**about, "rows": rows}, "model": {**about, "rows": [step]}}
    (elsewhere / "results" / "nvidia-card.json").write_text(json.dumps(found))
    readme.main([])
    text = (elsewhere / "README.md").read_text()
    assert "| M <= 64, 64x64, 75% zeros | 2.5 | 3.14 | 2.5 |" in text and "a card" in text
    assert "| dense | 312 | 14.2 | 2000 |" in text and "128x128" not in text


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


@pytest.mark.parametrize(
    ("theirs", "ours", "name"),
    [
        pytest.param("AVX2", "avx2", "some-chip-r-9-avx2", id="same"),
        pytest.param("AVX512", "avx2", "some-chip-r-9-torch-avx512-prunelm-avx2", id="torch-above"),
        pytest.param("NO AVX", "portable", "some-chip-r-9-torch-no-avx-prunelm-portable", id="old"),
    ],
)
def test_results_say_which_instruction_sets_were_measured(
    theirs: str, ours: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {"instruction set of torch": theirs, "instruction set of prunelm": ours}
    monkeypatch.setattr(harness, "describe", lambda: {"processor": "Some Chip(R) 9", **sets})
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    harness.report("bench", 1, harness.Roof(1.0, 1.0), [{"us": 1.23456}], save=True)
    found = json.loads((tmp_path / f"{name}.json").read_text())["bench, 1 threads"]
    assert found["instruction_sets"] == {"torch": theirs.lower(), "prunelm": ours}
    assert found["environment"]["ATEN_CPU_CAPABILITY"] == "avx2"
    assert ours in found["machine"] or theirs.lower() == ours
    assert found["rows"] == [{"us": 1.235}]


def test_a_processor_is_told_from_others_of_its_name() -> None:
    text = "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n"
    assert processor_of(f"{text}\n{text.replace('26', '25')}") == "AMD EPYC family 26 model 2"
    assert processor_of(text.replace("EPYC", "EPYC 9654")) == "AMD EPYC 9654"
    assert processor_of("processor: 0\nBogoMIPS: 50\n") == ""
