"""The training loop: AdamW, warm-up and cosine, clipping, DDP under torchrun, exact resumption.

Everything random is a function of (seed, step): batches by contract, dropout by seeding each step.
So a run that was stopped and resumed ends bit-equal to one that was not, on the same machine,
thread count and versions.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelm.data.files import replace_file
from prunelm.data.runs import claim, hold
from prunelm.data.tokenizer import Tokenizer
from prunelm.nn import is_accelerated
from prunelm.training.batches import batch_digest
from prunelm.training.checkpoint import (
    MODEL_FILES,
    check_savable,
    copy_weights,
    load_state,
    save_model,
    save_state,
    untied_weights,
)
from prunelm.training.facts import last_bits, run_facts
from prunelm.training.options import History as History
from prunelm.training.options import TrainOptions as TrainOptions
from prunelm.training.progress import progress
from prunelm.training.unwrapping import is_compiled, unwrapped

Batch = TypeVar("Batch")
TRAINED_FILES = ("training.pt", "log.jsonl", *MODEL_FILES)


def train(
    model: nn.Module,
    batches: Callable[[int], Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    options: TrainOptions,
    *,
    folder: Path | str | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    tokenizer: Tokenizer | None = None,
    facts: Mapping[str, Any] | None = None,
    describe: str = "",
    told: Callable[[Mapping[str, float]], None] | None = None,
) -> History:
    """Trains `model` in place and leaves it in eval mode.

    Under torchrun every process calls this with its own share of each batch (equal shares), and
    gradients are averaged; process 0 writes.

    Args:
        model: also inside `torch.compile` or DistributedDataParallel; the model inside is saved.
        batches: a pure function of the batch's number, counted from 0; any batch that `loss` takes.
        loss: the mean loss of one batch, a scalar.
        folder: takes `training.pt`, from which a later call with the same arguments resumes,
            `log.jsonl`, and `run.json`: what shapes the result. A call with anything else, or
            with other batches, is refused, but for more `steps`, which extend the run, and another
            `log_every` or `checkpoint_every`. One process at a time works in a folder. None:
            nothing is written.
        validate: lower is better. The best weights are kept, and are the model's at the end.
        masks: by parameter name, bool, of its shape; what is False becomes zero and stays zero.
        tokenizer: with `folder`, the result is saved there as `load_model` reads it.
        facts: JSON values for `run.json` that this function cannot see, such as digests of the
            data (`data.runs.file_fact`), the batch's size and the initial weights. The model's
            config, options, masks, the loss's name and the number of processes are there anyway.
        describe: a name to show progress under; "" shows nothing.
        told: called after each step with its "step" and "seconds".

    Raises:
        ValueError: batches or loss is no function, no weight requires a gradient, a loss or
            gradient is not finite (the last checkpoint stands), masks fit no parameter, the result
            could not be saved, or the folder holds another run, is in use, or has files of
            something else.
        OSError: a file cannot be written; the last checkpoint stands.
    """
    given, model = model, unwrapped(model)
    for name, function in (("batches", batches), ("loss", loss)):
        if not callable(function):
            raise ValueError(f"{name}: expected a function, got {type(function).__name__}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        why = "; train the original and accelerate it again" if is_accelerated(model) else ""
        raise ValueError(f"model: expected weights that require gradients, got none{why}")
    if folder is not None and tokenizer is not None:
        check_savable(model, tokenizer)
    rank, world = _join_processes()
    place = Path(folder) if folder is not None else None
    run = _Run(model, given, loss, options, place, masks, rank, world)
    with hold(place) if place is not None and rank == 0 else nullcontext():
        if place is not None and rank == 0:
            own = run_facts(model, loss, options, masks or {}, validate is not None, world)
            if tokenizer is not None:
                own["tokenizer"] = tokenizer.fingerprint
            makes = TRAINED_FILES if tokenizer is not None else TRAINED_FILES[:2]
            claim(place, {**own, **(facts or {})}, noted=last_bits(run.device), makes=makes)
        if world > 1:
            dist.barrier()
        state = torch.random.get_rng_state()
        try:
            run.resume()
            run.go(batches, validate, describe, told)
        finally:
            torch.random.set_rng_state(state)
        if run.best_weights or run.mean:
            copy_weights(model, run.best_weights or run.mean, "best weights")
        for each in {model, given}:
            each.eval()
        if place is not None and tokenizer is not None and rank == 0:
            extra = {
                "describe": describe, "options": asdict(options), "history": asdict(run.history),
            }  # fmt: skip
            save_model(place, model, tokenizer, extra)
        if world > 1:
            dist.barrier()
    return run.history


class _WithLoss(nn.Module):
    """model and loss as one forward, which is what DDP wraps."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


class _Run:
    """One run's state, in memory and in its folder."""

    def __init__(
        self,
        model: nn.Module,
        given: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        options: TrainOptions,
        folder: Path | None,
        masks: Mapping[str, Tensor] | None,
        rank: int,
        world: int,
    ) -> None:
        self.model, self.options, self.folder = model, options, folder
        self.rank, self.world = rank, world
        self.masks = _masked_parameters(model, masks or {})
        self.device = next(model.parameters()).device
        # What torch.compile made runs as it is; DistributedDataParallel is put around anew.
        called = given if is_compiled(given) and given._orig_mod is model else model
        self.with_loss: nn.Module = _WithLoss(called, loss)
        if world > 1:
            self.with_loss = nn.parallel.DistributedDataParallel(self.with_loss)
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=True)
        self.history = History()
        self.step = 0
        self.last: tuple[int, Any] | None = None  # the last batch and its number
        self.resumed_after: dict[str, Any] | None = None
        self.window: list[float] = []  # losses since the last record
        self.best_weights: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}
        if options.average:
            self.mean = {name: x.detach().clone() for name, x in untied_weights(model).items()}

    def resume(self) -> None:
        """Continues from training.pt where there is one."""
        if self.folder is None or not (self.folder / "training.pt").is_file():
            return
        path = self.folder / "training.pt"
        state = load_state(path)
        try:
            step, window = int(state["step"]), state["window"]
            model, optimizer, best = state["model"], state["optimizer"], state["best_weights"]
            mean, self.resumed_after = state["mean"], state["batch"]
            history = History(**state["history"])
        except (KeyError, TypeError):
            raise ValueError(f"{path}: expected a training state, got {sorted(state)}") from None
        if step > self.options.steps:
            raise ValueError(
                f"steps: expected at least {step}, which {self.folder} has done, "
                f"got {self.options.steps}"
            )
        copy_weights(self.model, model, str(path))
        self.optimizer.load_state_dict(optimizer)
        self.history, self.step, self.window, self.best_weights = history, step, window, best
        self.mean = {name: x.to(self.device) for name, x in mean.items()}

    def go(
        self,
        batches: Callable[[int], Any],
        validate: Callable[[nn.Module], float] | None,
        describe: str,
        told: Callable[[Mapping[str, float]], None] | None = None,
    ) -> None:
        """Runs the remaining steps."""
        options, begin, before = self.options, time.perf_counter(), self.history.seconds
        self.check_batches(batches)
        self.write_log()
        with progress(describe if self.rank == 0 else "", options.steps, self.step) as show:
            while self.step < options.steps:
                self.with_loss.train()
                self.window.append(self.one_step(batches))
                self.step += 1
                self.follow()
                self.history.seconds = before + time.perf_counter() - begin
                record: dict[str, float] = {"step": self.step, "seconds": self.history.seconds}
                if self.due(options.log_every):
                    record["loss"] = math.fsum(self.window) / len(self.window)
                    record["lr"] = options.lr_at(self.step - 1)
                    self.window = []
                if validate is not None and self.due(options.validate_every):
                    show({**record, "validating": 1.0})
                    record["validation"] = self.validated(validate)
                if len(record) > 2:
                    self.history.records.append(record)
                    self.write_log()
                show(record)
                if told is not None:
                    told(record)
                if self.due(options.checkpoint_every):
                    self.save()

    def check_batches(self, batches: Callable[[int], Any]) -> None:
        """ValueError where a stopped run goes on with other batches."""
        before = self.resumed_after
        if before is None or self.step >= self.options.steps or self.rank != 0:
            return
        found = _described(before["number"], batches(before["number"]))
        if found != before:
            raise ValueError(
                f"{self.folder}: expected a run with batch {before['number']} of digest "
                f"{found['digest']}, got {before['digest']}: batches must be a pure function of "
                "their number and of the same data; choose another folder or remove this one"
            )

    def follow(self) -> None:
        """Moves the mean towards the weights."""
        if not self.mean:
            return
        kept = min(self.options.average, self.step / (self.step + 10))
        weights = untied_weights(self.model)
        with torch.no_grad():
            for name, mean in self.mean.items():
                if mean.is_floating_point():
                    mean.lerp_(weights[name], 1 - kept)
                else:
                    mean.copy_(weights[name])

    def due(self, every: int) -> bool:
        """Whether something done every so many steps is due after this one."""
        last = self.step == self.options.steps
        return last or (every > 0 and self.step % every == 0)

    def one_step(self, batches: Callable[[int], Any]) -> float:
        """One update; returns its loss, the mean over processes."""
        options, parts = self.options, self.options.accumulate
        # torch's CPU generator reads the lower 32 bits of a seed only, so they must hold all three.
        torch.manual_seed(((options.seed * 0x9E3779B1 + self.step) * 1024 + self.rank) % 2**32)
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part in range(parts):
            batch = batches(self.step * parts + part)
            self.last = (self.step * parts + part, batch)
            last = part == parts - 1
            wait = self.world > 1 and not last
            with self.with_loss.no_sync() if wait else nullcontext():  # type: ignore[operator]
                with torch.autocast(self.device.type, torch.bfloat16, enabled=options.bf16):
                    value = self.with_loss(batch) / parts
                value.backward()
            total += value.detach()
        if self.world > 1:
            dist.all_reduce(total)
            total /= self.world
        self.refuse_unless_finite("loss", total)
        for parameter, mask in self.masks:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.refuse_unless_finite("gradient norm", norm)
        self.optimizer.step()
        return float(total)

    def refuse_unless_finite(self, name: str, value: Tensor) -> None:
        """ValueError with a remedy where a number went wrong."""
        if math.isfinite(float(value)):
            return
        lr = self.options.lr_at(self.step)
        saved = self.folder is not None and (self.folder / "training.pt").is_file()
        remedy = "lower lr" + (" or turn bf16 off" if self.options.bf16 else "")
        stands = f"; {self.folder}/training.pt of an earlier step stands" if saved else ""
        raise ValueError(
            f"{name}: expected a finite number at step {self.step}, got {float(value)} "
            f"with lr {lr:.3g}; {remedy}{stands}"
        )

    def validated(self, validate: Callable[[nn.Module], float]) -> float:
        """The value of process 0, for all; keeps the best weights."""
        value = torch.zeros((), dtype=torch.float64, device=self.device)
        current = _copy_of_weights(self.model) if self.mean else {}
        if self.mean:
            copy_weights(self.model, self.mean, "mean weights")
        if self.rank == 0:
            self.model.eval()
            with torch.no_grad():
                value += validate(self.model)
        if self.world > 1:
            dist.broadcast(value, 0)
        if float(value) < self.history.best:
            self.history.best, self.history.best_step = float(value), self.step
            self.best_weights = _copy_of_weights(self.model)
        if current:
            copy_weights(self.model, current, "weights")
        return float(value)

    def save(self) -> None:
        """Writes training.pt."""
        if self.folder is None or self.rank != 0:
            return
        state = {
            "options": asdict(self.options),
            "step": self.step,
            "batch": self.resumed_after if self.last is None else _described(*self.last),
            "window": self.window,
            "model": _copy_of_weights(self.model),
            "optimizer": self.optimizer.state_dict(),
            "best_weights": self.best_weights,
            "mean": self.mean,
            "history": asdict(self.history),
        }
        save_state(self.folder / "training.pt", state)

    def write_log(self) -> None:
        """Writes log.jsonl; a resumed run drops what lies after its checkpoint."""
        if self.folder is None or self.rank != 0:
            return
        with replace_file(self.folder / "log.jsonl") as temporary:
            lines = [json.dumps(record) + "\n" for record in self.history.records]
            temporary.write_text("".join(lines), encoding="utf-8")


def _described(number: int, batch: Any) -> dict[str, Any]:
    return {"number": number, "digest": batch_digest(batch)}


def _copy_of_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().cpu().clone() for name, x in untied_weights(model).items()}


def _masked_parameters(
    model: nn.Module, masks: Mapping[str, Tensor]
) -> list[tuple[nn.Parameter, Tensor]]:
    """Parameters with their masks; zeroes what is masked now, so that AdamW leaves it there."""
    parameters = dict(model.named_parameters())
    pairs = []
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"masks: expected names of parameters, got {name!r}")
        parameter = parameters[name]
        if mask.shape != parameter.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"masks[{name!r}]: expected bool of shape {tuple(parameter.shape)}, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        pairs.append((parameter, mask.to(parameter.device)))
        with torch.no_grad():
            parameter.masked_fill_(~pairs[-1][1], 0.0)
    return pairs


def _join_processes() -> tuple[int, int]:
    """(rank, world) of this process; joins torchrun's group where there is one."""
    if not dist.is_available():
        return 0, 1
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()
