"""Vision transformers in PyTorch, as DINOv2, CLIP, MAE and SigLIP use them.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929), equations 1 to 4, with what DINOv2
(arXiv 2304.07193), CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343) change.

Why not transformers or timm: each reads one of the three ways in which weights are published, and each
interpolates DINOv2's positions in a way of its own, other than that of the code behind published numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from evalkit.extractors.published import Layers, PublishedNetwork

__all__ = ["Architecture", "TransformerLayers", "VisionTransformer"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of a network, and how it departs from a plain vision transformer, which MAE's encoder is.

    Attributes:
        width: Numbers in a token.
        depth: Blocks.
        heads: Of each attention.
        patch: Side of a patch, pixels.
        grid: Patches along a side for which the network was trained.
        hidden: Numbers inside an MLP; None is 4 times the width.
        layer_scale: DINOv2: each branch has a factor for each channel.
        projection: CLIP: width of the embedding. There is a norm before the blocks, patches have no bias,
            and the GELU and an epsilon are others.
        attention_pool: SigLIP: there is no class token, the features are what a learned query finds, and the
            GELU is another.
        as_timm: As timm runs the models that FDr6 takes. Positions for another number of patches are
            interpolated with antialiasing, and images are padded to whole patches. Of CLIP, the GELU is the
            exact one, and the features are those before the projection.
    """

    width: int
    depth: int
    heads: int
    patch: int
    grid: int
    hidden: int | None = None
    layer_scale: bool = False
    projection: int | None = None
    attention_pool: bool = False
    as_timm: bool = False

    @property
    def features(self) -> int:
        """Width of the features."""
        return self.width if self.projection is None or self.as_timm else self.projection

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by timm's names."""
        width = self.width
        hidden = self.hidden or 4 * width
        found: dict[str, tuple[int, ...]] = {} if self.attention_pool else {"cls_token": (width,)}
        found |= {
            "pos_embed": (self.grid**2 + len(found), width),
            "patch_embed.proj.weight": (width, 3, self.patch, self.patch),
        }
        norms = ["norm"]
        linear: dict[str, tuple[int, int]] = {}
        for block in (f"blocks.{number}" for number in range(self.depth)):
            norms += [f"{block}.norm1", f"{block}.norm2"]
            linear |= {
                f"{block}.attn.qkv": (3 * width, width),
                f"{block}.attn.proj": (width, width),
                f"{block}.mlp.fc1": (hidden, width),
                f"{block}.mlp.fc2": (width, hidden),
            }
            if self.layer_scale:
                found |= {f"{block}.ls1.gamma": (width,), f"{block}.ls2.gamma": (width,)}
        if self.projection is None:
            found["patch_embed.proj.bias"] = (width,)
        else:
            norms.append("norm_pre")
            found["head.weight"] = (self.projection, width)
        if self.attention_pool:
            norms.append("attn_pool.norm")
            found["attn_pool.latent"] = (width,)
            linear |= {
                "attn_pool.qkv": (3 * width, width),
                "attn_pool.proj": (width, width),
                "attn_pool.mlp.fc1": (hidden, width),
                "attn_pool.mlp.fc2": (width, hidden),
            }
        for name in norms:
            found |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
        for name, shape in linear.items():
            found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        return found

    def layers(self, weights: Mapping[str, Tensor], size: int, device: torch.device) -> TransformerLayers:
        """See :class:`~evalkit.extractors.published.Sizes`."""
        return TransformerLayers(self, weights, size, device)


class TransformerLayers(Layers):
    """The layers of a network, on one device: images to the class token after the last norm, or to the pool.

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
        positions = _positions(weights["pos_embed"], architecture, -(-size // architecture.patch))
        tensors = {**weights, "pos_embed": positions}
        self._weights = {name: tensor.to(device) for name, tensor in tensors.items()}

    def __call__(self, x: Tensor) -> Tensor:
        """(n, 3, size, size) float32, scaled as the network was trained, to (n, features)."""
        architecture, weights = self._architecture, self._weights
        if missing := -x.shape[-1] % architecture.patch:
            x = F.pad(x, (0, missing, 0, missing))
        x = F.conv2d(
            x,
            weights["patch_embed.proj.weight"],
            weights.get("patch_embed.proj.bias"),
            stride=architecture.patch,
        )
        x = x.flatten(2).transpose(1, 2)
        if not architecture.attention_pool:
            x = torch.cat([weights["cls_token"].expand(len(x), 1, -1), x], 1)
        x = x + weights["pos_embed"]
        if self._is_clip:
            x = self._norm(x, "norm_pre")
        for number in range(architecture.depth):
            x = self._block(x, f"blocks.{number}")
        if architecture.attention_pool:
            return self._pool(self._norm(x, "norm"))
        x = self._norm(x[:, 0], "norm")
        return F.linear(x, weights["head.weight"]) if self._is_clip and not architecture.as_timm else x

    def _block(self, x: Tensor, name: str) -> Tensor:
        y = self._linear(self._norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        n, tokens, _ = y.shape
        query, key, value = y.reshape(n, tokens, 3, self._architecture.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        x = x + self._scaled(self._linear(y, f"{name}.attn.proj"), f"{name}.ls1")
        return x + self._scaled(self._mlp(self._norm(x, f"{name}.norm2"), f"{name}.mlp"), f"{name}.ls2")

    def _pool(self, x: Tensor) -> Tensor:
        """What one learned query finds among the tokens: multi-head attention, then an MLP."""
        n, _, width = x.shape
        weight, bias = (self._weights[f"attn_pool.qkv.{part}"] for part in ("weight", "bias"))
        query = F.linear(self._weights["attn_pool.latent"], weight[:width], bias[:width])
        query = query.reshape(1, self._architecture.heads, 1, -1).expand(n, -1, -1, -1)
        both = F.linear(x, weight[width:], bias[width:])
        key, value = both.reshape(n, -1, 2, self._architecture.heads, query.shape[-1]).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value).reshape(n, width)
        y = self._linear(y, "attn_pool.proj")
        return y + self._mlp(self._norm(y, "attn_pool.norm"), "attn_pool.mlp")

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        y = self._linear(x, f"{name}.fc1")
        # CLIP's GELU is an approximation, SigLIP's another.
        if self._is_clip and not self._architecture.as_timm:
            y = y * torch.sigmoid(1.702 * y)
        else:
            y = F.gelu(y, approximate="tanh" if self._architecture.attention_pool else "none")
        return self._linear(y, f"{name}.fc2")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = (self._weights[f"{name}.{part}"] for part in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5 if self._is_clip else 1e-6)

    def _scaled(self, x: Tensor, name: str) -> Tensor:
        return x * self._weights[f"{name}.gamma"] if self._architecture.layer_scale else x


def _positions(trained: Tensor, architecture: Architecture, wanted: int) -> Tensor:
    """The position of each token where the image has another number of patches than in training.

    As ``interpolate_pos_encoding`` in DINOv2's own ``vision_transformer.py``, with a scale that is off by 0.1
    patches; or as ``resample_abs_pos_embed`` of timm. transformers scales otherwise.

    Args:
        trained: (grid * grid, width), with the class token's before them if there is one.
        architecture: Of the network.
        wanted: Patches along a side.

    Returns:
        (wanted * wanted, width), likewise.
    """
    grid = architecture.grid
    if grid == wanted:
        return trained
    first, patches = trained[: -(grid**2)], trained[-(grid**2) :]
    patches = patches.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    if architecture.as_timm:
        patches = F.interpolate(patches, (wanted, wanted), mode="bicubic", antialias=True)
    else:
        scale = (wanted + 0.1) / grid
        patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([first, patches.permute(0, 2, 3, 1).reshape(wanted**2, -1)])


class VisionTransformer(PublishedNetwork):
    """Features of a vision transformer."""

    architecture: ClassVar[Architecture]
