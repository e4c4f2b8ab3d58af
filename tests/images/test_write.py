"""The npz writer: the same bytes for the same images, and never half a file."""

import zipfile

import numpy as np
import pytest
from containers import (
    PIXELS,
)

from evalkit.images import NpzWriter, open_images


def write_streamed(path, batches=(3, 1, 3), shape=PIXELS.shape):
    with NpzWriter.create(path, shape) as writer:
        start = 0
        for size in batches:
            writer.append(np.roll(PIXELS, -start, axis=0)[:size])
            start += size
        writer.add("arr_1", np.arange(7))
        writer.add("provenance", np.array("{}"))


def test_npz_writer_gives_what_numpy_reads(tmp_path):
    write_streamed(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["arr_0", "arr_1", "provenance"]
        np.testing.assert_array_equal(file["arr_0"], PIXELS)
        np.testing.assert_array_equal(file["arr_1"], np.arange(7))
    source = open_images(tmp_path / "a.npz")
    np.testing.assert_array_equal(np.concatenate(list(source.batches(2))), PIXELS)
    np.testing.assert_array_equal(source.labels, np.arange(7))
    np.savez(tmp_path / "b.npz", PIXELS)
    assert open_images(tmp_path / "b.npz").digest == source.digest


def test_npz_writer_gives_the_same_bytes_for_other_batches(tmp_path):
    write_streamed(tmp_path / "a.npz")
    write_streamed(tmp_path / "b.npz", (7,))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_npz_writer_marks_sizes_as_zip64(tmp_path):
    write_streamed(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {info.extract_version for info in archive.infolist()} >= {45}
        assert archive.testzip() is None


@pytest.mark.parametrize(
    ("batches", "message"), [((3,), "3 images were appended; 7"), ((7, 7), "14 images were")]
)
def test_npz_writer_refuses_another_number_of_images(tmp_path, batches, message):
    (tmp_path / "a.npz").write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        write_streamed(tmp_path / "a.npz", batches)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.npz", b"old")]


@pytest.mark.parametrize("bad", [PIXELS.astype(np.float32), PIXELS[:, :5]])
def test_npz_writer_refuses_another_shape_or_type(tmp_path, bad):
    with (
        pytest.raises(ValueError, match="expected uint8"),
        NpzWriter.create(tmp_path / "a.npz", PIXELS.shape) as w,
    ):
        w.append(bad)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_writer_leaves_the_old_file(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), NpzWriter.create(tmp_path / "a.npz", PIXELS.shape) as writer:
        writer.append(1 / 0)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.npz", b"old")]
