"""What a study found: rows, where they were measured, and the files that hold them.

A study's folder has `study.json` (what was studied, where) and `cells/<key>.json`, one row each,
written whole as soon as it is known. That is all a stopped run needs to go on, and all that a
report is made from.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from prunelm.data.files import replace_file, require_file, shown
from prunelm.data.runs import refuse_foreign

FORMAT = 1
NO_LM = "no LM"
DENSE = "dense LM"
_MAKES = ("cells", "models", "transcripts", "report.html", "results.json")
_NAMES: dict[type, str] = {
    str: "text", int: "a whole number", float: "a number", dict: "an object", list: "a list"
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One model as measured; None where a number does not exist or was not asked for.

    Args:
        series: what rows share that differ in size only, such as "LowRank, Taylor, OneShot".
        target: the size asked for, "" for the rows that all others are compared with.
        parameters: the tied embedding counted once; 0 without an LM.
        perplexity: per word, of the test sentences.
        valid_perplexity: per word, of the sentences that choices are made on.
        wer: word error rate; `wer_low` and `wer_high` are its 95 % interval.
        better: bootstrap probability that the WER is below the dense LM's, paired by utterance.
        flops: per token of text.
        latency_ms: one LM step, with `prunelm.accelerate`.
        torch_latency_ms: the same step without it.
        dense_latency_ms: the same step of the dense LM, measured in turn with the two.
        settings: what made the model.
        seconds: what each part of the work took.
    """

    series: str
    target: str
    parameters: int
    perplexity: float | None = None
    valid_perplexity: float | None = None
    wer: float | None = None
    wer_low: float | None = None
    wer_high: float | None = None
    errors: int | None = None
    words: int | None = None
    better: float | None = None
    flops: float | None = None
    latency_ms: float | None = None
    torch_latency_ms: float | None = None
    dense_latency_ms: float | None = None
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What a table calls the row."""
        return f"{self.series}, {self.target}" if self.target else self.series

    def relative(self, latency: str) -> float | None:
        """A step's time over that of the dense LM, which was measured in turn with it.

        Args:
            latency: "latency_ms" or "torch_latency_ms".
        """
        value = getattr(self, latency)
        if value is None or self.dense_latency_ms is None:
            return None
        return float(value / self.dense_latency_ms)

    @property
    def speedup(self) -> float | None:
        """How many times faster than the dense LM a step is."""
        relative = self.relative("latency_ms")
        return None if relative is None else 1 / relative


@dataclass(frozen=True)
class Results:
    """All rows of a study.

    Args:
        study: what was studied: the models' and data's names, digests and sizes.
        machine: what `machine.describe` says of the computer.
        rows: no LM and dense first, then by series, the largest first.
    """

    title: str
    study: Mapping[str, Any]
    machine: Mapping[str, str]
    rows: tuple[Row, ...]

    def row(self, series: str) -> Row | None:
        """The first row of a series."""
        return next((row for row in self.rows if row.series == series), None)

    def series(self) -> dict[str, list[Row]]:
        """The pruned models, by series, in order of size."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.target:
                found.setdefault(row.series, []).append(row)
        return found


def write_json(path: Path | str, values: Any) -> None:
    """Writes JSON whole or not at all; NaN and infinities are refused."""
    with replace_file(path) as temporary:
        text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path | str) -> dict[str, Any]:
    """Reads a JSON object; one clear line where it is missing, cut short or another format."""
    path = Path(path)
    require_file("results", path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: expected JSON, got a file cut short or changed") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        got = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{path}: expected format {FORMAT}, got {shown(got)}")
    return values


def open_study(folder: Path | str, title: str, study: Mapping[str, Any]) -> None:
    """Starts a study in a folder, or makes sure that the folder holds this very study.

    Raises:
        ValueError: the folder holds a study of other models, data or settings, or results of
            something else.
    """
    path = Path(folder) / "study.json"
    wanted = json.loads(json.dumps(study))
    if path.exists():
        refuse_other_study(folder, {**dict.fromkeys(_head(path)["study"]), **wanted})
        return
    refuse_foreign(folder, _MAKES, path.name)
    from prunelm.study.machine import describe

    machine = describe()
    write_json(path, {"format": FORMAT, "title": title, "study": wanted, "machine": machine})


def refuse_other_study(folder: Path | str, facts: Mapping[str, Any]) -> None:
    """As `open_study`, with those facts that are known before any work; nothing is written."""
    path = Path(folder) / "study.json"
    found = _head(path)["study"] if path.exists() else {}
    for name, value in facts.items() if path.exists() else ():
        if found.get(name) != value:
            raise ValueError(
                f"{folder}: expected a study with {name} {value!r}, got one with "
                f"{shown(repr(found.get(name)))}; name another folder or remove this one"
            )


def write_row(folder: Path | str, key: str, row: Row) -> None:
    """Adds a row to a study's folder."""
    write_json(Path(folder) / "cells" / f"{key}.json", {"format": FORMAT, **asdict(row)})


def read_row(folder: Path | str, key: str) -> Row | None:
    """The row of that key, or None where it is yet to be measured."""
    path = Path(folder) / "cells" / f"{key}.json"
    return _row(path, read_json(path)) if path.exists() else None


def read_results(folder: Path | str) -> Results:
    """Every row that a study's folder holds by now.

    Raises:
        FileNotFoundError: the folder holds no study.
        ValueError: no row is finished, or a file is cut short.
    """
    folder = Path(folder)
    if not (folder / "study.json").is_file():
        raise FileNotFoundError(f"{folder}: expected a folder of results (study.json), found none")
    head = _head(folder / "study.json")
    rows = [_row(path, read_json(path)) for path in sorted((folder / "cells").glob("*.json"))]
    if not rows:
        raise ValueError(f"{folder}: expected at least one finished cell in cells/, found none")
    return Results(head["title"], head["study"], head["machine"], in_order(rows))


def in_order(rows: Sequence[Row]) -> tuple[Row, ...]:
    """No LM, dense, then by series, the largest first."""
    first = {NO_LM: 0, DENSE: 1}
    ordered = sorted(
        rows, key=lambda r: (first.get(r.series, 2), r.series, -r.parameters, r.target, r.seed)
    )
    return tuple(ordered)


def save_results(folder: Path | str, results: Results) -> None:
    """Writes results.json: everything in one file, for other programs."""
    write_json(Path(folder) / "results.json", {"format": FORMAT, **asdict(results)})


def load_results(path: Path | str) -> Results:
    """What `save_results` wrote."""
    head = _head(Path(path), rows=list)
    rows = tuple(_row(Path(path), values) for values in head["rows"])
    return Results(head["title"], head["study"], head["machine"], rows)


def _head(path: Path, **more: type) -> dict[str, Any]:
    """A file's values, those that every study has of the right types."""
    values = read_json(path)
    for name, kind in {"title": str, "study": dict, "machine": dict, **more}.items():
        if not isinstance(values.get(name), kind):
            got = shown(values.get(name))
            raise ValueError(f"{path}: expected {name} as {_NAMES[kind]}, got {got}")
    return values


def _row(path: Path, values: Any) -> Row:
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a row as an object, got {shown(values)}")
    values = {name: value for name, value in values.items() if name != "format"}
    known = {f.name: _kind(f.type) for f in fields(Row)}
    for name in [*known, *values]:
        if name not in values:
            raise ValueError(f"{path}: expected the field {name}, got none")
        if name not in known:
            raise ValueError(f"{path}: expected no field {shown(name)}, got one")
        kind, optional = known[name]
        if not (values[name] is None and optional) and not _fits(values[name], kind):
            got = shown(repr(values[name]))
            raise ValueError(f"{path}: expected {name} as {_NAMES[kind]}, got {got}")
    for name, value in values["seconds"].items():
        if not _fits(value, float):
            got = shown(repr(value))
            raise ValueError(f"{path}: expected seconds of {shown(name)} as a number, got {got}")
    return Row(**values)


def _kind(hint: Any) -> tuple[type, bool]:
    """What a field holds in JSON, and whether it may be None."""
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kind = next(each for each in options if each is not type(None))
    return (dict if get_origin(kind) is Mapping else kind), len(options) > 1


def _fits(value: Any, kind: type) -> bool:
    if kind in (str, dict):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return False
    return abs(value) < 1e300  # not NaN, and no integer that a float cannot hold
