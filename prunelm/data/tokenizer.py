"""Text to token ids and back, over sentencepiece; one tokenizer serves a recogniser and its LMs."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from prunelm.data.files import replace_file

BOUNDARY = 0
"""The LM's start and end of a line, and the transducer's blank."""

UNKNOWN = 1
"""What stands for characters that training never saw."""


class Tokenizer:
    """A trained sentencepiece model: id 0 `<s>`, id 1 `<unk>`, then pieces.

    Text is taken as it is, without normalisation beyond runs of spaces: see `prunelm.data.text`.
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
        """Ids of a line, without boundaries; [] for an empty line."""
        ids: list[int] = self._processor.EncodeAsIds(text)
        return ids

    def encode_lines(self, lines: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of many lines, in `threads` threads."""
        ids: list[list[int]] = self._processor.Encode(list(lines), num_threads=threads)
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
                f"got {fingerprint}"
            )

    def save(self, path: Path | str) -> None:
        """Writes the sentencepiece model file."""
        with replace_file(Path(path)) as temporary:
            temporary.write_bytes(self.model)

    @staticmethod
    def load(path: Path | str) -> "Tokenizer":
        """Reads what `save` wrote; ValueError or FileNotFoundError names the file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer: expected a file, got {path}")
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
            lines: every character in them gets an id.
            vocab_size: ids in all for "unigram", the most that there may be for "char".
            kind: "char" or "unigram" (Kudo 2018, arXiv 1804.10959).
        """
        import sentencepiece

        if kind not in ("char", "unigram"):
            raise ValueError(f"kind: expected char or unigram, got {kind!r}")
        kept = [line for line in (line.strip() for line in lines) if line]
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
