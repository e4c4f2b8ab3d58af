"""Converting a batch: the same images in another container."""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from invoked import Result
from patience import SECONDS

from evalkit.errors import InputError, OutputError
from evalkit.images import open_images
from reference_batches.convert import convert

Invoke = Callable[..., Result]


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


def test_statistics_stay_or_a_note_says_that_they_do_not(batch: Path, tmp_path: Path, run: Invoke) -> None:
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


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.h5", "x.NPY", "x.png"])
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
    assert images.notes == ("dataset.json is left out: expected one integer label for each image.",)


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
def test_an_input_is_never_overwritten(batch: Path, run: Invoke, arguments: tuple[str, ...]) -> None:
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
