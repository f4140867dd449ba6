"""Everything that needs an NVIDIA GPU in one go: build, tests, compute-sanitizer, benchmarks.

    make gpu-check  (python3 benchmarks/gpu_check.py [--list] [--seconds 540] [--out FOLDER])

It runs with the Python that is there, which needs torch for CUDA, triton, numpy, pybind11, ninja,
setuptools and pytest, and no network; nothing is installed. Every step has its own time limit and
runs whatever became of those before it. log.txt, summary.txt, check.json and the results of the
benchmarks lie in $OUT or runs/gpu-check afterwards. It ends with 0 if all went well, 1 if anything
did not, 2 where there is no GPU. It imports nothing that must be built first.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu-check"
DRIVERS = ROOT / "tests" / "cuda_emulation"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SHOWN = 12  # last lines of each command that failed
NO_GPU = 2

# In a child process, since torch may be missing or broken.
LOOK = """
import json, sys, torch
found = {"python": sys.version.split()[0], "torch": torch.__version__}
if torch.cuda.is_available():
    found["gpu"] = torch.cuda.get_device_name()
    found["capability"] = torch.cuda.get_device_capability()
try:
    import triton
    found["triton"] = triton.__version__
except ImportError:
    found["triton"] = "none"
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Command:
    """One process of a step."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """Commands that run side by side; each is ended at the limit.

    Attributes:
        shown: what the commands print is part of the summary.
    """

    name: str
    commands: tuple[Command, ...]
    limit_s: float
    shown: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of one command; `note` is the last line that it printed."""

    step: str
    command: str
    status: str
    seconds: float
    note: str

    @property
    def good(self) -> bool:
        return self.status == "passed"


def look(python: str) -> dict[str, object]:
    """Versions, and the GPU's name and capability where there is one."""
    run = subprocess.run([python, "-c", LOOK], capture_output=True, text=True, timeout=120)
    if run.returncode:
        return {"error": (run.stderr.strip().splitlines() or ["nothing said"])[-1]}
    found: dict[str, object] = json.loads(run.stdout.splitlines()[-1])
    return found


def architecture(capability: Sequence[int]) -> str:
    """As TORCH_CUDA_ARCH_LIST has it; Hopper's own instructions need the "a"."""
    major, minor = capability
    return f"{major}.{minor}{'a' if major == 9 else ''}"


def package_folder(to: Path) -> Path:
    """A folder for PYTHONPATH in which `prunelm` is this checkout, its moved folders included.

    pyproject.toml puts benchmarks and triton_kernels inside the package; without an installation
    links do.
    """
    package = to / "prunelm"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in (ROOT / "prunelm").iterdir():
        if path.name != "__pycache__" and path.suffix != ".so":
            (package / path.name).symlink_to(path)
    for name in ("benchmarks", "triton_kernels"):
        (package / name).symlink_to(ROOT / name)
    return to


def link_extension(to: Path) -> None:
    """Puts the built extension into the package folder."""
    for path in (ROOT / "prunelm").glob("_C*.so"):
        (to / "prunelm" / path.name).unlink(missing_ok=True)
        (to / "prunelm" / path.name).symlink_to(path)


def gpu_tests() -> list[str]:
    """The test files that have GPU tests; the others import what need not be there."""
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    marked = re.compile(
        r"^pytestmark = (\[[^]]*)?pytest\.mark\.gpu|^\s*@pytest\.mark\.gpu", re.MULTILINE
    )
    return [str(p.relative_to(ROOT)) for p in paths if marked.search(p.read_text())]


def drivers() -> list[str]:
    """The ops whose kernels have a program that calls them on small odd shapes."""
    return sorted(path.stem.removeprefix("memory_") for path in DRIVERS.glob("memory_*.cpp"))


def driver_build(nvcc: str, op: str, listed: str) -> Command:
    """nvcc's line for an op's kernels and their driver."""
    number = listed.replace(".", "")
    return Command(
        f"driver of {op}",
        (
            nvcc, "-std=c++20", "-O2", "-lineinfo", "-DON_DEVICE", f"-I{ROOT / 'csrc'}",
            f"-gencode=arch=compute_{number},code=sm_{number}",
            str(ROOT / "csrc" / "cuda" / f"{op}.cu"), str(DRIVERS / f"memory_{op}.cpp"),
            "-o", str(BUILD / f"memory_{op}"),
        ),
    )  # fmt: skip


def plan(python: str, out: Path, listed: str = "9.0a", nvcc: str = "nvcc") -> list[Step]:
    """All steps, the most important first."""

    def module(name: str, *words: str, **environment: str) -> Command:
        argv = (python, "-m", f"prunelm.benchmarks.{name}", *words)
        return Command(" ".join((name, *words[:2])), argv, environment)

    extension = Command(
        "extension",
        (python, "setup.py", "build_ext", "--inplace"),
        {"TORCH_CUDA_ARCH_LIST": listed, "PRUNELM_CUDA": "1"},
    )
    # Triton's tests compile, most of all those of beam_step: several processes share them.
    chosen = (
        "not triton",
        "triton and beam_step and not float64",
        "triton and beam_step and float64",
        "triton and not beam_step and low",
        "triton and not beam_step and not low",
    )
    tests = [
        Command(
            f"tests, {words}",
            module("gpu_tests", *gpu_tests(), "-k", words).argv,
            {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        )
        for words in chosen
    ]
    # Beside them, what is measured later runs once at its full sizes, and is compiled.
    for name in ("block_sparse_linear", "low_rank_linear", "beam_step", "training_step", "model"):
        tests.append(module(f"gpu_{name}", "--dry", "--seconds", "90"))
    tests.append(module("gpu_memory", "triton"))
    # Beside nvcc where it is not on the PATH.
    near = Path(shutil.which(nvcc) or nvcc).resolve().with_name("compute-sanitizer")
    program = shutil.which("compute-sanitizer") or (str(near) if near.exists() else near.name)
    sanitizer = (program, "--error-exitcode", "9", "--print-limit", "20", "--tool")
    # Each allocation of torch's is one of the driver's, of its exact size.
    exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    checked = [
        Command(f"{tool}, {op}", (*sanitizer, tool, str(BUILD / f"memory_{op}")))
        for op in drivers()
        for tool in TOOLS
    ]
    for backend, tools in (("cuda", ("memcheck", "racecheck", "synccheck")), ("triton", TOOLS[:1])):
        for tool in tools:
            call = module("gpu_memory", backend)
            argv = (*sanitizer, tool, "--report-api-errors", "no", *call.argv)
            checked.append(Command(f"{tool}, ops on {backend}", argv, exact))
    to = ("--out", str(out))
    return [
        Step("build", (extension, *(driver_build(nvcc, op, listed) for op in drivers())), 200),
        Step("tests", tuple(tests), 150),
        Step("sanitizer", tuple(checked), 90),
        Step("block-sparse", (module("gpu_block_sparse_linear", "--seconds", "75", *to),), 100),
        Step("low rank", (module("gpu_low_rank_linear", "--seconds", "20", *to),), 40),
        Step("beam step", (module("gpu_beam_step", "--seconds", "20", *to),), 40),
        Step("model", (module("gpu_model", "--seconds", "30", *to),), 50),
        Step("training", (module("gpu_training_step", "--seconds", "20", *to),), 40),
        Step("torch's BSR", (module("gpu_torch_bsr", "--seconds", "60", *to),), 80),
        Step("goals", (module("gpu_choice", *to), module("gpu_goals", *to)), 20, shown=True),
    ]


def run_step(
    step: Step, limit_s: float, environment: Mapping[str, str], folder: Path
) -> tuple[list[Outcome], list[str]]:
    """Runs a step's commands side by side; how each ended, and all that it printed."""
    begin = time.monotonic()
    running = []
    folder.mkdir(parents=True, exist_ok=True)
    for i, command in enumerate(step.commands):
        path = folder / f"output-{i}"
        with path.open("wb") as output:
            try:
                process = subprocess.Popen(
                    command.argv,
                    cwd=ROOT,
                    env={**os.environ, **environment, **command.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                output.write(f"{error}\n".encode())
                process = None
        running.append((command, process, path))
    ended: dict[str, tuple[str, float]] = {}
    while len(ended) < len(running):
        seconds = time.monotonic() - begin
        for command, process, _ in running:
            if command.name in ended:
                continue
            code = 127 if process is None else process.poll()
            if code is None and seconds < limit_s:
                continue
            if code is None and process is not None:
                end(process)
                ended[command.name] = f"timed out after {limit_s:.0f} s", seconds
            else:
                ended[command.name] = f"exit {code}" if code else "passed", seconds
        time.sleep(0.05)
    outcomes, said = [], []
    for command, _, path in running:
        text = path.read_text(errors="replace")
        path.unlink()
        lines = [line for line in text.splitlines() if line.strip()]
        status, seconds = ended[command.name]
        note = lines[-1].strip()[:160] if lines else ""
        outcomes.append(Outcome(step.name, command.name, status, round(seconds, 1), note))
        line = " ".join(command.argv)
        said.append(f"== {step.name}: {command.name}: {status}, {seconds:.1f} s\n$ {line}\n{text}")
    return outcomes, said


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_all(
    steps: Sequence[Step],
    seconds: float,
    environment: Mapping[str, str],
    out: Path,
    about: Mapping[str, object],
    after: Callable[[Step], None] = lambda step: None,
) -> list[Outcome]:
    """Runs what fits into the time, of which the steps that are shown have theirs for sure.

    The files are written anew after each step, in case it is ended.
    """
    begin, outcomes, shown = time.monotonic(), list[Outcome](), ""
    (out / "log.txt").write_text(json.dumps(about) + "\n")
    for i, step in enumerate(steps):
        kept = sum(later.limit_s for later in steps[i + 1 :] if later.shown)
        left = seconds - kept - (time.monotonic() - begin)
        if left < 5:
            found = [
                Outcome(step.name, c.name, "left out: no time", 0.0, "") for c in step.commands
            ]
            said = [""] * len(found)
        else:
            found, said = run_step(step, min(step.limit_s, left), environment, BUILD)
        outcomes += found
        if step.shown:
            shown += "\n".join(said)
        with (out / "log.txt").open("a") as log:
            log.write("\n".join(said) + "\n")
        for outcome, text in zip(found, said, strict=True):
            print(f"{step.name}: {outcome.command}: {outcome.status}, {outcome.seconds:.1f} s")
            if not outcome.good:
                print("\n".join(text.splitlines()[-SHOWN:]))
        sys.stdout.flush()
        after(step)
        (out / "summary.txt").write_text(summary(outcomes, shown, about))
        listed = [asdict(outcome) for outcome in outcomes]
        (out / "check.json").write_text(json.dumps({**about, "commands": listed}, indent=1) + "\n")
    return outcomes


def summary(outcomes: Sequence[Outcome], shown: str, about: Mapping[str, object]) -> str:
    """What was found, what the steps that are shown printed, and last a line for each command."""
    width = max((len(f"{o.step}: {o.command}") for o in outcomes), default=0)
    lines = [", ".join(f"{name} {value}" for name, value in about.items())]
    lines += [shown] if shown else []
    for o in outcomes:
        name = f"{o.step}: {o.command}"
        lines.append(f"{name:{width}}  {o.status:18} {o.seconds:6.1f} s  {o.note}".rstrip())
    bad = sum(not outcome.good for outcome in outcomes)
    lines.append(f"{len(outcomes) - bad} of {len(outcomes)} passed")
    return "\n".join(lines) + "\n"


def find_nvcc() -> str:
    """As setup.py finds it; "nvcc", which then fails by name, where there is none."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for c in candidates if (found := shutil.which(c))), "nvcc")


def listing(steps: Sequence[Step]) -> str:
    """What would run."""
    lines = []
    for step in steps:
        lines.append(f"{step.name}, at most {step.limit_s:.0f} s")
        lines += [f"  {command.name}: {' '.join(command.argv)}" for command in step.commands]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Runs all, or shows what would run."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--list", action="store_true", help="show the steps and run nothing")
    parser.add_argument("--seconds", type=float, default=540, help="for all steps together")
    default = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu-check")
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--only", nargs="+", metavar="STEP", help="names of steps, as in --list")
    options = parser.parse_args(words)
    out, python = options.out.resolve(), sys.executable
    if options.list:
        print(listing(plan(python, out, nvcc=find_nvcc())))
        return 0
    about = look(python)
    if "gpu" not in about:
        told = ", ".join(f"{name} {value}" for name, value in about.items())
        print(f"gpu-check: expected an NVIDIA GPU and torch for CUDA, found none: {told}")
        return NO_GPU
    out.mkdir(parents=True, exist_ok=True)
    site = package_folder(BUILD / "site")
    link_extension(site)
    steps = plan(python, out, architecture(about["capability"]), find_nvcc())  # type: ignore[arg-type]
    if options.only:
        unknown = set(options.only) - {step.name for step in steps}
        if unknown:
            parser.error(f"--only: expected some of {[s.name for s in steps]}, got {unknown}")
        steps = [step for step in steps if step.name in options.only]
    # The current folder must not hide the package folder: PYTHONSAFEPATH.
    environment = {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    # Many processes at once: none takes all processors, for sums or to compile.
    environment |= {"OMP_NUM_THREADS": "4", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    outcomes = run_all(
        steps, options.seconds, environment, out, about,
        lambda step: link_extension(site) if step.name == "build" else None,
    )  # fmt: skip
    print((out / "summary.txt").read_text(), end="")
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
