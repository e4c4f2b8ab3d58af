"""A batch is known by its content: damaged, forged and changed files never get another one's features."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from stand_ins import NO_STORE
from stand_ins import InceptionPixels as Pixels

import evalkit.system.identity
from evalkit.comparison import compare
from evalkit.errors import InputError
from evalkit.features.extraction import extract
from evalkit.images import ImageSource, open_images
from evalkit.images.files import ImageFiles
from evalkit.system.run import Run

OLD = 1_600_000_000


def settle(*paths: Path) -> None:
    """Make files look as if they were written long ago, as far as a user can."""
    for path in paths:
        os.utime(path, (OLD, OLD))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written a moment ago is remembered, too."""
    monkeypatch.setattr(evalkit.system.identity, "SETTLED_SECONDS", -3600.0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the sources that are read to be hashed."""
    names: list[str] = []
    examine = ImageSource._examine

    def counted(self: ImageSource, progress: Any) -> dict[str, Any]:
        names.append(self.name)
        return examine(self, progress)

    monkeypatch.setattr(ImageSource, "_examine", counted)
    return names


def flipped(path: Path, out: Path, *, repair: bool) -> Path:
    """A copy of a stored npz with 600 bytes of its pixels changed; its checksums repaired, or not."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("arr_0.npy")
    begin = info.header_offset + 30 + sum(struct.unpack_from("<2H", data, info.header_offset + 26)) + 200
    for place in range(begin, begin + 600):
        data[place] ^= 0xFF
    if repair:
        start = info.header_offset + 30 + sum(struct.unpack_from("<2H", data, info.header_offset + 26))
        crc = zipfile.crc32(bytes(data[start : start + info.file_size]))  # type: ignore[attr-defined]
        struct.pack_into("<I", data, info.header_offset + 14, crc)
        struct.pack_into("<I", data, data.index(b"PK\1\2") + 16, crc)
    out.write_bytes(data)
    return out


def test_a_damaged_copy_of_a_stored_file_is_refused(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    store = tmp_path / "store"
    np.savez(tmp_path / "sound.npz", images)
    sound = compare(images[::2], tmp_path / "sound.npz", extractor=Pixels(), run=Run(store=store))
    damaged = flipped(tmp_path / "sound.npz", tmp_path / "damaged.npz", repair=False)
    with pytest.raises(InputError, match=r"damaged\.npz: cannot be read \(BadZipFile: Bad CRC-32"):
        compare(images[::2], damaged, extractor=Pixels(), run=Run(store=store))
    # With sound checksums it is just another batch.
    other = compare(
        images[::2],
        flipped(tmp_path / "sound.npz", tmp_path / "other.npz", repair=True),
        extractor=Pixels(),
        run=Run(store=store),
    )
    assert other.samples.features == "extracted"
    assert other["fid"] != sound["fid"]
    expected = compare(
        images[::2], np.load(tmp_path / "other.npz")["arr_0"], extractor=Pixels(), run=NO_STORE
    )
    assert other["fid"] == expected["fid"]


def test_a_forged_directory_gets_no_features(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    """The checksum in the directory of a zip is whatever its author writes there."""
    np.savez(tmp_path / "victim.npz", images)
    np.savez(tmp_path / "forged.npz", images[::-1].copy())
    with zipfile.ZipFile(tmp_path / "victim.npz") as archive:
        wanted = archive.getinfo("arr_0.npy").CRC
    data = bytearray((tmp_path / "forged.npz").read_bytes())
    struct.pack_into("<I", data, 14, wanted)
    struct.pack_into("<I", data, data.index(b"PK\1\2") + 16, wanted)
    (tmp_path / "forged.npz").write_bytes(data)
    store = tmp_path / "store"
    extract(open_images(tmp_path / "victim.npz"), Pixels(), run=Run(store=store))
    with pytest.raises(InputError, match="Bad CRC-32"):
        extract(open_images(tmp_path / "forged.npz"), Pixels(), run=Run(store=store))


def test_one_content_has_one_digest_in_all_containers_of_arrays(
    tmp_path: Path, images: NDArray[np.uint8]
) -> None:
    np.savez(tmp_path / "x.npz", images)
    np.savez_compressed(tmp_path / "y.npz", images, np.arange(60))
    np.save(tmp_path / "x.npy", images)
    paths = [tmp_path / name for name in ("x.npz", "y.npz", "x.npy")]
    assert len({open_images(source).digest for source in (*paths, images)}) == 1
    assert open_images(images).digest != open_images(images[::-1]).digest
    assert open_images(images).digest != open_images(images.astype(np.int64)).digest


@pytest.mark.usefixtures("settled")
def test_a_file_is_read_once_until_it_changes(
    tmp_path: Path, images: NDArray[np.uint8], reads: list[str]
) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images)
    first = open_images(path).digest
    assert open_images(path).digest == open_images(tmp_path / "." / "x.npz").digest == first
    assert len(reads) == 1
    # The same size and times, as of a copy with `cp --preserve`: the inode's own time tells.
    before = path.stat()
    path.write_bytes(flipped(path, tmp_path / "y.npz", repair=True).read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert open_images(path).digest != first
    assert len(reads) == 2
    # Another file under the same name.
    np.savez(tmp_path / "z.npz", images)
    (tmp_path / "z.npz").replace(path)
    assert open_images(path).digest == first
    assert len(reads) == 3


def test_a_file_of_a_moment_ago_is_not_remembered(
    tmp_path: Path, images: NDArray[np.uint8], reads: list[str]
) -> None:
    np.savez(tmp_path / "x.npz", images)
    settle(tmp_path / "x.npz")  # its content's time, but not that of the inode
    assert open_images(tmp_path / "x.npz").digest == open_images(tmp_path / "x.npz").digest
    assert len(reads) == 2


@pytest.mark.usefixtures("settled")
def test_every_file_of_a_folder_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(3):
        Image.new("RGB", (8, 8), (50 * index + 20, 0, 0)).save(tmp_path / f"{index}.png")
    reads = []
    digest = ImageFiles.digest

    def counted(self: ImageFiles, look: Callable[[str, bytes], object]) -> str:
        reads.append(self.name)
        return digest(self, look)

    monkeypatch.setattr(ImageFiles, "digest", counted)
    first = open_images(tmp_path).digest
    assert open_images(tmp_path).digest == first
    assert len(reads) == 1
    Image.new("RGB", (8, 8), (5, 5, 5)).save(tmp_path / "1.png")
    assert open_images(tmp_path).digest != first
    assert len(reads) == 2


@pytest.mark.usefixtures("settled")
def test_a_damaged_or_foreign_record_is_not_believed(
    tmp_path: Path, images: NDArray[np.uint8], own_cache: Path
) -> None:
    np.savez(tmp_path / "x.npz", images)
    first = open_images(tmp_path / "x.npz").digest
    (record,) = (own_cache / "contents").iterdir()
    for text in ("", "{", "[]", '{"key": 1, "stamp": 2}', record.read_text().replace('"key"', '"k"')):
        record.write_text(text)
        assert open_images(tmp_path / "x.npz").digest == first


def test_without_a_cache_folder_it_is_read_every_time(
    tmp_path: Path, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "x.npz", images)
    (tmp_path / "file").touch()
    monkeypatch.setenv("EVALKIT_CACHE", str(tmp_path / "file"))
    assert open_images(tmp_path / "x.npz").digest == open_images(images).digest
    monkeypatch.delenv("EVALKIT_CACHE")
    monkeypatch.setattr(Path, "home", home_of_nobody)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert open_images(tmp_path / "x.npz").digest == open_images(images).digest


def home_of_nobody() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("when", ["hashed", "extracted"])
def test_a_file_that_changes_meanwhile_is_noticed(
    tmp_path: Path, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    path, store = tmp_path / "x.npz", tmp_path / "store"
    np.savez(path, images)
    other = tmp_path / "y.npz"
    np.savez(other, images[::-1].copy())
    read: Callable[..., Any] = ImageSource._examine if when == "hashed" else Pixels.__call__

    def replaced(*arguments: Any) -> Any:
        if other.exists():
            other.replace(path)
        return read(*arguments)

    monkeypatch.setattr(*((ImageSource, "_examine") if when == "hashed" else (Pixels, "__call__")), replaced)
    with pytest.raises(InputError, match=r"x\.npz changed while it was read"):
        extract(open_images(path), Pixels(), run=Run(store=store))
    assert list((tmp_path / "store").rglob("*.h5")) == []


def test_other_statistics_are_another_reference(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    statistics = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(tmp_path / "a.npz", images, **statistics)
    np.savez(tmp_path / "b.npz", images, **(statistics | {"mu": np.ones(2048)}))
    a, b = open_images(tmp_path / "a.npz"), open_images(tmp_path / "b.npz")
    assert a.digest == b.digest
    assert None not in (a.statistics_digest, b.statistics_digest)
    assert a.statistics_digest != b.statistics_digest
    assert open_images(images).statistics_digest is None


@pytest.mark.usefixtures("settled")
def test_an_npy_that_is_written_through_a_map(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    path = tmp_path / "x.npy"
    np.save(path, images)
    first = open_images(path).digest
    mapped = np.load(path, mmap_mode="r+")
    mapped[:] = images[::-1]
    mapped.flush()
    assert open_images(path).digest == open_images(images[::-1]).digest != first


@pytest.mark.usefixtures("settled")
def test_a_source_that_is_open_is_not_another_file(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    path, store = tmp_path / "x.npz", tmp_path / "store"
    np.savez(path, images)
    source = open_images(path)
    compare(source, images, extractor=Pixels(), run=Run(store=store))
    np.savez(path, images[::-1].copy())
    with pytest.raises(InputError, match=r"x\.npz changed while it was read"):
        compare(source, images, extractor=Pixels(), run=Run(store=store))


def test_a_folder_that_changes_leaves_nothing_in_the_store(tmp_path: Path) -> None:
    folder, store = tmp_path / "x", tmp_path / "store"
    folder.mkdir()
    for index in range(6):
        Image.new("RGB", (8, 8), (40 * index + 20, 0, 0)).save(folder / f"{index}.png")
    source = open_images(folder)
    source.identify()
    Image.new("RGB", (8, 8), (5, 5, 5)).save(folder / "3.png")
    with pytest.raises(InputError, match="changed while it was read"):
        extract(source, Pixels(), run=Run(store=store))
    assert list((tmp_path / "store").rglob("*.h5")) == []


@pytest.mark.usefixtures("settled")
def test_a_file_that_is_remembered_still_has_its_checksum_compared(
    tmp_path: Path, images: NDArray[np.uint8]
) -> None:
    """Damage that changes neither size nor times is not the remembered file's features."""
    sound = tmp_path / "x.npz"
    np.savez(sound, images)
    settle(sound)
    digest = open_images(sound).digest
    settle(flipped(sound, tmp_path / "y.npz", repair=False))
    with sound.open("r+b") as file:
        file.write((tmp_path / "y.npz").read_bytes())
    settle(sound)
    again = open_images(sound)
    again._found, again._stamp = {"digest": digest}, None  # as if it were remembered, whatever the clock says
    with pytest.raises(InputError, match="cannot be read"):
        list(again.batches(4))
