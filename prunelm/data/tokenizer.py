"""Text to token ids and back, over sentencepiece; one tokenizer serves a recogniser and its LMs."""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from prunelm.data.files import replace_file, require_file, shown
from prunelm.data.lines import LONGEST_LINE, cut_line

BOUNDARY = 0
"""The LM's start and end of a line, and the transducer's blank."""

UNKNOWN = 1
"""What stands for characters that training never saw."""

_OTHER_SPACE = re.compile(r"[^\S ]")


class Tokenizer:
    """A trained sentencepiece model: id 0 `<s>`, id 1 `<unk>`, then pieces.

    White space of any kind (tabs, no-break spaces, line separators) reads as a space, and runs of
    it as one. Beyond that text is taken as it is: see `prunelm.data.text.normalise`.
    """

    def __init__(self, model: bytes) -> None:
        """Wraps a serialised sentencepiece model; ValueError if it is none, or not one of ours."""
        import sentencepiece

        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
            first = [self._processor.IdToPiece(i) for i in range(2)]
        except (RuntimeError, IndexError):
            size = len(model)
            raise ValueError(
                f"tokenizer: expected a sentencepiece model, got {size} bytes of something else"
            ) from None
        if first != ["<s>", "<unk>"]:
            raise ValueError(f"tokenizer: expected the ids 0 <s> and 1 <unk>, got {first}")

    @property
    def vocab_size(self) -> int:
        """Number of ids, `<s>` and `<unk>` among them."""
        return int(self._processor.GetPieceSize())

    def encode(self, text: str) -> list[int]:
        """Ids of a line, without boundaries; [] for an empty line.

        Raises:
            ValueError: half of a surrogate pair, which stands for no character.
        """
        plain = _OTHER_SPACE.sub(" ", text)
        try:
            ids: list[int] = self._processor.EncodeAsIds(plain)
        except (RuntimeError, TypeError):  # what the binding says of strings that are no UTF-8
            _refuse_surrogates([plain])
            raise
        return ids

    def encode_lines(self, lines: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of many lines, in `threads` threads."""
        plain = [_OTHER_SPACE.sub(" ", line) for line in lines]
        try:
            ids: list[list[int]] = self._processor.Encode(plain, num_threads=threads)
        except (RuntimeError, TypeError):
            _refuse_surrogates(plain)
            raise
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; boundaries say nothing, unknown tokens read " ⁇ "."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"ids: expected 0 to {self.vocab_size - 1}, got {token}")
        text: str = self._processor.DecodeIds([int(i) for i in ids if i != BOUNDARY])
        return text

    def piece(self, token: int) -> str:
        """The piece behind one id; "▁" stands for a space."""
        return str(self._processor.IdToPiece(token))

    def check(self, fingerprint: str, owner: str) -> None:
        """ValueError naming both unless `fingerprint`, stored by `owner`, is this tokenizer's."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"{owner}: expected the vocabulary {self.fingerprint} of the tokenizer in use, "
                f"got {shown(fingerprint)}"
            )

    def save(self, path: Path | str) -> None:
        """Writes the sentencepiece model file."""
        with replace_file(Path(path)) as temporary:
            temporary.write_bytes(self.model)

    @staticmethod
    def load(path: Path | str) -> "Tokenizer":
        """Reads what `save` wrote; ValueError or FileNotFoundError names the file."""
        path = require_file("tokenizer", path)
        try:
            return Tokenizer(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{error} ({path})") from None

    @staticmethod
    def train(
        lines: Iterable[str], vocab_size: int, kind: Literal["char", "unigram"] = "unigram"
    ) -> "Tokenizer":
        """Trains on lines of normalised text; equal lines give an equal tokenizer.

        Args:
            lines: every character in them gets an id; lines longer than `LONGEST_LINE` are cut.
            vocab_size: ids in all for "unigram", the most that there may be for "char".
            kind: "char" or "unigram" (Kudo 2018, arXiv 1804.10959).

        Raises:
            ValueError: no line with a word, a size that these lines do not allow, or half of a
                surrogate pair.
        """
        import sentencepiece

        if kind not in ("char", "unigram"):
            raise ValueError(f"kind: expected char or unigram, got {kind!r}")
        plain = [_OTHER_SPACE.sub(" ", line).strip() for line in lines]
        kept = [part for line in plain if line for part in cut_line(line, LONGEST_LINE)]
        _refuse_surrogates(kept)
        if not kept:
            raise ValueError("lines: expected at least one line that is not empty, got none")
        needed = 3 + len(set().union(*map(set, kept)) - {" "})  # <s>, <unk> and the space
        if needed > vocab_size:
            raise ValueError(f"vocab_size: expected at least {needed}, got {vocab_size}")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(kept),
                model_writer=model,
                model_type=kind,
                vocab_size=vocab_size,
                hard_vocab_limit=kind != "char",
                character_coverage=1.0,
                normalization_rule_name="identity",
                max_sentence_length=max(10, *(len(line.encode()) + 1 for line in kept)),
                bos_id=BOUNDARY,
                unk_id=UNKNOWN,
                eos_id=-1,
                pad_id=-1,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
            raise ValueError(f"vocab_size: sentencepiece refuses {vocab_size}: {reason}") from None
        return Tokenizer(model.getvalue())


def _refuse_surrogates(lines: Iterable[str]) -> None:
    for number, line in enumerate(lines, 1):
        if any("\ud800" <= character <= "\udfff" for character in line):
            raise ValueError(
                f"lines: expected Unicode text, got half of a surrogate pair in line {number}, "
                f"{shown(line)!r}"
            )
