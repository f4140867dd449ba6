"""Hypotheses as nodes of one prefix tree: merging is exact, a reorder copies integers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import prunelm._C as _C
from prunelm.ops.beam_step import BeamStep


class NewRows(NamedTuple):
    """R nodes whose rows (of a language model or of the predictor) are to be computed.

    Attributes:
        place: [R] int64, where each row goes.
        tokens: [R] int64, each node's own token.
        path: [R, P] int64. Language models: the rows from the root to the node, 0 past length.
            Predictor: the last P tokens, the newest last, filled up with 0 at the left.
        length: [R] int64, the node's depth plus one.
    """

    place: Tensor
    tokens: Tensor
    path: Tensor
    length: Tensor


class PrefixTree:
    """The beams of B utterances.

    A node is a token sequence, and all utterances share the tree: what has been computed for a
    sequence serves every hypothesis that holds it. The root is token 0, the language models'
    sentence boundary and the predictor's start. Nodes that no hypothesis needs are kept for a few
    frames, in case they come back, and then their numbers and rows are given to new ones, so that
    nothing ever moves. Times and acoustic log-probs belong to hypotheses, since one sequence has
    many alignments; where two hypotheses merge, the scores are added as probabilities and the
    first one's times stay.

    Attributes:
        score: [B, W] float64, -inf in dead slots; a view that `advance` updates.
        parts: [B, W, 1 + terms] float64, how score is made up: acoustic, then each term.
        node: [B, W] int64, 0 in dead slots.
        row: [B, W] int64, the language models' row of each hypothesis, after `plan_live`.
    """

    def __init__(
        self, utterances: int, beam: int, *, terms: int, vocabulary: int, silent: Sequence[int]
    ) -> None:
        self._tree = _C.PrefixTree(utterances, beam, terms, vocabulary, list(silent))
        self.score = torch.from_numpy(self._tree.score())
        self.parts = torch.from_numpy(self._tree.parts())
        self.node = torch.from_numpy(self._tree.node())
        self.row = torch.from_numpy(self._tree.row())

    @property
    def node_capacity(self) -> int:
        """Above every number in `node` and every index from `take_new`."""
        return self._tree.node_capacity()

    @property
    def row_capacity(self) -> int:
        """Above every index and path from `plan` and `plan_live`."""
        return self._tree.row_capacity()

    @property
    def live_nodes(self) -> int:
        """How many nodes are kept."""
        return self._tree.live_nodes()

    def plan(self, step: BeamStep) -> tuple[NewRows, Tensor] | None:
        """What the chosen extensions need from the language models, before `advance`.

        Returns:
            None if all are silent. Else the nodes that lack a row, and [n, W] int64: where each
            extension's value lies in the rows [.., V] laid out flat, -1 for the silent ones.
        """
        planned = self._tree.plan(step.parent.numpy(), step.token.numpy(), step.score.numpy())
        if planned is None:
            return None
        return _new_rows(planned[0]), torch.from_numpy(planned[1])

    def plan_live(self, begin: int, end: int) -> NewRows:
        """The nodes that lack a row among utterances begin to end; sets their `row`."""
        return _new_rows(self._tree.plan_live(begin, end))

    def advance(self, time: int, step: BeamStep, values: Tensor | None = None) -> int:
        """Moves the first n utterances to what `beam_step` chose, and merges.

        Args:
            time: the frame.
            step: of n utterances, on the CPU, float64.
            values: [terms, n, W] float64, what the terms add, where step has them not yet.

        Returns:
            The first utterance where a score became NaN or +inf, or -1.
        """
        return self._tree.advance(
            time,
            step.parent.numpy(),
            step.token.numpy(),
            step.score.numpy(),
            step.parts.numpy(),
            None if values is None else values.numpy(),
        )

    def take_new(self, context: int | None) -> NewRows:
        """Nodes that the predictor has not seen; context None: their whole prefix from the root."""
        return _new_rows(self._tree.take_new(context or 0))

    def emissions(self, utterance: int, slot: int) -> tuple[list[int], list[int], list[float]]:
        """Tokens of a hypothesis, their frames and their acoustic log-probs."""
        return self._tree.emissions(utterance, slot)

    def release(self, utterance: int) -> None:
        """Lets go of an utterance's hypotheses."""
        self._tree.release(utterance)


def _new_rows(arrays: "_C._Rows") -> NewRows:
    return NewRows(*map(torch.from_numpy, arrays))
