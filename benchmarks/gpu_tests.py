"""Runs the GPU tests to the end, whatever a kernel does to the process.

    python -m prunelm.benchmarks.gpu_tests [TEST FILES]

After an illegal access every later CUDA call of the process fails, a kernel may hang, and a process
may die. So pytest runs in a child; when that happens, another child goes on behind the test that
did it, which counts as failed.
"""

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

LOST = 70  # exit code of a child whose CUDA context is lost
HANGS_S = 60.0  # the first call of a Triton kernel compiles it


class Continue:
    """A pytest plugin: leaves out what `record` names, and notes there what starts and ends.

    Each line is "started<TAB>test" or "outcome<TAB>test". What fails is shown at once, since a
    process that is ended shows no summary.
    """

    def __init__(self, record: Path) -> None:
        self.record = record
        self.before = {line.split("\t", 1)[1] for line in lines_of(record)}
        self.outcome = "passed"
        self.terminal: Any = None

    def pytest_sessionstart(self, session: Any) -> None:
        self.terminal = session.config.pluginmanager.get_plugin("terminalreporter")

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        left = [item for item in items if item.nodeid in self.before]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item.nodeid not in self.before]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome = "passed"
        self.note("started", nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome != "passed" and self.outcome != "failed":
            self.outcome = report.outcome
        if report.outcome == "failed" and self.terminal:
            why = [line for line in report.longreprtext.splitlines() if line.startswith("E")]
            self.terminal.ensure_newline()
            self.terminal.write_line(f"{report.nodeid}: {' '.join(why[:1])[:300]}")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.note(self.outcome, nodeid)
        if self.outcome == "failed" and context_is_lost():
            import pytest

            pytest.exit(f"the CUDA context is lost: {nodeid}", returncode=LOST)

    def note(self, what: str, nodeid: str) -> None:
        with self.record.open("a") as record:
            record.write(f"{what}\t{nodeid}\n")


def lines_of(record: Path) -> list[str]:
    return record.read_text().splitlines() if record.exists() else []


def context_is_lost() -> bool:
    """Whether CUDA refuses all further work."""
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def run_child(arguments: Sequence[str], record: Path, hangs_s: float) -> int | None:
    """pytest's exit code; None where a test was ended because it hung."""
    command = [sys.executable, "-m", "prunelm.benchmarks.gpu_tests", "--record", str(record)]
    with subprocess.Popen([*command, *arguments]) as child:
        seen, since = 0, time.monotonic()
        while child.poll() is None:
            lines = lines_of(record)
            if len(lines) != seen:
                seen, since = len(lines), time.monotonic()
            inside = bool(lines) and lines[-1].startswith("started\t")
            # Imports, the collection and the report run no kernel, and may be slow.
            if time.monotonic() - since > (hangs_s if inside else 10 * hangs_s):
                child.kill()
                child.wait()
                return None
            time.sleep(0.1)
        return child.returncode


def run_all(arguments: Sequence[str], hangs_s: float = HANGS_S) -> Counter[str]:
    """How many tests had each outcome; "broke" for those that took their process along."""
    with TemporaryDirectory() as folder:
        record = Path(folder) / "record"
        while True:
            noted = len(lines_of(record))
            code = run_child(arguments, record, hangs_s)
            lines = lines_of(record)
            # 0 and 1: all ran; 5: none was left; no progress: it would be the same again.
            if code in (0, 1, 5) or len(lines) == noted:
                break
            print(f"after {lines[-1].split(chr(9))[-1]}: {code or 'hung'}; going on", flush=True)
        noted_as = [tuple(line.split("\t", 1)) for line in lines]
        started = [test for what, test in noted_as if what == "started"]
        ended = {test: what for what, test in noted_as if what != "started"}
        found = Counter(ended.get(test, "broke") for test in started)
        if code not in (0, 1, 5):
            found["broke"] += 1
        return found


def main(words: Sequence[str] | None = None) -> int:
    """Runs all tests; the last line says how many passed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--record", type=Path, help="run once, as a child")
    parser.add_argument("--hangs", type=float, default=HANGS_S, help="seconds without progress")
    options, arguments = parser.parse_known_args(words)
    if options.record is not None:
        import pytest

        fixed = ["-q", "--tb=short", "-rfE", "-p", "no:cacheprovider", "-m", "gpu"]
        return int(pytest.main([*fixed, *arguments], plugins=[Continue(options.record)]))
    found = run_all(arguments, options.hangs)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(found.items())) or "none ran")
    return 0 if found["passed"] and not found["failed"] and not found["broke"] else 1


if __name__ == "__main__":
    sys.exit(main())
