"""Extractors that run ahead: the order of work, and what is written when something fails."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from patience import until
from PIL import Image
from stand_ins import NO_STORE
from stand_ins import InceptionPixels as Pixels

from evalkit.errors import FeatureError, InputError, OutputError
from evalkit.extractors.base import Rows, RunsAhead
from evalkit.features import pieces
from evalkit.features import store as store_module
from evalkit.features.extraction import extract
from evalkit.features.store import StoredBatch
from evalkit.images import open_images
from evalkit.system.engine import Pending
from evalkit.system.run import Run


class Ahead(Pixels):
    """Gives features only when they are asked for, and notes what happens in which order."""

    batch_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.begun = 0

    def submit(self, images: NDArray[Any]) -> Pending:
        self.begun += 1
        self.events.append(f"begin {self.begun}")
        return _Later(self, self.begun, self(images))


class _Later:
    def __init__(self, extractor: Ahead, number: int, rows: dict[str, Rows]) -> None:
        self._extractor, self._number, self._rows = extractor, number, rows

    def done(self) -> bool:
        return False

    def result(self) -> dict[str, Rows]:
        self._extractor.events.append(f"end {self._number}")
        return self._rows


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two batches; pieces begin with one, and grow, because all take no time."""
    monkeypatch.setattr(store_module, "SHARD", 16)
    monkeypatch.setattr(pieces, "monotonic", lambda: 0.0)


def stored(store: Path) -> list[str]:
    return sorted(path.name for path in store.glob("*/*.h5"))


def test_features_are_the_same_and_the_next_piece_is_begun_first(
    store: Path, images: NDArray[np.uint8]
) -> None:
    expected = extract(open_images(images), Pixels())
    for run, order in (
        (Run(store=store), ["begin 1", "begin 2", "end 1", "begin 3", "begin 4", "end 2"]),
        (NO_STORE, ["begin 1", "begin 2", "begin 3", "begin 4", "end 1", "end 2"]),
    ):
        extractor = Ahead()
        assert isinstance(extractor, RunsAhead)
        found = extract(open_images(images), extractor, run=run)
        for output in ("pool", "spatial", "logits"):
            np.testing.assert_array_equal(found.arrays[output], expected.arrays[output])
        assert extractor.events[:6] == order
        assert sorted(extractor.events) == sorted(
            f"{what} {n}" for what in ("begin", "end") for n in range(1, 9)
        )
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("write-features")]


def test_two_networks_in_one_pass(store: Path, images: NDArray[np.uint8]) -> None:
    from evalkit.features.extraction import Extraction, Wanted

    class Other(Pixels):
        network = "other"

    found = Extraction(
        open_images(images),
        [Wanted(extractor=each, arrays=("pool",), moments=("pool",)) for each in (Ahead(), Other())],
        run=Run(store=store),
    ).features()
    for features in found:
        np.testing.assert_array_equal(features.arrays["pool"], Pixels()(images)["pool"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_was_begun_before_an_error_is_kept(
    store: Path, images: NDArray[np.uint8], error: type[BaseException]
) -> None:
    class Failing(Ahead):
        def submit(self, images: NDArray[Any]) -> Pending:
            if self.begun == 5:  # in the fourth piece, while the third is not waited for yet
                raise error
            return super().submit(images)

    with pytest.raises(error):
        extract(open_images(images), Failing(), run=Run(store=store))
    assert stored(store) == ["00000000-00000008.h5", "00000008-00000016.h5", "00000016-00000032.h5"]
    extractor = Ahead()
    found = extract(open_images(images), extractor, run=Run(store=store))
    assert extractor.begun == 4
    np.testing.assert_array_equal(found.arrays["pool"], Pixels()(images)["pool"])


def test_a_bad_image_is_said_and_what_came_before_is_kept(store: Path) -> None:
    values = np.full((40, 8, 8, 3), 90, np.float32)
    values[33, 1, 1, 1] = np.nan
    with pytest.raises(InputError, match="33"):
        extract(open_images(values), Ahead(), run=Run(store=store))
    assert stored(store) == ["00000000-00000008.h5", "00000008-00000016.h5", "00000016-00000032.h5"]


def test_an_error_of_the_thread_that_writes_is_raised(
    store: Path, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = StoredBatch.write

    def full(self: StoredBatch, piece: tuple[int, int], rows: dict[str, Rows]) -> None:
        if piece == (16, 32):
            raise OutputError("full")
        assert threading.current_thread() is not threading.main_thread()
        real(self, piece, rows)

    monkeypatch.setattr(StoredBatch, "write", full)
    with pytest.raises(OutputError, match="full"):
        extract(open_images(images), Ahead(), run=Run(store=store))
    assert "00000008-00000016.h5" in stored(store)
    assert "00000016-00000032.h5" not in stored(store)


def test_shards_of_a_file_that_changed_are_removed(
    tmp_path: Path, store: Path, images: NDArray[np.uint8]
) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, images)

    class Changing(Ahead):
        def submit(self, batch: NDArray[Any]) -> Pending:
            if self.begun == 7:  # the last
                with file.open("ab") as opened:
                    opened.write(b"more")
            return super().submit(batch)

    with pytest.raises(InputError, match="changed while it was read"):
        extract(open_images(file), Changing(), run=Run(store=store))
    assert "00000048-00000060.h5" not in stored(store)


def test_what_changed_is_removed_although_something_else_fails(
    tmp_path: Path, store: Path, images: NDArray[np.uint8]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:02d}.png")

    class Changing(Ahead):
        def submit(self, batch: NDArray[Any]) -> Pending:
            if self.begun == 3:
                until(lambda: "00000000-00000008.h5" in stored(store))
                (folder / "00.png").write_bytes((folder / "01.png").read_bytes())
                raise FeatureError("half an image")
            return super().submit(batch)

    with pytest.raises(FeatureError, match="half an image"):
        extract(open_images(folder), Changing(), run=Run(store=store))
    assert not stored(store)


def test_progress_never_goes_back(store: Path, images: NDArray[np.uint8]) -> None:
    calls: list[int] = []
    run = Run(store=store, progress=lambda _, done, total: calls.append(done))
    extract(open_images(images), Ahead(), run=run)
    assert calls == sorted(calls)
    assert (calls[0], calls[-1]) == (0, 60)


def test_a_subclass_that_changes_the_call_alone_is_called(images: NDArray[np.uint8]) -> None:
    class Doubled(Ahead):
        def __call__(self, batch: NDArray[Any]) -> dict[str, Rows]:
            return {output: 2 * rows for output, rows in super().__call__(batch).items()}

        def submit(self, batch: NDArray[Any]) -> Pending:
            raise AssertionError("submit was asked for")

    class Called(Doubled):
        def __call__(self, batch: NDArray[Any]) -> dict[str, Rows]:
            return super().__call__(batch)

    expected = extract(open_images(images), Pixels(), run=NO_STORE).arrays["pool"]
    found = extract(open_images(images), Called(), run=NO_STORE).arrays["pool"]
    np.testing.assert_array_equal(found, 2 * expected)
    with pytest.raises(AssertionError, match="submit was asked for"):
        extract(open_images(images), Doubled(), run=NO_STORE)
