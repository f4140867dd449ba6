"""`prunelm train lm` and `prunelm train recogniser`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunelm.cli.numbers import above_zero, at_least, fraction
from prunelm.cli.pruning import set_threads
from prunelm.cli.texts import known_lines, warn_of_unknown, written_lines
from prunelm.data.files import require_file
from prunelm.data.manifest import Utterance
from prunelm.data.runs import file_fact, prepared, refuse_other_run, work_folder
from prunelm.data.speech import hold_out_speakers, load_corpus
from prunelm.data.speech_batches import Augmentation, SpeechBatches
from prunelm.data.text import TokenBatches, cached_token_ids
from prunelm.data.tokenizer import Tokenizer
from prunelm.decoding.transcribe import SearchOptions, best_words, encode, search
from prunelm.metrics.perplexity import perplexity
from prunelm.metrics.wer import word_error_rate
from prunelm.models.lm import LayerSizes, LMConfig, TransformerLM
from prunelm.models.transducer import Transducer, TransducerConfig
from prunelm.study.testbed import speech_digest
from prunelm.training.checkpoint import copy_weights, load_model, read_info, untied_weights
from prunelm.training.loop import TRAINED_FILES, TrainOptions, train
from prunelm.training.recogniser import TransducerLoss

LM_OPTIONS = TrainOptions(steps=5000, lr=1e-3, validate_every=500, checkpoint_every=500)
RECOGNISER_OPTIONS = TrainOptions(
    steps=8000, lr=7e-4, warmup=200, final_lr_fraction=0.02, weight_decay=0.02, clip=2.0,
    average=0.998, validate_every=500, checkpoint_every=250,
)  # fmt: skip
AUGMENTATION = Augmentation(begin=500)
LEAST_VOCABULARY = 4  # <s>, <unk>, the space and a character


def train_lm(
    text: Path,
    out: Path,
    valid: Path | None = None,
    tokenizer: Path | None = None,
    preset: Literal["small", "paper-20m", "tiny"] = "small",
    layers: int | None = None,
    dim: int | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
    ff: int | None = None,
    dropout: float = 0.0,
    vocab_size: int = 500,
    units: Literal["unigram", "char"] = "unigram",
    batch: int = 32,
    length: int = 128,
    normalise: bool = False,
    options: TrainOptions = LM_OPTIONS,
    threads: int | None = None,
) -> None:
    """Trains a language model on lines of text; under torchrun on several processes.

    Args:
        text: one sentence a line, plain or .gz.
        out: folder for the model; a stopped run goes on in it, more steps extend it, and any other
            change is refused.
        valid: lines to choose the best weights by.
        tokenizer: a tokenizer.model, such as a recogniser's, whose tokens fusion needs; by
            default one is made from the text.
        preset: the model's size, where the next five do not say otherwise.
        layers: blocks.
        dim: width.
        heads: attention heads of a block.
        head_dim: width of a head.
        ff: feed-forward width of a block.
        dropout: fraction of activations.
        vocab_size: of a new tokenizer.
        units: of a new tokenizer.
        batch: rows of tokens in a batch, on each process.
        length: tokens in a row.
        normalise: write text and valid as recognisers do: lower-case words of a to z and inner
            apostrophes.
        options: how long and how fast.
        threads: of torch; by default its own choice.
    """
    at_least(1, {
        "layers": layers, "dim": dim, "heads": heads, "head_dim": head_dim, "ff": ff,
        "batch": batch, "length": length, "threads": threads,
    })  # fmt: skip
    at_least(LEAST_VOCABULARY, {"vocab_size": vocab_size})
    fraction({"dropout": dropout})
    if head_dim is not None and head_dim % 2:
        raise ValueError(f"head_dim: expected an even number, got {head_dim}")
    set_threads(threads)
    for name, path in (("text", text), ("valid", valid)):
        if path is not None:
            require_file(name, path)
    rank, world = place()
    with prepared(out, main=rank == 0):
        facts = {
            "kind": "train lm",
            "text": file_fact(text),
            "valid": file_fact(valid) if valid is not None else None,
            "batch": batch,
            "length": length,
            "normalise": normalise,
            **vocabulary_facts(tokenizer, vocab_size, units),
        }
        refuse_other_run(out, facts, makes=TRAINED_FILES)
        work = work_folder(out)
        source = partial(written_lines, text, normalise)
        pieces = chosen_tokenizer(source, work, tokenizer, vocab_size, units)
        if tokenizer is not None:
            warn_of_unknown(source(), pieces, text, normalise)
        torch.manual_seed(options.seed)
        start = LMConfig.preset(preset, pieces.vocab_size)
        size = LayerSizes(heads or start.layers[0].heads, ff or start.layers[0].ff)
        config = LMConfig(
            pieces.vocab_size, dim or start.dim, head_dim or start.head_dim,
            (size,) * (layers or len(start.layers)), dropout,
        )  # fmt: skip
        model = TransformerLM(config)
        ids = cached_token_ids(text, pieces, work, normalised=normalise)
        batches = TokenBatches(ids, pieces, batch, length, options.seed, rank, world)
        lines = known_lines(valid, pieces, normalise) if valid is not None else []
        history = train(
            model, batches, lm_loss, options,
            folder=out,
            validate=(lambda lm: perplexity(lm, lines, pieces).per_word) if lines else None,
            tokenizer=pieces,
            facts=facts,
            describe=f"{config.parameter_count:,} parameters",
        )  # fmt: skip
    if rank == 0:
        best = f", best perplexity per word {history.best:.2f}" if lines else ""
        print(f"{out}: {options.steps} steps in {history.seconds:.0f} s{best}")


def lm_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """The language model's own loss on rows of tokens."""
    value: Tensor = model.loss(rows)  # type: ignore[operator]
    return value


def train_recogniser(
    corpus: Path,
    out: Path,
    kind: Literal["manifest", "librispeech", "an4", "ljspeech"] = "manifest",
    split: str = "train",
    valid_split: str = "",
    tokenizer: Path | None = None,
    vocab_size: int = 40,
    units: Literal["unigram", "char"] = "char",
    encoder: Literal["conformer", "transformer"] = "conformer",
    layers: int = 6,
    dim: int = 144,
    heads: int = 3,
    ff: int = 576,
    dropout: float = 0.15,
    seconds: float = 32.0,
    ctc_first: int = 500,
    hold_out: int = 0,
    init: Path | None = None,
    augmentation: Augmentation = AUGMENTATION,
    options: TrainOptions = RECOGNISER_OPTIONS,
    threads: int | None = None,
) -> None:
    """Trains a transducer on a corpus of speech; under torchrun on several processes.

    Args:
        corpus: the corpus's own folder, or a manifest.
        out: folder for the model; a stopped run goes on in it, more steps extend it, and any other
            change is refused.
        kind: the corpus's layout.
        split: to train on.
        valid_split: to choose the best weights by, with greedy search; none by default.
        tokenizer: a tokenizer.model, such as a language model's, whose tokens fusion needs; by
            default one is made from the transcripts.
        vocab_size: of a new tokenizer, at most.
        units: of a new tokenizer.
        encoder: its kind of blocks.
        layers: blocks of the encoder.
        dim: its width.
        heads: attention heads of a block.
        ff: feed-forward width of a block.
        dropout: fraction of activations.
        seconds: audio in a batch, on each process.
        ctc_first: batches that train the encoder by CTC alone, so that alignments form.
        hold_out: speakers to take out of the training split and choose the best weights by.
        init: folder of a recogniser of the same sizes and vocabulary, whose weights to start from.
        augmentation: what is done to training features.
        options: how long and how fast.
        threads: of torch; by default its own choice.
    """
    at_least(1, {"layers": layers, "dim": dim, "heads": heads, "ff": ff, "threads": threads})
    at_least(LEAST_VOCABULARY, {"vocab_size": vocab_size})
    at_least(0, {"ctc_first": ctc_first, "hold_out": hold_out})
    above_zero({"seconds": seconds})
    fraction({"dropout": dropout})
    if dim % heads or dim // heads % 2:
        raise ValueError(
            f"heads: expected a divisor of the width {dim} that leaves each head an even width, "
            f"got {heads}"
        )
    rank, world = place()
    count = options.steps * options.accumulate * world
    if 0 < count <= ctc_first:
        raise ValueError(
            f"ctc_first: expected fewer than the run's {count} batches, got {ctc_first}: the "
            "transducer would stay untrained; raise options.steps or lower ctc_first"
        )
    set_threads(threads)
    if hold_out and valid_split:
        raise ValueError("hold_out: expected 0 beside a valid_split, got both")
    utterances = load_corpus(kind, corpus, split)
    valid = load_corpus(kind, corpus, valid_split, "allow_empty") if valid_split else []
    if hold_out:
        utterances, valid = hold_out_speakers(utterances, hold_out)
    texts = [utterance.text for utterance in utterances]
    with prepared(out, main=rank == 0):
        facts = {
            "kind": "train recogniser",
            "corpus": corpus_fact(corpus, utterances),
            "valid": corpus_fact(corpus, valid) if valid else None,
            "seconds": seconds,
            "augmentation": asdict(augmentation),
            "init": read_info(init)["weights"] if init is not None else None,
            **vocabulary_facts(tokenizer, vocab_size, units),
        }
        refuse_other_run(out, facts, makes=TRAINED_FILES)
        pieces = chosen_tokenizer(lambda: texts, work_folder(out), tokenizer, vocab_size, units)
        config = TransducerConfig(
            vocab_size=pieces.vocab_size, layers=(LayerSizes(heads, ff),) * layers, dim=dim,
            head_dim=dim // heads, encoder=encoder, dropout=dropout,
        )  # fmt: skip
        torch.manual_seed(options.seed)
        model = Transducer(config)
        if init is not None:
            source, _, _ = load_model(init, kind="transducer", tokenizer=pieces)
            copy_weights(model, untied_weights(source), f"init {init}")
        batches = SpeechBatches(
            utterances, pieces, seconds=seconds, augmentation=augmentation, seed=options.seed,
            rank=rank, world=world,
        )  # fmt: skip

        def greedy_wer(recogniser: nn.Module) -> float:
            assert isinstance(recogniser, Transducer)
            found = search(recogniser, encode(recogniser, valid), options=SearchOptions(beam=0))
            heard = best_words(found, pieces)
            return word_error_rate([u.text for u in valid], [heard[u.id] for u in valid]).rate

        history = train(
            model, batches, TransducerLoss(ctc_first), options,
            folder=out, validate=greedy_wer if valid else None, tokenizer=pieces, facts=facts,
            describe=f"{sum(p.numel() for p in model.parameters()):,} parameters",
        )  # fmt: skip
    if rank == 0:
        best = f", best WER {100 * history.best:.2f} %" if valid else ""
        if valid and history.best > 1:
            best += ": above 100 %, since it inserts words; it needs more steps"
        print(f"{out}: {options.steps} steps in {history.seconds:.0f} s{best}")


def corpus_fact(corpus: Path, utterances: Sequence[Utterance]) -> dict[str, str]:
    """Utterances as a fact, see `speech_digest`."""
    name = f"{corpus.name}, {len(utterances)} utterances"
    return {"digest": speech_digest(utterances), "name": name}


def vocabulary_facts(
    tokenizer: Path | None, vocab_size: int, units: Literal["unigram", "char"]
) -> dict[str, Any]:
    """How a run comes by its tokenizer, whose fingerprint is a fact of its own."""
    made = tokenizer is None
    return {"vocabulary": f"{units}, {vocab_size}" if made else "given"}


def place() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def chosen_tokenizer(
    lines: Callable[[], Sequence[str]],
    work: Path,
    tokenizer: Path | None,
    vocab_size: int,
    units: Literal["unigram", "char"],
) -> Tokenizer:
    """The tokenizer that was named, that a stopped run left, or a new one of the lines."""
    if tokenizer is not None:
        return Tokenizer.load(tokenizer / "tokenizer.model" if tokenizer.is_dir() else tokenizer)
    left = work / "tokenizer.model"
    if left.is_file():
        return Tokenizer.load(left)
    made = Tokenizer.train(lines(), vocab_size, units)
    made.save(left)
    return made
