"""What models are tried on: an LM, a recogniser, speech to recognise, text to judge and heal by.

A folder of one's own is laid out like the shipped `prunelm/demo`:

    lm/             a language model, as `prunelm train lm` leaves it
    recogniser/     a recogniser of the same vocabulary
    test.tsv        id, path, text of the utterances to recognise; paths from the folder
    test.txt        sentences for perplexity; without it, the texts of test.tsv
    valid.txt       sentences to choose by
    valid.tsv       utterances to choose the LM's weight by (may be missing)
    recovery.txt    sentences to heal with; each text may be a .gz

Without recogniser/ and test.tsv only text is judged, and there are no word error rates.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunelm.data.coverage import unknown_characters
from prunelm.data.files import digest_of_file
from prunelm.data.runs import digest_of
from prunelm.data.speech import Utterance, load_corpus
from prunelm.data.text import TokenBatches, read_lines, text_batches
from prunelm.data.tokenizer import Tokenizer
from prunelm.training.pretrained import LoadedLM, LoadedRecogniser, load_lm, load_recogniser


@dataclass(frozen=True)
class TestBed:
    """Models and data; `recogniser` and `test` are None and empty where only text is judged.

    Args:
        lm: not accelerated, since it is to be pruned.
        facts: what a report says of them.
    """

    lm: LoadedLM
    recogniser: LoadedRecogniser | None
    test: tuple[Utterance, ...]
    valid: tuple[Utterance, ...]
    test_lines: tuple[str, ...]
    valid_lines: tuple[str, ...]
    recovery: Path
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the language model and of the recogniser."""
        return self.lm.tokenizer

    def batches(self, folder: Path, *, batch: int, length: int, seed: int) -> TokenBatches:
        """The recovery text as batches; its token ids are kept in `folder`."""
        return text_batches(
            self.recovery, self.tokenizer, folder, batch=batch, length=length, seed=seed
        )


def open_testbed(
    folder: Path | str,
    *,
    lm: Path | None = None,
    recogniser: Path | None = None,
    corpus: Path | None = None,
    text: Path | None = None,
) -> TestBed:
    """Opens a folder laid out as above; parts named on their own take their places in it.

    Args:
        lm: folder of a language model.
        recogniser: folder of a recogniser.
        corpus: manifest of the utterances to recognise.
        text: sentences to heal with.

    Raises:
        FileNotFoundError: a part is missing; says which.
        ValueError: the models' vocabularies differ, or a file is cut short.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data: expected a folder, got {folder}")
    recogniser_folder = recogniser or folder / "recogniser"
    manifest = corpus or folder / "test.tsv"
    model = load_lm(lm or folder / "lm", accelerated=False)
    facts = {"language_model": f"{_last_two(model.folder)} (weights {model.weights})"}
    listener: LoadedRecogniser | None = None
    test: list[Utterance] = []
    valid: list[Utterance] = []
    if recogniser_folder.exists() or manifest.exists():
        listener = load_recogniser(recogniser_folder, tokenizer=model.tokenizer)
        facts["recogniser"] = f"{_last_two(recogniser_folder)} (weights {listener.weights})"
        test = load_corpus("manifest", manifest, manifest.stem, "allow_empty")
        words = sum(len(utterance.text.split()) for utterance in test)
        facts["test_speech"] = f"{len(test)} utterances, {words:,} words ({speech_digest(test)})"
        if (folder / "valid.tsv").is_file():
            valid = load_corpus("manifest", folder, "valid", "allow_empty")
            facts["valid_speech"] = f"{len(valid)} utterances ({speech_digest(valid)})"
    own_lines = corpus is None and _text(folder, "test").is_file()
    lines = [u.text for u in test] if test and not own_lines else read_lines(_text(folder, "test"))
    words = sum(len(line.split()) for line in lines)
    facts["test_text"] = f"{len(lines):,} sentences, {words:,} words ({digest_of(lines)})"
    choosing = read_lines(_text(folder, "valid"))
    facts["valid_text"] = f"{len(choosing):,} sentences ({digest_of(choosing)})"
    recovery = text or _text(folder, "recovery")
    if not recovery.is_file():
        raise FileNotFoundError(f"recovery text: expected a file, got {recovery}")
    facts["recovery_text"] = f"{recovery.name} ({digest_of_file(recovery)})"
    _warn_of_unknown({"test text": lines, "valid text": choosing}, model.tokenizer)
    _warn_of_unknown({str(recovery): read_lines(recovery)}, model.tokenizer)
    return TestBed(
        model, listener, tuple(test), tuple(valid), tuple(lines),
        tuple(choosing), recovery, facts,
    )  # fmt: skip


def _warn_of_unknown(texts: Mapping[str, Sequence[str]], tokenizer: Tokenizer) -> None:
    for name, lines in texts.items():
        found = unknown_characters(lines, tokenizer)
        if found is not None:
            logging.getLogger("prunelm").warning("%s: %s", name, found)


def speech_digest(utterances: Sequence[Utterance]) -> str:
    """12 hex digits that change with what a corpus says of utterances and recordings' sizes."""
    rows = [[u.id, u.text, u.seconds, u.speaker, u.audio_path.stat().st_size] for u in utterances]
    return digest_of(rows)


def _text(folder: Path, name: str) -> Path:
    packed = folder / f"{name}.txt.gz"
    return packed if packed.is_file() else folder / f"{name}.txt"


def _last_two(folder: Path) -> str:
    return "/".join(folder.resolve().parts[-2:])
