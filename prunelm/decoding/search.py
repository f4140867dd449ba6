"""Modified beam search for transducers, batched, with language models fused on the prefix tree."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from prunelm.decoding.fusion import Fusion, LMRows, check_names
from prunelm.decoding.prefix_tree import NewRows, PrefixTree
from prunelm.decoding.row_independent import row_independent
from prunelm.ops.beam_step import BeamStep, Prune, Term, beam_step

BLANK = 0


class Recogniser(Protocol):
    """What a search needs of a transducer; `Transducer` has it."""

    @property
    def context_size(self) -> int | None:
        """How many last tokens `predict` reads; None: the whole prefix, behind one blank."""

    def predict(self, context: Tensor, /) -> Tensor:
        """[R, C] int64 -> [R, P]."""

    def project_encoded(self, encoded: Tensor, /) -> Tensor:
        """[..., D] -> [..., J]."""

    def project_predicted(self, predicted: Tensor, /) -> Tensor:
        """[..., P] -> [..., J]."""

    def join_projected(self, encoded: Tensor, predicted: Tensor, /) -> Tensor:
        """[..., J], [..., J] -> logits [..., V]."""


@dataclass(frozen=True)
class Hypothesis:
    """One entry of an n-best list.

    Attributes:
        tokens: without blanks.
        score: log-score of all alignments that the search has merged, as it is, not normalised.
        parts: how score is made up: "am", each fusion by its name (weight included), and "reward"
            if there was one.
        times: the encoder frame that emitted each token, in the best alignment.
        confidence: the acoustic probability of each token in that frame, fusion left out.
    """

    tokens: tuple[int, ...]
    score: float
    parts: Mapping[str, float] = field(hash=False)
    times: tuple[int, ...]
    confidence: tuple[float, ...]


@dataclass(frozen=True)
class _Options:
    """What `mbs` was asked for, checked."""

    beam: int
    silent: tuple[int, ...]
    prune: Prune
    weigh_blank: bool
    temperature: float
    blank_penalty: float
    token_reward: float
    final_eos: bool

    @property
    def lazy(self) -> bool:
        """Terms are added after pruning, so only extended prefixes need a language model row."""
        return self.prune == "after" and not self.weigh_blank


def mbs(
    model: Recogniser,
    encoded: Tensor,
    lengths: Tensor,
    beam: int = 4,
    fusions: Sequence[Fusion] = (),
    *,
    nbest: int | None = None,
    length_norm: bool = True,
    prune: Prune = "after",
    silent: Sequence[int] = (BLANK,),
    weigh_blank: bool = False,
    temperature: float = 1.0,
    blank_penalty: float = 0.0,
    token_reward: float = 0.0,
    final_eos: bool = False,
) -> list[list[Hypothesis]]:
    """Modified beam search: one symbol a frame, equal prefixes merged (icefall's semantics).

    In each frame the best `beam` extensions of an utterance's hypotheses are chosen by
    `beam_step`; blank leaves a hypothesis where it is, any other token makes a new prefix; equal
    prefixes are added as probabilities, and their slots are not refilled. Each language model runs
    at most once for each distinct prefix, for all utterances in one call, its keys and values kept
    on the prefix tree: with `prune="after"` only for prefixes that are extended, else for all that
    survive the merging.

    Given the encoder's outputs, an utterance's result does not depend on its batch, bit for bit (on
    the CPU): see `row_independent`.

    Args:
        model: the recogniser; runs in eval mode.
        encoded: [B, T, D] from `model.encode`.
        lengths: [B] int64, 0 to T.
        beam: hypotheses kept for each utterance.
        fusions: language models with their weights.
        nbest: hypotheses returned for each utterance at most; None: all that are left.
        length_norm: order the n-best by score / (tokens + context size), as icefall does; else by
            score.
        prune, silent, weigh_blank, temperature, blank_penalty, token_reward: as in `beam_step`.
        final_eos: at an utterance's end each language model adds log P(sentence ends).

    Returns:
        For each utterance its hypotheses, best first. One empty hypothesis of score 0 where the
        length is 0, of score -inf where no hypothesis was left.

    Raises:
        ValueError: an argument is not as above, vocabularies differ, or a score became NaN.
    """
    check_search_input(encoded, lengths)
    check_names(fusions)
    for name, value in (("beam", beam), ("nbest", 1 if nbest is None else nbest)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    options = _Options(
        beam, tuple(silent), prune, weigh_blank, temperature, blank_penalty, token_reward, final_eos
    )
    with torch.inference_mode(), evaluating([model, *(fusion.lm for fusion in fusions)]):
        # Longest first, so that the utterances still running are always the first n.
        order = lengths.cpu().argsort(descending=True, stable=True)
        search = _Search(
            model, encoded[order.to(encoded.device)], lengths[order], order, fusions, options
        )
        found = search.run()
    pads = model.context_size or 1

    def rank(hypothesis: Hypothesis) -> float:
        return hypothesis.score / (len(hypothesis.tokens) + pads if length_norm else 1)

    results: list[list[Hypothesis]] = [[] for _ in range(len(encoded))]
    for at, hypotheses in zip(order.tolist(), found, strict=True):
        results[at] = sorted(hypotheses, key=rank, reverse=True)[:nbest]
    return results


class _Search:
    """One call of `mbs`: the tree, and the rows that the models computed for its nodes."""

    def __init__(
        self,
        model: Recogniser,
        encoded: Tensor,
        lengths: Tensor,
        order: Tensor,
        fusions: Sequence[Fusion],
        options: _Options,
    ) -> None:
        model = row_independent(model)
        self.model, self.options, self.order = model, options, order
        self.lengths: list[int] = lengths.tolist()
        self.device = encoded.device
        self.frames = model.project_encoded(encoded)
        self.predicted = self.frames.new_empty(0, self.frames.shape[-1])
        start = torch.zeros(1, model.context_size or 1, dtype=torch.int64, device=self.device)
        empty = self.frames.new_zeros(1, self.frames.shape[-1])
        vocabulary = model.join_projected(
            empty, model.project_predicted(model.predict(start))
        ).shape[-1]
        self.weight = [fusion.weights(len(order))[order] for fusion in fusions]
        self.lms = [LMRows(fusion, vocabulary) for fusion in fusions]
        self.tree = PrefixTree(
            len(order),
            options.beam,
            terms=len(fusions),
            vocabulary=vocabulary,
            silent=options.silent,
        )

    def run(self) -> list[list[Hypothesis]]:
        """N-best lists in the order of the lengths, not sorted."""
        running = len(self.lengths)
        found: list[list[Hypothesis]] = [[] for _ in range(running)]
        for time in range(max(self.lengths, default=0) + 1):
            while running and self.lengths[running - 1] <= time:
                running -= 1
                found[running] = self.finish(running)
            if running:
                self.step(running, time)
        return found

    def step(self, n: int, time: int) -> None:
        """Moves the first n utterances over one frame."""
        tree, beam = self.tree, self.options.beam
        self.predict(tree.take_new(self.model.context_size))
        node = tree.node[:n].flatten().to(self.device)
        predicted = self.predicted.index_select(0, node).view(n, beam, -1)
        logits = self.model.join_projected(self.frames[:n, time, None], predicted)
        step = self.choose(n, logits)
        if step.bad.any():
            self.refuse_nan(int(step.bad.int().argmax()), time, "a score")
        bad = tree.advance(time, step, self.values(step) if self.options.lazy else None)
        if bad >= 0:
            self.refuse_nan(bad, time, "a language model's score")

    def choose(self, n: int, logits: Tensor) -> BeamStep:
        """The frame's `beam_step`, brought to the CPU."""
        terms: list[Term] = []
        if not self.options.lazy and self.lms:
            new = self.tree.plan_live(0, n)
            self.compute(new)
            row = self.tree.row[:n].to(self.device)
            terms = [
                (lm.rows, row, weight[:n].to(self.device))
                for lm, weight in zip(self.lms, self.weight, strict=True)
            ]
        options = self.options
        step = beam_step(
            self.tree.score[:n].to(self.device),
            logits,
            terms,
            silent=options.silent,
            token_reward=options.token_reward,
            temperature=options.temperature,
            blank_penalty=options.blank_penalty,
            prune=options.prune,
            weigh_blank=options.weigh_blank,
        )
        return step if self.device.type == "cpu" else BeamStep(*(x.cpu() for x in step))

    def values(self, step: BeamStep) -> Tensor | None:
        """What the terms add to the chosen extensions, [terms, n, W]; None: nothing."""
        planned = self.tree.plan(step) if self.lms else None
        if planned is None:
            return None
        new, flat = planned
        self.compute(new)
        at = flat.clamp_min(0).to(self.device)
        n = len(flat)
        values = [
            lm.rows.view(-1)[at].to("cpu", torch.float64) * weight[:n, None]
            for lm, weight in zip(self.lms, self.weight, strict=True)
        ]
        # A weight of 0 leaves a term out, whatever it says.
        return torch.stack(values).where(torch.stack(self.weight)[:, :n, None] != 0, 0)

    def compute(self, new: NewRows) -> None:
        if len(new.place):
            new = NewRows(*(x.to(self.device) for x in new))
            for lm in self.lms:
                lm.compute(new, self.tree.row_capacity)

    def predict(self, new: NewRows) -> None:
        """Projected predictor rows of new nodes."""
        if not len(new.place):
            return
        capacity = self.tree.node_capacity
        if capacity > len(self.predicted):
            more = self.predicted.new_empty(2 * capacity, self.predicted.shape[1])
            more[: len(self.predicted)] = self.predicted
            self.predicted = more
        path = new.path.to(self.device)
        if self.model.context_size is None:
            # Alone and without padding, so that a prefix's row depends on the prefix only.
            each = [path[r : r + 1, -length:] for r, length in enumerate(new.length.tolist())]
            predicted = torch.cat([self.model.predict(context) for context in each])
        else:
            predicted = self.model.predict(path)
        self.predicted[new.place.to(self.device)] = self.model.project_predicted(predicted)

    def finish(self, b: int) -> list[Hypothesis]:
        """The hypotheses of utterance b, whose nodes are then let go."""
        ends = self.ends(b) if self.options.final_eos and self.lms else None
        found = []
        for w in range(self.options.beam):
            score = float(self.tree.score[b, w])
            if score == -math.inf:
                continue
            tokens, times, log_probs = self.tree.emissions(b, w)
            values = self.tree.parts[b, w].clone()
            if ends is not None:
                values[1:] += ends[w]
                score += float(ends[w].sum())
            parts = dict(
                zip(("am", *(lm.fusion.name for lm in self.lms)), values.tolist(), strict=True)
            )
            if self.options.token_reward:
                parts["reward"] = self.options.token_reward * len(tokens)
            confidence = tuple(math.exp(log_prob) for log_prob in log_probs)
            found.append(Hypothesis(tuple(tokens), score, parts, tuple(times), confidence))
        self.tree.release(b)
        return found or [Hypothesis((), -math.inf, {}, (), ())]

    def ends(self, b: int) -> Tensor:
        """What each term adds for the end of the sentence, [W, terms]."""
        self.compute(self.tree.plan_live(b, b + 1))
        at = self.tree.row[b].to(self.device)
        each = [
            lm.rows[at, BLANK].to("cpu", torch.float64) * weight[b]
            for lm, weight in zip(self.lms, self.weight, strict=True)
        ]
        return torch.stack(each, -1)

    def refuse_nan(self, b: int, time: int, what: str) -> None:
        raise ValueError(
            f"encoded: expected scores that are numbers, got {what} that is NaN or +inf in "
            f"utterance {int(self.order[b])} at frame {time}"
        )


def check_search_input(encoded: Tensor, lengths: Tensor) -> None:
    """Refuses what is not encoded [B, T, D] with lengths [B] int64 from 0 to T."""
    if encoded.dim() != 3:
        raise ValueError(f"encoded: expected [B, T, D], got {list(encoded.shape)}")
    if lengths.shape != encoded.shape[:1] or lengths.dtype != torch.int64:
        raise ValueError(
            f"lengths: expected [{len(encoded)}] int64, got {list(lengths.shape)} {lengths.dtype}"
        )
    if len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= encoded.shape[1]:
        raise ValueError(f"lengths: expected 0 to T = {encoded.shape[1]}, got {lengths.tolist()}")


@contextmanager
def evaluating(models: Iterable[object]) -> Iterator[None]:
    """Eval mode inside, the former mode afterwards."""
    trained = [model for model in models if isinstance(model, nn.Module) and model.training]
    for model in trained:
        model.eval()
    try:
        yield
    finally:
        for model in trained:
            model.train()
