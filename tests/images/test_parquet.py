"""Parquet files of encoded images, as the hub ships them."""

import sys

import numpy as np
import pytest
from containers import (
    PIXELS,
    bad,
    encoded,
    parquet_folder,
    write_parquet,
)
from optional import optional

from evalkit.errors import ImageError, MissingDependencyError
from evalkit.images import open_image_files, open_images


def test_parquet_labels(tmp_path):
    source = open_images(parquet_folder(tmp_path / "x"))
    np.testing.assert_array_equal(source.labels, np.arange(7))
    assert open_images(write_parquet(tmp_path / "y.parquet", [encoded(PIXELS[0])])).labels is None


def test_parquet_reads_the_rows_that_are_asked_for(tmp_path):
    files = open_image_files(parquet_folder(tmp_path / "x"))
    assert [name for name, _ in files.read([1, 3, 4, 6])] == [
        "train-00000-of-00002.parquet/00000001",
        "train-00000-of-00002.parquet/00000003",
        "train-00001-of-00002.parquet/00000000",
        "train-00001-of-00002.parquet/00000002",
    ]
    assert [data for _, data in files.read([0, 5])] == [encoded(PIXELS[0]), encoded(PIXELS[5])]
    assert list(files.read([])) == []


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"picture": [b"x"], "mask": [b"y"]}, "picture, mask of"),
        ({"text": ["x"]}, "none of the columns text"),
    ],
)
def test_parquet_without_a_clear_image_column(tmp_path, columns, found):
    optional("pyarrow.parquet", "parquet").write_table(
        optional("pyarrow", "parquet").table(columns), tmp_path / "x.parquet"
    )
    bad(tmp_path / "x.parquet", "which column holds the images", found)


def test_parquet_of_paths_alone(tmp_path):
    pyarrow = optional("pyarrow", "parquet")
    table = pyarrow.table({"image": [{"bytes": None, "path": "a.png"}, {"bytes": b"x", "path": "b.png"}]})
    optional("pyarrow.parquet", "parquet").write_table(table, tmp_path / "x.parquet")
    bad(tmp_path / "x.parquet", "x.parquet/00000000", "has no bytes", error=ImageError)


def test_parquet_of_no_rows_and_damaged(tmp_path):
    pyarrow = optional("pyarrow", "parquet")
    none = pyarrow.array([], pyarrow.binary())
    bad(write_parquet(tmp_path / "x.parquet", none, as_bytes=True), "no rows")
    data = write_parquet(tmp_path / "y.parquet", [encoded(x) for x in PIXELS]).read_bytes()
    (tmp_path / "y.parquet").write_bytes(data[: len(data) // 2])
    bad(tmp_path / "y.parquet", "y.parquet", "copy it again")


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet", [encoded(PIXELS[0])])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'evalkit\[parquet\]'"):
        open_images(path)


def test_parquet_says_what_it_leaves_out(tmp_path):
    contents = [encoded(x) for x in PIXELS]
    source = open_images(write_parquet(tmp_path / "a.parquet", contents, label=[0, 1, None, 1, 0, 1, 0]))
    assert source.labels is None
    assert source.notes == ("The labels (column label) are left out: 1 of 7 are null.",)
    source = open_images(
        write_parquet(tmp_path / "b.parquet", contents, label=["cat"] * 7, fine_label=[1] * 7)
    )
    assert "expected integers, found string" in source.notes[0]
    assert "not used: fine_label" in source.notes[1]
    (tmp_path / "x").mkdir()
    write_parquet(tmp_path / "x" / "1.parquet", contents[:3], label=[1, 2, 3])
    write_parquet(tmp_path / "x" / "2.parquet", contents[3:])
    assert "The labels are left out: 1 of 2 files have a column label." in open_images(tmp_path / "x").notes


def make_parquet(path, images, labels, unused=None):
    """For the contract of formats."""
    others = {unused: ["text"] * len(images)} if unused else {}
    write_parquet(path, [encoded(image) for image in images], label=labels.tolist(), **others)
