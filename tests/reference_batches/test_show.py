"""Showing a batch: what is in it, and what is unusual about it."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invoked import Result
from numpy.typing import NDArray
from PIL import Image

from evalkit.images import ImageSource, open_images
from evalkit.report.image_grid import grid
from reference_batches.convert import convert
from reference_batches.show import check, contents, describe, draw

Invoke = Callable[..., Result]


def findings(images: Any) -> list[str]:
    return [finding.what for finding in check(open_images(images, value_range="0..255"))]


def test_photographs_are_not_odd(photos: NDArray[np.uint8]) -> None:
    assert findings(photos) == []


def test_jpeg_is_seen_and_only_at_its_own_grid(photos: NDArray[np.uint8]) -> None:
    def through_jpeg(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=75)
        return np.asarray(Image.open(buffer))

    compressed = np.stack([through_jpeg(image) for image in photos])
    assert [text.split("(")[0] for text in findings(compressed)] == ["the edges of JPEG's 8x8 blocks show "]
    assert findings(np.ascontiguousarray(compressed[:, 3:, 3:])) == []


def test_constant_and_duplicate_images(photos: NDArray[np.uint8]) -> None:
    photos[[5, 70]] = 9
    photos[100] = photos[3]
    found = check(open_images(photos))
    assert [finding.what for finding in found] == [
        "2 images (5, 70) of one colour only",
        "2 exact duplicates: 70 = 5, 100 = 3",
    ]
    assert [finding.indices for finding in found] == [(5, 70), (70, 100)]


def test_classes_that_are_nearly_empty_or_absent(photos: NDArray[np.uint8], tmp_path: Path) -> None:
    labels = np.arange(120) % 3 * 2  # 0, 2, 4: none of 1 and 3
    labels[0] = 6
    np.savez(tmp_path / "x.npz", arr_0=photos, arr_1=labels)
    assert findings(tmp_path / "x.npz") == [
        "1 class (6) with less than a tenth of the average 30 images",
        "3 classes (1, 3, 5) below 6 without an image",
    ]


def test_millions_of_absent_classes_are_only_counted(photos: NDArray[np.uint8], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=photos, arr_1=np.arange(120) * 1000 + 800)
    assert findings(tmp_path / "x.npz")[-1] == (
        "119,681 classes (0, 1, 2, 3, 4, ...) below 119800 without an image"
    )


@pytest.mark.parametrize(
    ("low", "high", "reason"), [(0, 2**62, "ids or seeds"), (0, 2**32, "ids or seeds"), (-1, 3, "negative")]
)
def test_labels_that_are_no_classes(
    photos: NDArray[np.uint8], tmp_path: Path, run: Invoke, low: int, high: int, reason: str
) -> None:
    labels = np.random.default_rng(0).integers(low, high, 120)
    np.savez(tmp_path / "x.npz", arr_0=photos, arr_1=labels)
    (found,) = findings(tmp_path / "x.npz")
    assert f"from {labels.min()} to {labels.max()}: not class numbers" in found
    assert reason in found
    result = run("reference", "show", tmp_path / "x.npz", "--check")
    assert result.code == 0
    assert result.out.count(found) == 2


def test_bad_images_are_all_found(photos: NDArray[np.uint8], tmp_path: Path) -> None:
    floats = photos.astype(np.float32)
    floats[10, 0, 0, 0] = np.nan
    floats[64, 1, 1, 1] = 256
    floats[119] = -1
    floats[118] = 3
    np.savez(tmp_path / "x.npz", floats)
    found = check(open_images(tmp_path / "x.npz"))
    assert found[0].indices == (10, 64, 119)
    assert found[0].what.startswith("3 images (10, 64, 119) cannot be used. The first: ")
    assert "nan" in found[0].what
    assert found[1].what == "the file holds floats"
    assert found[2].indices == (118,)


def test_undecodable_files_are_found(photos: NDArray[np.uint8], tmp_path: Path) -> None:
    convert_to_folder = tmp_path / "x"
    np.savez(tmp_path / "x.npz", photos)
    convert(tmp_path / "x.npz", convert_to_folder)
    (convert_to_folder / "000070.png").write_bytes(b"no image")
    found = check(open_images(convert_to_folder))
    assert [finding.indices for finding in found] == [(70,)]


def test_a_damaged_container_ends_the_look(photos: NDArray[np.uint8], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", photos)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "x.npz").write_bytes(bytes(data))
    assert "cannot be read" in findings(tmp_path / "x.npz")[0]


def test_floats_cut_to_integers(photos: NDArray[np.uint8]) -> None:
    found = findings((photos > 100).astype(np.uint8))
    assert "no value is above 1" in found


def test_contents_of_any_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", weights=np.zeros((3, 4), np.float16), names=np.array(["a", "b"]))
    found = contents(tmp_path / "x.npz")
    assert found.arrays == (("weights", "float16", (3, 4)), ("names", "<U1", (2,)))
    assert found.images is None
    text = describe(found)
    assert "float16" in text
    assert "no images:" in text
    assert "has no arr_0" in text


def test_contents_of_types_that_are_never_loaded(tmp_path: Path) -> None:
    fields = np.zeros(2, [("名", np.int8)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy warns that only its newest format holds such names
        np.savez(tmp_path / "x.npz", objects=np.array([{}], dtype=object), fields=fields)
    objects, (key, _, shape) = contents(tmp_path / "x.npz").arrays
    assert objects == ("objects", "object", (1,))
    assert (key, shape) == ("fields", (2,))


def test_show_prints_what_is_there(photos: NDArray[np.uint8], tmp_path: Path, run: Invoke) -> None:
    np.savez(tmp_path / "x.npz", arr_0=photos, arr_1=np.arange(120) % 3)
    result = run("reference", "show", tmp_path / "x.npz", "--check", "--grid", tmp_path / "grid.png")
    assert result.code == 0
    assert "arr_0        uint8      (120, 64, 64, 3)" in result.out
    assert "120 images of 64x64, uint8, in an npz" in result.out
    assert "3 classes of 40 to 40 images" in result.out
    assert "no statistics" in result.out
    assert result.out.endswith("checked 120 images: nothing odd\n")
    # 64 of 120 images, as many rows as columns, a frame of one pixel around each.
    picture = Image.open(tmp_path / "grid.png")
    description = "64 of the 120 images of x.npz, evenly spread over it."
    assert picture.text == {"Title": "Images of x.npz", "Description": description}
    drawn = np.asarray(picture)
    assert drawn.shape == (8 * 66, 8 * 66, 3)
    np.testing.assert_array_equal(drawn[1:65, 1:65], photos[0])
    np.testing.assert_array_equal(drawn[-65:-1, -65:-1], photos[119])


@pytest.mark.parametrize(
    ("groups", "line"),
    [
        (["fid"], "statistics of 9 images: FID uses these"),
        (["fd_dinov2"], "statistics of 9 images: FD-DINOv2 uses these"),
        (["fid", "fd_dinov2"], "statistics of 9 images: FID and FD-DINOv2 use these"),
    ],
)
def test_show_names_the_scores_of_edm2s_statistics(
    groups: list[str], line: str, tmp_path: Path, run: Invoke
) -> None:
    widths = {"fid": 2048, "fd_dinov2": 1024}
    content = {group: {"mu": np.zeros(widths[group]), "sigma": np.eye(widths[group])} for group in groups}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"num_images": 9, **content}))
    result = run("reference", "show", tmp_path / "x.pkl")
    assert result.code == 0
    assert line in result.out.splitlines()


def test_show_names_the_scores_of_adms_statistics(batch: Path, run: Invoke) -> None:
    shown = run("reference", "show", batch).out.splitlines()
    assert "statistics of an unknown number of images: FID and sFID use these" in shown


@pytest.mark.parametrize("name", ["nowhere.npz", "text.txt"])
def test_show_of_nothing(tmp_path: Path, run: Invoke, name: str) -> None:
    (tmp_path / "text.txt").write_text("text")
    result = run("reference", "show", tmp_path / name)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"Error: {tmp_path / name}: ")


def test_grid_enlarges_small_images_by_a_whole_factor() -> None:
    images = np.arange(5 * 2 * 3 * 3, dtype=np.uint8).reshape(5, 2, 3, 3)
    drawn = grid(images, columns=3)
    assert drawn.shape == (2 * (2 * 20 + 2), 3 * (3 * 20 + 2), 3)
    np.testing.assert_array_equal(drawn[1:41, 1:61], images[0].repeat(20, axis=0).repeat(20, axis=1))
    np.testing.assert_array_equal(drawn[43:83:20, 63:123:20], images[4])
    assert (drawn[42:, 124:] == drawn[0, 0]).all()


def test_a_grid_reads_no_other_images(
    photos: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "x.npz", photos)
    images, asked = open_images(tmp_path / "x.npz"), []

    def counted(size: int, start: int, stop: int | None = None) -> Iterator[NDArray[Any]]:
        asked.append((size, start, stop))
        return ImageSource.checked_batches(images, size, start, stop)

    monkeypatch.setattr(images, "checked_batches", counted)
    draw(images, tmp_path / "grid.png", 4)
    assert asked == [(1, index, index + 1) for index in (0, 40, 79, 119)]
    with Image.open(tmp_path / "grid.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), grid(photos[[0, 40, 79, 119]]))


def test_a_grid_of_no_images_is_an_error(tmp_path: Path, run: Invoke) -> None:
    np.savez(tmp_path / "x.npz", other=np.zeros(3))
    result = run("reference", "show", tmp_path / "x.npz", "--grid", tmp_path / "grid.png")
    assert result.code == 2
    assert "x.npz holds no images" in result.err
    assert not (tmp_path / "grid.png").exists()


def test_a_zip_with_a_damaged_directory_is_named(batch: Path, run: Invoke) -> None:
    data = batch.read_bytes()
    at = data.rindex(b"PK\x01\x02")
    batch.write_bytes(data[:at] + b"XX" + data[at + 2 :])
    result = run("reference", "show", batch)
    assert result.code == 2
    assert f"{batch}: cannot be read (BadZipFile" in result.err
