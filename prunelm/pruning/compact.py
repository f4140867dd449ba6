"""Takes groups out of a model: smaller parameters, factors, or masks; optimizers follow."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunelm.pruning.groups import Groups, Rows, factorised, largest_useful_rank
from prunelm.pruning.resizing import resize, state_of


@dataclass(frozen=True)
class Removal:
    """What one round took: per parameter, the positions that stayed along some axes."""

    positions: Mapping[str, Sequence[tuple[int, Tensor]]] = field(default_factory=dict)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The part that stayed of a tensor of the parameter's old shape."""
        for axis, positions in self.positions.get(name, ()):
            tensor = tensor.index_select(axis, positions.to(tensor.device))
        return tensor


def remove(
    model: nn.Module,
    groups: Sequence[Groups],
    keep: Sequence[Tensor],
    masks: Mapping[str, Tensor],
) -> tuple[nn.Module, dict[str, Tensor], Removal]:
    """A model without the groups that are not kept; the given one is left alone.

    Args:
        model: prepared by the method that gave the groups.
        keep: per `Groups`, [count] bool.
        masks: by parameter name, bool of its shape, of earlier rounds.

    Returns:
        the smaller model, its masks, and what optimizer state must lose.
    """
    state = {name: tensor.clone() for name, tensor in state_of(model).items()}
    masks = {name: mask.clone() for name, mask in masks.items()}
    for each, kept in zip(groups, keep, strict=True):
        if each.shrinks:
            continue
        for part in each.parts:
            shape = state[part.name].shape
            mask = part.mask(kept.to(state[part.name].device), shape)
            masks[part.name] = mask & masks[part.name] if part.name in masks else mask
    for name, mask in masks.items():
        state[name].masked_fill_(~mask, 0.0)
    positions: dict[str, list[tuple[int, Tensor]]] = {}
    numbers: dict[str, dict[str, int]] = {}
    for each, kept in zip(groups, keep, strict=True):
        if not each.shrinks or bool(kept.all()):
            continue
        for place, attribute in each.counters:
            value = getattr(model.get_submodule(place), attribute)
            shrunk = value // each.count * int(kept.sum())
            numbers.setdefault(place, {})[attribute] = shrunk
        for part in each.parts:
            assert isinstance(part, Rows)
            length = state[part.name].shape[part.axis]
            chosen = part.positions(kept, length).to(state[part.name].device)
            positions.setdefault(part.name, []).append((part.axis, chosen))
            state[part.name] = state[part.name].index_select(part.axis, chosen)
            if part.name in masks:
                masks[part.name] = masks[part.name].index_select(part.axis, chosen)
        if not bool(kept.any()):
            for name in each.whole:
                state.pop(name, None)
                masks.pop(name, None)
    smaller = resize(model, settle(state, factorised(model)), numbers)
    return smaller, masks, Removal(positions)


def factorise(model: nn.Module, linears: Sequence[str]) -> nn.Module:
    """A copy with each linear as up = U s [N, R] and down = V' [R, K], singular values falling.

    Dense linears get full rank, so that the function stays the same; factors become orthogonal.
    """
    state = dict(state_of(model))
    for linear in linears:
        if f"{linear}.weight" in state:
            weight = state.pop(f"{linear}.weight")
            u, s, v = _svd(weight)
        else:
            weight = state[f"{linear}.up"]
            q_up, r_up = torch.linalg.qr(weight.float())
            q_down, r_down = torch.linalg.qr(state[f"{linear}.down"].float().T)
            u, s, v = _svd(r_up @ r_down.T)
            u, v = q_up @ u, v @ q_down.T
        state[f"{linear}.up"] = (u * s).to(weight.dtype)
        state[f"{linear}.down"] = v.to(weight.dtype)
    return resize(model, state)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        u, s, v = torch.linalg.svd(matrix.float(), full_matrices=False)
    except RuntimeError:  # did not converge
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u.float(), s.float(), v.float()


def settle(state: Mapping[str, Tensor], linears: Collection[str]) -> dict[str, Tensor]:
    """Factors below break-even balanced, those at or above it merged into a dense weight.

    Args:
        linears: names of what is factorised.
    """
    settled = dict(state)
    for linear in linears:
        name = f"{linear}.down"
        if name not in settled:
            continue
        up, down = settled.pop(f"{linear}.up"), settled.pop(name)
        if up.shape[1] > largest_useful_rank(up.shape[0], down.shape[1]):
            settled[f"{linear}.weight"] = (up.float() @ down.float()).to(up.dtype)
            continue
        ratio = (down.float().norm(dim=1) / up.float().norm(dim=0)).sqrt()
        ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
        settled[f"{linear}.up"] = (up * ratio).to(up.dtype)
        settled[name] = (down / ratio[:, None]).to(down.dtype)
    return settled


def follow(
    optimizer: torch.optim.Optimizer,
    before: nn.Module,
    after: nn.Module,
    removal: Removal,
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    """Points an optimizer at the smaller model, its state sliced like the weights, in place.

    Parameters that are new (factors of a weight that was dense) join the weight's group without
    state; moments of masked weights become zero.
    """
    old_names = {id(p): name for name, p in before.named_parameters()}
    new = dict(after.named_parameters())
    state: dict[Tensor, Any] = {}
    for group in optimizer.param_groups:
        params: list[Tensor] = []
        for parameter in group["params"]:
            name = old_names.get(id(parameter))
            if name is None:
                raise ValueError("optimizer: expected parameters of the model only, got others")
            if name not in new:
                stem = name.rpartition(".")[0]
                born = (f"{stem}.weight", f"{stem}.up", f"{stem}.down")
                known = set(old_names.values())
                fresh = [new[n] for n in born if n in new and n not in known]
                params += [p for p in fresh if not any(p is q for q in params)]
                continue
            params.append(new[name])
            mask = (masks or {}).get(name)
            if parameter in optimizer.state:
                state[new[name]] = {
                    key: _sliced(value, parameter, removal, name, mask)
                    for key, value in optimizer.state[parameter].items()
                }
        group["params"] = params
    optimizer.state.clear()
    optimizer.state.update(state)


def _sliced(value: Any, parameter: Tensor, removal: Removal, name: str, mask: Tensor | None) -> Any:
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.dim() == 0:
        return value
    value = removal.apply(name, value)
    return value if mask is None else value.masked_fill(~mask.to(value.device), 0.0)
