"""Each fused kernel, convolution and product of a sampling step at 256x256, against its floor.

    python benchmarks/gpu/kernels.py --batch 16

Prints a JSON line each. The floor of a kernel that is bound by memory is the time in which a copy moves as
many bytes; convolutions and products are in TFLOP/s. Calls are captured in a CUDA graph, as in sampling, and
take turns over buffers that do not fit the L2 cache together. ``--tune`` tries other tiles and warps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import click
import torch
import torch.nn.functional as F
from results import guarded, is_reduced, seconds_of
from torch import Tensor

from generation.networks import fused_norm
from generation.networks.flash import attention, attention_backward
from generation.networks.kernels import _few_channels, _taps
from generation.networks.layers import split_heads
from generation.networks.precision import arithmetic

# (side, channels) of maps and convolutions at each level of the UNet, and at the first of the classifier.
UNET = ((256, 256), (128, 256), (64, 512), (32, 512), (16, 1024), (8, 1024))
CLASSIFIER = ((256, 128), (128, 128), (64, 256))
CACHE = 2**28  # bytes, several times the L2 cache
REPLAYS = 3


def milliseconds(call: Callable[..., Any], buffers: list[tuple[Any, ...]]) -> float:
    """Of one call, over ``buffers`` in turn."""
    if is_reduced():  # a fake GPU has no graphs
        return 1e3 * seconds_of(lambda: call(*buffers[0]), 1, warm_up=0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(*buffers[0])
    torch.cuda.current_stream().wait_stream(stream)
    rounds = max(1, -(-8 // len(buffers)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for buffer in buffers:
                call(*buffer)
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / (REPLAYS * rounds * len(buffers))


def maps(count: int, *shape: int, dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
        for _ in range(count)
    ]


def report(kernel: str, shape: tuple[int, ...], ms: float, floor: float | None = None, **more: Any) -> None:
    line: dict[str, Any] = {"kernel": kernel, "shape": shape, "ms": round(ms, 4)}
    if floor is not None:
        line |= {"floor_ms": round(floor, 4), "of_floor": round(floor / ms, 3)}
    print(json.dumps(line | more), flush=True)


def copy_rate() -> float:
    """Bytes per millisecond, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / milliseconds(target.copy_, [(source,)])


def bandwidth(b: int, side: int, channels: int, dtype: torch.dtype, rate: float, *, backward: bool) -> None:
    """The kernels that are bound by memory, at one size of map."""
    shape = (b, channels, side, side)
    size = 2 * b * channels * side * side  # bytes
    count = max(1, min(16, CACHE // size))
    ones, zeros = torch.ones(channels, device="cuda"), torch.zeros(channels, device="cuda")
    condition = torch.zeros(b, 2 * channels, device="cuda")
    xs, others = maps(count, *shape, dtype=dtype), maps(count, *shape, dtype=dtype)
    quarters = maps(count, b, channels, side // 2, side // 2, dtype=dtype)
    for other in (*others, *quarters):
        other.zero_()  # added in place again and again
    of = fused_norm.moments(xs[0])
    table = fused_norm.coefficients((of,), side * side, ones, zeros, bias=zeros, condition=condition)

    def coefficients() -> Tensor:
        return fused_norm.coefficients((of,), side * side, ones, zeros, bias=zeros, condition=condition)

    def normalise(x: Tensor, resample: str) -> Tensor:
        return fused_norm.normalise((x,), table, resample=resample)

    def add(x: Tensor, skip: Tensor, resample: str) -> None:
        fused_norm.add(x, skip, zeros, resample=resample)

    def gradient(x: Tensor, dy: Tensor, resample: str, skip: Tensor | None) -> None:
        fused_norm.normalise_backward(x, dy, table, resample=resample, skip=skip)

    def measure(name: str, passes: float, call: Callable[..., Any], buffers: list[tuple[Any, ...]]) -> None:
        with guarded(f"{name} {str(dtype)[6:]}, {shape}"):
            report(f"{name} {str(dtype)[6:]}", shape, milliseconds(call, buffers), passes * size / rate)

    measure("coefficients", 0, coefficients, [()])
    measure("moments", 1, fused_norm.moments, [(x,) for x in xs])
    measure("normalise", 2, normalise, [(x, "same") for x in xs])
    measure("add", 3, add, [(x, y, "same") for x, y in zip(xs, others, strict=True)])
    if side == UNET[0][0]:
        measure("normalise and halve", 1.25, normalise, [(x, "down") for x in xs])
        measure("normalise and double, to this", 1.25, normalise, [(q, "up") for q in quarters])
        measure("add doubled", 2.25, add, [(x, q, "up") for x, q in zip(xs, quarters, strict=True)])
        measure(
            "add halved, to a quarter of this",
            1.5,
            add,
            [(q, y, "down") for q, y in zip(quarters, others, strict=True)],
        )
    if backward:
        pairs = list(zip(xs, others, strict=True))
        measure("backward", 5, gradient, [(x, y, "same", None) for x, y in pairs])
        measure("backward with skip", 6, gradient, [(x, y, "same", y) for x, y in pairs])
        down = list(zip(xs, quarters, strict=True))
        measure("backward of halving with skip", 3.75, gradient, [(x, q, "down", q) for x, q in down])


def arithmetic_rates(b: int, side: int, channels: int, dtype: torch.dtype) -> None:
    """Convolutions, and attention where a level has it."""
    shape = (b, channels, side, side)
    count = max(1, min(8, CACHE // (2 * b * channels * side * side)))
    xs = maps(count, *shape, dtype=dtype)
    (weight,) = maps(1, channels, channels, 3, 3, dtype=dtype)

    def measure(name: str, flop: float, call: Callable[..., Any], buffers: list[tuple[Any, ...]]) -> None:
        with guarded(f"{name} {str(dtype)[6:]}, {shape}"):
            ms = milliseconds(call, buffers)
            report(f"{name} {str(dtype)[6:]}", shape, ms, tflops=round(flop / ms / 1e9, 1))

    positions = b * side * side
    measure(
        "convolution",
        18 * positions * channels**2,
        lambda x: F.conv2d(x, weight, padding=1),
        [(x,) for x in xs],
    )
    if side == UNET[0][0]:
        (few,) = maps(1, channels, 8, 3, 3, dtype=dtype)
        (image,) = maps(1, b, 8, side, side, dtype=dtype)
        measure(
            "convolution from 3 channels",
            54 * positions * channels,
            lambda: F.conv2d(image, few, padding=1),
            [()],
        )
        taps = _taps(torch.randn(6, channels, 3, 3, device="cuda", dtype=dtype))
        measure(
            "convolution to 6 channels, float32",
            108 * positions * channels,
            lambda x: _few_channels(x, taps, 6),
            [(x,) for x in xs],
        )
    if side <= 32:
        heads = channels // 64
        qkv = torch.randn(b, side * side, 3 * channels, device="cuda", dtype=dtype)
        q, k, v = split_heads(qkv, heads, new_order=False)
        flop = 4 * b * side**4 * channels
        measure("attention", flop, lambda: attention(q, k, v), [()])
        out, saved = attention(q, k, v)
        dy = torch.randn_like(out)
        measure("attention backward", 2.5 * flop, lambda: attention_backward(dy, q, k, v, out, saved), [()])


def configurations() -> Iterator[tuple[int, int]]:
    yield from product((2048, 4096, 8192), (4, 8))


@click.command()
@click.option("--batch", default=16, show_default=True, help="Images.")
@click.option("--tune", is_flag=True, help="Try other tiles and warps, at the largest map.")
def main(batch: int, tune: bool) -> None:
    torch.manual_seed(0)
    with torch.no_grad(), arithmetic("fast"):
        rate = copy_rate()
        report("copy of 1 GiB", (2**30,), 2 * 2**30 / rate, gigabytes_per_second=round(rate / 1e6))
        if tune:
            for fused_norm.TILE, fused_norm.WARPS in configurations():
                print(json.dumps({"tile": fused_norm.TILE, "warps": fused_norm.WARPS}))
                bandwidth(batch, *CLASSIFIER[0], torch.bfloat16, rate, backward=True)
            return
        for side, channels in UNET:
            bandwidth(batch, side, channels, torch.float16, rate, backward=False)
            arithmetic_rates(batch, side, channels, torch.float16)
        for side, channels in CLASSIFIER:
            bandwidth(batch, side, channels, torch.bfloat16, rate, backward=True)
            arithmetic_rates(batch, side, channels, torch.bfloat16)
        arithmetic_rates(batch, 32, 256, torch.bfloat16)


if __name__ == "__main__":
    main()
