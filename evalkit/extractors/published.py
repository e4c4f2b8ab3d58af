"""What networks with published weights have in common: these are found, read and run on batches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import InputError
from evalkit.extractors.base import Rows, WeightsState
from evalkit.extractors.bicubic import Resize, Statistics, scaled
from evalkit.extractors.sharing import read_once
from evalkit.extractors.staging import fetched
from evalkit.extractors.travel import Travels
from evalkit.extractors.vision_weights import Published, find_weights, read_weights, weights_state
from evalkit.system.devices import float32_arithmetic
from evalkit.system.engine import Pending
from evalkit.system.files import expand_user

__all__ = ["Layers", "PublishedNetwork", "Sizes"]


class Layers:
    """The layers of a network, on one device."""

    def __call__(self, x: Tensor) -> Tensor:
        """(n, 3, size, size) float32, scaled as the network was trained, to (n, features)."""
        raise NotImplementedError


class Sizes(Protocol):
    """The sizes of a network: a frozen dataclass."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by timm's names; by the first, files of this network are recognised."""

    def layers(self, weights: Mapping[str, Tensor], size: int, device: torch.device) -> Layers:
        """The layers for images of so many pixels a side; weights are float32, by timm's names."""


class PublishedNetwork(Travels):
    """Features of a network; subclasses say of which, and what is done to the images first.

    Args:
        weights: A file in any of the layouts of :mod:`evalkit.extractors.vision_weights`; by default what
            :func:`~evalkit.extractors.vision_weights.find_weights` finds.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        batch_size: Images per forward pass; ``None`` chooses by device. It changes features only by rounding.

    Raises:
        InputError: The device is unknown or this machine does not have it; the batch size is below 1.
        WeightsError: No weights were found, or they are of another network.

    Attributes:
        architecture: Its sizes.
        published: Where its weights are.
        input_size: Side of the images that the network sees, pixels.
        resize: Makes them this size, one of :mod:`evalkit.extractors.bicubic`.
        statistics: Of the pixels that the network was trained on.
    """

    network: ClassVar[str]
    name: ClassVar[str]
    preprocess: ClassVar[str]
    outputs: ClassVar[Mapping[str, int]]
    architecture: ClassVar[Sizes]
    published: ClassVar[Published]
    input_size: ClassVar[int] = 224
    resize: ClassVar[Resize]
    statistics: ClassVar[Statistics]
    backend: ClassVar[str] = "torch"
    precision: ClassVar[str] = "float32"
    derived: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self, weights: str | Path | None = None, *, device: str = "auto", batch_size: int | None = None
    ):
        super().__init__(device, batch_size)
        shapes = self.architecture.shapes
        file = find_weights(self.published, shapes) if weights is None else expand_user(weights)
        # Extractors of the same tensors share them, whatever they do with these.
        what = (self.published.name, *shapes.items())
        self._weights = read_once(file, what, lambda: read_weights(file, self.published, shapes))
        # On a CPU, small batches keep the activations in its caches.
        self.batch_size = batch_size or (8 if self._device.type == "cpu" else 128)

    @classmethod
    def weights_state(cls) -> WeightsState:
        """Where the weights are, see :class:`evalkit.extractors.base.HasWeights`."""
        return weights_state(cls.published)

    @property
    def weights_record(self) -> dict[str, Any]:
        """Source, layout and digest of the weights."""
        found = self._weights
        return {"source": found.source, "layout": found.layout, "digest": found.digest}

    @property
    def fingerprint(self) -> str:
        """Digest of everything that the features depend on: weights, preprocessing, precision, backend."""
        parts = (self.name, self.backend, self._weights.digest, self.preprocess, self.precision)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def prepared(self, images: NDArray[Any]) -> Tensor:
        """What the network sees of images: :attr:`preprocess`.

        Args:
            images: (n, h, w, 3), uint8 or float32, values in [0, 255].

        Returns:
            (n, 3, size, size), float32, on the device of the network.
        """
        resize = type(self).resize  # a function and no method
        return scaled(resize(images, self.input_size, self._device), self.statistics).to(self._device)

    @cached_property
    def _layers(self) -> Layers:
        architecture, size, weights = self.architecture, self.input_size, self._weights
        return self._shared(
            Layers,
            (architecture, size, weights.digest),
            lambda: architecture.layers(weights.tensors, size, self._device),
        )

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Features of a batch.

        Args:
            images: (n, h, w, 3), uint8 or float32, values in [0, 255].

        Returns:
            Rows of the one output, float32.
        """
        return dict(self.submit(images).result())

    def submit(self, images: NDArray[Any]) -> Pending[Mapping[str, Rows]]:
        """Start a batch, with arguments as for :meth:`__call__`; on CUDA, return before it is done."""
        (output,) = self.outputs
        return self._in_batches(images, lambda parts: fetched({output: torch.cat(parts)}))

    @torch.inference_mode()
    def _forward(self, images: NDArray[Any]) -> Tensor:
        with float32_arithmetic():
            return self._layers(self.prepared(images))

    def derive(self, output: str, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """There are no derived outputs."""
        del rows
        raise InputError(f"{self.network} has no output {output!r}. It has {', '.join(self.outputs)}.")
