"""Shallow fusion: which language models join the search, and their rows on the prefix tree."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from prunelm.decoding.prefix_tree import NewRows
from prunelm.decoding.row_independent import row_independent


class SteppedLM(Protocol):
    """What the search needs of a language model; `TransformerLM` has it.

    `new_cache` returns something with `select(slots, capacity)`, as `KVCache`.
    """

    def new_cache(self, capacity: int, /) -> Any:
        """An empty cache for `capacity` nodes."""

    def step(self, tokens: Tensor, path: Tensor, length: Tensor, cache: Any, /) -> Tensor:
        """Logits [R, V] after R new nodes, see `TransformerLM.step`."""


@dataclass(frozen=True)
class Fusion:
    """One language model in the search.

    Adds weight * log P(token | tokens before) to the score of every token that is not silent. A
    negative weight subtracts: an estimate of the internal language model, a density ratio, LODR.

    Attributes:
        lm: on the recogniser's tokens; token 0 starts and ends its sentences.
        weight: one number, or one for each utterance.
        name: under which its part of the score is reported.
    """

    lm: SteppedLM
    weight: float | Sequence[float]
    name: str = "lm"

    def weights(self, utterances: int) -> Tensor:
        """[B] float64."""
        weight = torch.as_tensor(self.weight, dtype=torch.float64)
        if weight.dim() == 0:
            return weight.repeat(utterances)
        if weight.shape != (utterances,):
            raise ValueError(
                f"weight of {self.name!r}: expected one number or {utterances}, "
                f"got {list(weight.shape)}"
            )
        return weight


def check_names(fusions: Sequence[Fusion]) -> None:
    """Refuses names that `Hypothesis.parts` could not tell apart."""
    names = ["am", "reward", *(fusion.name for fusion in fusions)]
    if len(set(names)) < len(names):
        raise ValueError(f"fusions: expected distinct names besides am and reward, got {names[2:]}")


class LMRows:
    """A language model's log-probs and cache, one row for each node of a tree that needed one.

    Attributes:
        rows: [C, V] float32 (float64 from a float64 model), log P(token | node).
        computed: how many rows have been computed so far.
    """

    def __init__(self, fusion: Fusion, vocabulary: int) -> None:
        self.fusion = fusion
        self.lm = row_independent(fusion.lm)
        self.vocabulary = vocabulary
        self.capacity = 0
        self.computed = 0
        self.cache: Any = None
        self.rows = torch.empty(0, vocabulary)

    def compute(self, new: NewRows, capacity: int) -> None:
        """Runs the model once for all new nodes; `capacity` is above all their indices."""
        if not len(new.place):
            return
        if capacity > self.capacity:
            self._grow(max(256, 2 * capacity))
        logits = self.lm.step(new.tokens, new.path, new.length, self.cache)
        if logits.shape[-1] != self.vocabulary:
            raise ValueError(
                f"fusion {self.fusion.name!r}: expected a model of {self.vocabulary} tokens like "
                f"the recogniser's, got {logits.shape[-1]}"
            )
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        if not self.computed:
            self.rows = self.rows.to(log_probs)
        self.rows[new.place.to(log_probs.device)] = log_probs
        self.computed += len(new.place)

    def _grow(self, capacity: int) -> None:
        if self.cache is None:
            self.cache = self.lm.new_cache(capacity)
        else:
            self.cache = self.cache.select(torch.arange(self.capacity), capacity)
        self.rows = torch.cat(
            [self.rows, self.rows.new_empty(capacity - self.capacity, self.vocabulary)]
        )
        self.capacity = capacity
