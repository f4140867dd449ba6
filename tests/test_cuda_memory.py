"""Sanitizers over the CUDA kernels on the CPU: no race, no read or write out of bounds."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_emulation.emulated import SOURCES, compile_kernels

KERNELS = sorted(SOURCES.glob("cuda/*.cu"))


def sanitized(op: str, sanitizer: str, folder: Path, sources: Path = SOURCES) -> str:
    """What the sanitizer says of an op's kernels; empty if it is content."""
    flags = (f"-fsanitize={sanitizer}", "-DCUDA_EMULATION_THREADS", "-O0")
    program = folder / sanitizer
    compile_kernels(f"memory_{op}.cpp", program, *flags, sources=sources, op=op)
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
@pytest.mark.parametrize("op", [kernel.stem for kernel in KERNELS])
def test_kernels_are_clean(op: str, sanitizer: str, tmp_path: Path) -> None:
    assert sanitized(op, sanitizer, tmp_path) == ""


def planted(tmp_path: Path, kernel: Path, text: str) -> Path:
    """A copy of the sources with `text` as that kernel."""
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
    assert "ThreadSanitizer" in sanitized(kernel.stem, "thread", tmp_path, sources)


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
    assert "AddressSanitizer" in sanitized(name, "address", tmp_path, sources)
