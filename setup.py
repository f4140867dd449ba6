"""Builds the extension `prunelm._C`; every other setting is in pyproject.toml.

C++ is always built. CUDA is built where nvcc is found: what can be compiled decides, never what is
plugged in. `PRUNELM_CUDA=0` leaves it out, `PRUNELM_CUDA=1` makes a missing nvcc an error.
`PRUNELM_SANITIZE=1` builds the C++ for AddressSanitizer and UndefinedBehaviorSanitizer instead
(`make sanitize`). `TORCH_CUDA_ARCH_LIST` and `MAX_JOBS` mean what they mean to torch.
"""

import fcntl
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# `*_simd.cpp` is compiled once per instruction set; the right one is chosen at run time.
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {"portable": []}
if X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    wide = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    INSTRUCTION_SETS["avx512"] = [*INSTRUCTION_SETS["avx2"], *wide]

# 2.11 in torch's packed form: the lowest version whose stable ABI the sources may use.
TORCH_FLOOR = "0x020b000000000000ULL"
DEFAULT_ARCHITECTURES = "8.0;9.0a;9.0+PTX"


SANITIZE = os.environ.get("PRUNELM_SANITIZE") == "1"
SANITIZERS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"


def find_nvcc() -> str | None:
    """Path of nvcc if CUDA is to be built, None if not."""
    wanted = "0" if SANITIZE else os.environ.get("PRUNELM_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"PRUNELM_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for candidate in [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]:
        found = shutil.which(candidate)
        if found:
            return found
    if wanted == "1":
        sys.exit(
            "PRUNELM_CUDA=1: nvcc was not found in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
        )
    return None


def architecture_flags() -> list[str]:
    """nvcc's -gencode flags from TORCH_CUDA_ARCH_LIST, for example "8.0;9.0a;9.0+PTX"."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    flags = []
    for entry in listed.replace(" ", ";").split(";"):
        number = entry.removesuffix("+PTX").replace(".", "")
        if not number:
            continue
        if not entry.endswith("+PTX") or number + "a" not in listed.replace(".", ""):
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class NinjaBuild(build_ext):
    """Writes one build.ninja and runs it, so that objects build in parallel and only when stale."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        nvcc = find_nvcc()
        # An editable install's own build_temp is new each time; objects are worth keeping.
        folder = ROOT / "build/editable" if self.editable_mode else Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        # pybind11 before torch: the copy in some versions of torch refuses sources that keep to the
        # stable ABI.
        system = [pybind11.get_include(), *include_paths(), sysconfig.get_path("include")]
        common = [
            f"-I{ROOT / 'csrc'}",
            *(f"-isystem {path}" for path in system),
            f"-DTORCH_TARGET_VERSION={TORCH_FLOOR}",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        ]
        speed = SANITIZERS if SANITIZE else "-O3"
        cxx = [*common, f"{speed} -std=c++20 -fPIC -Wall -Wextra -fvisibility=hidden"]

        rules = [
            "rule cxx\n  command = $cxx -MD -MF $out.d $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc",
            "rule nvcc\n  command = $nvcc -MD -MF $out.d $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc",
            "rule link\n  command = $linker -shared $in -o $out $flags",
        ]
        objects, edges = [], []

        def compile_object(rule: str, source: Path, flags: list[str], suffix: str = "") -> None:
            name = f"{source.parent.name}_{source.stem}{suffix}.o"
            objects.append(str(folder / name))
            edges.append(f"build {folder / name}: {rule} {source}\n  flags = {' '.join(flags)}")

        for source in sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]):
            if not source.stem.endswith("_simd"):
                # Only what is told of CUDA is compiled anew when the choice changes.
                told = [f"-DPRUNELM_WITH_CUDA={int(nvcc is not None)}"]
                compile_object("cxx", source, [*cxx, *(told if source.stem == "ops" else [])])
                continue
            for name, machine in INSTRUCTION_SETS.items():
                # Vectors are passed between inlined functions only: their ABI does not matter.
                flags = [*cxx, *machine, "-Wno-psabi", f"-DPRUNELM_ISA={name}"]
                compile_object("cxx", source, flags, f"_{name}")
        if nvcc:
            for source in sorted(ROOT.glob("csrc/cuda/*.cpp")):
                compile_object("cxx", source, cxx)
            flags = [f"-I{ROOT / 'csrc'}", "-O3 -std=c++20 -Xcompiler -fPIC,-fvisibility=hidden"]
            flags += ["-Xptxas --warn-on-spills --threads 2", *architecture_flags()]
            for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
                compile_object("nvcc", source, flags, "_cuda")

        link = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu -lc10"]
        # libtorch holds nothing itself: it brings libtorch_cuda beside a CUDA build of torch, and
        # with it the stream getter that csrc/cuda/binding.h declares weak.
        link.append("-Xlinker --no-as-needed -ltorch")
        if nvcc:
            link.append("-cudart static")
        if SANITIZE:
            link.append(SANITIZERS)
        edges.append(f"build {target}: link {' '.join(objects)}\n  flags = {' '.join(link)}")

        compiler = os.environ.get("CXX", "c++")
        head = [f"cxx = {compiler}", f"nvcc = {nvcc}", f"linker = {nvcc or compiler}"]
        cuda = f"CUDA by {nvcc}" if nvcc else "without CUDA"
        print(f"prunelm._C: torch {torch.__version__}, {cuda}", flush=True)
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "build.ninja").write_text("\n".join([*head, *rules, *edges]) + "\n")
            subprocess.check_call([sys.executable, "-m", "ninja", "-C", str(folder), *jobs])


def files(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


setup(
    ext_modules=[
        Extension(
            "prunelm._C",
            sources=files("csrc/*.cpp", "csrc/*/*.cpp", "csrc/*/*.cu"),
            depends=files("csrc/*.h", "csrc/*/*.h", "csrc/*/*.cuh"),
        )
    ],
    cmdclass={"build_ext": NinjaBuild},
)
