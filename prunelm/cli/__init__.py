"""The command line: the only place where a string becomes an object.

Commands are functions with typed parameters, one module per kind of work. Only the module of the
command that was asked for is imported, so that `prunelm --help` needs no torch.
"""

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from prunelm.version import __version__

# command -> (module and function below prunelm.cli, what it does)
COMMANDS = {
    "demo": ("studies.demo", "the main job on shipped models: prune, decode, report"),
    "train lm": ("training.train_lm", "train a Transformer LM on lines of text"),
    "train recogniser": ("training.train_recogniser", "train a transducer on a corpus of speech"),
    "prune": ("pruning.prune", "prune a model to the size you name, and heal it"),
    "plan": ("pruning.plan", "say what pruning would take, and the smallest size in reach"),
    "evaluate": ("speech.evaluate", "perplexity of a text, word error rate of a corpus"),
    "decode": ("speech.decode", "turn speech into n-best lists"),
    "tune": ("speech.tune", "choose the LM weight and token reward on validation speech"),
    "bench kernels": ("machine.bench", "the kernels against torch's own"),
    "bench decoding": ("machine.bench", "beam search with and without fusion"),
    "study": ("studies.study", "a grid of methods, criteria, schedules and sizes; resumable"),
    "report": ("studies.report", "tables and plots of a study, as one HTML file"),
    "env": ("machine.env", "versions, instruction sets, devices, what was built"),
}


class UsageError(ValueError):
    """A command line that asks for something that does not exist."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; one line on stderr and a code that is not 0 where it fails.

    Codes: 1 bad input, 2 bad usage, 130 stopped with Ctrl-C. `--debug` shows the traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        code = run(words)
        sys.stdout.flush()  # a full disk or a closed pipe shows here, and not at exit
        return code
    except KeyboardInterrupt:
        if debug:
            raise
        return _say("stopped; the same command goes on from what is finished", 130)
    except BrokenPipeError:
        _forget_output()  # whoever read it has gone
        return 1
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
            _forget_output()
        return _say(f"error: {one_line(error)}", 2 if isinstance(error, UsageError) else 1)


def run(words: Sequence[str]) -> int:
    """Runs a command; lets exceptions pass."""
    words = list(words)
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"prunelm {__version__}")
        return 0
    name, rest = find(words)
    if name is None:
        print(overview(words[0]))
        return 0
    place, summary = COMMANDS[name]
    module, function = place.split(".")
    from prunelm.cli.arguments import parse

    if name in ("demo", "prune", "study") or name.startswith("train "):
        from prunelm.cli.memory import keep_freed_memory

        keep_freed_memory()
    command = getattr(importlib.import_module(f"prunelm.cli.{module}"), function)
    if name.startswith("bench "):
        command(name.split()[1], rest)  # the benchmarks have options of their own
        return 0
    arguments = parse(f"prunelm {name}", summary, command, rest)
    if arguments is None:
        return 0
    try:
        command(**arguments)
    except (ValueError, OSError) as error:
        arguments.locate(error)
        raise
    return 0


def find(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The command that words start with, and the words after it; None: help for its kinds."""
    first, second = words[0], words[1] if len(words) > 1 else ""
    if first in COMMANDS:
        return first, list(words[1:])
    if f"{first} {second}" in COMMANDS:
        return f"{first} {second}", list(words[2:])
    kinds = [name.split()[1] for name in COMMANDS if name.split()[0] == first and " " in name]
    if kinds and second in ("-h", "--help", "help"):
        return None, []
    if kinds:
        got = repr(second) if second else "nothing"
        hint = _near(second, {kind: f"{first} {kind}" for kind in kinds})
        raise UsageError(f"{first}: expected {' or '.join(kinds)}, got {got}{hint}")
    tops = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    known = {each: each for each in (*tops, "--help", "--version")}
    known |= {name.replace(" ", ""): name for name in COMMANDS}
    hint = _near(first.replace("-", "" if first[0:1] != "-" else "-").replace("_", ""), known)
    raise UsageError(f"command: expected one of {', '.join(tops)}, got {first!r}{hint}")


def _near(word: str, known: dict[str, str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, 1)
    return f"; did you mean {known[close[0]]}?" if close else ""


def overview(first: str = "") -> str:
    """What `prunelm --help` shows, or the commands that start with `first`."""
    lines = ["usage: prunelm COMMAND [--option VALUE ...]", ""]
    width = max(map(len, COMMANDS)) + 2
    for name, (_, summary) in COMMANDS.items():
        if not first or name.split()[0] == first:
            lines.append(f"  {name:{width}}{summary}")
    lines += [
        "",
        "prunelm COMMAND --help lists a command's options. All of them can stand in a",
        "YAML file (--config file.yaml); what is on the line wins. --debug shows where an",
        "error arose.",
    ]
    return "\n".join(lines)


def one_line(error: BaseException) -> str:
    """An exception as one line: the file first where the system names one.

    What bad input raises speaks for itself; any other exception is a bug, and the line says so.
    """
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        names = [each for each in (error.filename, error.filename2) if each not in (None, "", -1)]
        where = f"{' -> '.join(_as_text(each) for each in names)}: " if names else ""
        return f"{where}{error.strerror}"
    if isinstance(error, UnicodeDecodeError):
        got = f"byte 0x{error.object[error.start]:02x} at place {error.start:,}"
        return f"expected text in {error.encoding}, got {got}"
    if isinstance(error, MemoryError):
        return f"expected enough memory, got none left{f' ({text})' if text else ''}"
    if isinstance(error, ImportError):
        return text or "a module could not be imported"
    known = isinstance(error, (ValueError, OSError, RuntimeError))
    if known and not isinstance(error, RecursionError):
        return text or type(error).__name__
    kind = type(error).__name__
    return f"unexpected {kind}{f': {text}' if text else ''}; --debug shows the traceback"


def _as_text(name: object) -> str:
    return os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else str(name)


def _forget_output() -> None:
    """Has what is left in stdout's buffer go nowhere, so that Python's own flush cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str, code: int) -> int:
    # Names of files and options may hold what a terminal would obey.
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
    print(f"prunelm: {shown}", file=sys.stderr)
    return code
