"""`prunelm evaluate`, `prunelm decode` and `prunelm tune`."""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

from prunelm.cli.pruning import set_threads
from prunelm.cli.texts import known_lines
from prunelm.data.files import replace_file, require_place
from prunelm.data.speech import Utterance, load_corpus
from prunelm.data.tokenizer import Tokenizer
from prunelm.decoding.transcribe import (
    SearchOptions,
    Transcript,
    suitable_options,
    transcribe_each,
)
from prunelm.decoding.tuning import choose_search
from prunelm.metrics.flops import flops_per_token
from prunelm.metrics.perplexity import perplexity
from prunelm.metrics.wer import word_error_rate
from prunelm.pruning import count_parameters
from prunelm.pruning.result import read_masks
from prunelm.study.results import write_json
from prunelm.training.pretrained import (
    LoadedLM,
    LoadedRecogniser,
    add_chosen,
    load_lm,
    load_recogniser,
)
from prunelm.training.progress import stages

Kind = Literal["manifest", "librispeech", "an4", "ljspeech"]
Auto = float | Literal["auto"]
Item = TypeVar("Item")


def evaluate(
    lm: Path | None = None,
    text: Path | None = None,
    recogniser: Path | None = None,
    corpus: Path | None = None,
    kind: Kind = "manifest",
    split: str = "test",
    lm_weight: Auto = "auto",
    token_reward: Auto = "auto",
    beam: int = 4,
    channel: int | None = None,
    normalise: bool = False,
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
        lm_weight: of the LM in fusion; auto takes what `prunelm tune` chose for the two models,
            or 0.3.
        token_reward: added to the score for each token; auto takes what was chosen, or 0.
        beam: hypotheses kept by the search; 0 is greedy search.
        channel: of recordings with several, counted from 0; by default their mean.
        normalise: write the text as the recogniser does: lower-case words of a to z and inner
            apostrophes.
        out: a JSON file for the numbers.
        threads: of torch; by default its own choice.
    """
    set_threads(threads)
    if text is None and corpus is None:
        raise ValueError("evaluate: expected --lm with --text, --recogniser with --corpus, or both")
    if out is not None:
        require_place("out", out)
    found: dict[str, Any] = {"format": 1}
    model = None if lm is None else load_lm(lm)
    if text is not None:
        if model is None:
            raise ValueError("lm: expected a folder to go with the text, got none")
        found["lm"] = _predict(model, text, normalise)
    if corpus is not None:
        if recogniser is None:
            raise ValueError("recogniser: expected a folder to go with the corpus, got none")
        listener = load_recogniser(recogniser, tokenizer=None if model is None else model.tokenizer)
        options = _options(listener, model, lm_weight, token_reward, beam, 1)
        utterances = load_corpus(kind, corpus, split, "allow_empty")
        found["speech"] = _recognise(listener, model, utterances, options, channel)
    if out is not None:
        write_json(out, found)


def decode(
    recogniser: Path,
    audio: list[Path] | None = None,
    corpus: Path | None = None,
    kind: Kind = "manifest",
    split: str = "test",
    lm: Path | None = None,
    lm_weight: Auto = "auto",
    token_reward: Auto = "auto",
    beam: int = 4,
    nbest: int = 1,
    channel: int | None = None,
    out: Path | None = None,
    threads: int | None = None,
) -> None:
    """Turns recordings into n-best lists with their parts, as TSV or JSON.

    A recording longer than 30 s is cut at quiet places and decoded piece by piece.

    Args:
        recogniser: folder of a recogniser.
        audio: recordings.
        corpus: folder of a corpus, or a manifest; needs no transcripts.
        kind: the corpus's layout.
        split: of the corpus.
        lm: folder of a language model to fuse.
        lm_weight: of the LM in fusion; auto takes what `prunelm tune` chose for the two models,
            or 0.3.
        token_reward: added to the score for each token; auto takes what was chosen, or 0.
        beam: hypotheses kept by the search; 0 is greedy search.
        nbest: hypotheses for each recording, at most.
        channel: of recordings with several, counted from 0; by default their mean.
        out: a .tsv or .json file; by default TSV on the screen.
        threads: of torch; by default its own choice.
    """
    set_threads(threads)
    if (corpus is None) == (not audio):
        raise ValueError("decode: expected either --audio or --corpus")
    if out is not None:
        require_place("out", out)
    if out is not None and out.suffix not in (".tsv", ".json"):
        raise ValueError(f"out: expected a name ending in .tsv or .json, got {out}")
    model = None if lm is None else load_lm(lm)
    listener = load_recogniser(recogniser, tokenizer=None if model is None else model.tokenizer)
    options = _options(listener, model, lm_weight, token_reward, beam, nbest)
    if corpus is not None:
        utterances = load_corpus(kind, corpus, split, "optional", present=False)
    else:
        utterances = [Utterance(str(path), path, None) for path in audio or []]
    found = transcribe_each(listener, utterances, model, options, channel=channel)
    shown = _counted("decoding", found, len(utterances)) if out is not None else found
    failed = _Failures(len(utterances))
    if out is not None and out.suffix == ".json":
        good = [_as_json(each, listener.tokenizer) for each in failed.apart(shown)]
        if good:
            settings = {"beam": beam, "lm_weight": options.lm_weight,
                        "token_reward": options.token_reward}  # fmt: skip
            write_json(out, {"format": 1, "search": settings, "utterances": good})
    else:
        with _sink(out) as file:
            _write_tsv(file, failed.apart(shown), options, listener.tokenizer)
            if failed.failed == failed.count:  # leaves no file
                failed.complain("could not be decoded")
    failed.complain("could not be decoded")


def tune(
    recogniser: Path,
    corpus: Path,
    lm: Path | None = None,
    kind: Kind = "manifest",
    split: str = "valid",
    beam: int = 4,
    threads: int | None = None,
) -> None:
    """Chooses the LM weight and the token reward by word errors, and keeps them with the models.

    What is chosen is written to `decoding.json` in the LM's folder and in the recogniser's, where
    `decode`, `evaluate`, `demo` and `study` find it. Pruned models inherit it.

    Args:
        recogniser: folder of a recogniser.
        corpus: folder of a corpus, or a manifest: validation utterances, not those reported on.
        lm: folder of a language model; without it, the token reward alone is chosen.
        kind: the corpus's layout.
        split: of the corpus.
        beam: hypotheses kept by the search.
        threads: of torch; by default its own choice.
    """
    set_threads(threads)
    model = None if lm is None else load_lm(lm)
    listener = load_recogniser(recogniser, tokenizer=None if model is None else model.tokenizer)
    utterances = load_corpus(kind, corpus, split, "allow_empty")

    def tried(options: SearchOptions, wer: float) -> None:
        print(f"{options}: WER {100 * wer:.2f} %", file=sys.stderr, flush=True)

    for each in [None] if model is None else [None, model]:
        choice = choose_search(listener, each, utterances, beam, tried=tried)
        folder = listener.folder if each is None else each.folder
        add_chosen(folder, [choice])
        options = SearchOptions(choice.beam, choice.lm_weight, choice.token_reward)
        print(f"{folder}: {options} (WER {100 * choice.wer:.2f} %, {choice.utterances} utterances)")


class _Failures:
    """Recordings that gave no transcript; each gets its line when it comes."""

    def __init__(self, count: int) -> None:
        self.count, self.failed = count, 0

    def apart(self, transcripts: Iterable[Transcript]) -> Iterator[Transcript]:
        """The transcripts without the failed ones."""
        for each in transcripts:
            if each.error:
                self.failed += 1
                print(f"prunelm: {each.error}", file=sys.stderr, flush=True)
            else:
                yield each

    def complain(self, what: str) -> None:
        """ValueError if there are any, so that the command ends with a code that is not 0."""
        if self.failed:
            raise ValueError(f"{self.failed} of {self.count} recordings {what}")


def _options(
    recogniser: LoadedRecogniser,
    lm: LoadedLM | None,
    lm_weight: Auto,
    token_reward: Auto,
    beam: int,
    nbest: int,
) -> SearchOptions:
    """The options, said on stderr with where they come from."""
    options, where = suitable_options(
        recogniser, lm, beam=beam, nbest=nbest,
        lm_weight=None if lm_weight == "auto" else lm_weight,
        token_reward=None if token_reward == "auto" else token_reward,
    )  # fmt: skip
    said = f"{options} ({where})" if where else str(options)
    if where.startswith("default"):
        said += "; prunelm tune chooses better ones"
    print(f"prunelm: {said}", file=sys.stderr, flush=True)
    return options


def _predict(lm: LoadedLM, text: Path, normalise: bool) -> dict[str, Any]:
    plain = load_lm(lm.folder, accelerated=False).model
    lines = known_lines(text, lm.tokenizer, normalise)
    with stages() as watch:
        found = perplexity(
            lm.model, lines, lm.tokenizer,
            progress=lambda done, of: watch(f"perplexity of {text.name}", done, of),
        )  # fmt: skip
    size = count_parameters(plain, read_masks(lm.folder / "masks.safetensors", plain))
    flops = flops_per_token(plain, 32, zeros=False)
    print(f"parameters           {size:,}")
    print(f"perplexity per word  {found.per_word:.2f}  ({found.words:,} words)")
    print(f"perplexity per token {found.per_token:.2f}  ({found.tokens:,} tokens)")
    print(f"FLOPs per token      {flops:,}  (after 32 tokens)")
    return {
        "parameters": size, "perplexity_per_word": found.per_word,
        "perplexity_per_token": found.per_token, "words": found.words, "tokens": found.tokens,
        "flops_per_token": flops,
    }  # fmt: skip


def _recognise(
    recogniser: LoadedRecogniser,
    lm: LoadedLM | None,
    utterances: Sequence[Utterance],
    options: SearchOptions,
    channel: int | None,
) -> dict[str, Any]:
    found = transcribe_each(recogniser, utterances, lm, options, channel=channel)
    failed = _Failures(len(utterances))
    texts = {
        each.id: each.text for each in failed.apart(_counted("decoding", found, len(utterances)))
    }
    failed.complain("could not be decoded, so there is no word error rate")
    wer = word_error_rate([u.text for u in utterances], [texts[u.id] for u in utterances])
    print(
        f"word error rate      {100 * wer.rate:.2f} %  [{100 * wer.low:.2f}, "
        f"{100 * wer.high:.2f}]  ({wer.errors:,} errors, {wer.words:,} words; {options})"
    )
    return {
        "wer": wer.rate, "wer_low": wer.low, "wer_high": wer.high, "errors": wer.errors,
        "words": wer.words, "utterances": len(utterances), "beam": options.beam,
        "lm_weight": None if lm is None else options.lm_weight,
        "token_reward": options.token_reward,
    }  # fmt: skip


def _counted(describe: str, items: Iterable[Item], total: int) -> Iterable[Item]:
    """The items, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, describe, total, console=console, disable=not console.is_terminal)


@contextmanager
def _sink(out: Path | None) -> Iterator[TextIO]:
    if out is None:
        yield sys.stdout
        return
    with replace_file(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file


def _as_json(transcript: Transcript, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "id": transcript.id,
        "nbest": [
            {
                "text": tokenizer.decode(list(each.tokens)),
                "score": each.score if math.isfinite(each.score) else None,
                "parts": dict(each.parts),
                "tokens": list(each.tokens),
                "times": list(each.times),
                "confidence": list(each.confidence),
            }
            for each in transcript.nbest
        ],
    }


def _write_tsv(
    file: TextIO, transcripts: Iterable[Transcript], options: SearchOptions, tokenizer: Tokenizer
) -> None:
    """A header, then a line per hypothesis, each recording's as soon as it is there."""
    names = ["am"]
    if options.beam and options.lm_weight:
        names.append("lm")
    if options.beam and options.token_reward:
        names.append("reward")
    file.write("\t".join(["id", "rank", "score", *names, "text"]) + "\n")
    for transcript in transcripts:
        for rank, each in enumerate(transcript.nbest, 1):
            parts = [f"{each.parts.get(name, math.nan):.4f}" for name in names]
            text = tokenizer.decode(list(each.tokens))
            row = [transcript.id, str(rank), f"{each.score:.4f}", *parts, text]
            file.write("\t".join(row) + "\n")
        file.flush()
