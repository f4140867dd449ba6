"""RNN-T loss (Graves 2012, arXiv 1211.3711): softmax, forward-backward and gradient in one op."""

from typing import Any

import torch
from torch import Tensor

from prunelm.ops import _library  # noqa: F401  (loads the extension)
from prunelm.ops.tensors import check_one_device, check_tensors


def rnnt_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = 0,
) -> Tensor:
    """-log P(targets | logits) per utterance, summed over all alignments.

    An alignment starts at frame 0, emits each target in order, and ends with a blank from the last
    frame. The softmax over V is inside. The lattice is kept in float64.

    Args:
        logits: [B, T, U + 1, V] float32 or float64, the joiner's output before softmax.
        targets: [B, U] int64; what lies past an utterance's own length is not read.
        logit_lengths: [B] int64, 1 to T.
        target_lengths: [B] int64, 0 to U.
        blank: the blank token.

    Returns:
        [B], logits' dtype; +inf where no alignment has a probability.

    Raises:
        RuntimeError: a shape, dtype, length or token is not as above.
    """
    check_tensors(
        logits=logits,
        targets=targets,
        logit_lengths=logit_lengths,
        target_lengths=target_lengths,
    )
    loss: Tensor = torch.ops.prunelm.rnnt_loss(
        logits.contiguous(), targets.contiguous(), logit_lengths, target_lengths, blank
    )[0]
    return loss


def rnnt_loss_reference(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = 0,
) -> Tensor:
    """rnnt_loss in plain torch, one lattice cell at a time; differentiable by autograd."""
    check_tensors(
        logits=logits,
        targets=targets,
        logit_lengths=logit_lengths,
        target_lengths=target_lengths,
    )
    log_probs = logits.log_softmax(-1)
    losses = []
    for b in range(len(logits)):
        frames, tokens = int(logit_lengths[b]), int(target_lengths[b])
        alpha = {(0, 0): log_probs.new_zeros(())}
        for t in range(frames):
            for u in range(tokens + 1):
                ways = []
                if t > 0:
                    ways.append(alpha[t - 1, u] + log_probs[b, t - 1, u, blank])
                if u > 0:
                    ways.append(alpha[t, u - 1] + log_probs[b, t, u - 1, targets[b, u - 1]])
                if ways:
                    alpha[t, u] = torch.stack(ways).logsumexp(0)
        losses.append(-(alpha[frames - 1, tokens] + log_probs[b, frames - 1, tokens, blank]))
    return torch.stack(losses) if losses else logits.sum((1, 2, 3))


@torch.library.register_fake("prunelm::rnnt_loss")
def _fake(
    logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor, blank: int
) -> tuple[Tensor, Tensor]:
    check_one_device(
        {
            "logits": logits,
            "targets": targets,
            "logit_lengths": logit_lengths,
            "target_lengths": target_lengths,
        }
    )
    return logits.new_empty(logits.shape[0]), torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    check_tensors(gradient=gradient, grad=grad)
    return gradient * grad[:, None, None, None], None, None, None, None


torch.library.register_autograd("prunelm::rnnt_loss", _backward, setup_context=_save)
