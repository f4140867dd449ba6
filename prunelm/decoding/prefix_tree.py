"""Hypotheses as nodes of one prefix tree: merging is exact, a reorder copies integers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

import prunelm._C as _C
from prunelm.ops.beam_step import BeamStep
from prunelm.ops.tensors import check_tensors


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

    What a method refuses changes nothing: IndexError for an utterance, slot or token that there is
    not, ValueError for the rest (a shape, a dtype, a dead parent, more nodes or emissions than fit
    into int32, more numbers than any beam has), TypeError for what is no number or tensor.

    Args:
        utterances: B.
        beam: W, at least 1.
        terms: how many terms of `beam_step` scores are made of.
        vocabulary: V, at least 1.
        silent: tokens that extend nothing.

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
        _check_step(step)
        arrays = _arrays(parent=step.parent, token=step.token, score=step.score)
        planned = self._tree.plan(*arrays)
        if planned is None:
            return None
        return _new_rows(planned[0]), torch.from_numpy(planned[1])

    def plan_live(self, begin: int, end: int) -> NewRows:
        """The nodes that lack a row among utterances begin to end; sets their `row`."""
        return _new_rows(self._tree.plan_live(begin, end))

    def advance(self, time: int, step: BeamStep, values: Tensor | None = None) -> int:
        """Moves the first n utterances to what `beam_step` chose, and merges.

        Args:
            time: the frame, from 0 on.
            step: of n utterances, on the CPU; score and parts [n, W, 1 to 1 + terms] float64.
            values: [terms, n, W] float64, what the terms add, where step has them not yet.

        Returns:
            The first utterance where a score became NaN or +inf, or -1.
        """
        _check_step(step)
        parent, token, score, parts = _arrays(
            parent=step.parent, token=step.token, score=step.score, parts=step.parts
        )
        added = None if values is None else _arrays(values=values)[0]
        return self._tree.advance(time, parent, token, score, parts, added)

    def take_new(self, context: int | None) -> NewRows:
        """Nodes that the predictor has not seen; context None: their whole prefix from the root."""
        return _new_rows(self._tree.take_new(0 if context is None else context))

    def emissions(self, utterance: int, slot: int) -> tuple[list[int], list[int], list[float]]:
        """Tokens of a hypothesis, their frames and their acoustic log-probs."""
        return self._tree.emissions(utterance, slot)

    def release(self, utterance: int) -> None:
        """Lets go of an utterance's hypotheses."""
        self._tree.release(utterance)


def _check_step(step: BeamStep) -> None:
    if not isinstance(step, BeamStep):
        raise TypeError(f"step: expected a BeamStep, got {type(step).__name__}")


def _arrays(**tensors: Tensor) -> list[NDArray[Any]]:
    """Views of CPU tensors for the extension, which looks at shapes and numbers."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: expected a tensor on the CPU, got {tensor.device}")
        if tensor.dtype not in (torch.int32, torch.int64, torch.float32, torch.float64):
            raise ValueError(f"{name}: expected int64 or float64 numbers, got {tensor.dtype}")
    try:
        check_tensors(**tensors)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return [tensor.detach().resolve_neg().numpy() for tensor in tensors.values()]


def _new_rows(arrays: "_C._Rows") -> NewRows:
    return NewRows(*map(torch.from_numpy, arrays))
