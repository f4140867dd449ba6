"""What nvcc made of the CUDA kernels: nothing spills, launches fit, the right instructions.

The facts are read from the extension itself (`python -m prunelm.benchmarks.resources` prints them),
so that they are of what is installed and cost no compilation.
"""

import re
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import setuptools
from cuda_emulation.emulated import SOURCES, Kernels

import prunelm._C
from prunelm.benchmarks import resources
from prunelm.benchmarks.resources import Kernel

ROOT = SOURCES.parent
REGISTERS, THREADS = 65536, 1024  # of a multiprocessor, and the most of a block

# A line for each thing that must be so: kernel, architecture (regular expressions), and the
# beginnings of instructions that must be there.
MUST_HAVE = [
    (r"block_sparse_tiles_kernel<__", "", "HMMA LDSM LDGSTS"),
    (r"block_sparse_tiles_kernel<__", "sm_90a", "SYNCS"),
    (r"block_sparse_tiles_kernel<.* [02]>", "sm_90a", "UCGABAR"),
    (r"block_sparse_tiles_kernel<.* 2>", "sm_90a", "UBLKCP"),
    (r"cluster_kernel<", "sm_90a", "LDGSTS UCGABAR"),
    (r"(cluster|shrink|expand)_kernel<__", "", "HMMA LDSM LDGSTS"),
    (r"beam_step_kernel<|rows_kernel<.*true", "", "LDGSTS"),
    (r"tree_attention_kernel<.*, 1>", "", "LDG.E.128 LDS.128 MUFU.EX2"),
]
MUST_NOT_HAVE = [
    ("", "", "LDL STL"),  # local memory: spills, and arrays that are indexed at run time
    ("block_sparse|grad_|low_rank|tree_", "", "DFMA DADD DMUL"),  # double precision by accident
]


def cuda_architectures(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The real ones that setup.py builds for."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    flags = runpy.run_path(str(ROOT / "setup.py"))["architecture_flags"]()
    return {code for flag in flags if (code := flag.split(",code=")[1]).startswith("sm_")}


@pytest.fixture(scope="module")
def facts() -> list[Kernel]:
    if not prunelm._C.build_information()["cuda"]:
        pytest.skip("the extension was built without CUDA")
    if resources.find_cuobjdump() is None:
        pytest.skip("cuobjdump was not found, neither CUDA's nor triton's")
    return resources.read_kernels(resources.extension())


def is_empty(fact: Kernel) -> bool:
    """Whether nothing was left of a kernel, since this architecture never launches it."""
    return fact.instructions.total() - fact.count("NOP") <= 8


def matching(facts: list[Kernel], kernel: str, architecture: str) -> list[Kernel]:
    found = [
        fact
        for fact in facts
        if re.search(kernel, fact.name)
        and re.search(architecture, fact.architecture)
        and not is_empty(fact)
    ]
    assert found, f"no kernel named {kernel} for {architecture}"
    return found


def test_every_kernel_is_there_for_every_architecture(
    facts: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = set()
    for path in [*SOURCES.glob("cuda/*.cu"), *SOURCES.glob("cuda/*.cuh")]:
        for head in re.findall(r"__global__([^{;]*)", path.read_text()):
            written |= set(re.findall(r"(\w+)\([^()]*\)\s*$", head))
    wanted = cuda_architectures(monkeypatch)
    built = {(fact.name.split("<")[0], fact.architecture) for fact in facts}
    assert built == {(kernel, architecture) for kernel in written for architecture in wanted}


def test_nothing_spills_and_nothing_has_a_stack(facts: list[Kernel]) -> None:
    assert [(fact.name, fact.architecture, fact.stack) for fact in facts if fact.stack] == []


def registers_of_a_block(fact: Kernel, threads: int) -> int:
    """As they are handed out: to whole warps, 8 at a time to each thread."""
    return -(-fact.registers // 8) * 8 * -(-threads // 32) * 32


def test_every_kernel_can_be_launched_with_the_threads_that_it_allows(facts: list[Kernel]) -> None:
    for fact in facts:
        what = f"{fact.name} for {fact.architecture}: {fact.registers} registers"
        # Static shared memory would take part of the limit up to which dynamic is asked for; those
        # that have some ask for none.
        static = 48 * 1024 if fact.name.startswith("tree_attention_kernel") else 0
        assert fact.registers <= 255 and fact.shared <= static, what
        assert registers_of_a_block(fact, fact.threads or 32) <= REGISTERS, what


@pytest.mark.parametrize("kernel, architecture, names", MUST_HAVE)
def test_instructions_that_must_be_there(
    facts: list[Kernel], kernel: str, architecture: str, names: str
) -> None:
    for fact in matching(facts, kernel, architecture):
        for name in names.split():
            assert fact.count(name), f"{fact.name} for {fact.architecture} has no {name}"


@pytest.mark.parametrize("kernel, architecture, names", MUST_NOT_HAVE)
def test_instructions_that_must_not(
    facts: list[Kernel], kernel: str, architecture: str, names: str
) -> None:
    for fact in matching(facts, kernel, architecture):
        for name in names.split():
            assert not fact.count(name), f"{fact.name} for {fact.architecture} has {name}"


def test_no_kernel_outgrows_the_instruction_cache(facts: list[Kernel]) -> None:
    """128 KB, of 16 bytes each; beyond them code comes from the second-level cache."""
    sizes = {(fact.name, fact.architecture): fact.instructions.total() for fact in facts}
    assert [(kernel, size) for kernel, size in sizes.items() if size > 8192] == []


def test_only_barriers_of_clusters_wait_for_global_memory(facts: list[Kernel]) -> None:
    """What has the cluster's scope elsewhere waits in every round of a loop."""
    for fact in matching(facts, "block_sparse_tiles_kernel|cluster_kernel", "sm_90a"):
        assert fact.count("MEMBAR.ALL.GPU") <= fact.count("UCGABAR_ARV"), fact.name
        assert fact.count("CCTL") <= fact.count("UCGABAR_WAIT"), fact.name


def test_launches_of_the_emulated_tests_fit(facts: list[Kernel], kernels: Kernels) -> None:
    """Those of this session, so that only the whole suite sees all."""
    built = {(fact.name, fact.architecture): fact for fact in facts}
    launches = kernels.launches()
    if not launches:
        pytest.skip("no emulated kernel was launched before this test")
    for mangled, capability, threads, shared, _ in launches:
        (name,) = resources.short_names([mangled])
        architecture, most = ("sm_90a", 227) if capability >= 90 else ("sm_80", 163)
        if (fact := built.get((name, architecture))) is None:
            pytest.fail(f"{name} is launched and was not built for {architecture}")
        what = f"{name} for {architecture}, {threads} threads, {shared} bytes"
        assert not is_empty(fact), what
        assert threads <= (fact.threads or THREADS), what
        assert registers_of_a_block(fact, threads) <= REGISTERS, what
        assert shared + fact.shared <= most * 1024, what


def test_no_warnings(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    # Warnings come before optimisation, which takes most of the time.
    command = [nvcc, "-c", "-std=c++20", "-Xcicc", "-O0", f"-I{SOURCES}"]
    command += ["-Xcompiler", "-Wall,-Wextra", "-Werror", "all-warnings"]
    command += [f"-gencode=arch=compute_{number},code=compute_{number}" for number in (80, 90)]

    def compile_object(path: Path) -> str:
        out = str(tmp_path / f"{path.stem}.o")
        result = subprocess.run([*command, str(path), "-o", out], capture_output=True, text=True)
        return "" if result.returncode == 0 else result.stderr

    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(compile_object, sorted(SOURCES.glob("cuda/*.cu")))) == {""}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_100", "sm_120"])
def test_later_gpus_can_take_the_ptx(
    facts: list[Kernel], architecture: str, tmp_path: Path
) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    command = [str(resources.find_cuobjdump()), "--extract-ptx", "all"]
    command += [str(resources.extension())]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    files = [path for path in sorted(tmp_path.glob("*.ptx")) if "prunelm" in path.read_text()]
    assert files
    for path in files:
        command = [nvcc, "-cubin", "-Xptxas", "-v", f"-arch={architecture}", str(path)]
        command += ["-o", str(tmp_path / "cubin")]
        said = subprocess.run(command, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        sizes = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", said.stderr)
        assert sizes and set(sizes) == {"0"}


def test_names_are_short() -> None:
    mangled = [
        "_ZN7prunelm4cuda51_GLOBAL__N__fb2e3675_18_low_rank_linear_cu_8b35b67122"
        "low_rank_linear_kernelIfEEvNS0_13LowRankLinearENS0_10ActivationE",
        "_ZN7prunelm4cuda3mma23block_sparse_mma_kernelI6__halfLi32ELi128ELNS1_4ModeE1EEEvNS0_17"
        "BlockSparseLinearENS1_5TilesENS0_10ActivationE",
        "_ZN7prunelm4cuda12_GLOBAL__N_113grad_x_kernelENS0_19BlockSparseGradientE",
    ]
    expected = ["low_rank_linear_kernel<float>", "block_sparse_mma_kernel<__half, 32, 128, 1>"]
    assert resources.short_names(mangled) == [*expected, "grad_x_kernel"]
