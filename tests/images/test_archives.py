"""Zips and tars of image files: damage, links, order and names."""

import gc
import gzip
import io
import pickle
import shutil
import tarfile
import tempfile
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from containers import (
    PIXELS,
    bad,
    encoded,
    image_files,
    numbered_files,
    reverse,
    write_folder,
    write_npz,
    write_tar,
    write_zip,
)

from evalkit.errors import OutputError
from evalkit.images import open_images


def test_a_zip_member_without_a_name(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"a": b"", "b.png": encoded(PIXELS[0])})
    data = path.read_bytes()
    directory = data.index(b"PK\1\2")
    entry = bytearray(data[directory : directory + 47])
    entry[28:30] = bytes(2)  # the name's length
    end = bytearray(data[directory + 47 :])
    size = end.index(b"PK\5\6") + 12  # the directory's size
    end[size] -= 1
    path.write_bytes(data[:directory] + entry[:46] + end)
    bad(path, "x.zip", "refused", "''")


@pytest.mark.parametrize("name", ["/etc/x.npy", "../x.npy", "a/../../x.npy", "a\\..\\x.npy", "C:\\x.npy"])
def test_names_that_leave_the_archive_are_refused(tmp_path, name):
    array = io.BytesIO()
    np.save(array, PIXELS)
    bad(write_zip(tmp_path / "x.npz", {"arr_0.npy": array.getvalue(), name: b""}), "refused", repr(name))
    name = name.replace("npy", "png")
    bad(write_zip(tmp_path / "x.zip", {name: encoded(PIXELS[0])}), "x.zip", "refused", repr(name))
    bad(write_tar(tmp_path / "x.tar", {name: encoded(PIXELS[0])}), "x.tar", "refused", repr(name))


def test_a_wrong_checksum_in_a_zip_of_images(tmp_path):
    path = write_zip(tmp_path / "x.zip", image_files())
    data = image_files()["b.png"]
    path.write_bytes(path.read_bytes().replace(data, data[:-1] + b"\0"))
    bad(path, "x.zip, b.png", "CRC-32")


def test_links_in_a_tar_are_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", image_files())
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    bad(path, "link.png", "link", "--dereference")


@pytest.mark.parametrize("blocks", [1, 4, 5])
def test_a_tar_that_was_cut_short(tmp_path, blocks):
    path = write_tar(tmp_path / "x.tar", image_files())
    path.write_bytes(path.read_bytes()[: 512 * blocks])  # in the first file, and between two
    bad(path, "x.tar", "cut short" if blocks % 2 == 0 else "")
    data = gzip.compress(write_tar(tmp_path / "y.tar", image_files()).read_bytes())
    (tmp_path / "y.tar.gz").write_bytes(data[: len(data) // 2])
    bad(tmp_path / "y.tar.gz", "y.tar.gz", "cannot be read")


def temporary_tars(folder):
    return list(folder.glob("evalkit-*.tar"))


def test_a_compressed_tar_in_another_order_is_unpacked_for_a_while(tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    source = open_images(write_tar(tmp_path / "x.tar.gz", reverse(image_files()), "w:gz"))
    assert "not in the order of its names" in source.notes[0]
    for batches in (source.batches(3), source.batches(7), pickle.loads(pickle.dumps(source)).batches(2)):
        np.testing.assert_array_equal(np.concatenate(list(batches)), PIXELS)
    assert source.digest == open_images(write_folder(tmp_path / "x", image_files())).digest
    assert len(temporary_tars(temporary)) == 1
    del source
    gc.collect()
    assert temporary_tars(temporary) == []


def test_a_compressed_tar_in_another_order_needs_room(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar.gz", reverse(image_files()), "w:gz")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(
        OutputError, match=r"x\.tar\.gz, unpacked, needs .* GB, and .* has .* GB free\. Set TMPDIR"
    ):
        open_images(path)


def test_a_zip_behind_another_is_an_error(tmp_path):
    files = image_files()
    first, second = write_zip(tmp_path / "1.zip", files), write_zip(tmp_path / "2.zip", files)
    (tmp_path / "x.zip").write_bytes(first.read_bytes() + second.read_bytes())
    bad(tmp_path / "x.zip", "x.zip", "begins with", "another zip", "unpacked one by one")
    a, b = write_npz(tmp_path / "1.npz", PIXELS), write_npz(tmp_path / "2.npz", PIXELS)
    (tmp_path / "x.npz").write_bytes(a.read_bytes() + b.read_bytes())
    bad(tmp_path / "x.npz", "another zip")


@pytest.mark.parametrize(("mode", "suffix"), [("w", ""), ("w:gz", ".gz"), ("w:xz", ".xz")])
def test_tars_that_were_joined_are_an_error(tmp_path, mode, suffix):
    tars = [write_tar(tmp_path / f"{i}.tar", image_files(), mode).read_bytes() for i in range(2)]
    (tmp_path / "x.tar").write_bytes(b"".join(tars))
    bad(tmp_path / "x.tar", "there is more data after the end", "7 files", "--ignore-zeros")
    plain = write_tar(tmp_path / "y.tar", image_files())
    plain.write_bytes(plain.read_bytes() + bytes(10_240))
    assert len(open_images(plain)) == 7


def test_members_of_one_name_are_said(tmp_path):
    path = write_zip(tmp_path / "x.zip", image_files())
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("b.png", encoded(PIXELS[0]))
    source = open_images(path)
    assert len(source) == 7
    assert "several members of the same name; only the last is used: b.png" in " ".join(source.notes)
    tar = write_tar(tmp_path / "x.tar", image_files())
    with tarfile.open(tar, "a") as archive:
        info = tarfile.TarInfo("./b.png")
        info.size = len(encoded(PIXELS[0]))
        archive.addfile(info, io.BytesIO(encoded(PIXELS[0])))
    source = open_images(tar)
    np.testing.assert_array_equal(next(source.batches(7))[5], PIXELS[0])
    assert "only the last is used: ./b.png" in " ".join(source.notes)


def test_folders_whose_names_sort_otherwise_with_what_follows(tmp_path):
    """`tar --sort=name` has all of `cat` before `cat 2`; as text, `cat 2/` comes before `cat/`."""
    files = {f"{c}/{i}.png": encoded(PIXELS[i]) for c in ("cat", "cat 2", "cat-3") for i in range(2)}
    source = open_images(write_tar(tmp_path / "x.tar.gz", files, "w:gz"))
    expected = open_images(write_folder(tmp_path / "x", files))
    assert source.digest == expected.digest
    np.testing.assert_array_equal(next(source.batches(6)), next(expected.batches(6)))


def make_zip(path, images, labels, unused=None):
    """For the contract of formats."""
    write_zip(path, numbered_files(images, labels, unused))


def make_tar(path, images, labels, unused=None):
    """For the contract of formats."""
    write_tar(path, numbered_files(images, labels, unused))
