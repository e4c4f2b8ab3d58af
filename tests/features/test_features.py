"""Extraction and the feature store: nothing stale, nothing lost, nothing half-written."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from stand_ins import NO_STORE
from stand_ins import InceptionPixels as Pixels

from evalkit.errors import FeatureError, InputError, OutputError
from evalkit.features import extraction, pieces
from evalkit.features import store as store_module
from evalkit.features.extraction import Extraction, Wanted, extract, first_features
from evalkit.features.moments import Gaussian
from evalkit.features.record import Features, check_same_extractor, is_features_file
from evalkit.features.store import StoredBatch
from evalkit.images import ImageSource, open_images
from evalkit.system.files import STALE_SECONDS, check_writable, remove_stale_partials, replace_atomically
from evalkit.system.run import Run


class Counting(Pixels):
    """Counts the images it is given."""

    def __init__(self, variant: str = ""):
        super().__init__(variant)
        self.seen = 0

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        self.seen += len(images)
        return super().__call__(images)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def folder_of(store: Path, images: ImageSource, extractor: Pixels) -> Path:
    return StoredBatch(store, images, extractor).folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces grow to these, because all take no time."""
    monkeypatch.setattr(store_module, "SHARD", 16)
    monkeypatch.setattr(pieces, "monotonic", lambda: 0.0)


def test_first_features_come_from_the_store_and_are_not_kept_there(
    store: Path, images: NDArray[np.uint8]
) -> None:
    extractor, source = Counting(), open_images(images)
    expected = extract(open_images(images[:10]), Pixels())
    for _ in range(2):
        found = first_features(source, extractor, 10, run=Run(store=store))
        assert len(found) == 10
        for layer in ("pool", "spatial", "logits"):
            np.testing.assert_array_equal(found.arrays[layer], expected.arrays[layer])
    assert extractor.seen == 20
    assert not store.exists()
    extract(source, extractor, run=Run(store=store))
    seen = extractor.seen
    np.testing.assert_array_equal(
        first_features(source, extractor, 10, run=Run(store=store)).arrays["pool"], expected.arrays["pool"]
    )
    assert extractor.seen == seen
    # More than the first part has, more than there are, and a damaged part.
    assert len(first_features(source, extractor, 20, run=Run(store=store))) == 20
    assert len(first_features(source, extractor, 1000, run=NO_STORE)) == len(images)
    for file in folder_of(store, source, extractor).glob("*.h5"):
        file.write_bytes(b"damaged")
    np.testing.assert_array_equal(
        first_features(source, extractor, 10, run=Run(store=store)).arrays["pool"], expected.arrays["pool"]
    )


def test_second_time_comes_from_the_store(store: Path, images: NDArray[np.uint8]) -> None:
    extractor = Counting()
    plain = extract(open_images(images), extractor)
    first = extract(open_images(images), extractor, run=Run(store=store))
    assert extractor.seen == 120
    again = extract(open_images(images), extractor, run=Run(store=store))
    assert extractor.seen == 120
    for layer in ("pool", "spatial"):
        assert np.array_equal(plain.arrays[layer], first.arrays[layer])
        assert np.array_equal(plain.arrays[layer], again.arrays[layer])


def test_a_changed_pixel_order_or_setting_is_never_stale(store: Path, images: NDArray[np.uint8]) -> None:
    extract(open_images(images), Pixels(), run=Run(store=store))
    changed = images.copy()
    changed[37, 3, 2, 1] ^= 1
    for array, extractor in (
        (changed, Counting()),
        (images[::-1], Counting()),
        (images[:-1], Counting()),
        (images, Counting("other weights")),
    ):
        got = extract(open_images(np.ascontiguousarray(array)), extractor, run=Run(store=store))
        assert extractor.seen == len(array)
        assert np.array_equal(got.arrays["pool"], Pixels()(array)["pool"])


@pytest.mark.parametrize(
    ("batch_size", "begins"),
    [
        (1, [0, 1, 2, 4, 8, 16, 32, 48]),
        (7, [0, 4, 8, 16, 32, 48]),
        (16, [0, 16, 32, 48]),
        (50, [0, 16, 32, 48]),
        (1000, [0, 16, 32, 48]),
    ],
)
def test_batch_size_and_shards_are_independent(
    store: Path,
    images: NDArray[np.uint8],
    batch_size: int,
    begins: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Pixels, "batch_size", batch_size)
    got = extract(open_images(images), Pixels(), run=Run(store=store))
    assert np.array_equal(got.arrays["pool"], Pixels()(images)["pool"])
    folder = folder_of(store, open_images(images), Pixels())
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{begin:08d}-{end:08d}.h5" for begin, end in pairwise([*begins, 60])
    ]


def test_missing_and_damaged_shards_alone_are_extracted_again(store: Path, images: NDArray[np.uint8]) -> None:
    expected = extract(open_images(images), Pixels(), run=Run(store=store)).arrays["pool"]
    shards = sorted(folder_of(store, open_images(images), Pixels()).iterdir())
    shards[0].unlink()
    with shards[2].open("r+b") as file:  # one flipped byte amid the numbers
        file.seek(shards[2].stat().st_size - 200)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x40]))
    shards[3].write_bytes(b"")
    extractor = Counting()
    got = extract(open_images(images), extractor, run=Run(store=store))
    assert np.array_equal(got.arrays["pool"], expected)
    assert extractor.seen == 16 + 16 + 12


def test_interrupted_run_goes_on(store: Path, images: NDArray[np.uint8]) -> None:
    class Interrupted(Counting):
        batch_size = 8

        def __call__(self, batch: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
            if self.seen >= 40:
                raise KeyboardInterrupt
            return super().__call__(batch)

    with pytest.raises(KeyboardInterrupt):
        extract(open_images(images), Interrupted(), run=Run(store=store))
    extractor = Counting()
    got = extract(open_images(images), extractor, run=Run(store=store))
    assert extractor.seen == 60 - 32
    assert np.array_equal(got.arrays["pool"], Pixels()(images)["pool"])


KILLED = """
import json, random, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import deaths
from evalkit.features import extraction, store as features
from evalkit.extractors.pixels import Pixels; Pixels.network = 'inception'
from evalkit.images import open_images
from evalkit.system.run import Run
torch.set_num_threads(1)  # a process with a pool of threads cannot be forked
features.SHARD, Pixels.batch_size = 4, 2

def extract(store):
    return lambda: extraction.extract(open_images(sys.argv[2]), Pixels(), run=Run(store=store))

calls, chance, done = deaths.calls_of(extract(sys.argv[4])), random.Random(0), []
for _ in range(5):
    dying = deaths.dying_after(int(calls * chance.uniform(0.12, 0.18)), extract(sys.argv[3]))
    assert deaths.wait(deaths.start(dying)) == -signal.SIGKILL
    done.append(sum(int(file.stem[9:]) - int(file.stem[:8]) for file in Path(sys.argv[3]).glob("*/0*.h5")))
print(json.dumps(done))
"""


def test_kill_at_any_moment_leaves_a_store_that_works(
    tmp_path: Path, store: Path, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SHARD", 4)
    np.savez(tmp_path / "a.npz", arr_0=np.concatenate([images] * 10))
    arguments = Path(__file__).parents[1] / "support", tmp_path / "a.npz", store, tmp_path / "once"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert killed.returncode == 0, killed.stderr
    done = json.loads(killed.stdout)
    assert done == sorted(done)
    assert 48 <= done[0] < done[-1] < 600
    extractor = Counting()
    source = open_images(tmp_path / "a.npz")
    got = extract(source, extractor, run=Run(store=store))
    assert extractor.seen == 600 - done[-1]
    assert np.array_equal(got.arrays["pool"], Pixels()(np.concatenate([images] * 10))["pool"])


def test_images_that_go_bad_late_keep_what_was_extracted(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pixels, "batch_size", 8)
    values = np.full((40, 8, 8, 3), 90, np.float32)
    values[33, 1, 1, 1] = np.nan
    with pytest.raises(InputError, match="33"):
        extract(open_images(values), Pixels(), run=Run(store=store))
    # Of 8, 8 and 16 images.
    assert len(list(folder_of(store, open_images(values), Pixels()).iterdir())) == 3


def test_full_disk_is_said_and_leaves_no_half_file(
    store: Path, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = h5py.File
    made: list[Path] = []

    def full(path: Path, mode: str) -> Any:
        if mode == "w" and len(made) == 2:
            raise OSError(28, "No space left on device")
        if mode == "w":
            made.append(Path(path))
        return real(path, mode)

    monkeypatch.setattr(h5py, "File", full)
    with pytest.raises(OutputError, match=r"no space left.*EVALKIT_CACHE.*--no-store.*again"):
        extract(open_images(images), Pixels(), run=Run(store=store))
    monkeypatch.undo()
    monkeypatch.setattr(store_module, "SHARD", 16)
    assert len(list(folder_of(store, open_images(images), Pixels()).iterdir())) == 2
    extractor = Counting()
    extract(open_images(images), extractor, run=Run(store=store))
    assert extractor.seen == 60 - 32


def test_too_little_space_is_said_before_the_work(
    store: Path, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    extractor = Counting()
    with pytest.raises(OutputError, match=r"needs 0.00 GB.*--no-store"):
        extract(open_images(images), extractor, run=Run(store=store))
    assert extractor.seen == 0


def test_unwritable_store_is_said(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="EVALKIT_CACHE"):
        extract(open_images(images), Pixels(), run=Run(store=tmp_path / "file"))


def test_progress_counts_every_image_once(store: Path, images: NDArray[np.uint8]) -> None:
    calls: list[tuple[int, int]] = []
    extract(
        open_images(images),
        Pixels(),
        run=Run(store=store, progress=lambda _, done, total: calls.append((done, total))),
    )
    assert calls[0] == (0, 60)
    assert calls[-1] == (60, 60)
    calls.clear()
    extract(
        open_images(images),
        Pixels(),
        run=Run(store=store, progress=lambda _, done, total: calls.append((done, total))),
    )
    assert calls == [(60, 60)]


def test_features_file_round_trip(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    features = extract(open_images(images), Pixels())
    generator = np.random.default_rng(0)
    sigma = np.cov(generator.standard_normal((100, 48)), rowvar=False)
    full = Features(
        name="a",
        digest=features.digest,
        network="inception",
        extractor="pixels",
        fingerprint=features.fingerprint,
        arrays=features.arrays,
        gaussians={"pool": Gaussian(mean=np.zeros(48), covariance=sigma, n=100)},
        image_shape=(12, 10, 3),
        labels=np.arange(60),
    )
    path = tmp_path / "a.h5"
    full.save(path)
    assert is_features_file(path)
    back = Features.load(path)
    assert (back.name, back.digest, back.fingerprint, back.image_shape) == (
        "a",
        full.digest,
        full.fingerprint,
        (12, 10, 3),
    )
    assert np.array_equal(back.arrays["pool"], full.arrays["pool"])
    assert np.array_equal(back.labels, full.labels)
    assert np.array_equal(back.gaussians["pool"].covariance, sigma)
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_features_file(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    path = tmp_path / "a.h5"
    extract(open_images(images), Pixels()).save(path)
    with h5py.File(path, "r+") as file:
        del file.attrs["digest"]
    with pytest.raises(InputError, match=r"a\.h5 is a damaged features file"):
        Features.load(path)
    with h5py.File(path, "r+") as file:
        file.attrs["format"] = "evalkit features 99"
    assert is_features_file(path)
    with pytest.raises(InputError, match="not a features file of this version"):
        Features.load(path)
    assert not is_features_file(tmp_path / "absent.h5")


def test_features_of_another_extractor_are_refused(images: NDArray[np.uint8]) -> None:
    a, b = (extract(open_images(images), Pixels(variant)) for variant in ("", "other"))
    with pytest.raises(FeatureError, match="different extractors"):
        check_same_extractor(a, b)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")

    def break_off() -> None:
        with replace_atomically(path) as partial:
            partial.write_text("half")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        break_off()
    with pytest.raises(OutputError, match="no space left"), replace_atomically(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with replace_atomically(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"


def test_outputs_are_checked_beforehand(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="it is a folder"):
        check_writable(tmp_path)
    with pytest.raises(OutputError, match="there is no folder"):
        check_writable(tmp_path / "absent" / "a.json")


def test_partials_of_killed_runs_are_removed(tmp_path: Path) -> None:
    old, new = tmp_path / ".a.h5.1.partial", tmp_path / ".b.h5.2.partial"
    for path in (old, new):
        path.write_text("")
    past = time.time() - STALE_SECONDS - 1
    os.utime(old, (past, past))
    remove_stale_partials(tmp_path)
    assert not old.exists()
    assert new.exists()


def test_a_source_that_ends_early_is_an_error(
    images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_images(images)
    whole = source.batches

    def short(size: int, start: int, stop: int | None) -> Iterator[NDArray[Any]]:
        yield next(iter(whole(10, start)))

    monkeypatch.setattr(source, "batches", short)
    with pytest.raises(InputError, match="ended at image 10; expected 60"):
        extract(source, Pixels())


# In parts ---------------------------------------------------------------------------------------------


class Noting(Counting):
    """Notes how many images each forward pass was given."""

    batch_size = 13

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[int] = []

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        self.passes.append(len(images))
        return super().__call__(images)


def test_forward_passes_do_not_depend_on_what_was_there(store: Path, images: NDArray[np.uint8]) -> None:
    """No pass goes over the end of a piece, so an image is in the same pass in every run."""
    whole = Noting()
    extract(open_images(images), whole, run=Run(store=store))
    assert whole.passes == [8, 8, 8, 8, 8, 8, 8, 4]
    files = sorted(folder_of(store, open_images(images), whole).iterdir())
    assert [file.stem[9:] for file in files] == ["00000008", "00000016", "00000032", "00000048", "00000060"]
    for file in (files[2], files[4]):
        file.unlink()
    again = Noting()
    extract(open_images(images), again, run=Run(store=store))
    assert again.passes == [8, 8, 8, 4]
    alone = Noting()
    extract(open_images(images), alone)
    assert alone.passes == whole.passes


@pytest.mark.parametrize("stored", [True, False])
def test_moments_and_rows_in_one_pass(
    store: Path, images: NDArray[np.uint8], stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "GROUP", 2)
    extractor, rows = Counting(), np.array([0, 15, 16, 40, 59])
    got = extract(
        open_images(images),
        extractor,
        outputs=("pool", "logits"),
        rows=rows,
        moments=("pool", "spatial"),
        run=Run(store=store if stored else None),
    )
    assert extractor.seen == len(got) == 60
    whole = Pixels()(images)
    assert "spatial" not in got.arrays
    assert np.array_equal(got.arrays["pool"], whole["pool"][rows])
    assert np.array_equal(got.arrays["logits"], Pixels().derive("logits", whole["pool"][rows]))
    for layer in ("pool", "spatial"):
        statistics, expected = got.gaussians[layer], whole[layer].astype(np.float64)
        np.testing.assert_allclose(statistics.mean, expected.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(
            statistics.covariance, np.cov(expected, rowvar=False), rtol=1e-9, atol=1e-15
        )


def test_moments_are_the_same_bits_from_the_store_and_without(
    store: Path, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "GROUP", 2)
    found = [
        extract(open_images(images), Pixels(), outputs=(), moments=("pool",), run=Run(store=where)).gaussians[
            "pool"
        ]
        for where in (None, store, store)
    ]
    for other in found[1:]:
        assert np.array_equal(found[0].mean, other.mean)
        assert np.array_equal(found[0].covariance, other.covariance)


def test_only_what_is_needed_is_extracted(store: Path, images: NDArray[np.uint8]) -> None:
    extractor = Counting()
    assert not extract(open_images(images), extractor, outputs=(), run=Run(store=store)).arrays
    assert extractor.seen == 0
    wanted = Wanted(extractor=extractor, arrays=["pool"])
    Extraction(open_images(images), [wanted], run=Run(store=store)).features()
    assert extractor.seen == 60
    extract(open_images(images), extractor, moments=("pool",), run=Run(store=store))
    assert extractor.seen == 60


def test_damage_is_mended_while_moments_are_summed_up(store: Path, images: NDArray[np.uint8]) -> None:
    settings: dict[str, Any] = {"outputs": (), "moments": ("pool",)}
    first = extract(open_images(images), Pixels(), **settings, run=Run(store=store))
    expected = first.gaussians["pool"].covariance
    shards = sorted(folder_of(store, open_images(images), Pixels()).iterdir())
    shards[1].write_bytes(b"no HDF5")
    with h5py.File(shards[2], "r+") as file:
        del file["pool"]
        file["pool"] = np.zeros((3, 48), np.float32)  # of another shape
    extractor, calls = Counting(), []
    got = extract(
        open_images(images),
        extractor,
        **settings,
        run=Run(store=store, progress=lambda _, *numbers: calls.append(numbers)),
    )
    assert np.array_equal(got.gaussians["pool"].covariance, expected)
    assert extractor.seen == 32
    assert all(done <= total == 60 for done, total in calls)


def test_a_feature_that_is_not_finite_is_named(images: NDArray[np.uint8]) -> None:
    class Broken(Counting):
        def __call__(self, batch: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
            features = super().__call__(batch)
            if self.seen == 48:  # images 32 to 47
                features["pool"][3, 5] = np.inf
            return features

    with pytest.raises(FeatureError, match="<array>, pool, counted from image 32: the features of image 3"):
        extract(open_images(images), Broken(), outputs=(), moments=("pool",))


@pytest.mark.parametrize("stored", [True, False])
def test_moments_take_the_same_memory_for_any_number_of_images(
    tmp_path: Path, store: Path, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SHARD", 512)
    parts = np.random.default_rng(0).integers(0, 256, (5, 2000, 4, 4, 3), dtype=np.uint8)
    for number in range(20):
        np.save(tmp_path / f"{number:02}.npy", parts[number % 5] ^ np.uint8(number))

    def peak(pattern: str, attempt: int) -> int:
        source = open_images(tmp_path / pattern)
        gc.collect()  # what other tests left is not measured
        tracemalloc.start()
        try:
            got = extract(
                source,
                Pixels(),
                outputs=("pool",),
                rows=np.arange(0, len(source), len(source) // 50),
                moments=("pool", "spatial"),
                run=Run(store=store / str(attempt) if stored else None),
            )
            found = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(got) == len(source)
        return found

    # Python's own tables, such as that of interned strings, grow by megabytes once in a while.
    peaks = [min(peak(pattern, attempt) for attempt in range(2)) for pattern in ("0[0-4].npy", "*.npy")]
    more = 30_000 * 48 * 4  # bytes of the features of the images that the second batch has more
    assert peaks[1] < peaks[0] + more / 10, peaks
