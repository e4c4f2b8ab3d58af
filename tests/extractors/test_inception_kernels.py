"""The Triton kernels of the Inception network, interpreted on the CPU, against torch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from evalkit.extractors.preprocess import interpolation, resize_tf1, scaled_input

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process that interprets Triton")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.skipif(INTERPRETED, reason="is that process")
def test_kernels_in_a_process_that_interprets_triton() -> None:
    """Triton reads the variable when it is loaded, and interprets only where no GPU is seen."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which torch brings for CUDA alone")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the interpreter: it rounds a fused multiply-add twice, and cuts bfloat16 off."""
    unit = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found, expected, rtol=unit, atol=4 * unit, equal_nan=True)


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def some_channels(like: torch.Tensor, channels: int, height: int, width: int) -> torch.Tensor:
    """Channels 3 and on of a wider tensor, channels-last."""
    wide = channels_last(len(like), channels + 7, height, width, dtype=like.dtype)
    return wide[:, 3 : 3 + channels]


@interpreted
@pytest.mark.parametrize(("height", "width"), [(1, 1), (20, 13), (17, 20), (40, 64)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_resize_and_scale(height: int, width: int, dtype: torch.dtype) -> None:
    from evalkit.extractors.inception_kernels import resize_and_scale

    images = torch.randint(0, 256, (2, height, width, 3), generator=torch.Generator().manual_seed(0))
    images = images.to(dtype) if dtype == torch.uint8 else images * 0.97
    expected = (resize_tf1(images.float(), 17) - 128) / 128
    tables = []
    for extent in (height, width):
        lower, upper, weight = (torch.from_numpy(part) for part in interpolation(extent, 17))
        tables.append((lower.int(), upper.int(), weight))
    for result in DTYPES:
        found = resize_and_scale(images, tables[0], tables[1], result)
        assert found.shape == (2, 3, 17, 17)
        assert found.is_contiguous(memory_format=torch.channels_last)
        check(found.permute(0, 2, 3, 1), expected.to(result))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_and_relu(dtype: torch.dtype) -> None:
    from evalkit.extractors.inception_kernels import add_bias_relu

    x, bias = channels_last(3, 40, 7, 9, dtype=dtype), torch.randn(40).to(dtype)
    x[0, 0, 0, 0] = torch.nan
    expected = (x.float() + bias.float()[:, None, None]).relu().to(dtype)
    out = some_channels(x, 40, 7, 9)
    check(add_bias_relu(x, bias, out), expected)
    part = add_bias_relu(x[:, 8:24], bias[8:24], channels_last(3, 16, 7, 9, dtype=dtype))
    check(part, expected[:, 8:24])
    check(add_bias_relu(x, bias, x), expected)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_pools(dtype: torch.dtype) -> None:
    from evalkit.extractors.inception_kernels import average_3x3, maximum_3x3

    x, bias = channels_last(3, 40, 11, 10, dtype=dtype), torch.randn(40).to(dtype)
    found = maximum_3x3(x, some_channels(x, 40, 5, 4))
    assert torch.equal(found, F.max_pool2d(x, 3, 2))
    expected = F.avg_pool2d(x.float(), 3, 1, 1, count_include_pad=False) + bias.float()[:, None, None]
    found = average_3x3(x, bias, some_channels(x, 40, 11, 10))
    check(found, expected.relu().to(dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [32, 64, 256, 299, 512])
def test_cuda_resize_has_the_bits_of_the_cpu(size: int) -> None:
    images = torch.randint(0, 256, (3, size, size + 1, 3), dtype=torch.uint8)
    for dtype in DTYPES:
        expected = scaled_input(images, 299, dtype)
        assert torch.equal(scaled_input(images.cuda(), 299, dtype).cpu(), expected)
