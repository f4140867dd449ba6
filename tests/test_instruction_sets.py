"""The CPU kernels' tests once more with every instruction set that the processor has."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prunelm import _C

SETS = _C.build_information()["instruction_sets"]
# The ops with loops of their own per instruction set, and enough of their tests to run every loop.
TESTS = {
    "block_sparse_linear": "as_accurate_as_dense and (16x4 or 8x5) and not float64 or 16_bits",
    "low_rank_linear": "accurate or 16_bits",
    "beam_step": "float32 or accurate or ties",
    "rnnt_loss": "agrees or gradcheck or finite",
    "tree_attention": "matches or accurate or alone",
    "not_finite": "not_finite",
}


def run(instruction_set: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PRUNELM_ISA": instruction_set}
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("instruction_set", SETS)
def test_kernels_agree_with_their_references(instruction_set: str) -> None:
    if instruction_set == _C.build_information()["instruction_set"]:
        pytest.skip("every other test runs on it")
    folder = Path(__file__).parent
    chosen = " or ".join(f"({op} and ({tests}))" for op, tests in TESTS.items())
    files = [str(folder / f"test_{op}.py") for op in TESTS]
    pytest_words = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen)
    result = run(instruction_set, *pytest_words, *files)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert "passed" in result.stdout


def test_a_set_that_is_unknown_or_that_the_processor_lacks_is_refused() -> None:
    for asked in ("avx10", *{"portable", "avx2", "avx512"}.difference(SETS)):
        result = run(asked, "-c", "import torch, prunelm._C as c; c.build_information()")
        wanted = f"PRUNELM_ISA: expected portable to {SETS[-1]} on this processor, got {asked}"
        assert result.returncode != 0
        assert wanted in result.stderr


def test_nothing_of_one_set_can_stand_for_anothers() -> None:
    """A linker keeps one of the functions that several objects define in common: it might be one
    that an older processor cannot run."""
    objects = sorted(Path(__file__).parent.parent.glob("build/editable/*_simd_*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("no objects of an editable build, or no nm")
    assert {p.stem.rpartition("_")[2] for p in objects} >= set(SETS)
    for path in objects:
        result = subprocess.run(
            ["nm", "--defined-only", str(path)], capture_output=True, text=True, check=True
        )
        kinds = [line.split()[1] for line in result.stdout.splitlines()]
        assert kinds
        common = [line for line in result.stdout.splitlines() if line.split()[1] in "VvWwu"]
        assert common == [], path.name
