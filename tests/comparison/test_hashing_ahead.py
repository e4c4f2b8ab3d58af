"""Batches are hashed in the background: the next one while features of the current one are extracted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invoked import Result
from numpy.typing import NDArray
from patience import SECONDS, until
from PIL import Image
from stand_ins import NO_STORE, stored
from stand_ins import InceptionPixels as Pixels

from evalkit.comparison import compare
from evalkit.errors import InputError
from evalkit.images import ImageSource, open_images
from evalkit.images.npz import Npz
from evalkit.system import background, identity
from evalkit.system.background import Background
from evalkit.system.progress import Progress
from evalkit.system.run import Run
from evalkit.system.stops import check_stop, current_stop


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for one background thread."""
    monkeypatch.setattr(background, "cores", lambda: 2)


class Hashing:
    """Records the name and thread of every hash, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[tuple[str, str]] = []
        self.ended: list[str] = []
        hash_ = ImageSource._hash

        def noted(source: ImageSource, progress: Any) -> Any:
            self.begun.append((Path(source.name).stem, threading.current_thread().name.split("_")[0]))
            try:
                return hash_(source, progress)
            finally:
                self.ended.append(Path(source.name).stem)

        monkeypatch.setattr(ImageSource, "_hash", noted)

    def names(self) -> list[str]:
        return [name for name, _ in self.begun]


@pytest.fixture
def hashing(monkeypatch: pytest.MonkeyPatch) -> Hashing:
    return Hashing(monkeypatch)


@pytest.fixture
def files(tmp_path: Path, images: NDArray[np.uint8]) -> list[Path]:
    """Three files of 20 images."""
    paths = [tmp_path / f"{name}.npz" for name in ("ref", "a", "b")]
    for path, part in zip(paths, np.split(images, 3), strict=True):
        np.savez(path, part)
    return paths


class During(Pixels):
    """Calls a function when features of the first image of a batch are extracted."""

    def __init__(self, work: Callable[[int], object]) -> None:
        super().__init__()
        self.batches = 0
        self._work = work

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        self._work(self.batches)
        self.batches += 1
        return super().__call__(images)


def background_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith(("background", "read-ahead"))]


@pytest.mark.parametrize("run", [NO_STORE, None], ids=["no store", "store"])
def test_the_next_set_is_hashed_while_features_are_extracted(
    files: list[Path], hashing: Hashing, run: Run | None, tmp_path: Path
) -> None:
    reached = []

    def wait_for_the_next(batch: int) -> None:
        following = ["a", "b", None][batch]
        until(lambda: following in (None, *hashing.ended))
        reached.append((batch, hashing.names()[2:]))

    extractor = During(wait_for_the_next)
    found = compare(*files, extractor=extractor, run=run or Run(store=tmp_path / "store"))
    # b is not hashed before work on a starts: only one set ahead.
    assert reached == [(0, []), (1, ["b"]), (2, ["b"])]
    assert hashing.begun == [(name, "background") for name in ("ref", "a", "b")]
    assert background_threads() == []
    digests = [each.samples.digest for each in found.comparisons]
    assert digests == [open_images(path).digest for path in files[1:]]


def test_on_four_cores_the_first_two_are_hashed_at_the_same_time(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "cores", lambda: 4)
    both, examine = threading.Barrier(2, timeout=SECONDS), ImageSource._examine

    def together(source: ImageSource, progress: Any) -> dict[str, Any]:
        both.wait()
        return examine(source, progress)

    monkeypatch.setattr(ImageSource, "_examine", together)
    compare(*files[:2], extractor=Pixels(), run=NO_STORE)


def test_on_one_core_nothing_is_hashed_ahead(
    files: list[Path], hashing: Hashing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "cores", lambda: 1)
    known = []
    extractor = During(lambda _: known.append(hashing.names()))
    alone = compare(*files, extractor=extractor, run=NO_STORE)
    assert known == [["ref"], ["ref", "a"], ["ref", "a", "b"]]
    assert {thread for _, thread in hashing.begun} == {"MainThread"}
    monkeypatch.setattr(background, "cores", lambda: 2)
    ahead = compare(*files, extractor=Pixels(), run=NO_STORE)
    for one, other in zip(alone.comparisons, ahead.comparisons, strict=True):
        assert (one.reference, one.samples, one.scores) == (other.reference, other.samples, other.scores)


def test_nothing_is_hashed_twice(
    files: list[Path], hashing: Hashing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file on both sides is not hashed ahead, because its hash is cached by the time it is needed."""
    monkeypatch.setattr(identity, "SETTLED_SECONDS", -3600.0)
    read: list[str] = []
    examine = ImageSource._examine
    monkeypatch.setattr(
        ImageSource, "_examine", lambda self, progress: read.append(self.name) or examine(self, progress)
    )
    compare(files[0], files[0], extractor=Pixels(), run=NO_STORE)
    source = open_images(files[1])
    compare(source, source, files[2], extractor=Pixels(), run=NO_STORE)
    assert sorted(read) == sorted(map(str, files))
    assert hashing.begun[:2] == [("ref", "background"), ("ref", "MainThread")]


def test_a_damaged_file_is_the_same_error_at_the_same_place(
    files: list[Path], hashing: Hashing, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(files[1].read_bytes())
    data[len(data) // 2] ^= 0xFF
    files[1].write_bytes(data)
    found = []
    for number in (1, 2):
        store = files[0].parent / f"store {number}"
        monkeypatch.setattr(background, "cores", lambda number=number: number)
        extractor = During(lambda _, number=number: until(lambda: number == 1 or "a" in hashing.ended))
        with pytest.raises(InputError, match=r"a\.npz: cannot be read \(BadZipFile: Bad CRC-32") as caught:
            compare(*files[:2], extractor=extractor, run=Run(store=store))
        found.append(str(caught.value))
        assert extractor.batches == 1
        assert sum(map(len, stored(store).values())) == 20 * (48 + 12) * 4  # those of the reference are kept
    assert found[0] == found[1]
    assert [thread for name, thread in hashing.begun if name == "a"] == ["MainThread", "background"]
    assert background_threads() == []
    monkeypatch.setattr("evalkit.cli.options.ExtractorSetup.extractor", lambda *_: Pixels())
    result = run("compare", *files[:2])
    assert (result.code, result.out) == (2, "")
    assert result.err.count("a.npz: cannot be read (BadZipFile: Bad CRC-32") == 1
    assert "Traceback" not in result.err


class Endless:
    """Reads an endless file until its thread is told to stop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.begun, self.closed = threading.Event(), threading.Event()
        read = Npz._read

        def endless(source: Npz, size: int, start: int) -> Iterator[NDArray[Any]]:
            for batch in read(source, size, start):
                yield batch
                if Path(source.name).stem == name and not self.closed.is_set():
                    self.begun.set()
                    stop = current_stop()
                    assert stop is not None
                    try:
                        until(stop.is_set)
                        yield batch
                    finally:
                        self.closed.set()

        monkeypatch.setattr(Npz, "_read", endless)


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError])
def test_an_interrupt_or_error_ends_the_thread(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, hashing: Hashing, error: type[BaseException]
) -> None:
    endless = Endless(monkeypatch, "a")

    def interrupt(_: int) -> None:
        assert endless.begun.wait(SECONDS)
        raise error

    opened = [open_images(path) for path in files[:2]]
    with pytest.raises(error):
        compare(*opened, extractor=During(interrupt), run=NO_STORE)
    assert endless.closed.is_set()
    assert background_threads() == []
    # A cancelled source can be used again.
    assert compare(*opened, extractor=Pixels(), run=NO_STORE).samples.digest
    assert [thread for name, thread in hashing.begun if name == "a"] == ["background", "MainThread"]


def test_progress_is_told_by_the_caller_alone_and_while_it_waits(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages never mix, and a hash's stage is shown only while nothing else runs."""
    waits, read = threading.Event(), Npz._read
    stage_of_a = f"checksum of the images of {files[1]}"
    calls: list[tuple[str, int, int]] = []

    def held(source: Npz, size: int, start: int) -> Iterator[NDArray[Any]]:
        yield from read(source, size, start)
        if source.name == str(files[1]):
            assert waits.wait(SECONDS)

    def progress(stage: str, done: int, total: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        calls.append((stage, done, total))
        if stage == stage_of_a:
            waits.set()

    monkeypatch.setattr(Npz, "_read", held)
    compare(*files[:2], extractor=Pixels(), run=Run(store=None, progress=progress))
    order = list(dict.fromkeys(stage for stage, _, _ in calls if str(files[0]) not in stage))
    assert order[0] == stage_of_a
    assert "features of" in order[1]
    last_of_reference = max(index for index, call in enumerate(calls) if str(files[0]) in call[0])
    assert last_of_reference < calls.index(next(call for call in calls if call[0] == stage_of_a))
    done = [done for stage, done, _ in calls if stage == stage_of_a]
    assert done == sorted(done)
    assert [call for call in calls if call[0] == stage_of_a][-1] == (stage_of_a, 20, 20)


def test_a_hash_that_is_there_is_no_stage(files: list[Path]) -> None:
    samples = open_images(files[1])
    stages: list[str] = []

    def wait_for_the_hash(batch: int) -> None:
        if batch == 0:
            assert samples._ahead is not None
            wait([samples._ahead._future], SECONDS)

    compare(
        files[0],
        samples,
        extractor=During(wait_for_the_hash),
        run=Run(store=None, progress=lambda stage, done, total: stages.append(stage)),
    )
    assert [stage for stage in stages if "checksum" in stage and str(files[1]) in stage] == []


def test_a_folder_that_changes_after_it_was_hashed(
    tmp_path: Path, images: NDArray[np.uint8], hashing: Hashing
) -> None:
    folders = [tmp_path / name for name in ("ref", "a")]
    for folder, part in zip(folders, np.split(images, 2), strict=True):
        folder.mkdir()
        for index, image in enumerate(part):
            Image.fromarray(image).save(folder / f"{index:02}.png")

    def change(batch: int) -> None:
        if batch == 0:
            until(lambda: "a" in hashing.ended)
            Image.new("RGB", (10, 12)).save(folders[1] / "03.png")

    with pytest.raises(InputError, match="a changed while it was read"):
        compare(*folders, extractor=During(change), run=NO_STORE)
    assert hashing.begun == [("ref", "background"), ("a", "background")]


def test_a_pattern_is_hashed_ahead(files: list[Path], hashing: Hashing) -> None:
    (files[0].parent / "parts").mkdir()
    for path in files[1:]:
        path.rename(path.parent / "parts" / path.name)
    pattern = files[0].parent / "parts" / "*.npz"
    found = compare(files[0], pattern, extractor=Pixels(), run=NO_STORE)
    assert hashing.begun == [(name, "background") for name in ("ref", "*", "a", "b")]
    assert found.samples.digest == open_images(pattern).digest


def test_what_is_given_up_in_the_background_is_done_by_who_asks() -> None:
    begun = threading.Event()
    who: list[str] = []

    def work(_: Progress) -> str:
        who.append(threading.current_thread().name.split("_")[0])
        if stop := current_stop():
            begun.set()
            until(stop.is_set)
            check_stop()
        return "done"

    with Background() as thread:
        tasks = [thread.begin(work) for _ in range(2)]
        assert begun.wait(SECONDS)
    assert [task.result() for task in tasks if task] == ["done", "done"]
    assert who == ["background", "MainThread", "MainThread"]


def test_an_error_is_raised_where_it_is_asked_for() -> None:
    def work(_: Progress) -> None:
        raise InputError("bad")

    with Background() as thread:
        task = thread.begin(work)
        assert task is not None
        with pytest.raises(InputError, match="bad"):
            task.result()
