"""Stages of acceptance.py: every convolution of Inception in float32, as it is now and in other variants.

Shapes, kernels and real inputs of the layers are recorded by running the network once. Each distinct shape is
measured at the network's batch size, weighted by how often it occurs. cuDNN's benchmark mode has a separate
stage, because in one process torch would reuse the algorithms chosen by heuristics for the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from results import CUDA, guarded, reduced, report, seconds_of
from torch import Tensor

from evalkit.extractors.inception import Inception
from evalkit.extractors.inception_network import INPUT_SIZE, Network
from evalkit.extractors.preprocess import scaled_input
from evalkit.extractors.weights import load_weights
from evalkit.system.devices import float32_arithmetic, has_triton
from evalkit.verify import pictures

NOW = "channels-last"
NOW_WITH_RELU = "channels-last, then bias and ReLU"
FLAT = "contiguous"
FLAT_WITH_RELU = "contiguous, bias and ReLU by cuDNN"
PRODUCT = "product"
TF32 = "TF32"
THREE = "three products in TF32"
THREE_GIVEN = "three products in TF32, input given in parts"

BY_HEURISTICS = (NOW, NOW_WITH_RELU, FLAT, FLAT_WITH_RELU, PRODUCT, TF32, THREE, THREE_GIVEN)
BY_TIMING = (NOW, FLAT, FLAT_WITH_RELU, TF32, THREE_GIVEN)

ALONE = (NOW, FLAT, PRODUCT)
"""Variants that are only the convolution, in float32."""

REPEAT = 3


@dataclass(frozen=True, eq=False)
class Layer:
    """A distinct convolution of the network.

    Attributes:
        x: (1, c, h, w) input for one picture.
        kernel: (k, c, height, width).
        stride: Vertical and horizontal stride.
        padding: Vertical and horizontal padding.
        count: Number of occurrences.
    """

    x: Tensor
    kernel: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    count: int = 1

    @property
    def name(self) -> str:
        """Input, outputs and kernel."""
        channels, height, width = self.x.shape[1:]
        outputs, _, *sides = self.kernel.shape
        strided = " strided" if self.stride[0] > 1 else ""
        return f"{channels}x{height}x{width} to {outputs}, {sides[0]}x{sides[1]}{strided}"

    @property
    def is_product(self) -> bool:
        """Whether it is equivalent to a matrix product over channels."""
        return tuple(self.kernel.shape[2:]) == (1, 1) and self.stride[0] == 1

    def output(self, x: Tensor, kernel: Tensor) -> Tensor:
        """The convolution alone."""
        return F.conv2d(x, kernel, None, self.stride, self.padding)

    def flop(self, batch: int) -> float:
        """FLOP per batch; a multiply-add counts as two."""
        sides = [
            (extent + 2 * padding - kernel) // stride + 1
            for extent, padding, kernel, stride in zip(
                self.x.shape[2:], self.padding, self.kernel.shape[2:], self.stride, strict=True
            )
        ]
        return 2 * batch * sides[0] * sides[1] * self.kernel.numel()


def main() -> None:
    """A line for each layer, then totals."""
    _measure(BY_HEURISTICS, tuned=False)


def tuned() -> None:
    """The same in cuDNN's benchmark mode."""
    _measure(BY_TIMING, tuned=True)


def _measure(variants: tuple[str, ...], *, tuned: bool) -> None:
    batch = reduced(Inception(load_weights(), device=str(CUDA)).batch_size, 2)
    how = "cuDNN's choice by timing" if tuned else "cuDNN's choice by heuristics"
    totals = dict.fromkeys(variants, 0.0)
    best = flop = 0.0
    with torch.inference_mode():
        layers = layers_of_the_network()
        report(how, sum(layer.count for layer in layers), distinct=len(layers), batch=batch)
        for layer in layers:
            with guarded(layer.name):
                seconds = measured(layer, batch, variants, tuned=tuned)
                flop += layer.count * layer.flop(batch)
                best += layer.count * min(seconds[name] for name in ALONE if name in seconds)
                for name in variants:  # if a layer lacks a variant, its current time
                    totals[name] += layer.count * seconds.get(name, seconds[NOW])
    for name, total in totals.items() if best else ():
        report(
            f"all convolutions, {name}, {how}, images/s", batch / total, tflops=round(flop / total / 1e12, 2)
        )
    if best:
        report(f"all convolutions, the fastest of each, {how}, images/s", batch / best)


def layers_of_the_network() -> list[Layer]:
    """The network's distinct float32 convolutions on one picture, in order of first occurrence."""
    network = Network(load_weights().convolutions, CUDA, torch.float32, fused=False)
    found: dict[tuple[Any, ...], Layer] = {}
    convolve = F.conv2d

    def recorded(x: Tensor, kernel: Tensor, bias: Any, stride: Any, padding: Any) -> Tensor:
        key = (*x.shape[1:], *kernel.shape, *stride, *padding)
        before = found.get(key)
        layer = Layer(x.clone(), kernel, tuple(stride), tuple(padding), before.count + 1 if before else 1)
        found[key] = layer
        return convolve(x, kernel, bias, stride, padding)

    picture = torch.from_numpy(pictures(256, 256, 1)).to(CUDA)
    with float32_arithmetic(), mock.patch.object(F, "conv2d", recorded):
        network(scaled_input(picture, INPUT_SIZE, torch.float32))
    return list(found.values())


def calls_of(layer: Layer, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The convolution of a batch in each variant."""
    flat, flat_kernel = x.contiguous(), layer.kernel.contiguous()
    x, kernel = (each.contiguous(memory_format=torch.channels_last) for each in (x, layer.kernel))
    bias = torch.zeros(len(kernel), device=CUDA)

    def now() -> Tensor:
        return layer.output(x, kernel)

    found = {NOW: now, TF32: now, FLAT: lambda: layer.output(flat, flat_kernel)}
    found[FLAT_WITH_RELU] = lambda: torch.cudnn_convolution_relu(
        flat, flat_kernel, bias, layer.stride, layer.padding, (1, 1), 1
    )
    if has_triton(CUDA):
        from evalkit.extractors.inception_kernels import add_bias_relu

        def with_relu() -> Tensor:
            y = now()
            return add_bias_relu(y, bias, y)

        found[NOW_WITH_RELU] = with_relu
    if layer.is_product:
        columns = kernel[:, :, 0, 0].T.contiguous()
        found[PRODUCT] = lambda: (x.permute(0, 2, 3, 1) @ columns).permute(0, 3, 1, 2)
    high, low = parts(kernel)
    kernels = torch.cat([high, low, high], 1).contiguous(memory_format=torch.channels_last)
    given = tripled(x)
    found[THREE] = lambda: layer.output(tripled(x), kernels)
    found[THREE_GIVEN] = lambda: layer.output(given, kernels)
    return found


def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest TF32 numbers (10 mantissa bits), and the exact remainders."""
    # The addition's carry does the rounding; it may correctly reach the exponent.
    high = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return high, x - high


def tripled(x: Tensor) -> Tensor:
    """Inputs to convolve with the high, low and high parts of a kernel."""
    high, low = parts(x)
    return torch.cat([high, high, low], 1).contiguous(memory_format=torch.channels_last)


def measured(layer: Layer, batch: int, variants: tuple[str, ...], *, tuned: bool) -> dict[str, float]:
    """Seconds by variant; reports them, and their largest errors relative to the largest value."""
    x = layer.x * torch.linspace(0.5, 1.5, batch, device=CUDA)[:, None, None, None]
    truth = layer.output(x[:2].double(), layer.kernel.double())
    seconds: dict[str, float] = {}
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    differing = []
    calls = calls_of(layer, x)
    for name in variants:
        if name not in calls:
            continue
        try:
            with float32_arithmetic(tf32="TF32" in name):
                torch.backends.cudnn.benchmark = tuned
                first = calls[name]()
                if not torch.equal(first, calls[name]()):
                    differing.append(name)
                expected = truth.relu() if "ReLU" in name else truth
                errors[name] = float((first[:2] - expected).abs().max() / truth.abs().max())
                del first
                seconds[name] = seconds_of(calls[name], REPEAT, warm_up=0)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:100]}"
    rates = {name: round(layer.flop(batch) / time / 1e12, 2) for name, time in seconds.items()}
    report(
        f"{layer.name}, TFLOP/s",
        rates[NOW],
        occurs=layer.count,
        milliseconds={name: float(f"{1e3 * time:.4g}") for name, time in seconds.items()},
        tflops=rates,
        errors={name: float(f"{error:.2g}") for name, error in errors.items()},
        not_repeated=differing,
        **({"failed": failed} if failed else {}),
    )
    return seconds
