"""Floating-point operations of a language model, by formula."""

from torch import Tensor, nn

from prunelm.models.lm import Block, TransformerLM
from prunelm.nn import BlockSparseLinear, LowRankLinear


def flops_per_token(model: TransformerLM, context: int, *, zeros: bool = True) -> int:
    """Operations to predict one more token with `context` tokens in view, itself among them.

    A multiply-add is two operations. Counted are the linears (their stored blocks or factors), the
    output head, and attention's two products, 4 * heads * head_dim * context per block; not biases,
    norms, activations, softmax and the embedding's look-up. Times L, with context = L, this is what
    torch.utils.flop_counter counts in a forward pass over L tokens.

    Args:
        context: at least 1.
        zeros: whether a weight that is zero counts, as it does for a dense kernel.
    """
    if context < 1:
        raise ValueError(f"context: expected at least 1, got {context}")
    multiplies = _size(model.embedding.weight, zeros)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            multiplies += _size(module.weight, zeros)
        elif isinstance(module, LowRankLinear):
            multiplies += _size(module.down, zeros) + _size(module.up, zeros)
        elif isinstance(module, BlockSparseLinear):
            multiplies += _size(module.values, zeros)
        elif isinstance(module, Block):
            multiplies += 2 * module.heads * module.head_dim * context
    return 2 * multiplies


def _size(weight: Tensor, zeros: bool) -> int:
    return weight.numel() if zeros else int(weight.count_nonzero())
