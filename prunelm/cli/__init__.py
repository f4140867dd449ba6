"""The command line: the only place where a string becomes an object.

Commands are functions with typed parameters, one module per kind of work. Only the module of the
command that was asked for is imported, so that `prunelm --help` needs no torch.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from prunelm.version import __version__

# command -> (module and function below prunelm.cli, what it does)
COMMANDS = {
    "demo": ("studies.demo", "the main job on shipped models: prune, decode with fusion, report"),
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
        return run(words)
    except KeyboardInterrupt:
        if debug:
            raise
        return _say("stopped; the same command goes on from what is finished", 130)
    except BrokenPipeError:
        # Whoever read the output has gone; Python must not flush to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        if debug:
            raise
        return _say(f"error: {one_line(error)}", 2 if isinstance(error, UsageError) else 1)


def run(words: Sequence[str]) -> int:
    """Runs a command; lets exceptions pass."""
    if not words or words[0] in ("-h", "--help", "help"):
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
    if arguments is not None:
        command(**arguments)
    return 0


def find(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The command that words start with, and the words after it; None: help for its kinds."""
    first, second = words[0], words[1] if len(words) > 1 else ""
    if first in COMMANDS:
        return first, list(words[1:])
    if f"{first} {second}" in COMMANDS:
        return f"{first} {second}", list(words[2:])
    kinds = [name.split()[1] for name in COMMANDS if name.split()[0] == first and " " in name]
    if kinds and second in ("-h", "--help"):
        return None, []
    if kinds:
        got = repr(second) if second else "nothing"
        raise UsageError(f"{first}: expected {' or '.join(kinds)}, got {got}")
    tops = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    close = difflib.get_close_matches(first, tops, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UsageError(f"command: expected one of {', '.join(tops)}, got {first!r}{hint}")


def overview(first: str = "") -> str:
    """What `prunelm --help` shows, or the commands that start with `first`."""
    lines = ["usage: prunelm COMMAND [--option VALUE ...]", ""]
    width = max(map(len, COMMANDS)) + 2
    for name, (_, summary) in COMMANDS.items():
        if not first or name.split()[0] == first:
            lines.append(f"  {name:{width}}{summary}")
    lines += [
        "",
        "prunelm COMMAND --help lists a command's options. All of them can stand in a YAML file",
        "(--config file.yaml); what is on the line wins. --debug shows where an error arose.",
    ]
    return "\n".join(lines)


def one_line(error: BaseException) -> str:
    """An exception as one line: the file first where the system names one."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _say(text: str, code: int) -> int:
    print(f"prunelm: {text}", file=sys.stderr)
    return code
