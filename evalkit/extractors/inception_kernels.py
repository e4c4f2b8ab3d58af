"""Triton kernels of the Inception network on CUDA: what cuDNN does not do, in one pass over memory each.

Load this module only where there is a GPU: it imports Triton.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

__all__ = ["add_bias_relu", "average_3x3", "maximum_3x3", "resize_and_scale"]

_BLOCK = 1024
_TILE = 2048
"""Numbers that one program takes, some channels of some pixels: no divisions, and 16 bytes at once."""


def resize_and_scale(
    images: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    columns: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Resize images bilinearly and scale them to [-1, 1], with the bits of the CPU's float32 arithmetic.

    Args:
        images: (n, h, w, 3), uint8 or float32, values in [0, 255]; contiguous.
        rows: For each row of the result, the two rows of an image that it lies between, int32, and the weight
            of the second, float32.
        columns: The same for columns.
        dtype: Of the result.

    Returns:
        (n, 3, height, width), channels-last.
    """
    n, height, width, _ = images.shape
    out_height, out_width = len(rows[0]), len(columns[0])
    out = torch.empty(
        (n, 3, out_height, out_width),
        dtype=dtype,
        device=images.device,
        memory_format=torch.channels_last,
    )
    if n:
        with torch.cuda.device(images.get_device()):  # Triton launches on the current device
            blocks = -(-out_width * 3 // _BLOCK)
            _resize[(n * out_height * blocks,)](
                images, out, *rows, *columns, blocks, height, width, out_height, out_width, _BLOCK
            )
    return out


def add_bias_relu(x: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """``relu(x + bias)``, added in float32.

    Args:
        x: (n, c, h, w), channels-last, or some channels of such a tensor.
        bias: (c,)
        out: Like ``x``, and may be ``x`` itself; written, and returned.
    """
    n, channels, height, width = x.shape
    lanes = _lanes(channels)
    pixels = n * height * width
    if pixels:
        with torch.cuda.device(x.get_device()):
            _bias_relu[(-(-pixels // (_TILE // lanes)) * (channels // lanes),)](
                x,
                bias,
                out,
                pixels,
                channels // lanes,
                x.stride(3),
                out.stride(3),
                _TILE // lanes,
                lanes,
            )
    return out


def maximum_3x3(x: Tensor, out: Tensor) -> Tensor:
    """``max_pool2d(x, 3, 2)``.

    Args:
        x: (n, c, h, w), channels-last.
        out: (n, c, (h - 1) // 2, (w - 1) // 2), channels-last, or some channels of such a tensor; written,
            and returned.
    """
    return _pooled(x, x, out, stride=2, padding=0, average=False)


def average_3x3(x: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """``relu(avg_pool2d(x, 3, 1, 1, count_include_pad=False) + bias)``, computed in float32.

    Args:
        x: (n, c, h, w), channels-last.
        bias: (c,)
        out: Like ``x``, or some channels of such a tensor; written, and returned.
    """
    return _pooled(x, bias, out, stride=1, padding=1, average=True)


def _pooled(x: Tensor, bias: Tensor, out: Tensor, *, stride: int, padding: int, average: bool) -> Tensor:
    n, channels, height, width = x.shape
    sides = out.shape[2:]
    lanes = _lanes(channels)
    parts = channels // lanes
    tiles = -(-sides[0] * sides[1] // (_TILE // lanes))
    if n:
        with torch.cuda.device(x.get_device()):
            _pool[(n * tiles * parts,)](
                x,
                bias,
                out,
                tiles,
                parts,
                height,
                width,
                *sides,
                x.stride(3),
                out.stride(0),
                out.stride(3),
                stride,
                padding,
                average,
                _TILE // lanes,
                lanes,
            )
    return out


def _lanes(channels: int) -> int:
    """Neighbouring channels that one program takes: a power of two that divides them all, at most 64."""
    return min(64, channels & -channels)


if importlib.util.find_spec("triton"):  # torch brings it for CUDA, and not for a CPU
    import triton  # type: ignore[import-not-found,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,unused-ignore]

    @triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
    def _resize(  # type: ignore[no-untyped-def]
        images,
        out,
        upper,
        lower,
        row_weight,
        left,
        right,
        column_weight,
        blocks,
        height,
        width,
        out_height,
        out_width,
        BLOCK: tl.constexpr,
    ):
        program = tl.program_id(0)
        row = program // blocks
        y = row % out_height
        image = images + (row // out_height).to(tl.int64) * height * width * 3
        target = out + row.to(tl.int64) * out_width * 3
        above = image + tl.load(upper + y) * width * 3
        below = image + tl.load(lower + y) * width * 3
        down = tl.load(row_weight + y)
        place = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = place < out_width * 3
        x = place // 3
        channel = place % 3
        west = tl.load(left + x, inside, 0) * 3 + channel
        east = tl.load(right + x, inside, 0) * 3 + channel
        along = tl.load(column_weight + x, inside, 0.0)
        # Columns before rows, each a fused multiply-add: the order and the bits of the CPU.
        near = tl.load(above + west, inside, 0).to(tl.float32)
        far = tl.load(above + east, inside, 0).to(tl.float32)
        top = tl.fma(far - near, along, near)
        near = tl.load(below + west, inside, 0).to(tl.float32)
        far = tl.load(below + east, inside, 0).to(tl.float32)
        bottom = tl.fma(far - near, along, near)
        value = (tl.fma(bottom - top, down, top) - 128.0) * 0.0078125
        tl.store(target + place, value.to(out.dtype.element_ty), inside)

    @triton.jit(do_not_specialize=["pixels"])  # type: ignore[misc,untyped-decorator,unused-ignore]
    def _bias_relu(  # type: ignore[no-untyped-def]
        x,
        bias,
        out,
        pixels,
        parts,
        x_stride,
        out_stride,
        PIXELS: tl.constexpr,
        LANES: tl.constexpr,
    ):
        program = tl.program_id(0)
        first = (program // parts).to(tl.int64) * PIXELS
        pixel = tl.arange(0, PIXELS)[:, None]
        inside = pixel < pixels - first
        channel = (program % parts) * LANES + tl.arange(0, LANES)[None, :]
        value = tl.load(x + first * x_stride + (pixel * x_stride + channel), inside, 0.0).to(tl.float32)
        value += tl.load(bias + channel).to(tl.float32)
        value = tl.where(value < 0.0, 0.0, value)  # what is not a number stays so, as in torch
        target = out + first * out_stride + (pixel * out_stride + channel)
        tl.store(target, value.to(out.dtype.element_ty), inside)

    @triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
    def _pool(  # type: ignore[no-untyped-def]
        x,
        bias,
        out,
        tiles,
        parts,
        height,
        width,
        out_height,
        out_width,
        x_stride,
        image_stride,
        out_stride,
        STRIDE: tl.constexpr,
        PADDING: tl.constexpr,
        AVERAGE: tl.constexpr,
        PIXELS: tl.constexpr,
        LANES: tl.constexpr,
    ):
        program = tl.program_id(0)
        channel = (program % parts) * LANES + tl.arange(0, LANES)[None, :]
        tile = program // parts
        image = (tile // tiles).to(tl.int64)
        pixel = (tile % tiles) * PIXELS + tl.arange(0, PIXELS)[:, None]
        inside = pixel < out_height * out_width
        top = (pixel // out_width) * STRIDE - PADDING
        left = (pixel % out_width) * STRIDE - PADDING
        source = x + image * height * width * x_stride
        total = tl.full([PIXELS, LANES], 0.0 if AVERAGE else float("-inf"), tl.float32)
        count = tl.zeros([PIXELS, 1], tl.float32)
        for step in tl.static_range(9):
            row = top + step // 3
            column = left + step % 3
            there = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            offset = (row * width + column) * x_stride + channel
            value = tl.load(source + offset, there, 0.0 if AVERAGE else float("-inf")).to(tl.float32)
            if AVERAGE:
                total += value
                count += there.to(tl.float32)
            else:
                total = tl.maximum(total, value, propagate_nan=tl.PropagateNan.ALL)
        if AVERAGE:
            total = total / tl.maximum(count, 1.0) + tl.load(bias + channel).to(tl.float32)
            total = tl.where(total < 0.0, 0.0, total)
        target = out + image * image_stride + (pixel * out_stride + channel)
        tl.store(target, total.to(out.dtype.element_ty), inside)
