"""Parts of the recogniser's encoders: subsampling, Transformer block, Conformer block.

Linears have the LM's names, so that pruning treats both models alike.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelm.models.lm import LayerSizes, rotary_angles, rotate


class Dropout(nn.Module):
    """Dropout from one random byte per value: on CPU a tenth of the time of torch's own.

    The share dropped is rounded to 1/256; kept values are scaled by exactly 1 / (1 - share).
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        if not 0 <= share < 1:
            raise ValueError(f"dropout: expected a share in [0, 1), got {share}")
        self.cut = round(share * 256)

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same shape."""
        if not self.training or self.cut == 0:
            return x
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self.cut
        return x * (kept * (256 / (256 - self.cut))).to(x.dtype)


def inside(lengths: Tensor, size: int) -> Tensor:
    """[B, size] bool: True before each of the lengths [B]."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


class Subsampling(nn.Module):
    """Two 3 x 3 convolutions of stride 2: a quarter of the frames, then a linear to D."""

    def __init__(self, bins: int, channels: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.out = nn.Linear(channels * (((bins + 1) // 2 + 1) // 2), dim)
        self.dropout = Dropout(dropout)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, T, F], lengths [B] -> [B, ceil(T / 4), D], [B]."""
        x = (features * inside(lengths, features.shape[1])[..., None])[:, None]
        for convolution in (self.first, self.second):
            lengths = (lengths + 1) // 2
            x = F.relu(convolution(x))
            # Padding is cleared again, since a bias has filled it.
            x = x * inside(lengths, x.shape[2])[:, None, :, None]
        x = x.transpose(1, 2).flatten(2)
        # float32 under autocast too: what the blocks add is small against the sum.
        return self.dropout(self.out(x).to(features.dtype)), lengths


class Block(nn.Module):
    """Pre-norm Transformer block, bidirectional or as its mask says; sizes of 0 skip a half."""

    def __init__(self, dim: int, head_dim: int, size: LayerSizes, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_dim = size.heads, head_dim
        if size.heads:
            self.attention_norm = nn.LayerNorm(dim)
            self.qkv = nn.Linear(dim, 3 * size.heads * head_dim)
            self.out = nn.Linear(size.heads * head_dim, dim)
        self.ff = size.ff
        if size.ff:
            self.ff_norm = nn.LayerNorm(dim)
            self.ff_in = nn.Linear(dim, size.ff)
            self.ff_out = nn.Linear(size.ff, dim)
        self.dropout = Dropout(dropout)

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, D], mask [B, 1, 1 or T, T] (True: may be seen) -> [B, T, D]."""
        if not self.heads:
            return torch.zeros_like(x)
        batch, frames, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, frames, 3, self.heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        cos, sin = rotary_angles(torch.arange(frames, device=x.device), self.head_dim, x.dtype)
        query, key = rotate(query, cos, sin).float(), rotate(key, cos, sin).float()
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 is slower here on CPU
            mixed = F.scaled_dot_product_attention(query, key, value.float(), mask)
        attended: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return attended

    def feed_forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        if not self.ff:
            return torch.zeros_like(x)
        hidden = self.dropout(F.gelu(self.ff_in(self.ff_norm(x))))
        out: Tensor = self.ff_out(hidden)
        return out

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, D], mask [B, 1, 1 or T, T] -> [B, T, D]."""
        x = x + self.dropout(self.attend(x, mask))
        out: Tensor = x + self.dropout(self.feed_forward(x))
        return out


class ConformerBlock(Block):
    """Half feed-forward, attention, convolution, half feed-forward, norm.

    The convolution is normalised per frame (LayerNorm), so that a batch changes nothing.
    """

    def __init__(
        self, dim: int, head_dim: int, size: LayerSizes, dropout: float, kernel: int
    ) -> None:
        super().__init__(dim, head_dim, size, dropout)
        if size.ff:
            self.front_norm = nn.LayerNorm(dim)
            self.front_in = nn.Linear(dim, size.ff)
            self.front_out = nn.Linear(size.ff, dim)
        self.conv_norm = nn.LayerNorm(dim)
        self.conv_in = nn.Linear(dim, 2 * dim)
        self.conv_depth = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.conv_depth_norm = nn.LayerNorm(dim)
        self.conv_out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def convolve(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, D], mask [B, 1, 1, T] -> [B, T, D]."""
        gated = F.glu(self.conv_in(self.conv_norm(x)), -1) * mask[:, 0, 0, :, None]
        mixed = self.conv_depth(gated.transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.conv_out(F.silu(self.conv_depth_norm(mixed)))
        return out

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, D], mask [B, 1, 1, T] -> [B, T, D]."""
        if self.ff:
            hidden = self.dropout(F.silu(self.front_in(self.front_norm(x))))
            x = x + 0.5 * self.dropout(self.front_out(hidden))
        x = x + self.dropout(self.attend(x, mask))
        x = x + self.dropout(self.convolve(x, mask))
        x = x + 0.5 * self.dropout(self.feed_forward(x))
        out: Tensor = self.norm(x)
        return out
