"""What shapes a run's result, for the record in its folder."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from prunelm.data.runs import digest_of, named
from prunelm.training.options import CADENCE, TrainOptions


def run_facts(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    options: TrainOptions,
    masks: Mapping[str, Tensor],
    validated: bool,
    world: int,
) -> dict[str, Any]:
    """What shapes a training run's result, as far as the arguments of `train` show it.

    Steps are left out, since more of them extend a run, and so is what only says how often
    something is written; how often weights are validated decides which are kept.
    """
    weights = [[n, list(p.shape), p.requires_grad] for n, p in model.named_parameters()]
    free = {"steps", *CADENCE} - ({"validate_every"} if validated else set())
    return {
        "model": type(model).__name__,
        **config_facts(model),
        "weights": digest_of(weights),
        "validation": validated,
        **{name: value for name, value in asdict(options).items() if name not in free},
        "masks": masks_digest(masks),
        "loss": named(loss),
        "processes": world,
    }


def config_facts(model: nn.Module) -> dict[str, Any]:
    """The model's own config, {} where it has none that writes itself as JSON."""
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    try:
        digest_of(values)
    except (TypeError, ValueError):  # somebody else's
        return {}
    return dict(values)


def masks_digest(masks: Mapping[str, Tensor]) -> str | None:
    """12 hex digits that change with any mask; None without masks."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(name.encode())
        digest.update(masks[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12] if masks else None


def last_bits(device: torch.device) -> dict[str, Any]:
    """What may change a result's last bits."""
    threads, version = torch.get_num_threads(), torch.__version__
    return {"threads": threads, "torch": str(version), "device": device.type}
