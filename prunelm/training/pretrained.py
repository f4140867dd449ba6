"""Trained models as their folders hold them, ready for inference, with the search chosen for them.

Every command and a user's Python come in here. Beside a model may lie `decoding.json`: the LM
weight and the token reward that were chosen on validation utterances, so that they travel with it.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from prunelm.data.files import replace_file
from prunelm.data.tokenizer import Tokenizer
from prunelm.models.lm import TransformerLM
from prunelm.models.transducer import Transducer
from prunelm.nn import accelerate
from prunelm.training.checkpoint import load_model, read_info

FORMAT = 1
CHOSEN = "decoding.json"


@dataclass(frozen=True)
class ChosenSearch:
    """Search settings that made the fewest word errors on validation utterances.

    Attributes:
        recogniser: digest of the recogniser's weights.
        lm: digest of the LM's weights; "" for a search without one.
        beam: hypotheses kept.
        lm_weight: of the LM in shallow fusion; 0 without one.
        token_reward: added to the score for each token.
        wer: word error rate on the validation utterances, a fraction.
        utterances: how many there were.
    """

    recogniser: str
    lm: str
    beam: int
    lm_weight: float
    token_reward: float
    wer: float
    utterances: int


@dataclass(frozen=True)
class LoadedLM:
    """A language model from a folder.

    Attributes:
        model: eval mode, float32, on the CPU; accelerated unless asked otherwise.
        tokenizer: its tokenizer.
        weights: digest of the file of weights.
        chosen: what its `decoding.json` says.
        folder: where it comes from.
    """

    model: TransformerLM = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    weights: str
    chosen: tuple[ChosenSearch, ...]
    folder: Path


@dataclass(frozen=True)
class LoadedRecogniser:
    """A recogniser from a folder; attributes as those of `LoadedLM`."""

    model: Transducer = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    weights: str
    chosen: tuple[ChosenSearch, ...]
    folder: Path


def load_lm(
    folder: Path | str, *, tokenizer: Tokenizer | None = None, accelerated: bool = True
) -> LoadedLM:
    """A language model, ready to predict or to be fused.

    Args:
        folder: as `prunelm train lm`, `prunelm prune` or `Result.save` leave it.
        tokenizer: to insist on its vocabulary, such as a recogniser's.
        accelerated: run on prunelm's kernels (`prunelm.accelerate`). Pruning and training need the
            plain model: False.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or holds another kind of model or vocabulary, or weights
            that are not finite.
    """
    model, own, weights, chosen = _load(folder, "lm", tokenizer, accelerated)
    return LoadedLM(cast(TransformerLM, model), own, weights, chosen, Path(folder))


def load_recogniser(
    folder: Path | str, *, tokenizer: Tokenizer | None = None, accelerated: bool = True
) -> LoadedRecogniser:
    """A recogniser, ready to decode; arguments and errors as for `load_lm`."""
    model, own, weights, chosen = _load(folder, "transducer", tokenizer, accelerated)
    return LoadedRecogniser(cast(Transducer, model), own, weights, chosen, Path(folder))


def load_pretrained(folder: Path | str, *, accelerated: bool = True) -> LoadedLM | LoadedRecogniser:
    """Whichever of the two a folder holds; arguments and errors as for `load_lm`."""
    kind = read_info(folder)["kind"]
    load = load_recogniser if kind == "transducer" else load_lm
    return load(folder, accelerated=accelerated)


def _load(
    folder: Path | str, kind: str, tokenizer: Tokenizer | None, accelerated: bool
) -> tuple[nn.Module, Tokenizer, str, tuple[ChosenSearch, ...]]:
    model, own, info = load_model(folder, kind=kind, tokenizer=tokenizer)
    chosen = read_chosen(folder)
    return accelerate(model) if accelerated else model, own, str(info["weights"]), chosen


def chosen_search(
    recogniser: LoadedRecogniser, lm: LoadedLM | None, beam: int
) -> ChosenSearch | None:
    """What was chosen for this recogniser, with or without an LM; None where nothing was.

    Of several beams the nearest counts. An LM that was pruned has the settings of the LM that it
    was made from until it gets its own.
    """
    entries = recogniser.chosen if lm is None else lm.chosen
    fitting = [
        each
        for each in entries
        if each.recogniser == recogniser.weights and bool(each.lm) == (lm is not None)
    ]
    if not fitting:
        return None
    return min(
        fitting, key=lambda each: (abs(each.beam - beam), lm is not None and each.lm != lm.weights)
    )


def read_chosen(folder: Path | str) -> tuple[ChosenSearch, ...]:
    """What a folder's `decoding.json` says; () where there is none.

    Raises:
        ValueError: the file is damaged; names it.
    """
    path = Path(folder) / CHOSEN
    if not path.is_file():
        return ()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError
        return tuple(_entry(each) for each in values["chosen"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path}: expected search settings of format {FORMAT}, got a file cut short or changed"
        ) from None


def add_chosen(folder: Path | str, chosen: Iterable[ChosenSearch]) -> None:
    """Writes settings to a folder's `decoding.json`, in place of those for the same search."""
    kept = {(each.recogniser, each.lm, each.beam): each for each in read_chosen(folder)}
    kept |= {(each.recogniser, each.lm, each.beam): each for each in chosen}
    write_chosen(folder, [*kept.values()])


def write_chosen(folder: Path | str, chosen: Sequence[ChosenSearch]) -> None:
    """Writes a folder's `decoding.json`; without settings, removes what an earlier save left."""
    path = Path(folder) / CHOSEN
    if not chosen:
        path.unlink(missing_ok=True)
        return
    values = {"format": FORMAT, "chosen": [asdict(each) for each in chosen]}
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _entry(values: dict[str, Any]) -> ChosenSearch:
    if set(values) != {each.name for each in fields(ChosenSearch)}:
        raise ValueError
    entry = ChosenSearch(**values)
    numbers = (entry.beam, entry.lm_weight, entry.token_reward, entry.wer, entry.utterances)
    finite = all(isinstance(x, int | float) and math.isfinite(x) for x in numbers)
    if not finite or not isinstance(entry.recogniser, str) or not isinstance(entry.lm, str):
        raise ValueError
    return replace(entry, lm_weight=float(entry.lm_weight), token_reward=float(entry.token_reward))
