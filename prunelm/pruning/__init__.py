"""Prunes a model to the size you name: method x criterion x schedule x target x recovery."""

from prunelm.pruning.architecture import Architecture
from prunelm.pruning.budget import count_parameters
from prunelm.pruning.criteria import Magnitude, Random, Taylor
from prunelm.pruning.methods import Blocks, Elements, Heads, LowRank, Neurons
from prunelm.pruning.pruner import Plan, Pruner
from prunelm.pruning.recovery import Finetune
from prunelm.pruning.result import Result, load_result
from prunelm.pruning.schedulers import Incremental, OneShot

__all__ = [
    "Architecture",
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
    "count_parameters",
    "load_result",
]
