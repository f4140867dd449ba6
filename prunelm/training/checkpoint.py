"""Saves and loads trained models, and the state of a training run.

A model is a folder: `model.safetensors` (each tied tensor once), `tokenizer.model`, and
`model.json` with the format's number, the kind, the config, the tokenizer's fingerprint and what
the caller adds. The json is written last and holds a digest of the weights, so that files of two
saves never pass for one model. Weights of a module of another make are of kind "module"; their
config is what the caller wants back. Without a tokenizer there is no such file and no fingerprint.
"""

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunelm.data.files import replace_file, replace_files, require_file, shown
from prunelm.data.tokenizer import Tokenizer
from prunelm.nn import refuse_accelerated

FORMAT = 1
OWN = "module"
MODEL_FILES = ("model.json", "model.safetensors", "tokenizer.model", "masks.safetensors")
_KINDS = {
    "lm": ("prunelm.models.lm", "TransformerLM", "LMConfig"),
    "transducer": ("prunelm.models.transducer", "Transducer", "TransducerConfig"),
}


def save_model(
    folder: Path | str,
    model: nn.Module,
    tokenizer: Tokenizer,
    extra: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a model that `load_model` reads; where that fails, an earlier save there stays whole.

    Args:
        model: a `TransformerLM` or `Transducer`.
        extra: JSON values to keep beside it, such as metrics.
        dtype: what floats are stored as, such as torch.float16; None: as they are.

    Raises:
        ValueError: another kind of model, an accelerated one, another vocabulary, or a weight that
            `dtype` cannot hold.
        OSError: a file cannot be written.
    """
    check_savable(model, tokenizer)
    save_weights(folder, model, model.config.to_dict(), tokenizer, extra, dtype=dtype)  # type: ignore[operator,union-attr]


def check_savable(model: nn.Module, tokenizer: Tokenizer) -> None:
    """ValueError, as `save_model` raises it, for a model of another make or vocabulary."""
    if kind_of(model) == OWN:
        name = type(model).__name__
        raise ValueError(f"model: expected a TransformerLM or a Transducer, got {name}")
    check_vocabulary(model.config.to_dict(), tokenizer)  # type: ignore[operator,union-attr]


def check_vocabulary(config: Mapping[str, Any], tokenizer: Tokenizer | None) -> None:
    """ValueError where a tokenizer is of another size than a model's config says."""
    vocabulary = config.get("vocab_size")
    if tokenizer is not None and vocabulary not in (None, tokenizer.vocab_size):
        raise ValueError(
            f"tokenizer: expected the model's {vocabulary} ids, got {tokenizer.vocab_size}"
        )


def save_weights(
    folder: Path | str,
    model: nn.Module,
    config: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    extra: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    """As `save_model`, for any module and also without a tokenizer.

    Args:
        config: JSON values.
        masks: for `masks.safetensors`; without any, those of an earlier save are removed.
    """
    from safetensors.torch import save

    refuse_accelerated(model, "save the original and accelerate what is loaded")
    check_vocabulary(config, tokenizer)
    weights = {}
    for name, tensor in untied_weights(model).items():
        stored = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
        if not bool(stored.isfinite().all()):
            raise ValueError(f"{name}: expected finite weights in {stored.dtype}, got inf or nan")
        weights[name] = stored.contiguous()
    data = save(weights)
    values = {
        "format": FORMAT,
        "kind": kind_of(model),
        "config": dict(config),
        "tokenizer": tokenizer.fingerprint if tokenizer is not None else None,
        "weights": hashlib.sha256(data).hexdigest()[:16],
        "extra": dict(extra or {}),
    }
    files = {
        "model.safetensors": data,
        "tokenizer.model": tokenizer.model if tokenizer is not None else None,
        "masks.safetensors": masks_as_bytes(masks or {}),
        "model.json": (json.dumps(values, indent=1) + "\n").encode(),
    }
    replace_files(folder, files)


def masks_as_bytes(masks: Mapping[str, Tensor]) -> bytes | None:
    """Masks as a safetensors file holds them, None where there are none."""
    from safetensors.torch import save

    return save({n: x.cpu().contiguous() for n, x in masks.items()}) if masks else None


def load_model(
    folder: Path | str, *, kind: str | None = None, tokenizer: Tokenizer | None = None
) -> tuple[nn.Module, Tokenizer, dict[str, Any]]:
    """The model (float32, CPU, eval mode), its tokenizer, and all that `model.json` says.

    Args:
        kind: "lm" or "transducer", to insist on one.
        tokenizer: to insist on its vocabulary.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is cut short or of another save, kind, format or vocabulary, or a weight
            is not finite.
    """
    folder = Path(folder)
    info = read_info(folder)
    if kind is not None and info["kind"] != kind:
        raise ValueError(f"{folder}: expected a model of kind {kind}, got {info['kind']}")
    if info["kind"] == OWN:
        raise ValueError(
            f"{folder}: expected a model of kind {' or '.join(_KINDS)}, got a module of another "
            "make; prunelm.load_result(folder, model) fills one that you build"
        )
    own = load_tokenizer(folder, info)
    if own is None:
        raise ValueError(
            f"{folder}: expected a model and its tokenizer, got one saved without a tokenizer; "
            "prunelm.load_result reads it"
        )
    if tokenizer is not None:
        tokenizer.check(own.fingerprint, str(folder))
    return build_model(folder, info), own, info


def read_info(folder: Path | str) -> dict[str, Any]:
    """What `model.json` says; raises as `load_model`."""
    return _read_json(Path(folder) / "model.json")


def load_tokenizer(folder: Path | str, info: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer saved beside a model, None where there was none; raises as `load_model`."""
    if info["tokenizer"] is None:
        return None
    own = Tokenizer.load(Path(folder) / "tokenizer.model")
    own.check(info["tokenizer"], f"{Path(folder) / 'model.json'}")
    return own


def read_weights(folder: Path | str, info: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights that belong to a `model.json`; raises as `load_model`."""
    path = Path(folder) / "model.safetensors"
    weights = _read_weights(path, info["weights"])
    for name, tensor in weights.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: expected finite weights, got NaN or infinity in {name}")
    return weights


def build_model(folder: Path | str, info: Mapping[str, Any]) -> nn.Module:
    """The model of a config with its weights; raises as `load_model`."""
    source, weights = Path(folder) / "model.safetensors", read_weights(folder, info)
    module_name, model_name, config_name = _KINDS[info["kind"]]
    module = importlib.import_module(module_name)
    try:
        config = getattr(module, config_name).from_dict(info["config"])
        # Without memory, so that a config of another size is refused before any is taken.
        with torch.device("meta"), _Unfilled():
            check_weights(getattr(module, model_name)(config), weights, str(source))
    except (KeyError, TypeError, OverflowError, AttributeError, RuntimeError, ValueError) as error:
        if str(source) in str(error):
            raise
        raise ValueError(f"{Path(folder) / 'model.json'}: config: {_one_line(error)}") from None
    model: nn.Module = getattr(module, model_name)(config)
    copy_weights(model, weights, str(source))
    return model.eval()


class _Unfilled(TorchFunctionMode):
    """Has `torch.nn.init` do nothing: for weights without memory, it would import the compiler."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def untied_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict's own tensors, each under its first name only."""
    seen: set[int] = set()
    first = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:  # modules may add other things
            seen.add(id(tensor))
            first[name] = tensor
    return first


def copy_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copies weights into a model; ValueError, naming `source`, unless names and shapes agree."""
    check_weights(model, weights, source)
    with torch.no_grad():
        for name, tensor in untied_weights(model).items():
            tensor.copy_(weights[name])


def check_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """ValueError, naming `source`, unless weights have a model's names and shapes."""
    wanted = untied_weights(model)
    for name in [*wanted, *weights]:
        if name not in weights or name not in wanted:
            found = "nothing" if name not in weights else f"{tuple(weights[name].shape)} for it"
            expected = "no tensor" if name not in wanted else f"{tuple(wanted[name].shape)}"
            raise ValueError(f"{source}: expected {expected} under {name}, got {found}")
        if weights[name].shape != wanted[name].shape:
            raise ValueError(
                f"{source}: expected {name} of shape {tuple(wanted[name].shape)}, "
                f"got {tuple(weights[name].shape)}"
            )


def save_state(path: Path | str, state: Mapping[str, Any]) -> None:
    """Writes the state of a run: tensors, numbers, strings, and dicts and lists of them.

    Raises:
        OSError: the file cannot be written; what was there before stays.
    """
    with replace_file(path) as temporary, temporary.open("wb") as file:
        writer = _Writer(file)
        try:
            torch.save(dict(state), writer)  # type: ignore[arg-type]
        except RuntimeError:
            if writer.error is None:
                raise
            raise writer.error from None


class _Writer:
    """A file that remembers why it could not be written: torch's message keeps silent about it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Writes all of `data`."""
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Hands what is buffered to the system."""
        self.file.flush()


def load_state(path: Path | str) -> dict[str, Any]:
    """Reads what `save_state` wrote; ValueError where the file is cut short or something else."""
    path = require_file("training state", path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes lead the unpickler to any of them
        size = path.stat().st_size
        raise ValueError(
            f"{path}: expected a whole training state, got {size} bytes that do not read as one "
            f"({type(error).__name__}); remove it to start again"
        ) from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a training state, got {type(state).__name__}")
    return state


def kind_of(model: nn.Module) -> str:
    """ "lm", "transducer", or "module" for one of another make."""
    name = type(model).__name__
    for kind, (module, model_name, _) in _KINDS.items():
        if (name, type(model).__module__) == (model_name, module):
            return kind
    return OWN


def _one_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return shown(lines[0]) if lines else type(error).__name__


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        require_file("model", path)
    except FileNotFoundError as error:
        inside = sorted(str(each.parent) for each in path.parent.glob("*/model.json"))
        if not inside:
            raise
        listed = ", ".join(inside[:5]) + (", ..." if len(inside) > 5 else "")
        raise FileNotFoundError(f"{error}; models lie in {listed}") from None
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: expected JSON, got a file cut short or changed") from None
    fields = {"format", "kind", "config", "tokenizer", "weights", "extra"}
    if not isinstance(info, dict) or not fields <= set(info):
        raise ValueError(f"{path}: expected the fields {sorted(fields)}, got other ones")
    if info["format"] != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}, got {shown(info['format'])}")
    kinds = sorted((*_KINDS, OWN))
    if not isinstance(info["kind"], str) or info["kind"] not in kinds:
        raise ValueError(f"{path}: expected a kind of {kinds}, got {shown(repr(info['kind']))}")
    for name in ("config", "extra"):
        if not isinstance(info[name], dict):
            raise ValueError(f"{path}: expected {name} as an object, got {shown(info[name])}")
    return info


def _read_weights(path: Path, digest: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    require_file("model", path)
    try:
        weights: dict[str, Tensor] = load_file(path)
    except SafetensorError:
        size = path.stat().st_size
        raise ValueError(f"{path}: expected whole weights, got {size} bytes cut short") from None
    found = _digest(path)
    if found != digest:
        raise ValueError(f"{path}: expected the weights {shown(digest)} of model.json, got {found}")
    return weights
