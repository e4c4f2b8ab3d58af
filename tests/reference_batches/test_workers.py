"""Building by an engine's workers: the same bytes as in one process, whoever does what and in which order."""

from __future__ import annotations

import importlib.util
import os
import pickle
import shutil
import signal
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from optional import optional
from stand_ins import InceptionPixels as Pixels

import reference_batches.build
import reference_batches.work
from evalkit.errors import ImageError, InputError
from evalkit.extractors.pixels import Pixels as Importable
from evalkit.images import ImageFiles, open_image_files, open_images
from evalkit.system.engine import Inline, WorkerState
from reference_batches.build import Settings, build
from reference_batches.work import Contents


class Small(Pixels):
    batch_size = 8


class Tiny(Pixels):
    batch_size = 4


def as_folder(tree: Path, tmp_path: Path) -> Path:
    return tree


def as_zip(tree: Path, tmp_path: Path) -> Path:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in tree.rglob("n*_*"):
            archive.write(path, path.relative_to(tree))
    return tmp_path / "x.zip"


def as_tar(tree: Path, tmp_path: Path, mode: Any = "w") -> Path:
    with tarfile.open(tmp_path / "x.tar", mode) as tar:
        for path in sorted(tree.rglob("n*_*")):
            tar.add(path, path.relative_to(tree))
    return tmp_path / "x.tar"


def as_compressed_tar(tree: Path, tmp_path: Path) -> Path:
    return as_tar(tree, tmp_path, "w:gz")


def as_parquet(tree: Path, tmp_path: Path) -> Path:
    pyarrow, parquet = optional("pyarrow", "parquet"), optional("pyarrow.parquet", "parquet")
    rows = [{"bytes": path.read_bytes(), "path": None} for path in sorted(tree.rglob("n*_*"))]
    (tmp_path / "tables").mkdir()
    for number in range(3):
        table = pyarrow.table({"image": rows[number * 100 : number * 100 + 100]})
        parquet.write_table(table, tmp_path / "tables" / f"{number}.parquet", row_group_size=30)
    return tmp_path / "tables"


def as_arrays(tree: Path, tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (300, 20, 24, 3), np.uint8))
    return tmp_path / "x.npy"


FORMS = [as_folder, as_zip, as_tar, as_compressed_tar, as_parquet, as_arrays]


@pytest.mark.parametrize("images", [None, 40])
@pytest.mark.parametrize("form", FORMS)
def test_workers_give_the_bytes_of_one_process(
    form: Callable[[Path, Path], Path], images: int | None, tree: Path, tmp_path: Path
) -> None:
    source, settings = form(tree, tmp_path), Settings(size=16, images=images)
    one = build(source, tmp_path / "one.npz", settings, extractor=Small())
    engine = FakeEngine(3, dies_at=[2, 11])
    many = build(source, tmp_path / "many.npz", settings, extractor=Small(), engine=engine)
    assert engine.maps[0] != sorted(engine.maps[0])
    assert (tmp_path / "many.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert not (tmp_path / "many.npz.building").exists()
    assert (one.kept, one.counted, one.notes) == (many.kept, many.counted, many.notes)


@pytest.mark.parametrize("images", [None, 20, 55])
@pytest.mark.parametrize("statistics", ["all", "kept", "none"])
def test_bad_images_are_left_out_alike(
    with_bad: tuple[Path, list[int]], tmp_path: Path, images: int | None, statistics: Any
) -> None:
    settings = Settings(size=16, images=images, statistics=statistics)
    reports = [
        build(
            with_bad[0], tmp_path / name, settings, extractor=Small(), skip_bad=True, workers=2, engine=engine
        )
        for name, engine in (("one.npz", Inline()), ("many.npz", FakeEngine(4, seed=1)))
    ]
    assert reports[0].bad == reports[1].bad != ()
    assert (tmp_path / "many.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


def test_the_first_bad_image_is_named_and_the_rest_resumes(
    with_bad: tuple[Path, list[int]], tmp_path: Path
) -> None:
    shutil.copy(with_bad[0] / "001.jpg", with_bad[0] / "000.jpg")  # the next is in the second batch
    settings = Settings(size=16)
    done: list[int] = []
    with pytest.raises(ImageError, match=r"007\.jpg: cannot be decoded.*--skip-bad"):
        build(with_bad[0], tmp_path / "many.npz", settings, extractor=Tiny(), engine=FakeEngine(5))
    build(
        with_bad[0],
        tmp_path / "many.npz",
        settings,
        extractor=Tiny(),
        skip_bad=True,
        engine=FakeEngine(2),
        progress=lambda stage, count, total: done.append(count),
    )
    assert (done[0], done[-1]) == (4, 60)
    build(with_bad[0], tmp_path / "one.npz", settings, extractor=Tiny(), skip_bad=True)
    assert (tmp_path / "many.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


class LastFirst:
    """An engine whose first item comes after all others, which are taken while it is not there."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def map(self, work: Any, items: Iterable[Any], report: Any = None) -> Iterator[tuple[int, Any]]:
        begin, first = work.prepare(), None
        for number, item in enumerate(items):
            result = begin(item, lambda done: None).result()
            if number:
                yield number, result
            else:
                first = result
        self.taken.append(number + 1)
        yield 0, first


def test_few_results_wait_for_one_that_does_not_come(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_batches.build, "_MOST_EARLY", 10 * Small.batch_size)
    engine, settings = LastFirst(), Settings(size=16)
    build(tree, tmp_path / "many.npz", settings, extractor=Small(), engine=engine)
    assert engine.taken == [12, 12, 12, 2]  # the rest is given out once the first is there
    build(tree, tmp_path / "one.npz", settings, extractor=Small())
    assert (tmp_path / "many.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


def test_threads_end_with_the_build(tree: Path, tmp_path: Path) -> None:
    class Broken(Small):
        def __call__(self, images: Any) -> Any:
            raise OSError("broken")

    before = {*threading.enumerate()}
    with pytest.raises(OSError, match="broken") as caught:
        build(tree, tmp_path / "ref.npz", Settings(size=16), extractor=Broken())
    assert {*threading.enumerate()} <= before, caught  # while its frames are still there


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'evalkit[cluster]'"
)
def test_ray_gives_the_same_bytes_though_a_worker_is_killed(tree: Path, tmp_path: Path) -> None:
    from evalkit.system.ray_engine import ray_engine

    workers: set[int] = set()
    killed: list[int] = []

    def watch(states: Sequence[WorkerState]) -> None:
        workers.update(state.pid for state in states if state.pid and state.state == "working")

    def progress(stage: str, done: int, total: int) -> None:
        if done and workers and not killed:
            killed.append(workers.pop())
            os.kill(killed[0], signal.SIGKILL)

    settings, extractor = Settings(size=32, images=100), Importable(batch_size=4)
    with ray_engine(watch=watch) as engine:
        build(tree, tmp_path / "ray.npz", settings, extractor=extractor, engine=engine, progress=progress)
    assert killed
    build(tree, tmp_path / "one.npz", settings, extractor=extractor)
    assert (tmp_path / "ray.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


# ------------------------------------------------------------------------------------- what is open


@pytest.mark.parametrize("form", FORMS)
def test_contents_in_any_pieces(form: Callable[[Path, Path], Path], tree: Path, tmp_path: Path) -> None:
    """Ahead by little or much, and back again."""
    source = form(tree, tmp_path)
    items = open_image_files(source) or open_images(source)
    whole = [content for _, content in Contents(items).at(range(300))]
    contents = Contents(items)
    for piece in ([0, 1, 2], [3, 4], [5], [9, 40, 41], [42], [290, 299], [3, 7, 8], [8], [7], []):
        found = [content for _, content in contents.at(piece)]
        assert found == [whole[index] for index in piece], piece
    contents.close()


@pytest.mark.parametrize("is_packed", [False, True])
def test_what_others_do_is_not_read(is_packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it lies before what a worker does in a file that is only read from its beginning."""
    monkeypatch.setattr(reference_batches.work, "_BATCH_SIZE", 4)
    images = np.random.default_rng(0).integers(0, 256, (400, 6, 5, 3), np.uint8)
    (np.savez_compressed if is_packed else np.savez)(tmp_path / "x.npz", images)
    source = open_images(tmp_path / "x.npz")
    whole, opened, read = source._read, list[int](), list[int]()

    def noted(size: int, start: int) -> Iterator[Any]:
        opened.append(start)
        for batch in whole(size, start):
            read.append(len(batch))
            yield batch

    monkeypatch.setattr(source, "_read", noted)
    contents = Contents(source)
    for first in (40, 80, 200, 120, 160):
        found = [np.asarray(image) for _, image in contents.at(range(first, first + 8))]
        np.testing.assert_array_equal(found, images[first : first + 8])
    contents.close()
    assert opened == ([0, 120] if is_packed else [40, 80, 200, 120, 160])
    assert is_packed or sum(read) == 5 * 8


def test_a_compressed_tar_is_not_read_again_for_each_piece(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = open_image_files(as_compressed_tar(tree, tmp_path))
    assert items is not None
    opened: list[Path] = []
    original = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda path: opened.append(path) or original(path))
    contents = Contents(items)
    for first in range(0, 300, 20):
        assert len(list(contents.at(range(first, first + 5)))) == 5
    contents.close()
    assert len(opened) == 1


# --------------------------------------------------------------------------------- in another process


@pytest.mark.parametrize("form", [as_folder, as_zip, as_tar, as_parquet])
def test_image_files_are_opened_again(
    form: Callable[[Path, Path], Path], tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = form(tree, tmp_path)
    monkeypatch.chdir(source.parent)
    items = open_image_files(Path(source.name))
    assert items is not None
    pickled = pickle.dumps(items)
    assert len(pickled) < 1000  # and not a list of all images
    monkeypatch.chdir(tmp_path.parent)
    copy = pickle.loads(pickled)
    assert isinstance(copy, ImageFiles)
    assert (copy.name, copy.kind, copy.names) == (source.name, items.kind, items.names)
    assert [content for _, content in copy.read([0, 5])] == [
        content
        for _, content in open_image_files(source).read([0, 5])  # type: ignore[union-attr]
    ]


@pytest.mark.parametrize("form", [as_folder, as_zip, as_tar, as_parquet])
def test_other_files_are_refused(form: Callable[[Path, Path], Path], tree: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tree, tmp_path / "copy"))
    (tmp_path / "made").mkdir()
    source = form(copy, tmp_path / "made")
    pickled = pickle.dumps(open_image_files(source))
    image = min(path for path in copy.rglob("n*_*") if path.suffix == ".png")
    image.write_bytes(image.read_bytes() + bytes(100))
    shutil.rmtree(tmp_path / "made")
    (tmp_path / "made").mkdir()
    form(copy, tmp_path / "made")
    with pytest.raises(InputError, match="has other names or sizes here than where the work was given out"):
        pickle.loads(pickled)
    shutil.rmtree(source) if source.is_dir() else source.unlink()
    with pytest.raises(InputError, match="there is no such file or folder here"):
        pickle.loads(pickled)


def test_a_worker_that_sees_other_files_ends_the_build(
    with_bad: tuple[Path, list[int]], tmp_path: Path
) -> None:
    class Elsewhere(FakeEngine):
        def map(self, work: Any, *arguments: Any) -> Iterator[tuple[int, Any]]:
            results = super().map(work, *arguments)
            (with_bad[0] / "new.jpg").write_bytes(b"")
            return results

    with pytest.raises(InputError, match="has other names or sizes here"):
        build(with_bad[0], tmp_path / "r.npz", Settings(size=8), extractor=Pixels(), engine=Elsewhere())
    assert not (tmp_path / "r.npz").exists()
