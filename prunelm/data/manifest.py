"""Utterances, and the TSV files that list them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prunelm.data.files import replace_file, shown
from prunelm.data.lines import read_lines

Transcripts = Literal["required", "allow_empty", "optional"]
"""Which utterances a loader takes.

"required": those with a word, as training needs them. "allow_empty": also those whose transcript
is empty, since nothing is said in them, as a word error rate needs them. "optional": also those
without a transcript, as decoding needs them.
"""

LONGEST = 1e7
"""Seconds of the longest recording that a manifest may name; over 100 days."""


@dataclass(frozen=True)
class Utterance:
    """One recording and what is said in it.

    Attributes:
        id: unique within its corpus; printable, not empty.
        audio_path: a file that soundfile reads.
        transcript: words with single spaces, as a recogniser should write them; "" where nothing is
            said, None where nobody wrote down what is.
        seconds: length where the corpus says it, else None.
        speaker: "" where the corpus does not say.
    """

    id: str
    audio_path: Path
    transcript: str | None
    seconds: float | None = None
    speaker: str = ""

    @property
    def text(self) -> str:
        """The transcript; ValueError names an utterance that has none."""
        if self.transcript is None:
            raise ValueError(f"{self.id}: expected a transcript, got none")
        return self.transcript


def read_manifest(path: Path | str, transcripts: Transcripts = "required") -> list[Utterance]:
    """Utterances of a TSV file with a header: id, path, text, and perhaps seconds and speaker.

    Columns stand in any order, their names in capitals or not; others are left unread. Nothing is
    quoted: a quotation mark is text. Paths are relative to the file's folder, or absolute, or begin
    with ~ for the home folder. Blank lines are left out.

    Args:
        transcripts: with "optional", there need be no column text. With it or "allow_empty", a text
            may be empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names the line that has too many cells or too few, an id that is empty, not
            printable or comes twice, no path, no text, or seconds that are no length.
    """
    path = Path(path)
    lines = read_lines(path, longest=None)
    rows = [(n, line.split("\t")) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path}: expected the columns id, path and text, got an empty file")
    header, *rows = rows
    places = _columns(f"{path}, line {header[0]}", header[1], transcripts)
    utterances = []
    seen: set[str] = set()
    for number, cells in rows:
        where = f"{path}, line {number}"
        if len(cells) != len(header[1]):
            raise ValueError(f"{where}: expected {len(header[1])} columns, got {len(cells)}")
        row = {name: cells[place].strip() for name, place in places.items()}
        check_id(row["id"], seen, where)
        if not row["path"]:
            raise ValueError(f"{where}: expected a path, got an empty cell")
        text = " ".join(row["text"].split()) if "text" in row else None
        if text == "" and transcripts == "required":
            raise ValueError(f"{where}: expected a transcript of {shown(row['id'])}, got none")
        seconds = _seconds(row.get("seconds", ""), where)
        audio = path.parent / _at_home(row["path"])
        utterances.append(Utterance(row["id"], audio, text, seconds, row.get("speaker", "")))
    return utterances


def write_manifest(path: Path | str, utterances: Sequence[Utterance]) -> None:
    """Writes what `read_manifest` reads, with absolute paths; no column text if none has one.

    Raises:
        ValueError: a cell that could not be read back (tabs, line ends), or transcripts for some
            utterances only. Nothing is written then.
    """
    known = [each.transcript is not None for each in utterances]
    if any(known) and not all(known):
        name = utterances[known.index(False)].id
        raise ValueError(f"{path}: expected transcripts for all or for none, got none of {name}")
    columns = ["id", "path", *(["text"] if all(known) else []), "seconds", "speaker"]
    lines = ["\t".join(columns)]
    seen: set[str] = set()
    for each in utterances:
        check_id(each.id, seen, f"{path}")
        seconds = "" if each.seconds is None else f"{each.seconds:.3f}"
        _seconds(seconds, f"{path}: {each.id}")
        cells = {
            "id": each.id,
            "path": str(each.audio_path.resolve()),
            "text": each.transcript or "",
            "seconds": seconds,
            "speaker": each.speaker,
        }
        for column in columns:
            if any(c in "\t\n\r\0" or "\ud800" <= c <= "\udfff" for c in cells[column]):
                raise ValueError(
                    f"{path}: expected the {column} of {each.id} without tabs, line ends and "
                    f"surrogates, got {shown(cells[column])}"
                )
        lines.append("\t".join(cells[column] for column in columns))
    with replace_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def check_id(name: str, seen: set[str], where: str) -> None:
    """Adds an utterance's id to `seen`; ValueError where it is there, empty or not printable.

    Ids become cells of TSV files and keys of JSON, so that what ends lines has no place in them.
    """
    if not name:
        raise ValueError(f"{where}: expected an id, got none")
    if not name.isprintable():
        raise ValueError(f"{where}: expected an id of printable characters, got {shown(name)}")
    if name in seen:
        raise ValueError(f"{where}: expected a new id, got {shown(name)} again")
    seen.add(name)


def _columns(where: str, header: Sequence[str], transcripts: Transcripts) -> dict[str, int]:
    """Column name -> place, for the columns that are read."""
    names = [cell.strip().lower() for cell in header]
    wanted = ["id", "path", *([] if transcripts == "optional" else ["text"])]
    lacking = [name for name in wanted if name not in names]
    for separator, name in ((",", "commas"), (";", "semicolons")):
        if lacking and len(names) == 1 and separator in names[0]:
            raise ValueError(
                f"{where}: expected tabs between columns, found {name}; save the file as TSV, "
                "without quotation marks around cells"
            )
    if lacking:
        expected = f"{', '.join(wanted[:-1])} and {wanted[-1]}"
        found = shown(", ".join(header))
        raise ValueError(f"{where}: expected the columns {expected}, got {found}")
    read = [name for name in names if name in ("id", "path", "text", "seconds", "speaker")]
    for name in read:
        if read.count(name) > 1:
            raise ValueError(f"{where}: expected one column {name}, got {read.count(name)}")
    return {name: names.index(name) for name in read}


def _seconds(cell: str, where: str) -> float | None:
    if not cell:
        return None
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 0 <= value <= LONGEST:
        raise ValueError(
            f"{where}: expected seconds as a number from 0 to {LONGEST:,.0f}, got {shown(cell)!r}"
        )
    return value


def _at_home(name: str) -> Path:
    if not name.startswith("~"):
        return Path(name)
    try:
        return Path(name).expanduser()
    except RuntimeError:  # no such user: a file whose name begins so
        return Path(name)
