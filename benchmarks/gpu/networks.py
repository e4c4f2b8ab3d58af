"""Stage of acceptance.py: networks other than Inception, with random weights, and their preprocessing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from results import CUDA, guarded, is_reduced, reduced, relative, report, seconds_of
from small_transformers import small
from torch import Tensor

from evalkit.extractors import EXTRACTORS, extractor_class
from evalkit.extractors.efficientnet_lite0 import INPUT_SIZE, EfficientNetLite0
from evalkit.extractors.inception import Inception
from evalkit.extractors.preprocess import resize_tf1
from evalkit.extractors.published import Layers, PublishedNetwork
from evalkit.extractors.travel import Travels
from evalkit.system.devices import float32_arithmetic
from evalkit.verify import pictures

NETWORKS = ("dinov2_vitl14", "clip_vitl14", "convnextv2_base", "mae_vitl16", "siglip2_so400m")

IMAGES = 4
"""Number of images whose features are compared; the CPU takes a tenth of a second each."""

BATCH = 128

SHAPES = ((32, 32), (64, 48), (256, 256), (300, 224), (512, 512))
"""Heights and widths of the images that are resized."""


def main() -> None:
    """Resizes, then the networks."""
    resizes()
    for row in NETWORKS:
        with guarded(row), torch.inference_mode():
            network(row)


# What networks see -----------------------------------------------------------------------------------------


def resizes() -> None:
    """Difference of a network's preprocessed input between CUDA and the CPU, in units in the last place."""
    for row in EXTRACTORS:
        prepared = preparation(extractor_class(row))
        if prepared is None:
            continue
        with guarded(f"{row}, resize"), torch.inference_mode():
            found: dict[str, int] = {}
            largest = 0.0
            for height, width in SHAPES:
                images = with_noise(height, width)
                cpu, gpu = (prepared(images, device).cpu() for device in (torch.device("cpu"), CUDA))
                found[f"{height}x{width}"] = ulps(gpu, cpu)
                largest = max(largest, float((gpu - cpu).abs().max()))
            report(f"{row}, resize, largest difference, ulps", max(found.values()), largest=largest, **found)


def preparation(cls: Any) -> Callable[[NDArray[np.uint8], torch.device], Tensor] | None:
    """A network's preprocessing, which needs no weights; None if it has none."""
    if issubclass(cls, Inception):
        return lambda images, device: cls.prepared(torch.from_numpy(images).to(device))
    if cls is EfficientNetLite0:
        return lambda images, device: resize_tf1(torch.from_numpy(images).to(device).float(), INPUT_SIZE)
    if not issubclass(cls, PublishedNetwork):
        return None

    def prepared(images: NDArray[np.uint8], device: torch.device) -> Tensor:
        network = cls.__new__(cls)
        network._device = device
        return network.prepared(images)

    return prepared


def with_noise(height: int, width: int) -> NDArray[np.uint8]:
    """A smooth picture, and noise, which overshoots when it is resized."""
    noise = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    return np.concatenate([pictures(height, width, 1), noise])


def ulps(a: Tensor, b: Tensor) -> int:
    """Largest distance between two arrays, counted in float32 numbers."""
    a, b = (ordered(each.contiguous().view(torch.int32).long()) for each in (a, b))
    return int((a - b).abs().max())


def ordered(bits: Tensor) -> Tensor:
    """Map float32 bit patterns to integers in the same order."""
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


# Networks --------------------------------------------------------------------------------------------------


def network(row: str) -> None:
    """Features on CUDA against those on the CPU, and images/s by precision."""
    cls = extractor_class(row)
    architecture: Any = small(cls.architecture) if is_reduced() else cls.architecture
    weights = random_weights(architecture.shapes)
    output, width = next(iter(cls.outputs)), architecture.features
    images = pictures(256, 256, IMAGES)
    cpu, gpu = (made(cls, architecture, weights, device) for device in ("cpu", str(CUDA)))
    expected, found, again = (network(images)[output] for network in (cpu, gpu, gpu))
    assert found.shape == (IMAGES, width)
    truth = torch.from_numpy(expected)
    report(
        f"{row}, relative difference",
        relative(torch.from_numpy(found), truth),
        same_bytes_twice=bool((found == again).all()),
    )
    few = gpu.prepared(images)
    x = few.repeat(-(-reduced(BATCH, 4) // IMAGES), 1, 1, 1)
    for precision in ("float32", "tf32", "bfloat16"):
        with guarded(f"{row}, {precision}"), float32_arithmetic(tf32=precision == "tf32"):
            dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
            layers = in_type(gpu._layers, dtype)
            y = x.to(dtype)
            seconds = seconds_of(lambda layers=layers, y=y: layers(y), 3, warm_up=1)
            report(
                f"{row}, {precision}, images/s",
                len(y) / seconds,
                relative_difference=relative(layers(few.to(dtype)), truth),
            )


def random_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random weights under which every tensor matters, created on the device because there are many."""
    generator = torch.Generator(CUDA).manual_seed(0)
    found = {}
    for name, shape in sorted(shapes.items()):
        values = torch.randn(shape, device=CUDA, generator=generator)
        if len(shape) > 1 and name != "pos_embed":
            values /= math.sqrt(math.prod(shape[1:]))
        elif name.endswith("weight"):  # of a norm
            values = 1 + values / 4
        else:
            values /= 10
        found[name] = values.cpu()
    return found


def made(cls: Any, architecture: Any, weights: dict[str, Tensor], device: str) -> Any:
    """The network with these sizes and weights, without a file."""
    found = cls.__new__(cls)
    Travels.__init__(found, device, BATCH)
    found.architecture, found.batch_size = architecture, BATCH
    found._weights = SimpleNamespace(tensors=weights, digest=f"random {cls.network}")
    return found


def in_type(layers: Layers, dtype: torch.dtype) -> Any:
    """The same layers with weights of another dtype."""
    found: Any = copy.copy(layers)
    found._weights = {name: tensor.to(dtype) for name, tensor in found._weights.items()}
    return found
