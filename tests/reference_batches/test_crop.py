"""ADM's crop, pixel by pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from photographs import by_hand, contents
from PIL import Image

from evalkit.errors import ImageError
from reference_batches.build import Settings, build
from reference_batches.crop import center_crop


@pytest.mark.parametrize("size", [64, 200])
def test_photographs_are_cropped_as_by_hand(tree: Path, tmp_path: Path, size: int) -> None:
    build(tree, tmp_path / "ref.npz", Settings(size=size, statistics="none"))
    built = contents(tmp_path / "ref.npz")["arr_0"]
    paths = sorted(tree.rglob("n*_*"), key=lambda path: path.relative_to(tree).as_posix())
    assert len(built) == len(paths) == 300
    for path, pixels in zip(paths, built, strict=True):
        np.testing.assert_array_equal(pixels, by_hand(path.read_bytes(), size), err_msg=str(path))


def crop(pixels: Any, size: int) -> NDArray[np.uint8]:
    return center_crop("image", Image.fromarray(np.asarray(pixels, np.uint8)), size)


def grey(rows: Any) -> NDArray[np.uint8]:
    return np.repeat(np.asarray(rows, np.uint8)[:, :, None], 3, axis=2)


def test_exactly_twice_the_size_is_a_mean_of_four() -> None:
    rows = np.array([[0, 4, 10, 10], [8, 12, 10, 30], [1, 1, 200, 100], [1, 1, 100, 0]])
    np.testing.assert_array_equal(crop(grey(rows), 2)[..., 0], [[6, 15], [1, 100]])


def test_one_pixel_less_than_twice_is_not_halved() -> None:
    ramp = grey(np.tile(np.arange(7) * 30, (7, 1)))
    by_bicubic = Image.fromarray(ramp).resize((4, 4), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(crop(ramp, 4), np.asarray(by_bicubic))
    assert not np.array_equal(
        crop(ramp, 4), np.asarray(Image.fromarray(ramp).resize((4, 4), Image.Resampling.BOX))
    )


def test_the_shorter_side_decides_and_the_offset_is_rounded_down() -> None:
    columns = grey(np.tile(np.arange(9) * 10, (4, 1)))  # landscape: 9 wide, 4 high
    np.testing.assert_array_equal(crop(columns, 4), columns[:, 2:6])
    np.testing.assert_array_equal(crop(columns.swapaxes(0, 1), 4), columns.swapaxes(0, 1)[2:6])  # portrait


def test_odd_sides_lose_a_pixel_when_halved() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8))
    halved = image.resize((6, 4), Image.Resampling.BOX)
    np.testing.assert_array_equal(center_crop("image", image, 4), np.asarray(halved)[:, 1:5])


def test_smaller_than_the_size_is_enlarged() -> None:
    assert (crop(grey(np.full((3, 5), 77)), 8) == 77).all()
    assert crop(grey(np.full((3, 5), 77)), 8).shape == (8, 8, 3)


def test_of_the_size_is_left_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(crop(pixels, 16), pixels)


def test_too_narrow() -> None:
    with pytest.raises(ImageError, match="image: 30000x1 pixels, too narrow"):
        crop(np.zeros((1, 30000, 3)), 256)


@pytest.mark.parametrize("kind", ["npz", "npy", "array", "hdf5"])
def test_arrays_are_cropped_too(tmp_path: Path, kind: str) -> None:
    import h5py

    pixels = np.random.default_rng(0).integers(0, 256, (70, 20, 30, 3), dtype=np.uint8)
    source: Any = {"array": pixels}.get(kind, tmp_path / f"x.{kind}")
    if kind == "npz":
        np.savez(source, arr_0=pixels, arr_1=np.arange(70) % 3)
    elif kind == "npy":
        np.save(source, pixels)
    elif kind == "hdf5":
        with h5py.File(source, "w") as file:
            file["images"] = pixels
    build(source, tmp_path / "ref.npz", Settings(size=8, images=30, statistics="none"))
    built = contents(tmp_path / "ref.npz")
    for index, found in zip(built["indices"], built["arr_0"], strict=True):
        np.testing.assert_array_equal(found, center_crop("", Image.fromarray(pixels[index]), 8))
    if kind == "npz":
        np.testing.assert_array_equal(built["arr_1"], built["indices"] % 3)
