"""Finds the model inside what torch wraps around it."""

from torch import nn

_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of `torch.compile(model)` and DistributedDataParallel.

    Its weights then have the names under which they are saved.

    Raises:
        ValueError: the model is wrapped by DataParallel or FSDP, or a module inside it is wrapped.
    """
    inner = model
    while True:
        if is_compiled(inner):
            inner = inner._orig_mod  # type: ignore[assignment]
        elif isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        else:
            break
    for name, module in inner.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        wrapper = next((kind for kind in _SHARDED if kind in kinds), "")
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            wrapper = type(module).__name__
        elif is_compiled(module):
            wrapper = "torch.compile"
        if wrapper:
            where = f"{name} in {wrapper}" if name else wrapper
            raise ValueError(
                f"model: expected a plain one, or one in torch.compile or "
                f"DistributedDataParallel as a whole, got {where}; hand over the model inside"
            )
    return inner


def is_compiled(model: nn.Module) -> bool:
    """Whether a module is what `torch.compile(module)` returned."""
    return isinstance(getattr(model, "_orig_mod", None), nn.Module)
