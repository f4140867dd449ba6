"""Help, start-up, and what any failure looks like: one line and a code."""

import errno
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prunelm.cli import COMMANDS, main
from prunelm.study.demo import shipped

NAMES = [name for name in COMMANDS if "bench" not in name]


@pytest.mark.parametrize("name", NAMES)
def test_help_is_readable(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert not any(odd in shown for odd in ("<class", "%%", "typing", "Annotated", "None", "Path"))
    assert ":  (default" not in shown and ": (default" not in shown, "a setting without a word"
    lines = shown.splitlines()
    for line, below in itertools.pairwise(lines):
        if line.startswith("  --"):
            assert below.startswith("        ") and not below.strip().startswith("("), line
    for words in (["help", *name.split()], [*name.split(), "help"], [*name.split(), "-h"]):
        assert main(words) == 0 and capsys.readouterr().out == shown


def test_help_names_classes_with_their_settings(capsys: pytest.CaptureFixture[str]) -> None:
    main(["prune", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "Neurons: Feed-forward neurons",
        ".min_keep <whole number>: neurons that stay in every block",
        ".shape cubic|linear|geometric: how the sizes fall from round to round (default: cubic)",
        "--fp16 yes|no store the weights as float16 (default: no)",
        "--target <size>",
        "(default: Heads | Neurons)",
        "--allow <module>",
        '"40%" of the present size',
    ):
        assert part in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["deocde"], "got 'deocde'; did you mean decode?"),
        (["Decode"], "got 'Decode'; did you mean decode?"),
        (["eval"], "got 'eval'; did you mean evaluate?"),
        (["train-lm"], "got 'train-lm'; did you mean train lm?"),
        (["trainlm"], "did you mean train lm?"),
        (["--hlep"], "did you mean --help?"),
        (["--versoin"], "did you mean --version?"),
        (["help", "deocde"], "did you mean decode?"),
        (["a\x1b[2J\udcff"], r"got 'a\x1b[2J\udcff'"),
        (["env", "--a\x1b"], r"--a\x1b: expected an option of prunelm env"),
        (["zzz"], "command: expected one of demo, train, prune"),
        (["train"], "train: expected lm or recogniser, got nothing"),
        (["train", "foo"], "train: expected lm or recogniser, got 'foo'"),
        (["train", "recognizer"], "got 'recognizer'; did you mean train recogniser?"),
        (["bench", "kernel"], "got 'kernel'; did you mean bench kernels?"),
    ],
)
def test_commands_that_do_not_exist(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


@pytest.mark.parametrize("words", [["help"], [], ["--help"], ["help", "train"], ["train", "help"]])
def test_overviews(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "train lm" in shown and ("decode" in shown) == ("train" not in words)


def _decoding_error() -> None:
    b"ab\xff".decode()


def _deep() -> None:
    _deep()


def _missing() -> None:
    __import__("no_such_module_at_all")


def _raise(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (_raise(ValueError("a: expected b,\n  got c")), "a: expected b, got c"),
        (_raise(ValueError()), "ValueError"),
        (_raise(OSError(errno.ENOSPC, "No space left on device", "w.pt")), "w.pt: No space left"),
        (_raise(PermissionError(errno.EACCES, "Permission denied", "x")), "x: Permission denied"),
        (_raise(OSError(errno.EXDEV, "Cross-device link", "a", None, "b")), "a -> b: Cross-device"),
        (_raise(OSError("plain words")), "plain words"),
        (lambda: open(".").close(), ".: Is a directory"),
        (_decoding_error, "expected text in utf-8, got byte 0xff at place 2"),
        (_raise(MemoryError()), "expected enough memory, got none left"),
        (lambda: torch.empty(2**60), "DefaultCPUAllocator"),
        (_missing, "No module named 'no_such_module_at_all'"),
        (_deep, "unexpected RecursionError: maximum recursion depth exceeded"),
        (_raise(KeyError("rate")), "unexpected KeyError: 'rate'; --debug shows the traceback"),
        (_raise(TypeError("no len")), "unexpected TypeError: no len; --debug shows the traceback"),
        (_raise(IndexError()), "unexpected IndexError; --debug shows the traceback"),
        (_raise(AttributeError("x")), "unexpected AttributeError: x; --debug"),
        (_raise(ZeroDivisionError("by")), "unexpected ZeroDivisionError: by; --debug"),
        (_raise(AssertionError()), "unexpected AssertionError; --debug"),
    ],
    ids=range(18),
)
def test_whatever_is_raised_is_one_line(
    fail: Callable[[], Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prunelm.study.machine.describe", fail)
    assert main(["env"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("prunelm: error: ") and said in shown and shown.count("\n") == 1
    with pytest.raises(Exception):  # noqa: B017
        main(["env", "--debug"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_does_not_fit() -> None:
    code = "from prunelm.cli import main; raise SystemExit(main(['--help']))"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "prunelm: error: No space left on device\n")


def modules_after(code: str) -> set[str]:
    """What a new process has imported once it has run `code`."""
    code = f"import sys\n{code}\nprint('modules', *sys.modules)"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


HEAVY = {
    "torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor",
    "torch.onnx", "torch.utils.tensorboard", "sympy", "triton", "matplotlib", "scipy", "pandas",
    "transformers", "jsonargparse", "rich", "yaml", "onnx", "ray",
}  # fmt: skip


def test_nothing_heavy_is_imported_before_decoding() -> None:
    assert not modules_after("import prunelm.cli.speech, prunelm.cli.arguments") & HEAVY


def test_nothing_heavy_is_imported_by_decoding() -> None:
    where = shipped()
    audio = next(iter(sorted((where / "test").iterdir())))
    words = ["decode", str(where / "recogniser"), str(audio), "--lm", str(where / "lm")]
    found = modules_after(f"from prunelm.cli import main\nassert main({words!r}) == 0")
    assert not found & HEAVY and "torch" in found


@pytest.mark.parametrize("words", ["--help", "", "--version", "help", "train --help", "deocde"])
def test_what_needs_no_torch_does_not_import_it(words: str) -> None:
    found = modules_after(f"from prunelm.cli import main\nmain({words.split()!r})")
    assert not found & {"torch", "numpy", "yaml", "rich", "matplotlib", "soundfile"}


def test_import_prunelm_is_lazy() -> None:
    assert "torch" not in modules_after("import prunelm\nassert 'Pruner' in dir(prunelm)")
