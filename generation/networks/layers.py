"""The layers that the ADM networks share.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (arXiv 2105.05233), section 3. Module
names and their order give the state-dict keys of the published checkpoints.

Feature maps are (b, c, h, w) in the type of the convolutions, float32 or half; normalisation, embeddings
and their linear layers are always float32.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "AttentionBlock",
    "AttentionPool",
    "Conditioned",
    "Downsample",
    "GroupNorm",
    "ResidualBlock",
    "Upsample",
    "attend",
    "split_heads",
    "timestep_embedding",
    "zeroed",
]

MAX_PERIOD = 10_000
GROUPS = 32

M = TypeVar("M", bound=nn.Module)


def timestep_embedding(t: Tensor, dimensions: int) -> Tensor:
    """``[cos(t f), sin(t f)]`` with frequencies f from 1 to about 1/10,000, geometrically spaced.

    Args:
        t: (b,) timesteps of the training schedule, whole or fractional.
        dimensions: Length of an embedding, even.

    Returns:
        (b, dimensions) float32.
    """
    half = dimensions // 2
    # In float32 like the reference: at t = 999 a last bit of f is worth 1e-4 of a radian.
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(MAX_PERIOD) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zeroed(module: M) -> M:
    """``module`` with its parameters at zero: a block that starts training as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm(nn.GroupNorm):
    """32 groups, eps 1e-5, in float32; the result has the input's type."""

    def __init__(self, channels: int):
        super().__init__(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, ...) to the same."""
        return super().forward(x.float()).to(x.dtype)


class Upsample(nn.Module):
    """Twice the size by nearest neighbours, then a 3x3 convolution if requested."""

    def __init__(self, channels: int, *, convolve: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if convolve else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) to (b, c, 2h, 2w)."""
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        if self.conv is not None:
            x = self.conv(x)
        return x


class Downsample(nn.Module):
    """Half the size, by a strided 3x3 convolution or by averages of 2x2."""

    def __init__(self, channels: int, *, convolve: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if convolve else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) to (b, c, h/2, w/2)."""
        out: Tensor = self.op(x)
        return out


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, around a skip; the embedding enters at the second norm.

    Args:
        channels: Channels of the input.
        embedding_channels: Channels of the embedding.
        out_channels: Channels of the output; by default those of the input.
        dropout: Share of activations dropped in training.
        use_scale_shift_norm: The embedding scales and shifts the second norm's output ("adaptive group
            normalisation", section 3.1); otherwise it is added before that norm.
        resample: Changes the size of both branches, after the first SiLU and before the convolution.
    """

    def __init__(
        self,
        channels: int,
        embedding_channels: int,
        out_channels: int | None = None,
        *,
        dropout: float,
        use_scale_shift_norm: bool,
        resample: Upsample | Downsample | None = None,
    ):
        super().__init__()
        out_channels = out_channels or channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            GroupNorm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.resample = resample
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(embedding_channels, out_channels * (2 if use_scale_shift_norm else 1))
        )
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(b, channels, h, w) and (b, embedding_channels) float32 to (b, out_channels, h', w')."""
        norm, activation, convolution = self.in_layers
        h = activation(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = convolution(h)
        condition = self.emb_layers(embedding).to(h.dtype)[:, :, None, None]
        norm, activation, dropout, convolution = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = condition.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + condition)
        out: Tensor = self.skip_connection(x) + convolution(dropout(activation(h)))
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, *, repeatable: bool = False) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v``.

    Args:
        q: Queries, (b, heads, m, d).
        k: Keys, (b, heads, n, d).
        v: Values, (b, heads, n, d).
        repeatable: By matrix products instead of the fused kernels, whose backward on CUDA adds in no fixed
            order. Gives the same numbers up to rounding.

    Returns:
        (b, heads, m, d), of the type of ``q``.
    """
    if not repeatable:
        return F.scaled_dot_product_attention(q, k, v)
    # Both sides get half of the scale, so that the product stays in the range of float16.
    scale = q.shape[-1] ** -0.25
    weights = (q * scale) @ (k * scale).mT
    out: Tensor = weights.float().softmax(-1).to(v.dtype) @ v
    return out


def split_heads(qkv: Tensor, heads: int, *, new_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(b, n, 3c) to queries, keys and values, (b, heads, n, c/heads) each.

    The channels are ordered (head, {q, k, v}, channel), or ({q, k, v}, head, channel) in the new order.
    """
    b, n, channels = qkv.shape
    if new_order:
        q, k, v = qkv.view(b, n, 3, heads, channels // heads // 3).permute(2, 0, 3, 1, 4)
    else:
        q, k, v = qkv.view(b, n, heads, 3, channels // heads // 3).permute(3, 0, 2, 1, 4)
    return q, k, v


def _pointwise(convolution: nn.Conv1d, tokens: Tensor) -> Tensor:
    """A convolution of width 1 on (b, n, c): one matrix product, without moving a channels-last input."""
    return F.linear(tokens, convolution.weight[:, :, 0], convolution.bias)


class AttentionBlock(nn.Module):
    """Self-attention over the positions of a feature map, around a skip.

    Args:
        channels: Channels of input and output.
        heads: Number of heads; divides ``channels``.
        new_order: Order of the channels of ``qkv``: ({q,k,v}, head, channel), not (head, {q,k,v}, channel).
    """

    def __init__(self, channels: int, heads: int, *, new_order: bool):
        super().__init__()
        self.heads = heads
        self.new_order = new_order
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) to the same."""
        tokens = self.norm(x).flatten(2).mT
        q, k, v = split_heads(_pointwise(self.qkv, tokens), self.heads, new_order=self.new_order)
        # A gradient in eval mode is guidance, whose runs repeat their bytes. On a CPU the backward of the
        # fused kernel takes longer than the products: training at 32x32 is an eighth faster without.
        products = not self.training or q.device.type == "cpu"
        h = attend(q, k, v, repeatable=q.requires_grad and products)
        h = _pointwise(self.proj_out, h.transpose(1, 2).flatten(2))
        return x + h.mT.reshape(x.shape)


class AttentionPool(nn.Module):
    """A feature map to one vector: the output of attention at a token that is the mean of all positions.

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (arXiv
    2103.00020), section 2.4. Always in the new order of channels, also where the network's blocks are not.

    Args:
        size: Side of the feature map.
        channels: Channels of the feature map.
        head_channels: Channels of one head; divides ``channels``.
        out_channels: Length of the vector.
    """

    def __init__(self, size: int, channels: int, head_channels: int, out_channels: int):
        super().__init__()
        self.heads = channels // head_channels
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, size, size) to (b, out_channels)."""
        positions = x.flatten(2)
        tokens = torch.cat([positions.mean(2, keepdim=True), positions], dim=2) + self.positional_embedding
        q, k, v = split_heads(_pointwise(self.qkv_proj, tokens.mT), self.heads, new_order=True)
        pooled = attend(q[:, :, :1], k, v, repeatable=q.requires_grad and not self.training)
        return _pointwise(self.c_proj, pooled.transpose(1, 2).flatten(2))[:, 0]


class Conditioned(nn.Sequential):
    """Layers in sequence; the residual blocks among them also receive the embedding."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        """(b, c, h, w) and (b, embedding_channels) float32 to (b, c', h', w')."""
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResidualBlock) else layer(x)
        return x
