"""What holds for every test: fresh memory is NaN, one seed, GPU tests only where there is a GPU."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from cuda_emulation.emulated import CHECKERS, Kernels, compile_kernels

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Fills memory from torch.empty with NaN, in Python and in compiled ops, so that a kernel which
# leaves an element unwritten is caught.
torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The CUDA kernels, built for the CPU."""
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    compile_kernels("calls.cpp", library, "-shared", "-fPIC", *CHECKERS["fibers"])
    return Kernels(library)
