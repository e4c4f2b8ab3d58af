"""Stages of acceptance.py: description of the machine, and rates of the ADM networks' operations."""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.nn.functional as F
from results import CUDA, guarded, reduced, report, seconds_of
from torch import Tensor

from evalkit.system.devices import float32_arithmetic


def machine() -> None:
    """Description of this machine, and its rates."""
    import triton

    properties = torch.cuda.get_device_properties(CUDA)
    report("device", properties.name, multiprocessors=properties.multi_processor_count)
    report("memory, GiB", properties.total_memory / 2**30)
    report("versions", f"Python {sys.version.split()[0]}", numpy=np.__version__, triton=triton.__version__)
    with guarded("cuDNN"):
        report("cuDNN", torch.backends.cudnn.version())
    report("torch", torch.__version__, cuda=torch.version.cuda)
    for name, dtype, n in (
        ("bfloat16", torch.bfloat16, reduced(8192)),
        ("float16", torch.float16, reduced(8192)),
        ("tf32", torch.float32, reduced(8192)),
        ("float32", torch.float32, reduced(8192)),
        ("float64", torch.float64, reduced(4096)),
    ):
        a = torch.randn(n, n, device=CUDA, dtype=dtype)
        with float32_arithmetic(tf32=name == "tf32"):
            seconds = seconds_of(lambda a=a: a @ a, 5)
        report(f"matrix product, {name}, TFLOP/s", 2 * n**3 / seconds / 1e12)
    many = reduced(2**31)
    one, two = (torch.empty(many, dtype=torch.uint8, device=CUDA) for _ in range(2))
    report("copy on the device, TB/s", 2 * many / seconds_of(lambda: one.copy_(two), 5) / 1e12)
    few = reduced(2**28)
    host = torch.empty(few, dtype=torch.uint8).pin_memory()
    small = one[:few]
    report("pinned to device, GB/s", few / seconds_of(lambda: small.copy_(host, non_blocking=True)) / 1e9)
    report("device to pinned, GB/s", few / seconds_of(lambda: host.copy_(small, non_blocking=True)) / 1e9)


def rates() -> None:
    """Convolutions chosen by cuDNN's heuristics, the operations around them, and attention."""
    _convolutions(benchmark=False)
    _around_convolutions()
    _attention()


def rates_tuned() -> None:
    """Convolutions chosen by cuDNN's benchmark mode.

    In a separate process, because torch would reuse the algorithms chosen by heuristics for the same shapes.
    """
    _convolutions(benchmark=True)


def _convolutions(*, benchmark: bool) -> None:
    """Rates of the convolutions of the 256x256 networks."""
    for batch, channels, side in ((16, 256, 256), (16, 256, 128), (16, 512, 64), (16, 1024, 32)):
        for dtype in (torch.float16, torch.bfloat16):
            x = torch.randn(batch, channels, side, side, device=CUDA, dtype=dtype)
            w = torch.randn(channels, channels, 3, 3, device=CUDA, dtype=dtype) * 0.02
            x, w = (tensor.to(memory_format=torch.channels_last) for tensor in (x, w))
            flop = 2 * batch * side**2 * channels**2 * 9
            with (
                torch.backends.cudnn.flags(
                    enabled=True, benchmark=benchmark, deterministic=True, allow_tf32=True
                ),
                torch.no_grad(),
            ):
                forward = seconds_of(lambda x=x, w=w: F.conv2d(x, w, padding=1), 5)
                backward = seconds_of(
                    lambda x=x, w=w: torch.ops.aten.convolution_backward(
                        x, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
                    ),
                    5,
                )
            name = "benchmark" if benchmark else "heuristics"
            report(
                f"3x3 convolution {batch}x{channels}x{side}x{side}, {str(dtype)[6:]}, {name}, TFLOP/s",
                round(flop / forward / 1e12),
                gradient=round(flop / backward / 1e12),
            )


def _around_convolutions() -> None:
    """Group norm, SiLU, and the convolution to the output."""
    x = torch.randn(16, 256, 256, 256, device=CUDA, dtype=torch.float16).to(memory_format=torch.channels_last)
    report("torch's group norm 16x256x256x256, ms", 1e3 * seconds_of(lambda: F.group_norm(x, 32), 5))
    report("SiLU of it, ms", 1e3 * seconds_of(lambda: F.silu(x), 5))
    w = torch.randn(6, 256, 3, 3, device=CUDA).to(memory_format=torch.channels_last)
    wide = x.float()
    for layout in (torch.channels_last, torch.contiguous_format):
        a, b = wide.contiguous(memory_format=layout), w.contiguous(memory_format=layout)
        report(
            f"output convolution, float32, {str(layout)[6:]}, ms",
            1e3 * seconds_of(lambda a=a, b=b: F.conv2d(a, b, padding=1), 3),
        )
    half = w.half()
    report("output convolution, float16, ms", 1e3 * seconds_of(lambda: F.conv2d(x, half, padding=1), 3))


def _attention() -> None:
    """Fused attention by backend and head size, forward and backward, and whether it is bit-reproducible."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for dtype, heads, width, tokens in (
        (torch.float16, 8, 64, 1024),
        (torch.bfloat16, 8, 64, 1024),
        (torch.bfloat16, 4, 128, 1024),
        (torch.bfloat16, 4, 192, 1024),
        (torch.bfloat16, 4, 256, 256),
        (torch.bfloat16, 8, 96, 257),
    ):
        packed = torch.randn(16, tokens, 3 * heads * width, device=CUDA, dtype=dtype)
        q, k, v = (
            part.detach().requires_grad_()
            for part in packed.view(16, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
        )
        for backend in (
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
        ):
            for deterministic in (False, True):
                name = f"{backend.name}, {heads} heads of {width}, {tokens} tokens, {str(dtype)[6:]}"
                with guarded(name), sdpa_kernel(backend):
                    torch.use_deterministic_algorithms(deterministic)
                    try:
                        with torch.no_grad():
                            forward = seconds_of(
                                lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)
                            )

                        def both(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> tuple[Tensor, ...]:
                            out = F.scaled_dot_product_attention(q, k, v)
                            return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

                        first, second = both(), both()
                        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
                        report(
                            f"{name}, deterministic {deterministic}, us",
                            1e6 * forward,
                            forward_and_backward=round(1e6 * seconds_of(both)),
                            same_bytes=same,
                        )
                    finally:
                        torch.use_deterministic_algorithms(False)
