"""Turns paragraphs of novels into the sentences that a recogniser would write.

    python recipes/novels/prepare.py --novels novels --out runs/novels

`novels` holds train, valid and test.txt.gz, one paragraph a line. What lands in --out is laid out
as `prunelm study --data` wants it, but for the language model: see README.md beside this file.
"""

import argparse
import gzip
from pathlib import Path

from prunelm.data.text import read_lines, sentences


def write(lines: list[str], path: Path) -> None:
    """Writes lines as a .gz whose bytes depend on them alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), 6, mtime=0))
    print(f"{path}: {len(lines):,} sentences, {sum(len(x.split()) for x in lines):,} words")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--novels", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--valid-every", type=int, default=20, help="keep one sentence in so many")
    options = parser.parse_args()
    for split, name in (("train", "recovery"), ("valid", "valid"), ("test", "test")):
        paragraphs = read_lines(options.novels / f"{split}.txt.gz")
        lines = [line for paragraph in paragraphs for line in sentences(paragraph)]
        # Choices are made often, and on enough words as it is.
        step = options.valid_every if split == "valid" else 1
        write(lines[::step], options.out / f"{name}.txt.gz")


if __name__ == "__main__":
    main()
