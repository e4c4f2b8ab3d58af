"""What a batch holds and what is odd about it; and the same batch in another container."""

from __future__ import annotations

import io
import json
import os
import threading
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invoked import Result
from numpy.typing import NDArray
from optional import optional
from patience import SECONDS
from PIL import Image

from evalkit.errors import InputError, OutputError
from evalkit.images import open_images
from evalkit.report.image_grid import sheet
from reference_batches.convert import convert
from reference_batches.show import check, contents, describe

Run = Callable[..., Result]


@pytest.fixture
def photographs() -> NDArray[np.uint8]:
    """(120, 64, 64, 3): reduced cut-outs of scikit-learn's two photographs."""
    photos = optional("sklearn.datasets", "demo").load_sample_images().images
    random = np.random.default_rng(0)
    cut: list[NDArray[np.uint8]] = []
    for index in range(120):
        photo = photos[index % 2]
        top, left = random.integers(0, photo.shape[0] - 130), random.integers(0, photo.shape[1] - 130)
        part = Image.fromarray(photo[top : top + 130, left : left + 130])
        cut.append(np.asarray(part.resize((64, 64), Image.Resampling.BICUBIC)))
    return np.stack(cut)


def findings(images: Any) -> list[str]:
    return [finding.what for finding in check(open_images(images, value_range="0..255"))]


# ------------------------------------------------------------------------------------------- the check


def test_photographs_are_not_odd(photographs: NDArray[np.uint8]) -> None:
    assert findings(photographs) == []


def test_jpeg_is_seen_and_only_at_its_own_grid(photographs: NDArray[np.uint8]) -> None:
    def through_jpeg(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=75)
        return np.asarray(Image.open(buffer))

    compressed = np.stack([through_jpeg(image) for image in photographs])
    assert [text.split("(")[0] for text in findings(compressed)] == ["the edges of JPEG's 8x8 blocks show "]
    assert findings(np.ascontiguousarray(compressed[:, 3:, 3:])) == []


def test_constant_and_duplicate_images(photographs: NDArray[np.uint8]) -> None:
    photographs[[5, 70]] = 9
    photographs[100] = photographs[3]
    found = check(open_images(photographs))
    assert [finding.what for finding in found] == [
        "2 images (5, 70) of one colour only",
        "2 exact duplicates: 70 = 5, 100 = 3",
    ]
    assert [finding.indices for finding in found] == [(5, 70), (70, 100)]


def test_classes_that_are_nearly_empty_or_absent(photographs: NDArray[np.uint8], tmp_path: Path) -> None:
    labels = np.arange(120) % 3 * 2  # 0, 2, 4: none of 1 and 3
    labels[0] = 6
    np.savez(tmp_path / "x.npz", arr_0=photographs, arr_1=labels)
    assert findings(tmp_path / "x.npz") == [
        "1 class (6) with less than a tenth of the average 30 images",
        "3 classes (1, 3, 5) below 6 without an image",
    ]


@pytest.mark.parametrize(
    ("low", "high", "reason"), [(0, 2**62, "ids or seeds"), (0, 2**32, "ids or seeds"), (-1, 3, "negative")]
)
def test_labels_that_are_no_classes(
    photographs: NDArray[np.uint8], tmp_path: Path, run: Run, low: int, high: int, reason: str
) -> None:
    labels = np.random.default_rng(0).integers(low, high, 120)
    np.savez(tmp_path / "x.npz", arr_0=photographs, arr_1=labels)
    (found,) = findings(tmp_path / "x.npz")
    assert f"from {labels.min()} to {labels.max()}: no numbers of classes" in found
    assert reason in found
    result = run("reference", "show", tmp_path / "x.npz", "--check")
    assert result.code == 0
    assert result.out.count(found) == 2


def test_bad_images_are_all_found(photographs: NDArray[np.uint8], tmp_path: Path) -> None:
    floats = photographs.astype(np.float32)
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


def test_undecodable_files_are_found(photographs: NDArray[np.uint8], tmp_path: Path) -> None:
    convert_to_folder = tmp_path / "x"
    np.savez(tmp_path / "x.npz", photographs)
    convert(tmp_path / "x.npz", convert_to_folder)
    (convert_to_folder / "000070.png").write_bytes(b"no image")
    found = check(open_images(convert_to_folder))
    assert [finding.indices for finding in found] == [(70,)]


def test_a_damaged_container_ends_the_look(photographs: NDArray[np.uint8], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", photographs)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "x.npz").write_bytes(bytes(data))
    assert "cannot be read" in findings(tmp_path / "x.npz")[0]


def test_floats_cut_to_integers(photographs: NDArray[np.uint8]) -> None:
    found = findings((photographs > 100).astype(np.uint8))
    assert "no value is above 1" in found


# ------------------------------------------------------------------------------------------- the rest


def test_contents_of_any_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", weights=np.zeros((3, 4), np.float16), names=np.array(["a", "b"]))
    found = contents(tmp_path / "x.npz")
    assert found.arrays == (("weights", "float16", (3, 4)), ("names", "<U1", (2,)))
    assert found.images is None
    text = describe(found)
    assert "float16" in text
    assert "no images:" in text
    assert "has no arr_0" in text


def test_show_prints_what_is_there(photographs: NDArray[np.uint8], tmp_path: Path, run: Run) -> None:
    np.savez(tmp_path / "x.npz", arr_0=photographs, arr_1=np.arange(120) % 3)
    result = run("reference", "show", tmp_path / "x.npz", "--check", "--grid", tmp_path / "grid.png")
    assert result.code == 0
    assert "arr_0        uint8      (120, 64, 64, 3)" in result.out
    assert "120 images of 64x64, uint8, in a npz" in result.out
    assert "3 classes of 40 to 40 images" in result.out
    assert "no statistics" in result.out
    assert result.out.endswith("checked 120 images: nothing odd\n")
    # 64 of 120 images, as many rows as columns, a frame of one pixel around each.
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (8 * 66, 8 * 66, 3)
    np.testing.assert_array_equal(grid[1:65, 1:65], photographs[0])
    np.testing.assert_array_equal(grid[-65:-1, -65:-1], photographs[119])


@pytest.mark.parametrize("name", ["nowhere.npz", "text.txt"])
def test_show_of_nothing(tmp_path: Path, run: Run, name: str) -> None:
    (tmp_path / "text.txt").write_text("text")
    result = run("reference", "show", tmp_path / name)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"Error: {tmp_path / name}: ")


def test_sheet_enlarges_small_images_by_a_whole_factor() -> None:
    images = np.arange(5 * 2 * 3 * 3, dtype=np.uint8).reshape(5, 2, 3, 3)
    drawn = sheet(images, columns=3)
    assert drawn.shape == (2 * (2 * 20 + 2), 3 * (3 * 20 + 2), 3)
    np.testing.assert_array_equal(drawn[1:41, 1:61], images[0].repeat(20, axis=0).repeat(20, axis=1))
    np.testing.assert_array_equal(drawn[43:83:20, 63:123:20], images[4])
    assert (drawn[42:, 124:] == drawn[0, 0]).all()


# ------------------------------------------------------------------------------------------ converting


@pytest.fixture
def batch(photographs: NDArray[np.uint8], tmp_path: Path) -> Path:
    statistics = {
        "mu": np.zeros(2048),
        "sigma": np.eye(2048),
        "mu_s": np.zeros(2023),
        "sigma_s": np.eye(2023, dtype=np.float32),
    }
    labels = np.random.default_rng(0).integers(0, 1000, 120)
    np.savez(tmp_path / "batch.npz", arr_0=photographs, arr_1=labels, **statistics)
    return tmp_path / "batch.npz"


def test_round_trips_keep_pixels_order_and_labels(batch: Path, tmp_path: Path) -> None:
    convert(batch, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "x.zip")
    convert(tmp_path / "x.zip", tmp_path / "back.npz")
    with np.load(batch) as before, np.load(tmp_path / "back.npz") as after:
        assert sorted(after.files) == ["arr_0", "arr_1"]
        for key in after.files:
            np.testing.assert_array_equal(before[key], after[key])
            assert before[key].dtype == after[key].dtype


def test_labels_lie_where_other_tools_look(batch: Path, tmp_path: Path) -> None:
    convert(batch, tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        labels = json.loads(archive.read("dataset.json"))["labels"]
        assert archive.namelist()[0] == "000000.png"
    assert [name for name, _ in labels] == [f"{index:06d}.png" for index in range(120)]
    assert [label for _, label in labels] == np.load(batch)["arr_1"].tolist()


def test_statistics_stay_or_a_note_says_that_they_do_not(batch: Path, tmp_path: Path, run: Run) -> None:
    convert(batch, tmp_path / "copy.npz")
    with np.load(batch) as before, np.load(tmp_path / "copy.npz") as after:
        for key in ("mu", "sigma", "mu_s", "sigma_s"):
            np.testing.assert_array_equal(before[key], after[key])
    result = run("reference", "convert", batch, tmp_path / "folder")
    assert result.code == 0
    assert result.out.startswith(f"{tmp_path / 'folder'}: 120 images of {batch}\nnote: The statistics of")


def test_the_same_images_give_the_same_zip(batch: Path, tmp_path: Path) -> None:
    convert(batch, tmp_path / "a.zip")
    convert(batch, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


@pytest.mark.parametrize("name", ["x.zip", "x.npz", "folder"])
def test_a_broken_conversion_leaves_nothing_new(batch: Path, tmp_path: Path, name: str) -> None:
    data = bytearray(batch.read_bytes())
    data[120 * 64 * 64] ^= 255
    batch.write_bytes(bytes(data))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match="cannot be read"):
        convert(batch, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_that_is_there_is_left_alone(batch: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="is there already"):
        convert(batch, tmp_path / "folder")


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.h5", "x.NPY"])
def test_other_kinds_of_file_are_not_written_as_folders(batch: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="an npz, a zip or a folder"):
        convert(batch, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_floats_are_not_rounded(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", np.full((2, 4, 4, 3), 77.5, np.float32))
    with pytest.raises(InputError, match="holds floats, and 8-bit files would change the metrics"):
        convert(tmp_path / "x.npz", tmp_path / "x.zip")


@pytest.mark.parametrize("name", ["x.zip", "x.npz"])
def test_converting_holds_few_images(tmp_path: Path, name: str) -> None:
    # So large that some batches of 64 and the list of members of a zip weigh little.
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "big.npz", pixels)
    size = pixels.nbytes
    del pixels
    convert(tmp_path / "big.npz", tmp_path / f"warm-up.{name}")
    tracemalloc.start()
    convert(tmp_path / "big.npz", tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 3, f"{peak:,} bytes for {size:,}"


@pytest.mark.parametrize(
    "text",
    ["no json", '{"labels": [["000000.png", 1]]}', '{"labels": null}', '{"labels": [["a", 0.5]]}', "[]"],
)
def test_labels_that_do_not_fit_are_noted(batch: Path, tmp_path: Path, text: str) -> None:
    convert(batch, tmp_path / "folder")
    (tmp_path / "folder" / "dataset.json").write_text(text)
    images = open_images(tmp_path / "folder")
    assert images.labels is None
    assert images.notes == ("dataset.json is left out: it has not one integer label for each image.",)


def test_a_sheet_of_no_images_is_an_error(tmp_path: Path, run: Run) -> None:
    np.savez(tmp_path / "x.npz", other=np.zeros(3))
    result = run("reference", "show", tmp_path / "x.npz", "--grid", tmp_path / "grid.png")
    assert result.code == 2
    assert "x.npz holds no images" in result.err
    assert not (tmp_path / "grid.png").exists()


def test_a_zip_with_a_damaged_directory_is_named(batch: Path, run: Run) -> None:
    data = batch.read_bytes()
    at = data.rindex(b"PK\x01\x02")
    batch.write_bytes(data[:at] + b"XX" + data[at + 2 :])
    result = run("reference", "show", batch)
    assert result.code == 2
    assert f"{batch}: no valid zip" in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("reference", "show", "{batch}", "--grid", "{batch}"),
        ("reference", "convert", "{batch}", "{batch}"),
        ("reference", "build", "{batch}", "-o", "{batch}", "--size", "8", "--statistics", "none"),
        ("compare", "{batch}", "{batch}", "--json", "{batch}"),
        ("features", "{batch}", "-o", "{batch}"),
        ("stats", "{batch}", "-o", "{batch}"),
        ("reference", "convert", "{batch}", "/dev/full"),
    ],
)
def test_an_input_is_never_overwritten(batch: Path, run: Run, arguments: tuple[str, ...]) -> None:
    before = batch.read_bytes()
    result = run(*(argument.format(batch=batch) for argument in arguments))
    assert (result.code, result.out) == (2, "")
    assert "Cannot write" in result.err or "is there already" in result.err
    assert batch.read_bytes() == before


def test_two_conversions_into_one_folder(batch: Path, tmp_path: Path) -> None:
    """Both write at the same time; the first to end has the name."""
    barrier = threading.Barrier(2)

    def one(_: int) -> str:
        met = []

        def progress(stage: str, done: int, total: int) -> None:
            if not met:
                met.append(stage)
                barrier.wait(SECONDS)

        try:
            convert(batch, tmp_path / "out", progress)
        except OutputError as error:
            return str(error)
        return "whole"

    with ThreadPoolExecutor(2) as pool:
        found = sorted(pool.map(one, range(2)))
    assert found[1] == "whole"
    assert "Cannot write" in found[0] or "is there already" in found[0]
    np.testing.assert_array_equal(
        next(open_images(tmp_path / "out").batches(9)), next(open_images(batch).batches(9))
    )
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []


def test_what_a_killed_conversion_left_is_removed(batch: Path, tmp_path: Path) -> None:
    old, new, other = (tmp_path / f".{name}.partial" for name in ("out.1", "out.2", "another.1"))
    for left in (old, new, other):
        left.mkdir()
        (left / "0.png").touch()
    for left in (old, other):
        os.utime(left, (0, 0))
    convert(batch, tmp_path / "out")
    assert (old.exists(), new.exists(), other.exists()) == (False, True, True)
