"""Every container gives the same pixels in the same order, and a digest that follows its content."""

import pickle
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from containers import (
    CONTAINERS,
    PIXELS,
    STATISTICS,
    deflated_npz,
    encoded,
    image_files,
    reverse,
    write_folder,
    write_h5,
    write_npz,
    write_tar,
    write_zip,
)
from patience import SECONDS

import evalkit.system.background
from evalkit.images import open_images, read_ahead


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


@pytest.mark.parametrize(("size", "start"), [(0, 0), (-1, 0), (1, -1), (1, 8)])
def test_batches_refuses_impossible_arguments(size, start):
    with pytest.raises(ValueError, match="expected"):
        open_images(PIXELS).batches(size, start)


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

    monkeypatch.setattr(evalkit.system.background, "ThreadPoolExecutor", Noting)
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


def test_what_can_only_be_read_from_its_beginning(tmp_path):
    found = set()
    for name, write in CONTAINERS.items():
        (tmp_path / name).mkdir()
        if open_images(write(tmp_path / name)).reads_in_order:
            found.add(name)
    packed = {"npz deflated", "tar.gz", "tar.bz2", "tar.xz"}
    assert found == packed | {"npz Fortran order", "parquet", "parquet of bytes"}


def test_what_is_not_hashed_in_the_background(tmp_path):
    """Sources in memory, loaded as a whole, unpacked first or at a URL."""
    found = set()
    for name, write in CONTAINERS.items():
        (tmp_path / name).mkdir()
        if not open_images(write(tmp_path / name))._can_hash_ahead():
            found.add(name)
    assert found == {"npz Fortran order", "array", "array not contiguous", "tensor"}
    assert not open_images(write_tar(tmp_path / "x.tgz", reverse(image_files()), "w:gz"))._can_hash_ahead()
    fortran = tmp_path / "fortran.npy"
    np.save(fortran, np.asfortranarray(PIXELS))
    assert not open_images(fortran)._can_hash_ahead()
    assert not open_images((tmp_path / "npz" / "x.npz").as_uri())._can_hash_ahead()
