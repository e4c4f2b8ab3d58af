"""Batches of images from a training loop: tensors or arrays, bytes or floats, in either layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import InputError
from evalkit.images.arrays import check_layout
from evalkit.images.labels import labels_problem
from evalkit.images.source import ImageSource
from evalkit.images.value_range import (
    DARK_BATCH,
    VALUE_RANGES,
    ValueRange,
    are_cut_floats,
    cut_floats_problem,
    parse_value_range,
)

__all__ = ["BYTE_RULES", "GivenImages", "Intake", "Layout", "ToBytes", "labels_of", "numpy_dtype"]

Layout: TypeAlias = Literal["NCHW", "NHWC"]
ToBytes: TypeAlias = Literal["truncate", "round", "keep"]

BYTE_RULES = {
    "truncate": "truncated to whole numbers, as ADM's scripts do",
    "round": "rounded with halves up, as torchvision's save_image does",
    "keep": "not converted to bytes",
}
"""How floats are converted."""

_SCALES = {"0..1": "x * 255", "-1..1": "(x + 1) * 127.5", "0..255": "x"}


@dataclass(kw_only=True)
class Intake:
    """Converts all images to one kind, and remembers what shows whether they were declared correctly.

    Attributes:
        declared: A key of :data:`evalkit.images.VALUE_RANGES`; None for no floats.
        low: The smallest value of all floats; ``high`` the largest.
        values: Values of integers; none are added once they cannot be truncated floats.

    Args:
        value_range: Of floats; None for no floats.
        layout: ``NCHW`` or ``NHWC``; None where the axis of 3 channels shows which.
        to_bytes: How floats are converted, a key of :data:`BYTE_RULES`.

    Raises:
        InputError: An argument has another value.
    """

    value_range: ValueRange | None
    layout: Layout | None
    to_bytes: ToBytes
    declared: str | None = field(default=None, init=False)
    low: float = field(default=np.inf, init=False)
    high: float = field(default=-np.inf, init=False)
    values: set[int] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        pair = parse_value_range(self.value_range)
        self.declared = next((key for key, found in VALUE_RANGES.items() if found == pair), None)
        for name, choices in (("layout", (*get_args(Layout), None)), ("to_bytes", get_args(ToBytes))):
            if (given := getattr(self, name)) not in choices:
                raise InputError(f"{name}={given!r}: expected one of {', '.join(map(repr, choices))}.")

    def batch(self, images: object) -> Tensor:
        """Convert images to (n, h, w, 3) on their device: uint8, or float32 in [0, 255] with ``keep``.

        Raises:
            InputError: They are not images, or floats without a declared range.
        """
        given = _tensor(images)
        pixels = given.permute(*_axes(given, self.layout))
        if not pixels.is_floating_point():
            return self._integers(pixels)
        if self.declared is None:
            raise InputError(
                f"The images are {_kind(given)}, and their range was not declared. Give the evaluator "
                'value_range="0..1", "-1..1" or "0..255", or give it uint8.'
            )
        if not len(pixels):
            return pixels.to(torch.float32 if self.to_bytes == "keep" else torch.uint8)
        # As scripts compute it: half precision would lose bits that a byte has.
        pixels = pixels if pixels.dtype == torch.float64 else pixels.float()
        low, high = torch.stack(torch.aminmax(pixels)).tolist()  # the only synchronization with a GPU
        if not (np.isfinite(low) and np.isfinite(high)):
            raise InputError(
                "The images hold NaN or infinity; expected finite numbers. Find the step at which the model "
                "or its sampler diverged."
            )
        least, most = VALUE_RANGES[self.declared]
        if self.to_bytes == "keep":
            pixels = pixels.float()
            if low < least or high > most:
                raise InputError(
                    f"The images hold values from {low:g} to {high:g}; expected {least:g} to {most:g}, as "
                    f"declared. If they only overshoot slightly, clip them with x.clamp({least:g}, {most:g})."
                )
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.declared == "0..1":
            pixels = pixels * 255
        elif self.declared == "-1..1":
            pixels = (pixels + 1) * 127.5
        if self.to_bytes == "round":
            pixels = pixels + 0.5
        if self.to_bytes != "keep":
            pixels = pixels.clamp(0, 255).to(torch.uint8)
        return _checked(pixels)

    def _integers(self, pixels: Tensor) -> Tensor:
        if pixels.dtype != torch.uint8 and len(pixels):
            low, high = (int(value) for value in torch.aminmax(pixels))
            if low < 0 or high > 255:
                raise InputError(f"The images hold integers from {low} to {high}; expected 0 to 255.")
        batch = _checked(pixels.to(torch.uint8))
        for image in batch if are_cut_floats(self.values) else ():
            self.values |= {*np.unique(image.cpu().numpy()).tolist()}
            if not are_cut_floats(self.values):
                break
        return batch

    def check(self, name: str) -> None:
        """Raise an InputError if all integers look like truncated floats."""
        problem = cut_floats_problem(name, self.values) if self.declared != "0..255" else None
        if problem is not None:
            raise InputError(problem)

    def notes(self) -> Iterator[str]:
        """What a reader of the scores should know about floats, one sentence each."""
        if self.declared is None or self.low > self.high:
            return
        least, most = VALUE_RANGES[self.declared]
        shown = f"[{least:g}, {most:g}]"
        if self.to_bytes == "keep":
            yield "The pixels are floats; they are used as they are, not rounded to 8 bits."
        else:
            yield (
                f"The images were floats, declared as {shown}: {_SCALES[self.declared]}, "
                f"{BYTE_RULES[self.to_bytes]}."
            )
        if self.low < least or self.high > most:
            yield (
                f"Values from {self.low:.3g} to {self.high:.3g} were declared as {shown} and clipped to this "
                "range. If this is more than a slight overshoot, the declaration is wrong, and so are the "
                "scores."
            )
        if self.declared == "-1..1" and self.low >= 0:
            yield "No value of the images is below 0, although their declared range is -1..1."
        if self.declared == "0..255" and self.high < DARK_BATCH:
            yield (
                f"No value of the images is above {self.high:.3g}, although their declared range is 0..255. "
                "If they are scaled to 0..1 or -1..1, the declaration is wrong, and so are the scores."
            )


class GivenImages(ImageSource):
    """Images that are not kept, except the first.

    Args:
        name: For messages.
        count: How many there were.
        first: (m, h, w, 3), the first images; m may be 0.
        labels: (n,), or None.
        notes: See :class:`ImageSource`.
    """

    def __init__(
        self,
        name: str,
        count: int,
        first: NDArray[Any],
        labels: NDArray[np.int64] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        _, height, width, _ = first.shape
        super().__init__(name, "given", count, (height, width, 3), first.dtype)
        self._first = first
        self.labels = labels
        self.notes = notes

    def _read(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        for begin in range(start, len(self._first), size):
            yield self._first[begin : begin + size].copy()


def labels_of(labels: object, count: int) -> NDArray[np.int64]:
    """(count,) int64 of labels, a tensor or array of integers.

    Raises:
        InputError: They are not one class for each image.
    """
    given = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if problem := labels_problem(count, "labels", given.shape, given.dtype):
        raise InputError(f"The labels do not fit the images: {problem}.")
    found: NDArray[np.int64] = given.astype(np.int64)
    return found


def _tensor(images: object) -> Tensor:
    if isinstance(images, Tensor):
        given = images.detach()
        # torch can do little with the wider unsigned types, not even compare them.
        if given.dtype in (torch.uint16, torch.uint32, torch.uint64):
            given = given.to(torch.int64)
    else:
        if not hasattr(images, "__array__"):
            raise InputError(
                f"update takes a tensor or an array of images, not a {type(images).__name__}. Stack a list "
                "of images with torch.stack or np.stack."
            )
        array = np.asarray(images)
        if array.dtype.kind not in "uif" or array.dtype.itemsize > 8:
            raise InputError(f"The images are {array.dtype}; expected uint8, or floats.")
        array = array.astype(array.dtype.newbyteorder("="), order="C", copy=False)
        if array.dtype.kind == "u" and array.dtype.itemsize > 1:
            array = array.astype(np.int64)
        # A copy where it is not writable, or has negative strides, which torch refuses.
        given = torch.from_numpy(
            array if array.flags.writeable and array.flags.c_contiguous else array.copy()
        )
    if given.dtype == torch.bool or given.is_complex():
        raise InputError(f"The images are {_kind(given)}; expected uint8, or floats.")
    return given


def _axes(images: Tensor, layout: Layout | None) -> tuple[int, int, int, int]:
    """The order of axes that turns them into NHWC."""
    shape = tuple(images.shape)
    if images.ndim != 4:
        raise InputError(
            f"Images of shape {shape}; expected four axes, (n, 3, height, width) or (n, height, width, 3)."
        )
    if layout is None:
        fitting = [each for each, axis in (("NCHW", 1), ("NHWC", 3)) if shape[axis] == 3]
        if len(fitting) == 2:
            raise InputError(
                f'Images of shape {shape}: either axis may be the channels. Give the evaluator layout="NCHW" '
                'or "NHWC".'
            )
        if not fitting:
            raise InputError(
                f"Images of shape {shape}; expected 3 channels, (n, 3, height, width) or (n, height, width, "
                "3). Repeat a grey channel three times; drop an opaque alpha channel."
            )
        found = fitting[0]
    else:
        found = layout
    axes = (0, 2, 3, 1) if found == "NCHW" else (0, 1, 2, 3)
    if shape[axes[3]] != 3 or min(shape[1:]) < 1:
        raise InputError(f"Images of shape {shape} are not {found} with 3 channels, as declared.")
    return axes


def numpy_dtype(images: Tensor) -> np.dtype[Any]:
    """NumPy's dtype of a tensor of images."""
    return np.dtype(_kind(images))


def _kind(images: Tensor) -> str:
    return str(images.dtype).removeprefix("torch.")


def _checked(pixels: Tensor) -> Tensor:
    if len(pixels):
        check_layout("<images>", tuple(pixels.shape), numpy_dtype(pixels))
    return pixels.contiguous()
