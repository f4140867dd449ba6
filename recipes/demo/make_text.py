"""Text for the demo: normalised lines, and sentences sampled from a language model.

python recipes/demo/make_text.py --lm prunelm/demo/lm --out prunelm/demo/recovery.txt.gz
"""

import argparse
import gzip
import re
from collections.abc import Iterable
from pathlib import Path


def normalised(lines: Iterable[str]) -> list[str]:
    """Lines of lower-case letters and apostrophes; those with anything else are dropped."""
    stripped = (" ".join(line.lower().split()) for line in lines)
    return [line for line in stripped if re.fullmatch(r"[a-z']+( [a-z']+)*", line)]


def sample(folder: Path, count: int, seed: int, temperature: float = 1.0) -> list[str]:
    """Draws `count` distinct sentences of at most 48 tokens from the language model in `folder`."""
    import torch

    from prunelm.models.lm import TransformerLM
    from prunelm.training.checkpoint import load_model

    model, tokenizer, _ = load_model(folder, kind="lm")
    assert isinstance(model, TransformerLM)
    generator = torch.Generator().manual_seed(seed)
    rows, longest = 400, 49
    lines: dict[str, None] = {}
    path = torch.arange(longest)[None] * rows + torch.arange(rows)[:, None]
    with torch.inference_mode():
        while len(lines) < count:
            cache = model.new_cache(rows * longest)
            tokens = torch.zeros(rows, longest + 1, dtype=torch.int64)
            for i in range(longest):
                length = torch.full((rows,), i + 1)
                logits = model.step(tokens[:, i], path[:, : i + 1].contiguous(), length, cache)
                weights = (logits / temperature).softmax(-1)
                tokens[:, i + 1] = torch.multinomial(weights, 1, generator=generator)[:, 0]
                if (tokens[:, 1 : i + 2] == 0).any(1).all():
                    break
            for row in tokens[:, 1:].tolist():
                if 0 in row:  # the sentence ended
                    lines.update(dict.fromkeys(normalised([tokenizer.decode(row[: row.index(0)])])))
    return list(lines)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lm", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    lines = sample(options.lm, options.count, options.seed)
    text = "".join(line + "\n" for line in lines)
    options.out.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{len(lines)} lines, {len(text.split())} words, {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
