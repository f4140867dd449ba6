"""Puts the demo's speech and models into prunelm/demo: Ogg Vorbis audio, float16 weights.

    python recipes/demo/package.py --speech demo_speech --lm runs/demo_lm \
        --recogniser runs/demo_recogniser

Parts that are not named stay as they are.
"""

import argparse
import csv
import shutil
from pathlib import Path
from typing import Any

import soundfile
import torch

PACKAGE = Path(__file__).parents[2] / "prunelm" / "demo"


def pack_speech(speech: Path, split: str, compression: float) -> None:
    """Encodes a split's audio into the package and writes its manifest there."""
    with (speech / f"{split}.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    folder = PACKAGE / split
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for row in rows:
        audio, rate = soundfile.read(speech / row["path"], dtype="float32")
        row["path"] = f"{split}/{row['id']}.ogg"
        soundfile.write(
            PACKAGE / row["path"],
            audio,
            rate,
            format="OGG",
            subtype="VORBIS",
            compression_level=compression,
        )
    with (PACKAGE / f"{split}.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{split}: {len(rows)} utterances, {size} bytes")


def pack_model(source: Path, name: str) -> None:
    """Stores a model in float16, with what a user may want to know of its training."""
    from prunelm.training.checkpoint import load_model, save_model

    model, tokenizer, info = load_model(source)
    extra: dict[str, Any] = {"recipe": "recipes/demo"}
    for key in ("describe", "options"):
        extra[key] = info["extra"][key]
    best = "valid perplexity" if name == "lm" else "valid word error rate"
    extra[best] = info["extra"]["history"]["best"]
    save_model(PACKAGE / name, model, tokenizer, extra, dtype=torch.float16)
    print(f"{name}: {(PACKAGE / name / 'model.safetensors').stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speech", type=Path)
    parser.add_argument("--lm", type=Path)
    parser.add_argument("--recogniser", type=Path)
    parser.add_argument("--compression", type=float, default=0.5, help="0 best sound, 1 smallest")
    options = parser.parse_args()
    if options.speech:
        for split in ("valid", "test"):
            pack_speech(options.speech, split, options.compression)
    for name in ("lm", "recogniser"):
        if getattr(options, name):
            pack_model(getattr(options, name), name)


if __name__ == "__main__":
    main()
