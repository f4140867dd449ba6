"""The folder of a pruning run: what is finished, so that a stopped run goes on where it was."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunelm.data.files import replace_file
from prunelm.data.runs import claim, hold
from prunelm.pruning.calibration import is_main_process, wait_for_all
from prunelm.pruning.recovery import clear
from prunelm.pruning.resizing import numbers_of, resize, state_of
from prunelm.pruning.result import Round, read_masks, write_masks
from prunelm.training.batches import batch_digest
from prunelm.training.facts import config_facts, last_bits


@dataclass(frozen=True)
class Entry:
    """A finished round, without its weights."""

    round: Round
    steps: int  # data steps used up so far
    metric_dense: float | None


@dataclass(frozen=True)
class Journal:
    """Rounds on disk: `round-003/` holds weights, masks and, written last, `round.json`.

    Weights of rounds between two targets are removed when the next round is there. With folder
    None nothing is written and nothing is found.
    """

    folder: Path | None

    def hold(self) -> AbstractContextManager[None]:
        """Keeps other processes out of the folder, see `data.runs.hold`."""
        if self.folder is None or not is_main_process():
            return nullcontext()
        return hold(self.folder)

    def claim(self, model: nn.Module, facts: Mapping[str, Any]) -> None:
        """Marks a new folder as this run's; ValueError, naming the fact, where it is another's."""
        if self.folder is None:
            return
        if is_main_process():
            own = {**facts, "model": fingerprint(model), **config_facts(model)}
            device = next(model.parameters()).device
            claim(self.folder, own, noted=last_bits(device), makes=("round-000",))
        wait_for_all()

    def check_batch(self, data: Callable[[int], Any] | None) -> None:
        """Notes the first batch; ValueError where a stopped run goes on with another."""
        if self.folder is None or data is None or not is_main_process():
            return
        path, digest = self.folder / "batch.json", batch_digest(data(0))
        before = _read_json(path).get("digest") if path.is_file() else None
        if before is None:
            with replace_file(path) as temporary:
                temporary.write_text(json.dumps({"digest": digest}) + "\n", encoding="utf-8")
        elif before != digest:
            raise ValueError(
                f"{self.folder}: expected a run with batch 0 of digest {digest}, got {before}: "
                "data must be a pure function of the step, of the same text or speech; choose "
                "another folder or remove this one"
            )

    def read(self, position: int) -> Entry | None:
        """The round at `position`, None where it is not finished."""
        path = self._round(position) / "round.json" if self.folder else None
        if path is None or not path.is_file():
            return None
        values = _read_json(path)
        try:
            record = Round(**values["round"])
            return Entry(record, int(values["steps"]), values["metric_dense"])
        except (KeyError, TypeError):
            raise ValueError(f"{path}: expected a round's record, got {sorted(values)}") from None

    def weights(self, position: int, model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model (built like `model`) and masks after the round at `position`."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._round(position) / "weights.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"round {position}: expected a file, got {path}")
        try:
            state: dict[str, Tensor] = load_file(path)
        except SafetensorError:
            size = path.stat().st_size
            raise ValueError(
                f"{path}: expected whole weights, got {size} bytes cut short"
            ) from None
        device = next(model.parameters()).device
        numbers = _read_json(self._round(position) / "round.json").get("numbers", {})
        state = {name: tensor.to(device) for name, tensor in state.items()}
        try:
            smaller = resize(model, state, numbers)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from None
        masks = read_masks(self._round(position) / "masks.safetensors", smaller)
        return smaller, {name: mask.to(device) for name, mask in masks.items()}

    def write(
        self,
        position: int,
        entry: Entry,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        *,
        forget: bool,
    ) -> None:
        """Saves a round; `forget`: the weights of the one before are not needed any more."""
        from safetensors.torch import save

        if self.folder is None:
            return
        place = self._round(position)
        if is_main_process():
            state = {name: tensor.cpu().contiguous() for name, tensor in state_of(model).items()}
            with replace_file(place / "weights.safetensors") as temporary:
                temporary.write_bytes(save(state))
            write_masks(place / "masks.safetensors", masks)
            values = {
                "round": {**asdict(entry.round), "gone": dict(entry.round.gone)},
                "steps": entry.steps,
                "metric_dense": entry.metric_dense,
                "numbers": numbers_of(model),
            }
            with replace_file(place / "round.json") as temporary:
                temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
            if forget:
                for name in ("weights.safetensors", "masks.safetensors"):
                    (self._round(position - 1) / name).unlink(missing_ok=True)
        wait_for_all()
        clear(place / "recovery")

    def recovery_folder(self, position: int) -> Path | None:
        """Where the recovery of a round may keep its own checkpoints."""
        return self._round(position) / "recovery" if self.folder is not None else None

    def _round(self, position: int) -> Path:
        assert self.folder is not None
        return self.folder / f"round-{position:03d}"


def fingerprint(model: nn.Module) -> str:
    """16 hex digits that change with any weight."""
    digest = hashlib.sha256()
    for name, tensor in state_of(model).items():
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected JSON, got a file cut short or changed")
    return values
