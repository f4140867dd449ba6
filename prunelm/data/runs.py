"""Folders of runs: one process at a time, one run each, and a place for what is needed meanwhile.

`run.json` says what shapes the run's result; a call that asks for anything else is refused. Files
that are needed until the result stands lie in `.prunelm-work`. Whatever else lies in a folder is
the user's and stays.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunelm.data.files import digest_of_file, replace_file, shown, sweep

RUN = "run.json"
WORK = ".prunelm-work"
FORMAT = 1
_MARK = "made-by-prunelm"
_DONE = ".prunelm-done"  # a working folder on its way out
_LOG = logging.getLogger(__name__)
_held = threading.local()  # .folders: what this thread holds, so that a run may hold again


@contextmanager
def hold(folder: Path | str) -> Iterator[None]:
    """Makes a folder and keeps other processes out of it until the block ends.

    The lock is the system's own and ends with the process, also with a killed one. Temporary files
    of killed processes are removed at the start. File systems that cannot lock go without.

    Raises:
        ValueError: another process, or another thread, holds the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    found = os.fstat(handle)
    key = (found.st_dev, found.st_ino)
    holding: set[tuple[int, int]] = _held.__dict__.setdefault("folders", set())
    if key in holding:
        os.close(handle)
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: expected a folder that no other process works in, got one in use; "
                "wait for it or choose another folder"
            ) from None
        except OSError:
            pass
        holding.add(key)
        sweep(folder, depth=2)
        if (folder / _DONE / _MARK).is_file() and not (folder / _DONE).is_symlink():
            shutil.rmtree(folder / _DONE, ignore_errors=True)
        yield
    finally:
        holding.discard(key)
        os.close(handle)


@contextmanager
def prepared(out: Path | str, *, main: bool = True) -> Iterator[None]:
    """Holds a run's folder; takes back what the block made in it where that was refused at once.

    A run that got as far as a checkpoint or a result stays, whatever ends it; so does everything
    that lay there before.

    Args:
        main: whether this process is the one that writes; the others only run the block.
    """
    out = Path(out)
    if not main:
        yield
        return
    made = [each for each in (out, *out.parents) if not each.exists()]
    records = (RUN, "study.json", "decoding.json", "log.jsonl")
    before = {name for name in (WORK, *records) if (out / name).exists()}
    progress = _progress(out)
    with hold(out):
        try:
            yield
        except (ValueError, OSError):
            if _progress(out) <= progress:
                if WORK not in before:
                    remove_work(out)
                for name in {*records} - before:
                    (out / name).unlink(missing_ok=True)
                for folder in made:
                    if not _is_removed_if_empty(folder):
                        break
            raise


def work_folder(out: Path | str) -> Path:
    """The place in a run's folder for what is needed until the result stands, made if need be.

    Raises:
        ValueError: something of that name is there that this project did not make.
    """
    work = Path(out) / WORK
    if not (work / _MARK).is_file():
        if work.is_symlink() or (work.exists() and (not work.is_dir() or any(work.iterdir()))):
            raise ValueError(f"{work}: expected a folder of prunelm's own, got another; move it")
        with replace_file(work / _MARK) as temporary:
            temporary.write_text("Whatever is in this folder goes when the run is done.\n")
    return work


def remove_work(out: Path | str) -> None:
    """Removes what `work_folder` made, at once for whoever looks for it."""
    work, done = Path(out) / WORK, Path(out) / _DONE
    for each in (done, work):
        if (each / _MARK).is_file() and not each.is_symlink():
            if each == work:
                each.rename(done)
            shutil.rmtree(done, ignore_errors=True)


def claim(
    folder: Path | str,
    facts: Mapping[str, Any],
    *,
    noted: Mapping[str, Any] | None = None,
    makes: Sequence[str] = (),
) -> None:
    """Marks a folder as this run's, or makes sure that it is.

    Args:
        facts: JSON values, all that shapes the result; see `file_fact` for files.
        noted: what may change the last bits only: a change is said in a warning.
        makes: names of the run's results, none of which may be there before the run.

    Raises:
        ValueError: the folder holds another run (names what differs), or results of something else.
    """
    path = Path(folder) / RUN
    wanted, noted = json.loads(json.dumps(facts)), dict(noted or {})
    if path.is_file():
        found = read_run(folder)
        _compare(folder, wanted, found["facts"], [*wanted, *found["facts"]])
        for name, value in noted.items():
            if found["noted"].get(name, value) != value:
                _LOG.warning(
                    "%s: began with %s %s, goes on with %s; results may differ in the last bits",
                    folder, name, found["noted"][name], value,
                )  # fmt: skip
        return
    refuse_other_run(folder, {}, makes=makes)
    with replace_file(path) as temporary:
        values = {"format": FORMAT, "program": "prunelm", "facts": wanted, "noted": noted}
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def refuse_other_run(
    folder: Path | str, facts: Mapping[str, Any], *, makes: Sequence[str] = ()
) -> None:
    """As `claim`, with those facts that are known before any work; nothing is written."""
    if (Path(folder) / RUN).is_file():
        _compare(folder, json.loads(json.dumps(facts)), read_run(folder)["facts"], list(facts))
        return
    refuse_foreign(folder, makes, RUN)


def refuse_foreign(folder: Path | str, makes: Sequence[str], record: str) -> None:
    """ValueError where results lie in a folder without the record of the run that made them."""
    for name in makes:
        if (Path(folder) / name).exists():
            raise ValueError(
                f"{folder}: expected a folder without {name}, or an earlier run's ({record}), got "
                f"the {name} of something else; choose another folder"
            )


def read_run(folder: Path | str) -> dict[str, Any]:
    """What `claim` wrote: "facts" and "noted"; ValueError where it is something else."""
    path = Path(folder) / RUN
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: expected JSON, got a file cut short or changed") from None
    whole = isinstance(values, dict) and values.get("program") == "prunelm"
    if not (whole and all(isinstance(values.get(name), dict) for name in ("facts", "noted"))):
        raise ValueError(
            f"{path}: expected the record of a run, got something else; choose another folder"
        )
    if values.get("format") != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}, got {shown(values.get('format'))}")
    return dict(values)


def file_fact(path: Path | str) -> dict[str, str]:
    """A file as a fact: equal bytes are equal, whatever their name."""
    return {"digest": digest_of_file(path), "name": Path(path).name}


def digest_of(parts: Any) -> str:
    """12 hex digits of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def named(value: Any) -> str:
    """A function, or an object with settings, as a fact: without addresses in memory."""
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return shown(re.sub(r" at 0x[0-9a-f]+", "", repr(value)))
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _compare(
    folder: Path | str, wanted: Mapping[str, Any], found: Mapping[str, Any], names: Sequence[str]
) -> None:
    # Another kind of run differs in everything: its kind says most.
    for name in sorted(names, key=lambda name: name != "kind"):
        if _bare(wanted.get(name)) != _bare(found.get(name)):
            raise ValueError(
                f"{folder}: expected a run with {name} {_words(wanted.get(name))}, "
                f"got {_words(found.get(name))}; choose another folder or remove this one"
            )


def _bare(value: Any) -> Any:
    return value["digest"] if isinstance(value, dict) and "digest" in value else value


def _words(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict) and "digest" in value:
        return f"digest {shown(value['digest'])} ({shown(value.get('name', ''))})"
    return shown(value)


def _progress(out: Path) -> set[Path]:
    """Checkpoints and results."""
    names = ("training.pt", "model.json", "*/model.json", "cells/*.json", "models/*/model.json")
    below = [path for name in ("round.json", "training.pt") for path in (out / WORK).rglob(name)]
    return {path for name in names for path in out.glob(name)}.union(below)


def _is_removed_if_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True
