"""Every container gives the same pixels in the same order, and every bad input a message that names it."""

import gc
import gzip
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from optional import optional
from patience import SECONDS
from PIL import Image, PngImagePlugin

import evalkit.images
import evalkit.images.files
from evalkit.errors import ImageError, InputError, MissingDependencyError, OutputError
from evalkit.extractors.pixels import Pixels
from evalkit.features import Features, extract
from evalkit.images import NpzWriter, are_ids, open_images, read_ahead
from evalkit.images.files import open_image_files

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)
NAMES = ["a.png", "a/b.PNG", "a/c/1.png", "a/c/10.png", "a/c/2.png", "b.png", "z.bmp"]  # sorted as strings
STATISTICS = {
    "mu": np.zeros(2048, np.float32),
    "sigma": np.eye(2048),
    "mu_s": np.zeros(2023, np.float32),
    "sigma_s": np.eye(2023),
}


def limit_images_to(size, monkeypatch):
    for module in (evalkit.images, evalkit.images.files):
        monkeypatch.setattr(module, "MAX_IMAGE_BYTES", size)


def encoded(pixels, format="PNG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def image_files():
    return {name: encoded(x, name[-3:].upper()) for name, x in zip(NAMES, PIXELS, strict=True)}


def write_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_zip(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_npz(path, *arrays, **named):
    np.savez(path, *arrays, **named)
    return path


def write_raw_npy_zip(path, header, body=b""):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    return write_zip(path, {"arr_0.npy": buffer.getvalue() + body})


def write_h5(path, **datasets):
    with h5py.File(path, "w") as file:
        for key, value in datasets.items():
            file[key] = value
    return path


def write_parquet(path, contents, as_bytes=False, **columns):
    values = contents if as_bytes else [{"bytes": x, "path": f"{i}.png"} for i, x in enumerate(contents)]
    pyarrow = optional("pyarrow", "parquet")
    table = pyarrow.table({"image": values, **columns})
    optional("pyarrow.parquet", "parquet").write_table(table, path, row_group_size=3)
    return path


def parquet_folder(path):
    """Files whose rows, in the order of the files' names, are the pictures; written in reverse."""
    path.mkdir()
    contents = [encoded(x) for x in PIXELS]
    write_parquet(path / "train-00001-of-00002.parquet", contents[4:], label=list(range(4, 7)))
    write_parquet(path / "train-00000-of-00002.parquet", contents[:4], label=list(range(4)))
    (path / "README.md").touch()
    return path


def npz_of_npy_version_2(path):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, PIXELS, version=(2, 0))
    return write_zip(path, {"arr_0.npy": buffer.getvalue()})


def deflated_npz(path):
    np.savez_compressed(path, PIXELS)
    return path


def npy(path):
    np.save(path, PIXELS)
    return path


def parts(path):
    """Files of two kinds and unequal lengths, whose sorted names give the pictures their order."""
    path.mkdir()
    np.save(path / "b.npy", PIXELS[3:4])
    write_npz(path / "c.npz", PIXELS[4:])
    write_npz(path / "a.npz", PIXELS[:3])
    return path / "[a-c].np*"


def reverse(files):
    return dict(reversed(files.items()))


# Archives are written in reverse where they can be, so that only sorting gives NAMES' order.
CONTAINERS = {
    "npz": lambda d: write_npz(d / "x.npz", PIXELS),
    "npz deflated": lambda d: deflated_npz(d / "x.npz"),
    "npz of npy version 2": lambda d: npz_of_npy_version_2(d / "x.npz"),
    "npz int64": lambda d: write_npz(d / "x.npz", PIXELS.astype(np.int64)),
    "npz big-endian": lambda d: write_npz(d / "x.npz", PIXELS.astype(">i4")),
    "npz Fortran order": lambda d: write_npz(d / "x.npz", np.asfortranarray(PIXELS)),
    "npz under another suffix": lambda d: write_npz(d / "y.npz", PIXELS).rename(d / "x.dat"),
    "npy": lambda d: npy(d / "x.npy"),
    "folder": lambda d: write_folder(d / "x", reverse(image_files())),
    "zip": lambda d: write_zip(d / "x.zip", reverse(image_files())),
    "zip deflated": lambda d: write_zip(d / "x.zip", reverse(image_files()), zipfile.ZIP_DEFLATED),
    "zip lzma": lambda d: write_zip(d / "x.zip", reverse(image_files()), zipfile.ZIP_LZMA),
    "tar": lambda d: write_tar(d / "x.tar", reverse(image_files())),
    "tar.gz": lambda d: write_tar(d / "x.tar.gz", image_files(), "w:gz"),
    "tar.bz2": lambda d: write_tar(d / "x.tar.bz2", image_files(), "w:bz2"),
    "tar.xz": lambda d: write_tar(d / "x.tar.xz", image_files(), "w:xz"),
    "tar with ./": lambda d: write_tar(d / "x.tar", {f"./{k}": v for k, v in image_files().items()}),
    "parquet": lambda d: write_parquet(d / "x.parquet", [encoded(x) for x in PIXELS]),
    "parquet of bytes": lambda d: write_parquet(d / "x.parquet", [encoded(x) for x in PIXELS], as_bytes=True),
    "parquet folder": lambda d: parquet_folder(d / "x"),
    "hdf5 images": lambda d: write_h5(d / "x.h5", images=PIXELS, other=PIXELS[:2]),
    "hdf5 nested": lambda d: write_h5(d / "x.h5", **{"group/pictures": PIXELS, "scores": np.zeros(3)}),
    "parts": lambda d: parts(d / "x"),
    "array": lambda d: PIXELS,
    "array not contiguous": lambda d: np.ascontiguousarray(PIXELS[::-1])[::-1],
    "tensor": lambda d: torch.from_numpy(PIXELS.copy()),
}


@pytest.fixture(params=CONTAINERS)
def container(request, tmp_path):
    return CONTAINERS[request.param](tmp_path)


def test_every_container_gives_the_same_images(container):
    source = open_images(container)
    assert (len(source), source.shape, source.dtype) == (7, (6, 5, 3), np.uint8)
    batches = list(source.batches(3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert all(batch.dtype == np.uint8 and batch.flags.c_contiguous for batch in batches)
    np.testing.assert_array_equal(np.concatenate(batches), PIXELS)


@pytest.mark.parametrize(("size", "start"), [(2, 5), (100, 1), (1, 6), (3, 3)])
def test_start_skips(container, size, start):
    source = open_images(container)
    np.testing.assert_array_equal(np.concatenate(list(source.batches(size, start))), PIXELS[start:])
    assert list(source.batches(size, 7)) == []


def test_batches_are_writable_and_belong_to_the_consumer(container):
    source = open_images(container)
    for batch in source.batches(4):
        batch[:] = 0
    np.testing.assert_array_equal(next(source.batches(7)), PIXELS)


def test_sources_survive_pickling(container):
    source = open_images(container)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(next(copy.batches(7)), PIXELS)
    assert copy.digest == source.digest


def test_two_readers_of_one_source_do_not_disturb_each_other(container):
    source = open_images(container)
    pairs = zip(source.batches(1), source.batches(1), strict=True)
    assert sum(np.array_equal(a, b) for a, b in pairs) == 7


def test_name_and_kind(tmp_path):
    kinds = {
        "npz": "npz",
        "npy": "npy",
        "folder": "folder",
        "zip": "zip",
        "tar.gz": "tar",
        "hdf5 images": "hdf5",
        "parts": "parts",
    }
    for key, kind in kinds.items():
        (tmp_path / kind).mkdir()
        path = CONTAINERS[key](tmp_path / kind)
        source = open_images(str(path))
        assert (source.name, source.kind) == (str(path), kind)
    assert (open_images(PIXELS).name, open_images(PIXELS).kind) == ("<array>", "array")


@pytest.mark.parametrize(("size", "start"), [(0, 0), (-1, 0), (1, -1), (1, 8)])
def test_batches_refuses_impossible_arguments(size, start):
    with pytest.raises(ValueError, match="expected"):
        open_images(PIXELS).batches(size, start)


def test_photographs_decode_as_pillow_decodes_them(tmp_path):
    photos = optional("sklearn.datasets", "demo").load_sample_images().images
    files = {f"{i}.jpg": encoded(photo, "JPEG", quality=90) for i, photo in enumerate(photos)}
    source = open_images(write_zip(tmp_path / "photos.zip", files))
    expected = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files.values()]
    np.testing.assert_array_equal(next(source.batches(2)), expected)


# ------------------------------------------------------------------------------------- what comes along


def test_labels(tmp_path):
    labels = np.arange(7, dtype=np.uint8)
    npz = write_npz(tmp_path / "x.npz", PIXELS, labels)
    hdf5 = write_h5(tmp_path / "x.h5", images=PIXELS, labels=labels)
    hdf5_arr_1 = write_h5(tmp_path / "y.h5", arr_0=PIXELS, arr_1=labels)
    for path in (npz, hdf5, hdf5_arr_1):
        found = open_images(path).labels
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, labels)
    assert open_images(PIXELS).labels is None


def test_labels_of_another_length_are_left_out_and_said_so(tmp_path):
    for path in (
        write_npz(tmp_path / "x.npz", PIXELS, np.arange(6)),
        write_h5(tmp_path / "x.h5", images=PIXELS, labels=np.zeros((7, 2))),
    ):
        source = open_images(path)
        assert source.labels is None
        assert "labels are left out: expected 7 integers" in source.notes[0]


@pytest.mark.parametrize("images", [{}, {"arr_0": PIXELS}], ids=["alone", "with images"])
def test_statistics(tmp_path, images):
    source = open_images(write_npz(tmp_path / "x.npz", **images, **STATISTICS))
    assert source.statistics.keys() == STATISTICS.keys()
    for key, value in STATISTICS.items():
        assert source.statistics[key].dtype == value.dtype
        np.testing.assert_array_equal(source.statistics[key], value)
    assert len(source) == (7 if images else 0)
    assert sum(map(len, source.batches(4))) == len(source)


def test_statistics_alone_have_a_digest_and_a_note(tmp_path):
    source = open_images(write_npz(tmp_path / "x.npz", **STATISTICS))
    other = open_images(write_npz(tmp_path / "y.npz", **(STATISTICS | {"mu": np.ones(2048, np.float32)})))
    assert source.shape is None
    assert "no images" in source.notes[0]
    assert source.digest != other.digest


def test_floats_are_not_rounded(tmp_path):
    values = PIXELS.astype(np.float64) * 0.99 + 0.3
    for path in (write_npz(tmp_path / "x.npz", values), write_h5(tmp_path / "x.h5", images=values)):
        source = open_images(path)
        assert source.dtype == np.float32
        assert "floats" in source.notes[0]
        batch = next(source.batches(7))
        assert batch.dtype == np.float32
        np.testing.assert_array_equal(batch, values.astype(np.float32))


def test_black_floats_are_not_taken_for_scaled_ones():
    assert open_images(np.zeros((2, 4, 4, 3), np.float32)).dtype == np.float32


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGBA", "LA"])
def test_pillow_modes_become_rgb(tmp_path, mode):
    image = Image.fromarray(PIXELS[0]).convert(mode)
    path = write_folder(tmp_path / "x", {"a.tif" if mode == "CMYK" else "a.png": b""})
    file = next(path.iterdir())
    image.save(file)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(next(open_images(path).batches(1))[0], expected)


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


def test_linked_folders_are_not_entered_and_said_so(tmp_path):
    folder = write_folder(tmp_path / "x", image_files())
    (folder / "loop").symlink_to(folder)
    source = open_images(folder)
    assert len(source) == 7
    assert "loop" in source.notes[0]


# ---------------------------------------------------------------------------------- in the middle, in parts


def test_a_stored_npz_is_read_from_the_middle_without_what_comes_before(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "x.npz", PIXELS, np.arange(7), np.zeros((7, 4)))
    source = open_images(path)

    def never(*_):
        raise AssertionError("read through the zip")

    monkeypatch.setattr(zipfile.ZipExtFile, "read", never)
    np.testing.assert_array_equal(next(source.batches(2, 3)), PIXELS[3:5])


def test_a_local_header_that_is_none(tmp_path):
    path = write_npz(tmp_path / "x.npz", PIXELS)
    source = open_images(path)
    path.write_bytes(b"RIFF" + path.read_bytes()[4:])
    with pytest.raises(InputError, match=r"x\.npz: cannot be read \(BadZipFile: arr_0 does not begin"):
        list(source.batches(2, 3))


def test_parts_have_labels_where_all_have(tmp_path):
    for name, part in (("a", slice(0, 4)), ("b", slice(4, 7))):
        write_npz(tmp_path / f"{name}.npz", PIXELS[part], np.arange(7)[part])
    np.testing.assert_array_equal(open_images(f"{tmp_path}/?.npz").labels, np.arange(7))
    write_npz(tmp_path / "c.npz", PIXELS)
    source = open_images(f"{tmp_path}/?.npz")
    assert source.labels is None
    assert "The labels are left out: 2 of 3 parts have them." in source.notes


def test_parts_digest_follows_their_content_and_limits(tmp_path):
    digests = set()
    for cuts in ((3, 5), (3, 4), (2, 5)):
        for name, part in zip("abc", np.split(PIXELS, cuts), strict=True):
            write_npz(tmp_path / f"{name}.npz", part)
        digests.add(open_images(tmp_path / "*.npz").digest)
    write_npz(tmp_path / "c.npz", PIXELS[5:] ^ 1)
    digests.add(open_images(tmp_path / "*.npz").digest)
    assert len(digests) == 4


def test_a_file_of_a_patterns_name_is_that_file(tmp_path):
    write_npz(tmp_path / "a.npz", PIXELS)
    assert open_images(write_npz(tmp_path / "[a].npz", PIXELS[:2])).kind == "npz"
    assert len(open_images(tmp_path / "**" / "a.*")) == 7


def test_parts_that_do_not_go_together(tmp_path):
    write_npz(tmp_path / "a.npz", PIXELS)
    write_npz(tmp_path / "b.npz", PIXELS[:, :5])
    bad(tmp_path / "*.npz", "b.npz", "(5, 5, 3)", "a.npz", "(6, 5, 3)", "one size")
    write_npz(tmp_path / "b.npz", PIXELS.astype(np.float32))
    bad(tmp_path / "*.npz", "b.npz", "float32", "uint8")
    write_npz(tmp_path / "b.npz", PIXELS, **STATISTICS)
    bad(tmp_path / "*.npz", "b.npz", "carries mu and sigma", "images alone")
    values = np.full((7, 6, 5, 3), 300)
    write_npz(tmp_path / "b.npz", values)
    bad(tmp_path / "*.npz", "b.npz: image 0", "300", error=ImageError)
    bad(tmp_path / "*.tar", "*.tar", "no file or folder matches")


# ----------------------------------------------------------------------------------------------- digest


def test_digest_is_a_sha256_and_repeatable(container):
    digest = open_images(container).digest
    assert len(bytes.fromhex(digest)) == 32
    assert open_images(container).digest == digest


def test_stored_and_deflated_have_the_same_digest(tmp_path):
    stored, deflated = (
        write_npz(tmp_path / "x.npz", PIXELS),
        deflated_npz(tmp_path / "y.npz"),
    )
    assert stored.read_bytes() != deflated.read_bytes()
    assert open_images(stored).digest == open_images(deflated).digest
    a = write_zip(tmp_path / "a.zip", image_files())
    b = write_zip(tmp_path / "b.zip", reverse(image_files()), zipfile.ZIP_DEFLATED)
    assert open_images(a).digest == open_images(b).digest


def test_statistics_and_labels_do_not_change_the_digest_of_images(tmp_path):
    plain = write_npz(tmp_path / "x.npz", PIXELS)
    more = write_npz(tmp_path / "y.npz", PIXELS, np.arange(7), **STATISTICS)
    assert open_images(plain).digest == open_images(more).digest


def test_folder_and_tar_of_the_same_files_have_the_same_digest(tmp_path):
    digests = {
        open_images(write_folder(tmp_path / "x", image_files())).digest,
        open_images(write_tar(tmp_path / "x.tar", image_files())).digest,
        open_images(write_tar(tmp_path / "x.tgz", image_files(), "w:gz")).digest,
    }
    assert len(digests) == 1


WRITERS = {
    "npz": lambda d, x: write_npz(d / "x.npz", x),
    "folder": lambda d, x: write_folder(d / "x", {f"{i}.png": encoded(p) for i, p in enumerate(x)}),
    "zip": lambda d, x: write_zip(d / "x.zip", {f"{i}.png": encoded(p) for i, p in enumerate(x)}),
    "tar": lambda d, x: write_tar(d / "x.tar", {f"{i}.png": encoded(p) for i, p in enumerate(x)}),
    "hdf5": lambda d, x: write_h5(d / "x.h5", images=x),
    "array": lambda d, x: x,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_digest_follows_pixels_order_and_number(tmp_path, kind):
    changed = PIXELS.copy()
    changed[3, 2, 1, 0] ^= 1
    digests = set()
    for i, pixels in enumerate([PIXELS, changed, PIXELS[::-1].copy(), PIXELS[:6]]):
        (tmp_path / str(i)).mkdir()
        digests.add(open_images(WRITERS[kind](tmp_path / str(i), pixels)).digest)
    assert len(digests) == 4


def test_digest_follows_the_limits_between_files(tmp_path):
    x, y, z = map(encoded, PIXELS[:3])  # what comes after an image in its file is ignored by decoders
    a = open_images(write_folder(tmp_path / "a", {"1.png": x + y, "2.png": z}))
    b = open_images(write_folder(tmp_path / "b", {"1.png": x, "2.png": y + z}))
    assert not np.array_equal(next(a.batches(2)), next(b.batches(2)))
    assert a.digest != b.digest


def test_digest_follows_the_shape_of_the_same_bytes(tmp_path):
    turned = PIXELS.reshape(7, 5, 6, 3)
    assert open_images(PIXELS).digest != open_images(turned).digest
    a, b = write_npz(tmp_path / "a.npz", PIXELS), write_npz(tmp_path / "b.npz", turned)
    assert open_images(a).digest != open_images(b).digest


# ----------------------------------------------------------------------------------------------- memory


def test_a_large_npz_is_streamed(tmp_path):
    shape, path = (2000, 256, 256, 3), tmp_path / "large.npz"
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(shape[0] // 100):
            member.write(bytes(100 * 256 * 256 * 3))
    tracemalloc.start()
    try:
        source = open_images(path)
        assert len(source.digest) == 64
        batches = source.batches(16)
        for _ in range(10):
            assert next(batches).shape == (16, 256, 256, 3)
        batches.close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    batch_bytes = 16 * 256 * 256 * 3
    assert batch_bytes < peak < 10 * batch_bytes  # the whole is 125 batches


def test_image_files_are_streamed(tmp_path):
    one = encoded(np.zeros((256, 256, 3), np.uint8))
    source = open_images(write_zip(tmp_path / "x.zip", {f"{i:04}.png": one for i in range(640)}))
    tracemalloc.start()
    try:
        batches = source.batches(8)
        for _ in range(10):
            next(batches)
        batches.close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 15 * 8 * 256 * 256 * 3  # the whole is 80 batches


# -------------------------------------------------------------------------------------------- bad input


def bad(path, *parts, error=InputError):
    """Opens and reads everything; exactly this error must come, with these words in its message."""
    with pytest.raises(error) as caught:
        for _ in open_images(path).batches(2):
            pass
    message = str(caught.value)
    assert caught.type is error
    for part in parts:
        assert part in message, message


def test_missing_file(tmp_path):
    bad(tmp_path / "none.npz", "none.npz", "no such file")


def test_unknown_content(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"hello, world")
    bad(tmp_path / "x.npz", "x.npz", "no known container", "b'hello, w'", "expected an npz")
    (tmp_path / "empty.npz").write_bytes(b"")
    bad(tmp_path / "empty.npz", "empty.npz", "b''")


@pytest.mark.parametrize("size", [200, -10])
def test_truncated_zip(tmp_path, size):
    path = write_npz(tmp_path / "x.npz", PIXELS)
    path.write_bytes(path.read_bytes()[:size])
    bad(path, "x.npz", "cannot be read", "complete")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("size", [2, 7, 100])
def test_wrong_checksum_is_seen_before_the_last_batch(tmp_path, save, size):
    path = tmp_path / "x.npz"
    save(path, np.tile(PIXELS[:1], (7, 50, 1, 1)))
    with zipfile.ZipFile(path) as archive:
        crc = archive.getinfo("arr_0.npy").CRC.to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(crc, b"\1\2\3\4"))
    seen = []
    with pytest.raises(InputError, match=r"x\.npz: cannot be read \(BadZipFile: Bad CRC-32"):
        seen.extend(open_images(path).batches(size))
    assert sum(map(len, seen)) < 7


@pytest.mark.parametrize(
    "kind",
    ["npz", "npz deflated", "npy", "zip deflated", "zip lzma", "tar", "tar.gz", "tar.xz", "hdf5 images"],
)
def test_random_damage_gives_an_input_error_or_nothing(tmp_path, kind):
    """Never another exception; and where the container has checksums, never other pixels."""
    path = CONTAINERS[kind](tmp_path)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(1), 0
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 4):
            data[place] = rng.integers(256)
        path.write_bytes(data[: rng.integers(1, len(data))] if rng.random() < 0.2 else data)
        try:
            pixels = np.concatenate(list(open_images(path).batches(3)))
        except InputError:
            refused += 1
        else:
            assert not kind.startswith("npz") or np.array_equal(pixels, PIXELS)
    assert refused > 10


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


def test_an_npz_member_without_suffix_is_not_taken_for_an_array(tmp_path):
    array = io.BytesIO()
    np.save(array, PIXELS)
    bad(
        write_zip(tmp_path / "x.npz", {"arr_0": array.getvalue(), "b.npy": b""}),
        "no arr_0",
        "its keys are b.",
    )


def test_encrypted_zip(tmp_path):
    path = write_npz(tmp_path / "x.npz", PIXELS)
    data = bytearray(path.read_bytes())
    data[6] |= 1  # flag bit 0, in the member's header and in the directory
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    bad(path, "x.npz", "encrypted")


def test_pickled_arrays_are_refused_and_do_not_run(tmp_path):
    ran = []

    class Trap:
        def __reduce__(self):
            return (ran.append, (1,))

    path = write_npz(tmp_path / "x.npz", np.array([Trap(), 1], dtype=object))
    ran.clear()
    bad(path, "x.npz, arr_0", "pickled", "never loaded")
    np.save(tmp_path / "x.npy", np.array([Trap()], dtype=object))
    bad(tmp_path / "x.npy", "x.npy", "pickled")
    labels = write_npz(tmp_path / "y.npz", PIXELS, np.array([Trap()] * 7, dtype=object))
    bad(labels, "y.npz, arr_1", "pickled")
    assert ran == []


ARRAY_FORMS = {
    "npz": (lambda d, x: write_npz(d / "x.npz", x), "x.npz, arr_0"),
    "hdf5": (lambda d, x: write_h5(d / "x.h5", images=x), "x.h5, images"),
    "array": (lambda d, x: x, "<array>"),
}


@pytest.mark.parametrize("form", ARRAY_FORMS)
@pytest.mark.parametrize(
    ("array", "parts"),
    [
        (np.zeros((5, 8, 8), np.uint8), ("(5, 8, 8)", "four axes")),
        (np.zeros((5,), np.uint8), ("(5,)", "four axes")),
        (np.zeros((5, 8, 8, 1), np.uint8), ("(5, 8, 8, 1)", "np.repeat")),
        (np.zeros((5, 8, 8, 4), np.uint8), ("(5, 8, 8, 4)", "alpha")),
        (np.zeros((5, 8, 8, 2), np.uint8), ("(5, 8, 8, 2)", "expected 3 channels")),
        (np.zeros((5, 3, 8, 8), np.uint8), ("looks like NCHW", "transpose(0, 2, 3, 1)")),
        (np.zeros((0, 8, 8, 3), np.uint8), ("(0, 8, 8, 3)", "at least one image")),
        (np.zeros((2, 0, 8, 3), np.uint8), ("(2, 0, 8, 3)", "empty")),
        (np.zeros((2, 8, 8, 3), np.bool_), ("bool", "expected integers or floats")),
        (np.zeros((2, 8, 8, 3), np.complex64), ("complex64", "expected integers or floats")),
    ],
    ids=lambda value: f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else "",
)
def test_wrong_arrays(tmp_path, form, array, parts):
    write, name = ARRAY_FORMS[form]
    bad(write(tmp_path, array), name, *parts)


@pytest.mark.parametrize("form", ARRAY_FORMS)
@pytest.mark.parametrize(
    ("dtype", "value", "shown"),
    [
        (np.float32, np.nan, "nan"),
        (np.float32, np.inf, "inf"),
        (np.float32, -np.inf, "-inf"),
        (np.float16, -3.5, "-3.5"),
        (np.float64, 255.5, "255.5"),
        (np.int64, -1, "-1"),
        (np.int16, 256, "256"),
        (np.uint64, 2**63, str(2**63)),
    ],
)
def test_values_out_of_range_name_the_image(tmp_path, form, dtype, value, shown):
    array = PIXELS.astype(dtype)
    array[5, 1, 2, 0] = value
    write, _ = ARRAY_FORMS[form]
    path = write(tmp_path, array)
    bad(path, "image 5 ", f"the value {shown};", "from 0 to 255", error=ImageError)
    with pytest.raises(ImageError, match="image 5 "):
        list(open_images(path).batches(3, start=4))


@pytest.mark.parametrize("form", ARRAY_FORMS)
def test_scaled_floats_are_refused_at_once(tmp_path, form):
    write, _ = ARRAY_FORMS[form]
    unit = PIXELS.astype(np.float32) / 255
    with pytest.raises(InputError, match=r"\[0, 1\].*expected \[0, 255\].*\(x \* 255\)"):
        open_images(write(tmp_path, unit))
    with pytest.raises(InputError, match=r"\[-1, 1\].*expected \[0, 255\].*\(\(x \+ 1\) \* 127\.5\)"):
        open_images(write(tmp_path, unit * 2 - 1))


def test_the_advice_for_scaled_floats_gives_the_pixels_back():
    x = PIXELS.astype(np.float32) / 255
    np.testing.assert_array_equal((x * 255).round().clip(0, 255).astype(np.uint8), PIXELS)
    x = x * 2 - 1
    np.testing.assert_array_equal(((x + 1) * 127.5).round().clip(0, 255).astype(np.uint8), PIXELS)


def test_npz_without_images_lists_its_keys(tmp_path):
    bad(write_npz(tmp_path / "x.npz", images=PIXELS, fid=np.zeros(1)), "no arr_0", "fid, images", "np.savez")


@pytest.mark.parametrize(
    ("descr", "shape", "body"),
    [
        ("|u1", (10**9, 64, 64, 3), 100),
        ("|u1", (1, 4, 4, 3), 49),
        ("|u1", (1, 4, 4, 3), 47),
        ("|u1", (-1, -16, 1, 3), 48),
        ("<f8", (10**30, 4, 4, 3), 48),
    ],
)
def test_a_header_that_lies_about_the_size_is_refused_before_allocation(tmp_path, descr, shape, body):
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    path = write_raw_npy_zip(tmp_path / "x.npz", header, bytes(body))
    bad(path, "x.npz, arr_0", str(shape), "damaged")


def test_one_gigantic_image_is_refused_before_allocation(tmp_path, monkeypatch):
    limit_images_to(89, monkeypatch)
    bad(write_npz(tmp_path / "x.npz", PIXELS), "(7, 6, 5, 3)", "89 bytes")
    limit_images_to(90, monkeypatch)
    assert len(open_images(tmp_path / "x.npz")) == 7


def test_bad_npy_headers(tmp_path):
    bad(
        write_zip(tmp_path / "x.npz", {"arr_0.npy": b"not an array"}),
        "x.npz, arr_0",
        "npy header",
        "np.savez",
    )
    header = b"{'descr': '|u1', 'shape': (1,"  # ends in the middle
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    bad(write_zip(tmp_path / "z.npz", {"arr_0.npy": data}), "z.npz, arr_0", "npy header")
    data = b"\x93NUMPY\x03\x00" + bytes(100)
    bad(write_zip(tmp_path / "y.npz", {"arr_0.npy": data}), "y.npz, arr_0", "(3, 0)", "1.0 or 2.0")


@pytest.mark.parametrize("name", ["/etc/x.npy", "../x.npy", "a/../../x.npy", "a\\..\\x.npy", "C:\\x.npy"])
def test_names_that_leave_the_archive_are_refused(tmp_path, name):
    array = io.BytesIO()
    np.save(array, PIXELS)
    bad(write_zip(tmp_path / "x.npz", {"arr_0.npy": array.getvalue(), name: b""}), "refused", repr(name))
    name = name.replace("npy", "png")
    bad(write_zip(tmp_path / "x.zip", {name: encoded(PIXELS[0])}), "x.zip", "refused", repr(name))
    bad(write_tar(tmp_path / "x.tar", {name: encoded(PIXELS[0])}), "x.tar", "refused", repr(name))


@pytest.mark.parametrize("key", STATISTICS)
def test_statistics_must_be_complete_fitting_and_finite(tmp_path, key):
    path = tmp_path / "x.npz"
    write_npz(path, PIXELS, **{k: v for k, v in STATISTICS.items() if k != key})
    bad(path, f"without {key};", "mu, sigma, mu_s, sigma_s")
    write_npz(path, PIXELS, **(STATISTICS | {key: STATISTICS[key][1:]}))
    bad(path, f"{key} is float", str(STATISTICS[key][1:].shape), f"shape {STATISTICS[key].shape}")
    write_npz(path, PIXELS, **(STATISTICS | {key: STATISTICS[key].astype(np.int64)}))
    bad(path, f"{key} is int64", "expected floats")
    broken = STATISTICS[key].copy()
    broken[-1] = np.nan
    write_npz(path, PIXELS, **(STATISTICS | {key: broken}))
    bad(path, f"{key} holds values that are not finite")


def test_mu_alone(tmp_path):
    bad(write_npz(tmp_path / "x.npz", mu=STATISTICS["mu"]), "has mu without sigma; expected mu and sigma")


@pytest.mark.parametrize("images", [{}, {"arr_0": PIXELS}], ids=["alone", "with images"])
def test_one_pair_of_statistics_is_enough(tmp_path, images):
    pair = {key: STATISTICS[key] for key in ("mu", "sigma")}
    source = open_images(write_npz(tmp_path / "x.npz", **images, **pair))
    assert source.statistics.keys() == {"mu", "sigma"}
    assert "sFID uses its images" in source.notes[-1] if images else "no mu_s for sFID" in source.notes[-1]
    assert "Other tools also write mu and sigma" in source.notes[-1]
    other = open_images(write_npz(tmp_path / "y.npz", mu_s=STATISTICS["mu_s"], sigma_s=STATISTICS["sigma_s"]))
    assert other.statistics.keys() == {"mu_s", "sigma_s"}
    assert "there is no mu for FID" in other.notes[-1]
    assert other.digest != source.digest


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


def image_containers(directory, files):
    return (
        write_folder(directory / "x", files),
        write_zip(directory / "x.zip", files),
        write_tar(directory / "x.tar", files),
    )


def test_mixed_sizes_name_both_files(tmp_path):
    files = image_files() | {"a/c/10.png": encoded(PIXELS[0, :4])}
    for path in image_containers(tmp_path, files):
        bad(path, path.name, "a/c/10.png: 5x4 pixels", "a.png, has 5x6", error=ImageError)


def test_headers_are_looked_at_before_any_work(tmp_path):
    folder, archive, tar = image_containers(tmp_path, image_files() | {"a/c/10.png": encoded(PIXELS[0, :4])})
    parquet = write_parquet(tmp_path / "x.parquet", [encoded(PIXELS[0]), encoded(PIXELS[0, :4])])
    for path in (folder, archive, tar, parquet):
        with pytest.raises(ImageError, match="5x4 pixels"):
            _ = open_images(path).digest


@pytest.mark.parametrize("damage", [lambda data: data[:60], lambda data: b"no image", lambda data: b""])
def test_a_corrupt_image_in_the_middle_is_named(tmp_path, damage):
    files = image_files()
    files["a/c/2.png"] = damage(files["a/c/2.png"])
    for path in image_containers(tmp_path, files):
        bad(path, path.name, "a/c/2.png", "cannot be decoded", error=ImageError)


def test_a_truncated_photograph_is_not_filled_with_grey(tmp_path):
    data = encoded(np.kron(PIXELS[0], np.ones((32, 32, 1), np.uint8)), "JPEG")
    for path in image_containers(tmp_path, {"a.jpg": data, "b.jpg": data[: len(data) // 2]}):
        bad(path, "b.jpg", "truncated", error=ImageError)


def test_a_wrong_checksum_in_a_zip_of_images(tmp_path):
    path = write_zip(tmp_path / "x.zip", image_files())
    data = image_files()["b.png"]
    path.write_bytes(path.read_bytes().replace(data, data[:-1] + b"\0"))
    bad(path, "x.zip, b.png", "CRC-32")


def test_transparency(tmp_path):
    rgba = np.dstack([PIXELS[0], np.full((6, 5), 255, np.uint8)])
    rgba[2, 2, 3] = 254
    palette = Image.fromarray(PIXELS[0]).convert("P")
    for name, image, options in (
        ("rgba", rgba, {}),
        ("palette", palette, {"transparency": palette.getpixel((1, 1))}),
    ):
        folder = write_folder(tmp_path / name, {"a.png": encoded(image, **options)})
        bad(folder, "a.png", "transparent", "flatten", error=ImageError)


def test_more_than_8_bits(tmp_path):
    grey = Image.fromarray(np.full((6, 5), 40_000, np.uint16))
    bad(write_folder(tmp_path / "x", {"a.png": encoded(grey)}), "a.png", "I;16", "8 bits", error=ImageError)
    floats = Image.fromarray(np.zeros((6, 5), np.float32))
    bad(write_folder(tmp_path / "y", {"a.tif": encoded(floats, "TIFF")}), "a.tif", "mode F", error=ImageError)


def test_decompression_bomb(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "x", image_files())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    bad(path, "a.png", "DecompressionBombError", error=ImageError)
    monkeypatch.undo()
    limit_images_to(1000, monkeypatch)
    bomb = write_folder(tmp_path / "y", {"a.png": encoded(np.zeros((20, 20, 3), np.uint8))})
    bad(bomb, "a.png", "20x20 pixels", error=ImageError)


def test_huge_members_are_refused_unread(tmp_path, monkeypatch):
    limit_images_to(1000, monkeypatch)
    monkeypatch.setattr(Image, "open", lambda *args, **options: pytest.fail("it was read"))
    for path in image_containers(tmp_path, {"a.png": bytes(1001)}):
        bad(path, "a.png: 1001 bytes", "limited to 1000", error=ImageError)


def test_only_the_expected_decoders_are_reached(tmp_path):
    """Pillow tells formats from the content, and some of its decoders start external programs."""
    folder = write_folder(tmp_path / "x", {"a.png": encoded(PIXELS[0], "GIF")})
    bad(folder, "a.png", "cannot be decoded", error=ImageError)


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    folder, scandir = write_folder(tmp_path / "x", image_files()), os.scandir

    def guarded(path):
        if Path(path).name == "c":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    bad(folder, "PermissionError", "a/c")


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
    with pytest.raises(OutputError, match=r"x\.tar\.gz takes .* GB unpacked.*Set TMPDIR"):
        open_images(path)


def test_hdf5_without_a_clear_dataset_lists_them(tmp_path):
    path = write_h5(tmp_path / "x.h5", **{"real": PIXELS, "group/fake": PIXELS, "scores": np.zeros(3)})
    bad(path, "x.h5", "which dataset", "real (7, 6, 5, 3)", "group/fake (7, 6, 5, 3)", "scores (3,)")
    bad(write_h5(tmp_path / "y.h5"), "found none")


def test_truncated_hdf5(tmp_path):
    path = write_h5(tmp_path / "x.h5", images=np.tile(PIXELS, (20, 1, 1, 1)))
    path.write_bytes(path.read_bytes()[:-100])
    bad(path, "x.h5", "cannot be read", "complete")


def test_truncated_npy(tmp_path):
    path = npy(tmp_path / "x.npy")
    path.write_bytes(path.read_bytes()[:-1])
    bad(path, "x.npy", "(7, 6, 5, 3)", "damaged")


def test_objects_that_are_no_arrays():
    bad([PIXELS], "list", "expected a path or an array")
    bad(torch.zeros(2, 4, 4, 3, requires_grad=True), "<array>", "Tensor", "requires grad")
    bad(np.float32(1), "<array>", "single number")


# ------------------------------------------------------------------------------------------- read_ahead


def read_ahead_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_read_ahead_keeps_the_items():
    assert list(read_ahead(iter(range(10)))) == list(range(10))
    assert list(read_ahead([None, False], depth=5)) == [None, False]
    assert read_ahead_threads() == []


def test_read_ahead_reads_ahead_and_no_further(monkeypatch):
    produced, asked = [], []

    class Noting(ThreadPoolExecutor):
        def submit(self, *arguments):
            asked.append(super().submit(*arguments))
            return asked[-1]

    monkeypatch.setattr(evalkit.images, "ThreadPoolExecutor", Noting)
    numbers = read_ahead((produced.append(i) or i for i in count()), depth=2)
    assert next(numbers) == 0
    wait(asked, SECONDS)  # whatever the thread was asked for; it does nothing more by itself
    assert len(produced) == 3  # the one in hand, and two that wait
    numbers.close()


def test_read_ahead_passes_exceptions_on_in_their_place():
    def broken():
        yield 1
        yield 2
        raise OSError("the disk is gone")

    numbers = read_ahead(broken(), depth=4)
    assert [next(numbers), next(numbers)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(numbers)
    assert read_ahead_threads() == []


def test_read_ahead_closed_early_leaves_nothing_behind():
    closed = threading.Event()

    def numbers():
        try:
            yield from count()
        finally:
            closed.set()

    source = numbers()
    ahead = read_ahead(source)
    assert next(ahead) == 0
    assert len(read_ahead_threads()) == 1
    ahead.close()
    assert read_ahead_threads() == []
    assert closed.is_set()


def test_batches_closed_early_leave_no_thread_and_no_open_file(container):
    before = set(threading.enumerate())
    batches = open_images(container).batches(1)
    next(batches)
    del batches
    assert set(threading.enumerate()) == before
    descriptors = Path("/proc/self/fd")
    if isinstance(container, Path) and descriptors.is_dir() and container.suffix != ".npy":
        links = [link for link in descriptors.iterdir() if link.is_symlink()]
        assert not [link for link in links if str(container) in str(link.readlink())]


def test_an_interrupted_consumer_ends_the_process():
    """The background thread must not keep a program alive whose main thread has failed."""
    program = (
        "from itertools import count\n"
        "from evalkit.images import read_ahead\n"
        "for number in read_ahead(count()):\n"
        "    raise KeyboardInterrupt\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=SECONDS, check=False)
    assert b"KeyboardInterrupt" in done.stderr
    assert done.returncode != 0


# --------------------------------------------------------------------------------------------- writing


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


# --------------------------------------------------------------------------------------------- parquet


def test_parquet_labels(tmp_path):
    source = open_images(parquet_folder(tmp_path / "x"))
    np.testing.assert_array_equal(source.labels, np.arange(7))
    assert open_images(write_parquet(tmp_path / "y.parquet", [encoded(PIXELS[0])])).labels is None


def test_parquet_reads_the_rows_that_are_asked_for(tmp_path):
    files = evalkit.images.files.open_image_files(parquet_folder(tmp_path / "x"))
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


# ------------------------------------------------------------------------------- the range of the values

FLOATS = PIXELS.astype(np.float32)
SCALED = {
    "0..1": FLOATS / 255,
    "0..1 overshooting": FLOATS / 255 * 1.2 - 0.1,
    "-1..1": FLOATS / 127.5 - 1,
    "-1..1 overshooting": FLOATS / 100 - 1.3,
    "normalised": (FLOATS / 255 - 0.45) / 0.22,
    "latents": (FLOATS - 128) / 20,
    "dark at first": np.concatenate([np.zeros((40, 6, 5, 3), np.float32), FLOATS / 255]),
}


@pytest.mark.parametrize("key", SCALED)
@pytest.mark.parametrize("form", ["npz", "npy", "hdf5", "array", "part"])
def test_scaled_floats_are_refused_whatever_they_overshoot(tmp_path, form, key):
    x = SCALED[key]
    write = {
        "npz": lambda: write_npz(tmp_path / "x.npz", x),
        "npy": lambda: np.save(tmp_path / "x.npy", x) or tmp_path / "x.npy",
        "hdf5": lambda: write_h5(tmp_path / "x.h5", images=x),
        "array": lambda: x,
        "part": lambda: (
            write_npz(tmp_path / "x.npz", FLOATS) and write_npz(tmp_path / "y.npz", x) and "*.npz"
        ),
    }[form]()
    source = str(tmp_path / write) if form == "part" else write
    bad(source, "holds floats from", "it seems; expected [0, 255]", "--value-range", ".round().clip(0, 255)")


@pytest.mark.parametrize("place", [0, 20, 63])
def test_one_scaled_image_among_others_is_found(tmp_path, place):
    x = np.tile(FLOATS, (10, 1, 1, 1))[:64]
    x[place] /= 255
    bad(
        write_npz(tmp_path / "x.npz", x),
        "1 of 64 images hold floats between",
        f"image {place} (counted from 0)",
    )
    assert len(open_images(tmp_path / "x.npz", value_range="0..255")) == 64


@pytest.mark.parametrize(
    ("value_range", "scale"),
    [("0..1", lambda x: x / 255), ("-1..1", lambda x: x / 127.5 - 1), ((-1, 1), lambda x: x / 127.5 - 1)],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_range_that_is_said_is_believed(tmp_path, value_range, scale, dtype):
    x = scale(PIXELS.astype(np.float64)).astype(dtype)
    path = write_npz(tmp_path / "x.npz", x)
    for source in (path, x, f"{tmp_path}/?.npz"):
        found = open_images(source, value_range=value_range)
        batches = list(found.batches(3))
        assert {batch.dtype for batch in batches} == {np.dtype(np.float32)}
        step = 0.1 if dtype == np.float16 else 1e-4
        np.testing.assert_allclose(np.concatenate(batches), PIXELS, atol=step)
    assert open_images(path, value_range=value_range).digest != open_images(x, value_range="0..255").digest


def test_values_outside_a_range_that_is_said_are_named(tmp_path):
    x = FLOATS / 255
    x[4, 0, 0, 0] = 1.25
    with pytest.raises(ImageError, match=r"image 4 .* holds the value 1\.25; expected .* from 0 to 1.*clip"):
        list(open_images(x, value_range="0..1").batches(3))
    assert "No value of <array> is below 0" in open_images(FLOATS / 255, value_range="-1..1").notes[-1]
    for wrong in ("0..2", "", (0, 2), 1, ("0", "1"), None.__class__):
        with pytest.raises(InputError, match=r"Value range .* expected one of 0\.\.1, -1\.\.1, 0\.\.255"):
            open_images(x, value_range=wrong)


@pytest.mark.parametrize("largest", [1, 2])
def test_floats_cut_to_integers_are_refused(tmp_path, largest):
    x = np.minimum(PIXELS, largest)
    bad(write_npz(tmp_path / "x.npz", x), "no value but 0, 1", "--value-range 0..255")
    bad(
        write_folder(tmp_path / "x", {f"{i}.png": encoded(image) for i, image in enumerate(x)}),
        "no value but",
    )
    assert len(open_images(x, value_range="0..255")) == 7
    x[-1, 0, 0, 0] = 3
    assert len(open_images(x)) == 7
    assert len(open_images(np.zeros_like(x))) == 7


# --------------------------------------------------------------- what is there, and what of it is not used


def test_several_arrays_of_images_are_an_error(tmp_path):
    parts = write_npz(tmp_path / "x.npz", PIXELS[:3], PIXELS[3:6], PIXELS[6:])
    bad(
        parts,
        "3 arrays of images",
        "arr_0 uint8 (3, 6, 5, 3), arr_1 uint8 (3, 6, 5, 3), arr_2",
        "np.concatenate",
    )
    bad(
        write_npz(tmp_path / "y.npz", PIXELS, fake=PIXELS[:, :3]),
        "2 arrays of images",
        "fake uint8 (7, 3, 5, 3)",
    )
    many = write_npz(tmp_path / "z.npz", *([PIXELS] * 300))
    bad(many, "300 arrays of images", "and 292 more")


def test_arrays_that_are_not_used_are_said(tmp_path):
    source = open_images(write_npz(tmp_path / "x.npz", PIXELS, y=np.arange(7), z=np.zeros((7, 4, 4, 4))))
    assert source.notes == (
        f"Arrays of {tmp_path}/x.npz that are not used: y (int64 (7,)), z (float64 (7, 4, 4, 4)).",
    )
    objects = open_images(write_npz(tmp_path / "y.npz", PIXELS, prompts=np.array([{}] * 7, dtype=object)))
    assert "prompts (object (7,))" in objects.notes[0]
    assert (
        open_images(write_npz(tmp_path / "z.npz", PIXELS, indices=np.arange(7), provenance="{}")).notes == ()
    )
    hdf5 = open_images(write_h5(tmp_path / "x.h5", images=PIXELS, latents=np.zeros((7, 2))))
    assert hdf5.notes == (f"Datasets of {tmp_path}/x.h5 that are not used: latents (7, 2).",)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (
            np.eye(7, dtype=np.int64),
            "(7, 7) in arr_1, one-hot it seems; turn it into classes with labels.argmax",
        ),
        (np.arange(7)[:, None], "(7, 1) in arr_1, a column; make it a row with labels.reshape(-1)"),
        (np.arange(7.0), "float64 (7,) in arr_1; turn it into classes with labels.astype(int)"),
        (np.array(["cat"] * 7), "<U3 (7,)"),
        (np.full(7, 2**64 - 1, np.uint64), "18446744073709551615 in arr_1 does not fit"),
    ],
)
def test_labels_that_are_left_out_and_why(tmp_path, labels, said):
    source = open_images(write_npz(tmp_path / "x.npz", PIXELS, labels))
    assert source.labels is None
    assert said in source.labels_problem
    assert source.labels_problem in source.notes


def test_seeds_and_ids_are_told_from_classes():
    assert not are_ids(np.arange(1000))
    assert not are_ids(np.repeat(np.arange(21_841), 2))
    assert not are_ids(np.array([5, 99_999]))
    assert not are_ids(np.array([], np.int64))
    assert are_ids(np.random.default_rng(0).integers(0, 2**32, 50_000))
    assert are_ids(np.array([-(2**63), 2**63 - 1]))


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
    bad(tmp_path / "x.tar", "more data stands after the end", "7 files", "--ignore-zeros")
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


def test_backslashes_between_folders(tmp_path):
    files = {f"{c}\\{i}.png": encoded(PIXELS[i]) for i in range(3) for c in ("cat", "dog")}
    folder = tmp_path / "x"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)  # as extractall leaves them
    for path in (write_zip(tmp_path / "x.zip", files), write_tar(tmp_path / "x.tar", files), folder):
        found = open_image_files(path)
        assert found.names == [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(3)]
        assert "In 6 names" in found.notes[0]
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


def test_folders_that_are_links_alone_are_said(tmp_path):
    write_folder(tmp_path / "real", image_files())
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "cat").symlink_to(tmp_path / "real")
    bad(tmp_path / "x", "no images", "Folders that are links are not entered", "cat")


# ------------------------------------------------------------------- sound input, and other files by name


def test_png_with_a_megabyte_of_text_or_profile(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_itxt("workflow", "{'node': 1}, " * 110_000, zip=True)
    text.add_text("prompt", "x" * 2_000_000, zip=True)
    profile = b"\0" * 3_000_000
    files = image_files() | {
        "a.png": encoded(PIXELS[0], pnginfo=text),
        "b.png": encoded(PIXELS[5], icc_profile=profile),
    }
    source = open_images(write_folder(tmp_path / "x", files))
    np.testing.assert_array_equal(next(source.batches(7)), PIXELS)


@pytest.mark.parametrize("cut", [10, 30, 45, 60])
def test_a_png_that_is_cut_in_its_text_is_damaged(tmp_path, cut):
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "x" * 100)
    data = encoded(PIXELS[0], pnginfo=text)
    bad(write_folder(tmp_path / "x", {"a.png": data[:cut]}), "a.png: cannot be decoded", error=ImageError)


def test_folders_whose_names_sort_otherwise_with_what_follows(tmp_path):
    """`tar --sort=name` has all of `cat` before `cat 2`; as text, `cat 2/` comes before `cat/`."""
    files = {f"{c}/{i}.png": encoded(PIXELS[i]) for c in ("cat", "cat 2", "cat-3") for i in range(2)}
    source = open_images(write_tar(tmp_path / "x.tar.gz", files, "w:gz"))
    expected = open_images(write_folder(tmp_path / "x", files))
    assert source.digest == expected.digest
    np.testing.assert_array_equal(next(source.batches(6)), next(expected.batches(6)))


def test_brackets_in_names_are_no_pattern(tmp_path):
    folder = tmp_path / "runs [v2]"
    folder.mkdir()
    for i, part in enumerate((PIXELS[:3], PIXELS[3:])):
        write_npz(folder / f"part{i}.npz", part)
    assert len(open_images(folder / "part*.npz")) == 7
    assert len(open_images(folder / "part1.npz")) == 4
    bad(folder / "none.npz", "no file or folder matches", "Brackets were tried")
    bad(tmp_path / "x*.npz", "no file or folder matches this pattern.")


OTHER_FILES = {
    "samples.pt": (lambda path: torch.save(torch.zeros(3), path), "is a PyTorch file"),
    "old.pt": (
        lambda path: torch.save(torch.zeros(3), path, _use_new_zipfile_serialization=False),
        "is a Python pickle",
    ),
    "x.pkl": (lambda path: path.write_bytes(pickle.dumps({})), "is a Python pickle"),
    "lfs.npz": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "Git LFS pointer and not the file itself",
    ),
    "page.npz": (lambda path: path.write_text("<!DOCTYPE html>"), "web page"),
    "empty.npz": (lambda path: path.touch(), "it is empty"),
    "one.png": (lambda path: path.write_bytes(encoded(PIXELS[0])), "single PNG image"),
    "x.mp4": (lambda path: path.write_bytes(b"\0\0\0 ftypisom"), "a video"),
    "x.7z": (lambda path: path.write_bytes(b"7z\xbc\xaf\x27\x1c"), "7z archive"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_named_for_what_they_are(tmp_path, name):
    write, said = OTHER_FILES[name]
    write(tmp_path / name)
    bad(tmp_path / name, name, said)


def test_pointers_in_the_place_of_files_are_named(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    bad(write_folder(tmp_path / "x", {"a.png": pointer}), "a.png", "Git LFS pointer", error=ImageError)
    optional("pyarrow", "parquet")
    write_folder(tmp_path / "y", {"a.parquet": pointer})
    bad(tmp_path / "y", "a.parquet", "Git LFS pointer")


def test_no_message_is_longer_than_a_thousand_characters(tmp_path):
    latents = io.BytesIO()
    np.save(latents, np.zeros((8, 4, 4), np.float32))
    members = {f"{i // 100:05}/img-mean-std-{i:08}.npy": latents.getvalue() for i in range(2000)}
    for source in (
        write_zip(tmp_path / "vae.zip", members),
        write_npz(tmp_path / "x.npz", **{"k" * 2000: PIXELS}),
        tmp_path / ("x" * 250) / ("y" * 250),
        write_folder(tmp_path / "odd", {f"{i}.{'s' * i}": b"" for i in range(1, 200)}),
        write_h5(tmp_path / "x.h5", **{f"group{i}/data": np.zeros(3) for i in range(2000)}),
    ):
        with pytest.raises(InputError) as caught:
            open_images(source)
        assert len(str(caught.value)) < 1000


NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize("form", ["npz", "npy", "hdf5", "folder", "zip", "tar", "parquet", "member"])
def test_names_that_are_not_utf8(tmp_path, form):
    folder = tmp_path / NOT_UTF8
    folder.mkdir()
    write = {
        "npz": lambda: write_npz(folder / "x.npz", PIXELS),
        "npy": lambda: npy(folder / "x.npy"),
        "hdf5": lambda: write_h5(folder / "x.h5", images=PIXELS),
        "folder": lambda: write_folder(folder / "x", image_files()),
        "zip": lambda: write_zip(folder / "x.zip", image_files()),
        "tar": lambda: write_tar(folder / "x.tar", image_files()),
        "parquet": lambda: write_parquet(tmp_path / "x", [encoded(x) for x in PIXELS]).rename(folder / "x"),
        "member": lambda: write_folder(
            tmp_path / "y", {f"{NOT_UTF8}/{name}": data for name, data in image_files().items()}
        ),
    }[form]()
    source = open_images(write)
    np.testing.assert_array_equal(next(source.batches(7)), PIXELS)
    assert len(source.digest) == 64
    extract(source, Pixels(), store=None).save(tmp_path / "f.h5")
    assert len(Features.load(tmp_path / "f.h5")) == 7


# ------------------------------------------------------------------------------------- HDF5 that is not whole


def test_hdf5_of_which_parts_were_never_written(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("images", (70, 6, 5, 3), np.uint8, chunks=(7, 6, 5, 3))
        dataset[:7] = PIXELS
    bad(tmp_path / "x.h5", "1 of its 10 chunks were written")
    layout = h5py.VirtualLayout((7, 6, 5, 3), np.uint8)
    layout[:] = h5py.VirtualSource(str(tmp_path / "none.h5"), "images", (7, 6, 5, 3))
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file.create_virtual_dataset("images", layout)
    bad(tmp_path / "v.h5", "other files that are not there", "none.h5")
    (tmp_path / "short.bin").write_bytes(bytes(10))
    with h5py.File(tmp_path / "e.h5", "w") as file:
        external = [(str(tmp_path / "short.bin"), 0, PIXELS.nbytes)]
        file.create_dataset("images", (7, 6, 5, 3), np.uint8, external=external)
    bad(tmp_path / "e.h5", "short.bin, which is not there or too short")


def test_hdf5_in_several_files(tmp_path):
    write_h5(tmp_path / "a.h5", x=PIXELS)
    layout = h5py.VirtualLayout((7, 6, 5, 3), np.uint8)
    layout[:] = h5py.VirtualSource("a.h5", "x", (7, 6, 5, 3))
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file.create_virtual_dataset("images", layout)
    with h5py.File(tmp_path / "l.h5", "w") as file:
        file["images"] = h5py.ExternalLink("a.h5", "x")
        file["other"] = h5py.SoftLink("/nowhere")
        file["preview"] = PIXELS[:2]
    for name in ("v.h5", "l.h5"):
        source = open_images(tmp_path / name)
        np.testing.assert_array_equal(next(source.batches(7)), PIXELS)
        assert source._paths() is None
    assert any("not followed: other" in note for note in source.notes)
    bad(write_h5(tmp_path / "n.h5", arr_0=PIXELS, arr_1=PIXELS), "2 arrays of images")


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
    assert "goes on for 4 bytes after its end" in open_images(path).notes[0]


@pytest.mark.parametrize("form", ["webp", "tif", "png"])
def test_frames_after_the_first_are_said(tmp_path, form):
    frames = [Image.fromarray(x) for x in PIXELS]
    (tmp_path / "x").mkdir()
    for i in range(2):
        frames[0].save(tmp_path / "x" / f"{i}.{form}", save_all=True, append_images=frames[1:], lossless=True)
    for _ in range(2):
        source = open_images(tmp_path / "x")
        np.testing.assert_array_equal(next(source.batches(2))[1], PIXELS[0])
        source.identify()
        assert source.notes == (f"2 images of {tmp_path}/x have several frames, of which the first counts.",)


def test_copies_in_a_pattern_are_said(tmp_path):
    for name in ("s_1.npz", "s_1 (copy).npz", "s_2.npz"):
        write_npz(tmp_path / name, PIXELS[::-1] if "2" in name else PIXELS)
    source = open_images(f"{tmp_path}/s_*.npz")
    source.identify()
    assert f"hold the same images: {tmp_path}/s_1 (copy).npz, {tmp_path}/s_1.npz." in source.notes[-1]


def test_a_bracket_that_may_be_either(tmp_path):
    for name in ("run1", "run[1]"):
        (tmp_path / name).mkdir()
        write_npz(tmp_path / name / "x.npz", PIXELS)
    bad(tmp_path / "run[1]" / "*.npz", "can be read in two ways", "[[] for a bracket")
    assert len(open_images(tmp_path / "run[[]1]" / "*.npz")) == 7


def test_wrapped_and_binary_integers(tmp_path):
    wrapped = np.array([0, 1, 255], np.uint8)[np.arange(7 * 90).reshape(7, 6, 5, 3) % 3]
    bad(write_npz(tmp_path / "x.npz", wrapped), "no value but 0, 1, 255")
    assert len(open_images(np.where(PIXELS > 100, 255, 0).astype(np.uint8))) == 7


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    bad(tmp_path / "pipe", "no ordinary file")
    write_folder(tmp_path / "x", {"a.png": encoded(PIXELS[0])})
    os.mkfifo(tmp_path / "x" / "b.png")
    bad(tmp_path / "x", "b.png: is no ordinary file")


def test_an_npy_that_is_cut_while_it_is_read(tmp_path):
    source = open_images(npy(tmp_path / "x.npy"))
    os.truncate(tmp_path / "x.npy", 300)
    with pytest.raises(InputError, match=r"x\.npy: cannot be read \(EOFError"):
        list(source.batches(2))


def test_names_that_are_too_long(tmp_path, run):
    for arguments in (("compare", "a" * 300, "b"), ("stats", "a*" + "b" * 300, "-o", tmp_path / "x.npz")):
        result = run(*arguments)
        assert result.code == 2, result
        assert "Traceback" not in result.err
        assert len(result.err) < 1000
    result = run("stats", write_npz(tmp_path / "x.npz", PIXELS), "-o", tmp_path / ("c" * 300))
    assert result.code == 2
    assert "File name too long" in result.err


def test_an_output_is_no_part_of_the_input(tmp_path, run):
    for name in "AB":
        write_npz(tmp_path / f"{name}.npz", PIXELS)
    before = (tmp_path / "A.npz").read_bytes()
    for command in ("stats", "features"):
        assert "it is the input" in run(command, f"{tmp_path}/[AB].npz", "-o", tmp_path / "A.npz").err
    assert "it is the input" in run("reference", "convert", f"{tmp_path}/[AB].npz", tmp_path / "A.npz").err
    assert (tmp_path / "A.npz").read_bytes() == before
