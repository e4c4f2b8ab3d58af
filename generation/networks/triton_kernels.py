"""The Triton kernels of :mod:`generation.networks.fused_norm`, in one file, which nothing else launches.

Maps are (b, c, h, w), channels-last: rows of ``channels`` numbers, one row a pixel. A program takes a stripe
of ``ROWS`` pixels of one image and ``BLOCK_C`` channels, ``BLOCK_N`` pixels at a time. ``FROM`` says which
pixels of another map belong to those of this one: 0, the same; 1, the four below, in a map of twice the size;
2, the one above, in a map of half the size.
"""

from __future__ import annotations

import inspect
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without; then nothing here is called
    triton = tl = None

__all__ = [
    "add_kernel",
    "coefficients_kernel",
    "corrections_kernel",
    "gradient_kernel",
    "normalise_kernel",
    "sums_kernel",
    "taps_kernel",
]


# Sizes that need no version of a kernel each. The others do: that rows start at multiples of 16 bytes is what
# loads of 16 bytes take.
_SIZES = ("pixels", "stripes", "height", "width", "group", "rows_of_stripe", "first_channels")


def _jit(function: Any) -> Any:
    if triton is None:
        return function
    parameters = inspect.signature(function).parameters
    return triton.jit(function, do_not_specialize=[name for name in _SIZES if name in parameters])


@_jit
def _map(pointer, image, pixels, channels, FROM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Start of an image in the map that is read for one of ``pixels``."""
    if FROM == 1:
        pixels = pixels * 4
    elif FROM == 2:
        pixels = pixels // 4
    return pointer + image * pixels * channels


@_jit
def _at(rows, columns, channels):  # type: ignore[no-untyped-def]
    return rows[:, None].to(tl.int64) * channels + columns


@_jit
def _child(rows, width):  # type: ignore[no-untyped-def]
    """The pixel (2y, 2x) of a map of twice the ``width``."""
    return rows // width * 4 * width + rows % width * 2


@_jit
def _parent(rows, width):  # type: ignore[no-untyped-def]
    """The pixel (y // 2, x // 2) of a map of half the ``width``."""
    return rows // width // 2 * (width // 2) + rows % width // 2


@_jit
def _load(pointer, inside):  # type: ignore[no-untyped-def]
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@_jit
def _fetch(  # type: ignore[no-untyped-def]
    pointer, rows, columns, inside, channels, width, FROM: tl.constexpr
):
    """Pixels of a map for those at ``rows``; the sum of the four below."""
    if FROM == 1:
        first = pointer + _at(_child(rows, width), columns, channels)
        below = first + 2 * width * channels
        value = _load(first, inside) + _load(first + channels, inside)
        value += _load(below, inside) + _load(below + channels, inside)
    elif FROM == 2:
        value = _load(pointer + _at(_parent(rows, width), columns, channels), inside)
    else:
        value = _load(pointer + _at(rows, columns, channels), inside)
    return value


@_jit
def _activate(pointer, inside, a, b, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    value = _load(pointer, inside) * a + b
    if SILU:
        value = value * tl.sigmoid(value)
    return value


@_jit
def add_kernel(  # type: ignore[no-untyped-def]
    h,
    skip,
    bias,
    mean,
    deviation,
    pixels,
    channels,
    width,
    FROM: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``h += bias + skip`` where there are any, and the moments of the sum."""
    blocks = channels // BLOCK_C
    stripe = tl.program_id(0) // blocks
    image = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    h += image * pixels * channels
    if HAS_SKIP:
        skip = _map(skip, image, pixels, channels, FROM)
    if HAS_BIAS:
        shift = tl.load(bias + columns)
    # Welford's update in each lane: no sum of squares that could cancel.
    means = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    deviations = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    lanes = tl.arange(0, BLOCK_N)
    count = 0.0
    for start in range(0, ROWS, BLOCK_N):
        rows = stripe * ROWS + start + lanes
        inside = rows[:, None] < pixels
        place = _at(rows, columns, channels)
        value = _load(h + place, inside)
        if HAS_BIAS:
            value += shift
        if HAS_SKIP:
            other = _fetch(skip, rows, columns, inside, channels, width, FROM)
            value += other * 0.25 if FROM == 1 else other
        if HAS_BIAS or HAS_SKIP:
            rounded = value.to(h.dtype.element_ty)
            tl.store(h + place, rounded, mask=inside)
            value = rounded.to(tl.float32)
        count += 1.0
        delta = tl.where(inside, value - means, 0.0)
        means += delta * (1.0 / count)
        deviations += delta * (value - means)
    # Lane i has seen every BLOCK_N-th row of the stripe from its i-th.
    rest = tl.minimum(pixels - stripe * ROWS, ROWS)
    counts = ((rest - lanes + BLOCK_N - 1) // BLOCK_N).to(tl.float32)
    counts = tl.maximum(counts, 0.0)[:, None]
    total = tl.sum(counts * means, axis=0, keep_dims=True) / rest.to(tl.float32)
    apart = means - total
    spread = tl.sum(deviations + counts * apart * apart, axis=0, keep_dims=True)
    out = (image * (tl.num_programs(0) // blocks) + stripe) * channels + columns
    tl.store(mean + out, total)
    tl.store(deviation + out, spread)


@_jit
def coefficients_kernel(  # type: ignore[no-untyped-def]
    mean,
    deviation,
    mean_1,
    deviation_1,
    bias,
    condition,
    weight,
    offset,
    out,
    pixels,
    stripes,
    rows_of_stripe,
    group,
    first_channels,
    channels,
    bias_stride,
    condition_stride,
    epsilon,
    HAS_BIAS: tl.constexpr,
    CONDITION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The four coefficients of the channels of a group: a, b, and 1/std and -mean/std of the input."""
    image = tl.program_id(1).to(tl.int64)
    within = tl.arange(0, BLOCK_G)[None, :]
    channel = tl.program_id(0) * group + within
    member = within < group
    stripe = tl.arange(0, BLOCK_S)[:, None]
    real = (stripe < stripes) & member
    first = real & (channel < first_channels)
    second = real & (channel >= first_channels)
    place = (image * stripes + stripe) * first_channels + channel
    place_1 = (image * stripes + stripe) * (channels - first_channels) + channel - first_channels
    means = tl.load(mean + place, mask=first, other=0.0) + tl.load(mean_1 + place_1, mask=second, other=0.0)
    spread = tl.load(deviation + place, mask=first, other=0.0)
    spread += tl.load(deviation_1 + place_1, mask=second, other=0.0)
    if HAS_BIAS:
        added = tl.load(bias + image * bias_stride + channel, mask=member, other=0.0)
        means += added
    counts = tl.where(real, tl.minimum(pixels - stripe * rows_of_stripe, rows_of_stripe), 0).to(tl.float32)
    number = pixels * 1.0 * group
    center = tl.sum(counts * means) / number
    apart = means - center
    variance = tl.sum(spread + counts * apart * apart) / number
    inverse = 1.0 / tl.sqrt(variance + epsilon)
    a = tl.load(weight + channel, mask=member, other=0.0)
    b = tl.load(offset + channel, mask=member, other=0.0)
    if CONDITION:
        scale = 1.0 + tl.load(condition + image * condition_stride + channel, mask=member, other=0.0)
        shift = tl.load(condition + image * condition_stride + channels + channel, mask=member, other=0.0)
        a = a * scale
        b = b * scale + shift
    a = a * inverse
    # What the convolution's bias shifts is part of b and of the mean: the map itself stays as it is.
    away = (added if HAS_BIAS else tl.zeros([1, BLOCK_G], tl.float32)) - center
    out += image * 4 * channels + channel
    tl.store(out, a, mask=member)
    tl.store(out + channels, b + away * a, mask=member)
    tl.store(out + 2 * channels, tl.zeros([1, BLOCK_G], tl.float32) + inverse, mask=member)
    tl.store(out + 3 * channels, away * inverse, mask=member)


@_jit
def normalise_kernel(  # type: ignore[no-untyped-def]
    x,
    table,
    out,
    pixels,
    channels,
    width,
    table_stride,
    table_channels,
    out_stride,
    FROM: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``out = resample(silu(x * a + b))``, by the pixels of the output."""
    blocks = channels // BLOCK_C
    stripe = tl.program_id(0) // blocks
    image = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    a = tl.load(table + image * table_stride + columns)
    b = tl.load(table + image * table_stride + table_channels + columns)
    out += image * pixels * out_stride
    x = _map(x, image, pixels, channels, FROM)
    lanes = tl.arange(0, BLOCK_N)
    for start in range(0, ROWS, BLOCK_N):
        rows = stripe * ROWS + start + lanes
        inside = rows[:, None] < pixels
        if FROM == 1:
            first = x + _at(_child(rows, width), columns, channels)
            below = first + 2 * width * channels
            value = _activate(first, inside, a, b, SILU) + _activate(first + channels, inside, a, b, SILU)
            value += _activate(below, inside, a, b, SILU)
            value = 0.25 * (value + _activate(below + channels, inside, a, b, SILU))
        elif FROM == 2:
            value = _activate(x + _at(_parent(rows, width), columns, channels), inside, a, b, SILU)
        else:
            value = _activate(x + _at(rows, columns, channels), inside, a, b, SILU)
        tl.store(out + _at(rows, columns, out_stride), value.to(out.dtype.element_ty), mask=inside)


@_jit
def _slope(u, gradient, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient before the activation."""
    if SILU:
        sigmoid = tl.sigmoid(u)
        gradient = gradient * (sigmoid * (1.0 + u * (1.0 - sigmoid)))
    return gradient


@_jit
def sums_kernel(  # type: ignore[no-untyped-def]
    x,
    gradient,
    table,
    sums,
    pixels,
    channels,
    width,
    FROM: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over a stripe of du and of du times the normalised input, for each channel."""
    blocks = channels // BLOCK_C
    stripe = tl.program_id(0) // blocks
    image = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    table += image * 4 * channels + columns
    a, b = tl.load(table), tl.load(table + channels)
    inverse, away = tl.load(table + 2 * channels), tl.load(table + 3 * channels)
    x += image * pixels * channels
    gradient = _map(gradient, image, pixels, channels, FROM)
    plain = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    product = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    lanes = tl.arange(0, BLOCK_N)
    for start in range(0, ROWS, BLOCK_N):
        rows = stripe * ROWS + start + lanes
        inside = rows[:, None] < pixels
        value = _load(x + _at(rows, columns, channels), inside)
        # Zero outside, so that nothing is added there.
        du = _slope(value * a + b, _fetch(gradient, rows, columns, inside, channels, width, FROM), SILU)
        plain += du
        product += du * (value * inverse + away)
    out = sums + (image * (tl.num_programs(0) // blocks) + stripe) * 2 * channels + columns
    share = 0.25 if FROM == 2 else 1.0
    tl.store(out, tl.sum(plain, axis=0, keep_dims=True) * share)
    tl.store(out + channels, tl.sum(product, axis=0, keep_dims=True) * share)


@_jit
def corrections_kernel(  # type: ignore[no-untyped-def]
    sums,
    table,
    out,
    pixels,
    stripes,
    group,
    channels,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """What mean and variance of a group take from the gradient: c and d of ``dx = a du - c x - d``."""
    image = tl.program_id(1).to(tl.int64)
    within = tl.arange(0, BLOCK_G)[None, :]
    channel = tl.program_id(0) * group + within
    member = within < group
    stripe = tl.arange(0, BLOCK_S)[:, None]
    place = sums + (image * stripes + stripe) * 2 * channels + channel
    real = (stripe < stripes) & member
    table += image * 4 * channels + channel
    a = tl.load(table, mask=member, other=0.0)
    inverse = tl.load(table + 2 * channels, mask=member, other=0.0)
    away = tl.load(table + 3 * channels, mask=member, other=0.0)
    number = pixels * 1.0 * group
    plain = tl.sum(a * tl.load(place, mask=real, other=0.0)) / number
    product = tl.sum(a * tl.load(place + channels, mask=real, other=0.0)) / number
    out += image * 2 * channels + channel
    tl.store(out, inverse * product, mask=member)
    tl.store(out + channels, plain + away * product, mask=member)


@_jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    x,
    gradient,
    table,
    corrections,
    skip,
    out,
    pixels,
    channels,
    width,
    FROM: tl.constexpr,
    SILU: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``out = a du - c x - d``, plus the gradient that came by the skip."""
    blocks = channels // BLOCK_C
    stripe = tl.program_id(0) // blocks
    image = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    a = tl.load(table + image * 4 * channels + columns)
    b = tl.load(table + image * 4 * channels + channels + columns)
    c = tl.load(corrections + image * 2 * channels + columns)
    d = tl.load(corrections + image * 2 * channels + channels + columns)
    x += image * pixels * channels
    out += image * pixels * channels
    gradient = _map(gradient, image, pixels, channels, FROM)
    skip = _map(skip, image, pixels, channels, FROM)
    share = 0.25 if FROM == 2 else 1.0
    lanes = tl.arange(0, BLOCK_N)
    for start in range(0, ROWS, BLOCK_N):
        rows = stripe * ROWS + start + lanes
        inside = rows[:, None] < pixels
        place = _at(rows, columns, channels)
        value = _load(x + place, inside)
        du = _slope(
            value * a + b, _fetch(gradient, rows, columns, inside, channels, width, FROM) * share, SILU
        )
        dx = a * du - c * value - d
        if HAS_SKIP:
            dx += _fetch(skip, rows, columns, inside, channels, width, FROM) * share
        tl.store(out + place, dx.to(out.dtype.element_ty), mask=inside)


@_jit
def taps_kernel(  # type: ignore[no-untyped-def]
    products,
    bias,
    out,
    height,
    width,
    channels,
    stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``out[p] = sum over the 3x3 taps of products[p + tap, tap]``, NCHW."""
    image = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    pixels = height * width
    y, x = (rows // width)[:, None], (rows % width)[:, None]
    columns = tl.arange(0, BLOCK_C)[None, :]
    real = (rows < pixels)[:, None] & (columns < channels)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    products += image * pixels * stride
    for tap in tl.static_range(9):
        below, right = tap // 3 - 1, tap % 3 - 1
        inside = (y + below >= 0) & (y + below < height) & (x + right >= 0) & (x + right < width) & real
        place = (rows[:, None] + below * width + right).to(tl.int64) * stride + tap * channels + columns
        total += tl.load(products + place, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < channels, other=0.0)
    tl.store(out + (image * channels + columns) * pixels + rows[:, None], total, mask=real)
