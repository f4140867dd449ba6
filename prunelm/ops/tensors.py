"""Refuses tensors that an op cannot read, before anything reads them."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.compiler import is_compiling

import prunelm._C


def check_tensors(**tensors: Tensor | None) -> None:
    """Refuses, by name, what is no plain tensor on one device with its memory in place.

    torch lets a storage shrink under its tensors, and its own kernels read past the end then. What
    is traced, or wrapped by a transform, is left to what runs in the end.

    Args:
        tensors: under the names that errors give them; None is none.

    Raises:
        TypeError: an argument is no tensor.
        RuntimeError: a tensor is sparse, quantised or nested, on another device than the first, or
            larger than its storage.
    """
    if is_compiling() or prunelm._C.readable(*tensors.values()):
        return
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        _check_layout(name, tensor)
        _check_storage(name, tensor)
    check_one_device(given)


def check_one_device(tensors: Mapping[str, Tensor | None]) -> None:
    """Refuses, with RuntimeError, a tensor on another device than the first.

    For fake implementations: torch chooses them where any tensor is on the meta device, and their
    result would be memory that nobody has written.
    """
    first: tuple[str, torch.device] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = name, tensor.device
        if tensor.device != first[1]:
            raise RuntimeError(f"{name}: expected {first[0]}'s {first[1]}, got {tensor.device}")


def can_look_at(*tensors: Tensor) -> bool:
    """Whether numbers may be looked at: no tracing, no transform, no wait for another device."""
    if is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    plain = (Tensor, torch.nn.Parameter)
    return all(type(tensor) in plain and tensor.device.type == "cpu" for tensor in tensors)


def _check_layout(name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        found = "a nested one"
    elif tensor.is_quantized:
        found = "a quantised one"
    elif tensor.layout != torch.strided:
        found = f"one in {tensor.layout}"
    else:
        return
    raise RuntimeError(f"{name}: expected a dense tensor, got {found}")


def _check_storage(name: str, tensor: Tensor) -> None:
    own_dispatch = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if own_dispatch or tensor.device.type == "meta" or tensor._is_zerotensor():
        return  # none to read
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.numel() == 0:
        return
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    found = tensor.untyped_storage().nbytes()
    if needed > found:
        raise RuntimeError(f"{name}: expected a storage of at least {needed} bytes, got {found}")
