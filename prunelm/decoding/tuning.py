"""Chooses a search's LM weight and token reward on validation utterances, never on the test set."""

from collections.abc import Callable, Sequence

from prunelm.data.speech import Utterance
from prunelm.decoding.options import SearchOptions
from prunelm.decoding.transcribe import best_words, encode, search
from prunelm.metrics.wer import word_error_rate
from prunelm.training.pretrained import ChosenSearch, LoadedLM, LoadedRecogniser

# Where the walk to the best LM weight and token reward begins, and its steps. A language model
# makes long outputs unlikely; a reward per token pays that back.
START = (0.3, 1.0)
STEPS = (0.1, 0.5)


def choose_search(
    recogniser: LoadedRecogniser,
    lm: LoadedLM | None,
    utterances: Sequence[Utterance],
    beam: int = 4,
    *,
    lm_weight: float | None = None,
    token_reward: float | None = None,
    tried: Callable[[SearchOptions, float], None] = lambda options, wer: None,
) -> ChosenSearch:
    """The LM weight and token reward with the fewest word errors, by a walk on a grid.

    Args:
        lm: None: the token reward alone is chosen.
        utterances: with transcripts; not those that results are reported on.
        beam: hypotheses kept, at least 1.
        lm_weight, token_reward: held at this value; None: chosen.
        tried: is told each place and its word error rate.

    Raises:
        ValueError: no utterances, a beam below 1, or different tokenizers.
    """
    if not utterances:
        raise ValueError("utterances: expected at least one to choose by, got none")
    if beam < 1:
        raise ValueError(f"beam: expected at least 1, got {beam}")
    if lm is not None:
        recogniser.tokenizer.check(lm.tokenizer.fingerprint, str(lm.folder))
    batches = encode(recogniser.model, utterances)
    texts = {utterance.id: utterance.text for utterance in utterances}

    def cost(place: tuple[float, float]) -> float:
        options = SearchOptions(beam, *place)
        found = search(recogniser.model, batches, None if lm is None else lm.model, options)
        words = best_words(found, recogniser.tokenizer)
        rate = word_error_rate([texts[name] for name in words], [*words.values()]).rate
        tried(options, rate)
        return rate

    weight = 0.0 if lm is None else START[0] if lm_weight is None else lm_weight
    start = (weight, START[1] if token_reward is None else token_reward)
    steps = (
        0.0 if lm is None or lm_weight is not None else STEPS[0],
        0.0 if token_reward is not None else STEPS[1],
    )
    (weight, reward), wer = walk(cost, start, steps)
    digest = "" if lm is None else lm.weights
    return ChosenSearch(recogniser.weights, digest, beam, weight, reward, wer, len(utterances))


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
