"""Perplexity of a language model on lines of text, each read on its own."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BOUNDARY = 0  # as in prunelm.data.tokenizer, which lies beside this layer, not below it
UNKNOWN = 1


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
        """exp(nll / (tokens + lines))."""
        return math.exp(self.nll / (self.tokens + self.lines))

    @property
    def per_word(self) -> float:
        """exp(nll / (words + lines)); infinite past what a float holds."""
        exponent = self.nll / (self.words + self.lines)
        return math.exp(exponent) if exponent < 700 else math.inf


def perplexity(
    model: nn.Module, lines: Iterable[str], tokenizer: Encoder, *, batch_tokens: int = 8192
) -> Perplexity:
    """Perplexity of `lines`, which does not depend on `batch_tokens` but for rounding.

    Args:
        model: token ids [B, L] int64 to logits [B, L, V]; causal.
        lines: normalised as the model's training text was; lines without a word are left out.
        batch_tokens: most tokens in one forward pass, padding included; a longer line goes alone.

    Raises:
        ValueError: the tokenizer is of another size than the model, or no line has a word.
    """
    kept = [line for line in lines if line.strip()]
    if not kept:
        raise ValueError("lines: expected at least one with a word, got none")
    size = getattr(getattr(model, "config", None), "vocab_size", tokenizer.vocab_size)
    if size != tokenizer.vocab_size:
        raise ValueError(f"tokenizer: expected the model's {size} ids, got {tokenizer.vocab_size}")
    ids = [tokenizer.encode(line) for line in kept]
    return Perplexity(
        nll=math.fsum(line_nll(model, ids, batch_tokens=batch_tokens).tolist()),
        tokens=sum(map(len, ids)),
        words=sum(len(line.split()) for line in kept),
        lines=len(kept),
        unknown=sum(line.count(UNKNOWN) for line in ids),
    )


def line_nll(model: nn.Module, ids: Sequence[Sequence[int]], *, batch_tokens: int = 8192) -> Tensor:
    """-log P(line and its end | its start) of each line, in nats, [lines] float64 on the CPU.

    Runs in eval mode without gradients, and leaves the mode as it was. Lines are batched by length.

    Args:
        ids: each line's tokens, without boundaries; may be empty.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens: expected at least 1, got {batch_tokens}")
    device = next(model.parameters()).device
    result = torch.zeros(len(ids), dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for some in _batches(ids, batch_tokens):
                width = len(ids[some[0]]) + 1  # the longest comes first
                tokens = torch.full((len(some), width + 1), BOUNDARY)
                for row, i in enumerate(some):
                    tokens[row, 1 : len(ids[i]) + 1] = torch.tensor(ids[i], dtype=torch.int64)
                tokens = tokens.to(device)
                logits = model(tokens[:, :-1]).flatten(0, 1)
                wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
                nll = F.cross_entropy(wide, tokens[:, 1:].flatten(), reduction="none")
                nll = nll.view(len(some), width)
                lengths = torch.tensor([len(ids[i]) + 1 for i in some], device=device)
                past = torch.arange(width, device=device) >= lengths[:, None]
                result[some] = nll.masked_fill(past, 0.0).sum(1, dtype=torch.float64).cpu()
    finally:
        model.train(training)
    return result


def _batches(ids: Sequence[Sequence[int]], batch_tokens: int) -> Iterable[list[int]]:
    """Indices of lines, longest first, in groups that fit batch_tokens when padded."""
    group: list[int] = []
    width = 0
    for i in sorted(range(len(ids)), key=lambda i: -len(ids[i])):
        if group and (len(group) + 1) * width > batch_tokens:
            yield group
            group = []
        if not group:
            width = len(ids[i]) + 1
        group.append(i)
    if group:
        yield group
