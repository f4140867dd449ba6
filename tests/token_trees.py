"""Token trees for the tests of tree_attention's CUDA kernels, and what must come out of them."""

from collections.abc import Sequence

import torch
from cuda_emulation.emulated import assert_accurate
from torch import Tensor

CHILD = -1  # a length: the row descends from the row before it


def example(lengths: Sequence[int], H: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    """Rows that branch off one path, which is in the pool; or off each other (CHILD)."""
    R, trunk = len(lengths), max((*lengths, 1))
    slots = torch.randperm(trunk + R + 2).tolist()
    paths: list[list[int]] = []
    for r, length in enumerate(lengths):
        above = paths[-1] if length == CHILD else slots[: length - 1]
        paths.append([*above, slots[trunk + r]])
    P = max((len(p) for p in paths), default=1) + 2
    path = torch.tensor([p + [-7] * (P - len(p)) for p in paths], dtype=torch.int64).view(R, P)
    length = torch.tensor([len(p) for p in paths], dtype=torch.int64)
    angle = 6 * torch.rand(R, D // 2)
    pool = torch.randn(2, len(slots), H, D)
    floats = [x.to(dtype) for x in (2 * torch.randn(R, 3, H, D), angle.cos(), angle.sin(), *pool)]
    return [*floats[:3], path, length, *floats[3:]]


def assert_right(out: Tensor, before: list[Tensor], key: Tensor, value: Tensor) -> None:
    """The pool holds what it must, and the rows attend to what it holds; on the CPU.

    Args:
        out: [R, H, D].
        before: tree_attention's tensors as they were given.
        key, value: the pool afterwards.
    """
    qkv, cos, sin, path, length, old_key, old_value = (x.double() for x in before)
    turned = torch.complex(*qkv[:, :2].chunk(2, -1)) * torch.complex(cos, sin)[:, None, None]
    turned = torch.cat([turned.real, turned.imag], -1)
    eps, slot = torch.finfo(out.dtype).eps, torch.full((len(qkv),), 0)
    for r in range(len(qkv)):
        slot[r] = path[r, int(length[r]) - 1]
    old_key[slot], old_value[slot] = turned[:, 1], qkv[:, 2]
    assert torch.equal(value.double(), old_value)
    turns = qkv.abs().amax() if qkv.numel() else 0  # what may cancel in a turn
    assert bool(((key - old_key).abs() <= eps * old_key.abs() + 1e-6 * turns).all())
    others = torch.ones(len(key), dtype=torch.bool)
    others[slot] = False
    assert torch.equal(key.double()[others], old_key[others])
    keys, values = key.double(), value.double()
    for r in range(len(qkv)):
        along = path[r, : int(length[r])].long()
        products = turned[r, 0] * keys[along] * qkv.shape[-1] ** -0.5  # [P, H, D]
        weight = products.sum(-1).softmax(0)[..., None]
        # A score is as wrong as the sum of its products' sizes lets it be.
        size = weight * (1 + products.abs().sum(-1, keepdim=True)) * values[along].abs()
        assert_accurate(out[r], (weight * values[along]).sum(0), size.sum(0))
