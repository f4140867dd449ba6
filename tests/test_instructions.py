"""Counts of instructions are read right and guarded; valgrind itself runs in the slow test only."""

import json
from pathlib import Path

import pytest

from prunelm.benchmarks import instructions

DUMP = """\
summary: 170

ob=/lib/python.so
fn=eval
10 5
cob=/tree/_C.so
cfn=forward
calls=1 3
10 150
ob=/tree/_C.so
fn=forward
3 100
4 20
cob=/lib/libm.so
cfn=log
calls=2 8
4 30
5 7
ob=/lib/libm.so
fn=log
8 30
ob=/other/_C.so
9 8
totals: 170
"""


def test_own_code_is_counted_and_neither_callers_nor_callees() -> None:
    assert instructions.self_cost(DUMP, "/tree/_C.so") == 127
    assert instructions.self_cost(DUMP, "/tree/_D.so") == 0


def test_more_than_three_percent_is_named() -> None:
    before = {"a": 1000, "b": 1000, "c": 1000, "d": 5}
    lines = instructions.compare({"a": 1030, "b": 1031, "c": 1, "e": 7}, before)
    assert {line["op"]: line[""] for line in lines} == {
        "a": "", "b": "more", "c": "", "d": "gone", "e": "new",
    }  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Committed counts of this toolchain, and a valgrind that need not be there."""
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps({instructions.toolchain(): {"instructions": {"a": 1000}}}))
    monkeypatch.setattr(instructions, "COMMITTED", path)
    monkeypatch.setattr(instructions.shutil, "which", lambda name: f"/usr/bin/{name}")
    return path


def test_an_op_that_takes_more_fails_until_it_is_saved(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(instructions, "count", lambda: {"a": 1031})
    assert instructions.main([]) == 1
    assert "1.03  more" in capsys.readouterr().out
    assert instructions.main(["--save"]) == 0 and instructions.main([]) == 0
    kept = json.loads(here.read_text())[instructions.toolchain()]
    assert kept["instructions"] == {"a": 1031} and kept["commit"]


def test_no_comparison_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here.write_text(json.dumps({"compiler 1.2, avx2": {}}))
    assert instructions.main([]) == 0
    own = instructions.toolchain()
    said = f"instructions: skipped: expected counts for compiler 1.2, avx2, this is {own}\n"
    assert capsys.readouterr().out == said
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    assert instructions.main([]) == 0 and instructions.main(["--save"]) == 0
    assert capsys.readouterr().out == "instructions: skipped: valgrind was not found\n" * 2


def test_committed_counts_name_the_compiler() -> None:
    entries = instructions.committed()
    assert entries and all(name.startswith("compiler ") for name in entries)
    assert all(min(entry["instructions"].values()) > 0 for entry in entries.values())


@pytest.mark.slow
def test_no_op_takes_more_instructions_than_committed() -> None:
    reason = instructions.obstacle()
    if reason is not None:
        pytest.skip(reason)
    assert instructions.main([]) == 0
