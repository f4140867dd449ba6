"""What nvcc made of each CUDA kernel: registers, memory, instructions. No GPU is needed.

    python -m prunelm.benchmarks.resources [FILE] [--kernels TEXT]

Reads the extension, or FILE: any object or cubin that nvcc has written. cuobjdump comes with CUDA
or with triton.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prunelm.benchmarks.harness import table

# What to look for in SASS, by the beginning of an instruction's name: what it says of a kernel.
NOTABLE = {
    "HMMA": "16-bit matrix instruction of a warp",
    "HGMMA": "matrix instruction of four warps, sm_90",
    "LDSM": "matrices from shared memory",
    "LDGSTS": "asynchronous copy to shared memory, sm_80",
    "UBLKCP": "bulk copy, sm_90",
    "UTMALDG": "tensor copy, sm_90",
    "SYNCS": "barrier in shared memory",
    "UCGABAR": "barrier of a cluster, sm_90",
    "REDUX": "reduction of a warp in one instruction",
    "ATOM": "atomic operation",
    "LDL": "load from local memory: a spill, or an array that is indexed at run time",
    "STL": "store to local memory",
    "DFMA": "double precision",
}


@dataclass
class Kernel:
    """Of one kernel as compiled for one architecture; sizes in bytes."""

    name: str
    architecture: str
    registers: int
    stack: int
    shared: int  # static
    threads: int | None = None  # the most that __launch_bounds__ allows, None: not declared
    instructions: Counter[str] = field(default_factory=Counter)  # by full name

    def count(self, beginning: str) -> int:
        """How many instructions' names begin so."""
        return sum(n for name, n in self.instructions.items() if name.startswith(beginning))


def extension() -> Path:
    """The file of prunelm._C."""
    spec = importlib.util.find_spec("prunelm._C")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def find_cuobjdump() -> str | None:
    """Path of CUDA's, or of the one that triton brings; None where neither is."""
    places = []
    if nvcc := shutil.which("nvcc"):
        places.append(str(Path(nvcc).resolve().parent))
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    for place in (None, *places):
        if found := shutil.which("cuobjdump", path=place):
            return found
    return None


def _dump(what: str, path: Path) -> Iterator[str]:
    tool = find_cuobjdump()
    if tool is None:
        raise RuntimeError("cuobjdump: expected CUDA's or triton's, found neither")
    command = [tool, f"--dump-{what}", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}")


def short_names(mangled: Sequence[str]) -> list[str]:
    """Readable names without namespaces, result and parameters: beam_step_kernel<float, float>."""
    if not mangled:
        return []
    lines = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [_short(line) for line in lines]


def _short(readable: str) -> str:
    readable = re.sub(r"\(anonymous namespace\)::", "", readable)
    readable = re.sub(r"\((?:bool|int|[\w:]*Mode)\)", "", readable)  # of template arguments
    depth = 0
    for i, letter in enumerate(readable):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            readable = readable[:i]
            break
    return re.sub(r"\b(?:\w+::)+", "", readable.removeprefix("void "))


_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ +)?([A-Z][A-Z0-9_.]*)")
_ENTRY = re.compile(r"\.entry (\w+)\(")
_BOUNDS = re.compile(r"\.(?:maxntid|reqntid) (\d+)(?:, (\d+))?(?:, (\d+))?")
# What the system takes of a block's shared memory from sm_90 on; cuobjdump counts it.
_RESERVED = 1024


def read_kernels(path: Path, of: str = "prunelm") -> list[Kernel]:
    """The kernels whose mangled names hold `of`, in every architecture that the file holds."""
    found: dict[tuple[str, str], Kernel] = {}
    architecture = name = ""
    for line in _dump("resource-usage", path):
        if line.startswith("arch = "):
            architecture = line.split()[-1]
        elif line.startswith(" Function "):
            name = line.removeprefix(" Function ").rstrip(":\n")
        elif of in name and (usage := _USAGE.search(line)):
            registers, stack, shared = map(int, usage.groups())
            if int(re.sub(r"\D", "", architecture)) >= 90:
                shared = max(shared - _RESERVED, 0)  # an empty kernel has none
            found[architecture, name] = Kernel(name, architecture, registers, stack, shared)
            name = ""
    kernel = None
    for line in _dump("sass", path):
        if instruction := _INSTRUCTION.match(line):
            if kernel:
                kernel.instructions[instruction[1]] += 1
        elif line.startswith("arch = "):
            architecture = line.split()[-1]
        elif "Function : " in line:
            kernel = found.get((architecture, line.split()[-1]))
    bounds = declared_threads(path)
    kernels = list(found.values())
    names = short_names([kernel.name for kernel in kernels])
    for kernel, short in zip(kernels, names, strict=True):
        kernel.threads, kernel.name = bounds.get(kernel.name), short
    return sorted(kernels, key=lambda kernel: (kernel.name, kernel.architecture))


def declared_threads(path: Path) -> dict[str, int]:
    """The threads of __launch_bounds__, by mangled name, from the file's PTX."""
    found: dict[str, int] = {}
    name = ""
    for line in _dump("ptx", path):
        if entry := _ENTRY.search(line):
            name = entry[1]
        elif name and (bounds := _BOUNDS.match(line.strip())):
            x, y, z = (int(size or 1) for size in bounds.groups())
            found[name] = x * y * z
    return found


def rows(kernels: Sequence[Kernel]) -> list[dict[str, object]]:
    """A line for each kernel and architecture."""
    return [
        {
            "kernel": kernel.name,
            "arch": kernel.architecture,
            "threads": kernel.threads,
            "registers": kernel.registers,
            "stack": kernel.stack,
            "shared": kernel.shared,
            "instructions": kernel.instructions.total(),
            "notable": " ".join(f"{name} {n}" for name in NOTABLE if (n := kernel.count(name))),
        }
        for kernel in kernels
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Prints the table; 1 where there are no kernels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=extension())
    parser.add_argument("--kernels", default="", help="only those whose names hold this")
    options = parser.parse_args(words)
    kernels = [kernel for kernel in read_kernels(options.file) if options.kernels in kernel.name]
    if not kernels:
        print(f"resources: {options.file} holds no such CUDA kernel")
        return 1
    print(table(rows(kernels)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
