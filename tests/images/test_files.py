"""Folders of image files, and what all containers of image files say about their members."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from containers import (
    PIXELS,
    bad,
    encoded,
    image_containers,
    image_files,
    limit_images_to,
    numbered_files,
    parquet_folder,
    write_folder,
    write_parquet,
    write_tar,
    write_zip,
)
from PIL import Image

from evalkit.errors import ImageError
from evalkit.images import open_image_files, open_images


def test_files_that_are_not_images_are_left_out_and_counted(tmp_path):
    extra = {"labels.csv": b"", "README": b"", "x.gif": b"", ".hidden/a.png": b"", "__MACOSX/._a.png": b""}
    files = image_files() | extra
    for path in (
        write_folder(tmp_path / "x", files),
        write_zip(tmp_path / "x.zip", files),
        write_tar(tmp_path / "x.tar", files),
    ):
        source = open_images(path)
        assert len(source) == 7
        assert "1 .csv, 1 .gif, 2 hidden, 1 without suffix" in source.notes[0]


def test_linked_folders_are_not_entered_and_said_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # long paths are cut
    folder = write_folder(tmp_path / "x", image_files())
    (folder / "loop").symlink_to(folder)
    source = open_images("x")
    assert len(source) == 7
    assert "loop" in source.notes[0]


def test_folder_without_images(tmp_path):
    bad(
        write_folder(tmp_path / "x", {"a.txt": b"", "b.txt": b"", "c.gif": b""}),
        "no images",
        "1 .gif, 2 .txt",
    )
    (tmp_path / "y").mkdir()
    bad(tmp_path / "y", "no images", "no files", ".png")
    bad(write_zip(tmp_path / "x.zip", {"a.txt": b""}), "x.zip", "no images", "1 .txt")
    bad(write_tar(tmp_path / "x.tar", {"a.txt": b""}), "x.tar", "no images", "1 .txt")


def test_huge_members_are_refused_unread(tmp_path, monkeypatch):
    limit_images_to(1000, monkeypatch)
    monkeypatch.setattr(Image, "open", lambda *args, **options: pytest.fail("it was read"))
    for path in image_containers(tmp_path, {"a.png": bytes(1001)}):
        bad(path, "a.png: 1001 bytes", "limited to 1000", error=ImageError)


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    folder, scandir = write_folder(tmp_path / "x", image_files()), os.scandir

    def guarded(path):
        if Path(path).name == "c":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", guarded)
        bad(folder, "PermissionError", "a/c")


def test_backslashes_between_folders(tmp_path):
    files = {f"{c}\\{i}.png": encoded(PIXELS[i]) for i in range(3) for c in ("cat", "dog")}
    folder = tmp_path / "x"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)  # as extractall leaves them
    for path in (write_zip(tmp_path / "x.zip", files), write_tar(tmp_path / "x.tar", files), folder):
        found = open_image_files(path)
        assert found.names == [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(3)]
        assert "6 names in" in found.notes[0]
        np.testing.assert_array_equal(next(open_images(path).batches(3)), PIXELS[:3])


def test_splits_in_one_folder_are_said(tmp_path):
    files = {f"data/{split}/{i}.png": encoded(PIXELS[i]) for i in range(3) for split in ("train", "Val")}
    for path in image_containers(tmp_path, files):
        assert (
            "several splits, all of which are used: train (3 images), val (3 images)"
            in open_images(path).notes[0]
        )
    hub = parquet_folder(tmp_path / "hub")
    assert open_images(hub).notes == ("Files that are not parquet are left out: README.md.",)
    write_parquet(hub / "validation-00000-of-00001.parquet", [encoded(PIXELS[0])], label=[3])
    assert "train (7 rows), validation (1 rows)" in open_images(hub).notes[-1]


def test_folders_that_are_links_alone_are_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "real", image_files())
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "cat").symlink_to(tmp_path / "real")
    bad("x", "no images", "Folders that are links are not entered", "cat")


def test_what_else_lies_beside(tmp_path):
    hub = tmp_path / "hub"
    hub.mkdir()
    write_parquet(hub / "a.PARQUET", [encoded(x) for x in PIXELS])
    (hub / "more.zip").touch()
    assert "not parquet are left out: more.zip" in open_images(hub).notes[0]
    tar = tmp_path / "x.tar"
    with tarfile.open(write_tar(tar, image_files()), "a") as archive:
        link = tarfile.TarInfo("cats")
        link.type, link.linkname = tarfile.SYMTYPE, "/elsewhere"
        archive.addfile(link)
    assert "are not followed: cats" in open_images(tar).notes[0]
    path = write_zip(tmp_path / "x.zip", image_files())
    path.write_bytes(path.read_bytes() + b"more")
    assert "has 4 more bytes after its end" in open_images(path).notes[0]


def make_folder(path, images, labels, unused=None):
    """For the contract of formats."""
    write_folder(path, numbered_files(images, labels, unused))
