"""What every row of FORMATS promises: the same images, labels, digests, refusals and notes.

Each format brings a maker beside its own tests: ``make_<row>(path, images, labels, unused=None)`` in
``tests/images/test_<module>.py``. It writes uint8 images ``(n, height, width, 3)`` to ``path`` without loss,
their labels ``(n,)``, and, if ``unused`` is given, a part that evalkit does not read, with this word in its
name. A format without a place for labels, or for such a part, leaves out the parameter.

The row ``pkl`` is left out: it holds statistics alone, and its own tests show what it promises.
"""

from __future__ import annotations

import importlib.util
import inspect
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from containers import encoded, write_tar
from invoked import Result
from numpy.typing import NDArray

from evalkit.errors import InputError
from evalkit.images import FORMATS, ImageSource, open_images
from evalkit.images.archives import Tar
from evalkit.system.identity import stamp

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 20, 24, 3), np.uint8)
LABELS = np.arange(12) % 5


def maker_of(row: str) -> Callable[..., None]:
    """The function of the row's own test file that writes a file or folder of this format."""
    room = FORMATS[row].partition(":")[0].rpartition(".")[2]
    file = Path(__file__).with_name(f"test_{room}.py")
    maker: Callable[..., None] | None = None
    if file.exists():
        spec = importlib.util.spec_from_file_location(f"makers_{room}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        maker = getattr(module, f"make_{row}", None)
    if maker is None:
        pytest.fail(
            f"The format {row!r} has no maker. Add make_{row}(path, images, labels, unused=None) to "
            f"tests/images/test_{room}.py; the docstring of {Path(__file__).name} says what it writes."
        )
    return maker


class Case:
    """A format, and what can be written in it."""

    def __init__(self, row: str, folder: Path) -> None:
        self.row = row
        self.folder = folder
        self.maker = maker_of(row)
        parameters = inspect.signature(self.maker).parameters
        self.has_labels, self.has_unused = "labels" in parameters, "unused" in parameters

    def write(self, name: str, images: NDArray[np.uint8] = IMAGES, **options: Any) -> Path:
        if self.has_labels:
            options["labels"] = LABELS[: len(images)]
        self.maker(self.folder / name, images, **options)
        return self.folder / name


OF_IMAGES = [row for row in FORMATS if row != "pkl"]


@pytest.fixture(params=OF_IMAGES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(request.param, tmp_path)


def pixels(source: ImageSource, size: int = 5, start: int = 0) -> NDArray[Any]:
    batches = list(source.batches(size, start))
    assert all(len(batch) == size for batch in batches[:-1])
    return np.concatenate(batches) if batches else np.empty((0, *(source.shape or ())), source.dtype)


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def test_what_it_holds(case: Case) -> None:
    source = open_images(case.write("x"))
    assert (source.kind, source.name) == (case.row, str(case.folder / "x"))
    assert (len(source), source.shape, source.dtype) == (12, (20, 24, 3), np.uint8)
    assert source.notes == ()
    if case.has_labels:
        assert source.labels is not None
        assert source.labels.dtype == np.int64
        np.testing.assert_array_equal(source.labels, LABELS)
    else:
        assert source.labels is None
    assert source.labels_problem is None


def test_the_same_at_a_url(case: Case) -> None:
    path = case.write("x")
    memory = pytest.importorskip("fsspec", reason="needs fsspec, which comes with torch").filesystem("memory")
    memory.put(str(path), "/contract/x", recursive=path.is_dir())
    try:
        source, local = open_images("memory://contract/x"), open_images(path)
        assert (source.kind, source.name) == (case.row, "memory://contract/x")
        np.testing.assert_array_equal(pixels(source), IMAGES)
        assert source.digest == local.digest
        np.testing.assert_array_equal(source.labels, local.labels)
    finally:
        memory.rm("/contract", recursive=True)


@pytest.mark.parametrize("start", [0, 3, 11, 12])
@pytest.mark.parametrize("size", [1, 5, 12, 100])
def test_batches_of_any_size_and_start(case: Case, size: int, start: int) -> None:
    found = pixels(open_images(case.write("x")), size, start)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, IMAGES[start:])


def never(*_: Any) -> Any:
    raise AssertionError("the file is read to be hashed")


def test_a_copy_in_another_process_reads_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    path = case.write("x")
    monkeypatch.chdir(case.folder)
    source = open_images("x")
    digest, pickled = source.digest, pickle.dumps(source)
    assert len(pickled) < 1000  # where it is, and its digest
    monkeypatch.chdir("/")
    monkeypatch.setattr(type(source), "_examine", never)
    copy = pickle.loads(pickled)
    np.testing.assert_array_equal(pixels(copy), IMAGES)
    np.testing.assert_array_equal(copy.labels, source.labels)
    assert (copy.name, copy.kind, copy.digest) == (str(path), case.row, digest)
    copy.check_unchanged(every_file=True)


def elsewhere(places: Any) -> tuple[str, float]:
    """Of the same files, as another machine sees them."""
    return f"another device {stamp(places)[0]}", 0.0


def test_a_copy_on_another_machine_is_hashed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    path = case.write("x")
    source = open_images(path)
    digest, pickled = source.digest, pickle.dumps(source)
    for module in ("evalkit.images.source", "evalkit.system.identity"):
        monkeypatch.setattr(f"{module}.stamp", elsewhere)
    copy = pickle.loads(pickled)
    np.testing.assert_array_equal(pixels(copy), IMAGES)
    assert copy.digest == digest
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    changed = IMAGES.copy()
    changed[7, 3, 2, 1] ^= 1
    case.write("x", changed)
    with pytest.raises(InputError, match=r"x holds other images here.* All workers must see the same file"):
        pickle.loads(pickled)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=r"x: there is no such file.* All workers must see the same file"):
        pickle.loads(pickled)


def test_the_digest_follows_the_content(case: Case) -> None:
    changed = IMAGES.copy()
    changed[7, 3, 2, 1] ^= 1
    first = open_images(case.write("x"))
    assert first.digest == first.digest == open_images(case.folder / "x").digest
    assert open_images(case.write("copy")).digest == first.digest
    others = [
        open_images(case.write("changed", changed)),
        open_images(case.write("turned", IMAGES[::-1].copy())),
        open_images(case.write("short", IMAGES[:11])),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 4


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.75])
def test_a_truncated_file_is_refused_in_words(case: Case, share: float, run: Callable[..., Result]) -> None:
    path = case.write("x")
    file = files_of(path)[0]
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError) as caught:
        pixels(open_images(path))
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) <= 1000
    result = run("reference", "convert", path, case.folder / "out.npz")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Error: ")
    assert "Traceback" not in result.err
    assert len(result.err) <= 1000
    assert not (case.folder / "out.npz").exists()


def replace_one_file(path: Path) -> None:
    file = files_of(path)[0]
    shutil.copy(file, path.with_name("copy"))
    path.with_name("copy").replace(file)


def test_a_change_while_it_is_hashed_is_noticed(case: Case) -> None:
    path = case.write("x")
    steps: list[tuple[str, int, int]] = []

    def progress(stage: str, done: int, total: int) -> None:
        if not steps:
            replace_one_file(path)
        steps.append((stage, done, total))

    with pytest.raises(InputError, match="x changed while it was read"):
        open_images(path).identify(progress)
    assert steps[0] == (f"checksum of the images of {path}", 0, 12)
    assert steps[-1] == (f"checksum of the images of {path}", 12, 12)


def test_a_change_after_it_was_hashed_is_noticed(case: Case) -> None:
    path = case.write("x")
    source = open_images(path)
    source.identify()
    source.check_unchanged(every_file=True)
    replace_one_file(path)
    with pytest.raises(InputError, match="x changed while it was read"):
        source.check_unchanged(every_file=True)


def test_parts_that_are_not_used_are_noted(case: Case) -> None:
    if not case.has_unused:
        pytest.skip("the format has no place for other parts")
    source = open_images(case.write("x", unused="leftover"))
    np.testing.assert_array_equal(pixels(source), IMAGES)
    assert any("leftover" in note for note in source.notes)


def test_a_format_without_a_maker_is_told_what_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("evalkit.images.nowhere:Missing", "evalkit.images.archives:Missing"):
        monkeypatch.setitem(FORMATS, "missing", place)  # type: ignore[arg-type]
        with pytest.raises(
            pytest.fail.Exception, match=r"Add make_missing\(path, images, labels, unused=None"
        ):
            maker_of("missing")


class Keyed(Tar):
    """Tars whose members are in pairs, a picture and its class."""

    @classmethod
    def claims(cls, candidate: Any) -> bool:
        return super().claims(candidate) and b".cls" in candidate.path.read_bytes()

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.kind = "keyed"


def test_a_row_for_a_special_tar_needs_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = ModuleType("keyed_tars")
    module.Keyed = Keyed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "keyed_tars", module)
    rows = {"keyed": "keyed_tars:Keyed", **FORMATS}
    monkeypatch.setattr("evalkit.images.FORMATS", rows)
    plain = write_tar(tmp_path / "plain.tar", {"a.png": encoded(IMAGES[0])})
    keyed = write_tar(tmp_path / "keyed.tar", {"a.png": encoded(IMAGES[0]), "a.cls": b"3"})
    assert [open_images(path).kind for path in (plain, keyed)] == ["tar", "keyed"]
