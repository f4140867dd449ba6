"""Speech corpora in their own public layouts."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch

from prunelm.data.audio import read_audio as read_audio
from prunelm.data.audio import split_long as split_long
from prunelm.data.files import require_file, shown
from prunelm.data.lines import read_lines
from prunelm.data.manifest import Transcripts as Transcripts
from prunelm.data.manifest import Utterance as Utterance
from prunelm.data.manifest import check_id
from prunelm.data.manifest import read_manifest as read_manifest
from prunelm.data.manifest import write_manifest as write_manifest
from prunelm.data.text import normalise

_MARKERS = re.compile(r"</?s>|<sil>|\+\+\w+\+\+", re.IGNORECASE)


def load_corpus(
    kind: str,
    folder: Path | str,
    split: str,
    transcripts: Transcripts = "required",
    *,
    present: bool = True,
) -> list[Utterance]:
    """Utterances of one split of a corpus, in the corpus's order.

    Args:
        kind: "librispeech" (`<split>/<speaker>/<chapter>/*.trans.txt`), "an4" (the original's
            `etc/an4_<split>.fileids` and `.transcription` beside `wav/`), "ljspeech"
            (`metadata.csv` beside `wavs/`, split "all"), or "manifest" (`<split>.tsv`).
        folder: the corpus's own folder; for a manifest also the file itself.
        split: such as "train-clean-100", "train" or "all".
        transcripts: "required": each utterance has words (for training). "allow_empty": a
            transcript may be empty, since nothing is said (for a word error rate). "optional":
            there may be none, and `Utterance.transcript` is None then (for decoding): a manifest
            without a column text, librispeech without `*.trans.txt`, an4 without
            `.transcription`, ljspeech without `metadata.csv`.
        present: whether all recordings must be there.

    Raises:
        FileNotFoundError: the folder, a list or, if `present`, a recording is missing; names the
            first.
        ValueError: an unknown kind, a list that cannot be read, or an empty transcript.
    """
    if kind not in _LOADERS:
        raise ValueError(f"kind: expected one of {', '.join(_LOADERS)}, got {kind!r}")
    if transcripts not in get_args(Transcripts):
        expected = ", ".join(get_args(Transcripts))
        raise ValueError(f"transcripts: expected one of {expected}, got {transcripts!r}")
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{kind}: expected a folder, got {folder}, which does not exist")
    utterances = _LOADERS[kind](folder, split, transcripts)
    source = f"{kind} {split} in {folder}"
    if not utterances:
        raise ValueError(f"{source}: expected at least one utterance, got none")
    empty = [each.id for each in utterances if not each.transcript]
    if empty and transcripts == "required":
        raise ValueError(
            f"{source}: expected a transcript for each of {len(utterances)} utterances, "
            f"got {len(empty)} empty, the first of {empty[0]}"
        )
    missing = [each for each in utterances if not _is_file(each.audio_path)]
    if missing and present:
        raise FileNotFoundError(
            f"{source}: expected {len(utterances)} recordings, got {len(missing)} missing, "
            f"the first {shown(missing[0].audio_path)}"
        )
    return utterances


def hold_out_speakers(
    utterances: Sequence[Utterance], count: int, seed: int = 0
) -> tuple[list[Utterance], list[Utterance]]:
    """(rest, held out): all utterances of `count` speakers, drawn by `seed`, go to the second.

    Raises:
        ValueError: there are no more than `count` speakers, or the corpus does not say who speaks.
    """
    speakers = sorted({each.speaker for each in utterances})
    if count and speakers == [""]:
        raise ValueError(
            f"{utterances[0].id}: expected a speaker, to hold out {count}, got none (a manifest "
            "names them in the column speaker)"
        )
    if not 0 <= count < max(len(speakers), 1):
        most = max(len(speakers) - 1, 0)
        raise ValueError(f"count: expected 0 to {most} speakers, got {count}")
    order = torch.randperm(len(speakers), generator=torch.Generator().manual_seed(seed))
    held = {speakers[i] for i in order[:count].tolist()}
    rest = [each for each in utterances if each.speaker not in held]
    return rest, [each for each in utterances if each.speaker in held]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than the system allows, say
        return False


def _lines(path: Path) -> list[tuple[int, str]]:
    """(number, line) of a corpus's list, blank lines left out."""
    return [(n, line) for n, line in enumerate(read_lines(path, longest=None), 1) if line.strip()]


def _librispeech(folder: Path, split: str, transcripts: Transcripts) -> list[Utterance]:
    root = folder / split
    lists = sorted(root.glob("*/*/*.trans.txt"))
    files = sorted(root.glob("*/*/*.flac")) if transcripts == "optional" else []
    if not lists and not files:
        raise FileNotFoundError(
            f"librispeech: expected {root}/<speaker>/<chapter>/*.trans.txt, got no such file"
        )
    utterances = []
    seen: set[str] = set()
    for path in lists:
        for number, line in _lines(path):
            name, _, text = line.strip().partition(" ")
            check_id(name, seen, f"{path}, line {number}")
            audio = path.parent / f"{name}.flac"
            utterances.append(Utterance(name, audio, normalise(text), None, path.parts[-3]))
    for path in files:
        if path.stem not in seen:
            check_id(path.stem, seen, f"{path}")
            utterances.append(Utterance(path.stem, path, None, None, path.parts[-3]))
    return sorted(utterances, key=lambda each: each.audio_path.parent) if files else utterances


def _an4(folder: Path, split: str, transcripts: Transcripts) -> list[Utterance]:
    files = require_file("an4", folder / "etc" / f"an4_{split}.fileids")
    path = files.with_suffix(".transcription")
    names = _lines(files)
    if transcripts == "optional" and not path.exists():
        lines: list[tuple[int, str]] | None = None
    else:
        lines = _lines(require_file("an4", path))
        if len(names) != len(lines):
            raise ValueError(
                f"{path}: expected {len(names)} lines, as in {files.name}, got {len(lines)}"
            )
    utterances = []
    seen: set[str] = set()
    for place, (at, line) in enumerate(names):
        name = line.strip()
        identity = os.path.basename(name)
        check_id(identity, seen, f"{files}, line {at}")
        text = None if lines is None else _an4_text(*lines[place], identity, path)
        stem = folder / "wav" / name
        kinds = (stem.with_name(f"{identity}.{suffix}") for suffix in ("wav", "sph", "flac"))
        audio = next((each for each in kinds if _is_file(each)), stem.with_name(f"{identity}.wav"))
        utterances.append(Utterance(identity, audio, text, None, Path(name).parent.name))
    return utterances


def _an4_text(number: int, line: str, identity: str, path: Path) -> str:
    words, _, label = line.rstrip().rstrip(")").rpartition("(")
    if label != identity:
        raise ValueError(
            f"{path}, line {number}: expected ({shown(identity)}), got ({shown(label)})"
        )
    return " ".join(_MARKERS.sub(" ", words).lower().split())


def _ljspeech(folder: Path, split: str, transcripts: Transcripts) -> list[Utterance]:
    if split != "all":
        raise ValueError(f"split: expected all, since ljspeech has no others, got {split!r}")
    path = folder / "metadata.csv"
    utterances = []
    seen: set[str] = set()
    if transcripts == "optional" and not path.exists():
        for audio in sorted((folder / "wavs").glob("*.wav")):
            check_id(audio.stem, seen, f"{audio}")
            utterances.append(Utterance(audio.stem, audio, None, None, "ljspeech"))
        return utterances
    for number, line in _lines(require_file("ljspeech", path)):
        fields = line.split("|")
        where = f"{path}, line {number}"
        if len(fields) != 3:
            raise ValueError(f"{where}: expected id|text|normalised text, got {shown(line)}")
        name = fields[0].strip()
        check_id(name, seen, where)
        audio = folder / "wavs" / f"{name}.wav"
        utterances.append(Utterance(name, audio, normalise(fields[2]), None, "ljspeech"))
    return utterances


def _manifest(folder: Path, split: str, transcripts: Transcripts) -> list[Utterance]:
    path = folder if folder.is_file() else require_file("manifest", folder / f"{split}.tsv")
    return read_manifest(path, transcripts)


_LOADERS: Mapping[str, Callable[[Path, str, Transcripts], list[Utterance]]] = {
    "librispeech": _librispeech,
    "an4": _an4,
    "ljspeech": _ljspeech,
    "manifest": _manifest,
}
