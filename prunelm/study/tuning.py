"""Chooses the search's settings on validation utterances, never on the test set."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from prunelm.metrics.wer import word_error_rate
from prunelm.models.lm import TransformerLM
from prunelm.study.grid import Progress
from prunelm.study.recognition import Searching, encode, transcribe
from prunelm.study.results import read_json
from prunelm.study.testbed import TestBed

# Where the walk to the best LM weight and token reward begins, and its steps. A language model
# makes long outputs unlikely; a reward per token pays that back.
START = (0.3, 1.0)
STEPS = (0.1, 0.5)


@dataclass(frozen=True)
class Searches:
    """The search without a language model and the one with it, each at its own best."""

    alone: Searching
    fused: Searching


def searches_before(out: Path | str) -> Searches | None:
    """What a stopped run of a study in this folder had chosen."""
    path = Path(out) / "study.json"
    if not path.is_file():
        return None
    study = read_json(path)["study"]
    alone = Searching(study["beam"], 0.0, study["token_reward_without_lm"])
    return Searches(alone, Searching(study["beam"], study["lm_weight"], study["token_reward"]))


def choose_searches(
    bed: TestBed, beam: int, weight: float | None, reward: float | None, progress: Progress
) -> Searches:
    """The weight and reward with the fewest word errors on the validation utterances.

    Args:
        weight: of the LM; None: chosen, 0.3 where there are no validation utterances.
        reward: per token, with and without the LM; None: chosen, 0 without utterances.
    """
    tried = Searches(
        Searching(beam, 0.0, 0.0 if reward is None else reward),
        Searching(beam, 0.3 if weight is None else weight, 0.0 if reward is None else reward),
    )
    if bed.recogniser is None or not bed.valid or (weight is not None and reward is not None):
        return tried
    progress.doing(f"choosing the LM's weight on {len(bed.valid)} validation utterances")
    batches = encode(bed.recogniser, bed.valid)
    steps = (0.0 if weight is not None else STEPS[0], 0.0 if reward is not None else STEPS[1])
    start = (START[0] if weight is None else weight, START[1] if reward is None else reward)
    texts = {utterance.id: utterance.text for utterance in bed.valid}

    def errors(lm: TransformerLM | None, how: Searching) -> float:
        assert bed.recogniser is not None
        heard = transcribe(bed.recogniser, bed.tokenizer, batches, lm, how)
        return word_error_rate([texts[name] for name in heard], [*heard.values()]).rate

    def alone_at(place: tuple[float, float]) -> Searching:
        return replace(tried.alone, reward=place[1])

    def fused_at(place: tuple[float, float]) -> Searching:
        return replace(tried.fused, weight=place[0], reward=place[1])

    best, alone_wer = walk(lambda x: errors(None, alone_at(x)), (0.0, start[1]), (0.0, steps[1]))
    alone = alone_at(best)
    best, fused_wer = walk(lambda x: errors(bed.lm, fused_at(x)), start, steps)
    fused = fused_at(best)
    progress.say(
        f"chosen on {len(bed.valid)} validation utterances: without LM reward {alone.reward:g} "
        f"(WER {100 * alone_wer:.1f} %), LM weight {fused.weight:g} and reward {fused.reward:g} "
        f"(WER {100 * fused_wer:.1f} %)"
    )
    return Searches(alone, fused)


def walk(
    cost: Callable[[tuple[float, float]], float],
    start: tuple[float, float],
    steps: tuple[float, float],
) -> tuple[tuple[float, float], float]:
    """Goes from neighbour to neighbour on a grid, to the best of four, while that one is better.

    Args:
        cost: what is to be low; called once for each place.
        start: where to begin; no number falls below 0.
        steps: of the grid; 0 leaves that number as it is.

    Returns:
        the place where no neighbour is better, and its cost.
    """
    known: dict[tuple[float, float], float] = {start: cost(start)}
    here = start
    while True:
        around = {
            (round(here[0] + a * steps[0], 6), round(here[1] + b * steps[1], 6))
            for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1))
        }
        for place in sorted(around):
            if min(place) >= 0 and place not in known:
                known[place] = cost(place)
        best = min((place for place in {*around, here} if place in known), key=lambda p: known[p])
        if known[best] >= known[here]:
            return here, known[here]
        here = best
