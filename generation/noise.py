"""Random numbers of a sample: the same bits in every batch, on every worker and every device.

Philox4x32-10 ("Parallel Random Numbers: As Easy as 1, 2, 3", Salmon et al., SC 2011) turns a counter and a
key into four random words. Key: the seed. Counter: the block of four within the tensor, the step, the index
of the sample, and what the numbers are for. No state is carried from one call to the next.

The words become normal numbers by the Box-Muller transform, whose logarithm, sine and cosine are computed
here: those of NumPy, the C library and CUDA differ in their last bits. Only operations that IEEE 754 rounds
exactly are used (+, -, *, sqrt, and / of two tensors: by a number, PyTorch may multiply with the reciprocal
instead), in float64, each rounded on its own, so that no compiler fuses a product into a sum; then one
rounding to float32. So CPUs and CUDA devices give the same bits; Apple's, without float64, get them from the
CPU. With Triton, CUDA devices make them in one kernel (:mod:`generation.noise_kernel`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.system.devices import has_triton

__all__ = ["Noise", "Purpose", "Streams", "normal", "philox", "random_labels"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LABELS_AT_ONCE = 2**16
# Series in the square of their argument, the constant first: 2 artanh(x) / x, sin(x) / x and cos(x).
_LOG = tuple(2 / (2 * k + 1) for k in range(9))
_SINE = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(8))
_COSINE = tuple((-1) ** k / math.factorial(2 * k) for k in range(8))


class Purpose(IntEnum):
    """Purpose of a random stream; streams of different purposes are independent."""

    START = 0
    STEP = 1
    LABEL = 2


class Noise(Protocol):
    """The noise that a sampler adds at each step."""

    def __call__(self, step: int, /) -> Tensor:
        """Standard normal numbers of the samples' shape, float32, on their device."""


class Streams:
    """The noise of the samples ``indices`` of a run with ``seed``.

    Args:
        seed: From 0 to 2^64 - 1.
        indices: Index of each sample of the batch within the run, each below 2^32.
        shape: ``(channels, height, width)`` of one sample. Widths have streams of their own, so that the
            noise of an upsampler is independent of that of its base under the same seed and index.
        device: The device to make the noise on.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, int, int], device: torch.device):
        self.seed = seed
        self.shape = shape
        self.device = device
        # Placed once: a copy to the device at every step would make the host wait for it.
        self._indices = torch.tensor(indices, dtype=torch.int64, device=_maker(device))

    def start(self) -> Tensor:
        """The noise that sampling starts from, ``(b, c, h, w)`` float32."""
        return self._normal(Purpose.START, 0)

    def __call__(self, step: int) -> Tensor:
        """The noise that is added at ``step``, ``(b, c, h, w)`` float32."""
        return self._normal(Purpose.STEP, step)

    def _normal(self, purpose: Purpose, step: int) -> Tensor:
        use = purpose | self.shape[2] << 8
        flat = normal(self.seed, self._indices, step, use, math.prod(self.shape))
        return flat.view(-1, *self.shape).to(self.device)


def random_labels(seed: int, count: int, classes: int) -> NDArray[np.int64]:
    """``(count,)`` classes from 0 to ``classes - 1``; that of a sample depends on its index alone."""
    labels = np.empty(count, np.int64)
    for first in range(0, count, _LABELS_AT_ONCE):
        indices = torch.arange(first, min(first + _LABELS_AT_ONCE, count))
        words = philox(_counter(indices, 0, Purpose.LABEL, 1), seed)[0]
        labels[first : first + len(indices)] = words[:, 0] * classes >> 32
    return labels


def normal(seed: int, indices: Tensor, step: int, use: int, count: int) -> Tensor:
    """``(b, count)`` float32 standard normal numbers, a row for each of ``(b,)`` int64 ``indices``.

    Magnitudes reach sqrt(66 log 2) = 6.76: beyond lies one number in 10^11. Not to be called from compiled
    code, where products and sums may be fused.
    """
    if has_triton(indices.device):
        from generation import noise_kernel

        return noise_kernel.normal(seed, indices, step, use, count, series=(_LOG, _SINE, _COSINE))
    words = philox(_counter(indices, step, use, -(-count // 4)), seed)
    pairs = [number for pair in (words[:2], words[2:]) for number in _box_muller(*pair)]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :count]


def philox(counter: Sequence[Tensor], key: int) -> list[Tensor]:
    """The four random words of Philox4x32-10, each an int64 tensor of values below 2^32.

    Args:
        counter: Four int64 tensors of words that can be broadcast together, the lowest word first.
        key: 64 bits.
    """
    c0, c1, c2, c3 = counter
    keys = [key & _WORD, key >> 32 & _WORD]
    for _ in range(10):
        # A product of two words may pass 2^63; it wraps, and shift and mask read the right bits all the same.
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (high >> 32 & _WORD) ^ c1 ^ keys[0],
            high & _WORD,
            (low >> 32 & _WORD) ^ c3 ^ keys[1],
            low & _WORD,
        )
        keys = [(word + step) & _WORD for word, step in zip(keys, _KEY_STEPS, strict=True)]
    return [c0, c1, c2, c3]


def _counter(indices: Tensor, step: int, use: int, blocks: int) -> list[Tensor]:
    block = torch.arange(blocks, device=indices.device)[None]
    return [block, torch.full_like(block, step), indices[:, None], torch.full_like(block, use)]


def _box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normal numbers, float32, from two random words."""
    uniform = (radius.to(torch.float64) + 0.5) * 2.0**-32  # in (0, 1), exact
    length = torch.sqrt(_log(uniform) * -2.0)
    # The highest two bits choose a quarter of the circle, the others an angle within 45 degrees around 0:
    # turned by quarters, these make up the circle once.
    quarter = angle >> 30
    theta = ((angle & 0x3FFFFFFF).to(torch.float64) + 0.5) * (math.pi / 2 * 2.0**-30) - math.pi / 4
    sine, cosine = _sine_and_cosine(theta)
    swapped, negative = (quarter & 1).bool(), quarter > 1
    x = torch.where(swapped, -sine, cosine) * length
    y = torch.where(swapped, cosine, sine) * length
    return torch.where(negative, -x, x).float(), torch.where(negative, -y, y).float()


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of normal float64 numbers, to 3e-14 of it or of 1."""
    bits = x.view(torch.int64)
    # x = m 2^e with m from sqrt(1/2) to sqrt(2): 0x3FE6A09E... are the bits of sqrt(1/2).
    exponent = bits - 0x3FE6A09E667F3BCD >> 52
    m = (bits - (exponent << 52)).view(torch.float64)
    ratio = (m - 1.0) / (m + 1.0)  # at most 0.172
    # log m = 2 artanh(ratio), its series.
    series = _polynomial(ratio * ratio, _LOG)
    return series * ratio + exponent.to(torch.float64) * math.log(2)


def _sine_and_cosine(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Taylor series up to theta^15, good to 1e-15 within 45 degrees."""
    square = theta * theta
    return _polynomial(square, _SINE) * theta, _polynomial(square, _COSINE)


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Horner's scheme, the constant first; a product and a sum at a time, each rounded."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total.mul_(x).add_(coefficient)
    return total


def _maker(device: torch.device) -> torch.device:
    """Where the noise of a device is made."""
    return torch.device("cpu") if device.type == "mps" else device
