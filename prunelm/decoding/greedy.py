"""Greedy search for transducers, batched: every utterance moves over its frames at its own pace."""

from collections.abc import Sequence

import torch
from torch import Tensor

from prunelm.decoding.row_independent import row_independent
from prunelm.decoding.search import (
    BLANK,
    Hypothesis,
    Recogniser,
    check_search_input,
    evaluating,
)
from prunelm.ops.beam_step import beam_step

# Frames looked at in one call. Most emit nothing, so that a call with several of them saves calls.
_WINDOW = 8


def greedy(
    model: Recogniser,
    encoded: Tensor,
    lengths: Tensor,
    *,
    max_symbols: int = 5,
    silent: Sequence[int] = (BLANK,),
    temperature: float = 1.0,
    blank_penalty: float = 0.0,
) -> list[list[Hypothesis]]:
    """The best token at every step, no language model; with max_symbols 1 it is `mbs` of beam 1.

    Args:
        model: the recogniser; runs in eval mode.
        encoded: [B, T, D] from `model.encode`.
        lengths: [B] int64, 0 to T.
        max_symbols: how many tokens one frame may emit.
        silent, temperature, blank_penalty: as in `beam_step`. A silent token ends its frame.

    Returns:
        For each utterance a list of one hypothesis; its score is that of one alignment.

    Raises:
        ValueError: an argument is not as above, or a score is NaN.
    """
    check_search_input(encoded, lengths)
    if max_symbols < 1:
        raise ValueError(f"max_symbols: expected at least 1, got {max_symbols}")
    if not len(encoded):
        return []
    with torch.inference_mode(), evaluating([model]):
        return _Greedy(model, encoded, lengths, silent, temperature, blank_penalty).run(max_symbols)


class _Greedy:
    def __init__(
        self,
        model: Recogniser,
        encoded: Tensor,
        lengths: Tensor,
        silent: Sequence[int],
        temperature: float,
        blank_penalty: float,
    ) -> None:
        self.model, self.silent = row_independent(model), list(silent)
        self.temperature, self.blank_penalty = temperature, blank_penalty
        self.lengths = lengths.to(encoded.device)
        self.frames = self.model.project_encoded(encoded)
        self.tokens: list[list[int]] = [[] for _ in range(len(encoded))]
        self.times: list[list[int]] = [[] for _ in range(len(encoded))]
        self.confidence: list[list[float]] = [[] for _ in range(len(encoded))]
        self.score = torch.zeros(len(encoded), dtype=torch.float64)
        start = torch.arange(len(encoded))
        self.predicted = self.predict(start)

    def run(self, max_symbols: int) -> list[list[Hypothesis]]:
        time = torch.zeros_like(self.lengths)
        emitted = torch.zeros_like(self.lengths)  # tokens of the frame at `time`
        while True:
            running = (time < self.lengths).nonzero()[:, 0]
            if not len(running):
                break
            offset, token, log_prob = self.look(running, time[running])
            time[running] += offset
            emitted[running] = emitted[running].where(offset == 0, 0)
            emits = time[running] < self.lengths[running]
            emits &= token >= 0
            emitters = running[emits]
            self.keep(emitters, time[emitters], token[emits], log_prob[emits])
            emitted[emitters] += 1
            full = emitters[emitted[emitters] == max_symbols]
            time[full] += 1
            emitted[full] = 0
        rows = zip(self.tokens, self.score.tolist(), self.times, self.confidence, strict=True)
        return [
            [Hypothesis(tuple(tokens), score, {"am": score}, tuple(times), tuple(confidence))]
            for tokens, score, times, confidence in rows
        ]

    def look(self, running: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How many frames pass in silence, then the token (-1: none in the window), its log-prob.

        All [A] for the A running utterances; the scores of what passed are added.
        """
        window = torch.arange(_WINDOW, device=time.device)
        frame = time[:, None] + window
        inside = frame < self.lengths[running, None]
        frames = self.frames[running[:, None], frame.clamp_max(self.frames.shape[1] - 1)]
        logits = self.model.join_projected(frames, self.predicted[running, None])
        count = logits.shape[:2].numel()
        best = beam_step(
            torch.zeros(count, 1, dtype=torch.float64, device=logits.device),
            logits.reshape(count, 1, -1),
            silent=self.silent,
            temperature=self.temperature,
            blank_penalty=self.blank_penalty,
        )
        token, log_prob = best.token.view_as(frame), best.parts.view_as(frame)
        bad = best.bad.view_as(frame) & inside
        if bad.any():
            row = int(bad.any(1).int().argmax())
            where = f"utterance {int(running[row])} at frame {int(frame[row][bad[row]][0])}"
            raise ValueError(f"encoded: expected scores that are numbers, got NaN in {where}")
        silent = torch.isin(token, torch.tensor(self.silent, device=token.device)) & inside
        offset = silent.int().cumprod(1).sum(1)
        passed = window < offset[:, None]
        # One after the other, as a search over frames adds them.
        emits = (offset < _WINDOW) & (time + offset < self.lengths[running])
        counted = log_prob.where(passed | ((window == offset[:, None]) & emits[:, None]), 0)
        self.score[running] += counted.cumsum(1)[:, -1]
        at = offset.clamp_max(_WINDOW - 1)[:, None]
        return offset, token.gather(1, at)[:, 0].where(emits, -1), log_prob.gather(1, at)[:, 0]

    def keep(self, emitters: Tensor, time: Tensor, token: Tensor, log_prob: Tensor) -> None:
        if not len(emitters):
            return
        rows = zip(
            emitters.tolist(), time.tolist(), token.tolist(), log_prob.exp().tolist(), strict=True
        )
        for b, frame, symbol, confidence in rows:
            self.tokens[b].append(symbol)
            self.times[b].append(frame)
            self.confidence[b].append(confidence)
        self.predicted[emitters] = self.predict(emitters)

    def predict(self, utterances: Tensor) -> Tensor:
        """Projected predictor rows of the utterances' prefixes."""
        size = self.model.context_size
        prefixes = [self.tokens[b] for b in utterances.tolist()]
        device = self.frames.device
        if size is None:
            # One at a time, so that a prefix's row depends on the prefix only.
            each = [torch.tensor([[BLANK, *prefix]], device=device) for prefix in prefixes]
            predicted = [self.model.predict(context) for context in each]
            return self.model.project_predicted(torch.cat(predicted))
        context = [([BLANK] * size + prefix)[-size:] for prefix in prefixes]
        return self.model.project_predicted(
            self.model.predict(torch.tensor(context, device=device))
        )
