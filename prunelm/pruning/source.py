"""What a pruner starts from: a module, or a loaded model with what lies beside it."""

from collections.abc import Mapping

from torch import Tensor, nn

from prunelm.data.tokenizer import Tokenizer
from prunelm.nn import refuse_accelerated
from prunelm.pruning.result import read_masks
from prunelm.training.pretrained import ChosenSearch, LoadedLM, LoadedRecogniser
from prunelm.training.unwrapping import unwrapped

Source = nn.Module | LoadedLM | LoadedRecogniser


def opened(
    model: Source, tokenizer: Tokenizer | None, masks: Mapping[str, Tensor] | None
) -> tuple[nn.Module, Tokenizer | None, Mapping[str, Tensor], tuple[ChosenSearch, ...]]:
    """The module, its tokenizer, its masks and the searches that were chosen for it.

    Raises:
        ValueError: neither a module nor a loaded model, or one that is no start for pruning.
    """
    if isinstance(model, nn.Module):
        return unwrapped(model), tokenizer, masks or {}, ()
    if not isinstance(model, LoadedLM | LoadedRecogniser):
        raise ValueError(
            f"model: expected a torch.nn.Module or what prunelm.load_lm gives, got {model!r}"
        )
    refuse_unfit(model.model)
    if masks is None:
        masks = read_masks(model.folder / "masks.safetensors", model.model)
    return model.model, tokenizer or model.tokenizer, masks, model.chosen


def refuse_unfit(model: nn.Module) -> None:
    """ValueError for a model that is no start for pruning."""
    refuse_accelerated(model, "prune the original and accelerate the result")
    named = dict(model.named_parameters())
    if not named:
        raise ValueError(f"model: expected parameters, got {type(model).__name__} without any")
    for name, parameter in named.items():
        if nn.parameter.is_lazy(parameter) or parameter.is_meta:
            raise ValueError(f"model: expected weights, got {name} without any yet")
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"model: expected finite weights, got NaN or infinity in {name}")
