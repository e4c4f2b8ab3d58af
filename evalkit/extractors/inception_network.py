"""The layers of the 2015-12-05 Inception network, in PyTorch.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (arXiv 1512.00567), in the
variant of the frozen graph ``classify_image_graph_def.pb``: average pools exclude their padding, the
pool branch of the last block is a maximum, batch norm has no scale and eps 1e-3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from evalkit.system.devices import has_triton

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

    Args:
        weights: Of the network.
        names: Of the convolutions.
        like: A tensor of the device and type to compute in.
        relu: Whether ReLU follows.
        triton: Whether bias and ReLU are one pass of a Triton kernel, which writes where the next layer
            reads, so that no copies split or join.
    """

    def __init__(
        self,
        weights: Mapping[str, NDArray[np.float32]],
        names: tuple[str, ...],
        like: Tensor,
        *,
        relu: bool,
        triton: bool = False,
    ):
        kernels, biases = zip(*(self._fold(weights, name) for name in names), strict=True)
        kernel = torch.cat(kernels)
        self.triton = triton
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

    def without_bias(self, x: Tensor) -> Tensor:
        """The convolution alone."""
        return F.conv2d(x, self.kernel, None, self.stride, self.padding)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The result; with Triton's kernels, in ``out`` where it is given."""
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
        if self.relu and self.triton:
            from evalkit.extractors.inception_kernels import add_bias_relu

            x = self.without_bias(x)
            return add_bias_relu(x, self.bias, x if out is None else out)
        x = F.conv2d(x, self.kernel, self.bias, self.stride, self.padding)
        return x.relu_() if self.relu else x


class Network:
    """The network from resized and scaled images to ``pool`` and ``spatial``.

    Args:
        weights: As in :attr:`evalkit.extractors.weights.InceptionWeights.convolutions`.
        device: Where it runs.
        dtype: Of weights and activations.
        fused: Whether to use oneDNN's fused convolution; None uses it on a CPU where torch has it.
        triton: Whether to use the kernels of :mod:`evalkit.extractors.inception_kernels`; None uses them on
            CUDA where Triton is installed.
    """

    def __init__(
        self,
        weights: Mapping[str, NDArray[np.float32]],
        device: torch.device,
        dtype: torch.dtype,
        *,
        fused: bool | None = None,
        triton: bool | None = None,
    ):
        self.device, self.dtype = device, dtype
        self._weights = weights
        self._like = torch.empty(0, device=device, dtype=dtype)
        self._convolutions: dict[tuple[str, ...], _Convolution] = {}
        self._fused = device.type == "cpu" and _has_fused_convolution(dtype) if fused is None else fused
        self._triton = has_triton(device) if triton is None else triton

    def _convolution(self, x: Tensor, *names: str, relu: bool = True) -> _Convolution:
        if names not in self._convolutions:
            convolution = _Convolution(self._weights, names, self._like, relu=relu, triton=self._triton)
            if self._fused:
                convolution.pack(x)
            self._convolutions[names] = convolution
        return self._convolutions[names]

    def _convolve(self, x: Tensor, name: str, out: Tensor | None = None) -> Tensor:
        return self._convolution(x, name)(x, out)

    def _chain(self, x: Tensor, block: str, *branches: str, out: Tensor | None = None) -> Tensor:
        *first, last = branches
        for branch in first:
            x = self._convolve(x, f"{block}.{branch}")
        return self._convolve(x, f"{block}.{last}", out)

    def _heads(self, x: Tensor, block: str, *branches: str, out: Tensor | None = None) -> list[Tensor]:
        """The 1x1 convolutions that read the same input, as one convolution; the first of them in `out`."""
        convolution = self._convolution(x, *(f"{block}.{branch}" for branch in branches))
        sizes = [self._width(block, branch) for branch in branches]
        if not self._triton:
            return list(torch.split(convolution(x), sizes, dim=1))
        from evalkit.extractors.inception_kernels import add_bias_relu

        parts = torch.split(convolution.without_bias(x), sizes, dim=1)
        biases = torch.split(convolution.bias, sizes)
        outs = [out, *[None] * (len(sizes) - 1)]
        return [
            add_bias_relu(
                part, bias, torch.empty_like(part, memory_format=torch.channels_last) if to is None else to
            )
            for part, bias, to in zip(parts, biases, outs, strict=True)
        ]

    def _average_branch(self, x: Tensor, block: str, out: Tensor | None = None) -> Tensor:
        """Average pool and 1x1 convolution, in the cheaper order: both are linear, and ReLU comes after."""
        convolution = self._convolution(x, f"{block}.branch_pool", relu=False)
        if out is not None:
            from evalkit.extractors.inception_kernels import average_3x3

            return average_3x3(convolution.without_bias(x), convolution.bias, out)
        return F.avg_pool2d(convolution(x), 3, 1, 1, count_include_pad=False).relu_()

    def _halve(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``max_pool2d(x, 3, 2)`` for ``x`` without negative values, such as the output of a ReLU."""
        if not self._triton:
            return _halve_on_cpu(x) if x.device.type == "cpu" else F.max_pool2d(x, 3, 2)
        from evalkit.extractors.inception_kernels import maximum_3x3

        return maximum_3x3(x, self._empty(x, x.shape[1], 2) if out is None else out)

    def _width(self, block: str, branch: str) -> int:
        return len(self._weights[f"{block}.{branch}.bn.bias"])

    def _empty(self, x: Tensor, channels: int, stride: int = 1) -> Tensor:
        """Memory for the result of a layer that reads `x`; its windows of 3x3 are padded unless strided."""
        height, width = (side if stride == 1 else (side - 3) // stride + 1 for side in x.shape[2:])
        return torch.empty(
            (len(x), channels, height, width),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )

    def _parts(self, x: Tensor, *channels: int, stride: int = 1) -> tuple[Tensor | None, Any]:
        """Memory for a block's result, and the channels of it for each branch; None where they are joined."""
        if not self._triton:
            return None, [None] * len(channels)
        whole = self._empty(x, sum(channels), stride)
        return whole, torch.split(whole, list(channels), dim=1)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features of a batch.

        Args:
            x: (n, 3, 299, 299) of :attr:`dtype`, in [-1, 1]; fastest where it is channels-last.

        Returns:
            ``pool`` (n, 2048) and ``spatial`` (n, 2023), both float32 whatever the network's dtype.
        """
        if x.device.type == "cpu":
            # The stem has the largest activations by far: one image per thread at a time stays in the caches.
            x = torch.cat([self._stem(images) for images in torch.split(x, torch.get_num_threads())])
        else:
            x = self._stem(x.contiguous(memory_format=torch.channels_last))
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self._block_35(x, block)
        x = self._reduce_to_17(x, "Mixed_6a")
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self._block_17(x, block)
            if block == "Mixed_6d":
                spatial = x[:, :SPATIAL_CHANNELS]
        x = self._reduce_to_8(x, "Mixed_7a")
        x = self._block_8(x, "Mixed_7b")
        x = self._block_8(x, "Mixed_7c")
        # The reference flattens H, W, C, and takes means in float32.
        return x.float().mean((2, 3)), spatial.permute(0, 2, 3, 1).float().flatten(1)

    def _stem(self, x: Tensor) -> Tensor:
        x = self._convolve(x, "Conv2d_1a_3x3")
        x = self._convolve(x, "Conv2d_2a_3x3")
        x = self._convolve(x, "Conv2d_2b_3x3")
        x = self._halve(x)
        x = self._convolve(x, "Conv2d_3b_1x1")
        x = self._convolve(x, "Conv2d_4a_3x3")
        return self._halve(x)

    def _block_35(self, x: Tensor, block: str) -> Tensor:
        ends = ("branch1x1", "branch5x5_2", "branch3x3dbl_3", "branch_pool")
        whole, (to_one, to_five, to_three, to_pool) = self._parts(x, *(self._width(block, b) for b in ends))
        one, five, three = self._heads(x, block, "branch1x1", "branch5x5_1", "branch3x3dbl_1", out=to_one)
        five = self._chain(five, block, "branch5x5_2", out=to_five)
        three = self._chain(three, block, "branch3x3dbl_2", "branch3x3dbl_3", out=to_three)
        pooled = self._average_branch(x, block, to_pool)
        return torch.cat([one, five, three, pooled], 1) if whole is None else whole

    def _reduce_to_17(self, x: Tensor, block: str) -> Tensor:
        widths = self._width(block, "branch3x3"), self._width(block, "branch3x3dbl_3"), x.shape[1]
        whole, (to_three, to_double, to_pool) = self._parts(x, *widths, stride=2)
        three = self._chain(x, block, "branch3x3", out=to_three)
        steps = (f"branch3x3dbl_{step}" for step in (1, 2, 3))
        double = self._chain(x, block, *steps, out=to_double)
        pooled = self._halve(x, to_pool)
        return torch.cat([three, double, pooled], 1) if whole is None else whole

    def _block_17(self, x: Tensor, block: str) -> Tensor:
        ends = ("branch1x1", "branch7x7_3", "branch7x7dbl_5", "branch_pool")
        whole, (to_one, to_seven, to_double, to_pool) = self._parts(x, *(self._width(block, b) for b in ends))
        one, seven, double = self._heads(x, block, "branch1x1", "branch7x7_1", "branch7x7dbl_1", out=to_one)
        seven = self._chain(seven, block, "branch7x7_2", "branch7x7_3", out=to_seven)
        steps = (f"branch7x7dbl_{step}" for step in (2, 3, 4, 5))
        double = self._chain(double, block, *steps, out=to_double)
        pooled = self._average_branch(x, block, to_pool)
        return torch.cat([one, seven, double, pooled], 1) if whole is None else whole

    def _reduce_to_8(self, x: Tensor, block: str) -> Tensor:
        widths = self._width(block, "branch3x3_2"), self._width(block, "branch7x7x3_4"), x.shape[1]
        whole, (to_three, to_seven, to_pool) = self._parts(x, *widths, stride=2)
        three, seven = self._heads(x, block, "branch3x3_1", "branch7x7x3_1")
        three = self._chain(three, block, "branch3x3_2", out=to_three)
        seven = self._chain(seven, block, *(f"branch7x7x3_{step}" for step in (2, 3, 4)), out=to_seven)
        pooled = self._halve(x, to_pool)
        return torch.cat([three, seven, pooled], 1) if whole is None else whole

    def _block_8(self, x: Tensor, block: str) -> Tensor:
        halves = ("branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b")
        ends = ("branch1x1", *halves, "branch_pool")
        whole, (to_one, *to_halves, to_pool) = self._parts(x, *(self._width(block, b) for b in ends))
        if block == "Mixed_7b":
            pooled = self._average_branch(x, block, to_pool)
        else:
            pooled = self._chain(F.max_pool2d(x, 3, 1, 1), block, "branch_pool", out=to_pool)
        one, three, double = self._heads(x, block, "branch1x1", "branch3x3_1", "branch3x3dbl_1", out=to_one)
        double = self._chain(double, block, "branch3x3dbl_2")
        split = [
            self._chain(branch, block, half, out=to)
            for branch, half, to in zip((three, three, double, double), halves, to_halves, strict=True)
        ]
        return torch.cat([one, *split, pooled], 1) if whole is None else whole


def _halve_on_cpu(x: Tensor) -> Tensor:
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
        f"probe.{key}": torch.rand(shape, generator=generator, device="cpu").numpy()
        for key, shape in shapes.items()
    }
    x = torch.rand(2, 16, 8, 8, generator=generator, device="cpu").to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    try:
        convolution = _Convolution(weights, ("probe",), x, relu=True)
        expected = convolution(x)
        convolution.pack(x)
        return torch.allclose(convolution(x).float(), expected.float(), rtol=1e-2, atol=1e-2)
    except (AttributeError, RuntimeError, TypeError):  # the operator is absent or has another signature
        return False
