"""Some images of a source: the right ones, in the order asked for, and no others are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from containers import encoded, write_folder, write_h5, write_npz, write_tar, write_zip
from numpy.typing import NDArray

from evalkit.errors import ImageError
from evalkit.images import ImageSource, open_images
from evalkit.images.chosen import chosen_images
from evalkit.images.npz import Npz

INDICES = [41, 3, 59, 0, 17, 3, 18]


def pngs(images: NDArray[np.uint8]) -> dict[str, bytes]:
    return {f"{index:03d}.png": encoded(image) for index, image in enumerate(images)}


def stored(folder: Path, images: NDArray[np.uint8]) -> ImageSource:
    return open_images(write_npz(folder / "x.npz", images))


def compressed(folder: Path, images: NDArray[np.uint8]) -> ImageSource:
    np.savez_compressed(folder / "x.npz", images)
    return open_images(folder / "x.npz")


def hdf5(folder: Path, images: NDArray[np.uint8]) -> ImageSource:
    return open_images(write_h5(folder / "x.h5", images=images))


def files(folder: Path, images: NDArray[np.uint8]) -> ImageSource:
    return open_images(write_folder(folder / "files", pngs(images)))


def zipped(folder: Path, images: NDArray[np.uint8]) -> ImageSource:
    """Members in another order than that of their names."""
    members = [*pngs(images).items()]
    shuffled = [members[index] for index in np.random.default_rng(0).permutation(len(images))]
    return open_images(write_zip(folder / "x.zip", dict(shuffled)))


def tarred(folder: Path, images: NDArray[np.uint8]) -> ImageSource:
    return open_images(write_tar(folder / "x.tar.gz", pngs(images), "w:gz"))


def parts(folder: Path, images: NDArray[np.uint8]) -> ImageSource:
    for number, part in enumerate(np.split(images, [18, 41])):
        np.savez_compressed(folder / f"{number}.npz", part)
    return open_images(str(folder / "?.npz"))


def array(folder: Path, images: NDArray[np.uint8]) -> ImageSource:
    del folder
    return open_images(images)


MAKERS = [stored, compressed, hdf5, files, zipped, tarred, parts, array]


@pytest.mark.parametrize("make", MAKERS)
def test_the_images_asked_for(
    make: Callable[[Path, NDArray[np.uint8]], ImageSource], images: NDArray[np.uint8], tmp_path: Path
) -> None:
    source = make(tmp_path, images)
    np.testing.assert_array_equal(chosen_images(source, INDICES), images[INDICES])
    np.testing.assert_array_equal(chosen_images(source, [0]), images[:1])
    for bad in ([-1], [5, 60]):
        with pytest.raises(ValueError, match="there are 60 images"):
            chosen_images(source, bad)


@pytest.mark.parametrize("make", [stored, files])
def test_others_are_not_read(
    make: Callable[[Path, NDArray[np.uint8]], ImageSource], images: NDArray[np.uint8], tmp_path: Path
) -> None:
    """Damage to them would be an error."""
    source = make(tmp_path, images)
    if make is files:
        for index in {*range(60)} - {*INDICES}:
            (tmp_path / "files" / f"{index:03d}.png").write_bytes(b"no image")
    else:
        path = tmp_path / "x.npz"
        data = path.read_bytes()
        assert data.count(images[30].tobytes()) == 1
        path.write_bytes(data.replace(images[30].tobytes(), bytes(images[30].size)))
    wanted = [index for index in INDICES if index]  # from the first on, a file's checksum is compared
    np.testing.assert_array_equal(chosen_images(source, wanted), images[wanted])


def test_each_part_is_read_once(
    images: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a compressed one, each further reading would begin at its beginning."""
    source, read, reads = parts(tmp_path, images), Npz._read, list[str]()

    def counted(self: Npz, *arguments: Any) -> Iterator[NDArray[Any]]:
        reads.append(Path(self.name).name)
        return read(self, *arguments)

    monkeypatch.setattr(Npz, "_read", counted)
    np.testing.assert_array_equal(chosen_images(source, INDICES), images[INDICES])
    assert reads == ["0.npz", "1.npz", "2.npz"]
    np.testing.assert_array_equal(chosen_images(source, [40, 20, 30]), images[[40, 20, 30]])
    assert reads[3:] == ["1.npz"]


def test_floats_become_pixels_and_are_checked(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    np.savez(tmp_path / "x.npz", images.astype(np.float32) / 127.5 - 1)
    source = open_images(tmp_path / "x.npz", value_range="-1..1")
    np.testing.assert_allclose(chosen_images(source, INDICES), images[INDICES], atol=1e-4)
    bad = images.astype(np.float32)
    bad[17, 0, 0, 0] = np.nan
    with pytest.raises(ImageError, match="image 17 "):
        chosen_images(open_images(bad, value_range="0..255"), INDICES)
