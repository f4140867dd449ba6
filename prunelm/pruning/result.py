"""What pruning gives back: a model, its masks, and what happened on the way."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunelm.data.files import replace_files, shown
from prunelm.data.tokenizer import Tokenizer
from prunelm.nn import refuse_accelerated
from prunelm.pruning.resizing import numbers_of, resize
from prunelm.training.checkpoint import (
    OWN,
    build_model,
    kind_of,
    load_tokenizer,
    masks_as_bytes,
    read_info,
    read_weights,
    save_weights,
    untied_weights,
)
from prunelm.training.pretrained import ChosenSearch, read_chosen, write_chosen


@dataclass(frozen=True)
class Round:
    """One round: what went, and what it cost.

    Losses are means over the calibration batches, in nats: before the round, after the removal,
    after the recovery; None without data. `predicted` is the criterion's estimate of the rise by
    the removal, where its scores are in units of loss. `metric` is what `validate` said after the
    removal and after the recovery.
    """

    asked: int
    size: int
    gone: Mapping[str, int]
    predicted: float | None = None
    loss_before: float | None = None
    loss_pruned: float | None = None
    loss_recovered: float | None = None
    metric_pruned: float | None = None
    metric_recovered: float | None = None
    steps: int = 0

    @property
    def rise(self) -> float | None:
        """The real rise of the loss by the removal."""
        if self.loss_before is None or self.loss_pruned is None:
            return None
        return self.loss_pruned - self.loss_before


@dataclass(frozen=True)
class Result:
    """A pruned model.

    Args:
        model: dense where it shrank, zeros where it is masked.
        masks: by parameter name, bool of its shape; keep them while training on.
        target: as it was asked; `asked` is that in parameters.
        size: parameters reached, tied ones once, masked elements not counted.
        dense_size: before the first round.
        rounds: all rounds since the dense model.
        settings: method, criterion, schedule and recovery, in words.
        metric_dense: what `validate` said of the dense model.
        tokenizer: the model's.
        chosen: search settings that were chosen with the model that it was made from.
    """

    model: nn.Module
    masks: Mapping[str, Tensor]
    target: str | int
    asked: int
    size: int
    dense_size: int
    rounds: tuple[Round, ...]
    settings: Mapping[str, str]
    metric_dense: float | None = None
    tokenizer: Tokenizer | None = field(default=None, repr=False)
    chosen: tuple[ChosenSearch, ...] = ()

    @property
    def metric(self) -> float | None:
        """What `validate` says of this model."""
        return self.rounds[-1].metric_recovered if self.rounds else self.metric_dense

    def to_dict(self) -> dict[str, Any]:
        """JSON values: everything but the model, its masks and its tokenizer."""
        names = ("target", "asked", "size", "dense_size", "metric_dense")
        values = {name: getattr(self, name) for name in names}
        rounds = [{**asdict(each), "gone": dict(each.gone)} for each in self.rounds]
        return {**values, "settings": dict(self.settings), "rounds": rounds}

    def report(self) -> str:
        """A few lines to read: sizes, what went, losses by round, the metric."""
        gone: dict[str, int] = {}
        for each in self.rounds:
            for kind, count in each.gone.items():
                gone[kind] = gone.get(kind, 0) + count
        lines = [
            f"size       asked {self.asked:,} ({self.target}), reached {self.size:,} of "
            f"{self.dense_size:,} ({100 * self.size / self.dense_size:.2f} %)",
            "gone       " + (", ".join(f"{n:,} {kind}s" for kind, n in gone.items()) or "nothing"),
        ]
        if self.metric_dense is not None and self.rounds:
            last = self.rounds[-1]
            lines.append(
                f"metric     dense {self.metric_dense:.4g}, after the last removal "
                f"{_number(last.metric_pruned)}, recovered {_number(last.metric_recovered)}"
            )
        if any(each.loss_before is not None for each in self.rounds):
            lines.append("round       size  predicted rise  real rise  loss recovered  steps")
        for i, each in enumerate(self.rounds, 1):
            if each.loss_before is not None:
                lines.append(
                    f"{i:5d} {each.size:10,}  {_number(each.predicted):>14}  "
                    f"{_number(each.rise):>9}  {_number(each.loss_recovered):>14}  {each.steps:5d}"
                )
        lines += [f"{name:10s} {value}" for name, value in self.settings.items()]
        return "\n".join(lines)

    def save(
        self,
        folder: Path | str,
        tokenizer: Tokenizer | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Writes model.safetensors, tokenizer.model, model.json, and masks and search if any.

        `training.checkpoint.load_model` reads a language model or a recogniser that was saved with
        its tokenizer; `load_result` reads everything, a module of another make into one that the
        caller builds.

        Args:
            tokenizer: the model's; None: the one that the run was given, if any.
            dtype: what weights are stored as; None: as they are.

        Raises:
            ValueError: the model has been accelerated, the tokenizer has another vocabulary, or a
                weight is not finite in `dtype`.
        """
        own = kind_of(self.model) == OWN
        config: Any = {"numbers": numbers_of(self.model)} if own else self.model.config.to_dict()  # type: ignore[operator,union-attr]
        extra = {"pruning": self.to_dict()}
        refuse_accelerated(self.model, "save the original and accelerate what is loaded")
        tokenizer = tokenizer or self.tokenizer
        save_weights(
            folder, self.model, config, tokenizer, extra, dtype=dtype, masks=self.masks
        )  # fmt: skip
        write_chosen(folder, self.chosen)


def load_result(folder: Path | str, model: nn.Module | None = None) -> Result:
    """What `Result.save` wrote; in eval mode.

    Args:
        model: for a module of another make than this project's: one built as before pruning. A
            copy of it gets the saved sizes and weights, in its dtype and on its device.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is cut short, the model there was not pruned, `model` is missing or not
            wanted, or it has other parameters than were saved.
    """
    info = read_info(folder)
    values = info["extra"].get("pruning")
    if values is None:
        raise ValueError(f"{folder}: expected a pruned model, got one without a pruning record")
    tokenizer = load_tokenizer(folder, info)
    if info["kind"] != OWN:
        if model is not None:
            raise ValueError(
                f"model: expected None, as {folder} tells how to build its {info['kind']}, "
                f"got {type(model).__name__}"
            )
        loaded = build_model(folder, info)
    elif model is None:
        raise ValueError(
            f"model: expected a module to fill with the weights in {folder}, built as before "
            "pruning, got None"
        )
    else:
        loaded = _filled(model, folder, info)
    masks = read_masks(Path(folder) / "masks.safetensors", loaded)
    try:
        rounds = tuple(Round(**each) for each in values["rounds"])
        result = Result(
            model=loaded,
            masks=masks,
            tokenizer=tokenizer,
            target=values["target"],
            asked=values["asked"],
            size=values["size"],
            dense_size=values["dense_size"],
            rounds=rounds,
            settings=values["settings"],
            metric_dense=values["metric_dense"],
            chosen=read_chosen(folder),
        )
        result.report()
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"{Path(folder) / 'model.json'}: expected a whole pruning record, got one changed or "
            f"of another version ({type(error).__name__}: {shown(error)})"
        ) from None
    return result


def _filled(model: nn.Module, folder: Path | str, info: Mapping[str, Any]) -> nn.Module:
    """A copy of a module with the sizes and weights that were saved."""
    weights, wanted = read_weights(folder, info), untied_weights(model)
    for name, tensor in weights.items():
        found = wanted.get(name)
        if found is None:
            continue
        larger = [a > b for a, b in zip(tensor.shape, found.shape, strict=False)]
        if tensor.dim() != found.dim() or any(larger):
            raise ValueError(
                f"model: expected {name} of at least {tuple(tensor.shape)}, the shape saved in "
                f"{folder}, got {tuple(found.shape)}"
            )
    device = next((t.device for t in wanted.values()), torch.device("cpu"))
    on_device = {name: tensor.to(device) for name, tensor in weights.items()}
    try:
        return resize(model, on_device, info["config"].get("numbers")).eval()
    except ValueError as error:
        message = str(error).removeprefix("resize: ")
        raise ValueError(f"model: {message} in {folder}") from None


def write_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Writes masks; without any, removes what an earlier save left."""
    replace_files(path.parent, {path.name: masks_as_bytes(masks)})


def read_masks(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The masks in a file, {} where there is none; ValueError unless they fit the model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        return {}
    try:
        masks: dict[str, Tensor] = load_file(path)
    except SafetensorError:
        size = path.stat().st_size
        raise ValueError(f"{path}: expected whole masks, got {size} bytes cut short") from None
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        shape = tuple(parameters[name].shape) if name in parameters else None
        if tuple(mask.shape) != shape:
            raise ValueError(f"{path}: expected {shape} under {name}, got {tuple(mask.shape)}")
    return masks


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
