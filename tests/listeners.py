"""Who listens to a call, so that it may not go past torch's dispatcher."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


LISTENERS: dict[str, Callable[[], Any]] = {
    "grad": nullcontext,
    "forward_ad": forward_ad.dual_level,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch_mode": Watching,
    "function_mode": BaseTorchFunctionMode,
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
}


@contextmanager
def listening(kind: str) -> Iterator[None]:
    """One of LISTENERS, and gradients only where they are the one."""
    with torch.set_grad_enabled(kind == "grad"), LISTENERS[kind]():
        yield
