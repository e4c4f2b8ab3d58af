"""The layers of the 2015-12-05 Inception network, in PyTorch.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (arXiv 1512.00567), in the
variant of the frozen graph ``classify_image_graph_def.pb``: average pools exclude their padding, the
pool branch of the last block is a maximum, batch norm has no scale and eps 1e-3.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["INPUT_SIZE", "SPATIAL_CHANNELS", "Network"]

INPUT_SIZE = 299
"""Side of the square input, pixels."""

SPATIAL_CHANNELS = 7
"""Channels of the 17x17 layer that ``spatial`` takes."""

BATCH_NORM_EPS = 1e-3

STRIDED = {
    "Conv2d_1a_3x3",
    "Mixed_6a.branch3x3",
    "Mixed_6a.branch3x3dbl_3",
    "Mixed_7a.branch3x3_2",
    "Mixed_7a.branch7x7x3_4",
}
UNPADDED = STRIDED | {"Conv2d_2a_3x3", "Conv2d_4a_3x3"}


class _Convolution:
    """Convolutions that read the same input, their outputs joined along channels, then ReLU if requested.

    Batch norm is folded into the kernels in float64. After :meth:`pack` (CPU only) it calls oneDNN's fused
    convolution + ReLU: the same bits as ``conv2d(...).relu()``, up to 1.5 times the speed.
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
        """Lay the weights out for oneDNN, for inputs like ``x``.

        Raises:
            AttributeError, RuntimeError, TypeError: This version of torch has no such operator.
        """
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


class Network:
    """The network from resized and scaled images to ``pool`` and ``spatial``.

    Args:
        weights: As in :attr:`evalkit.extractors.weights.InceptionWeights.convolutions`.
        device: Where it runs.
        dtype: Of weights and activations.
        fused: Whether to use oneDNN's fused convolution; None uses it on a CPU where torch has it.
    """

    def __init__(
        self,
        weights: Mapping[str, NDArray[np.float32]],
        device: torch.device,
        dtype: torch.dtype,
        *,
        fused: bool | None = None,
    ):
        self._weights = weights
        self._like = torch.empty(0, device=device, dtype=dtype)
        self._convolutions: dict[tuple[str, ...], _Convolution] = {}
        self._fused = device.type == "cpu" and _has_fused_convolution(dtype) if fused is None else fused

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
        """Features of a batch.

        Args:
            x: (n, 3, 299, 299), floating point, in [-1, 1]; fastest where it is channels-last.

        Returns:
            ``pool`` (n, 2048) and ``spatial`` (n, 2023), both float32 whatever the network's dtype.
        """
        x = x.to(self._like)
        if x.device.type == "cpu":
            # The stem has the largest activations by far: one image per thread at a time stays in the caches.
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
        # The reference flattens H, W, C, and takes means in float32.
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
    """``max_pool2d(x, 3, 2)`` for ``x`` without negative values, such as the output of a ReLU."""
    if x.device.type != "cpu":
        return F.max_pool2d(x, 3, 2)
    # Non-negative floats are in the order of their bits, and integers compare faster: in bfloat16 3 times the
    # speed of torch's pool, which also stores the index of each maximum, 8 bytes each.
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
    """Whether torch has oneDNN's fused convolution, an internal operator, and it computes conv + ReLU."""
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
