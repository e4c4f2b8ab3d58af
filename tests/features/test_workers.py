"""Features by workers elsewhere: the same bytes as of this process, whoever does what and in which order."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from fake_engine import FakeEngine
from numpy.typing import NDArray
from optional import optional
from range_server import shelf
from stand_ins import InceptionPixels as Pixels
from stand_ins import stored

from evalkit.errors import FeatureError, InputError
from evalkit.features import extraction, pieces
from evalkit.features import store as store_module
from evalkit.features.extraction import Extraction, Wanted, extract
from evalkit.features.pieces import Piece
from evalkit.features.record import Features
from evalkit.features.work import Extract, SumUp
from evalkit.images import open_images
from evalkit.system.run import Run


class Other(Pixels):
    """Another network, with other forward passes."""

    network: ClassVar[str] = "other"
    batch_size: ClassVar[int] = 4

    def __init__(self) -> None:
        super().__init__("other")


class Broken(Pixels):
    """Images of zeros alone have a feature that is not finite."""

    batch_size: ClassVar[int] = 8

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        found = super().__call__(images)
        found["pool"][~images.any(axis=(1, 2, 3)), 5] = np.nan
        return found


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SHARD", 16)
    monkeypatch.setattr(extraction, "GROUP", 2)
    monkeypatch.setattr(pieces, "monotonic", lambda: 0.0)
    monkeypatch.setattr(Pixels, "batch_size", 8)


@pytest.fixture
def file(tmp_path: Path, images: NDArray[np.uint8]) -> Path:
    np.savez(tmp_path / "x.npz", np.concatenate([images, images[::-1] ^ 3]), np.arange(120))
    return tmp_path / "x.npz"


def of_both(file: Path, run: Run, **options: Any) -> list[Features]:
    """Through two networks, in one decoding pass."""
    wanted = [Wanted(extractor=extractor, **options) for extractor in (Pixels(), Other())]
    return Extraction(open_images(file), wanted, rows=None, run=run).features()


def assert_equal(found: list[Features], expected: list[Features]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.name, one.digest, one.fingerprint, len(one)) == (
            other.name,
            other.digest,
            other.fingerprint,
            len(other),
        )
        assert one.arrays.keys() == other.arrays.keys()
        for output, rows in other.arrays.items():
            assert one.arrays[output].tobytes() == rows.tobytes()
        assert one.gaussians.keys() == other.gaussians.keys()
        for output, gaussian in other.gaussians.items():
            assert one.gaussians[output].mean.tobytes() == gaussian.mean.tobytes()
            assert one.gaussians[output].covariance.tobytes() == gaussian.covariance.tobytes()


@pytest.mark.parametrize("workers", [1, 2, 5, 20])
def test_rows_into_the_store(file: Path, tmp_path: Path, workers: int) -> None:
    options = {"arrays": ("pool", "spatial", "logits")}
    expected = of_both(file, Run(store=tmp_path / "one"), **options)
    engine = FakeEngine(workers)
    run = Run(store=tmp_path / "many", engine=engine)
    assert_equal(of_both(file, run, **options), expected)
    assert stored(tmp_path / "many") == stored(tmp_path / "one")
    (work,) = engine.works
    assert isinstance(work, Extract)
    assert (work.name, work.device) == (f"features of {file}", "cpu")
    assert (engine.items != sorted(engine.items)) == (workers > 1)
    engine.items.clear()
    assert_equal(of_both(file, run, **options), expected)
    assert not engine.items  # all were there


@pytest.mark.parametrize("in_order", [True, False])
def test_what_others_do_is_not_read(
    tmp_path: Path, images: NDArray[np.uint8], in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it lies before what a worker does in a file that is only read from its beginning."""
    (np.savez_compressed if in_order else np.savez)(tmp_path / "x.npz", images)
    source = open_images(tmp_path / "x.npz")
    assert source.reads_in_order == in_order
    whole, opened, read = source._read, list[int](), list[int]()

    def noted(size: int, start: int) -> Iterator[NDArray[Any]]:
        opened.append(start)
        for batch in whole(size, start):
            read.append(len(batch))
            yield batch

    monkeypatch.setattr(source, "_read", noted)
    begin = Extract(source, (Pixels(),), {"inception": 8}).prepare()
    pulses: list[float] = []
    for first, last in ((8, 16), (32, 40), (40, 48), (56, 60)):
        found = begin(Piece(first, last, ("inception",)), pulses.append).result()
        np.testing.assert_array_equal(found["inception"]["pool"], Pixels()(images[first:last])["pool"])
    assert opened == ([8] if in_order else [8, 32, 40, 56])
    if in_order:
        assert pulses == [0, 8, 0, 0, 0, 8, 0, 8, 0, 0, 4]
    else:
        # Read ahead only where the worker has just gone on by itself.
        assert sum(read) <= 8 + 8 + 20 + 4


@pytest.mark.parametrize("rows", [None, np.array([0, 15, 16, 40, 118])])
@pytest.mark.parametrize("is_stored", [True, False])
@pytest.mark.parametrize("workers", [1, 3, 20])
def test_sums_and_rows(
    file: Path, tmp_path: Path, workers: int, is_stored: bool, rows: NDArray[np.int64] | None
) -> None:
    def features(run: Run) -> list[Features]:
        wanted = [
            Wanted(extractor=Pixels(), arrays=("pool", "logits"), moments=("pool", "spatial")),
            Wanted(extractor=Other(), moments=("spatial",)),
        ]
        return Extraction(open_images(file), wanted, rows=rows, run=run).features()

    expected = features(Run(store=None))
    engine = FakeEngine(workers)
    assert_equal(features(Run(store=tmp_path / "s" if is_stored else None, engine=engine)), expected)
    # Without a store only sums come back, of groups of shards.
    assert [type(work) for work in engine.works] == [Extract if is_stored else SumUp]
    if not is_stored:
        assert len(engine.items) == 4


def test_rows_without_a_store(file: Path) -> None:
    expected = extract(open_images(file), Pixels(), run=Run(store=None))
    found = extract(open_images(file), Pixels(), run=Run(store=None, engine=FakeEngine()))
    assert_equal([found], [expected])


def test_one_network_has_some_of_it_already(file: Path, tmp_path: Path) -> None:
    options = {"arrays": ("pool",)}
    expected = of_both(file, Run(store=None), **options)
    run = Run(store=tmp_path / "store", engine=FakeEngine())
    extract(open_images(file), Pixels(), run=run)
    kept = sorted(tmp_path.glob("store/*/*.h5"))
    for path in kept[2:5]:
        path.unlink()
    engine = FakeEngine()
    assert_equal(of_both(file, Run(store=tmp_path / "store", engine=engine), **options), expected)
    both = [piece for piece in engine.items if piece.networks == ("inception", "other")]
    names = [path.stem.split("-") for path in kept[2:5]]
    assert sum(piece.end - piece.begin for piece in both) == sum(
        int(end) - int(begin) for begin, end in names
    )
    assert {piece.networks for piece in engine.items} == {("inception", "other"), ("other",)}


def test_damage_is_mended_by_workers(file: Path, tmp_path: Path) -> None:
    options = {"arrays": ("pool",), "moments": ("spatial",)}
    run = Run(store=tmp_path / "store", engine=FakeEngine())
    expected = of_both(file, run, **options)
    broken = sorted(tmp_path.glob("store/*/*.h5"))[3]
    broken.write_bytes(b"no HDF5")
    engine = FakeEngine()
    assert_equal(of_both(file, Run(store=tmp_path / "store", engine=engine), **options), expected)
    begin, end = map(int, broken.stem.split("-"))
    assert (min(piece.begin for piece in engine.items), max(piece.end for piece in engine.items)) == (
        begin,
        end,
    )


def test_progress(file: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    run = Run(store=tmp_path / "store", engine=FakeEngine(), progress=lambda *call: calls.append(call))
    of_both(file, run, arrays=("pool",))
    done = [call[1] for call in calls if call[0] == f"inception, other features of {file}"]
    assert (done[0], done[-1]) == (0, 120)
    assert done == sorted(set(done))
    assert {call[2] for call in calls} == {120}


def test_errors_of_the_work_come_through(file: Path, tmp_path: Path) -> None:
    values = np.full((60, 8, 8, 3), 90, np.float32)
    values[33, 1, 1, 1] = np.nan
    run = Run(store=tmp_path / "store", engine=FakeEngine())
    with pytest.raises(InputError, match="image 33 "):
        extract(open_images(values), Pixels(), run=run)
    assert stored(tmp_path / "store")
    pixels = np.full((60, 8, 8, 3), 90, np.uint8)
    pixels[51] = 0
    with pytest.raises(FeatureError, match="<array>, pool, counted from image 48: the features of image 3"):
        extract(
            open_images(pixels),
            Broken(),
            outputs=(),
            moments=("pool",),
            run=Run(store=None, engine=FakeEngine()),
        )


def test_a_file_that_changes_before_workers_get_it(file: Path, tmp_path: Path) -> None:
    class Swaps(FakeEngine):
        def map(self, work: Any, *arguments: Any) -> Any:
            np.savez(file, np.zeros((120, 12, 10, 3), np.uint8))
            return super().map(work, *arguments)

    images = open_images(file)
    assert images.digest
    with pytest.raises(InputError, match="changed while it was read"):
        extract(images, Pixels(), run=Run(store=tmp_path / "store", engine=Swaps()))
    assert not stored(tmp_path / "store")


def test_a_server_without_versions(
    tmp_path: Path, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its features are not stored, as nothing would show a change; workers extract them all the same."""
    optional("aiohttp", "remote")
    monkeypatch.setenv("EVALKIT_OFFLINE", "0")
    content = io.BytesIO()
    np.savez(content, images)
    expected = extract(open_images(images), Pixels(), run=Run(store=None))
    with shelf() as web:
        web.has_tags = False
        web.files["/x.npz"] = content.getvalue()
        run = Run(store=tmp_path / "store", engine=FakeEngine())
        found = extract(open_images(f"{web.address}/x.npz"), Pixels(), run=run)
    assert found.arrays["pool"].tobytes() == expected.arrays["pool"].tobytes()
    assert not stored(tmp_path)
