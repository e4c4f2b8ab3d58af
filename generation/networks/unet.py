"""The diffusion UNet of ADM.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (arXiv 2105.05233), section 3 and
appendix I.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evalkit.errors import InputError
from generation.networks.layers import (
    GROUPS,
    AttentionBlock,
    Conditioned,
    Downsample,
    GroupNorm,
    ResidualBlock,
    Upsample,
    timestep_embedding,
    zeroed,
)

__all__ = ["Trunk", "UNet", "UNetSettings"]


@dataclass(frozen=True, kw_only=True)
class UNetSettings:
    """Everything that determines a UNet, in types that JSON holds.

    Attributes:
        image_size: Side of the images, pixels.
        in_channels: Channels of the images.
        model_channels: Width at the first level, before its factor in ``channel_mult``.
        out_channels: 3 for epsilon alone, 6 with the learned variance; of a classifier, its classes.
        num_res_blocks: Residual blocks a level.
        attention_resolutions: Downsampling factors whose levels have attention: (2, 4) is half and quarter
            of the size.
        channel_mult: Width of each level as a multiple of ``model_channels``.
        num_classes: Classes that the network is conditioned on, or None.
        num_heads: Attention heads, where ``num_head_channels`` is None.
        num_head_channels: Channels of an attention head.
        use_scale_shift_norm: See :class:`generation.networks.layers.ResidualBlock`.
        resblock_updown: Residual blocks change the size; otherwise plain convolutions do.
        use_new_attention_order: See :class:`generation.networks.layers.AttentionBlock`.
        dropout: Share of activations dropped in training.

    Raises:
        InputError: There is no such network.
    """

    image_size: int
    in_channels: int = 3
    model_channels: int
    out_channels: int
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    channel_mult: tuple[float, ...]
    num_classes: int | None = None
    num_heads: int = 1
    num_head_channels: int | None = None
    use_scale_shift_norm: bool = True
    resblock_updown: bool = True
    use_new_attention_order: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        # From JSON they come as lists, which have no hash.
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        # Far beyond any trained network: a damaged or mistyped file is refused before memory is allocated.
        for name, most in _MOST.items():
            value = getattr(self, name)
            largest = max(value, default=0) if isinstance(value, tuple) else value
            _require(largest is None or largest <= most, f"{name} is {largest}, expected at most {most}")
        _require(len(self.channel_mult) <= 16, f"{len(self.channel_mult)} levels, expected at most 16")
        _require(all(map(math.isfinite, self.channel_mult)), "channel_mult holds numbers that are not finite")
        halvings = len(self.widths) - 1
        _require(halvings >= 0, "no levels: channel_mult is empty")
        for name in ("image_size", "in_channels", "out_channels", "num_res_blocks", "num_heads"):
            value = getattr(self, name)
            _require(value > 0, f"{name} is {value}, expected at least 1")
        for name in ("num_classes", "num_head_channels"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} is {value}, expected at least 1, or to be left out")
        _require(0 <= self.dropout < 1, f"dropout is {self.dropout}, expected 0 to 1, without 1")
        factors = [2**level for level in range(halvings + 1)]
        _require(
            set(self.attention_resolutions) <= set(factors),
            f"attention_resolutions are {list(self.attention_resolutions)}, but the levels are at {factors}",
        )
        _require(
            self.image_size % 2**halvings == 0,
            f"images of {self.image_size} pixels cannot be halved {halvings} times",
        )
        for level, width in enumerate(self.widths):
            _require(
                width > 0 == width % GROUPS,
                f"level {level} has {width} channels; group norm takes multiples of {GROUPS}",
            )
            if 2**level in self.attention_resolutions or level == halvings:
                _require(
                    width % (self.num_head_channels or self.num_heads) == 0,
                    f"level {level} has {width} channels, which do not divide into "
                    + (f"heads of {size}" if (size := self.num_head_channels) else f"{self.num_heads} heads"),
                )

    @property
    def embedding_channels(self) -> int:
        """Length of the embedding of timestep and class."""
        return 4 * self.model_channels

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(int(factor * self.model_channels) for factor in self.channel_mult)


_MOST = {
    "image_size": 2**13,
    "in_channels": 2**10,
    "out_channels": 10**6,
    "model_channels": 2**12,
    "num_res_blocks": 64,
    "num_heads": 2**12,
    "num_classes": 10**6,
    "num_head_channels": 2**12,
    "channel_mult": 64,
}


def _require(right: bool, message: str) -> None:
    if not right:
        raise InputError(f"There is no network with these settings: {message}.")


class Trunk(nn.Module):
    """What UNet and classifier share: embeddings, and the blocks down to the smallest feature map."""

    def __init__(self, settings: UNetSettings, in_channels: int):
        super().__init__()
        self.settings = settings
        # Set by generation.networks.kernels.use_kernels, whose kernels then compute in place of the modules.
        self.kernels: Any = None
        width = settings.embedding_channels
        self.time_embed = nn.Sequential(
            nn.Linear(settings.model_channels, width), nn.SiLU(), nn.Linear(width, width)
        )
        if settings.num_classes is not None:
            self.label_emb = nn.Embedding(settings.num_classes, width)
        self.input_blocks = nn.ModuleList(self._input_blocks(in_channels))
        deepest = settings.widths[-1]
        self.middle_block = Conditioned(
            self._residual(deepest), self._attention(deepest), self._residual(deepest)
        )

    def _input_blocks(self, in_channels: int) -> Iterator[Conditioned]:
        settings = self.settings
        channels = settings.widths[0]
        self.skip_channels = [channels]
        yield Conditioned(nn.Conv2d(in_channels, channels, 3, padding=1))
        for level, width in enumerate(settings.widths):
            for _ in range(settings.num_res_blocks):
                yield Conditioned(self._residual(channels, width), *self._attention_at(level))
                channels = width
                self.skip_channels.append(channels)
            if level < len(settings.widths) - 1:
                yield Conditioned(self._resampling(Downsample, channels))
                self.skip_channels.append(channels)

    def _residual(
        self, channels: int, out_channels: int | None = None, resample: Upsample | Downsample | None = None
    ) -> ResidualBlock:
        return ResidualBlock(
            channels,
            self.settings.embedding_channels,
            out_channels,
            dropout=self.settings.dropout,
            use_scale_shift_norm=self.settings.use_scale_shift_norm,
            resample=resample,
        )

    def _resampling(self, kind: type[Upsample] | type[Downsample], channels: int) -> nn.Module:
        if self.settings.resblock_updown:
            return self._residual(channels, resample=kind(channels, convolve=False))
        return kind(channels, convolve=True)

    def _attention(self, channels: int) -> AttentionBlock:
        settings = self.settings
        heads = channels // settings.num_head_channels if settings.num_head_channels else settings.num_heads
        return AttentionBlock(channels, heads, new_order=settings.use_new_attention_order)

    def _attention_at(self, level: int) -> list[AttentionBlock]:
        """The attention of a residual block of ``level``, where its resolution asks for one."""
        if 2**level not in self.settings.attention_resolutions:
            return []
        return [self._attention(self.settings.widths[level])]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the convolutions, and so of the feature maps."""
        return next(self.input_blocks.parameters()).dtype

    def embed(self, t: Tensor, y: Tensor | None) -> Tensor:
        """Embedding of timesteps (b,) and classes (b,) or None: (b, embedding_channels) float32."""
        if (y is None) != (self.settings.num_classes is None):
            have = "no classes" if y is None else "classes"
            want = "is unconditional" if y is not None else f"is conditioned on {self.settings.num_classes}"
            raise InputError(
                f"The network was given {have}, but it {want}. Give y exactly where it has classes."
            )
        embedding: Tensor = self.time_embed(timestep_embedding(t, self.settings.model_channels))
        return embedding if y is None else embedding + self.label_emb(y)

    def _kernels_for(self, x: Tensor) -> Any:
        """What computes in place of the modules for an input, or None."""
        del x
        return self.kernels

    def descend(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """(b, c, h, w) to the output of every input block, and last of the middle block."""
        if (kernels := self._kernels_for(x)) is not None:
            return list(kernels(x, embedding))
        outputs = [x.to(self.dtype)]
        for block in (*self.input_blocks, self.middle_block):
            outputs.append(block(outputs[-1], embedding))
        return outputs[1:]


class UNet(Trunk):
    """Predicts the noise, and where it is learned the variance, of a noisy image.

    State-dict keys, shapes and order are those of the published checkpoints.

    Args:
        settings: Everything that determines it.
    """

    def __init__(self, settings: UNetSettings):
        super().__init__(settings, self.input_channels(settings))
        self.output_blocks = nn.ModuleList(self._output_blocks())
        self.out = nn.Sequential(
            GroupNorm(settings.widths[0]),
            nn.SiLU(),
            zeroed(nn.Conv2d(settings.widths[0], settings.out_channels, 3, padding=1)),
        )

    def _kernels_for(self, x: Tensor) -> Any:
        # Those of a UNet have no backward pass.
        return None if torch.is_grad_enabled() and x.requires_grad else self.kernels

    @staticmethod
    def input_channels(settings: UNetSettings) -> int:
        """Channels of what the first convolution reads."""
        return settings.in_channels

    def _output_blocks(self) -> Iterator[Conditioned]:
        settings = self.settings
        channels = settings.widths[-1]
        skips = list(self.skip_channels)
        for level, width in reversed(list(enumerate(settings.widths))):
            for block in range(settings.num_res_blocks + 1):
                layers = [self._residual(channels + skips.pop(), width), *self._attention_at(level)]
                channels = width
                if level > 0 and block == settings.num_res_blocks:
                    layers.append(self._resampling(Upsample, channels))
                yield Conditioned(*layers)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The prediction at one timestep.

        Args:
            x: (b, in_channels, image_size, image_size) float32, noisy images.
            t: (b,), timesteps of the training schedule (0 to 999), also where sampling takes fewer.
            y: (b,) int64 classes; None for an unconditional network.

        Returns:
            (b, out_channels, image_size, image_size) float32: epsilon, then the variance's interpolation.

        Raises:
            InputError: Classes for an unconditional network, or none for a conditional one.
        """
        embedding = self.embed(t, y)
        if (kernels := self._kernels_for(x)) is not None:
            predicted: Tensor = kernels.predict(x, embedding)
            return predicted
        # Popped, not unpacked with a star, at which torch.compile would break the network into many graphs.
        outputs = self.descend(x, embedding)
        h = outputs.pop()
        for block in self.output_blocks:
            h = block(torch.cat([h, outputs.pop()], dim=1), embedding)
        out: Tensor = self.out(h.to(x.dtype))
        return out
