"""What the computer is and what was built for it."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

from prunelm.version import __version__


def describe() -> dict[str, str]:
    """Processor, cores, instruction set, memory, GPUs and versions, each one line of text."""
    import torch

    found = {
        "prunelm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": f"{usable_cores()} usable, torch uses {torch.get_num_threads()} threads",
        "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
        "instruction set of prunelm": own_instruction_set(),
        "memory": memory(),
    }
    for i in range(torch.cuda.device_count()):
        found[f"GPU {i}"] = torch.cuda.get_device_name(i)
    return found


def one_line(machine: dict[str, str]) -> str:
    """The part of `describe` that a reader of numbers needs."""
    gpus = [value for name, value in machine.items() if name.startswith("GPU")]
    parts = [machine.get(name, "") for name in ("processor", "cores", "instruction set of torch")]
    own = machine.get("instruction set of prunelm", "")
    if own.lower() != parts[-1].lower():
        parts.append(own and f"prunelm in {own}")
    versions = [f"{name} {machine[name]}" for name in ("prunelm", "torch") if name in machine]
    return ", ".join(part for part in [*parts, *gpus, *versions] if part)


def own_instruction_set() -> str:
    """What this package's kernels use: "avx2", say; "none" where the extension does not load."""
    try:
        from prunelm import _C
    except ImportError:
        return "none"
    return str(_C.build_information()["instruction_set"])


def processor() -> str:
    """The processor's own name where the system tells it."""
    path = Path("/proc/cpuinfo")
    found = processor_of(path.read_text(errors="replace")) if path.exists() else ""
    return found or platform.processor() or platform.machine()


def processor_of(text: str) -> str:
    """The name in what /proc/cpuinfo says of the first processor, "" if none.

    Some hypervisors cut a name down to "AMD EPYC", whichever it is; family and model then tell one
    from another.
    """
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    found = {name.strip(): value.strip() for name, _, value in pairs}
    name = found.get("model name", "")
    if name and not re.search(r"\d", name) and "cpu family" in found and "model" in found:
        return f"{name} family {found['cpu family']} model {found['model']}"
    return name


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> str:
    """Physical memory in GiB."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"


def version_of(package: str) -> str:
    """An installed package's version, "not installed" where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
