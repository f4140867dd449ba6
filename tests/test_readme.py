"""What README.md shows runs: its Python, its make targets, its commands and their options."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and line[0] == program]


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0])
def test_python_runs(code: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [word for line in commands("make") for word in line[1:] if "=" not in word]
    assert {"test", "demo"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("line", commands("prunelm"), ids=" ".join)
def test_options_of_commands_exist(line: list[str]) -> None:
    command = [word for word in line[1:3] if re.fullmatch("[a-z]+", word)]
    shown = ""
    for depth in range(1, len(command) + 1):
        run = [sys.executable, "-m", "prunelm", *command[:depth], "--help"]
        done = subprocess.run(run, capture_output=True, text=True)
        if done.returncode == 0:
            shown = done.stdout
    assert shown, f"prunelm {line[1]} --help failed"
    for option in [word.split("=")[0] for word in line if word.startswith("--")]:
        setting = "." + option.rpartition(".")[2]  # of a class, which the help lists by class
        assert option in shown or setting in shown, (
            f"{option} is not in the help of {' '.join(line[:2])}"
        )


@pytest.mark.slow
def test_commands_run_one_after_the_other(tmp_path: Path) -> None:
    section = README.split("\n## Commands\n")[1]
    block = re.search(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert block is not None
    lines = block.group(1).splitlines()
    assert len(lines) >= 10
    shutil.copytree(ROOT / "prunelm" / "demo", tmp_path / "prunelm" / "demo")
    program = Path(sys.executable).parent / "prunelm"  # so that the folder above is no package
    for line in lines:
        words = [str(program), *shlex.split(line, comments=True)[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
    assert len((tmp_path / "runs" / "nbest.tsv").read_text().splitlines()) > 200
