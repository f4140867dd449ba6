"""Sanitizers over the CUDA kernels on the CPU: no race, no read or write out of bounds."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
from emulated import SOURCES, compile_kernels

KERNELS = sorted(SOURCES.glob("cuda/*.cu"))


def sanitized(sanitizer: str, folder: Path, sources: Path = SOURCES) -> str:
    """What the sanitizer says of all kernels; empty if it is content."""
    flags = (f"-fsanitize={sanitizer}", "-DCUDA_EMULATION_THREADS", "-O0")
    program = folder / sanitizer
    compile_kernels("memory.cpp", program, *flags, sources=sources)
    # ThreadSanitizer wants the old layout of addresses.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    result = subprocess.run(
        [*fixed, str(program)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
    )
    return result.stderr or ("" if result.returncode == 0 else f"exit {result.returncode}")


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_kernels_are_clean(sanitizer: str, tmp_path: Path) -> None:
    assert sanitized(sanitizer, tmp_path) == ""


def planted(tmp_path: Path, kernel: Path, text: str) -> Path:
    """A copy of the sources with `text` as that kernel, and the other kernels as they are."""
    sources = tmp_path / "csrc"
    shutil.copytree(SOURCES / "cuda", sources / "cuda")
    (sources / "cuda" / kernel.name).write_text(text)
    return sources


BARRIERS = [
    pytest.param(kernel, match.span(), id=f"{kernel.stem}-{i}")
    for kernel in KERNELS
    for i, match in enumerate(re.finditer(r"__syncthreads\(\);", kernel.read_text()))
]


@pytest.mark.slow
@pytest.mark.parametrize("kernel, span", BARRIERS)
def test_every_barrier_is_needed(kernel: Path, span: tuple[int, int], tmp_path: Path) -> None:
    text = kernel.read_text()
    sources = planted(tmp_path, kernel, text[: span[0]] + text[span[1] :])
    assert "ThreadSanitizer" in sanitized("thread", tmp_path, sources)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, old, new",
    [
        ("block_sparse_linear", "n >= op.N ||", "n > op.N ||"),
        ("block_sparse_linear", "m >= op.M)", "m > op.M)"),
        ("low_rank_linear", "i < size;", "i <= size;"),
        ("low_rank_linear", "op.R * int64_t{sizeof(float)}", "(op.R - 1) * int64_t{sizeof(float)}"),
        ("beam_step", "v < beam.op.V; v += kWarp) sum", "v <= beam.op.V; v += kWarp) sum"),
    ],
)
def test_an_off_by_one_is_caught(name: str, old: str, new: str, tmp_path: Path) -> None:
    kernel = SOURCES / "cuda" / f"{name}.cu"
    text = kernel.read_text()
    assert text.count(old) == 1
    sources = planted(tmp_path, kernel, text.replace(old, new))
    assert "AddressSanitizer" in sanitized("address", tmp_path, sources)
