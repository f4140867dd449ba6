"""Models whose rows do not depend on their number, so that a batch changes no bit of a result."""

import weakref
from typing import TypeVar, cast

from torch import Tensor, nn

from prunelm.nn import accelerate

Model = TypeVar("Model")
_State = tuple[tuple[int, int], ...]

# Copies live as long as their models, and are made again when a parameter was written to.
_copies: "weakref.WeakKeyDictionary[nn.Module, tuple[_State, nn.Module]]" = (
    weakref.WeakKeyDictionary()
)


def row_independent(model: Model) -> Model:
    """The model with its torch linears replaced, whose results depend on how many rows they get.

    The copy is kept for the next call. Models without an nn.Linear on the CPU, which those from
    `prunelm.accelerate(model, dense=True)` are, come back as they are.
    """
    if not isinstance(model, nn.Module):
        return model
    linears = [each for each in model.modules() if type(each) is nn.Linear]
    if not any(each.weight.device.type == "cpu" for each in linears):
        return model
    state = tuple(map(_version, model.parameters()))
    kept = _copies.get(model)
    if kept is None or kept[0] != state:
        kept = (state, accelerate(model, dense=True))
        _copies[model] = kept
    return cast(Model, kept[1])


def _version(parameter: Tensor) -> tuple[int, int]:
    return parameter.data_ptr(), -1 if parameter.is_inference() else parameter._version
