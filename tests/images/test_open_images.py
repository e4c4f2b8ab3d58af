"""Opening what there is: containers told by their content, and other files named for what they are."""

import io
import os
import pickle

import numpy as np
import pytest
import torch
from containers import (
    CONTAINERS,
    PIXELS,
    bad,
    encoded,
    image_files,
    npy,
    write_folder,
    write_h5,
    write_npz,
    write_parquet,
    write_tar,
    write_zip,
)
from stand_ins import NO_STORE
from stand_ins import InceptionPixels as Pixels

from evalkit.errors import InputError
from evalkit.features.extraction import extract
from evalkit.features.record import Features
from evalkit.images import open_images


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


def test_missing_file(tmp_path):
    bad(tmp_path / "none.npz", "none.npz", "no such file")


def test_unknown_content(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"hello, world")
    bad(tmp_path / "x.npz", "x.npz", "not that of a known container", "b'hello, w'", "expected an npz")
    (tmp_path / "empty.npz").write_bytes(b"")
    bad(tmp_path / "empty.npz", "empty.npz", "b''")


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
    extract(source, Pixels(), run=NO_STORE).save(tmp_path / "f.h5")
    assert len(Features.load(tmp_path / "f.h5")) == 7


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    bad(tmp_path / "pipe", "is not a regular file")
    write_folder(tmp_path / "x", {"a.png": encoded(PIXELS[0])})
    os.mkfifo(tmp_path / "x" / "b.png")
    bad(tmp_path / "x", "b.png: is not a regular file")


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
