"""The recogniser's training loss: CTC alone until alignments stand, then RNN-T and CTC."""

from dataclasses import dataclass

from torch import Tensor, nn

from prunelm.data.speech_batches import SpeechBatch


@dataclass(frozen=True)
class TransducerLoss:
    """loss(model, batch) for `train`.

    RNN-T alone first learns what its predictor can say without audio, and stays there for long; CTC
    has no predictor and finds the alignments.

    Attributes:
        ctc_first: batches that train the encoder by CTC only.
    """

    ctc_first: int = 0

    def __post_init__(self) -> None:
        if self.ctc_first < 0:
            raise ValueError(f"ctc_first: expected at least 0 batches, got {self.ctc_first}")

    def __call__(self, model: nn.Module, batch: SpeechBatch) -> Tensor:
        """A scalar, nats per token."""
        loss: Tensor = model.loss(  # type: ignore[operator]
            batch.features,
            batch.lengths,
            batch.targets,
            batch.target_lengths,
            ctc_weight=1.0 if batch.number < self.ctc_first else None,
        )
        return loss
