"""Checkers over the CUDA kernels on the CPU: no race, nothing out of bounds, nothing unwritten.

That they find planted faults at all is shown on small kernels in test_cuda_emulation.py; the slow
tests here plant them in the ops' own.
"""

import re
import shutil
from pathlib import Path

import pytest
from cuda_emulation.emulated import CHECKERS, SOURCES, checked, compile_kernels, has_memcheck

KERNELS = sorted(SOURCES.glob("cuda/*.cu"))


def found(op: str, checker: str, folder: Path, sources: Path = SOURCES) -> str:
    """What the checker says of an op's kernels; empty if it is content."""
    program = folder / checker
    compile_kernels(f"memory_{op}.cpp", program, *CHECKERS[checker], sources=sources, op=op)
    return checked(program, checker)


@pytest.mark.parametrize("checker", ["thread", "address", "memcheck"])
@pytest.mark.parametrize("op", [kernel.stem for kernel in KERNELS])
def test_kernels_are_clean(op: str, checker: str, tmp_path: Path) -> None:
    if checker == "memcheck" and not has_memcheck():
        pytest.skip("valgrind or its headers were not found")
    assert found(op, checker, tmp_path) == ""


def planted(folder: Path, kernel: Path, span: tuple[int, int], text: str) -> Path:
    """A copy of the sources, with `text` in that place of the kernel."""
    sources = folder / "csrc"
    shutil.copytree(SOURCES / "cuda", sources / "cuda")
    old = kernel.read_text()
    (sources / "cuda" / kernel.name).write_text(old[: span[0]] + text + old[span[1] :])
    return sources


def op_of(file: Path) -> str:
    """The op whose kernels a file of csrc/cuda holds, or holds a part of."""
    if file in KERNELS:
        return file.stem
    return next(k.stem for k in KERNELS if f'"cuda/{file.name}"' in k.read_text())


BARRIER = re.compile(
    r"(__syncthreads|__syncwarp|team\.sync|cluster_sync|cp_async_wait<[^>]*>)\(\);"
)
BARRIERS = [
    pytest.param(file, match.span(), id=f"{file.stem}-{i}")
    for file in sorted(SOURCES.glob("cuda/*.cu*"))
    for i, match in enumerate(BARRIER.finditer(file.read_text()))
]


@pytest.mark.slow
@pytest.mark.parametrize("kernel, span", BARRIERS)
def test_every_barrier_is_needed(kernel: Path, span: tuple[int, int], tmp_path: Path) -> None:
    sources = planted(tmp_path, kernel, span, "")
    said = found(op_of(kernel), "thread", tmp_path, sources)
    assert "ThreadSanitizer" in said or "NaN" in said or "waited for" in said


# Bounds of loops and guards, and what takes them one too far.
BOUNDS = {" < ": " <= ", " >= ": " > "}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.stem)
def test_an_off_by_one_is_caught(kernel: Path, tmp_path: Path) -> None:
    for i, match in enumerate(re.finditer(r"(?<=\w)( < | >= )(?=\w)", kernel.read_text())):
        folder = tmp_path / str(i)
        folder.mkdir()
        sources = planted(folder, kernel, match.span(), BOUNDS[match.group()])
        if "AddressSanitizer" in found(kernel.stem, "address", folder, sources):
            return
    pytest.fail("no bound that is one too far was noticed")
