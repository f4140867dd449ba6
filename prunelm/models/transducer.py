"""Transformer Transducer (arXiv 2002.02562), with a Conformer encoder (2005.08100) beside it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelm.models.encoder import Block, ConformerBlock, Dropout, Subsampling, inside
from prunelm.models.lm import LayerSizes
from prunelm.nn import LowRankLinear
from prunelm.ops.rnnt_loss import rnnt_loss

BLANK = 0


@dataclass(frozen=True)
class TransducerConfig:
    """Everything that shapes a `Transducer`; layers may differ in size, as they do after pruning.

    Attributes:
        vocab_size: V, blank among them.
        layers: sizes of the encoder's blocks, the first below.
        dim: D, the encoder's width.
        head_dim: width of an attention head, even.
        encoder: a Conformer learns faster from few hours than a Transformer.
        kernel: frames under a Conformer block's convolution, odd.
        bins: F, features per frame.
        channels: of the two subsampling convolutions.
        predictor: stateless reads the last `context` tokens, transformer the whole prefix.
        predictor_dim: P.
        predictor_layers: sizes of a Transformer predictor's blocks.
        joiner_dim: width of the sum under the tanh.
        ctc_weight: share of the CTC loss beside RNN-T; 0 leaves its layer out.
        ranks: linears in blocks that are factorised, "blocks.3.ff_in" -> R.
    """

    vocab_size: int
    layers: tuple[LayerSizes, ...]
    dim: int = 144
    head_dim: int = 48
    encoder: Literal["conformer", "transformer"] = "conformer"
    kernel: int = 15
    bins: int = 80
    channels: int = 32
    predictor: Literal["stateless", "transformer"] = "stateless"
    context: int = 2
    predictor_dim: int = 144
    predictor_layers: tuple[LayerSizes, ...] = ()
    joiner_dim: int = 128
    dropout: float = 0.1
    ctc_weight: float = 0.3
    ranks: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "dim", "head_dim", "bins", "channels", "context", "predictor_dim")
        for name in (*sizes, "kernel", "joiner_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {self.head_dim}")
        if self.encoder not in ("conformer", "transformer"):
            raise ValueError(f"encoder: expected conformer or transformer, got {self.encoder!r}")
        if self.predictor not in ("stateless", "transformer"):
            raise ValueError(
                f"predictor: expected stateless or transformer, got {self.predictor!r}"
            )
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd width, got {self.kernel}")
        for name in ("ctc_weight", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a share in [0, 1), got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values that `from_dict` reads back."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        for name in ("layers", "predictor_layers"):
            values[name] = [[size.heads, size.ff] for size in values[name]]
        return {**values, "ranks": dict(self.ranks)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "TransducerConfig":
        """The config that `to_dict` wrote; fields left out have their defaults."""
        known = dict(values)
        unknown = sorted(set(known) - {each.name for each in fields(TransducerConfig)})
        if unknown:
            raise ValueError(f"config: expected fields of TransducerConfig, got {unknown}")
        for name in ("layers", "predictor_layers"):
            pairs = known.get(name, ())
            known[name] = tuple(LayerSizes(int(heads), int(ff)) for heads, ff in pairs)
        return TransducerConfig(**known)


class StatelessPredictor(nn.Module):
    """Embeds the last `context` tokens and mixes each channel over them (arXiv 2109.07513)."""

    def __init__(self, vocab_size: int, dim: int, context: int, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.embedding = nn.Embedding(vocab_size, dim)
        self.mix = nn.Conv1d(dim, dim, context, groups=dim // 4 if dim % 4 == 0 else 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [R, L] -> [R, L - context + 1, P], one row per window."""
        embedded = self.embedding(tokens).transpose(1, 2)
        mixed: Tensor = self.dropout(F.relu(self.mix(embedded))).transpose(1, 2)
        return mixed


class TransformerPredictor(nn.Module):
    """Causal Transformer over the whole prefix; leading blanks but the last are padding."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        head_dim: int,
        layers: tuple[LayerSizes, ...],
        dropout: float,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(Block(dim, head_dim, size, dropout) for size in layers)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [R, L] -> [R, L, P]; position l has seen tokens[:, : l + 1]."""
        length = tokens.shape[1]
        following = F.pad(tokens[:, 1:], (0, 1), value=BLANK + 1)
        real = (tokens != BLANK).cumsum(1).bool() | (following != BLANK)
        seen = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        # The diagonal stays, so that a padded row attends to something and is no NaN.
        mask = (seen & real[:, None, :]) | torch.eye(length, dtype=torch.bool, device=tokens.device)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, mask[:, None])
        normed: Tensor = self.norm(x)
        return normed


class Transducer(nn.Module):
    """P(tokens | audio) from an encoder over frames, a predictor over tokens and a joiner."""

    def __init__(self, config: TransducerConfig) -> None:
        super().__init__()
        self.config = config
        dim, joiner = config.dim, config.joiner_dim
        self.subsampling = Subsampling(config.bins, config.channels, dim, config.dropout)
        if config.encoder == "conformer":
            self.blocks = nn.ModuleList(
                ConformerBlock(dim, config.head_dim, size, config.dropout, config.kernel)
                for size in config.layers
            )
        else:
            self.blocks = nn.ModuleList(
                Block(dim, config.head_dim, size, config.dropout) for size in config.layers
            )
        self.norm = nn.LayerNorm(dim)
        self.predictor: nn.Module
        if config.predictor == "stateless":
            self.predictor = StatelessPredictor(
                config.vocab_size, config.predictor_dim, config.context, config.dropout
            )
        else:
            self.predictor = TransformerPredictor(
                config.vocab_size,
                config.predictor_dim,
                head_dim=config.head_dim,
                layers=config.predictor_layers,
                dropout=config.dropout,
            )
        self.join_encoded = nn.Linear(dim, joiner)
        self.join_predicted = nn.Linear(config.predictor_dim, joiner, bias=False)
        self.join_out = nn.Linear(joiner, config.vocab_size)
        if config.ctc_weight:
            self.ctc_out = nn.Linear(dim, config.vocab_size)
        self._factorise()

    def _factorise(self) -> None:
        """Puts a LowRankLinear where the config names a rank."""
        linears = {name: m for name, m in self.named_modules() if isinstance(m, nn.Linear)}
        for name, rank in self.config.ranks.items():
            if name not in linears:
                raise ValueError(f"ranks: expected names of linears, got {name!r}")
            old = linears[name]
            new = LowRankLinear(old.in_features, old.out_features, rank, old.bias is not None)
            parent, _, child = name.rpartition(".")
            setattr(self.get_submodule(parent), child, new)

    @property
    def context_size(self) -> int | None:
        """How many last tokens `predict` reads; None: the whole prefix."""
        return self.config.context if self.config.predictor == "stateless" else None

    def encode(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the encoder; what lies past an utterance's length has no influence.

        Args:
            features: [B, T, F], as LogMel gives them.
            lengths: [B] int64, 1 to T.

        Returns:
            encoded [B, T', D] with T' = ceil(T / 4), zero past the lengths, and lengths [B].

        Raises:
            ValueError: features are not [B, T, F], or a length is not in 1 to T.
        """
        bins = self.config.bins
        if features.dim() != 3 or features.shape[2] != bins:
            raise ValueError(f"features: expected [B, T, {bins}], got {list(features.shape)}")
        if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= features.shape[1]:
            raise ValueError(
                f"lengths: expected 1 to T = {features.shape[1]}, got {lengths.tolist()}"
            )
        x, lengths = self.subsampling(features, lengths)
        real = inside(lengths, x.shape[1])
        mask = real[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x) * real[..., None], lengths

    def predict(self, context: Tensor) -> Tensor:
        """The predictor's output after each prefix.

        Args:
            context: [R, C] int64, the last tokens of each prefix, the newest last, filled up with
                blank at the left. C is at least `context_size`; a Transformer predictor wants one
                blank and then the whole prefix.

        Returns:
            [R, P].
        """
        size = self.context_size
        if context.dim() != 2 or context.shape[1] < (size or 1):
            raise ValueError(
                f"context: expected [R, at least {size or 1}], got {list(context.shape)}"
            )
        if size is not None:
            context = context[:, -size:]
        predicted: Tensor = self.predictor(context)[:, -1]
        return predicted

    def predict_all(self, targets: Tensor) -> Tensor:
        """targets [B, U] -> [B, U + 1, P], after every prefix, the empty one first."""
        start = self.context_size or 1
        predicted: Tensor = self.predictor(F.pad(targets, (start, 0), value=BLANK))
        return predicted

    def project_encoded(self, encoded: Tensor) -> Tensor:
        """The encoder's half of `join`: [..., D] -> [..., J]; a search computes it once."""
        projected: Tensor = self.join_encoded(encoded)
        return projected

    def project_predicted(self, predicted: Tensor) -> Tensor:
        """The predictor's half of `join`: [..., P] -> [..., J]; once for each prefix."""
        projected: Tensor = self.join_predicted(predicted)
        return projected

    def join_projected(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """The rest of `join`: two halves [..., J] -> logits [..., V]; leading sizes broadcast."""
        logits: Tensor = self.join_out(torch.tanh(encoded + predicted))
        return logits

    def join(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """encoded [..., D], predicted [..., P] -> logits [..., V]; leading sizes broadcast."""
        return self.join_projected(self.project_encoded(encoded), self.project_predicted(predicted))

    def loss(
        self,
        features: Tensor,
        lengths: Tensor,
        targets: Tensor,
        target_lengths: Tensor,
        *,
        ctc_weight: float | None = None,
    ) -> Tensor:
        """Mean over utterances of (1 - w) RNN-T + w CTC, each per token.

        Args:
            features: [B, T, F].
            lengths: [B] int64 frames.
            targets: [B, U] int64, no blanks; anything past the target lengths.
            target_lengths: [B] int64, 0 to U.
            ctc_weight: w, 0 to 1; None: the config's. At 1 the joiner is not run.

        Returns:
            A scalar, nats per token. CTC terms without an alignment (more tokens than frames)
            count as 0.
        """
        weight = self.config.ctc_weight if ctc_weight is None else ctc_weight
        if not 0 <= weight <= 1:
            raise ValueError(f"ctc_weight: expected a share in [0, 1], got {weight}")
        if weight and not self.config.ctc_weight:
            raise ValueError(f"ctc_weight: expected 0, as in the config, got {weight}")
        encoded, frames = self.encode(features, lengths)
        targets = targets.where(inside(target_lengths, targets.shape[1]), BLANK)
        per_token = 1.0 / target_lengths.clamp_min(1)
        total = encoded.new_zeros(())
        if weight < 1:
            predicted = self.predict_all(targets)
            logits = self.join(encoded[:, :, None], predicted[:, None])
            rnnt = rnnt_loss(logits.float(), targets, frames, target_lengths)
            total = total + (1 - weight) * (rnnt * per_token).mean()
        else:  # DDP wants a gradient for every parameter
            unused = (self.predictor, self.join_encoded, self.join_predicted, self.join_out)
            total = (
                total + 0.0 * torch.stack([p.sum() for m in unused for p in m.parameters()]).sum()
            )
        if weight:
            log_probs = self.ctc_out(encoded).float().log_softmax(-1).transpose(0, 1)
            ctc = F.ctc_loss(
                log_probs, targets, frames, target_lengths, BLANK, "none", zero_infinity=True
            )
            total = total + weight * (ctc * per_token).mean()
        return total
