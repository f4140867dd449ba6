"""How to search: beam, LM weight and token reward, and where they come from."""

from dataclasses import dataclass

from prunelm.training.pretrained import LoadedLM, LoadedRecogniser, chosen_search
from prunelm.training.settings import check_types

DEFAULT_WEIGHT, DEFAULT_REWARD = 0.3, 0.0
"""LM weight and token reward where none were chosen on validation data."""


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Args:
        beam: hypotheses kept; 0 is greedy search, which takes no LM.
        lm_weight: of the LM in shallow fusion.
        token_reward: added to the score for each token; not in greedy search.
        nbest: hypotheses returned, at most.
    """

    beam: int = 4
    lm_weight: float = DEFAULT_WEIGHT
    token_reward: float = DEFAULT_REWARD
    nbest: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        if self.beam < 0:
            raise ValueError(f"beam: expected at least 0, got {self.beam}")
        if self.nbest < 1:
            raise ValueError(f"nbest: expected at least 1, got {self.nbest}")
        for name in ("lm_weight", "token_reward"):
            if not abs(getattr(self, name)) < float("inf"):
                raise ValueError(f"{name}: expected a finite number, got {getattr(self, name)}")

    def __str__(self) -> str:
        if self.beam == 0:
            return "greedy"
        weight = f"LM weight {self.lm_weight:g}" if self.lm_weight else "no LM"
        return f"beam {self.beam}, {weight}, token reward {self.token_reward:g}"


DEFAULT_SEARCH = SearchOptions()


def suitable_options(
    recogniser: LoadedRecogniser,
    lm: LoadedLM | None = None,
    *,
    beam: int = 4,
    lm_weight: float | None = None,
    token_reward: float | None = None,
    nbest: int = 1,
) -> tuple[SearchOptions, str]:
    """Options for two models, and in words where their weight and reward come from.

    Args:
        lm_weight: None: as chosen on validation utterances for this pair, 0.3 where none was.
        token_reward: None: as chosen likewise, 0 where none was.

    Raises:
        ValueError: a greedy search with an LM, which it does not take.
    """
    if beam == 0 and lm is not None:
        raise ValueError("beam: expected at least 1 with a language model, got 0")
    chosen = chosen_search(recogniser, lm, beam)
    automatic = [
        name
        for name, value in (("LM weight", lm_weight), ("token reward", token_reward))
        if value is None and beam and (lm is not None or name == "token reward")
    ]
    if chosen is None:
        found = (DEFAULT_WEIGHT, DEFAULT_REWARD)
        where = f"default {' and '.join(automatic)}" if lm is not None else ""
    else:
        found = (chosen.lm_weight, chosen.token_reward)
        before = lm is not None and chosen.lm != lm.weights
        where = f"{' and '.join(automatic)} chosen on {chosen.utterances} validation utterances"
        where += ", with the LM before pruning" if before else ""
    options = SearchOptions(
        beam,
        0.0 if lm is None else found[0] if lm_weight is None else lm_weight,
        found[1] if token_reward is None else token_reward,
        nbest,
    )
    return options, where if automatic else ""
