"""Speech corpora in their own public layouts, audio files, and batches of features for training."""

import csv
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from prunelm.data.resampling import resample
from prunelm.data.text import normalise, read_lines

_MARKERS = re.compile(r"</?s>|<sil>|\+\+\w+\+\+", re.IGNORECASE)


@dataclass(frozen=True)
class Utterance:
    """One recording and what is said in it.

    Attributes:
        id: unique within its corpus.
        audio_path: a file that soundfile reads.
        text: words with single spaces, as a recogniser should write them; never empty.
        seconds: length where the corpus says it, else None.
        speaker: "" where the corpus does not say.
    """

    id: str
    audio_path: Path
    text: str
    seconds: float | None = None
    speaker: str = ""


def load_corpus(kind: str, folder: Path | str, split: str) -> list[Utterance]:
    """Utterances of one split of a corpus, in the corpus's order.

    Args:
        kind: "librispeech" (`<split>/<speaker>/<chapter>/*.trans.txt`), "an4" (the original's
            `etc/an4_<split>.fileids` and `.transcription` beside `wav/`), "ljspeech"
            (`metadata.csv` beside `wavs/`, split "all"), or "manifest" (`<split>.tsv`).
        folder: the corpus's own folder; for a manifest also the file itself.
        split: such as "train-clean-100", "train" or "all".

    Raises:
        FileNotFoundError: the folder, a list or a recording is missing; names the first.
        ValueError: an unknown kind, a list that cannot be read, or an empty transcript.
    """
    if kind not in _LOADERS:
        raise ValueError(f"kind: expected one of {', '.join(_LOADERS)}, got {kind!r}")
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{kind}: expected a folder, got {folder}, which does not exist")
    utterances = _LOADERS[kind](folder, split)
    source = f"{kind} {split} in {folder}"
    if not utterances:
        raise ValueError(f"{source}: expected at least one utterance, got none")
    empty = [each.id for each in utterances if not each.text]
    if empty:
        raise ValueError(
            f"{source}: expected a transcript for each of {len(utterances)} utterances, "
            f"got {len(empty)} empty, the first of {empty[0]}"
        )
    missing = [each for each in utterances if not each.audio_path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{source}: expected {len(utterances)} recordings, got {len(missing)} missing, "
            f"the first {missing[0].audio_path}"
        )
    return utterances


def read_manifest(path: Path | str) -> list[Utterance]:
    """Utterances of a TSV file with a header: id, path, text, and perhaps seconds and speaker.

    Paths are relative to the file's folder. Nothing is quoted.

    Raises:
        ValueError: a column is missing, an id comes twice, or seconds are no number.
    """
    path = Path(path)
    rows = list(csv.DictReader(read_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE))
    found = list(rows[0]) if rows else []
    lacking = [name for name in ("id", "path", "text") if name not in found]
    if lacking:
        raise ValueError(
            f"{path}: expected the columns id, path and text, got {', '.join(found) or 'no rows'}"
        )
    utterances = []
    seen = set()
    for number, row in enumerate(rows, 2):
        name, file, text = row["id"], row["path"], row["text"]
        if file is None or text is None:
            raise ValueError(f"{path}, line {number}: expected {len(found)} columns, got fewer")
        if name in seen:
            raise ValueError(f"{path}, line {number}: expected a new id, got {name} again")
        seen.add(name)
        try:
            seconds = float(row["seconds"]) if row.get("seconds") else None
        except ValueError:
            raise ValueError(
                f"{path}, line {number}: expected seconds as a number, got {row['seconds']!r}"
            ) from None
        audio, speaker = path.parent / file, row.get("speaker") or ""
        utterances.append(Utterance(name, audio, " ".join(text.split()), seconds, speaker))
    return utterances


def write_manifest(path: Path | str, utterances: Sequence[Utterance]) -> None:
    """Writes what `read_manifest` reads, with absolute paths."""
    from prunelm.data.files import replace_file

    lines = ["id\tpath\ttext\tseconds\tspeaker"]
    for each in utterances:
        seconds = "" if each.seconds is None else f"{each.seconds:.3f}"
        audio = each.audio_path.resolve()
        lines.append(f"{each.id}\t{audio}\t{each.text}\t{seconds}\t{each.speaker}")
    with replace_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def hold_out_speakers(
    utterances: Sequence[Utterance], count: int, seed: int = 0
) -> tuple[list[Utterance], list[Utterance]]:
    """(rest, held out): all utterances of `count` speakers, drawn by `seed`, go to the second."""
    speakers = sorted({each.speaker for each in utterances})
    if not 0 <= count < len(speakers):
        raise ValueError(f"count: expected 0 to {len(speakers) - 1} speakers, got {count}")
    order = torch.randperm(len(speakers), generator=torch.Generator().manual_seed(seed))
    held = {speakers[i] for i in order[:count].tolist()}
    rest = [each for each in utterances if each.speaker not in held]
    return rest, [each for each in utterances if each.speaker in held]


def split_long(a, r, s):
    n = int(r * s)
    return [(b, min(b + n, len(a))) for b in range(0, len(a), n)]


def read_audio(path: Path | str, rate: int = 16000, channel: int | None = None) -> Tensor:
    """[S] float32 samples in [-1, 1] at `rate`; a file at another rate is resampled.

    The first file of each other rate is reported in a log message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not audio, cut short, without samples, or not one channel.
    """
    import soundfile

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"audio: expected a file, got {path}")
    try:
        samples, found = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        reason = str(error).rpartition(": ")[2]
        raise ValueError(f"{path}: expected an audio file, got {reason}") from None
    if samples.shape[1] != 1:
        raise ValueError(f"{path}: expected one channel, got {samples.shape[1]}")
    if not len(samples):
        raise ValueError(f"{path}: expected samples, got none")
    if found != rate:
        _say_resampled(str(path.parent), found, rate)
    return resample(torch.from_numpy(samples[:, 0]), found, rate)


@lru_cache(maxsize=1)
def _said() -> set[tuple[int, int]]:
    return set()


def _say_resampled(folder: str, found: int, rate: int) -> None:
    if (found, rate) not in _said():
        _said().add((found, rate))
        logging.getLogger("prunelm").warning(
            "audio in %s: expected %d Hz, got %d Hz; resampling", folder, rate, found
        )


def _librispeech(folder: Path, split: str) -> list[Utterance]:
    root = folder / split
    lists = sorted(root.glob("*/*/*.trans.txt"))
    if not lists:
        raise FileNotFoundError(
            f"librispeech: expected {root}/<speaker>/<chapter>/*.trans.txt, got no such file"
        )
    utterances = []
    for path in lists:
        for line in read_lines(path):
            name, _, text = line.partition(" ")
            audio = path.parent / f"{name}.flac"
            utterances.append(Utterance(name, audio, normalise(text), None, path.parts[-3]))
    return utterances


def _an4(folder: Path, split: str) -> list[Utterance]:
    files = _required("an4", folder / "etc" / f"an4_{split}.fileids")
    transcripts = _required("an4", folder / "etc" / f"an4_{split}.transcription")
    names, lines = read_lines(files), read_lines(transcripts)
    if len(names) != len(lines):
        raise ValueError(
            f"{transcripts}: expected {len(names)} lines, as in {files.name}, got {len(lines)}"
        )
    utterances = []
    for number, (name, line) in enumerate(zip(names, lines, strict=True), 1):
        words, _, label = line.rstrip().rstrip(")").rpartition("(")
        identity = Path(name).name
        if label != identity:
            raise ValueError(f"{transcripts}, line {number}: expected ({identity}), got ({label})")
        stem = folder / "wav" / name
        kinds = (stem.with_name(f"{identity}.{suffix}") for suffix in ("wav", "sph", "flac"))
        audio = next((path for path in kinds if path.is_file()), stem.with_name(f"{identity}.wav"))
        text = " ".join(_MARKERS.sub(" ", words).lower().split())
        utterances.append(Utterance(identity, audio, text, None, Path(name).parent.name))
    return utterances


def _ljspeech(folder: Path, split: str) -> list[Utterance]:
    if split != "all":
        raise ValueError(f"split: expected all, since ljspeech has no others, got {split!r}")
    path = _required("ljspeech", folder / "metadata.csv")
    utterances = []
    for number, line in enumerate(read_lines(path), 1):
        fields = line.split("|")
        if len(fields) != 3:
            raise ValueError(f"{path}, line {number}: expected id|text|normalised text, got {line}")
        audio = folder / "wavs" / f"{fields[0]}.wav"
        utterances.append(Utterance(fields[0], audio, normalise(fields[2]), None, "ljspeech"))
    return utterances


def _manifest(folder: Path, split: str) -> list[Utterance]:
    return read_manifest(
        folder if folder.is_file() else _required("manifest", folder / f"{split}.tsv")
    )


def _required(kind: str, path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{kind}: expected {path}, got no such file")
    return path


_LOADERS: Mapping[str, Callable[[Path, str], list[Utterance]]] = {
    "librispeech": _librispeech,
    "an4": _an4,
    "ljspeech": _ljspeech,
    "manifest": _manifest,
}
