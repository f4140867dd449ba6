"""Prunes a Transformer language model to the size you name and decodes speech with it fast."""

import importlib
from typing import TYPE_CHECKING, Any

from prunelm.version import __version__

if TYPE_CHECKING:
    from prunelm import ops
    from prunelm.decoding.transcribe import transcribe
    from prunelm.nn import accelerate
    from prunelm.pruning import (
        Architecture,
        Blocks,
        Elements,
        Finetune,
        Heads,
        Incremental,
        LowRank,
        Magnitude,
        Neurons,
        OneShot,
        Plan,
        Pruner,
        Random,
        Result,
        Taylor,
        count_parameters,
        load_result,
    )
    from prunelm.sparse import BlockSparse
    from prunelm.training.pretrained import load_lm, load_recogniser

# Imported when first asked for: `import prunelm` needs torch and numpy only, and is cheap.
_PRUNING = (
    "Architecture Blocks Elements Finetune Heads Incremental LowRank Magnitude Neurons OneShot "
    "Plan Pruner Random Result Taylor count_parameters load_result"
).split()
_HOMES = {
    "BlockSparse": "prunelm.sparse",
    "accelerate": "prunelm.nn",
    "load_lm": "prunelm.training.pretrained",
    "load_recogniser": "prunelm.training.pretrained",
    "transcribe": "prunelm.decoding.transcribe",
    **dict.fromkeys(_PRUNING, "prunelm.pruning"),
}

__all__ = [
    "Architecture",
    "BlockSparse",
    "Blocks",
    "Elements",
    "Finetune",
    "Heads",
    "Incremental",
    "LowRank",
    "Magnitude",
    "Neurons",
    "OneShot",
    "Plan",
    "Pruner",
    "Random",
    "Result",
    "Taylor",
    "__version__",
    "accelerate",
    "count_parameters",
    "load_lm",
    "load_recogniser",
    "load_result",
    "ops",
    "transcribe",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("prunelm.ops")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'prunelm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
