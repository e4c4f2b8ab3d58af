"""The fused kernels against plain PyTorch: on a GPU, or on a CPU in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from generation.networks import fused_norm
from generation.networks.classifier import Classifier, ClassifierSettings
from generation.networks.kernels import _few_channels, _taps, _turned, use_kernels
from generation.networks.precision import _round_convolutions, arithmetic
from generation.networks.unet import Trunk, UNet, UNetSettings
from generation.networks.upsampler import Upsampler

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cpu" if INTERPRETED else "cuda"
on_a_device = pytest.mark.skipif(
    not HAS_TRITON or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1 (see test_in_the_interpreter)",
)
# The interpreter computes exp(-x) in NumPy, which warns where it overflows.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

BOUNDS = {torch.float32: 2e-5, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
SAMPLED: dict[str, Callable[[Tensor], Tensor]] = {
    "same": lambda x: x,
    "down": lambda x: F.avg_pool2d(x, 2),
    "up": lambda x: F.interpolate(x, scale_factor=2.0),
}
SMALL: dict[str, Any] = {
    "image_size": 8,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_head_channels": 16,
}
NETWORKS: dict[str, Callable[[], Trunk]] = {
    "no scale, no resampling blocks": lambda: UNet(
        UNetSettings(**SMALL, use_scale_shift_norm=False, resblock_updown=False, use_new_attention_order=True)
    ),
    "upsampler": lambda: Upsampler(UNetSettings(**SMALL, num_classes=4)),
    "classifier": lambda: Classifier(ClassifierSettings(**SMALL)),
}


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).abs().max() / expected.abs().max())


def random_map(*shape: int, dtype: torch.dtype, seed: int, shift: float = 0.0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + shift
    return values.to(DEVICE, dtype, memory_format=torch.channels_last)


def random_vector(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@on_a_device
@pytest.mark.parametrize(
    ("channels", "size", "resample", "dtype", "conditioned", "activation"),
    [
        ((32,), (8, 8), "same", torch.float32, True, True),
        ((64,), (6, 10), "down", torch.float32, False, True),
        ((192,), (3, 5), "up", torch.float32, True, True),
        ((64, 32), (8, 8), "same", torch.float32, True, True),
        ((1024, 512), (4, 4), "same", torch.float16, True, True),
        ((384,), (8, 8), "same", torch.bfloat16, True, False),
        ((32,), (24, 24), "same", torch.float16, False, True),
        ((64,), (48, 48), "down", torch.bfloat16, True, True),
    ],
)
def test_norm(
    channels: tuple[int, ...],
    size: tuple[int, int],
    resample: str,
    dtype: torch.dtype,
    conditioned: bool,
    activation: bool,
) -> None:
    """Forward, and backward without and with a gradient that comes by the skip."""
    b, total = 2, sum(channels)
    maps = tuple(random_map(b, c, *size, dtype=dtype, seed=c, shift=5.0) for c in channels)
    weight, offset, bias = (random_vector(total, seed=seed) for seed in (1, 2, 3))
    condition = random_vector(b, 2 * total, seed=4) if conditioned else None
    of = tuple(fused_norm.moments(x) for x in maps)
    pixels = size[0] * size[1]
    table = fused_norm.coefficients(of, pixels, weight, offset, bias=bias, condition=condition)
    found = fused_norm.normalise(maps, table, resample=resample, activation=activation)

    x = torch.cat(maps, dim=1).double().requires_grad_()
    shifted = x + bias.double()[:, None, None]
    expected = F.group_norm(shifted, 32, weight.double(), offset.double(), 1e-5)
    if condition is not None:
        scale, shift = condition.double()[:, :, None, None].chunk(2, dim=1)
        expected = expected * (1 + scale) + shift
    expected = SAMPLED[resample](F.silu(expected) if activation else expected)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert error(found, expected) < BOUNDS[dtype]
    if len(maps) == 2:
        return
    gradient = random_map(*found.shape, dtype=dtype, seed=5)
    skip = random_map(*found.shape, dtype=dtype, seed=6)
    (through,) = torch.autograd.grad(expected, x, gradient.double())
    (past,) = torch.autograd.grad(SAMPLED[resample](x), x, skip.double())
    options: dict[str, Any] = {"resample": resample, "activation": activation}
    dx = fused_norm.normalise_backward(*maps, gradient, table, **options)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert error(dx, through) < BOUNDS[dtype]
    dx = fused_norm.normalise_backward(*maps, gradient, table, **options, skip=skip)
    assert error(dx, through + past) < BOUNDS[dtype]


@on_a_device
@pytest.mark.parametrize("resample", SAMPLED)
def test_sum_and_its_moments(resample: str) -> None:
    skip, bias = random_map(2, 96, 8, 12, dtype=torch.float32, seed=1), random_vector(96, seed=2)
    h = random_map(*SAMPLED[resample](skip).shape, dtype=torch.float32, seed=3)
    expected = h.double() + bias.double()[:, None, None] + SAMPLED[resample](skip.double())
    of = fused_norm.add(h, skip, bias, resample=resample)
    assert error(h, expected) < 1e-6
    ones, zeros = torch.ones(96, device=DEVICE), torch.zeros(96, device=DEVICE)
    table = fused_norm.coefficients((of,), h.shape[2] * h.shape[3], ones, zeros)
    normal = fused_norm.normalise((h,), table, activation=False)
    assert error(normal, F.group_norm(expected, 32)) < 1e-5


@on_a_device
def test_statistics_do_not_cancel() -> None:
    """A mean of 10,000 standard deviations: a sum of squares in float32 would be all rounding.

    The bound is the spacing of float32 at the mean.
    """
    x = random_map(1, 32, 32, 32, dtype=torch.float32, seed=1) / 2 + 10_000.0
    ones, zeros = torch.ones(32, device=DEVICE), torch.zeros(32, device=DEVICE)
    table = fused_norm.coefficients((fused_norm.moments(x),), 1024, ones, zeros)
    deviation = x.double().flatten(2).var(2, correction=0).add(1e-5).sqrt()
    assert error(1 / table[:, 2], deviation) < 2**-10


@on_a_device
def test_an_image_does_not_depend_on_its_batch() -> None:
    x = random_map(3, 64, 16, 16, dtype=torch.float16, seed=1)
    weight, offset = random_vector(64, seed=2), random_vector(64, seed=3)

    def run(x: Tensor) -> Tensor:
        table = fused_norm.coefficients((fused_norm.moments(x),), 256, weight, offset)
        return fused_norm.normalise((x,), table)

    assert torch.equal(run(x)[2], run(x[2:].clone(memory_format=torch.channels_last))[0])


@on_a_device
def test_a_map_that_is_not_channels_last_is_refused() -> None:
    with pytest.raises(ValueError, match="channels-last"):
        fused_norm.moments(torch.zeros(2, 32, 8, 8, device=DEVICE))


@on_a_device
def test_convolution_to_few_channels_and_its_gradient() -> None:
    x = random_map(2, 32, 5, 7, dtype=torch.float32, seed=1)
    weight, bias = random_vector(6, 32, 3, 3, seed=2), random_vector(6, seed=3)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    with arithmetic("reference"):
        assert error(_few_channels(x, _taps(weight), 6, bias), expected) < 1e-5
        weight = random_vector(32, 3, 3, 3, seed=4)
        image = random_map(2, 3, 5, 7, dtype=torch.float32, seed=5).double().requires_grad_()
        out = F.conv2d(image, weight.double(), padding=1)
        (expected,) = torch.autograd.grad(out, image, x.double())
        assert error(_few_channels(x, _taps(_turned(weight)), 3), expected) < 1e-5


def prepared(name: str, dtype: torch.dtype) -> Trunk:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    network = network.to(DEVICE).eval().requires_grad_(False)
    _round_convolutions(network, dtype)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def run(network: Trunk) -> list[Tensor]:
    """The output, and of a classifier the gradient at its input, too."""
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(1, 3, 8, 8, generator=generator).to(DEVICE), torch.tensor([700.0], device=DEVICE)
    if isinstance(network, Classifier):
        logits = network(x.requires_grad_(), t)
        return [logits, *torch.autograd.grad(logits.log_softmax(1)[:, 3].sum(), x)]
    inputs: dict[str, Tensor] = {}
    if network.settings.num_classes:
        inputs["y"] = torch.tensor([3], device=DEVICE)
    if isinstance(network, Upsampler):
        inputs["low_res"] = torch.rand(1, 3, 4, 4, generator=generator).to(DEVICE)
    with torch.no_grad():
        return [network(x, t, **inputs)]


@on_a_device
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in NETWORKS), ("classifier", torch.bfloat16)]
)
def test_networks(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of the plain modules, from channels-last maps all the way, and the same bytes each time."""
    network = prepared(name, dtype)
    with arithmetic("reference"):
        expected = run(network)
        exact = run(prepared(name, torch.float32))
        use_kernels(network)
        kernels = network.kernels
        use_kernels(network)
        assert network.kernels is kernels
        convolve = F.conv2d

        def checked(x: Tensor, *rest: Any, **options: Any) -> Tensor:
            assert x.is_contiguous(memory_format=torch.channels_last)
            return convolve(x, *rest, **options)

        monkeypatch.setattr(F, "conv2d", checked)
        found = run(network)
    for ours, plain, true in zip(found, expected, exact, strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == plain.shape
        if dtype == torch.float32:
            assert error(ours, plain) < 1e-5
        else:
            # Twice, because Triton's interpreter truncates to bfloat16, where a GPU rounds to the nearest.
            assert error(ours, true) < 2 * error(plain, true) + 1e-3
    if name == "classifier":
        with arithmetic("reference"):
            assert all(map(torch.equal, run(network), found))
