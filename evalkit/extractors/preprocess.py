"""What is done to images before a network sees them, as each tool does it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from evalkit.system.devices import has_triton

__all__ = ["interpolation", "resize_bicubic", "resize_half_pixel", "resize_tf1", "scaled_input"]


def resize_tf1(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's bilinear resize: ``align_corners=False``, no half-pixel centres, no antialiasing.

    Source position ``i * in / out`` in float32, neighbours ``floor`` and ``floor + 1`` (clamped), columns
    interpolated before rows, as TensorFlow's ``ResizeBilinear`` kernel does.

    Args:
        images: (n, h, w, c), floating point.
        size: Side of the square output, pixels.

    Returns:
        (n, size, size, c), same dtype.
    """
    n, height, width, channels = images.shape
    # As a matrix: gathering its columns is several times as fast as gathering runs of three numbers.
    rows = _interpolate(images.reshape(n * height, width * channels), size, channels)
    return _interpolate(rows.reshape(n, height, size * channels), size).reshape(n, size, size, channels)


def resize_half_pixel(images: Tensor, size: int) -> Tensor:
    """PyTorch's bilinear resize: ``align_corners=False``, so half-pixel centres; no antialiasing.

    Args:
        images: (n, h, w, c), float32.
        size: Side of the square output, pixels.

    Returns:
        (n, c, size, size), float32.
    """
    # Not channels-last, for which torch on a CPU rounds in another order.
    planes = images.permute(0, 3, 1, 2).contiguous()
    return F.interpolate(planes, (size, size), mode="bilinear", align_corners=False)


def resize_bicubic(images: Tensor, size: int) -> Tensor:
    """Pillow's bicubic resize of each channel as floats (mode ``F``), with antialiasing; nothing is clipped.

    Weights and sums are float64, and each pass rounds to float32, as in Pillow: the same bits. Columns go
    before rows, as in Pillow before version 13; this one resizes some tall images the other way round, which
    moves a value by up to 3.1e-5.

    Args:
        images: (n, h, w, c), values in [0, 255].
        size: Side of the square output, pixels.

    Returns:
        (n, c, size, size), float32, on the device of the images.
    """
    device = images.device
    x = images.permute(0, 3, 1, 2).contiguous()
    if device.type == "mps":  # which has no float64
        x = x.cpu()
    for shape in ((x.shape[2], size), (size, size)):
        x = F.interpolate(x.double(), shape, mode="bicubic", antialias=True).float()
    return x.to(device)


def scaled_input(images: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """What Inception sees of images: :func:`resize_tf1`, scaled to [-1, 1].

    On CUDA, where Triton is installed, one kernel does all of it. It gives the same bits in float32.

    Args:
        images: (n, h, w, 3), uint8 or float32, values in [0, 255].
        size: Side of the square result, pixels.
        dtype: Of the result. It is computed in float32.

    Returns:
        (n, 3, size, size), channels-last.
    """
    if has_triton(images.device):
        from evalkit.extractors.inception_kernels import resize_and_scale

        rows, columns = (_kernel_tables(extent, size, images.device) for extent in images.shape[1:3])
        return resize_and_scale(images.contiguous(), rows, columns, dtype)
    x = (resize_tf1(images.float(), size) - 128).mul_(0.0078125)
    # An NHWC tensor seen as NCHW is channels-last: no copy.
    return x.permute(0, 3, 1, 2).to(dtype)


@lru_cache(maxsize=16)
def _kernel_tables(extent: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    lower, upper, weight = interpolation(extent, size)
    near, far = (torch.from_numpy(index.astype(np.int32)).to(device) for index in (lower, upper))
    return near, far, torch.from_numpy(weight).to(device)


def _interpolate(x: Tensor, size: int, lanes: int = 1) -> Tensor:
    """Resize axis 1 to `size` pixels of `lanes` numbers each."""
    extent = x.shape[1] // lanes
    if extent == size:
        return x
    lower, upper, weight = _places(extent, size, lanes, x.dtype, x.device)
    near, far = x.index_select(1, lower), x.index_select(1, upper)
    return near.addcmul_(far.sub_(near), weight.reshape([-1] + [1] * (x.ndim - 2)))


# A batch of one size needs two of them, and its tables are the same for every batch: on a GPU, to make them
# again would be six copies that the host waits for.
@lru_cache(maxsize=16)
def _places(
    extent: int, size: int, lanes: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """For each number of the result, the two that it lies between and the weight of the second."""
    lower, upper, weight = interpolation(extent, size)
    places = ((index[:, None] * lanes + np.arange(lanes)).ravel() for index in (lower, upper))
    near, far = (torch.from_numpy(index).to(device) for index in places)
    return near, far, torch.from_numpy(np.repeat(weight, lanes)).to(device, dtype)


def interpolation(extent: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """For each of ``size`` pixels, the two of ``extent`` that it lies between; the weight of the second."""
    position = np.arange(size, dtype=np.float32) * (np.float32(extent) / np.float32(size))
    lower = np.floor(position).astype(np.int64)
    return lower, np.minimum(lower + 1, extent - 1), position - lower.astype(np.float32)
