"""Triton kernel of :func:`generation.noise.normal`: the same bits in one launch.

Every product, sum, quotient and root is rounded on its own and stands in the order of the torch code. So the
kernel is compiled without fused multiply-add, and division and root are those of IEEE 754.

Load this module only where there is a GPU: it imports Triton.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

__all__ = ["normal"]

BLOCKS = 256
"""Philox blocks, of four numbers each, that one program makes."""


def normal(
    seed: int, indices: Tensor, step: int, use: int, count: int, *, series: tuple[tuple[float, ...], ...]
) -> Tensor:
    """See :func:`generation.noise.normal`.

    Args:
        seed: From 0 to 2^64 - 1.
        indices: (b,) int64, on the device to compute on.
        step: The step.
        use: What the numbers are for.
        count: Numbers for each index.
        series: Coefficients for the logarithm, the sine and the cosine, the constant first.
    """
    numbers = torch.empty(len(indices), count, dtype=torch.float32, device=indices.device)
    if not numbers.numel():
        return numbers
    chunks = -(-count // (4 * BLOCKS))
    words = (_int32(word) for word in (seed, seed >> 32, step, use))
    with torch.cuda.device_of(indices):  # Triton launches on the current device
        _normal[(len(indices) * chunks,)](
            numbers, indices.contiguous(), *words, count, chunks, *series, BLOCKS, enable_fp_fusion=False
        )
    return numbers


def _int32(word: int) -> int:
    """The lowest 32 bits as a signed number: Triton compiles anew for numbers that need another type."""
    word &= 0xFFFFFFFF
    return word - (word >> 31 << 32)


if importlib.util.find_spec("triton"):  # not so on a CPU
    import triton  # type: ignore[import-not-found,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,unused-ignore]

    @triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "use", "count", "chunks"])
    def _normal(
        numbers,
        indices,
        seed_low,
        seed_high,
        step,
        use,
        count,
        chunks,
        log_series: tl.constexpr,
        sine_series: tl.constexpr,
        cosine_series: tl.constexpr,
        BLOCKS: tl.constexpr,
    ):
        program = tl.program_id(0)
        row = program // chunks
        block = (program % chunks) * BLOCKS + tl.arange(0, BLOCKS)
        zero = tl.zeros([BLOCKS], tl.uint32)
        c0 = block.to(tl.uint32)
        c1 = zero + step.to(tl.uint32, bitcast=True)
        c2 = zero + tl.load(indices + row).to(tl.uint32)
        c3 = zero + use.to(tl.uint32, bitcast=True)
        key0 = zero + seed_low.to(tl.uint32, bitcast=True)
        key1 = zero + seed_high.to(tl.uint32, bitcast=True)
        for _ in tl.static_range(10):
            low = c0.to(tl.uint64) * 0xD2511F53
            high = c2.to(tl.uint64) * 0xCD9E8D57
            c0 = (high >> 32).to(tl.uint32) ^ c1 ^ key0
            c1 = high.to(tl.uint32)
            c2 = (low >> 32).to(tl.uint32) ^ c3 ^ key1
            c3 = low.to(tl.uint32)
            key0 += 0x9E3779B9
            key1 += 0xBB67AE85
        a, b = _box_muller(c0, c1, log_series, sine_series, cosine_series)
        c, d = _box_muller(c2, c3, log_series, sine_series, cosine_series)
        first = block * 4
        here = numbers + row.to(tl.int64) * count + first
        tl.store(here, a, mask=first < count)
        tl.store(here + 1, b, mask=first + 1 < count)
        tl.store(here + 2, c, mask=first + 2 < count)
        tl.store(here + 3, d, mask=first + 3 < count)

    @triton.jit
    def _box_muller(
        radius,
        angle,
        log_series: tl.constexpr,
        sine_series: tl.constexpr,
        cosine_series: tl.constexpr,
    ):
        uniform = (radius.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
        length = tl.sqrt(_log(uniform, log_series) * -2.0)
        quarter = angle >> 30
        # Of pi / 2^31, and pi / 4.
        theta = ((angle & 0x3FFFFFFF).to(tl.float64) + 0.5) * 1.4629180792671596e-09 - 0.7853981633974483
        square = theta * theta
        sine = _polynomial(square, sine_series) * theta
        cosine = _polynomial(square, cosine_series)
        swapped = (quarter & 1) != 0
        x = tl.where(swapped, -sine, cosine) * length
        y = tl.where(swapped, cosine, sine) * length
        negative = quarter > 1
        return tl.where(negative, -x, x).to(tl.float32), tl.where(negative, -y, y).to(tl.float32)

    @triton.jit
    def _log(x, series: tl.constexpr):
        bits = x.to(tl.int64, bitcast=True)
        exponent = (bits - 0x3FE6A09E667F3BCD) >> 52
        m = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
        ratio = (m - 1.0) / (m + 1.0)
        return _polynomial(ratio * ratio, series) * ratio + exponent.to(tl.float64) * 0.6931471805599453

    @triton.jit
    def _polynomial(x, coefficients: tl.constexpr):
        last: tl.constexpr = len(coefficients) - 1
        total = tl.zeros_like(x) + coefficients[last]
        for k in tl.static_range(last):
            total = total * x + coefficients[last - 1 - k]
        return total
