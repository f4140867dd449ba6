"""The programs that compute-sanitizer runs on a GPU: they build, and hide nothing from the kernels.

Here a device allocation is one of the heap's, and what was moved to it is poisoned where it was, so
that AddressSanitizer sees a pointer that was not moved.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_emulation.emulated import FOLDER, SOURCES, compile_kernels

from prunelm.benchmarks import gpu_check

OPS = gpu_check.drivers()
DEVICE = """
#pragma once
#include <sanitizer/asan_interface.h>
#include <cstdlib>
#include <cstring>
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMalloc(void** to, size_t size) {
  *to = std::malloc(size);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* at) {
  std::free(at);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
  if (kind == cudaMemcpyDeviceToHost) __asan_unpoison_memory_region(to, size);
  std::memcpy(to, from, size);
  if (kind == cudaMemcpyHostToDevice) __asan_poison_memory_region(from, size);
  return cudaSuccess;
}
"""


def test_every_op_has_a_driver_and_every_launch_goes_through_it() -> None:
    assert OPS == sorted(path.stem for path in SOURCES.glob("cuda/*.cu"))
    for op in OPS:
        text = (FOLDER / f"memory_{op}.cpp").read_text()
        assert len(re.findall(r"\blaunch_", text)) == text.count("launched(launch_") > 0, op


@pytest.mark.parametrize("op", OPS)
def test_kernels_see_device_memory_only(op: str, tmp_path: Path) -> None:
    (tmp_path / "device.h").write_text(DEVICE)
    program = tmp_path / "program"
    flags = (
        "-fsanitize=address", "-DCUDA_EMULATION_THREADS", "-O0", "-DON_DEVICE",
        "-include", str(FOLDER / "cuda_runtime.h"), "-include", str(tmp_path / "device.h"),
    )  # fmt: skip
    compile_kernels(f"memory_{op}.cpp", program, *flags, op=op)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(gpu_check.find_nvcc() == "nvcc", reason="no nvcc")
@pytest.mark.parametrize("op", OPS)
def test_drivers_build_for_the_gpu(
    op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "BUILD", tmp_path)
    command = gpu_check.driver_build(gpu_check.find_nvcc(), op, "9.0a")
    result = subprocess.run(command.argv, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    if shutil.which("nvidia-smi") is None:  # it ends by itself where there is no device
        run = subprocess.run([tmp_path / f"memory_{op}"], capture_output=True, text=True)
        assert run.returncode == 1 and "CUDA" in run.stderr
