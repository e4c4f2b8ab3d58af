"""The 2015-12-05 Inception network in PyTorch, as the ADM reference evaluator runs it in TensorFlow."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import InputError, UndefinedMetricError, listing
from evalkit.extractors.base import Rows, WeightsState
from evalkit.extractors.inception_network import INPUT_SIZE, SPATIAL_CHANNELS, Network
from evalkit.extractors.preprocess import scaled_input
from evalkit.extractors.staging import Upload, fetched
from evalkit.extractors.travel import Travels
from evalkit.extractors.weights import InceptionWeights, describe_weights, load_weights
from evalkit.system.devices import check_not_forked, float32_arithmetic
from evalkit.system.engine import Pending

__all__ = ["HEAD_MISSING", "PRECISIONS", "Inception", "Precision", "weights_record"]

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
HEAD_MISSING = "the weights have no classifier head; this fetches it: evalkit weights --fetch"


class Inception(Travels):
    """Pool and spatial features, and logits, of the 2015-12-05 Inception network.

    Args:
        weights: From :func:`evalkit.extractors.weights.load_weights`; by default whatever it finds.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        precision: ``float32`` is the only one for parity with published numbers; ``tf32`` needs CUDA.
        batch_size: Images per forward pass; ``None`` chooses by device. It changes features only by rounding.

    Raises:
        InputError: The device or precision is unknown or this machine does not have it; the batch size is
            below 1.
        WeightsError: No weights were found, or they are not the published ones.
    """

    network: ClassVar[str] = "inception"
    name: ClassVar[str] = "inception-2015-12-05"
    backend: ClassVar[str] = "torch"
    preprocess: ClassVar[str] = "TF1 bilinear 299x299, (x-128)/128"
    outputs: ClassVar[Mapping[str, int]] = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS}
    derived: ClassVar[Mapping[str, str]] = {"logits": "pool"}

    def __init__(
        self,
        weights: InceptionWeights | None = None,
        *,
        device: str = "auto",
        precision: str = "float32",
        batch_size: int | None = None,
    ):
        if precision not in PRECISIONS:
            raise InputError(f"Unknown precision {precision!r}. Give one of {', '.join(PRECISIONS)}.")
        if weights is not None and not isinstance(weights, InceptionWeights):
            raise InputError(f"weights={weights!r}: expected evalkit.load_weights(file), or None.")
        super().__init__(device, batch_size)
        if precision == "tf32" and self._device.type != "cuda":
            raise InputError(f"Precision tf32 needs a CUDA device, and this is {self._device}. Give float32.")
        self.weights = load_weights() if weights is None else weights
        self.precision = precision
        # On a CPU, small batches keep the activations in its caches.
        sizes = {"cpu": max(8, torch.get_num_threads()), "cuda": 256}
        self.batch_size = batch_size or sizes.get(self._device.type, 128)

    @classmethod
    def weights_state(cls) -> WeightsState:
        """Where the weights are, see :class:`evalkit.extractors.base.HasWeights`."""
        rows, bring = describe_weights(), "evalkit weights --fetch"
        used = next((row for row in rows if row.used), None)
        if used is None:
            tried = listing(dict.fromkeys(row.place for row in rows))
            return WeightsState(usable=None, detail=f"nothing found ({tried})", remedy=bring)
        if used.weights is None or not used.weights.genuine:
            problem = used.problem or f"{used.path}: not the published weights"
            return WeightsState(usable=False, detail=problem, remedy=bring)
        if used.weights.head is None:
            detail = f"{used.path}, genuine; no classifier head, which the Inception Score needs"
            return WeightsState(usable=True, detail=detail, remedy=bring)
        return WeightsState(usable=True, detail=f"{used.path}, genuine, with classifier head")

    @property
    def weights_record(self) -> dict[str, Any]:
        """Source and digests of the weights."""
        return weights_record(self.weights)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that the features depend on: weights, preprocessing, precision, backend."""
        parts = (self.name, self.backend, self.weights.digest, self.preprocess, self.precision)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def at_precision(self, precision: str) -> Inception:
        """The same network on the same device at another precision."""
        return type(self)(self.weights, device=self.device, precision=precision, batch_size=self.batch_size)

    @cached_property
    def _layers(self) -> Network:
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.precision, torch.float32)
        weights = self.weights
        return self._shared(
            Network, (weights.digest, dtype), lambda: Network(weights.convolutions, self._device, dtype)
        )

    @cached_property
    def _upload(self) -> Upload:
        return Upload(self._device)

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Features of a batch.

        Args:
            images: (n, h, w, 3), uint8 or float32, values in [0, 255].

        Returns:
            ``pool``: (n, 2048) float32. ``spatial``: (n, 2023) float32, flattened H, W, C.
        """
        return dict(self.submit(images).result())

    def submit(self, images: NDArray[Any]) -> Pending[Mapping[str, Rows]]:
        """Begin a batch, as :meth:`__call__` takes it; only on CUDA does this return before it is done."""
        return self._in_batches(images, self._copied)

    @property
    def tensor_device(self) -> torch.device | None:
        """The GPU whose tensors :meth:`submit_tensor` accepts."""
        if self._device.type != "cuda":
            return None
        check_not_forked(self._device)
        index = self._device.index
        return torch.device("cuda", torch.cuda.current_device() if index is None else index)

    def submit_tensor(self, images: Tensor) -> Pending[Mapping[str, Rows]]:
        """As :meth:`submit`, for images that are on the device."""
        return self._in_batches(images, self._copied)

    def _copied(self, parts: list[tuple[Tensor, Tensor]]) -> Pending[Mapping[str, Rows]]:
        pool, spatial = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        return fetched({"pool": pool, "spatial": spatial})

    @torch.inference_mode()
    def _forward(self, images: NDArray[Any] | Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(images, Tensor):
            return self._network(images)
        # Converted on the device: uint8 is a quarter of the bytes to copy there.
        images = np.ascontiguousarray(images)
        if self._device.type == "cuda":
            return self._upload(images, self._network)
        return self._network(torch.from_numpy(images).to(self._device))

    def _network(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with float32_arithmetic(tf32=self.precision == "tf32"):
            layers = self._layers
            return layers(self.prepared(images, layers.dtype))

    @staticmethod
    def prepared(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the network sees of images: :attr:`preprocess`.

        Args:
            images: (n, h, w, 3), uint8 or float32, values in [0, 255].
            dtype: Of the result. It is computed in float32.

        Returns:
            (n, 3, 299, 299), about [-1, 1].
        """
        return scaled_input(images, INPUT_SIZE, dtype)

    @torch.inference_mode()
    def derive(self, output: str, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """``logits``: class scores ``pool @ W`` without bias, as in the reference evaluator.

        Args:
            output: ``"logits"``.
            rows: (n, 2048) float32 ``pool``.

        Returns:
            (n, 1008) float32.

        Raises:
            UndefinedMetricError: The weights have no classifier head.
        """
        del output
        if self.weights.head is None:
            raise UndefinedMetricError(HEAD_MISSING)
        with float32_arithmetic():
            head = torch.from_numpy(np.array(self.weights.head)).to(self._device)
            blocks = [
                torch.from_numpy(block).to(self._device) @ head
                for block in np.array_split(rows, len(rows) // 8192 + 1)
            ]
            return torch.cat(blocks).cpu().numpy()


def weights_record(weights: InceptionWeights) -> dict[str, Any]:
    """What a comparison records of Inception weights."""
    return {
        "source": weights.source,
        "container": weights.container,
        "digest": weights.digest,
        "genuine": weights.genuine,
        "head_digest": weights.head_digest,
        "head_genuine": weights.head_genuine,
    }
