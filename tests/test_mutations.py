"""Thousands of damaged files: each is read, or refused in one line that names it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mutations
import pytest

COUNT = 250


@pytest.mark.slow
@pytest.mark.parametrize("name", list(mutations.LOADERS))
def test_damaged_files_are_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    command = [sys.executable, mutations.__file__, name, str(tmp_path / "run"), "0", str(COUNT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    last = (tmp_path / "run" / "last").read_text() if done.returncode else ""
    assert not done.returncode, f"ended at mutation {last}: {done.stderr[-3000:]}"
    *found, tried = done.stdout.splitlines()
    assert not found, "\n".join(found)
    assert json.loads(tried) == {"tried": COUNT}


def test_enough_is_tried() -> None:
    assert COUNT * len(mutations.LOADERS) >= 3000
