"""The 2015-12-05 Inception network in PyTorch, as the ADM reference evaluator runs it in TensorFlow.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (arXiv 1512.00567), in the
variant of the frozen graph ``classify_image_graph_def.pb``: average pools exclude their padding, the
pool branch of the last block is a maximum, batch norm has no scale and eps 1e-3.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import InputError
from evalkit.extractors.inception_weights import InceptionWeights, load_weights

__all__ = ["PRECISIONS", "Inception", "Precision", "prepare_forked_process", "resize_tf1", "resolve_device"]

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)

INPUT_SIZE = 299
BATCH_NORM_EPS = 1e-3
SPATIAL_CHANNELS = 7
# Named in the fingerprint: a change of the arithmetic before the network must change it.
PREPROCESSING = "TF1 bilinear 299x299, (x-128)/128"

STRIDED = {
    "Conv2d_1a_3x3",
    "Mixed_6a.branch3x3",
    "Mixed_6a.branch3x3dbl_3",
    "Mixed_7a.branch3x3_2",
    "Mixed_7a.branch7x7x3_4",
}
UNPADDED = STRIDED | {"Conv2d_2a_3x3", "Conv2d_4a_3x3"}


# Where this module was loaded, and torch with it.
_HOME_PROCESS = os.getpid()


def prepare_forked_process() -> None:
    """Let a process that was forked from one that computes do so too; nothing to do in any other.

    OpenMP's threads did not come along, and the first work that is given to them would wait for ever. One
    thread needs none of them.
    """
    if os.getpid() == _HOME_PROCESS or torch.get_num_threads() == 1:
        return
    torch.set_num_threads(1)
    warnings.warn(
        "This process was forked, and computes with one thread. Processes that are started with "
        "multiprocessing.get_context('spawn') use all.",
        stacklevel=3,
    )


def _check_not_forked(device: torch.device) -> None:
    """Raise an InputError for CUDA in a process whose parent has used it before the fork."""
    if device.type == "cuda" and torch.cuda._is_in_bad_fork():
        raise InputError(
            "This process was forked from one that uses CUDA, and cannot use it. Start processes with "
            "multiprocessing.get_context('spawn'), or give the device cpu."
        )


def resolve_device(device: str) -> torch.device:
    """``"auto"`` is a GPU if there is one, under torchrun that of this process, and else the CPU.

    Anything else is checked to be usable.

    Raises:
        InputError: The device is unknown or not present on this machine, or CUDA after a fork.
    """
    resolved = _resolve(device)
    _check_not_forked(resolved)
    return resolved


def _resolve(device: str) -> torch.device:
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if "LOCAL_RANK" not in os.environ:
            return torch.device("cuda")
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise InputError(f"Unknown device {device!r}. Give auto, cpu, cuda, cuda:N or mps.") from None
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (resolved.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if resolved.type not in present:
        raise InputError(f"Device {device!r} is not supported. Give auto, cpu, cuda, cuda:N or mps.")
    if not present[resolved.type]:
        raise InputError(f"Device {device!r} is not present on this machine. Use --device auto or cpu.")
    return resolved


def resize_tf1(images: Tensor, size: int = INPUT_SIZE) -> Tensor:
    """TensorFlow 1's bilinear resize: ``align_corners=False``, no half-pixel centres, no antialias.

    Source position ``i * in / out`` in float32, neighbours ``floor`` and ``floor + 1`` (clamped), columns
    interpolated before rows, as TensorFlow's ``ResizeBilinear`` kernel does.

    Args:
        images: (n, h, w, c), floating point.
        size: Side of the square output, pixels.

    Returns:
        (n, size, size, c), same dtype.
    """
    n, height, width, channels = images.shape
    # Gathering a table's columns is several times as fast as gathering runs of three numbers.
    rows = _interpolate(images.reshape(n * height, width * channels), size, channels)
    return _interpolate(rows.reshape(n, height, size * channels), size).reshape(n, size, size, channels)


def _interpolate(x: Tensor, size: int, lanes: int = 1) -> Tensor:
    """Resize axis 1 to `size` pixels of `lanes` numbers each."""
    extent = x.shape[1] // lanes
    if extent == size:
        return x
    position = np.arange(size, dtype=np.float32) * (np.float32(extent) / np.float32(size))
    lower = np.floor(position).astype(np.int64)
    near, far = (
        x.index_select(1, torch.from_numpy((index[:, None] * lanes + np.arange(lanes)).ravel()).to(x.device))
        for index in (lower, np.minimum(lower + 1, extent - 1))
    )
    weight = torch.from_numpy(np.repeat(position - lower.astype(np.float32), lanes)).to(x)
    return near.addcmul_(far.sub_(near), weight.reshape([-1] + [1] * (x.ndim - 2)))


class _Convolution:
    """Convolutions of one input, batch norm folded in, then ReLU if asked for; outputs joined along channels.

    On CPU it calls oneDNN's fused convolution + ReLU with weights laid out once, where torch exposes it:
    the same bits as ``conv2d(...).relu()``, up to 1.5 times the speed.
    """

    def __init__(
        self, weights: Mapping[str, NDArray[np.float32]], names: tuple[str, ...], like: Tensor, *, relu: bool
    ):
        kernels, biases = zip(*(self._fold(weights, name) for name in names), strict=True)
        kernel = torch.cat(kernels)
        self.stride = [2, 2] if names[0] in STRIDED else [1, 1]
        self.padding = [0, 0] if names[0] in UNPADDED else [side // 2 for side in kernel.shape[2:]]
        self.kernel = kernel.to(like).contiguous(memory_format=torch.channels_last)
        self.bias = torch.cat(biases).to(like)
        self.relu = relu
        self.packed: Tensor | None = None

    @staticmethod
    def _fold(weights: Mapping[str, NDArray[np.float32]], name: str) -> tuple[Tensor, Tensor]:
        kernel, beta, mean, variance = (
            torch.from_numpy(np.array(weights[f"{name}.{part}"], dtype=np.float64))
            for part in ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        )
        scale = torch.rsqrt(variance + BATCH_NORM_EPS)
        return kernel * scale[:, None, None, None], beta - mean * scale

    def pack(self, x: Tensor) -> None:
        """Lay the weights out for oneDNN, for inputs like ``x``; raises where torch has no such operator."""
        self.packed = torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
            self.kernel.to_mkldnn(), self.padding, self.stride, [1, 1], 1, list(x.shape)
        )

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._convolution_pointwise(  # type: ignore[no-any-return]
                x,
                self.packed,
                self.bias,
                self.padding,
                self.stride,
                [1, 1],
                1,
                "relu" if self.relu else "none",
                [],
                "",
            )
        x = F.conv2d(x, self.kernel, self.bias, self.stride, self.padding)
        return x.relu_() if self.relu else x


class _Network:
    """The network from 299x299 input in [-1, 1] to ``pool`` (n, 2048) and ``spatial`` (n, 2023)."""

    def __init__(self, weights: Mapping[str, NDArray[np.float32]], device: torch.device, dtype: torch.dtype):
        self._weights = weights
        self._like = torch.empty(0, device=device, dtype=dtype)
        self._convolutions: dict[tuple[str, ...], _Convolution] = {}
        self._fused = device.type == "cpu" and _has_fused_convolution(dtype)

    def _convolve(self, x: Tensor, *names: str, relu: bool = True) -> Tensor:
        if names not in self._convolutions:
            convolution = _Convolution(self._weights, names, self._like, relu=relu)
            if self._fused:
                convolution.pack(x)
            self._convolutions[names] = convolution
        return self._convolutions[names](x)

    def _chain(self, x: Tensor, block: str, *branches: str) -> Tensor:
        for branch in branches:
            x = self._convolve(x, f"{block}.{branch}")
        return x

    def _heads(self, x: Tensor, block: str, *branches: str) -> tuple[Tensor, ...]:
        """The 1x1 convolutions that read the same input, as one convolution."""
        joined = self._convolve(x, *(f"{block}.{branch}" for branch in branches))
        sizes = [len(self._weights[f"{block}.{branch}.bn.bias"]) for branch in branches]
        return torch.split(joined, sizes, dim=1)

    def _average_branch(self, x: Tensor, block: str) -> Tensor:
        """Average pool and 1x1 convolution, in the cheaper order: both are linear, and ReLU comes after."""
        x = self._convolve(x, f"{block}.branch_pool", relu=False)
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False).relu_()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.device.type == "cpu":
            # Its activations are the largest by far: an image a thread at a time stays in the caches.
            x = torch.cat([self._stem(images) for images in torch.split(x, torch.get_num_threads())])
        else:
            x = self._stem(x)
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self._block_35(x, block)
        x = self._reduce_to_17(x, "Mixed_6a")
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self._block_17(x, block)
            if block == "Mixed_6d":
                spatial = x[:, :SPATIAL_CHANNELS]
        x = self._reduce_to_8(x, "Mixed_7a")
        x = self._block_8(x, "Mixed_7b", self._average_branch(x, "Mixed_7b"))
        x = self._block_8(x, "Mixed_7c", self._chain(F.max_pool2d(x, 3, 1, 1), "Mixed_7c", "branch_pool"))
        # The reference flattens H, W, C; means and results are float32 whatever the network's precision.
        return x.float().mean((2, 3)), spatial.permute(0, 2, 3, 1).float().flatten(1)

    def _stem(self, x: Tensor) -> Tensor:
        x = self._convolve(x, "Conv2d_1a_3x3")
        x = self._convolve(x, "Conv2d_2a_3x3")
        x = self._convolve(x, "Conv2d_2b_3x3")
        x = _halve(x)
        x = self._convolve(x, "Conv2d_3b_1x1")
        x = self._convolve(x, "Conv2d_4a_3x3")
        return _halve(x)

    def _block_35(self, x: Tensor, block: str) -> Tensor:
        one, five, three = self._heads(x, block, "branch1x1", "branch5x5_1", "branch3x3dbl_1")
        five = self._chain(five, block, "branch5x5_2")
        three = self._chain(three, block, "branch3x3dbl_2", "branch3x3dbl_3")
        return torch.cat([one, five, three, self._average_branch(x, block)], 1)

    def _reduce_to_17(self, x: Tensor, block: str) -> Tensor:
        three = self._chain(x, block, "branch3x3")
        double = self._chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return torch.cat([three, double, _halve(x)], 1)

    def _block_17(self, x: Tensor, block: str) -> Tensor:
        one, seven, double = self._heads(x, block, "branch1x1", "branch7x7_1", "branch7x7dbl_1")
        seven = self._chain(seven, block, "branch7x7_2", "branch7x7_3")
        double = self._chain(double, block, *(f"branch7x7dbl_{step}" for step in (2, 3, 4, 5)))
        return torch.cat([one, seven, double, self._average_branch(x, block)], 1)

    def _reduce_to_8(self, x: Tensor, block: str) -> Tensor:
        three, seven = self._heads(x, block, "branch3x3_1", "branch7x7x3_1")
        three = self._chain(three, block, "branch3x3_2")
        seven = self._chain(seven, block, "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4")
        return torch.cat([three, seven, _halve(x)], 1)

    def _block_8(self, x: Tensor, block: str, pooled: Tensor) -> Tensor:
        one, three, double = self._heads(x, block, "branch1x1", "branch3x3_1", "branch3x3dbl_1")
        double = self._chain(double, block, "branch3x3dbl_2")
        split = [
            self._chain(branch, block, f"{name}{half}")
            for branch, name in ((three, "branch3x3_2"), (double, "branch3x3dbl_3"))
            for half in ("a", "b")
        ]
        return torch.cat([one, *split, pooled], 1)


def _halve(x: Tensor) -> Tensor:
    """``max_pool2d(x, 3, 2)`` of what a ReLU gave."""
    if x.device.type != "cpu":
        return F.max_pool2d(x, 3, 2)
    # Numbers that are not negative compare as their bits do: 3 times the speed of torch's pool in bfloat16,
    # which moreover keeps the places of the maxima, 8 bytes each.
    x, dtype = x.permute(0, 2, 3, 1), x.dtype
    x = x.view(torch.int32 if dtype == torch.float32 else torch.int16)
    for axis in (1, 2):
        first, second, third = (
            x.narrow(axis, k, x.shape[axis] - 2)[(slice(None),) * axis + (slice(None, None, 2),)]
            for k in range(3)
        )
        x = torch.maximum(first, second)
        torch.maximum(x, third, out=x)
    return x.view(dtype).permute(0, 3, 1, 2)


def _has_fused_convolution(dtype: torch.dtype) -> bool:
    """Whether oneDNN's fused convolution, an operator internal to torch, is there and gives conv + ReLU."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "conv.weight": (16, 16, 3, 3),
        "bn.bias": (16,),
        "bn.running_mean": (16,),
        "bn.running_var": (16,),
    }
    weights = {
        f"probe.{key}": torch.rand(shape, generator=generator).numpy() for key, shape in shapes.items()
    }
    x = torch.rand(2, 16, 8, 8, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    try:
        convolution = _Convolution(weights, ("probe",), x, relu=True)
        expected = convolution(x)
        convolution.pack(x)
        return torch.allclose(convolution(x).float(), expected.float(), rtol=1e-2, atol=1e-2)
    except (AttributeError, RuntimeError, TypeError):  # the operator is absent or has another signature
        return False


class Inception:
    """Pool and spatial features, and logits, of the 2015-12-05 Inception network.

    Args:
        weights: From :func:`evalkit.extractors.inception_weights.load_weights`; by default whatever it finds.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        precision: ``float32`` is the only one for parity with published numbers; ``tf32`` needs CUDA.
        batch_size: Images a forward pass; ``None`` chooses by device. It moves features by rounding only.

    Raises:
        InputError: Unknown device or precision, or one this machine does not have; batch size below 1.
        WeightsError: No weights, or not the genuine ones.
    """

    name: ClassVar[str] = "inception-2015-12-05"
    backend: ClassVar[str] = "torch"
    dimensions: ClassVar[Mapping[str, int]] = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS}

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
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise InputError(f"Batch size {batch_size!r}: expected a whole number from 1, or None.")
        self._device = resolve_device(device)
        if precision == "tf32" and self._device.type != "cuda":
            raise InputError(f"Precision tf32 exists on CUDA devices only, not on {self._device}.")
        self.weights = load_weights() if weights is None else weights
        self.device = str(self._device)
        self.precision = precision
        # On a CPU, activations of few images stay in its caches.
        self.batch_size = batch_size or (
            max(8, torch.get_num_threads()) if self._device.type == "cpu" else 128
        )

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides the features: weights, preprocessing, precision, backend."""
        parts = (self.name, self.backend, self.weights.digest, PREPROCESSING, self.precision)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def at_precision(self, precision: str) -> Inception:
        """The same network on the same device at another precision."""
        return Inception(self.weights, device=self.device, precision=precision, batch_size=self.batch_size)

    @cached_property
    def _network(self) -> _Network:
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.precision, torch.float32)
        return _Network(self.weights.convolutions, self._device, dtype)

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Features of a batch.

        Args:
            images: (n, h, w, 3), uint8 or float32, values in [0, 255].

        Returns:
            ``pool``: (n, 2048) float32. ``spatial``: (n, 2023) float32, flattened H, W, C.
        """
        prepare_forked_process()
        _check_not_forked(self._device)
        while True:
            try:
                parts = [
                    self._forward(images[begin : begin + self.batch_size])
                    for begin in range(0, len(images), self.batch_size)
                ]
                break
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size = (self.batch_size + 1) // 2
                torch.cuda.empty_cache()
                warnings.warn(
                    f"{self.device} is out of memory: going on with {self.batch_size} images a batch.",
                    stacklevel=2,
                )
        pool, spatial = (torch.cat(layer).cpu().numpy() for layer in zip(*parts, strict=True))
        return {"pool": pool, "spatial": spatial}

    @torch.inference_mode()
    def _forward(self, images: NDArray[Any]) -> tuple[Tensor, Tensor]:
        # uint8 crosses to the device as it is: a quarter of the bytes.
        x = torch.from_numpy(np.ascontiguousarray(images)).to(self._device).float()
        x = (resize_tf1(x) - 128).mul_(0.0078125)
        with _float32_arithmetic(tf32=self.precision == "tf32"):
            # An NHWC tensor seen as NCHW is channels-last: no copy.
            return self._network(x.permute(0, 3, 1, 2).to(self._network._like))

    @torch.inference_mode()
    def logits(self, pool: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """``pool @ W``, (n, 1008) float32, no bias, as the reference; None where the weights have no head."""
        if self.weights.head is None:
            return None
        with _float32_arithmetic(tf32=False):
            head = torch.from_numpy(np.array(self.weights.head)).to(self._device)
            blocks = [
                torch.from_numpy(block).to(self._device) @ head
                for block in np.array_split(pool, len(pool) // 8192 + 1)
            ]
            return torch.cat(blocks).cpu().numpy()


# The settings are those of the process: two threads would take turns in changing them under each other.
_ARITHMETIC = threading.RLock()


@contextlib.contextmanager
def _float32_arithmetic(*, tf32: bool) -> Iterator[None]:
    """Whether float32 arithmetic on CUDA may round to TF32, as torch lets convolutions do by default."""
    with _ARITHMETIC, _cuda_arithmetic(tf32):
        yield


@contextlib.contextmanager
def _cuda_arithmetic(tf32: bool) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = tf32
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            yield
    finally:
        matmul.allow_tf32 = before
