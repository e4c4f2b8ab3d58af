"""Group norm, activation, resampling and residual sums of feature maps, on Triton's kernels.

All of these are bound by memory, so each reads and writes its maps once. Maps are (b, c, h, w), channels-last
and usually half precision; arithmetic is float32. Nothing is added in an order that may change from run to
run, and the order does not depend on the batch.

A group norm followed by a scale and shift is ``x * a + b`` with one a and one b for each image and channel.
Its statistics are gathered for each channel and stripe of pixels by whatever kernel writes or reads the map
first, and are combined into groups later: so the bias that a convolution left out, and the concatenation of
two maps, cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from generation.networks.layers import GROUPS
from generation.networks.triton_kernels import (
    add_kernel,
    coefficients_kernel,
    corrections_kernel,
    gradient_kernel,
    normalise_kernel,
    sums_kernel,
    taps_kernel,
)

__all__ = ["Moments", "add", "coefficients", "gather_taps", "moments", "normalise", "normalise_backward"]

# Elements that a program holds at a time, and its warps: 32 elements a thread, 16 bytes a load.
TILE = 4096
WARPS = 4
EPSILON = 1e-5

# FROM of the kernels, by what happens to the map, and for its gradient.
_SOURCE = {"same": 0, "down": 1, "up": 2}
_GRADIENT = {"same": 0, "down": 2, "up": 1}


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and summed squared deviation of each channel in each stripe of pixels.

    Attributes:
        mean: (b, stripes, c) float32.
        deviation: (b, stripes, c) float32.
    """

    mean: Tensor
    deviation: Tensor


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()


def _rows(pixels: int) -> int:
    """Pixels of a stripe: enough stripes to fill the device with one image, and at most 256."""
    return max(min(max(_power_of_two(pixels // 32 or 1), 16), 256), _power_of_two(-(-pixels // 256)))


def _stripes(pixels: int) -> int:
    return -(-pixels // _rows(pixels))


def _block_of_stripes(stripes: int) -> int:
    """One of two sizes, as each is one more version of a kernel to compile."""
    return 32 if stripes <= 32 else 256


def _grid(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and blocks of a kernel that goes over the pixels of ``x`` in stripes."""
    b, channels, height, width = x.shape
    rows = _rows(height * width)
    block_c = min(channels & -channels, 256)
    blocks = {
        "ROWS": rows,
        "BLOCK_N": min(max(TILE // block_c, 1), rows),
        "BLOCK_C": block_c,
        "num_warps": WARPS,
    }
    return (_stripes(height * width) * (channels // block_c), b), blocks


def _check(*maps: Tensor | None) -> None:
    for x in maps:
        if x is not None and not x.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"expected a channels-last map, not one of shape {x.shape}, strides {x.stride()}"
            )


def moments(h: Tensor) -> Moments:
    """The moments of a map, for :func:`coefficients`."""
    return _summed(h, None, None, "same")


def add(h: Tensor, skip: Tensor | None, bias: Tensor | None, *, resample: str = "same") -> Moments:
    """Add to ``h``, in place, and give the moments of the sum.

    Args:
        h: (b, c, h, w), modified.
        skip: The map to add, after averaging 2x2 pixels (``resample`` is ``down``), repeating them 2x2
            (``up``), or as it is (``same``).
        bias: (c,) float32.
        resample: See ``skip``.
    """
    return _summed(h, skip, bias, resample)


def _summed(h: Tensor, skip: Tensor | None, bias: Tensor | None, resample: str) -> Moments:
    _check(h, skip)
    b, channels, height, width = h.shape
    grid, blocks = _grid(h)
    mean = h.new_empty((b, _stripes(height * width), channels), dtype=torch.float32)
    deviation = torch.empty_like(mean)
    add_kernel[grid](
        h,
        h if skip is None else skip,
        mean if bias is None else bias,
        mean,
        deviation,
        height * width,
        channels,
        width,
        FROM=_SOURCE[resample],
        HAS_SKIP=skip is not None,
        HAS_BIAS=bias is not None,
        **blocks,
    )
    return Moments(mean, deviation)


def coefficients(
    of: tuple[Moments, ...],
    pixels: int,
    weight: Tensor,
    offset: Tensor,
    *,
    bias: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """Group norm, and scale and shift where there are any, as coefficients of each channel.

    Args:
        of: The moments of a map, or of the two whose concatenation is to be normalised.
        pixels: Pixels of the map.
        weight: (c,) float32, of the norm.
        offset: (c,) float32, the bias of the norm.
        bias: (c,) or (b, c) float32, what is still to be added to the map before the norm.
        condition: (b, 2c) float32: scale, to which 1 is added, and shift, behind the norm.

    Returns:
        (b, 4, c) float32: a and b of ``x * a + b``, then 1/std and -mean/std of the groups.
    """
    first, second = of[0], of[-1]
    b, stripes, channels_0 = first.mean.shape
    channels = sum(each.mean.shape[2] for each in of)
    table = first.mean.new_empty((b, 4, channels))
    group = channels // GROUPS
    coefficients_kernel[(GROUPS, b)](
        first.mean,
        first.deviation,
        second.mean,
        second.deviation,
        table if bias is None else bias,
        table if condition is None else condition,
        weight,
        offset,
        table,
        pixels,
        stripes,
        _rows(pixels),
        group,
        channels_0,
        channels,
        0 if bias is None or bias.dim() == 1 else bias.stride(0),
        0 if condition is None else condition.stride(0),
        EPSILON,
        HAS_BIAS=bias is not None,
        CONDITION=condition is not None,
        BLOCK_S=_block_of_stripes(stripes),
        BLOCK_G=_power_of_two(group),
        num_warps=WARPS,
    )
    return table


def normalise(
    maps: tuple[Tensor, ...], table: Tensor, *, resample: str = "same", activation: bool = True
) -> Tensor:
    """``resample(silu(x * a + b))`` of the concatenation of ``maps``, which is written only so.

    Args:
        maps: One or two, (b, c_i, h, w).
        table: (b, 4, sum of c_i), see :func:`coefficients`.
        resample: ``same``; ``down``, averages of 2x2; ``up``, nearest neighbours.
        activation: Whether SiLU follows.
    """
    _check(*maps)
    b, _, height, width = maps[0].shape
    height, width = {
        "same": (height, width),
        "down": (height // 2, width // 2),
        "up": (2 * height, 2 * width),
    }[resample]
    channels = table.shape[2]
    out = torch.empty(
        (b, channels, height, width),
        dtype=maps[0].dtype,
        device=maps[0].device,
        memory_format=torch.channels_last,
    )
    first = 0
    for x in maps:
        part = out[:, first : first + x.shape[1]]
        grid, blocks = _grid(part)
        normalise_kernel[grid](
            x,
            table[:, :, first:],
            part,
            height * width,
            x.shape[1],
            width,
            4 * channels,
            channels,
            channels,
            FROM=_SOURCE[resample],
            SILU=activation,
            **blocks,
        )
        first += x.shape[1]
    return out


def normalise_backward(
    x: Tensor,
    gradient: Tensor,
    table: Tensor,
    *,
    resample: str = "same",
    activation: bool = True,
    skip: Tensor | None = None,
) -> Tensor:
    """The gradient at the input of :func:`normalise`.

    Args:
        x: (b, c, h, w), its input.
        gradient: (b, c, h', w'), at its output.
        table: Its coefficients.
        resample: As there.
        activation: As there.
        skip: (b, c, h', w'), the gradient at the same map resampled alone, which is added.
    """
    _check(x, gradient, skip)
    b, channels, height, width = x.shape
    pixels = height * width
    grid, blocks = _grid(x)
    source = _GRADIENT[resample]
    sums = table.new_empty((b, _stripes(pixels), 2, channels))
    sums_kernel[grid](
        x, gradient, table, sums, pixels, channels, width, FROM=source, SILU=activation, **blocks
    )
    corrections = table.new_empty((b, 2, channels))
    group = channels // GROUPS
    corrections_kernel[(GROUPS, b)](
        sums,
        table,
        corrections,
        pixels,
        _stripes(pixels),
        group,
        channels,
        BLOCK_S=_block_of_stripes(_stripes(pixels)),
        BLOCK_G=_power_of_two(group),
        num_warps=WARPS,
    )
    out = torch.empty_like(x, memory_format=torch.channels_last)
    gradient_kernel[grid](
        x,
        gradient,
        table,
        corrections,
        x if skip is None else skip,
        out,
        pixels,
        channels,
        width,
        FROM=source,
        SILU=activation,
        HAS_SKIP=skip is not None,
        **blocks,
    )
    return out


def gather_taps(products: Tensor, size: tuple[int, int, int, int], bias: Tensor | None = None) -> Tensor:
    """A 3x3 convolution to few channels, from the products of every pixel with each of its nine taps.

    Args:
        products: (b h w, at least 9 c) float32, row-major pixels; columns (tap, channel).
        size: (b, c, h, w) of the output.
        bias: (c,) float32.

    Returns:
        (b, c, h, w) float32, contiguous.
    """
    b, channels, height, width = size
    out = products.new_empty(size)
    taps_kernel[(-(-height * width // 256), b)](
        products,
        out if bias is None else bias,
        out,
        height,
        width,
        channels,
        products.stride(0),
        HAS_BIAS=bias is not None,
        BLOCK_N=256,
        BLOCK_C=_power_of_two(channels),
        num_warps=WARPS,
    )
    return out
