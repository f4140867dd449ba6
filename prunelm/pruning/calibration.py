"""What the data say about a model: mean gradients and losses over a fixed list of batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelm.training.progress import Watch

Data = Callable[[int], Any]
Loss = Callable[[nn.Module, Any], Tensor]


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's own mean loss: model.loss(batch), or model.loss(*batch) of a tuple."""
    loss: Any = getattr(model, "loss", None)
    if loss is None:
        raise ValueError(f"loss: expected a function, as {type(model).__name__} has no own loss")
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(batch, Tensor) and isinstance(vocabulary, int) and batch.numel():
        least, most = int(batch.min()), int(batch.max())
        if least < 0 or most >= vocabulary:
            raise ValueError(
                f"data: expected ids of the model's vocabulary, 0 to {vocabulary - 1}, "
                f"got {least if least < 0 else most}"
            )
    value: Tensor = loss(*batch) if isinstance(batch, tuple) else loss(batch)
    return value


@dataclass(frozen=True)
class Calibration:
    """Evidence for criteria: batches 0, 1, ... of the data, always the same ones.

    Under DDP each process holds its own share of the data, and means are over all of them.

    Args:
        data: step -> batch; None where nothing data-driven is asked.
        loss: (model, batch) -> mean loss over the batch's samples.
        seed: for criteria that draw numbers.
        watch: is told of each batch.
    """

    data: Data | None
    loss: Loss = own_loss
    seed: int = 0
    watch: Watch | None = None

    def __post_init__(self) -> None:
        if self.data is not None and not callable(self.data):
            got = type(self.data).__name__
            raise ValueError(f"data: expected a function from step to batch, got {got}")
        if not callable(self.loss):
            got = type(self.loss).__name__
            raise ValueError(f"loss: expected a function of model and batch, got {got}")

    def mean_gradient(self, model: nn.Module, batches: int) -> dict[str, Tensor]:
        """Gradient of the mean loss over all samples, float32, by parameter name.

        Runs in eval mode, under no_grad of the caller too. Frozen weights get theirs like others,
        and are frozen again afterwards.

        Raises:
            ValueError: there are no data, the loss is no scalar or does not depend on the weights,
                or a gradient is not finite.
        """
        with torch.enable_grad(), _thawed(model):
            return self._mean_gradient(model, batches)

    def _mean_gradient(self, model: nn.Module, batches: int) -> dict[str, Tensor]:
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("model: expected floating weights, got none")
        total = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in named.items()}
        count = 0
        with _evaluating(model):
            for batch, samples in self._batches("gradient", batches):
                value = self._value(model, batch)
                if not value.requires_grad:
                    raise ValueError("loss: expected a value computed from the weights, got others")
                gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
                for sum_so_far, gradient in zip(total.values(), gradients, strict=True):
                    if gradient is not None:
                        sum_so_far += gradient.float() * samples
                count += samples
        everywhere = _sum_over_processes(count, [*total.values()])
        for name, gradient in total.items():
            gradient /= everywhere
            if not bool(gradient.isfinite().all()):
                raise ValueError(f"gradient: expected finite numbers for {name}, got NaN or inf")
        return total

    def mean_loss(self, model: nn.Module, batches: int) -> float:
        """Mean loss over all samples, in eval mode."""
        total, count = torch.zeros(1, dtype=torch.float64), 0
        with torch.no_grad(), _evaluating(model):
            for batch, samples in self._batches("loss", batches):
                total += float(self._value(model, batch)) * samples
                count += samples
        everywhere = _sum_over_processes(count, [total])
        return float(total) / everywhere

    def _value(self, model: nn.Module, batch: Any) -> Tensor:
        value = self.loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss: expected the mean over the batch, a scalar tensor, got {got}")
        return value

    def _batches(self, what: str, batches: int) -> Iterator[tuple[Any, int]]:
        if self.data is None:
            raise ValueError("data: expected a function from step to batch, got None")
        for step in range(batches):
            batch = self.data(step)
            yield batch, samples_in(batch)
            if self.watch is not None:
                self.watch(what, step + 1, batches)


def samples_in(batch: Any) -> int:
    """How many samples a batch's mean is over, which is what it weighs among other batches.

    A tensor [B, L + 1] of tokens holds B * L of them, all that are predicted. Any other batch holds
    as many as its first tensor (or array) is long, in the order in which a dict, a list, a
    dataclass or another object holds its parts, at any depth; one without any counts as 1.
    """
    if isinstance(batch, Tensor) and batch.dim() == 2:
        return batch[:, 1:].numel()
    return next(_lengths(batch, set()), 1)


def _lengths(batch: Any, seen: set[int]) -> Iterator[int]:
    """The lengths of a batch's tensors; `seen` keeps objects that hold themselves apart."""
    shape = getattr(batch, "shape", None)
    if shape is not None and not isinstance(batch, type):
        yield from [int(shape[0])] if len(shape) else []
        return
    if batch is None or isinstance(batch, str | bytes | int | float) or id(batch) in seen:
        return
    seen = {*seen, id(batch)}
    parts: Iterable[Any]
    if isinstance(batch, Mapping):
        parts = batch.values()
    elif isinstance(batch, Sequence):
        parts = batch
    else:
        slots = [name for name in getattr(batch, "__slots__", ()) if hasattr(batch, name)]
        parts = [*getattr(batch, "__dict__", {}).values(), *(getattr(batch, n) for n in slots)]
    for part in parts:
        yield from _lengths(part, seen)


@contextmanager
def _thawed(model: nn.Module) -> Iterator[None]:
    """All floating weights take gradients meanwhile."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _sum_over_processes(count: int, tensors: list[Tensor]) -> int:
    """Sums tensors over all processes in place; returns the summed count."""
    if not (dist.is_available() and dist.is_initialized()):
        return count
    everywhere = torch.tensor([count], device=tensors[0].device)
    dist.all_reduce(everywhere)
    for tensor in tensors:
        dist.all_reduce(tensor)
    return int(everywhere)


def broadcast(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Process 0's tensors for all; the given ones where there is one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensors
    result = []
    for tensor in tensors:
        sent = tensor.detach().to(device, torch.uint8 if tensor.dtype == torch.bool else None)
        sent = sent.clone()
        dist.broadcast(sent, 0)
        result.append(sent.to(tensor.device, tensor.dtype))
    return result


def is_main_process() -> bool:
    """Whether this process writes files."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def process_count() -> int:
    """How many processes share the data."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def wait_for_all() -> None:
    """Returns when every process is here."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
