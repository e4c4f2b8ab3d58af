"""The images of a training run: held as bytes, in an order that seed and step decide.

All random choices come from counters (:func:`generation.noise.philox`): what step ``k`` does is the same in a
run that began at 0, in one that was resumed, and however many processes share the batch.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import InputError
from evalkit.images import ImageSource
from evalkit.system.files import physical_memory, replace_atomically
from generation.noise import philox

__all__ = ["Batch", "Use", "as_bytes", "batches", "check_images", "load_pixels", "resize_crop", "uniform"]

SMALLEST_CROP = 0.8
READ_AT_ONCE = 256
# Bytes of memory, where the system does not tell its size.
ASSUMED_MEMORY = 4 * 2**30


class Use(IntEnum):
    """Purpose of a random stream of training; distinct from :class:`generation.noise.Purpose`."""

    ORDER = 16
    AUGMENT = 17
    TIMESTEP = 18
    NOISE = 19
    DROPOUT = 20
    VALIDATION = 21


@dataclass(frozen=True, eq=False)
class Batch:
    """One process's share of a step.

    Attributes:
        positions: (b,) int64 place of each image in the whole batch, which its random numbers depend on.
        x_0: (b, 3, h, w) float32 in [-1, 1].
        y: (b,) int64 classes, or None.
    """

    positions: Tensor
    x_0: Tensor
    y: Tensor | None


def check_images(images: ImageSource, size: int, classes: int | None, *, larger: bool = False) -> None:
    """Raise an InputError unless a network of ``size`` and ``classes`` can learn from the images.

    Args:
        images: The training images.
        size: Side of the network's images, pixels.
        classes: Number of classes; None: labels are not needed.
        larger: Whether images may also be larger, because they are cropped.

    Raises:
        InputError: Another size, no labels, or labels out of range.
    """
    if not len(images) or images.shape is None:
        raise InputError(f"{images.name} holds no images, only statistics. Give the images themselves.")
    height, width, _ = images.shape
    if (height, width) != (size, size) and not (larger and min(height, width) >= size):
        raise InputError(
            f"{images.name} holds images of {width}x{height}; the model takes {size}x{size}. "
            f"`evalkit reference build {shlex.quote(images.name)} -o images{size}.npz --size {size} "
            "--statistics none` crops them."
        )
    if classes is None:
        return
    if images.labels is None:
        if images.labels_problem:
            raise InputError(f"{images.name}: the model has {classes} classes. {images.labels_problem}")
        raise InputError(
            f"{images.name} has no labels, and the model has {classes} classes. Give an npz with labels in "
            "arr_1, an HDF5 file with `labels`, or a recipe without classes."
        )
    if (outside := images.labels[(images.labels < 0) | (images.labels >= classes)]).size:
        raise InputError(
            f"{images.name}: label {outside[0]} is out of range: the model has the classes 0 to "
            f"{classes - 1}."
        )


def load_pixels(images: ImageSource, file: Path, *, processes: int = 1) -> NDArray[np.uint8]:
    """All images as ``(n, h, w, 3)`` uint8: in memory if they fit into half of it, else in a mapped file.

    Args:
        images: The images; read once, from the first to the last.
        file: The file for images that do not fit into memory; reused if it exists.
        processes: Number of processes on this machine that each hold them.

    Raises:
        ImageError: An image is bad.
        OutputError: The file cannot be written.
    """
    shape = (len(images), *(images.shape or ()))
    if math.prod(shape) * processes <= (physical_memory() or ASSUMED_MEMORY) / 2:
        array = np.empty(shape, np.uint8)
        _fill(array, images)
        return array
    if not file.exists():
        with replace_atomically(file) as partial:
            mapped = np.memmap(partial, np.uint8, "w+", shape=shape)
            _fill(mapped, images)
            mapped.flush()
            del mapped  # Windows renames no file that is mapped
    return np.memmap(file, np.uint8, "r", shape=shape)


def _fill(array: NDArray[np.uint8], images: ImageSource) -> None:
    first = 0
    for batch in images.batches(READ_AT_ONCE):
        array[first : first + len(batch)] = as_bytes(batch)
        first += len(batch)
    if images.is_remote:
        images.check_unchanged(every_file=True)  # they are kept under the hash of what was read before


def as_bytes(batch: NDArray[Any]) -> NDArray[np.uint8]:
    """Pixels in [0, 255] of any type, to uint8."""
    return batch if batch.dtype == np.uint8 else batch.round().astype(np.uint8)


def uniform(seed: int, positions: Tensor, step: int, use: int) -> Tensor:
    """``(b, 4)`` float64 numbers from [0, 1) for each of ``(b,)`` int64 positions."""
    one = torch.zeros_like(positions)
    words = philox([one, torch.full_like(one, step), positions, torch.full_like(one, use)], seed)
    return torch.stack(words, dim=1).double() * 2.0**-32


def order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """A permutation of ``count`` images for one pass over them."""
    keys = uniform(seed, torch.arange(count), epoch, Use.ORDER)
    return np.lexsort((keys[:, 1].numpy(), keys[:, 0].numpy()))


def batches(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
    *,
    size: int,
    seed: int,
    batch_size: int,
    steps: range,
    share: slice,
    flip: bool,
    crop: bool,
) -> Iterator[Batch]:
    """The batches of ``steps``; passes over the images follow each other without a gap.

    Args:
        images: (n, h, w, 3).
        labels: (n,), or None.
        size: Side of the network's images.
        seed: Decides order, flips and crops.
        batch_size: Images a step, of all processes together.
        steps: The steps.
        share: The positions of the batch that this process learns from.
        flip: Mirror every second image, at random.
        crop: Enlarge and crop at random, see :func:`resize_crop`.
    """
    positions = torch.arange(batch_size)[share]
    epoch, permutation = -1, np.empty(0, np.int64)
    for step in steps:
        chosen = np.empty(len(positions), np.int64)
        for i, place in enumerate((step * batch_size + positions).tolist()):
            if place // len(images) != epoch:
                epoch = place // len(images)
                permutation = order(seed, epoch, len(images))
            chosen[i] = permutation[place % len(images)]
        pixels = torch.from_numpy(images[chosen]).permute(0, 3, 1, 2)
        numbers = uniform(seed, positions, step, Use.AUGMENT)
        if flip:
            pixels = torch.where(numbers[:, :1, None, None] < 0.5, pixels, pixels.flip(3))
        if crop:
            pixels = resize_crop(pixels, size, numbers[:, 1:])
        y = None if labels is None else torch.from_numpy(labels[chosen])
        yield Batch(positions, pixels.float() / 127.5 - 1, y)


def resize_crop(pixels: Tensor, size: int, numbers: Tensor | None = None) -> Tensor:
    """Random crops of at least 80% of the side, as the ADM classifiers saw them; or the centre.

    PyTorch's bicubic filter with antialiasing, which is Pillow's but for a grey level here and there.

    Args:
        pixels: (b, c, h, w) uint8.
        size: Side of the result.
        numbers: (b, 3) from [0, 1): size and place of the crop; None: the largest, centred.

    Returns:
        (b, c, size, size) uint8.
    """
    if numbers is None:
        numbers = torch.tensor([[0.0, 0.5, 0.5]]).expand(len(pixels), 3)
    largest = math.ceil(size / SMALLEST_CROP)
    sides = size + (numbers[:, 0] * (largest - size + 1)).long()
    out = pixels.new_empty(*pixels.shape[:2], size, size)
    for side in sorted(set(sides.tolist())):
        members = (sides == side).nonzero()[:, 0]
        scale = side / min(pixels.shape[2:])
        shape = [round(length * scale) for length in pixels.shape[2:]]
        resized = pixels[members]
        if shape != list(pixels.shape[2:]):
            resized = F.interpolate(resized, shape, mode="bicubic", antialias=True)
        for image, member in zip(resized, members.tolist(), strict=True):
            top, left = (int(numbers[member, 1 + i] * (shape[i] - size + 1)) for i in range(2))
            out[member] = image[:, top : top + size, left : left + size]
    return out
