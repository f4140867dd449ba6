"""Real-time factor of the searches, with and without fusion, and of a search without K/V cache.

Models are random, sized as real ones and biased to emit about as often as speech does; the encoder
is left out. The baseline is icefall's modified beam search with a Transformer LM as published:
hypotheses in dictionaries, and for each non-blank candidate of a frame the language model over its
whole padded prefix, all candidates of the frame in one call.

python -m prunelm.benchmarks.bench_decoding [--save]
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunelm import accelerate
from prunelm.benchmarks.harness import commit, merge
from prunelm.decoding import Fusion, Hypothesis, greedy, mbs
from prunelm.metrics.speed import interleaved
from prunelm.models.lm import KVCache, LayerSizes, LMConfig, TransformerLM
from prunelm.models.transducer import Transducer, TransducerConfig
from prunelm.study.machine import describe, one_line

FRAME_SECONDS = 0.04  # after subsampling by 4
WEIGHT = 0.3


class TimedLM:
    """A language model that adds up the time of its steps."""

    def __init__(self, lm: TransformerLM) -> None:
        self.lm, self.seconds, self.rows = lm, 0.0, 0

    def new_cache(self, capacity: int) -> KVCache:
        return self.lm.new_cache(capacity)

    def step(self, tokens: Tensor, path: Tensor, length: Tensor, cache: KVCache) -> Tensor:
        begin = time.perf_counter()
        logits = self.lm.step(tokens, path, length, cache)
        self.seconds += time.perf_counter() - begin
        self.rows += len(tokens)
        return logits


def without_cache(
    model: Transducer, lm: TransformerLM | None, encoded: Tensor, lengths: Tensor, beam: int
) -> list[tuple[tuple[int, ...], float]]:
    """Best (tokens, score) of each utterance; every prefix is run again whenever it is extended."""
    size = model.context_size or 1
    hyps: list[dict[tuple[int, ...], float]] = [{(): 0.0} for _ in range(len(encoded))]
    for t in range(int(lengths.max())):
        at = [(b, key) for b in range(len(hyps)) if t < lengths[b] for key in hyps[b]]
        context = torch.tensor([([0] * size + list(key))[-size:] for _, key in at])
        frames = encoded[[b for b, _ in at], t]
        log_probs = model.join(frames, model.predict(context)).log_softmax(-1)
        chosen = []
        for b in sorted({b for b, _ in at}):
            rows = [i for i, (other, _) in enumerate(at) if other == b]
            old = torch.tensor([hyps[b][at[i][1]] for i in rows])[:, None]
            best, index = (old + log_probs[rows]).flatten().topk(beam)
            for score, i in zip(best.tolist(), index.tolist(), strict=True):
                row, token = divmod(i, log_probs.shape[1])
                chosen.append((b, at[rows[row]][1], token, score))
        extended = [key for _, key, token, _ in chosen if token]
        fused: Any = iter(())
        if lm is not None and extended:
            width = max(map(len, extended)) + 1
            padded = torch.tensor([[0, *key] + [0] * (width - len(key) - 1) for key in extended])
            last = torch.tensor([len(key) for key in extended])
            fused = iter(lm(padded)[torch.arange(len(extended)), last].log_softmax(-1))
        new: list[dict[tuple[int, ...], float]] = [{} for _ in hyps]
        for b, key, token, score in chosen:
            if token:
                score += WEIGHT * float(next(fused)[token]) if lm is not None else 0.0
                key = (*key, token)
            old_score = new[b].get(key)
            new[b][key] = score if old_score is None else _log_add(old_score, score)
        hyps = [after or before for before, after in zip(hyps, new, strict=True)]
    ranked = [max(h.items(), key=lambda item: item[1] / (len(item[0]) + size)) for h in hyps]
    return ranked


def _log_add(a: float, b: float) -> float:
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))


def models(vocabulary: int) -> tuple[Transducer, dict[str, TransformerLM]]:
    """A recogniser without encoder, and language models: dense, blocks and structure pruned."""
    torch.manual_seed(0)
    config = TransducerConfig(vocab_size=vocabulary, layers=(), ctc_weight=0.0)
    model = Transducer(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.25)
    preset = LMConfig.preset("small", vocabulary)
    dense = TransformerLM(preset).eval()
    quarter = TransformerLM(
        replace(preset, layers=tuple(LayerSizes(s.heads // 4, s.ff // 4) for s in preset.layers))
    ).eval()
    sparse = TransformerLM(preset).eval()
    for linear in sparse.modules():
        if isinstance(linear, nn.Linear):
            N, K = linear.weight.shape
            kept = torch.rand(-(-N // 16), -(-K // 16)) < 0.25
            mask = kept.repeat_interleave(16, 0).repeat_interleave(16, 1)[:N, :K]
            linear.weight.data.mul_(mask)
    return model, {"dense": dense, "16x16 blocks, 25 %": sparse, "heads and neurons, 25 %": quarter}


def tune(model: Transducer, encoded: Tensor, lengths: Tensor, tokens_per_frame: float) -> float:
    """Sets the blank's bias so that greedy search emits as often as asked."""
    low, high = 0.0, 30.0
    for _ in range(12):
        bias = (low + high) / 2
        model.join_out.bias.data[0] = bias  # type: ignore[union-attr, operator]
        found = greedy(model, encoded, lengths, max_symbols=1)
        rate = sum(len(one[0].tokens) for one in found) / int(lengths.sum())
        low, high = (bias, high) if rate > tokens_per_frame else (low, bias)
    return rate


def agree(found: list[list[Hypothesis]], slow: list[tuple[tuple[int, ...], float]]) -> float:
    """Share of utterances with the same best tokens; ties in float32 can part them."""
    same = [one[0].tokens == tokens for one, (tokens, _) in zip(found, slow, strict=True)]
    return sum(same) / len(same)


def main(words: Sequence[str] | None = None) -> None:
    """Prints a machine line, a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16, help="utterances")
    parser.add_argument("--frames", type=int, default=150, help="of the longest; 25 a second")
    parser.add_argument("--vocabulary", type=int, default=500)
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--tokens-per-frame", type=float, default=0.15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-baseline", action="store_true", help="leave the slow search out")
    parser.add_argument("--save", action="store_true", help="merge into benchmarks/results")
    o = parser.parse_args(words)
    for name in ("batch", "frames", "vocabulary", "beam", "threads", "runs"):
        if getattr(o, name) < 1:
            parser.error(f"{name}: expected at least 1, got {getattr(o, name)}")
    torch.set_num_threads(o.threads)
    model, lms = models(o.vocabulary)
    lengths = torch.linspace(o.frames * 0.6, o.frames, o.batch).long()
    encoded = torch.randn(o.batch, o.frames, model.config.dim)
    rate = tune(model, encoded, lengths, o.tokens_per_frame)
    audio_seconds = float(lengths.sum()) * FRAME_SECONDS

    timed = {name: TimedLM(accelerate(lm, dense=True)) for name, lm in lms.items()}  # type: ignore[arg-type]
    calls: dict[str, Callable[[], Any]] = {
        "greedy": lambda: greedy(model, encoded, lengths),
        "mbs, no LM": lambda: mbs(model, encoded, lengths, o.beam),
    }
    for name, lm in timed.items():
        calls[f"mbs, {name}"] = lambda lm=lm: mbs(
            model, encoded, lengths, o.beam, [Fusion(lm, WEIGHT)]
        )
    slow: dict[str, Callable[[], Any]] = {}
    if not o.no_baseline:
        search = torch.inference_mode()(without_cache)
        for name, given in (("no LM", None), ("dense", lms["dense"])):
            slow[f"no cache, {name}"] = lambda given=given: search(
                model, given, encoded, lengths, o.beam
            )
            same = agree(calls[f"mbs, {name}"](), slow[f"no cache, {name}"]())
            print(f"same best hypothesis as without cache, {name}: {same:.3f} of utterances")
    print(one_line(describe()))
    print(
        f"B={o.batch} W={o.beam} V={o.vocabulary}, {audio_seconds:.0f} s of speech, {rate:.2f} "
        f"tokens a frame, {o.threads} threads, median of {o.runs} (no cache: 1); no encoder"
    )
    for lm in timed.values():
        lm.seconds, lm.rows = 0.0, 0
    times = interleaved(calls, threads=o.threads, runs=o.runs, warmup=1)
    times |= interleaved(slow, threads=o.threads, runs=1, warmup=0)
    print(f"{'search':28} {'ms':>9} {'RTF':>9} {'x real time':>12} {'LM share':>9} {'LM rows':>8}")
    rows = []
    for name, found in times.items():
        row = {"search": name, "ms": found.median_ms, "rtf": found.median_ms / 1e3 / audio_seconds}
        lm = timed.get(name.removeprefix("mbs, "))
        if lm and name.startswith("mbs"):
            each = o.runs + 1  # the warm-up is in it
            row |= {
                "lm_share": lm.seconds / each * 1e3 / found.median_ms,
                "lm_rows": lm.rows / each,
            }
        share = f"{row['lm_share']:9.0%} {row['lm_rows']:8.0f}" if "lm_share" in row else ""
        speed = 1 / row["rtf"]
        print(f"{name:28} {row['ms']:9.1f} {row['rtf']:9.5f} {speed:12.0f} {share}", flush=True)
        rows.append(row)
    found = {
        "bench": "decoding",
        "machine": one_line(describe()),
        "commit": commit(),
        **{name: value for name, value in vars(o).items() if name != "save"},
        "audio_seconds": audio_seconds,
        "rows": rows,
    }
    if o.save:
        merge(f"decoding, {o.threads} threads", found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
