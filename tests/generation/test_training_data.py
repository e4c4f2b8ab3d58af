"""The images of training: every one once a pass, flips and crops."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from training_runs import IMAGES, LABELS, write

from evalkit.images import open_images
from generation import training_data
from generation.training_data import batches, load_pixels, order, resize_crop


def made(steps: range, share: slice = slice(None), **changes: Any) -> list[training_data.Batch]:
    settings: dict[str, Any] = {"size": 8, "seed": 3, "batch_size": 6, "flip": False, "crop": False}
    return list(batches(IMAGES, LABELS, steps=steps, share=share, **(settings | changes)))


def pixels(batch: training_data.Batch) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = (
        ((batch.x_0 + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    )
    return array


def test_a_pass_sees_every_image_once_and_seeds_and_passes_differ() -> None:
    seen = np.concatenate([pixels(batch) for batch in made(range(20))])  # 120 images: six passes of 20
    for epoch in range(6):
        chosen = order(3, epoch, 20)
        assert sorted(chosen) == list(range(20))
        assert np.array_equal(seen[epoch * 20 : (epoch + 1) * 20], IMAGES[chosen])
    assert not np.array_equal(order(3, 0, 20), order(3, 1, 20))
    assert not np.array_equal(order(3, 0, 20), order(4, 0, 20))
    classes = np.concatenate([batch.y for batch in made(range(20)) if batch.y is not None])
    assert np.array_equal(classes[:20], LABELS[order(3, 0, 20)])


def test_a_step_is_the_same_alone_and_in_shares() -> None:
    (whole,) = made(range(7, 8), flip=True, crop=True)
    parts = [made(range(7, 8), slice(i, i + 2), flip=True, crop=True)[0] for i in (0, 2, 4)]
    assert torch.equal(torch.cat([part.x_0 for part in parts]), whole.x_0)
    assert torch.equal(torch.cat([part.positions for part in parts]), whole.positions)
    assert torch.equal(made(range(5, 8), flip=True, crop=True)[2].x_0, whole.x_0)


def test_flips_mirror_half_of_the_images() -> None:
    plain = np.concatenate([pixels(batch) for batch in made(range(100))])
    flipped = np.concatenate([pixels(batch) for batch in made(range(100), flip=True)])
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(flipped, plain, strict=True)]
    kept = [np.array_equal(a, b) for a, b in zip(flipped, plain, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 0.4 < np.mean(mirrored) < 0.6


def test_crops_are_windows_of_the_image_as_pillow_enlarges_it() -> None:
    smooth = np.asarray(Image.fromarray(IMAGES[0]).resize((20, 16), Image.Resampling.BICUBIC))
    source = torch.from_numpy(smooth.copy()).permute(2, 0, 1)[None]
    for share, side in ((0.0, 16), (0.5, 18), (0.999, 20)):  # 16 / 0.8 is the largest
        enlarged = Image.fromarray(smooth).resize((round(20 * side / 16), side), Image.Resampling.BICUBIC)
        numbers = torch.tensor([[share, 0.999, 0.999]], dtype=torch.float64)
        found = resize_crop(source, 16, numbers)[0].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(found - np.asarray(enlarged)[-16:, -16:]).max() <= 1
    centre = resize_crop(source, 16)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(centre, smooth[:, 2:18])


def test_images_that_do_not_fit_into_memory_go_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, file = open_images(write(tmp_path)), tmp_path / "images.u8"
    assert np.array_equal(load_pixels(source, file), IMAGES)
    assert not file.exists()
    monkeypatch.setattr(os, "sysconf", lambda name: 80)  # 6,400 bytes: the images take 3,840
    on_disk = load_pixels(source, file)
    assert isinstance(on_disk, np.memmap)
    assert np.array_equal(on_disk, IMAGES)
    assert np.array_equal(load_pixels(source, file), IMAGES)
