"""Trains the demo's recogniser on what make_speech.py made, for a given time.

    python recipes/demo/train_recogniser.py --speech demo_speech --minutes 60 \
        --tokenizer runs/demo_lm/tokenizer.model --out runs/demo_recogniser

The learning rate follows the clock, so that the run ends well on a busy machine too; the result is
the running mean of the weights. Stopped and started again with --minutes less, it goes on.
"""

import argparse
import copy
import csv
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from torch import Tensor, nn

from prunelm.data.tokenizer import Tokenizer
from prunelm.models.features import LogMel, spec_augment
from prunelm.models.lm import LayerSizes
from prunelm.models.transducer import Transducer, TransducerConfig
from prunelm.training.checkpoint import load_state, save_model, save_state


@dataclass(frozen=True)
class Example:
    features: Tensor  # [T, 80] float16
    text: str
    speaker: str


def read_examples(manifest: Path, cache: Path) -> list[Example]:
    """Features of a manifest's audio, computed once and kept in `cache`."""
    with manifest.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if cache.is_file():
        features = load_state(cache)
    else:
        log_mel = LogMel()
        features = {}
        for row in rows:
            audio, _ = soundfile.read(manifest.parent / row["path"], dtype="float32")
            features[row["id"]] = log_mel(audio).half()
        save_state(cache, features)
    return [Example(features[row["id"]], row["text"], row["speaker"]) for row in rows]


def collate(examples: Sequence[Example], tokenizer: Tokenizer) -> tuple[Tensor, ...]:
    """features [B, T, 80], frames [B], targets [B, U], target lengths [B]."""
    ids = [torch.tensor(tokenizer.encode(example.text)) for example in examples]
    pad = nn.utils.rnn.pad_sequence
    return (
        pad([example.features.float() for example in examples], batch_first=True),
        torch.tensor([len(example.features) for example in examples]),
        pad(ids, batch_first=True),
        torch.tensor([len(one) for one in ids]),
    )


def epochs(examples: Sequence[Example], frames: int, rng: random.Random) -> Iterator[list[Example]]:
    """Batches of about equal length and at most `frames` frames, padding included, for ever."""
    while True:
        batches: list[list[Example]] = [[]]
        for example in sorted(examples, key=lambda x: len(x.features) + rng.uniform(0, 30)):
            if (len(batches[-1]) + 1) * (len(example.features) + 15) > frames:
                batches.append([])
            batches[-1].append(example)
        rng.shuffle(batches)
        yield from (batch for batch in batches if batch)


@torch.inference_mode()
def greedy(model: Transducer, features: Tensor, lengths: Tensor, most: int = 3) -> list[list[int]]:
    """The best token per frame, at most `most` of them in each, as token ids per utterance."""
    encoded, lengths = model.encode(features, lengths)
    rows = len(encoded)
    context = torch.zeros(rows, model.config.context, dtype=torch.int64)
    out: list[list[int]] = [[] for _ in range(rows)]
    predicted = model.predict(context)
    for t in range(encoded.shape[1]):
        going = t < lengths
        for _ in range(most):
            token = model.join(encoded[:, t], predicted).argmax(-1)
            going = going & (token != 0)
            if not going.any():
                break
            for row in going.nonzero()[:, 0].tolist():
                out[row].append(int(token[row]))
            longer = torch.cat((context[:, 1:], token[:, None]), 1)
            context = torch.where(going[:, None], longer, context)
            predicted = model.predict(context)
    return out


def word_errors(
    model: Transducer, examples: Sequence[Example], tokenizer: Tokenizer
) -> dict[str, float]:
    """Greedy word error rate of each speaker, and of all under "all"."""
    import kaldialign

    errors: dict[str, int] = {}
    words: dict[str, int] = {}
    model.eval()
    for begin in range(0, len(examples), 50):
        some = examples[begin : begin + 50]
        features, lengths, _, _ = collate(some, tokenizer)
        for example, ids in zip(some, greedy(model, features, lengths), strict=True):
            reference = example.text.split()
            distance = kaldialign.edit_distance(reference, tokenizer.decode(ids).split())["total"]
            for key in (example.speaker, "all"):
                errors[key] = errors.get(key, 0) + distance
                words[key] = words.get(key, 0) + len(reference)
    return {key: errors[key] / words[key] for key in sorted(errors)}


def train(
    examples: Sequence[Example],
    valid: Sequence[Example],
    tokenizer: Tokenizer,
    options: argparse.Namespace,
) -> Transducer:
    """Returns the mean model; goes on from options.out/training.pt where there is one."""
    config = TransducerConfig(
        vocab_size=tokenizer.vocab_size,
        layers=(LayerSizes(3, 512),) * 5,
        dim=144,
        head_dim=48,
        joiner_dim=128,
        ctc_weight=0.4,
        dropout=options.dropout,
    )
    model = Transducer(config)
    mean = copy.deepcopy(model)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count} parameters, {len(examples)} utterances", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), options.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    step, path = 0, options.out / "training.pt"
    if path.is_file():
        state = load_state(path)
        model.load_state_dict(state["model"])
        mean.load_state_dict(state["mean"])
        optimizer.load_state_dict(state["optimizer"])
        step = int(state["step"])
    rng = random.Random(step)
    generator = torch.Generator().manual_seed(step)
    begin, total = time.monotonic(), 0.0
    for batch in epochs(examples, options.frames, rng):
        done = (time.monotonic() - begin) / (60 * options.minutes)
        if done >= 1:
            break
        features, frames, targets, lengths = collate(batch, tokenizer)
        if not options.plain:
            features = spec_augment(features, frames, generator)
        fraction = options.start + (1 - options.start) * done
        rate = (
            options.lr * min(1.0, (step + 1) / 250) * (0.51 + 0.49 * math.cos(math.pi * fraction))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            loss = model.loss(features, frames, targets, lengths)
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        if not math.isfinite(float(norm)):
            raise ValueError(f"gradient norm: expected a finite number at step {step}, got {norm}")
        optimizer.step()
        step += 1
        total += float(loss.detach())
        decay = min(0.995, (step + 1) / (step + 10))
        with torch.no_grad():
            for kept, new in zip(mean.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        if step % 50 == 0:
            print(f"{step} {done:.3f} loss {total / 50:.3f} lr {rate:.1e}", flush=True)
            total = 0.0
        if step % 300 == 0:
            state = {"model": model.state_dict(), "mean": mean.state_dict(), "step": step}
            save_state(path, {**state, "optimizer": optimizer.state_dict()})
            if step > 900:
                print(step, word_errors(mean, valid, tokenizer), flush=True)
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--splits", nargs="+", default=["train"], help="parts to train on")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--start", type=float, default=0.0, help="place in the schedule, 0 to 1")
    parser.add_argument("--frames", type=int, default=4800, help="per batch")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--plain", action="store_true", help="no SpecAugment")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.load(options.tokenizer)
    valid, *parts = (
        read_examples(options.speech / f"{split}.tsv", options.speech / f"{split}.features.pt")
        for split in ("valid", *options.splits)
    )
    examples = [example for part in parts for example in part]
    model = train(examples, valid, tokenizer, options)
    errors = word_errors(model, valid, tokenizer)
    print(f"valid word error rate {errors}")
    save_model(options.out, model, tokenizer, {"valid word error rate": errors})


if __name__ == "__main__":
    main()
