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


def op_of(file: Path) -> str:
    """The op whose kernel a file of csrc/cuda is, or is a part of."""
    if file in KERNELS:
        return file.stem
    return next(k.stem for k in KERNELS if f'"cuda/{file.name}"' in k.read_text())


BARRIERS = [
    pytest.param(file, match.span(), id=f"{file.stem}-{i}")
    for file in sorted(SOURCES.glob("cuda/*.cu*"))
    for i, match in enumerate(re.finditer(r"(__syncthreads|team\.sync)\(\);", file.read_text()))
]


@pytest.mark.slow
@pytest.mark.parametrize("kernel, span", BARRIERS)
def test_every_barrier_is_needed(kernel: Path, span: tuple[int, int], tmp_path: Path) -> None:
    text = kernel.read_text()
    sources = planted(tmp_path, kernel, text[: span[0]] + text[span[1] :])
    assert "ThreadSanitizer" in sanitized(op_of(kernel), "thread", tmp_path, sources)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, old, new",
    [
        ("block_sparse_linear", "n >= op.N ||", "n > op.N ||"),
        ("block_sparse_linear", "m >= op.M)", "m > op.M)"),
        ("low_rank_linear", "i < size;", "i <= size;"),
        ("low_rank_linear", "op.R * int64_t{sizeof(float)}", "(op.R - 1) * int64_t{sizeof(float)}"),
        ("beam_row", "if (v + k >= V) break;", "if (v + k > V) break;"),
    ],
)
def test_an_off_by_one_is_caught(name: str, old: str, new: str, tmp_path: Path) -> None:
    kernel = next(SOURCES.glob(f"cuda/{name}.cu*"))
    text = kernel.read_text()
    assert text.count(old) == 1
    sources = planted(tmp_path, kernel, text.replace(old, new))
    assert "AddressSanitizer" in sanitized(op_of(kernel), "address", tmp_path, sources)
