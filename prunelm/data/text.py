"""Lines of text, the form in which recognisers write them, and token ids for training an LM."""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prunelm.data.files import digest_of_file, replace_file, require_file
from prunelm.data.lines import read_lines as read_lines
from prunelm.data.tokenizer import BOUNDARY, UNKNOWN, Tokenizer

FORMAT = 1
_DTYPES = {name: name for name in ("<u2", "<i4")}
_NO_LETTER = re.compile(r"[^a-z']+")
_EDGE_APOSTROPHE = re.compile(r"(?<![a-z])'+|'+(?![a-z])")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z])")
_SPELLED = str.maketrans({"\u2019": "'", "&": " and ", "\u0153": "oe", "\u00e6": "ae"})
_TITLES = {"mr": "mister", "mrs": "missus", "dr": "doctor", "messrs": "messieurs"}
_ABBREVIATIONS = {
    "mr.",
    "mrs.",
    "ms.",
    "dr.",
    "st.",
    "rev.",
    "hon.",
    "capt.",
    "col.",
    "gen.",
    "esq.",
}


def normalise(text: str) -> str:
    """Text as recognisers write it: lower-case words of a-z and inner apostrophes, single spaces.

    Accents go, `&` reads "and", titles are written out ("mr." becomes "mister", as in LibriSpeech's
    transcripts), and every other character (hyphens, digits, quotes) parts words.
    """
    text = unicodedata.normalize("NFKD", text.lower().translate(_SPELLED))
    text = "".join(c for c in text if not unicodedata.combining(c))
    words = _EDGE_APOSTROPHE.sub(" ", _NO_LETTER.sub(" ", text)).split()
    return " ".join(_TITLES.get(word, word) for word in words)


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph of written English, each normalised.

    Sentences with digits are left out, since nobody knows how they would be read, and so are those
    without a word.
    """
    parts: list[str] = []
    for part in _SENTENCE_END.split(paragraph):
        if parts and parts[-1].rpartition(" ")[2].lower().lstrip("\"'(") in _ABBREVIATIONS:
            parts[-1] += " " + part
        else:
            parts.append(part)
    lines = (normalise(part) for part in parts if not any(c.isdigit() for c in part))
    return [line for line in lines if line]


def write_token_ids(
    lines: Iterable[str], tokenizer: Tokenizer, path: Path | str, *, threads: int = 1
) -> None:
    """Writes lines as one stream of ids: a boundary, then each line's ids and a boundary.

    `path` takes the ids (uint16, or int32 for 65,536 ids and more); beside it, with the suffix
    .json, lie the tokenizer's fingerprint and the counts. Lines without a word are left out.

    Raises:
        ValueError: no line has a word.
    """
    path = Path(path)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4")
    tokens, count, words, unknown = 1, 0, 0, 0
    with replace_file(path) as temporary, temporary.open("wb") as file:
        file.write(np.array([BOUNDARY], dtype).tobytes())
        kept = (line for line in lines if line.strip())
        while some := list(islice(kept, 10_000)):
            for line, ids in zip(some, tokenizer.encode_lines(some, threads), strict=True):
                file.write(np.array([*ids, BOUNDARY], dtype).tobytes())
                tokens += len(ids) + 1
                count += 1
                words += len(line.split())
                unknown += ids.count(UNKNOWN)
        file.flush()
        if not count:
            raise ValueError(f"lines: expected at least one with a word to write {path}, got none")
    header = {
        "format": FORMAT,
        "dtype": dtype.str,
        "tokenizer": tokenizer.fingerprint,
        "tokens": tokens,
        "lines": count,
        "words": words,
        "unknown": unknown,
    }
    with replace_file(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(header) + "\n", encoding="utf-8")


class TokenIds:
    """What `write_token_ids` wrote, memory-mapped; `ids` is [tokens]."""

    def __init__(self, path: Path | str, tokenizer: Tokenizer) -> None:
        """Opens a file of ids.

        Raises:
            FileNotFoundError: it or its header is missing.
            ValueError: it was cut short or changed, or written with another tokenizer.
        """
        path = Path(path)
        for file in (path, path.with_suffix(".json")):
            require_file("token ids", file)
        try:
            header = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            found, self.tokens = str(header["tokenizer"]), int(header["tokens"])
            self.lines, self.words = int(header["lines"]), int(header["words"])
            self.unknown, dtype = int(header["unknown"]), np.dtype(_DTYPES[header["dtype"]])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise ValueError(
                f"{path.with_suffix('.json')}: expected a header of token ids"
            ) from None
        tokenizer.check(found, str(path))
        size = path.stat().st_size
        if size != self.tokens * dtype.itemsize:
            expected = self.tokens * dtype.itemsize
            raise ValueError(f"{path}: expected {expected} bytes, got {size}")
        if size < dtype.itemsize:
            raise ValueError(f"{path}: expected at least one id, got none")
        self.ids = np.memmap(path, dtype, "r")
        low, high = int(self.ids.min()), int(self.ids.max())
        if low < 0 or high >= tokenizer.vocab_size:
            raise ValueError(
                f"{path}: expected ids from 0 to {tokenizer.vocab_size - 1}, got {low} to {high}"
            )

    def __iter__(self) -> Iterator[list[int]]:
        """Each line's ids, without boundaries."""
        ends = np.flatnonzero(self.ids == BOUNDARY)
        for begin, end in pairwise(ends):
            yield self.ids[begin + 1 : end].tolist()


class TokenBatches:
    """Random windows of a file of ids, as a pure function of the seed and the step.

    An epoch visits windows `length` apart, in an order and from an offset of its own. A window is
    moved back to a line's start where there is one within half its length, so that many rows begin
    as an utterance does. With `world` processes, each takes its own `batch` rows of a joint batch
    of `world * batch`.
    """

    def __init__(
        self,
        path: Path | str,
        tokenizer: Tokenizer,
        batch: int,
        length: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.source = TokenIds(path, tokenizer)
        self.batch, self.length, self.seed = batch, length, seed
        self.rank, self.world = rank, world
        if batch < 1 or length < 1:
            raise ValueError(f"batch, length: expected at least 1, got {batch} and {length}")
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0 to {world - 1}, got {rank}")
        # One window less than fit, which leaves room for an epoch's offset.
        self.windows = (self.source.tokens - 1) // length - 1
        if self.windows < 1:
            most = (self.source.tokens - 1) // 2
            raise ValueError(f"length: expected at most {most} for {path}, got {length}")
        self._orders: dict[int, tuple[np.ndarray, int]] = {}

    def __call__(self, step: int) -> Tensor:
        """Ids [batch, length + 1] int64; `TransformerLM.loss` takes them."""
        first = (step * self.world + self.rank) * self.batch
        rows = [self._window(first + i) for i in range(self.batch)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _window(self, index: int) -> np.ndarray:
        epoch, place = divmod(index, self.windows)
        if epoch not in self._orders:
            # numpy takes no negative seeds; torch does, and reads them as here.
            generator = np.random.default_rng([self.seed % 2**64, epoch])
            order = generator.permutation(self.windows)
            self._orders = {e: self._orders[e] for e in self._orders if e == epoch - 1}
            self._orders[epoch] = order, int(generator.integers(self.length))
        order, offset = self._orders[epoch]
        begin = int(order[place]) * self.length + offset
        before = max(begin - self.length // 2, 0)
        starts = np.flatnonzero(self.source.ids[before : begin + 1] == BOUNDARY)
        if len(starts):
            begin = before + int(starts[-1])
        return self.source.ids[begin : begin + self.length + 1]


def text_batches(
    text: Path | str,
    tokenizer: Tokenizer,
    folder: Path | str,
    *,
    batch: int,
    length: int,
    seed: int = 0,
    normalised: bool = False,
) -> TokenBatches:
    """Random rows of a text for training, scoring and recovery.

    Args:
        text: lines, plain or .gz.
        folder: takes the text's token ids, unless it has them from an earlier call.
        batch, length: rows, and tokens in a row.
        normalised: whether lines are written as recognisers write them, see `normalise`.
    """
    path = cached_token_ids(text, tokenizer, folder, normalised=normalised)
    return TokenBatches(path, tokenizer, batch, length, seed)


def cached_token_ids(
    text: Path | str, tokenizer: Tokenizer, folder: Path | str, *, normalised: bool = False
) -> Path:
    """The file in `folder` that holds a text's token ids, written unless it is there."""
    text = require_file("text", text)
    kind = "-normalised" if normalised else ""
    name = f"{text.name.split('.')[0]}-{tokenizer.fingerprint}-{digest_of_file(text)}{kind}.bin"
    path = Path(folder) / name
    if not path.with_suffix(".json").is_file():
        write_token_ids(text_lines(text, normalised=normalised), tokenizer, path)
    return path


def text_lines(path: Path | str, *, normalised: bool = False) -> list[str]:
    """Lines of a text, plain or .gz, as they are or as recognisers write them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read (see `read_lines`), or no line has a word; names the file.
    """
    lines = read_lines(path)
    if normalised:
        lines = [normalise(line) for line in lines]
    if not any(line.strip() for line in lines):
        wanted = "a word of letters a to z" if normalised else "a word"
        raise ValueError(f"{path}: expected at least one line with {wanted}, got none")
    return lines
