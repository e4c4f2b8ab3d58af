"""HDF5 files of images, whole or not."""

import h5py
import numpy as np
from containers import (
    PIXELS,
    bad,
    write_h5,
)

from evalkit.images import open_images


def test_hdf5_without_a_clear_dataset_lists_them(tmp_path):
    path = write_h5(tmp_path / "x.h5", **{"real": PIXELS, "group/fake": PIXELS, "scores": np.zeros(3)})
    bad(path, "x.h5", "which dataset", "real (7, 6, 5, 3)", "group/fake (7, 6, 5, 3)", "scores (3,)")
    bad(write_h5(tmp_path / "y.h5"), "found none")


def test_truncated_hdf5(tmp_path):
    path = write_h5(tmp_path / "x.h5", images=np.tile(PIXELS, (20, 1, 1, 1)))
    path.write_bytes(path.read_bytes()[:-100])
    bad(path, "x.h5", "cannot be read", "complete")


def test_hdf5_of_which_parts_were_never_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # long paths are cut
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("images", (70, 6, 5, 3), np.uint8, chunks=(7, 6, 5, 3))
        dataset[:7] = PIXELS
    bad(tmp_path / "x.h5", "1 of its 10 chunks were written")
    layout = h5py.VirtualLayout((7, 6, 5, 3), np.uint8)
    layout[:] = h5py.VirtualSource("none.h5", "images", (7, 6, 5, 3))
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file.create_virtual_dataset("images", layout)
    bad("v.h5", "other files that are missing", "none.h5")
    (tmp_path / "short.bin").write_bytes(bytes(10))
    with h5py.File(tmp_path / "e.h5", "w") as file:
        external = [(str(tmp_path / "short.bin"), 0, PIXELS.nbytes)]
        file.create_dataset("images", (7, 6, 5, 3), np.uint8, external=external)
    bad(tmp_path / "e.h5", "short.bin, which is missing or too short")


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


def make_hdf5(path, images, labels, unused=None):
    """For the contract of formats."""
    others = {unused: np.zeros(3)} if unused else {}
    write_h5(path, images=images, labels=labels, **others)
