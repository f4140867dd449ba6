"""Models whose rows do not depend on their number, so that a batch changes no bit of a result."""

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from prunelm.nn import BlockSparseLinear, is_plain, leave_fused_layers

Model = TypeVar("Model")


def row_independent(model: Model) -> Model:
    """The model with its torch linears replaced, whose results depend on how many rows they get.

    A shallow copy for one search: it shares the parameters, and lays a weight out anew when it is
    first used; what else is asked of a linear, such as its weight, is the linear's own. Linears
    with hooks or a forward of their own stay. `prunelm.accelerate(model, dense=True)` does so once
    and for all; what comes from there, and what holds no nn.Linear on the CPU, is returned as it
    is.
    """
    if not isinstance(model, nn.Module) or not any(map(_replaced, model.modules())):
        return model
    shallow = _shallow_copy(model)
    leave_fused_layers(shallow, {m for m in shallow.modules() if isinstance(m, _PackedLinear)})
    return cast(Model, shallow)


class _PackedLinear(nn.Module):
    """An nn.Linear through `ops.block_sparse_linear` at full density, packed at the first call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.packed: BlockSparseLinear | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("linear"), name)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            N, K = self.linear.weight.shape
            every = torch.ones(-(-N // 16), 1, dtype=torch.bool)
            self.packed = BlockSparseLinear.from_linear(self.linear, (16, K), every)
        y: Tensor = self.packed(x)
        return y


def _replaced(module: nn.Module) -> bool:
    return type(module) is nn.Linear and is_plain(module) and module.weight.device.type == "cpu"


def _shallow_copy(module: nn.Module) -> nn.Module:
    if _replaced(module):
        return _PackedLinear(cast(nn.Linear, module))
    if not any(map(_replaced, module.modules())):
        return module
    shallow = copy.copy(module)
    children = {name: child and _shallow_copy(child) for name, child in module._modules.items()}
    shallow.__dict__["_modules"] = children
    return shallow
