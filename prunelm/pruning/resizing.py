"""A model with other weights than it has: rebuilt from its config, or a copy changed in place.

Kept weights keep their names, ties stay ties, and nothing is hooked or wrapped.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunelm.nn import LowRankLinear, copied
from prunelm.pruning.architecture import CONFIG_SIZES, is_sized_by_config
from prunelm.pruning.groups import out_features
from prunelm.training.checkpoint import copy_weights, untied_weights

Numbers = Mapping[str, Mapping[str, int]]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Detached parameters and buffers, each tied one under its first name."""
    return {name: tensor.detach() for name, tensor in untied_weights(model).items()}


def numbers_of(model: nn.Module) -> dict[str, dict[str, int]]:
    """Whole numbers that modules hold as attributes, such as sizes, by module name."""
    found = {}
    for name, module in model.named_modules():
        own = {
            key: value
            for key, value in vars(module).items()
            if not key.startswith("_") and isinstance(value, int) and not isinstance(value, bool)
        }
        if own:
            found[name] = own
    return found


def resize(
    model: nn.Module, state: Mapping[str, Tensor], numbers: Numbers | None = None
) -> nn.Module:
    """A model like `model` with the weights `state`, whatever shapes they have now.

    A model of this project is rebuilt from its config, whose sizes are read off the weights. Of any
    other a copy is changed: its parameters are replaced where their shapes differ, a linear that
    has become two factors (or dense again) is replaced by a module of that kind.

    Args:
        numbers: by module name, attributes that get other values.

    Raises:
        ValueError: names or shapes do not fit; it says which.
    """
    old = state_of(model)
    same = {n: t.shape for n, t in old.items()} == {n: t.shape for n, t in state.items()}
    if same:
        new = copied(model)
    elif is_sized_by_config(model):
        new = _rebuilt(model, state)
    else:
        new = _changed(model, state)
    copy_weights(new, state, "resize")
    if not is_sized_by_config(model):
        modules = dict(new.named_modules())
        for place, own in (numbers or {}).items():
            for name, value in own.items():
                if hasattr(modules.get(place), name):
                    setattr(modules[place], name, value)
    return new


def _rebuilt(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    first = next(model.parameters())
    with torch.random.fork_rng(devices=[]):  # building initialises, which would draw numbers
        new = type(model)(_resized_config(model, state))
    new = new.to(device=first.device, dtype=first.dtype)
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(trained.get(name, _weight_is_trained(trained, name)))
    return new.train(model.training)


def _weight_is_trained(trained: Mapping[str, bool], name: str) -> bool:
    """What held for the weight whose factors these are, or whose factors it was."""
    stem = name.rpartition(".")[0]
    return trained.get(f"{stem}.weight", trained.get(f"{stem}.up", True))


def _resized_config(model: nn.Module, state: Mapping[str, Tensor]) -> Any:
    config: Any = model.config
    changes: dict[str, Any] = {}
    for prefix, name in CONFIG_SIZES.items():
        sizes = getattr(config, name, None)
        if not sizes:
            continue
        changes[name] = tuple(
            replace(
                size,
                heads=_features(state, f"{prefix}.{i}.qkv") // (3 * config.head_dim),
                ff=_features(state, f"{prefix}.{i}.ff_in"),
            )
            for i, size in enumerate(sizes)
        )
    ranks = {n[: -len(".down")]: t.shape[0] for n, t in state.items() if n.endswith(".down")}
    return replace(config, **changes, ranks=ranks)


def _features(state: Mapping[str, Tensor], linear: str) -> int:
    present = f"{linear}.weight" in state or f"{linear}.up" in state
    return out_features(state, linear) if present else 0


def _changed(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    new = copied(model)
    for name, module in list(new.named_modules()):
        stem = f"{name}." if name else ""
        if isinstance(module, nn.Linear) and {f"{stem}down", f"{stem}up"} <= set(state):
            _put(new, module, _factors(module, state[f"{stem}down"], state[f"{stem}up"]))
        elif isinstance(module, LowRankLinear) and f"{stem}weight" in state:
            _put(new, module, _dense(module, state[f"{stem}weight"]))
    for name, tensor in untied_weights(new).items():
        found = state.get(name)
        if found is None or found.shape == tensor.shape:
            continue  # what does not fit is refused where weights are copied
        empty = torch.empty(found.shape, dtype=tensor.dtype, device=tensor.device)
        for module in new.modules():
            for tensors in (module._parameters, module._buffers):
                for leaf, held in tensors.items():
                    if held is tensor:
                        tensors[leaf] = _like(tensor, empty)
                        _note_sizes(module)
    return new


def _like(old: Tensor, tensor: Tensor) -> Any:
    if not isinstance(old, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=old.requires_grad)


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in another's place, with its mode, its hooks and what else is noted on it."""
    new.train(old.training)
    for name, value in vars(old).items():
        if "_hook" in name or name not in (*vars(new), "in_features", "out_features", "rank"):
            vars(new)[name] = value
    for module in model.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def _factors(linear: nn.Linear, down: Tensor, up: Tensor) -> LowRankLinear:
    weight = linear.weight
    new = LowRankLinear(down.shape[1], up.shape[0], down.shape[0], False, device="meta")
    for name, factor in (("down", down), ("up", up)):
        empty = torch.empty(factor.shape, dtype=weight.dtype, device=weight.device)
        setattr(new, name, nn.Parameter(empty, requires_grad=weight.requires_grad))
    new.bias = linear.bias
    return new


def _dense(linear: LowRankLinear, weight: Tensor) -> nn.Linear:
    new = nn.Linear(weight.shape[1], weight.shape[0], False, device="meta")
    empty = torch.empty(weight.shape, dtype=linear.up.dtype, device=linear.up.device)
    new.weight = nn.Parameter(empty, requires_grad=linear.up.requires_grad)
    new.bias = linear.bias  # type: ignore[assignment]
    return new


def _note_sizes(module: nn.Module) -> None:
    """Sets the sizes that torch's own modules hold beside their weights."""
    if isinstance(module, LowRankLinear):
        module.rank, module.in_features = module.down.shape
        module.out_features = module.up.shape[0]
        return
    weight = module._parameters.get("weight")
    if weight is None:
        return
    shape = tuple(weight.shape)
    names: tuple[str, ...] = ()
    if isinstance(module, nn.Conv1d):
        names = ("out_channels", "in_channels")
    elif isinstance(module, nn.Embedding):
        names = ("num_embeddings", "embedding_dim")
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = shape
    elif hasattr(module, "in_features") and hasattr(module, "out_features"):
        names = ("out_features", "in_features")
    for name, size in zip(names, shape, strict=False):
        setattr(module, name, size)
