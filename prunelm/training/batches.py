"""Looks into batches of any structure."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_VALUES = str | bytes | int | float | None


def leaves(batch: Any) -> Iterator[Any]:
    """Tensors, arrays, numbers and texts of a batch, in the order in which it holds them.

    Dicts, lists, tuples, dataclasses and other objects are looked into, at any depth.
    """
    yield from _leaves(batch, frozenset())


def _leaves(part: Any, around: frozenset[int]) -> Iterator[Any]:
    """`around`: the objects that hold this part, since one may hold itself."""
    if isinstance(part, _VALUES) or hasattr(part, "shape"):
        yield part
        return
    if id(part) in around or isinstance(part, type) or callable(part):
        return
    if isinstance(part, Mapping):
        inside = list(part.values())
    elif isinstance(part, Sequence):
        inside = list(part)
    else:
        slots = [name for name in getattr(part, "__slots__", ()) if hasattr(part, name)]
        inside = [*getattr(part, "__dict__", {}).values(), *(getattr(part, n) for n in slots)]
    for each in inside:
        yield from _leaves(each, around | {id(part)})


def batch_digest(batch: Any) -> str:
    """12 hex digits that change with any number or text in a batch."""
    digest = hashlib.sha256()
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor):
            plain = leaf.detach().cpu().contiguous()
            digest.update(f"{list(plain.shape)} {plain.dtype}".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif hasattr(leaf, "tobytes"):
            digest.update(f"{list(leaf.shape)} {leaf.dtype}".encode())
            digest.update(leaf.tobytes())
        else:
            digest.update(repr(leaf).encode() if isinstance(leaf, _VALUES) else b"")
    return digest.hexdigest()[:12]
