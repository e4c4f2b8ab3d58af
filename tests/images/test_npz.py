"""The npz of the reference evaluator: images, labels, statistics; damage is refused before it is read."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest
from containers import (
    PIXELS,
    STATISTICS,
    bad,
    write_h5,
    write_npz,
    write_raw_npy_zip,
    write_zip,
)

from evalkit.errors import InputError
from evalkit.images import open_images


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
    other = open_images(write_npz(tmp_path / "y.npz", mu_s=STATISTICS["mu_s"], sigma_s=STATISTICS["sigma_s"]))
    assert other.statistics.keys() == {"mu_s", "sigma_s"}
    assert "there is no mu for FID" in other.notes[-1]
    assert other.digest != source.digest


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


def make_npz(path, images, labels, unused=None):
    """For the contract of formats."""
    others = {unused: np.zeros(3)} if unused else {}
    with path.open("wb") as file:
        np.savez(file, arr_0=images, arr_1=labels, **others)
