"""The tensors of the 2015-12-05 Inception network: their names in every container, and their shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = [
    "CONVOLUTIONS",
    "GRAPH_NAMES",
    "HEAD",
    "SHAPES",
    "TORCHSCRIPT_NAMES",
    "Convolution",
    "check_shape",
]


@dataclass(frozen=True)
class Convolution:
    """One convolution with its batch norm, under both of its names.

    Attributes:
        name: As in PyTorch ports, for example ``"Mixed_6d.branch1x1"``.
        scope: In the TensorFlow graph, for example ``"mixed_6/conv"``.
        shape: Filter shape, output channels x input channels x height x width.
    """

    name: str
    scope: str
    shape: tuple[int, int, int, int]


_Rows: TypeAlias = tuple[tuple[str, str, tuple[int, int, int, int]], ...]


def _stem() -> _Rows:
    return (
        ("conv", "Conv2d_1a_3x3", (32, 3, 3, 3)),
        ("conv_1", "Conv2d_2a_3x3", (32, 32, 3, 3)),
        ("conv_2", "Conv2d_2b_3x3", (64, 32, 3, 3)),
        ("conv_3", "Conv2d_3b_1x1", (80, 64, 1, 1)),
        ("conv_4", "Conv2d_4a_3x3", (192, 80, 3, 3)),
    )


def _block_35(inputs: int, pool: int) -> _Rows:
    return (
        ("conv", "branch1x1", (64, inputs, 1, 1)),
        ("tower/conv", "branch5x5_1", (48, inputs, 1, 1)),
        ("tower/conv_1", "branch5x5_2", (64, 48, 5, 5)),
        ("tower_1/conv", "branch3x3dbl_1", (64, inputs, 1, 1)),
        ("tower_1/conv_1", "branch3x3dbl_2", (96, 64, 3, 3)),
        ("tower_1/conv_2", "branch3x3dbl_3", (96, 96, 3, 3)),
        ("tower_2/conv", "branch_pool", (pool, inputs, 1, 1)),
    )


def _block_35_to_17() -> _Rows:
    return (
        ("conv", "branch3x3", (384, 288, 3, 3)),
        ("tower/conv", "branch3x3dbl_1", (64, 288, 1, 1)),
        ("tower/conv_1", "branch3x3dbl_2", (96, 64, 3, 3)),
        ("tower/conv_2", "branch3x3dbl_3", (96, 96, 3, 3)),
    )


def _block_17(width: int) -> _Rows:
    return (
        ("conv", "branch1x1", (192, 768, 1, 1)),
        ("tower/conv", "branch7x7_1", (width, 768, 1, 1)),
        ("tower/conv_1", "branch7x7_2", (width, width, 1, 7)),
        ("tower/conv_2", "branch7x7_3", (192, width, 7, 1)),
        ("tower_1/conv", "branch7x7dbl_1", (width, 768, 1, 1)),
        ("tower_1/conv_1", "branch7x7dbl_2", (width, width, 7, 1)),
        ("tower_1/conv_2", "branch7x7dbl_3", (width, width, 1, 7)),
        ("tower_1/conv_3", "branch7x7dbl_4", (width, width, 7, 1)),
        ("tower_1/conv_4", "branch7x7dbl_5", (192, width, 1, 7)),
        ("tower_2/conv", "branch_pool", (192, 768, 1, 1)),
    )


def _block_17_to_8() -> _Rows:
    return (
        ("tower/conv", "branch3x3_1", (192, 768, 1, 1)),
        ("tower/conv_1", "branch3x3_2", (320, 192, 3, 3)),
        ("tower_1/conv", "branch7x7x3_1", (192, 768, 1, 1)),
        ("tower_1/conv_1", "branch7x7x3_2", (192, 192, 1, 7)),
        ("tower_1/conv_2", "branch7x7x3_3", (192, 192, 7, 1)),
        ("tower_1/conv_3", "branch7x7x3_4", (192, 192, 3, 3)),
    )


def _block_8(inputs: int) -> _Rows:
    return (
        ("conv", "branch1x1", (320, inputs, 1, 1)),
        ("tower/conv", "branch3x3_1", (384, inputs, 1, 1)),
        ("tower/mixed/conv", "branch3x3_2a", (384, 384, 1, 3)),
        ("tower/mixed/conv_1", "branch3x3_2b", (384, 384, 3, 1)),
        ("tower_1/conv", "branch3x3dbl_1", (448, inputs, 1, 1)),
        ("tower_1/conv_1", "branch3x3dbl_2", (384, 448, 3, 3)),
        ("tower_1/mixed/conv", "branch3x3dbl_3a", (384, 384, 1, 3)),
        ("tower_1/mixed/conv_1", "branch3x3dbl_3b", (384, 384, 3, 1)),
        ("tower_2/conv", "branch_pool", (192, inputs, 1, 1)),
    )


def _convolutions() -> Iterator[Convolution]:
    for scope, name, shape in _stem():
        yield Convolution(name, scope, shape)
    blocks = (
        ("mixed", "Mixed_5b", _block_35(192, 32)),
        ("mixed_1", "Mixed_5c", _block_35(256, 64)),
        ("mixed_2", "Mixed_5d", _block_35(288, 64)),
        ("mixed_3", "Mixed_6a", _block_35_to_17()),
        ("mixed_4", "Mixed_6b", _block_17(128)),
        ("mixed_5", "Mixed_6c", _block_17(160)),
        ("mixed_6", "Mixed_6d", _block_17(160)),
        ("mixed_7", "Mixed_6e", _block_17(192)),
        ("mixed_8", "Mixed_7a", _block_17_to_8()),
        ("mixed_9", "Mixed_7b", _block_8(1280)),
        ("mixed_10", "Mixed_7c", _block_8(2048)),
    )
    for block_scope, block_name, rows in blocks:
        for scope, name, shape in rows:
            yield Convolution(f"{block_name}.{name}", f"{block_scope}/{scope}", shape)


CONVOLUTIONS: tuple[Convolution, ...] = tuple(_convolutions())
"""The network's 94 convolutions, from the image to the last block."""

HEAD = "fc.weight"
"""PyTorch name of the classifier's matrix, (1008, 2048)."""

_HEAD_SHAPE = (1008, 2048)

# A convolution's tensors by PyTorch name: their names in the TensorFlow graph and in the wheel's TorchScript.
_PARTS = {
    "conv.weight": ("conv2d_params", "weight"),
    "bn.bias": ("batchnorm/beta", "beta"),
    "bn.running_mean": ("batchnorm/moving_mean", "mean"),
    "bn.running_var": ("batchnorm/moving_variance", "var"),
}


SHAPES: dict[str, tuple[int, ...]] = {
    f"{convolution.name}.{part}": convolution.shape if part == "conv.weight" else convolution.shape[:1]
    for convolution in CONVOLUTIONS
    for part in _PARTS
}
"""Shapes of the 376 tensors of the convolutions, by PyTorch name."""

GRAPH_NAMES: dict[str, str] = {
    f"{convolution.name}.{part}": f"{convolution.scope}/{name}"
    for convolution in CONVOLUTIONS
    for part, (name, _) in _PARTS.items()
} | {HEAD: "softmax/weights"}
"""Nodes of the TensorFlow graph that hold the tensors, by PyTorch name."""

TORCHSCRIPT_NAMES: dict[str, str] = {
    f"{convolution.name}.{part}": f"net_layers_{convolution.scope}_{name}".replace("/", "_")
    for convolution in CONVOLUTIONS
    for part, (_, name) in _PARTS.items()
}
"""Names of the tensors in the wheel's TorchScript archive, by PyTorch name, with underscores for its dots.

Its modules have names such as ``mixed.tower.conv_1`` and ``mixed_9.tower_conv_1``.
"""


def check_shape(name: str, shape: Sequence[int]) -> None:
    """Raise a ValueError unless the tensor of this PyTorch name has the right shape."""
    expected = _HEAD_SHAPE if name == HEAD else SHAPES[name]
    if tuple(shape) != expected:
        raise ValueError(f"{name} has shape {tuple(shape)}, expected {expected}")
