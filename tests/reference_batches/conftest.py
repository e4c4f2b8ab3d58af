"""Photographs in folders and batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from optional import optional
from photographs import encoded, file_of, photographs
from PIL import Image


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 photographs in class folders, as ImageNet's training images lie."""
    root = tmp_path_factory.mktemp("imagenet") / "train"
    for index, image in enumerate(photographs(300)):
        suffix, data = file_of(image)
        path = root / f"n{index % 7:08d}" / f"n{index % 7:08d}_{index}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


@pytest.fixture
def with_bad(tmp_path: Path) -> tuple[Path, list[int]]:
    """60 photographs, those with the returned indices damaged."""
    folder = tmp_path / "photos"
    folder.mkdir()
    bad = [0, 7, 8, 31, 59]
    for index, image in enumerate(photographs(60, seed=1)):
        data = encoded(image.convert("RGB"), "JPEG")
        (folder / f"{index:03d}.jpg").write_bytes(data[: len(data) // 2] if index in bad else data)
    return folder, bad


@pytest.fixture
def photos() -> NDArray[np.uint8]:
    """(120, 64, 64, 3): reduced cut-outs of scikit-learn's two photographs."""
    pair = optional("sklearn.datasets", "demo").load_sample_images().images
    random = np.random.default_rng(0)
    cut: list[NDArray[np.uint8]] = []
    for index in range(120):
        photo = pair[index % 2]
        top, left = random.integers(0, photo.shape[0] - 130), random.integers(0, photo.shape[1] - 130)
        part = Image.fromarray(photo[top : top + 130, left : left + 130])
        cut.append(np.asarray(part.resize((64, 64), Image.Resampling.BICUBIC)))
    return np.stack(cut)


@pytest.fixture
def batch(photos: NDArray[np.uint8], tmp_path: Path) -> Path:
    statistics = {
        "mu": np.zeros(2048),
        "sigma": np.eye(2048),
        "mu_s": np.zeros(2023),
        "sigma_s": np.eye(2023, dtype=np.float32),
    }
    labels = np.random.default_rng(0).integers(0, 1000, 120)
    np.savez(tmp_path / "batch.npz", arr_0=photos, arr_1=labels, **statistics)
    return tmp_path / "batch.npz"
