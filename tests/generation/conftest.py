"""Small networks, a run of them, and what is logged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_networks
import torch
from sampling_runs import SETTINGS, Messages, load, sampled
from small_networks import SIZE

from generation.batch import Networks


@pytest.fixture(scope="module")
def one_thread() -> Any:
    """So that other processes with one give the same bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each kind of network."""
    folder = tmp_path_factory.mktemp("networks")
    write = small_networks.write
    return {
        "unet": write(folder, "unet", "diffusion"),
        "classifier": write(folder, "classifier", "classifier", seed=1),
        "unconditional": write(folder, "unconditional", "diffusion", num_classes=None, seed=2),
        "upsampler": write(folder, "upsampler", "upsampler", image_size=16, low_res_size=SIZE, seed=3),
    }


@pytest.fixture(scope="module")
def networks(files: dict[str, Path]) -> Networks:
    return load(files)


@pytest.fixture(scope="module")
def expected(one_thread: None, networks: Networks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of SETTINGS, sampled without any trouble, two at a time."""
    return sampled(SETTINGS, networks, tmp_path_factory.mktemp("expected") / "run", batch_size=2)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Messages:
    """What was logged so far."""
    caplog.set_level(logging.INFO, logger="generation")
    return lambda: caplog.messages


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small images for an upsampler."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("base") / "base.npz"
    images = random.integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    np.savez(path, arr_0=images, arr_1=np.array([3, 1, 4, 1, 5]))
    return path
