"""Makes the demo's speech: a training, a validation and a test set, each with a manifest.

Beside train.tsv, all.tsv lists its utterances and those of recorded speech, if any.

    python recipes/demo/make_speech.py --text commands/train.txt --out demo_speech

Voices and sentences of the three sets are disjoint. See README.md beside this file.
"""

import argparse
import csv
import gzip
import os
import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from make_text import normalised
from voices import RATE, Audio, Line, Voice, resample, speak

TEXT = Path(__file__).parents[2] / "prunelm" / "demo"

# "en" is Great Britain's: of "en-gb" eSpeak NG takes no variant.
ESPEAK_TRAIN = [
    f"{accent}+{variant}"
    for accent, variants in {
        "en-us": "m1 m3 m7 f1 f4 max steph michael adam anika david linda quincy rob zac Andy Mike",
        "en": "m2 m4 f3 belinda alex rob aunty boris grandma john pablo Lee Alicia",
        "en-gb-scotland": "m5 m8 f4 linda iven3 shelby travis",
        "en-gb-x-rp": "m6 f1 john antonio caleb f3 steph2",
        "en-us-nyc": "m3 f3 edward ed marcelo Annie",
        "en-gb-x-gbcwmd": "m1 f2 klatt3 norbert victor",
    }.items()
    for variant in variants.split()
]

TRAIN: tuple[tuple[Voice, float], ...] = (  # voice, share of the sentences
    (Voice("flite", "kal16"), 0.07),
    (Voice("flite", "rms"), 0.10),
    (Voice("flite", "slt"), 0.13),
    (Voice("festival", "kal_diphone"), 0.03),
    (Voice("festival", "cmu_us_slt_arctic_hts"), 0.05),
    (Voice("pico", "en-US"), 0.16),
    (Voice("rhvoice", "bdl"), 0.12),
    (Voice("rhvoice", "clb"), 0.12),
    (Voice("rhvoice", "slt"), 0.04),
    *((Voice("espeak", name), 0.18 / len(ESPEAK_TRAIN)) for name in ESPEAK_TRAIN),
)
VALID = (Voice("festival", "ked_diphone"), Voice("espeak", "en-gb-x-gbclan+f5"))
TEST = (
    Voice("flite", "awb"),
    Voice("espeak", "en-us+f5"),
    Voice("piper", "en_US-joe-medium"),
    Voice("espeak", "en+f2"),
)


@dataclass(frozen=True)
class Job:
    """One utterance to be: `warp` scales the voice tract and the tempo alike."""

    id: str
    voice: Voice
    line: Line
    warp: float = 1.0
    snr_db: float | None = None
    tilt_db: float = 0.0
    peak: float = 0.5


def training_lines(
    texts: Sequence[Sequence[str]], count: int, random_words: float, seed: int
) -> list[str]:
    """Draws `count` training sentences of 3 to 10 words, equally many from each of the texts.

    Words are such as a text has more than once in 30,000, and at least five times. A share
    `random_words` is 4 to 8 words of the first text drawn at random instead, frequent ones somewhat
    more often, so that the recogniser learns sounds and not sentences; these come last.
    """
    rng = random.Random(seed)
    loose = round(count * random_words)
    sentences: list[str] = []
    frequent: list[dict[str, int]] = []
    for i, lines in enumerate(texts):
        words = Counter(word for line in lines for word in line.split())
        least = max(5, words.total() // 30_000)
        frequent.append({word: n for word, n in words.items() if n >= least})
        usable = [
            line
            for line in dict.fromkeys(lines)
            if 3 <= len(line.split()) <= 10 and frequent[i].keys() >= set(line.split())
        ]
        wanted = (count - loose) * (i + 1) // len(texts) - (count - loose) * i // len(texts)
        if len(usable) < wanted:
            raise ValueError(f"text {i + 1}: expected {wanted} usable lines, got {len(usable)}")
        sentences += rng.sample(usable, wanted)
    rng.shuffle(sentences)
    words, weights = list(frequent[0]), [n**0.4 for n in frequent[0].values()]
    rows = (rng.choices(words, weights, k=rng.randint(4, 8)) for _ in range(loose))
    return sentences + [" ".join(row) for row in rows]


def training_jobs(texts: Sequence[str], split: str, seed: int) -> list[Job]:
    """Gives each sentence a voice, by the shares in TRAIN, and a way of speaking."""
    rng = random.Random(f"{seed} voices")
    voices = [voice for voice, _ in TRAIN]
    chosen = rng.choices(voices, [share for _, share in TRAIN], k=len(texts))
    return [
        Job(
            id=f"{split}-{i:05d}",
            voice=voice,
            line=Line(text, tempo=rng.uniform(0.9, 1.25), pitch=rng.uniform(0.15, 0.85)),
            warp=rng.uniform(0.88, 1.14),
            snr_db=rng.uniform(12, 40),
            tilt_db=rng.uniform(-6, 6),
            peak=10 ** rng.uniform(-1.3, -0.1),
        )
        for i, (text, voice) in enumerate(zip(texts, chosen, strict=True))
    ]


def held_out_jobs(split: str, lines: Sequence[str], voices: Sequence[Voice]) -> list[Job]:
    """Clean speech, the voices taking turns."""
    return [
        Job(id=f"{split}-{i:04d}", voice=voices[i % len(voices)], line=Line(text, tempo=1.05))
        for i, text in enumerate(lines)
    ]


def finish(job: Job, audio: Audio) -> Audio:
    """Applies the job's warp, tilt, noise and level; cuts long silence at both ends.

    Args:
        audio: [S] float32 at 16 kHz.

    Returns:
        [S'] float32 within [-1, 1].
    """
    rng = np.random.default_rng(hash_text(job.id))
    loud = np.flatnonzero(np.abs(audio) > 0.01 * np.abs(audio).max())
    margin = RATE // 8
    audio = audio[max(0, loud[0] - margin) : loud[-1] + margin] if len(loud) else audio
    if job.warp != 1:
        audio = resample(audio, 1 / job.warp)
    size = len(audio)
    padded = size + -size % 512  # a length of small prime factors: its transform is far faster
    share = np.arange(padded // 2 + 1) / (padded // 2 + 1)  # of half the sampling rate
    if job.tilt_db:
        octaves = np.log2(np.maximum(share, 1e-3)) / 5
        gain = 10 ** (job.tilt_db * octaves / 20)
        audio = np.fft.irfft(np.fft.rfft(audio, padded) * gain, padded)[:size]
    if job.snr_db is not None:
        colour = np.maximum(share, 1e-2) ** -rng.uniform(0, 0.8)
        noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(padded)) * colour, padded)[:size]
        level = np.sqrt(np.mean(audio**2) / np.mean(noise**2)) * 10 ** (-job.snr_db / 20)
        audio = audio + level * noise
    levelled: Audio = audio * (job.peak / max(float(np.abs(audio).max()), 1e-9))
    return levelled.astype(np.float32)


def hash_text(text: str) -> int:
    """A number for a name, the same in every process."""
    return int.from_bytes(text.encode(), "big") % (2**63)


def make(jobs: Sequence[Job], folder: Path) -> list[dict[str, str]]:
    """Synthesises jobs of one voice into `folder`; returns their manifest rows."""
    rows = []
    for job, audio in zip(jobs, speak(jobs[0].voice, [job.line for job in jobs]), strict=True):
        audio = finish(job, audio)
        path = folder / f"{job.id}.flac"
        soundfile.write(path, audio, RATE, subtype="PCM_16")
        rows.append(
            {
                "id": job.id,
                "path": f"{folder.name}/{path.name}",
                "text": job.line.text,
                "seconds": f"{len(audio) / RATE:.3f}",
                "speaker": job.voice.speaker,
            }
        )
    return rows


def write_manifest(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Writes rows as a manifest TSV, sorted by id."""
    temporary = path.with_suffix(".part")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        columns = ["id", "path", "text", "seconds", "speaker"]
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["id"]))
    os.replace(temporary, path)


def make_split(jobs: Sequence[Job], out: Path, split: str, workers: int) -> list[dict[str, str]]:
    """Makes all jobs in `workers` processes, one voice per piece of work; returns the rows."""
    folder = out / split
    folder.mkdir(parents=True, exist_ok=True)
    by_voice: dict[Voice, list[Job]] = {}
    for job in jobs:
        by_voice.setdefault(job.voice, []).append(job)
    pieces = [same[i : i + 50] for same in by_voice.values() for i in range(0, len(same), 50)]
    with ProcessPoolExecutor(workers) as pool:
        done = list(pool.map(make, pieces, [folder] * len(pieces)))
    rows = [row for piece in done for row in piece]
    write_manifest(out / f"{split}.tsv", rows)
    seconds = sum(float(row["seconds"]) for row in rows)
    print(f"{split}: {len(rows)} utterances, {seconds / 3600:.2f} h, {len(by_voice)} voices")
    return sorted(rows, key=lambda row: row["id"])


def read_text(path: Path) -> list[str]:
    """The usable lines of a text, plain or .gz."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return normalised(file)


def read_recordings(path: Path, times: int) -> list[dict[str, str]]:
    """Rows of a manifest of recorded speech, `times` over, under ids of their own."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [
        {
            "id": f"{path.parent.name}-{time}-{row['id']}",
            "path": str((path.parent / row["path"]).resolve()),
            "text": row["text"],
            "seconds": row["seconds"],
            "speaker": row.get("speaker") or path.parent.name,
        }
        for time in range(times)
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help=".gz or plain")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--splits", nargs="+", default=["train", "valid", "test"])
    parser.add_argument("--count", type=int, default=5000, help="training utterances")
    parser.add_argument("--random-words", type=float, default=0.0, help="share of such sentences")
    parser.add_argument("--recordings", type=Path, nargs="*", default=[], help="manifests, for all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    for split in options.splits:
        if split == "train":
            texts = [read_text(path) for path in options.text]
            lines = training_lines(texts, options.count, options.random_words, options.seed)
            jobs = training_jobs(lines, split, options.seed)
        else:
            lines = normalised((TEXT / f"{split}.txt").read_text().splitlines())
            jobs = held_out_jobs(split, lines, VALID if split == "valid" else TEST)
        rows = make_split(jobs, options.out, split, options.workers)
        if split == "train":
            for path in options.recordings:
                rows += read_recordings(path, 3)
            write_manifest(options.out / "all.tsv", rows)


if __name__ == "__main__":
    main()
