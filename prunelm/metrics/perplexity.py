"""Perplexity of a language model on lines of text, each read on its own."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BOUNDARY = 0  # as in prunelm.data.tokenizer, which lies beside this layer, not below it
UNKNOWN = 1
WINDOW = 4096
"""Positions in the longest forward pass."""


class Encoder(Protocol):
    """What this module needs of a tokenizer; `prunelm.data.tokenizer.Tokenizer` is one."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Perplexity:
    """-log P of some lines and what it was summed over.

    Each line starts from a boundary, and its end is predicted too: it counts as one token, and as
    one word, so that `per_word` compares between tokenizers.
    """

    nll: float
    """In nats, over all tokens and ends."""
    tokens: int
    """Without the ends."""
    words: int
    """Without the ends; what stands between spaces."""
    lines: int
    unknown: int
    """Tokens that stand for characters unknown to the tokenizer."""

    @property
    def per_token(self) -> float:
        """exp(nll / (tokens + lines)); infinite past what a float holds."""
        return _exp(self.nll / (self.tokens + self.lines))

    @property
    def per_word(self) -> float:
        """exp(nll / (words + lines)); infinite past what a float holds."""
        return _exp(self.nll / (self.words + self.lines))


def perplexity(
    model: nn.Module,
    lines: Iterable[str],
    tokenizer: Encoder,
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of `lines`, which does not depend on `batch_tokens` but for rounding.

    See `line_nll` for lines of more tokens than a forward pass takes.

    Args:
        model: token ids [B, L] int64 to logits [B, L, V]; causal.
        lines: normalised as the model's training text was; lines without a word are left out.
        batch_tokens: most tokens in one forward pass, padding included; a longer line goes alone.
        progress: called with the tokens read so far and all of them, ends of lines included.

    Raises:
        ValueError: the tokenizer is of another size than the model, no line has a word, or the
            model gives NaN or infinity (names the first such line).
    """
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not kept:
        raise ValueError("lines: expected at least one with a word, got none")
    size = getattr(getattr(model, "config", None), "vocab_size", tokenizer.vocab_size)
    if size != tokenizer.vocab_size:
        raise ValueError(f"tokenizer: expected the model's {size} ids, got {tokenizer.vocab_size}")
    ids = [tokenizer.encode(line) for _, line in kept]
    nll = line_nll(model, ids, batch_tokens=batch_tokens, progress=progress)
    finite = nll.isfinite()
    if not bool(finite.all()):
        first = int(finite.int().argmin())
        found = "NaN" if nll[first].isnan() else "infinity"
        raise ValueError(
            f"lines: expected finite log-probabilities, got {found} in line {kept[first][0]}"
        )
    return Perplexity(
        nll=math.fsum(nll.tolist()),
        tokens=sum(map(len, ids)),
        words=sum(len(line.split()) for _, line in kept),
        lines=len(kept),
        unknown=sum(line.count(UNKNOWN) for line in ids),
    )


def line_nll(
    model: nn.Module,
    ids: Sequence[Sequence[int]],
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """-log P(line and its end | its start) of each line, in nats, [lines] float64 on the CPU.

    Runs in eval mode without gradients, and leaves the mode as it was. Lines are batched by length.

    A line of `WINDOW` tokens or more is read in windows of `WINDOW` positions, each of which begins
    half a window after the one before: a token then sees at least the WINDOW / 2 tokens before it
    instead of all of them, and memory and time grow with the line's length, not with its square.

    Args:
        ids: each line's tokens, without boundaries; may be empty.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens: expected at least 1, got {batch_tokens}")
    device = next(model.parameters()).device
    result = torch.zeros(len(ids), dtype=torch.float64)
    total, done = sum(map(len, ids)) + len(ids), 0
    windows = [window for i, line in enumerate(ids) for window in _windows(i, len(line) + 1)]
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for some in _batches(windows, batch_tokens):
                nll = _window_nll(model, ids, some, device)
                result.index_add_(0, torch.tensor([window.line for window in some]), nll)
                done += sum(window.end - window.scored for window in some)
                if progress is not None:
                    progress(done, total)
    finally:
        model.train(training)
    return result


@dataclass(frozen=True)
class _Window:
    """Positions `begin` to `end` of a line, position 0 being its start; those before `scored` are
    context only."""

    line: int
    begin: int
    scored: int
    end: int


def _windows(line: int, positions: int) -> Iterable[_Window]:
    if positions <= WINDOW:
        yield _Window(line, 0, 0, positions)
        return
    scored = 0
    for begin in range(0, positions, WINDOW // 2):
        end = min(begin + WINDOW, positions)
        yield _Window(line, begin, scored, end)
        if end == positions:
            return
        scored = end


def _window_nll(
    model: nn.Module, ids: Sequence[Sequence[int]], some: Sequence[_Window], device: torch.device
) -> Tensor:
    """What each window adds to its line, [len(some)] float64 on the CPU."""
    width = max(window.end - window.begin for window in some)
    tokens = torch.full((len(some), width + 1), BOUNDARY)
    wanted = torch.zeros(len(some), width, dtype=torch.bool)
    for row, window in enumerate(some):
        # Position p of a line reads token p - 1, or the boundary, and predicts token p.
        first = max(window.begin - 1, 0)
        part = torch.tensor(ids[window.line][first : window.end], dtype=torch.int64)
        place = int(window.begin == 0)
        tokens[row, place : place + len(part)] = part
        wanted[row, window.scored - window.begin : window.end - window.begin] = True
    tokens = tokens.to(device)
    logits = model(tokens[:, :-1]).flatten(0, 1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(wide, tokens[:, 1:].flatten(), reduction="none").view(len(some), width)
    return nll.masked_fill(~wanted.to(device), 0.0).sum(1, dtype=torch.float64).cpu()


def _batches(windows: Sequence[_Window], batch_tokens: int) -> Iterable[list[_Window]]:
    """Windows, longest first, in groups that fit batch_tokens when padded."""
    group: list[_Window] = []
    width = 0
    for window in sorted(windows, key=lambda window: window.begin - window.end):
        if group and (len(group) + 1) * width > batch_tokens:
            yield group
            group = []
        if not group:
            width = window.end - window.begin
        group.append(window)
    if group:
        yield group


def _exp(exponent: float) -> float:
    return math.exp(exponent) if exponent < 700 else math.inf
