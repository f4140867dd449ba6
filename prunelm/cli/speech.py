"""`prunelm evaluate` and `prunelm decode`."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from prunelm.cli.pruning import set_threads
from prunelm.data.files import replace_file
from prunelm.data.speech import Utterance, load_corpus
from prunelm.data.text import read_lines
from prunelm.data.tokenizer import Tokenizer
from prunelm.decoding import Hypothesis
from prunelm.metrics.flops import flops_per_token
from prunelm.metrics.perplexity import perplexity
from prunelm.metrics.wer import word_error_rate
from prunelm.models.lm import TransformerLM
from prunelm.models.transducer import Transducer
from prunelm.nn import accelerate
from prunelm.pruning import count_parameters
from prunelm.pruning.result import read_masks
from prunelm.study.recognition import Searching, encode, search
from prunelm.study.results import write_json
from prunelm.study.testbed import load_lm
from prunelm.training.checkpoint import load_model

Kind = Literal["manifest", "librispeech", "an4", "ljspeech"]


def evaluate(
    lm: Path | None = None,
    text: Path | None = None,
    recogniser: Path | None = None,
    corpus: Path | None = None,
    kind: Kind = "manifest",
    split: str = "test",
    lm_weight: float = 0.3,
    token_reward: float = 0.0,
    beam: int = 4,
    out: Path | None = None,
    threads: int | None = None,
) -> None:
    """Measures an LM's perplexity on a text, a recogniser's WER on a corpus, or both.

    Args:
        lm: folder of a language model; with a corpus, it is fused.
        text: lines to predict, one sentence each, plain or .gz.
        recogniser: folder of a recogniser.
        corpus: folder of a corpus, or a manifest.
        kind: the corpus's layout.
        split: of the corpus.
        lm_weight: of the LM in fusion; choose it on another split than the one you report.
        token_reward: added to the score for each token.
        beam: hypotheses kept by the search; 0 is greedy search.
        out: a JSON file for the numbers.
        threads: of torch; by default its own choice.
    """
    set_threads(threads)
    if text is None and corpus is None:
        raise ValueError("evaluate: expected --lm with --text, --recogniser with --corpus, or both")
    found: dict[str, Any] = {"format": 1}
    model, tokenizer = _lm(lm)
    if text is not None:
        if model is None or tokenizer is None or lm is None:
            raise ValueError("lm: expected a folder to go with the text, got none")
        found["lm"] = _predict(lm, model, tokenizer, text)
    if corpus is not None:
        how = Searching(beam, lm_weight, token_reward)
        found["speech"] = _hear(_recogniser(recogniser, tokenizer), model, corpus, kind, split, how)
    if out is not None:
        write_json(out, found)


def decode(
    recogniser: Path,
    audio: list[Path] | None = None,
    corpus: Path | None = None,
    kind: Kind = "manifest",
    split: str = "test",
    lm: Path | None = None,
    lm_weight: float = 0.3,
    token_reward: float = 0.0,
    beam: int = 4,
    nbest: int = 1,
    out: Path | None = None,
    threads: int | None = None,
) -> None:
    """Turns recordings into n-best lists with their parts, as TSV or JSON.

    Args:
        recogniser: folder of a recogniser.
        audio: recordings.
        corpus: folder of a corpus, or a manifest.
        kind: the corpus's layout.
        split: of the corpus.
        lm: folder of a language model to fuse.
        lm_weight: of the LM in fusion.
        token_reward: added to the score for each token.
        beam: hypotheses kept by the search; 0 is greedy search.
        nbest: hypotheses for each recording, at most.
        out: a .tsv or .json file; by default TSV on the screen.
        threads: of torch; by default its own choice.
    """
    set_threads(threads)
    if (corpus is None) == (not audio):
        raise ValueError("decode: expected either --audio or --corpus")
    if out is not None and out.suffix not in (".tsv", ".json"):
        raise ValueError(f"out: expected a name ending in .tsv or .json, got {out}")
    fused, tokenizer = _lm(lm)
    listener, tokens = _recogniser(recogniser, tokenizer)
    if corpus is not None:
        utterances = load_corpus(kind, corpus, split)
    else:
        utterances = [Utterance(str(path), path, "") for path in audio or []]
    how = Searching(beam, lm_weight, token_reward, nbest)
    found = search(listener, encode(listener, utterances), fused, how)
    ordered = {utterance.id: found[utterance.id] for utterance in utterances}
    if out is not None and out.suffix == ".json":
        write_json(out, {"format": 1, "utterances": _as_json(ordered, tokens)})
        return
    lines = _as_tsv(ordered, tokens)
    if out is None:
        sys.stdout.write(lines)
        return
    with replace_file(out) as temporary:
        temporary.write_text(lines, encoding="utf-8")


def _lm(folder: Path | None) -> tuple[TransformerLM | None, Tokenizer | None]:
    if folder is None:
        return None, None
    model, tokenizer, _ = load_lm(folder)
    return model, tokenizer


def _recogniser(folder: Path | None, tokenizer: Tokenizer | None) -> tuple[Transducer, Tokenizer]:
    if folder is None:
        raise ValueError("recogniser: expected a folder, got none")
    model, tokens, _ = load_model(folder, kind="transducer", tokenizer=tokenizer)
    if not isinstance(model, Transducer):
        raise ValueError(f"{folder}: expected a recogniser, got {type(model).__name__}")
    return model, tokens


def _predict(
    folder: Path, model: TransformerLM, tokenizer: Tokenizer, text: Path
) -> dict[str, Any]:
    found = perplexity(model, read_lines(text), tokenizer)
    size = count_parameters(model, read_masks(folder / "masks.safetensors", model))
    flops = flops_per_token(model, 32, zeros=False)
    print(f"parameters           {size:,}")
    print(f"perplexity per word  {found.per_word:.2f}  ({found.words:,} words)")
    print(f"perplexity per token {found.per_token:.2f}  ({found.tokens:,} tokens)")
    print(f"FLOPs per token      {flops:,}  (after 32 tokens)")
    return {
        "parameters": size, "perplexity_per_word": found.per_word,
        "perplexity_per_token": found.per_token, "words": found.words, "tokens": found.tokens,
        "flops_per_token": flops,
    }  # fmt: skip


def _hear(
    recogniser: tuple[Transducer, Tokenizer],
    lm: TransformerLM | None,
    corpus: Path,
    kind: Kind,
    split: str,
    how: Searching,
) -> dict[str, Any]:
    listener, tokenizer = recogniser
    utterances = load_corpus(kind, corpus, split)
    fused = None if lm is None or how.beam == 0 else cast(TransformerLM, accelerate(lm))
    found = search(listener, encode(listener, utterances), fused, how)
    heard = [tokenizer.decode(list(found[each.id][0].tokens)) for each in utterances]
    wer = word_error_rate([each.text for each in utterances], heard)
    name = "greedy" if how.beam == 0 else f"beam {how.beam}"
    with_lm = "no LM" if fused is None else f"LM weight {how.weight:g}"
    print(
        f"word error rate      {100 * wer.rate:.2f} %  [{100 * wer.low:.2f}, "
        f"{100 * wer.high:.2f}]  ({wer.errors:,} errors, {wer.words:,} words; {name}, {with_lm})"
    )
    return {
        "wer": wer.rate, "wer_low": wer.low, "wer_high": wer.high, "errors": wer.errors,
        "words": wer.words, "utterances": len(utterances), "beam": how.beam,
        "lm_weight": None if fused is None else how.weight, "token_reward": how.reward,
    }  # fmt: skip


def _as_json(found: dict[str, list[Hypothesis]], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    return [
        {
            "id": name,
            "nbest": [
                {
                    "text": tokenizer.decode(list(each.tokens)),
                    "score": each.score if math.isfinite(each.score) else None,
                    "parts": dict(each.parts),
                    "tokens": list(each.tokens),
                    "times": list(each.times),
                    "confidence": list(each.confidence),
                }
                for each in nbest
            ],
        }
        for name, nbest in found.items()
    ]


def _as_tsv(found: dict[str, list[Hypothesis]], tokenizer: Tokenizer) -> str:
    names = _part_names(found.values())
    lines = ["\t".join(["id", "rank", "score", *names, "text"])]
    for name, nbest in found.items():
        for rank, each in enumerate(nbest, 1):
            parts = [f"{each.parts.get(part, math.nan):.4f}" for part in names]
            text = tokenizer.decode(list(each.tokens))
            lines.append("\t".join([name, str(rank), f"{each.score:.4f}", *parts, text]))
    return "\n".join(lines) + "\n"


def _part_names(lists: Any) -> Sequence[str]:
    return [*dict.fromkeys(part for nbest in lists for each in nbest for part in each.parts)]
