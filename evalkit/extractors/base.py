"""What an extractor is: a network that turns images into features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from evalkit.system.engine import Pending

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Extractor", "HasWeights", "ReducedPrecision", "Rows", "RunsAhead", "TakesTensors", "WeightsState"]

Rows: TypeAlias = NDArray[np.float32]
"""(n, d) float32, one row an image."""


@runtime_checkable
class Extractor(Protocol):
    """A network that turns images into features. It resizes and scales the images itself.

    Attributes:
        network: Name of its row in :data:`evalkit.extractors.EXTRACTORS`. Metrics name outputs by it:
            ``"inception:pool"``. Variants of one network, such as another backend, share it.
        name: What a report calls it.
        fingerprint: Hex digest of everything that decides the features: weights, preprocessing, precision,
            backend. Features of different fingerprints are never compared.
        preprocess: What is done to the images before the network sees them, in words.
        outputs: Width of each output that is computed from images, ``{"pool": 2048}``. The first is the one
            that metrics use by default.
        derived: Outputs that are computed from rows of another output, not from images:
            ``{"logits": "pool"}``.
        batch_size: Preferred batch size.
    """

    @property
    def network(self) -> str: ...  # noqa: D102 - described above
    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102
    @property
    def preprocess(self) -> str: ...  # noqa: D102
    @property
    def outputs(self) -> Mapping[str, int]: ...  # noqa: D102
    @property
    def derived(self) -> Mapping[str, str]: ...  # noqa: D102
    @property
    def batch_size(self) -> int: ...  # noqa: D102

    def __call__(self, images: NDArray[Any], /) -> Mapping[str, Rows]:
        """(n, h, w, 3), uint8 or float32 in [0, 255], to the rows of every output."""

    def derive(self, output: str, rows: Rows, /) -> Rows:
        """Rows of a derived output from those of the output that :attr:`derived` names.

        Raises:
            UndefinedMetricError: These weights do not have it; the message says what to do.
        """


@runtime_checkable
class ReducedPrecision(Protocol):
    """An extractor that can run in several precisions; ``float32`` is the one for published numbers."""

    @property
    def precision(self) -> str: ...  # noqa: D102 - described above

    def at_precision(self, precision: str, /) -> Extractor:
        """The same network on the same device at another precision."""


@runtime_checkable
class RunsAhead(Protocol):
    """An extractor that takes the next batch before the features of the last are there, as a GPU can."""

    def submit(self, images: NDArray[Any], /) -> Pending[Mapping[str, Rows]]:
        """Begin a batch. The images are copied, or done with, when this returns."""


@runtime_checkable
class TakesTensors(Protocol):
    """An extractor that also accepts images that are already on its GPU.

    Attributes:
        tensor_device: The device of these tensors; None if only arrays are accepted.
    """

    @property
    def tensor_device(self) -> torch.device | None: ...  # noqa: D102 - described above

    def submit_tensor(self, images: Tensor, /) -> Pending[Mapping[str, Rows]]:
        """As ``submit``. Afterwards, work on the same stream may modify the images."""


@dataclass(frozen=True, kw_only=True)
class WeightsState:
    """Whether the weights of a network are on this machine, as `evalkit doctor` shows it.

    Attributes:
        usable: Whether the network would take what is there; None where nothing is there.
        detail: Where they are and how far they were checked, or what is wrong.
        remedy: The command that brings them, or what is lacking of them; empty where nothing is.
    """

    usable: bool | None
    detail: str
    remedy: str = ""


@runtime_checkable
class HasWeights(Protocol):
    """A class of extractors that can tell where its weights are, without a download."""

    @classmethod
    def weights_state(cls) -> WeightsState:
        """Look for the weights where the network would, and check as much of them as is quick."""
