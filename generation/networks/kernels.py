"""The ADM networks on fused kernels: between the convolutions, each map is read and written once.

The same function as that of the modules, up to the rounding of half precision, in eval mode and with frozen
parameters; the gradient is that of the input alone. Maps stay channels-last, forward and backward. A
convolution leaves its bias to the kernel that reads its output next. Its gradient is a convolution, too, with
the weights turned by 180 degrees. The concatenations of the decoder are never written as such.

Nothing here waits for the device, so that calls can be captured as CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.networks.flash import attention, attention_backward
from generation.networks.fused_norm import (
    Moments,
    add,
    coefficients,
    gather_taps,
    moments,
    normalise,
    normalise_backward,
)
from generation.networks.layers import AttentionBlock, ResidualBlock, Upsample, split_heads
from generation.networks.unet import Trunk, UNet

__all__ = ["use_kernels"]

# Whether a product of half precision can have a float32 result.
_WIDENS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)

# Tensor cores take channels by eights.
ALIGNMENT = 8


def use_kernels(network: Trunk) -> None:
    """Let a network compute by these kernels from now on; nothing changes where it already does.

    Args:
        network: On its CUDA device, in eval mode, its parameters frozen and final, its convolutions in half
            precision. On a CPU it works in Triton's interpreter, and in float32, too.
    """
    if network.kernels is None:
        network.kernels = FusedUNet(network) if isinstance(network, UNet) else FusedTrunk(network)


@dataclass(frozen=True, eq=False)
class Map:
    """A feature map (b, c, h, w), channels-last, and its moments."""

    x: Tensor
    moments: Moments


class Block(Protocol):
    """A part of a network with its own backward pass."""

    def forward(self, maps: tuple[Map, ...], condition: Tensor | None, /) -> tuple[Map, tuple[Tensor, ...]]:
        """The output, and what :meth:`backward` needs."""

    def backward(self, saved: tuple[Tensor, ...], gradient: Tensor, /) -> Tensor:
        """The gradient at the only map, from the one at the output."""


class _Recorded(torch.autograd.Function):
    """A block for autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, moments: Moments, block: Block, condition: Tensor | None) -> Any:
        out, saved = block.forward((Map(x, moments),), condition)
        ctx.block = block
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(out.moments.mean, out.moments.deviation)
        return out.x, out.moments.mean, out.moments.deviation

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: None) -> Any:
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        return ctx.block.backward(ctx.saved_tensors, gradient), None, None, None


def _run(block: Block, maps: tuple[Map, ...], condition: Tensor | None = None) -> Map:
    if not (torch.is_grad_enabled() and any(each.x.requires_grad for each in maps)):
        return block.forward(maps, condition)[0]
    (only,) = maps
    x, mean, deviation = _Recorded.apply(only.x, only.moments, block, condition)  # type: ignore[no-untyped-call]
    return Map(x, Moments(mean, deviation))


def _tokens(x: Tensor) -> Tensor:
    """(b, c, h, w) channels-last to (b h w, c), a view."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _map_of(tokens: Tensor, like: Tensor) -> Tensor:
    """(b h w, c) or (b, h w, c) to (b, c, h, w) channels-last, a view; b, h and w are those of ``like``."""
    b, _, height, width = like.shape
    return tokens.view(b, height, width, -1).permute(0, 3, 1, 2)


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


def _turned(weight: Tensor) -> Tensor:
    """The weights of the convolution that is the gradient of the one with ``weight``."""
    return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def _taps(weight: Tensor) -> Tensor:
    """(o, c, 3, 3) to (c, 9 o and some zeros), for :func:`gather_taps`."""
    taps = weight.permute(1, 2, 3, 0).flatten(1)
    return F.pad(taps, (0, -taps.shape[1] % ALIGNMENT)).contiguous()


def _few_channels(x: Tensor, taps: Tensor, channels: int, bias: Tensor | None = None) -> Tensor:
    """A 3x3 convolution to a few channels, (b, channels, h, w) float32, contiguous.

    As one product, since kernels for convolutions would fill wide tiles with three or six columns; and so the
    result is never rounded to half precision.
    """
    tokens = _tokens(x)
    if x.is_cuda and x.dtype != torch.float32 and _WIDENS:
        products: Tensor = torch.mm(tokens, taps, out_dtype=torch.float32)
    else:
        products = tokens.float() @ taps.float()
    return gather_taps(products, (x.shape[0], channels, *x.shape[2:]), bias)


class FusedInput:
    """The first convolution: (b, c, h, w) float32, contiguous or not, to a map."""

    def __init__(self, convolution: nn.Conv2d, *, differentiable: bool):
        weight = convolution.weight.detach()
        self.channels = weight.shape[1]
        self.padding = -self.channels % ALIGNMENT
        self.weight = F.pad(weight, (0, 0, 0, 0, 0, self.padding)).contiguous(
            memory_format=torch.channels_last
        )
        self.bias = _bias(convolution)
        self.taps = _taps(_turned(weight)) if differentiable else None

    def forward(self, maps: tuple[Map, ...], _condition: Tensor | None) -> tuple[Map, tuple[Tensor, ...]]:
        """See :class:`Block`; the moments that come with the image are not read."""
        x = maps[0].x
        b, channels, height, width = x.shape
        padded = self.weight.new_zeros((b, height, width, channels + self.padding)).permute(0, 3, 1, 2)
        padded[:, :channels] = x
        h = _convolve(padded, self.weight)
        return Map(h, add(h, None, self.bias)), ()

    def backward(self, _saved: tuple[Tensor, ...], gradient: Tensor) -> Tensor:
        """See :class:`Block`."""
        assert self.taps is not None
        return _few_channels(gradient, self.taps, self.channels)


class FusedResidual:
    """:class:`generation.networks.layers.ResidualBlock`."""

    def __init__(self, block: ResidualBlock, *, differentiable: bool):
        layers: list[Any] = [*block.in_layers, *block.out_layers]
        self.norm, _, first, self.norm_2, _, _, second = layers
        self.weight: Tensor = first.weight.detach()
        self.weight_2: Tensor = second.weight.detach()
        self.bias, self.bias_2 = _bias(first), _bias(second)
        self.scales = block.use_scale_shift_norm
        self.resample = "same"
        if block.resample is not None:
            self.resample = "up" if isinstance(block.resample, Upsample) else "down"
        skip = block.skip_connection
        self.skip: Tensor | None = None
        if isinstance(skip, nn.Conv2d):
            self.skip = skip.weight.detach()[:, :, 0, 0]
            self.bias_2 = self.bias_2 + _bias(skip)
        if differentiable:
            self.turned, self.turned_2 = _turned(self.weight), _turned(self.weight_2)

    def forward(self, maps: tuple[Map, ...], condition: Tensor | None) -> tuple[Map, tuple[Tensor, ...]]:
        """See :class:`Block`."""
        assert condition is not None
        xs, of = tuple(each.x for each in maps), tuple(each.moments for each in maps)
        table = coefficients(of, _pixels(xs[0]), self.norm.weight, self.norm.bias)
        h = _convolve(normalise(xs, table, resample=self.resample), self.weight)
        table_2 = coefficients(
            (moments(h),),
            _pixels(h),
            self.norm_2.weight,
            self.norm_2.bias,
            bias=self.bias if self.scales else self.bias + condition,
            condition=condition if self.scales else None,
        )
        out = _convolve(normalise((h,), table_2), self.weight_2)
        if self.skip is None:
            of_out = add(out, xs[0], self.bias_2, resample=self.resample)
        else:
            of_out = add(out, self._skip(xs), self.bias_2)
        return Map(out, of_out), (xs[0], h, table, table_2)

    def _skip(self, xs: tuple[Tensor, ...]) -> Tensor:
        assert self.skip is not None
        first, *others = xs
        end = first.shape[1]
        total = _tokens(first) @ self.skip[:, :end].T
        for x in others:
            total.addmm_(_tokens(x), self.skip[:, end : end + x.shape[1]].T)
            end += x.shape[1]
        return _map_of(total, first)

    def backward(self, saved: tuple[Tensor, ...], gradient: Tensor) -> Tensor:
        """See :class:`Block`."""
        x, h, table, table_2 = saved
        dh = normalise_backward(h, _convolve(gradient, self.turned_2), table_2)
        through = _convolve(dh, self.turned)
        skip = gradient if self.skip is None else _map_of(_tokens(gradient) @ self.skip, gradient)
        return normalise_backward(x, through, table, resample=self.resample, skip=skip)


class FusedAttention:
    """:class:`generation.networks.layers.AttentionBlock`."""

    def __init__(self, block: AttentionBlock):
        self.norm, self.heads, self.new_order = block.norm, block.heads, block.new_order
        self.qkv, self.qkv_bias = block.qkv.weight.detach()[:, :, 0].contiguous(), block.qkv.bias
        self.projection = block.proj_out.weight.detach()[:, :, 0].contiguous()
        self.bias = _bias(block.proj_out)

    def forward(self, maps: tuple[Map, ...], _condition: Tensor | None) -> tuple[Map, tuple[Tensor, ...]]:
        """See :class:`Block`."""
        (only,) = maps
        x = only.x
        table = coefficients((only.moments,), _pixels(x), self.norm.weight, self.norm.bias)
        tokens = _tokens(normalise((x,), table, activation=False)).view(len(x), -1, x.shape[1])
        qkv = F.linear(tokens, self.qkv, self.qkv_bias)
        attended, saved = attention(*self._split(qkv))
        out = _map_of(attended.transpose(1, 2).flatten(2) @ self.projection.T, x)
        return Map(out, add(out, x, self.bias)), (x, table, qkv, attended, *saved)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return split_heads(qkv, self.heads, new_order=self.new_order)

    def backward(self, saved: tuple[Tensor, ...], gradient: Tensor) -> Tensor:
        """See :class:`Block`."""
        x, table, qkv, attended, *rest = saved
        b, n, _ = qkv.shape
        through = (_tokens(gradient) @ self.projection).view(b, n, self.heads, -1).transpose(1, 2)
        q, k, v = self._split(qkv)
        parts = torch.stack(attention_backward(through, q, k, v, attended, tuple(rest)))
        # (3, b, heads, n, d), to the order of the channels of qkv.
        order = (1, 3, 0, 2, 4) if self.new_order else (1, 3, 2, 0, 4)
        tokens = parts.permute(order).reshape(b * n, -1) @ self.qkv
        return normalise_backward(x, _map_of(tokens, x), table, activation=False, skip=gradient)


def _bias(module: Any) -> Tensor:
    bias: Tensor = module.bias.detach().float()
    return bias


def _pixels(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


class FusedTrunk:
    """The blocks of a network, down to the smallest map."""

    def __init__(self, network: Trunk, *, differentiable: bool = True):
        self.dtype = network.dtype
        self.differentiable = differentiable
        self.blocks: dict[nn.Module, Block] = {}
        residuals = []
        for module in network.modules():
            if isinstance(module, ResidualBlock):
                self.blocks[module] = FusedResidual(module, differentiable=differentiable)
                residuals.append(module)
            elif isinstance(module, AttentionBlock):
                self.blocks[module] = FusedAttention(module)
        self.sequences: list[Any] = [*network.input_blocks, network.middle_block]
        first: Any = self.sequences[0][0]
        self.blocks[first] = FusedInput(first, differentiable=differentiable)
        # The embedding goes through the linear layers of all blocks in one product.
        linears: list[Any] = [block.emb_layers[1] for block in residuals]
        self.weight = torch.cat([linear.weight.detach() for linear in linears])
        self.bias = torch.cat([linear.bias.detach() for linear in linears])
        self.sizes = [len(linear.bias) for linear in linears]
        self.residuals = residuals

    def conditions(self, embedding: Tensor) -> dict[nn.Module, Tensor]:
        """What each residual block receives of the embedding, float32."""
        parts = torch.split(F.linear(F.silu(embedding), self.weight, self.bias), self.sizes, dim=1)
        return dict(zip(self.residuals, parts, strict=True))

    def descend(self, x: Tensor, conditions: dict[nn.Module, Tensor]) -> list[Map]:
        """Like :meth:`generation.networks.unet.Trunk.descend`."""
        nothing = x.new_empty(0)
        outputs = [Map(x, Moments(nothing, nothing))]
        for sequence in self.sequences:
            outputs.append(self.sequence(sequence, (outputs[-1],), conditions))
        return outputs[1:]

    def sequence(
        self, layers: nn.Sequential, maps: tuple[Map, ...], conditions: dict[nn.Module, Tensor]
    ) -> Map:
        """:class:`generation.networks.layers.Conditioned`, of one map or the concatenation of two."""
        for layer in layers:
            if layer in self.blocks:
                maps = (_run(self.blocks[layer], maps, conditions.get(layer)),)
            else:  # a plain convolution that changes the size: no published network has one
                x = layer(maps[0].x).contiguous(memory_format=torch.channels_last)
                maps = (Map(x, moments(x.detach())),)
        return maps[0]

    def __call__(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """The outputs of all blocks, (b, c, h, w) in half precision."""
        return [each.x for each in self.descend(x, self.conditions(embedding.detach()))]


class FusedUNet(FusedTrunk):
    """:class:`generation.networks.unet.UNet`, without a gradient."""

    def __init__(self, network: UNet):
        super().__init__(network, differentiable=False)
        self.outward: list[Any] = list(network.output_blocks)
        out: Any = network.out
        norm, _, convolution = out
        self.norm = norm
        self.channels: int = convolution.out_channels
        self.taps = _taps(convolution.weight.detach().to(self.dtype))
        self.out_bias = _bias(convolution)

    @torch.no_grad()
    def predict(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(b, c, h, w) and the embedding to (b, out_channels, h, w) float32."""
        conditions = self.conditions(embedding)
        outputs = self.descend(x, conditions)
        h = outputs.pop()
        for block in self.outward:
            h = self.sequence(block, (h, outputs.pop()), conditions)
        table = coefficients((h.moments,), _pixels(h.x), self.norm.weight, self.norm.bias)
        return _few_channels(normalise((h.x,), table), self.taps, self.channels, self.out_bias)
