"""Vision transformers in PyTorch, as DINOv2 and CLIP use them.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929), equations 1 to 4, with what DINOv2
(arXiv 2304.07193) and CLIP (arXiv 2103.00020) change.

Why not transformers or timm: each reads one of the three ways in which weights are published, and each
interpolates DINOv2's positions in a way of its own, other than that of the code behind published numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import InputError
from evalkit.extractors.base import WeightsState
from evalkit.extractors.bicubic import Resize, Statistics, scaled
from evalkit.extractors.sharing import read_once
from evalkit.extractors.travel import Travels
from evalkit.extractors.vision_weights import Published, find_weights, read_weights, weights_state
from evalkit.system.devices import float32_arithmetic
from evalkit.system.files import expand_user

__all__ = ["Architecture", "ClassToken", "VisionTransformer"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of a network.

    Attributes:
        width: Numbers in a token.
        depth: Blocks.
        heads: Of each attention.
        patch: Side of a patch, pixels.
        grid: Patches along a side for which the network was trained.
        projection: Width of CLIP's embedding. None is DINOv2: no norm before the blocks and no projection
            after them, a factor for each channel of each branch, the exact GELU, another epsilon.
    """

    width: int
    depth: int
    heads: int
    patch: int
    grid: int
    projection: int | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by timm's names."""
        width = self.width
        found: dict[str, tuple[int, ...]] = {
            "cls_token": (width,),
            "pos_embed": (1 + self.grid**2, width),
            "patch_embed.proj.weight": (width, 3, self.patch, self.patch),
        }
        norms = ["norm"]
        linear: dict[str, tuple[int, int]] = {}
        for block in (f"blocks.{number}" for number in range(self.depth)):
            norms += [f"{block}.norm1", f"{block}.norm2"]
            linear |= {
                f"{block}.attn.qkv": (3 * width, width),
                f"{block}.attn.proj": (width, width),
                f"{block}.mlp.fc1": (4 * width, width),
                f"{block}.mlp.fc2": (width, 4 * width),
            }
            if self.projection is None:
                found |= {f"{block}.ls1.gamma": (width,), f"{block}.ls2.gamma": (width,)}
        if self.projection is None:
            found["patch_embed.proj.bias"] = (width,)
        else:
            norms.append("norm_pre")
            found["head.weight"] = (self.projection, width)
        for name in norms:
            found |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
        for name, shape in linear.items():
            found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        return found


class ClassToken:
    """The layers of a network, on one device: images to the class token after the last norm.

    Args:
        architecture: Its sizes.
        weights: float32, by timm's names.
        size: Side of the images, pixels.
        device: Where it runs.
    """

    def __init__(
        self, architecture: Architecture, weights: Mapping[str, Tensor], size: int, device: torch.device
    ):
        self._architecture = architecture
        self._is_clip = architecture.projection is not None
        positions = _positions(weights["pos_embed"], architecture.grid, size // architecture.patch)
        tensors = {**weights, "pos_embed": positions}
        self._weights = {name: tensor.to(device) for name, tensor in tensors.items()}

    def __call__(self, x: Tensor) -> Tensor:
        """(n, 3, size, size) float32, scaled as the network was trained, to (n, width or projection)."""
        weights = self._weights
        x = F.conv2d(
            x,
            weights["patch_embed.proj.weight"],
            weights.get("patch_embed.proj.bias"),
            stride=self._architecture.patch,
        )
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([weights["cls_token"].expand(len(x), 1, -1), x], 1) + weights["pos_embed"]
        if self._is_clip:
            x = self._norm(x, "norm_pre")
        for number in range(self._architecture.depth):
            x = self._block(x, f"blocks.{number}")
        x = self._norm(x[:, 0], "norm")
        return F.linear(x, weights["head.weight"]) if self._is_clip else x

    def _block(self, x: Tensor, name: str) -> Tensor:
        y = self._linear(self._norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        n, tokens, _ = y.shape
        query, key, value = y.reshape(n, tokens, 3, self._architecture.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        x = x + self._scaled(self._linear(y, f"{name}.attn.proj"), f"{name}.ls1")
        y = self._linear(self._norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        # CLIP's GELU is an approximation.
        y = y * torch.sigmoid(1.702 * y) if self._is_clip else F.gelu(y)
        return x + self._scaled(self._linear(y, f"{name}.mlp.fc2"), f"{name}.ls2")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = (self._weights[f"{name}.{part}"] for part in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5 if self._is_clip else 1e-6)

    def _scaled(self, x: Tensor, name: str) -> Tensor:
        return x if self._is_clip else x * self._weights[f"{name}.gamma"]


def _positions(trained: Tensor, grid: int, wanted: int) -> Tensor:
    """The position of each token where the image has another number of patches than in training.

    As ``interpolate_pos_encoding`` in DINOv2's own ``vision_transformer.py``: with a scale that is off by 0.1
    patches. timm and transformers scale otherwise.

    Args:
        trained: (1 + grid * grid, width); the first is the class token's.
        grid: Patches along a side in training.
        wanted: Patches along a side.

    Returns:
        (1 + wanted * wanted, width).
    """
    if grid == wanted:
        return trained
    patches = trained[1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    scale = (wanted + 0.1) / grid
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([trained[:1], patches.permute(0, 2, 3, 1).reshape(wanted**2, -1)])


class VisionTransformer(Travels):
    """Features of a vision transformer; subclasses say of which, and what is done to the images first.

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
    architecture: ClassVar[Architecture]
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
        self._weights = read_once(
            file, (self.published.name, self.architecture), lambda: read_weights(file, self.published, shapes)
        )
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
    def _layers(self) -> ClassToken:
        architecture, size, weights = self.architecture, self.input_size, self._weights
        return self._shared(
            ClassToken,
            (architecture, size, weights.digest),
            lambda: ClassToken(architecture, weights.tensors, size, self._device),
        )

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Features of a batch.

        Args:
            images: (n, h, w, 3), uint8 or float32, values in [0, 255].

        Returns:
            Rows of the one output, float32.
        """
        (output,) = self.outputs
        return {output: self._in_batches(images, lambda parts: torch.cat(parts).cpu().numpy())}

    @torch.inference_mode()
    def _forward(self, images: NDArray[Any]) -> Tensor:
        with float32_arithmetic():
            return self._layers(self.prepared(images))

    def derive(self, output: str, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """There are no derived outputs."""
        del rows
        raise InputError(f"{self.network} has no output {output!r}. It has {', '.join(self.outputs)}.")
