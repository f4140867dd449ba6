"""Chooses the search's settings on validation utterances, never on the test set."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prunelm.metrics.wer import word_error_rate
from prunelm.models.lm import TransformerLM
from prunelm.study.grid import Progress
from prunelm.study.recognition import Encoded, Searching, encode, transcribe
from prunelm.study.results import read_json
from prunelm.study.testbed import TestBed

WEIGHTS = (0.1, 0.2, 0.3, 0.4)
# A language model makes long outputs unlikely; a reward per token pays that back.
REWARDS = (0.0, 0.5, 1.0, 1.5)


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
    weights = WEIGHTS if weight is None else (weight,)
    rewards = REWARDS if reward is None else (reward,)
    alone, alone_wer = _best(bed, batches, None, tried.alone, (0.0,), rewards)
    fused, fused_wer = _best(bed, batches, bed.lm, tried.fused, weights, rewards)
    progress.say(
        f"chosen on {len(bed.valid)} validation utterances: without LM reward {alone.reward:g} "
        f"(WER {100 * alone_wer:.1f} %), LM weight {fused.weight:g} and reward {fused.reward:g} "
        f"(WER {100 * fused_wer:.1f} %)"
    )
    return Searches(alone, fused)


def _best(
    bed: TestBed,
    batches: Sequence[Encoded],
    lm: TransformerLM | None,
    start: Searching,
    weights: Sequence[float],
    rewards: Sequence[float],
) -> tuple[Searching, float]:
    assert bed.recogniser is not None
    texts = {utterance.id: utterance.text for utterance in bed.valid}
    found = []
    for weight in weights:
        for reward in rewards:
            how = replace(start, weight=weight, reward=reward)
            heard = transcribe(bed.recogniser, bed.tokenizer, batches, lm, how)
            references = [texts[name] for name in heard]
            found.append((how, word_error_rate(references, [*heard.values()]).rate))
    return min(found, key=lambda each: each[1])
