"""A decoder-only Transformer language model whose blocks may each have their own size.

Pre-norm blocks, rotary positions, exact GELU, the output head tied to the embedding. It knows
nothing of pruning: what was pruned is only visible as smaller numbers in its config. Linears are
called as modules, so that faster ones can be put in their place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelm.ops.block_sparse_linear import block_sparse_linear
from prunelm.ops.tree_attention import tree_attention
from prunelm.sparse import BlockSparse


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one block; a half whose size is 0 is left out, with its norm and biases."""

    heads: int
    ff: int


@dataclass(frozen=True)
class LMConfig:
    """Everything that shapes a `TransformerLM`.

    `ranks` names the factorised linears ("blocks.3.ff_in" -> R); the others are dense.
    """

    vocab_size: int
    dim: int
    head_dim: int
    layers: tuple[LayerSizes, ...]
    dropout: float = 0.0
    ranks: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {self.head_dim}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a fraction in [0, 1), got {self.dropout}")
        for i, sizes in enumerate(self.layers):
            if sizes.heads < 0 or sizes.ff < 0:
                raise ValueError(f"layers[{i}]: expected sizes of at least 0, got {sizes}")
        linears = self.linears()
        for name, rank in self.ranks.items():
            if name not in linears:
                raise ValueError(f"ranks: expected names of linears, got {name!r}")
            if not 0 <= rank <= min(linears[name]):
                limit = min(linears[name])
                raise ValueError(f"ranks[{name!r}]: expected 0 to {limit}, got {rank}")

    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of every linear in the blocks, by module name."""
        sizes: dict[str, tuple[int, int]] = {}
        for i, layer in enumerate(self.layers):
            inner = layer.heads * self.head_dim
            if layer.heads:
                sizes[f"blocks.{i}.qkv"] = (self.dim, 3 * inner)
                sizes[f"blocks.{i}.out"] = (inner, self.dim)
            if layer.ff:
                sizes[f"blocks.{i}.ff_in"] = (self.dim, layer.ff)
                sizes[f"blocks.{i}.ff_out"] = (layer.ff, self.dim)
        return sizes

    @property
    def parameter_count(self) -> int:
        """Number of parameters, the tied embedding counted once."""
        count = self.vocab_size * self.dim + 2 * self.dim
        for layer in self.layers:
            count += 2 * self.dim * ((layer.heads > 0) + (layer.ff > 0))
        for name, (inputs, outputs) in self.linears().items():
            rank = self.ranks.get(name)
            count += outputs + (inputs * outputs if rank is None else rank * (inputs + outputs))
        return count

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values that `from_dict` reads back."""
        return {
            "vocab_size": self.vocab_size,
            "dim": self.dim,
            "head_dim": self.head_dim,
            "layers": [[layer.heads, layer.ff] for layer in self.layers],
            "dropout": self.dropout,
            "ranks": dict(self.ranks),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "LMConfig":
        """The config that `to_dict` wrote; ValueError names what does not fit."""
        expected = {"vocab_size", "dim", "head_dim", "layers", "dropout", "ranks"}
        if set(values) != expected:
            raise ValueError(
                f"config: expected the fields {sorted(expected)}, got {sorted(values)}"
            )
        return LMConfig(
            vocab_size=int(values["vocab_size"]),
            dim=int(values["dim"]),
            head_dim=int(values["head_dim"]),
            layers=tuple(LayerSizes(int(heads), int(ff)) for heads, ff in values["layers"]),
            dropout=float(values["dropout"]),
            ranks={str(name): int(rank) for name, rank in values["ranks"].items()},
        )

    @staticmethod
    def preset(name: str, vocab_size: int, dropout: float = 0.0) -> "LMConfig":
        """A named config.

        "paper-20m" has the 6 blocks, width 512 and 8 heads of 128 of arXiv 2310.03424. The paper
        does not give its feed-forward size: here the largest that keeps the whole within 20M.
        "small" has about 3M with 500 units, "tiny" is for tests.
        """
        if name == "paper-20m":
            bare = LMConfig(vocab_size, 512, 128, (LayerSizes(8, 0),) * 6)
            ff = (20_000_000 - bare.parameter_count - 6 * 3 * 512) // (6 * (2 * 512 + 1))
            if ff < 1:
                raise ValueError(f"vocab_size: expected 20M to leave room, got {vocab_size}")
            return LMConfig(vocab_size, 512, 128, (LayerSizes(8, ff),) * 6, dropout)
        if name == "small":
            return LMConfig(vocab_size, 256, 64, (LayerSizes(4, 896),) * 4, dropout)
        if name == "tiny":
            return LMConfig(vocab_size, 32, 16, (LayerSizes(2, 64),) * 2, dropout)
        raise ValueError(f"preset: expected paper-20m, small or tiny, got {name!r}")


@dataclass(frozen=True)
class KVCache:
    """Keys (rotated) and values of tree nodes, [capacity, heads, head_dim] per block.

    `head` is the output weight in the layout of `ops.block_sparse_linear`, whose rows do not depend
    on their number; None where that op does not run.
    """

    key: tuple[Tensor, ...]
    value: tuple[Tensor, ...]
    head: BlockSparse | None = None

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.key[0].shape[0] if self.key else 0

    def select(self, slots: Tensor, capacity: int | None = None) -> "KVCache":
        """A new cache whose slot i holds slot slots[i] of this one.

        Args:
            slots: [S] int64.
            capacity: slots of the new cache, at least S; those past S hold zeros. None: S.
        """
        extra = (len(slots) if capacity is None else capacity) - len(slots)
        if extra < 0:
            raise ValueError(f"capacity: expected at least {len(slots)}, got {capacity}")

        def move(x: Tensor) -> Tensor:
            return F.pad(x.index_select(0, slots.to(x.device)), (0, 0, 0, 0, 0, extra))

        return KVCache(tuple(map(move, self.key)), tuple(map(move, self.value)), self.head)


def rotary_angles(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary embedding (Su et al. 2021, arXiv 2104.09864, base 10000).

    Args:
        positions: any shape [...], int64.

    Returns:
        two tensors [..., head_dim / 2] of `dtype`, computed in float32.
    """
    half = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions.to(torch.float32)[..., None] * 10000.0 ** (-half / head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[i], x[i + head_dim / 2]) by the angles; x [..., head_dim]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Block(nn.Module):
    """Attention, then feed-forward, each x + f(norm(x)); see `LayerSizes` for halves left out."""

    def __init__(self, config: LMConfig, index: int) -> None:
        super().__init__()
        self.heads = config.layers[index].heads
        self.ff = config.layers[index].ff
        self.head_dim = config.head_dim
        if self.heads:
            self.attention_norm = nn.LayerNorm(config.dim)
            self.qkv = _linear(config, f"blocks.{index}.qkv")  # rows ordered [3, heads, head_dim]
            self.out = _linear(config, f"blocks.{index}.out")
        if self.ff:
            self.ff_norm = nn.LayerNorm(config.dim)
            self.ff_in = _linear(config, f"blocks.{index}.ff_in")
            # A module, so that a linear which fuses its activation can leave an Identity here.
            self.activation = nn.GELU()
            self.ff_out = _linear(config, f"blocks.{index}.ff_out")
        self.dropout = nn.Dropout(config.dropout)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key (rotated) and value, each [..., heads, head_dim]; x [..., dim]."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, self.head_dim))
        query, key, value = qkv.unbind(-3)
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def feed_forward(self, x: Tensor) -> Tensor:
        """x plus its feed-forward half; x [..., dim]."""
        if not self.ff:
            return x
        y: Tensor = self.dropout(self.ff_out(self.activation(self.ff_in(self.ff_norm(x)))))
        return x + y

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Causal self-attention over L; x [B, L, dim], cos and sin [L, 1, head_dim / 2]."""
        if self.heads:
            query, key, value = (y.transpose(1, 2) for y in self.project(x, cos, sin))
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return self.feed_forward(x)

    def step(
        self, x: Tensor, cos: Tensor, sin: Tensor, path: Tensor, length: Tensor,
        cache_key: Tensor, cache_value: Tensor,
    ) -> Tensor:  # fmt: skip
        """`forward` for one new node per row; x [R, dim], cos and sin [R, head_dim / 2]."""
        if self.heads:
            qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, self.head_dim))
            mixed = tree_attention(qkv, cos, sin, path, length, cache_key, cache_value)
            x = x + self.dropout(self.out(mixed.flatten(1)))
        return self.feed_forward(x)


class TransformerLM(nn.Module):
    """P(token | tokens before) for every position, or for nodes of a tree one at a time."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(len(config.layers)))
        self.norm = nn.LayerNorm(config.dim)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)
        # Residual branches start small, so that depth does not change the scale (GPT-2).
        residual = 0.02 / max(2 * len(self.config.layers), 1) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=residual if name.endswith("out") else 0.02)
                nn.init.zeros_(module.bias)

    def head(self, x: Tensor) -> Tensor:
        """Logits [..., V] of the last block's output x [..., dim]."""
        return F.linear(self.norm(x), self.embedding.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, L, V] of the token that follows each of tokens [B, L] int64."""
        x = self.dropout(self.embedding(tokens))
        positions = torch.arange(tokens.shape[1], device=tokens.device)[:, None]
        cos, sin = rotary_angles(positions, self.config.head_dim, x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(x)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean -log P(tokens[:, i + 1] | tokens[:, :i + 1]), a scalar; tokens [B, L + 1] int64.

        The softmax is in float32 or wider.

        Raises:
            ValueError: tokens of another type or shape, or without one to predict.
        """
        if not isinstance(tokens, Tensor):
            raise ValueError(
                f"tokens: expected an int64 tensor, got {type(tokens).__name__}; "
                "other batches need a loss of their own"
            )
        if tokens.dtype != torch.int64 or tokens.dim() != 2 or not tokens[:, 1:].numel():
            got = f"{str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}"
            raise ValueError(f"tokens: expected int64 [B, 2 or more], got {got}")
        logits = self(tokens[:, :-1]).flatten(0, 1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), tokens[:, 1:].flatten())

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache with `capacity` slots, in the weights' dtype and device."""

        def empty() -> tuple[Tensor, ...]:
            weight = self.embedding.weight
            return tuple(
                weight.new_zeros(capacity, sizes.heads, self.config.head_dim)
                for sizes in self.config.layers
            )

        weight = self.embedding.weight.detach()
        if weight.device.type != "cpu":
            return KVCache(empty(), empty())
        vocabulary, dim = weight.shape
        every = torch.ones(-(-vocabulary // 16), 1, dtype=torch.bool)
        return KVCache(empty(), empty(), BlockSparse.from_dense(weight, (16, dim), every))

    def step(self, tokens: Tensor, path: Tensor, length: Tensor, cache: KVCache) -> Tensor:
        """Logits after R nodes of a tree, whose keys and values go into the cache.

        Row r is the node in slot path[r, length[r] - 1], at position length[r] - 1; its ancestors,
        root first, lie in path[r, : length[r] - 1]. They may be in the cache already, or be rows of
        this same call. What lies in path past length is not read, but must be a valid slot.

        Args:
            tokens: [R] int64.
            path: [R, P] int64.
            length: [R] int64, 1 to P.
            cache: written in place.

        Returns:
            [R, V].
        """
        x = self.dropout(self.embedding(tokens))
        cos, sin = rotary_angles(length - 1, self.config.head_dim, x.dtype)
        for block, key, value in zip(self.blocks, cache.key, cache.value, strict=True):
            x = cast(Block, block).step(x, cos, sin, path, length, key, value)
        if cache.head is None or torch.is_grad_enabled():
            return self.head(x)
        return block_sparse_linear(self.norm(x), cache.head)


def _linear(config: LMConfig, name: str) -> nn.Module:
    inputs, outputs = config.linears()[name]
    rank = config.ranks.get(name)
    if rank is None:
        return nn.Linear(inputs, outputs)
    from prunelm.nn import LowRankLinear

    return LowRankLinear(inputs, outputs, rank)
