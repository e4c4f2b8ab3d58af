"""ConvNeXt V2 in PyTorch.

Woo et al., "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders" (arXiv 2301.00808); the
features are the mean of the last stage over space, before the norm of the classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evalkit.extractors.published import Layers

__all__ = ["ConvNeXtLayers", "ConvNeXtSizes"]

PATCH = 4
"""Side of the patches of the stem, pixels."""

KERNEL = 7
EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class ConvNeXtSizes:
    """The sizes of a network.

    Attributes:
        widths: Channels of each stage.
        depths: Blocks of each stage.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]

    @property
    def features(self) -> int:
        """Width of the features."""
        return self.widths[-1]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by timm's names."""
        found: dict[str, tuple[int, ...]] = {"stem.0.weight": (self.widths[0], 3, PATCH, PATCH)}
        biased: dict[str, tuple[int, ...]] = {"stem.1": (self.widths[0],)}
        before = self.widths[0]
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            if stage:
                biased[f"stages.{stage}.downsample.0"] = (before,)
                biased[f"stages.{stage}.downsample.1"] = (width, before, 2, 2)
            for block in (f"stages.{stage}.blocks.{number}" for number in range(depth)):
                biased |= {
                    f"{block}.conv_dw": (width, 1, KERNEL, KERNEL),
                    f"{block}.norm": (width,),
                    f"{block}.mlp.fc1": (4 * width, width),
                    f"{block}.mlp.grn": (4 * width,),
                    f"{block}.mlp.fc2": (width, 4 * width),
                }
            before = width
        found["stem.0.bias"] = (self.widths[0],)
        for name, shape in biased.items():
            found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        return found

    def layers(self, weights: Mapping[str, Tensor], size: int, device: torch.device) -> ConvNeXtLayers:
        """See :class:`~evalkit.extractors.published.Sizes`; any size will do."""
        del size
        return ConvNeXtLayers(self, weights, device)


class ConvNeXtLayers(Layers):
    """The layers of a network, on one device: images to the mean of the last stage.

    Args:
        sizes: Its sizes.
        weights: float32, by timm's names.
        device: Where it runs.
    """

    def __init__(self, sizes: ConvNeXtSizes, weights: Mapping[str, Tensor], device: torch.device):
        self._depths = sizes.depths
        self._weights = {name: tensor.to(device) for name, tensor in weights.items()}

    def __call__(self, x: Tensor) -> Tensor:
        """(n, 3, size, size) float32, scaled as the network was trained, to (n, features)."""
        # Channels come last between the convolutions, for the norms and the linear layers.
        x = self._norm(self._convolve(x, "stem.0", PATCH), "stem.1")
        for stage, depth in enumerate(self._depths):
            if stage:
                x = self._norm(x, f"stages.{stage}.downsample.0").permute(0, 3, 1, 2)
                x = self._convolve(x, f"stages.{stage}.downsample.1", 2)
            for number in range(depth):
                x = self._block(x, f"stages.{stage}.blocks.{number}")
        return x.mean((1, 2))

    def _block(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._both(f"{name}.conv_dw")
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=KERNEL // 2, groups=len(weight))
        y = self._norm(y.permute(0, 2, 3, 1), f"{name}.norm")
        y = F.gelu(F.linear(y, *self._both(f"{name}.mlp.fc1")))
        y = self._response_norm(y, f"{name}.mlp.grn")
        return x + F.linear(y, *self._both(f"{name}.mlp.fc2"))

    def _response_norm(self, x: Tensor, name: str) -> Tensor:
        """Global response normalization (section 3.2): channels compete by their norms over space."""
        weight, bias = self._both(name)
        norms = x.square().sum((1, 2), keepdim=True).sqrt()
        return x + weight * (x * (norms / (norms.mean(-1, keepdim=True) + EPSILON))) + bias

    def _convolve(self, x: Tensor, name: str, stride: int) -> Tensor:
        return F.conv2d(x, *self._both(name), stride=stride).permute(0, 2, 3, 1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self._both(name), EPSILON)

    def _both(self, name: str) -> tuple[Tensor, Tensor]:
        return self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
