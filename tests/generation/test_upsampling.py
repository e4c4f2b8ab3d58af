"""Upsampling: large images from small ones, whose classes and order they have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sampling_runs import images_of, load, sampled
from small_networks import SIZE

from evalkit.errors import InputError
from evalkit.images import open_images
from generation.batch import Networks
from generation.checkpoints import load_network
from generation.denoisers import EpsDenoiser
from generation.networks.upsampler import Upsampler
from generation.noise import Streams
from generation.pixels import to_uint8
from generation.samplers.ddim import DDIM
from generation.schedule import make_schedule
from generation.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

UPSAMPLING = Settings(count=5, sampler=DDIM(), respacing="ddim4", shard_size=2)


def test_upsampling_is_ddim_by_hand(files: dict[str, Path], base: Path, tmp_path: Path) -> None:
    path = sampled(UPSAMPLING, load(files, "upsampler", None), tmp_path / "run", base=open_images(base))
    assert path.name == "samples_5x16x16x3.npz"
    source = open_images(path)
    assert source.labels is not None
    assert source.labels.tolist() == [3, 1, 4, 1, 5]
    network = load_network(files["upsampler"]).network
    assert isinstance(network, Upsampler)
    with np.load(base) as file:
        low_res = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1
        y = torch.from_numpy(file["arr_1"])
    noise = Streams(0, range(5), (3, 16, 16), torch.device("cpu"))
    denoiser = EpsDenoiser(
        lambda x, t: network(x, torch.full((5,), t), y, low_res=low_res),
        make_schedule("linear", 1000, "ddim4"),
    )
    x = DDIM()(denoiser, noise.start(), noise)
    assert np.abs(to_uint8(x).astype(np.int16) - images_of(path)).max() <= 1


def test_upsampling_bad_input(files: dict[str, Path], base: Path, tmp_path: Path) -> None:
    upsampler = load(files, "upsampler", None)

    def fails(match: str, source: Any, networks: Networks = upsampler) -> None:
        with pytest.raises(InputError, match=match):
            sampled(UPSAMPLING, networks, tmp_path / "run", base=open_images(source))

    images = np.zeros((5, SIZE, SIZE, 3), np.uint8)
    fails("no labels", images)
    fails(r"takes \(8, 8, 3\)", np.zeros((5, 9, 9, 3), np.uint8))
    fails("5 samples were requested", images[:4])
    fails("no upsampler", base, load(files, "unet", None))
    np.savez(tmp_path / "labels.npz", arr_0=images, arr_1=np.full(5, 10))
    fails("class 10 is out of range", tmp_path / "labels.npz")


def test_upsampling_another_base_is_another_run(files: dict[str, Path], base: Path, tmp_path: Path) -> None:
    upsampler = load(files, "upsampler", None)
    sampled(UPSAMPLING, upsampler, tmp_path / "run", base=open_images(base))
    with np.load(base) as file:
        np.savez(tmp_path / "other.npz", arr_0=file["arr_0"][::-1], arr_1=file["arr_1"])
    with pytest.raises(InputError, match=r"base\.sha256 was"):
        sampled(UPSAMPLING, upsampler, tmp_path / "run", base=open_images(tmp_path / "other.npz"))


def test_upsampling_with_a_preset_that_does_not(run: Callable[..., Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "small.npz", np.zeros((2, 64, 64, 3), np.uint8))
    result = run("upsample", tmp_path / "small.npz", "--preset", "imagenet64", "--out", tmp_path / "run")
    assert result.code == 2
    assert "use `evalkit sample`" in result.err
