"""Images in containers of every kind, written without evalkit."""

import io
import json
import tarfile
import zipfile

import h5py
import numpy as np
import pytest
import torch
from optional import optional
from PIL import Image

from evalkit.errors import InputError
from evalkit.images import arrays, decode, files, open_images, reading

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
    for module in (arrays, decode, files, reading):
        monkeypatch.setattr(module, "MAX_IMAGE_BYTES", size)


def encoded(pixels, format="PNG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def image_files():
    return {name: encoded(x, name[-3:].upper()) for name, x in zip(NAMES, PIXELS, strict=True)}


def numbered_files(images, labels, unused=None):
    """000.png and so on, labels as EDM's datasets have them, and a file with the suffix ``unused``."""
    files = {f"{index:03}.png": encoded(image) for index, image in enumerate(images)}
    rows = [list(row) for row in zip(files, labels.tolist(), strict=True)]
    files["dataset.json"] = json.dumps({"labels": rows}).encode()
    return files | ({f"more.{unused}": b"text"} if unused else {})


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


def npz_bytes(*arrays, **named):
    buffer = io.BytesIO()
    np.savez(buffer, *arrays, **named)
    return buffer.getvalue()


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


def bad(path, *parts, error=InputError):
    """Opens and reads everything; exactly this error must come, with these words in its message."""
    with pytest.raises(error) as caught:
        for _ in open_images(path).batches(2):
            pass
    message = str(caught.value)
    assert caught.type is error
    for part in parts:
        assert part in message, message


ARRAY_FORMS = {
    "npz": (lambda d, x: write_npz(d / "x.npz", x), "x.npz, arr_0"),
    "hdf5": (lambda d, x: write_h5(d / "x.h5", images=x), "x.h5, images"),
    "array": (lambda d, x: x, "<array>"),
}


def image_containers(directory, files):
    return (
        write_folder(directory / "x", files),
        write_zip(directory / "x.zip", files),
        write_tar(directory / "x.tar", files),
    )
