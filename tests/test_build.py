"""What setup.py builds and what the source distribution and the wheel hold."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools

import prunelm._C

ROOT = Path(__file__).parent.parent


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The functions of setup.py, without its call of setup()."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def build(command: str, to: Path) -> Path:
    """Runs a hook of the build backend as an installer would; the file that it made."""
    code = f"from setuptools import build_meta; print(build_meta.{command}({str(to)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PRUNELM_CUDA": "0"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return to / result.stdout.split()[-1]


def sources(folder: str, *patterns: str) -> set[str]:
    return {
        str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / folder).rglob(pattern)
    }


def test_extension_says_how_it_was_built() -> None:
    information = prunelm._C.build_information()
    assert isinstance(information["cuda"], bool)
    sets = information["instruction_sets"]
    assert sets == ["portable", "avx2", "avx512"][: len(sets)]
    assert information["instruction_set"] in sets
    assert re.match(r"\d+\.", str(information["compiler"]))


def test_source_distribution_holds_what_a_build_needs(tmp_path: Path) -> None:
    with tarfile.open(build("build_sdist", tmp_path)) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    wanted = sources("csrc", "*.cpp", "*.h", "*.cu", "*.cuh") | sources("prunelm", "*.py")
    wanted |= sources("triton_kernels", "*.py") | sources("benchmarks", "*.py")
    wanted |= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "prunelm/py.typed"}
    assert not wanted - names


def assert_packages(names: set[str]) -> None:
    """Both folders stand inside the package, and nothing beside it takes another project's name."""
    moved = sources("triton_kernels", "*.py") | sources("benchmarks", "*.py")
    assert not (sources("prunelm", "*.py") | {f"prunelm/{name}" for name in moved}) - names
    assert {name.split("/")[0] for name in names} == {"prunelm"}
    assert "prunelm/py.typed" in names


def test_packages_lie_inside_prunelm(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    assert_packages({str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()})


@pytest.mark.slow
def test_wheel_holds_the_packages_and_the_extension(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # a build folder of its own
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "*.so", "runs"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    environment = {**os.environ, "PRUNELM_CUDA": "0"}
    subprocess.run([*command, "-w", str(tmp_path), str(tree)], check=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert_packages(names)
    assert any(re.fullmatch(r"prunelm/_C\..*\.so", name) for name in names)


def test_cuda_asked_for_without_nvcc_is_an_error(
    setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setenv("PRUNELM_CUDA", "1")
    with pytest.raises(SystemExit, match="PRUNELM_CUDA=1: nvcc was not found in CUDA_HOME"):
        setup_py["find_nvcc"]()
    monkeypatch.setenv("PRUNELM_CUDA", "yes")
    with pytest.raises(SystemExit, match="PRUNELM_CUDA: expected auto, 0 or 1, got 'yes'"):
        setup_py["find_nvcc"]()
    monkeypatch.setenv("PRUNELM_CUDA", "auto")
    assert setup_py["find_nvcc"]() is None


def test_cuda_is_left_out_where_nobody_wants_it(
    setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/somewhere/nvcc")
    monkeypatch.setenv("PRUNELM_CUDA", "0")
    assert setup_py["find_nvcc"]() is None
    monkeypatch.delenv("PRUNELM_CUDA")
    assert setup_py["find_nvcc"]() == "/somewhere/nvcc"


@pytest.mark.parametrize(
    "listed, codes",
    [
        pytest.param("", ["sm_80", "sm_90a", "compute_90"], id="default"),
        pytest.param("8.6+PTX", ["sm_86", "compute_86"], id="one-with-ptx"),
        pytest.param("8.0 9.0", ["sm_80", "sm_90"], id="two"),
    ],
)
def test_architectures_follow_torchs_variable(
    setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch, listed: str, codes: list[str]
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    flags = setup_py["architecture_flags"]()
    assert [flag.split(",code=")[1] for flag in flags] == codes
