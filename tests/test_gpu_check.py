"""`make gpu-check`: its steps run, fail and end as they should; what it starts can be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prunelm.benchmarks import gpu_check, gpu_memory, gpu_tests
from prunelm.benchmarks.gpu_check import Command, Outcome, Step

ROOT = Path(__file__).parent.parent


def python(name: str, code: str) -> Command:
    return Command(name, (sys.executable, "-c", code), {"WORD": "said"})


def test_a_step_goes_on_whatever_became_of_those_before_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = python("good", "import os; print('some'); print(os.environ['WORD'], os.environ['ALL'])")
    steps = [
        Step("first", (python("bad", "raise SystemExit('broken')"), good), 20),
        Step("second", (Command("missing", ("/no/such/program",)),), 20),
        Step("third", (python("hangs", "import time; time.sleep(60)"),), 0.5),
        Step("fourth", (good,), 20, shown=True),
    ]
    outcomes = gpu_check.run_all(steps, 60, {"ALL": "all"}, tmp_path, {"gpu": "a card"})
    assert [o.status for o in outcomes] == [
        "exit 1", "passed", "exit 127", "timed out after 0 s", "passed",
    ]  # fmt: skip
    assert [o.note for o in outcomes][:2] == ["broken", "said all"]
    assert "/no/such/program" in outcomes[2].note
    assert "broken" in capfd.readouterr().out  # the end of what failed is shown at once
    summary = (tmp_path / "summary.txt").read_text()
    assert summary.startswith("gpu a card\n") and summary.endswith("2 of 5 passed\n")
    assert "== fourth: good" in summary and "== first" not in summary
    log = (tmp_path / "log.txt").read_text()
    assert log.count("== ") == 5 and "some\nsaid all" in log
    saved = json.loads((tmp_path / "check.json").read_text())
    assert saved["gpu"] == "a card" and saved["commands"][1]["status"] == "passed"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["check.json", "log.txt", "summary.txt"]


def test_what_a_hanging_command_started_is_ended_too(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    inner = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    (tmp_path / "out").mkdir()
    step = Step("step", (python("outer", outer),), 1)
    (outcome,), _ = gpu_check.run_step(step, 1, {}, tmp_path / "out")
    assert outcome.status.startswith("timed out") and outcome.seconds < 2.5
    subprocess.run([sys.executable, "-c", "import time; time.sleep(3)"])
    assert not mark.exists()


def test_steps_end_with_the_whole_time(tmp_path: Path) -> None:
    sleeps = python("sleeps", "import time; time.sleep(60)")
    good = python("good", "")
    steps = [Step(name, (sleeps,), 60) for name in ("first", "second")]
    steps.append(Step("shown", (good,), 10, shown=True))
    outcomes = gpu_check.run_all(steps, 16, {}, tmp_path, {})
    assert [o.status for o in outcomes] == ["timed out after 6 s", "left out: no time", "passed"]
    assert [o.good for o in outcomes] == [False, False, True]


def run(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    script = str(ROOT / "benchmarks" / "gpu_check.py")
    command = [sys.executable, "-S", script, *words]  # without a site: nothing must be installed
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_steps_can_be_listed_anywhere() -> None:
    listed = run("--list", PATH="/bin:/usr/bin").stdout
    assert all(f"memory_{op}" in listed for op in gpu_check.drivers())
    assert all(f"--tool {tool}" in listed for tool in gpu_check.TOOLS)
    assert "tests/test_gpu.py" in listed and "test_gpu_check" not in listed


def test_every_module_of_the_plan_is_there() -> None:
    for step in gpu_check.plan("python3", Path("/out")):
        for command in step.commands:
            if "-m" in command.argv:
                name = command.argv[command.argv.index("-m") + 1].rpartition(".")[2]
                assert (ROOT / "benchmarks" / f"{name}.py").is_file(), name


def test_the_limits_leave_time_within_ten_minutes() -> None:
    steps = gpu_check.plan("python3", Path("/out"))
    assert [step.name for step in steps[:3]] == ["build", "tests", "sanitizer"]
    assert all(step.limit_s <= 200 for step in steps) and steps[-1].shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == gpu_check.NO_GPU
    said = capsys.readouterr().out
    assert said.startswith("gpu-check: expected an NVIDIA GPU") and said.count("\n") == 1
    assert torch.__version__ in said


@pytest.mark.parametrize(("code", "exit_code"), [("", 0), ("raise SystemExit(3)", 1)])
def test_the_summary_comes_last_and_the_exit_code_says_how_it_went(
    code: str,
    exit_code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def plan(python: str, out: Path, listed: str, nvcc: str) -> list[Step]:
        assert listed == "9.0a"
        where = "import prunelm.benchmarks.gpu_check as g; print(g.__file__)"
        command = Command("command", (python, "-c", f"{where}; {code}"))
        return [Step("build", (command,), 20), Step("other", (command,), 20)]

    monkeypatch.setattr(gpu_check, "BUILD", tmp_path / "build")
    monkeypatch.setattr(gpu_check, "plan", plan)
    monkeypatch.setattr(gpu_check, "look", lambda _: {"gpu": "a card", "capability": [9, 0]})
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu_check.main(["--only", "build"]) == exit_code
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{1 - exit_code} of 1 passed"
    assert str(tmp_path / "build" / "site") in lines[-2]  # this checkout, as a package
    assert (tmp_path / "out" / "check.json").is_file()
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "nothing"])


@pytest.mark.parametrize(
    ("capability", "listed"), [((8, 0), "8.0"), ((9, 0), "9.0a"), ((10, 0), "10.0")]
)
def test_only_the_cards_own_code_is_built(capability: tuple[int, int], listed: str) -> None:
    assert gpu_check.architecture(capability) == listed


def test_the_exit_code_says_whether_all_went_well() -> None:
    outcome = Outcome("step", "command", "passed", 1.0, "")
    assert outcome.good and not Outcome("step", "command", "exit 9", 1.0, "").good


# Of what is installed, only these may be imported on the GPU machine (design 10): what is there,
# and what that needs.
PRESENT = (
    "torch triton numpy pybind11 ninja pytest _pytest py pluggy iniconfig packaging pygments "
    "setuptools typing_extensions sympy mpmath networkx jinja2 markupsafe filelock fsspec "
    "functorch torchgen prunelm"
).split()
BLOCK = f"""
import importlib.metadata, sys
absent = set(importlib.metadata.packages_distributions()) - set({PRESENT!r})
class Present:
    finders = list(sys.meta_path)
    def find_spec(self, name, path=None, target=None):
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return None if name.partition(".")[0] in absent else next(filter(None, found), None)
    def find_distributions(self, *context):
        return ()
sys.meta_path[:] = [Present()]
"""


def blocked(code: str, site: Path) -> "subprocess.CompletedProcess[str]":
    environment = {
        **os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", BLOCK + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    site = gpu_check.package_folder(tmp_path)
    gpu_check.link_extension(site)
    return site


def test_gpu_tests_need_nothing_that_is_not_there(site: Path) -> None:
    files = gpu_check.gpu_tests()
    assert "tests/test_gpu.py" in files
    words = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    result = blocked(f"import pytest; sys.exit(pytest.main({words!r}))", site)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


def test_benchmarks_need_nothing_that_is_not_there(site: Path) -> None:
    names = [p.stem for p in (ROOT / "benchmarks").glob("gpu_*.py")]
    code = "import importlib\n" + "\n".join(
        f"importlib.import_module('prunelm.benchmarks.{name}')" for name in names
    )
    code += f"\nimport prunelm; print(prunelm.__file__.startswith({str(site)!r}))"
    result = blocked(code, site)
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr[-3000:]


def test_the_sanitizers_calls_run(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_memory.main(["cpu"])
    assert int(capsys.readouterr().out.split()[0]) > 60


def test_all_files_with_gpu_tests_are_run() -> None:
    folder = Path(__file__).parent
    marked = {p.name for p in folder.glob("test_*.py") if "pytest.mark.gpu" in p.read_text()}
    assert {Path(name).name for name in gpu_check.gpu_tests()} == marked - {Path(__file__).name}


# Tests that end their process, hang, or lose the context stand in for kernels that do.
BAD_TESTS = """
import os, time, pytest
{} = pytest.mark.gpu
def test_a(): pass
def test_b(): os._exit(9)
def test_c(): assert False
def test_d(): time.sleep(600)
def test_e(): pass
@pytest.mark.skip(reason="none")
def test_f(): pass
""".format("pytestmark")


def test_tests_go_on_behind_one_that_breaks_the_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad_tests.py"
    path.write_text(BAD_TESTS)
    found = gpu_tests.run_all([str(path), "-c", "/dev/null"], hangs_s=3)
    assert found == {"passed": 2, "broke": 2, "failed": 1, "skipped": 1}
    said = capfd.readouterr().out
    assert "bad_tests.py::test_b: 9; going on" in said
    assert "bad_tests.py::test_c: E   assert False" in said  # at once: test_d is ended
    assert "bad_tests.py::test_d: hung; going on" in said


def test_tests_go_on_in_another_process_where_the_context_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "record"
    record.write_text("started\told\npassed\told\n")
    plugin = gpu_tests.Continue(record)
    monkeypatch.setattr(gpu_tests, "context_is_lost", lambda: True)
    plugin.pytest_runtest_logstart("new")
    plugin.pytest_runtest_logreport(type("Report", (), {"outcome": "failed"}))
    with pytest.raises(pytest.exit.Exception, match="the CUDA context is lost: new") as ended:
        plugin.pytest_runtest_logfinish("new")
    assert ended.value.returncode == gpu_tests.LOST
    assert gpu_tests.lines_of(record)[2:] == ["started\tnew", "failed\tnew"]


def test_tests_that_cannot_start_are_no_success(tmp_path: Path) -> None:
    (tmp_path / "broken_tests.py").write_text("import no_such_module\n")
    found = gpu_tests.run_all([str(tmp_path / "broken_tests.py"), "-c", "/dev/null"], hangs_s=3)
    assert found["broke"] == 1 and not found["passed"]
