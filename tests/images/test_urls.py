"""Inputs at URLs: the same images and digests as of local files, read by ranges, and errors in words."""

from __future__ import annotations

import gc
import gzip
import io
import pickle
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from containers import (
    CONTAINERS,
    PIXELS,
    STATISTICS,
    encoded,
    image_files,
    npz_bytes,
    write_npz,
    write_tar,
    write_zip,
)
from fake_engine import FakeEngine
from invoked import Result
from numpy.typing import NDArray
from optional import optional
from range_server import Shelf, shelf
from s3_server import Buckets
from stand_ins import NO_STORE
from stand_ins import InceptionPixels as Pixels

import evalkit.system.identity
from evalkit.comparison import compare, features_of
from evalkit.comparison.sources import open_source
from evalkit.errors import InputError, RemoteError
from evalkit.features.extraction import extract
from evalkit.images import ImageSource, is_pattern, open_image_files, open_images
from evalkit.system import attempts, file_systems, http_files, ranges, urls
from evalkit.system.run import Run
from evalkit.system.storage import Remote
from generation import training_data
from reference_batches import build

fsspec = pytest.importorskip("fsspec", reason="needs fsspec, which comes with torch")

BY_PATH = [name for name in CONTAINERS if not name.startswith(("array", "tensor"))]


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, empty."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    optional("aiohttp", "remote")
    monkeypatch.setenv("EVALKIT_OFFLINE", "0")
    monkeypatch.setattr(attempts, "WAITS", (0.0, 0.0))
    with shelf() as found:
        yield found


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are read in many ranges, as large ones are."""
    monkeypatch.setattr(ranges, "SMALL", 2**10)
    monkeypatch.setattr(ranges, "LARGE", 2**13)
    monkeypatch.setattr(ranges, "_BUFFER", 2**8)
    monkeypatch.setattr(ranges, "_kept", ranges._Kept())


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written a moment ago is remembered, too."""
    monkeypatch.setattr(evalkit.system.identity, "SETTLED_SECONDS", -3600.0)


class Single(Pixels):
    batch_size = 1


def images_of(source: ImageSource, size: int = 3) -> NDArray[Any]:
    return np.concatenate(list(source.batches(size)))


def put(web: Shelf, path: Path) -> str:
    """Serve a file or folder under its own name, and return its URL."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            web.files[f"/{file.relative_to(path.parent).as_posix()}"] = file.read_bytes()
    return f"{web.address}/{path.name}{'/' if path.is_dir() else ''}"


def large() -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), np.uint8)


def refusal(source: str, error: type[Exception] = RemoteError) -> str:
    with pytest.raises(error) as caught:
        for _ in open_images(source).batches(2):
            pass
    assert len(str(caught.value)) <= 1000
    return str(caught.value)


# ------------------------------------------------------------------------------------------ the same images


@pytest.mark.parametrize("scheme", ["memory", "file", "small ranges"])
@pytest.mark.parametrize("name", BY_PATH)
def test_any_container_at_a_url(name: str, scheme: str, tmp_path: Path, memory: Any, request: Any) -> None:
    if scheme == "small ranges":
        request.getfixturevalue("small_ranges")
    folder = tmp_path / "all"
    folder.mkdir()
    path = CONTAINERS[name](folder)
    url = f"file://{path}"
    if scheme != "file":
        memory.put(str(folder), "/all", recursive=True)
        url = f"memory://all/{path.relative_to(folder)}"
    source, local = open_images(url), open_images(path)
    assert (source.name, source.kind, len(source)) == (url, local.kind, 7)
    np.testing.assert_array_equal(images_of(source), PIXELS)
    np.testing.assert_array_equal(np.concatenate(list(source.batches(2, 5))), PIXELS[5:])
    assert source.digest == local.digest
    assert [note.replace(url, "") for note in source.notes] == [
        note.replace(str(path), "") for note in local.notes
    ]
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(images_of(copy), PIXELS)


@pytest.mark.parametrize(
    "name", ["npz", "npz deflated", "npy", "zip", "tar", "tar.gz", "folder", "hdf5 images"]
)
def test_any_container_by_http(name: str, tmp_path: Path, web: Shelf, small_ranges: None) -> None:
    path = CONTAINERS[name](tmp_path)
    source = open_images(put(web, path))
    np.testing.assert_array_equal(images_of(source), PIXELS)
    assert source.digest == open_images(path).digest
    assert all(asked for method, name, asked in web.asked if method == "GET" and not name.endswith("/"))


def put_s3(s3: Buckets, folder: Path) -> None:
    """Put the files of a folder into the bucket, under the folder's name."""
    for file in folder.rglob("*"):
        if file.is_file():
            s3.objects[f"bucket/{file.relative_to(folder.parent).as_posix()}"] = file.read_bytes()


@pytest.mark.parametrize("name", ["npz", "npy", "zip", "tar", "folder", "parquet folder", "parts"])
def test_s3(name: str, tmp_path: Path, s3: Buckets, small_ranges: None) -> None:
    (tmp_path / "all").mkdir()
    path = CONTAINERS[name](tmp_path / "all")
    put_s3(s3, tmp_path / "all")
    url = f"s3://bucket/{path.relative_to(tmp_path)}"
    source, local = open_images(url), open_images(path)
    assert source.name == url
    np.testing.assert_array_equal(images_of(source), PIXELS)
    assert source.digest == local.digest
    source.check_unchanged(every_file=True)
    gets = [asked for method, address, asked in s3.asked if method == "GET" and "list-type" not in address]
    assert gets
    assert all(gets)  # by ranges
    np.testing.assert_array_equal(images_of(pickle.loads(pickle.dumps(source))), PIXELS)
    s3.objects[next(each for each in s3.objects if not each.endswith(".md"))] = b"another content"
    with pytest.raises(InputError, match="changed while it was read"):
        source.check_unchanged(every_file=True)
    assert "there is no such file or folder" in refusal("s3://bucket/nothing.npz")
    assert "there is no such file or folder" in refusal("s3://nowhere/nothing.npz")


@pytest.mark.parametrize("server", ["s3", "web"])
@pytest.mark.parametrize("name", ["npz", "zip", "tar", "folder", "parquet folder", "parts"])
def test_workers_read_from_a_server(name: str, server: str, tmp_path: Path, request: Any) -> None:
    """Extraction and building; a worker is given the URL and the digest, and not the images."""
    (tmp_path / "all").mkdir()
    path = CONTAINERS[name](tmp_path / "all")
    if server == "s3":
        put_s3(request.getfixturevalue("s3"), tmp_path / "all")
        url = f"s3://bucket/{path.relative_to(tmp_path)}"
    else:
        root = put(request.getfixturevalue("web"), tmp_path / "all")
        url = f"{root}{path.relative_to(tmp_path / 'all')}{'/' if path.is_dir() else ''}"
    expected = features_of(open_images(path), extractor=Pixels(), run=NO_STORE)
    engine = FakeEngine(2)
    found = features_of(url, extractor=Pixels(), run=Run(store=None, engine=engine))
    assert engine.maps[0]
    assert found.digest == expected.digest
    for output, rows in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[output], rows)
    pickled = pickle.dumps(open_images(url))
    assert PIXELS[0].tobytes() not in pickled
    assert len(pickled) < 1500
    settings, engine = build.Settings(size=4, images=5), FakeEngine(2)
    build.build(path, tmp_path / "local.npz", settings, extractor=Single())
    build.build(url, tmp_path / "remote.npz", settings, extractor=Single(), engine=engine)
    assert len(engine.maps[0]) == 7
    assert (tmp_path / "remote.npz").read_bytes() == (tmp_path / "local.npz").read_bytes()


@pytest.mark.parametrize("source", ["x.zip", "folder/"])
def test_workers_refuse_another_version(source: str, s3: Buckets) -> None:
    """Although names and sizes are the same."""
    for key, content in image_files().items():
        s3.objects[f"bucket/folder/{key}"] = content
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for key, content in image_files().items():
            archive.writestr(key, content)
    s3.objects["bucket/x.zip"] = file.getvalue()
    files = open_image_files(Remote(f"s3://bucket/{source}"))
    pickled = pickle.dumps(files)
    assert pickle.loads(pickled).names == files.names  # type: ignore[union-attr]
    for name, content in s3.objects.items():
        s3.objects[name] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(InputError, match=r"has other names or sizes here|changed while it was read"):
        pickle.loads(pickled)


@pytest.mark.parametrize("name", ["npz", "zip", "tar", "folder"])
def test_features_are_found_in_the_store(name: str, tmp_path: Path, memory: Any) -> None:
    (tmp_path / "all").mkdir()
    path = CONTAINERS[name](tmp_path / "all")
    memory.put(str(tmp_path / "all"), "/all", recursive=True)
    run = Run(store=tmp_path / "store")
    local = extract(open_images(path), Pixels(), run=run)

    class Unused(Pixels):
        def __call__(self, images: Any) -> Any:
            pytest.fail("the store has these features")

    remote = extract(open_images(f"memory://all/{path.name}"), Unused(), run=run)
    assert remote.digest == local.digest
    np.testing.assert_array_equal(remote.arrays["pool"], local.arrays["pool"])


def test_statistics_and_features_files(tmp_path: Path, memory: Any, run: Callable[..., Result]) -> None:
    write_npz(tmp_path / "statistics.npz", **STATISTICS)
    features_of(PIXELS, extractor=Pixels(), run=NO_STORE).save(tmp_path / "features.h5")
    memory.put(str(tmp_path), "/all", recursive=True)
    assert set(open_images("memory://all/statistics.npz").statistics or ()) == set(STATISTICS)
    found = compare("memory://all/features.h5", PIXELS[::-1], metrics="fid", extractor=Pixels(), run=NO_STORE)
    assert found.reference.name == "memory://all/features.h5"
    expected = compare(PIXELS, PIXELS[::-1], metrics="fid", extractor=Pixels(), run=NO_STORE)
    assert [score.value for score in found.scores] == [score.value for score in expected.scores]


def test_the_command_line(tmp_path: Path, memory: Any, pixels: Pixels, run: Callable[..., Result]) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": encoded(PIXELS[0]), "1.png": encoded(PIXELS[1])})
    write_tar(tmp_path / "b.tar", {"2.png": encoded(PIXELS[2])})
    memory.put(f"{tmp_path}/*.tar", "/shards/")
    result = run("features", "memory://shards/*.tar", "-o", tmp_path / "out.h5")
    assert result.code == 0, result.err
    assert "features of 3 images of memory://shards/*.tar" in result.out
    result = run("compare", "memory://shards", "memory://shards/a.tar")
    assert result.code == 2
    assert "no images" in result.err
    result = run("reference", "show", "memory://shards/a.tar")
    assert "2 images of 5x6" in result.out, result
    result = run("reference", "build", "memory://shards/a.tar", "-o", tmp_path / "r.npz", "--size", "8",
                 "--statistics", "none")  # fmt: skip
    assert result.code == 0, result.err


def test_local_files_do_not_load_fsspec(tmp_path: Path) -> None:
    write_zip(tmp_path / "x.zip", image_files())
    code = (
        "import sys\nfrom evalkit.images import open_images\n"
        f"before = 'fsspec' in sys.modules\nopen_images({str(tmp_path / 'x.zip')!r}).digest\n"
        "print(before, 'fsspec' in sys.modules, 'aiohttp' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False"]


# --------------------------------------------------------------------------------------------------- ranges


def test_a_large_npz_is_read_ahead_and_never_whole(web: Shelf, small_ranges: None) -> None:
    pixels = large()
    web.files["/x.npz"] = npz_bytes(pixels)
    web.delay = 0.01
    source = open_images(f"{web.address}/x.npz")
    np.testing.assert_array_equal(images_of(source, 8), pixels)
    assert max(end - start for start, end in web.ranges()) <= 2**13
    assert web.most_at_once > 1
    # All that is read twice is what shows the order, before it is read in large ranges.
    assert web.bytes_sent < 1.2 * len(web.files["/x.npz"])


def test_opening_reads_only_a_part(web: Shelf, small_ranges: None) -> None:
    pixels = large()
    web.files["/y.npz"] = npz_bytes(pixels)
    open_images(f"{web.address}/y.npz")
    assert web.bytes_sent < len(web.files["/y.npz"]) / 4


def test_pictures_of_a_folder_are_fetched_side_by_side(web: Shelf, tmp_path: Path) -> None:
    for number in range(40):
        web.files[f"/folder/{number:02} a.png"] = encoded(PIXELS[number % 7])
    web.delay = 0.01
    source = open_images(f"{web.address}/folder/")
    assert len(images_of(source)) == 40
    assert web.most_at_once > 4


def test_a_server_without_ranges(web: Shelf, small_ranges: None) -> None:
    web.has_ranges = False
    web.files |= {"/large.npz": npz_bytes(large()), "/f/a.png": encoded(PIXELS[0])}
    message = refusal(f"{web.address}/large.npz")
    assert "ignores range requests" in message
    assert "Download the file" in message
    np.testing.assert_array_equal(images_of(open_images(f"{web.address}/f/")), PIXELS[:1])


def test_a_server_that_gives_no_size(web: Shelf) -> None:
    web.has_sizes = False
    web.files["/x.npz"] = npz_bytes(PIXELS)
    assert "does not say how large the file is" in refusal(f"{web.address}/x.npz")


def shifted(headers: dict[str, str], body: bytes) -> bytes:
    headers["Content-Range"] = headers["Content-Range"].replace("bytes ", "bytes 1")
    return body


def of_another_size(headers: dict[str, str], body: bytes) -> bytes:
    headers["Content-Range"] = headers["Content-Range"].partition("/")[0] + "/1"
    return body


def packed(headers: dict[str, str], body: bytes) -> bytes:
    headers["Content-Encoding"] = "gzip"
    return gzip.compress(body)


def without_range(headers: dict[str, str], body: bytes) -> bytes:
    del headers["Content-Range"]
    return body


def of_another_version(headers: dict[str, str], body: bytes) -> bytes:
    headers["ETag"] = '"another"'
    return body


@pytest.mark.parametrize(
    ("mangle", "words"),
    [
        (shifted, "sent something else than was asked for: bytes"),
        (of_another_size, "changed while it was read"),
        (packed, "a compressed copy"),
        (without_range, "unnamed ones came"),
        (of_another_version, "changed while it was read"),
        (lambda _, body: body[:-1], "the connection was lost or the file changed"),
        (lambda _, body: body + bytes(100), "more than the"),
    ],
)
def test_an_answer_that_is_not_the_range(mangle: Any, words: str, web: Shelf, small_ranges: None) -> None:
    web.files["/x.npz"] = npz_bytes(large())
    web.mangle = mangle
    assert words in refusal(f"{web.address}/x.npz")


def test_few_large_results_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_MOST_BYTES", 100)
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item

    found = ranges.fetch_each(work, range(20), size=lambda item: 1000 if item == 5 else 40)
    for item in range(20):
        assert next(found) == item
        assert len(begun) <= item + 3
    assert next(found, None) is None


@pytest.mark.parametrize("trouble", ["silent", "failing"])
def test_closing_does_not_wait_for_answers(trouble: str, web: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "WAITS", (20.0,))
    web.files["/x.npz"] = npz_bytes(PIXELS)
    remote = Remote(f"{web.address}/x.npz")
    assert remote.size
    web.delay, web.always = (5.0, None) if trouble == "silent" else (0.0, 503)
    results = ranges.fetch_each(lambda item: remote.read_bytes() if item else b"", range(4))
    assert next(results) == b""
    time.sleep(0.1)
    begun = time.monotonic()
    results.close()
    assert time.monotonic() - begun < 2


def test_a_host_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class ConnectionTimeoutError(TimeoutError):
        pass

    tried = []

    def call() -> None:
        tried.append(1)
        raise ConnectionTimeoutError

    monkeypatch.setattr(attempts, "WAITS", (0.0,) * 4)
    monkeypatch.setattr(attempts, "_said", float("-inf"))
    with caplog.at_level("INFO"), pytest.raises(RemoteError, match="did not answer after several attempts"):
        attempts.persist("https://host.example/x", call)
    assert len(tried) == 2
    assert [record.getMessage() for record in caplog.records if record.name.startswith("evalkit")] == [
        "https://host.example/x: no answer yet, trying again"
    ]


# ------------------------------------------------------------------------------------------------- identity


def test_the_digest_is_remembered_by_the_tag(web: Shelf, small_ranges: None) -> None:
    pixels = large()
    web.files["/x.npz"] = npz_bytes(pixels)
    first = open_images(f"{web.address}/x.npz").digest
    ranges._kept = ranges._Kept()  # the fixture puts the old one back
    before = web.bytes_sent
    assert open_images(f"{web.address}/x.npz").digest == first
    assert web.bytes_sent - before < len(web.files["/x.npz"]) / 4
    web.files["/x.npz"] = npz_bytes(pixels[::-1].copy())
    assert open_images(f"{web.address}/x.npz").digest != first


def test_without_a_tag_it_is_read_each_time(web: Shelf, small_ranges: None) -> None:
    web.has_tags = False
    pixels = large()
    web.files["/x.npz"] = npz_bytes(pixels)
    first = open_images(f"{web.address}/x.npz").digest
    web.files["/x.npz"] = npz_bytes(pixels[::-1].copy())  # of the same size
    assert open_images(f"{web.address}/x.npz").digest != first


def test_a_file_that_changes_twice_in_a_second(web: Shelf, small_ranges: None) -> None:
    """The tags of nginx are made of time and size."""
    web.tag, web.modified = '"time-size"', formatdate(usegmt=True)
    pixels = large()
    web.files["/x.npz"] = npz_bytes(pixels)
    first = open_images(f"{web.address}/x.npz").digest
    web.files["/x.npz"] = npz_bytes(pixels[::-1].copy())
    assert open_images(f"{web.address}/x.npz").digest != first


@pytest.mark.parametrize("has_tags", [True, False])
def test_a_copy_in_another_process_is_compared(has_tags: bool, web: Shelf, small_ranges: None) -> None:
    """By the version that the server gives; without one it is all read."""
    web.has_tags = has_tags
    pixels = large()
    web.files["/x.npz"] = npz_bytes(pixels)
    pickled = pickle.dumps(open_images(f"{web.address}/x.npz"))
    ranges._kept, before = ranges._Kept(), web.bytes_sent
    copy = pickle.loads(pickled)
    assert (web.bytes_sent - before < len(web.files["/x.npz"]) / 4) == has_tags
    np.testing.assert_array_equal(images_of(copy, 50), pixels)
    web.files["/x.npz"] = npz_bytes(pixels[::-1].copy())  # of the same size
    ranges._kept = ranges._Kept()
    with pytest.raises(InputError, match=r"x\.npz holds other images here.* All workers must see the same"):
        pickle.loads(pickled)


def stored(root: Path) -> list[Path]:
    return list(root.rglob("*.h5"))


@pytest.mark.parametrize("kind", ["file", "folder", "parts"])
def test_nothing_is_stored_if_no_change_would_show(
    kind: str, web: Shelf, tmp_path: Path, small_ranges: None
) -> None:
    url = {"file": "/d/x.npy", "folder": "/d/", "parts": "/d/*.npy"}[kind]

    def put(pixels: NDArray[Any]) -> None:
        file = io.BytesIO()
        np.save(file, pixels)
        web.files |= {f"/d/{number}.bmp": encoded(each, "BMP") for number, each in enumerate(pixels)}
        if kind != "folder":
            web.files = {"/d/x.npy": file.getvalue()}
        ranges._kept = ranges._Kept()

    run = Run(store=tmp_path / "store")
    web.has_tags = False
    put(PIXELS)
    source = open_images(web.address + url)
    assert source.digest
    put(PIXELS[::-1])
    extract(source, Pixels(), run=run)
    assert not stored(tmp_path)
    web.has_tags = True
    found = extract(open_images(web.address + url), Pixels(), run=run)
    assert stored(tmp_path)
    web.has_tags = False  # what is stored is used all the same
    np.testing.assert_array_equal(
        extract(open_images(web.address + url), Pixels(), run=run).arrays["pool"], found.arrays["pool"]
    )


@pytest.mark.parametrize("name", ["x.npz", ""])
def test_no_build_is_resumed_if_no_change_would_show(name: str, web: Shelf) -> None:
    web.files |= {"/d/x.npz": npz_bytes(PIXELS)} if name else {"/d/x.png": encoded(PIXELS[0])}
    for web.has_tags in (True, False):
        opened = build._open(f"{web.address}/d/{name}", None)
        builder = SimpleNamespace(items=opened, settings=build.Settings(size=8), extractor=None)
        keys = {build._Builder._identity(builder)["source"] for _ in range(2)}  # type: ignore[arg-type]
        assert len(keys) == (1 if web.has_tags else 2)


def test_pixels_that_change_are_not_kept(web: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_data, "physical_memory", lambda: 1)
    web.minds_conditions = False
    web.files["/x.npz"] = npz_bytes(PIXELS)
    source = open_images(f"{web.address}/x.npz")
    assert source.digest
    web.files["/x.npz"] = npz_bytes(PIXELS[::-1].copy())
    with pytest.raises(InputError, match="changed while it was read"):
        training_data.load_pixels(source, tmp_path / "pixels")
    assert not (tmp_path / "pixels").exists()


@pytest.mark.parametrize("minds", [True, False])
@pytest.mark.parametrize("by", ["tag", "time", "size"])
def test_a_picture_that_changes_in_between(by: str, minds: bool, web: Shelf, tmp_path: Path) -> None:
    web.has_tags, web.minds_conditions = by == "tag", minds
    web.modified = formatdate(1e9, usegmt=True) if by == "time" else None
    for number in range(3):
        web.files[f"/d/{number}.bmp"] = encoded(PIXELS[number], "BMP")
    source = open_images(f"{web.address}/d/")
    first = source.digest
    assert ("Sun, 09 Sep 2001 01:46:40 GMT" in web.conditions) == (by == "time")
    before = dict(web.files)
    web.files["/d/1.bmp"] = encoded(PIXELS[5], "BMP") + bytes(by == "size")
    web.modified = formatdate(1e9 + 10, usegmt=True) if by == "time" else None
    with pytest.raises(RemoteError, match="changed while it was read"):
        extract(source, Pixels(), run=Run(store=tmp_path / "store"))
    assert not stored(tmp_path)
    web.files, web.modified = before, formatdate(1e9, usegmt=True) if by == "time" else None
    read = []
    for _ in range(2):  # the first may see a late request of the extraction that was given up
        web.asked.clear()
        assert open_images(f"{web.address}/d/").digest == first
        read.append([path for method, path, _ in web.asked if method == "GET" and path == "/d/2.bmp"])
    assert min(map(len, read)) == (by == "size")  # remembered by the versions of its files


@pytest.mark.parametrize("url", ["memory://shards/*.zip", "memory://shards/", "memory://*/*.zip"])
def test_a_listing_in_other_words(
    url: str, memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 lists no versions, and some servers list times in milliseconds."""
    for number in range(2):
        content = write_zip(tmp_path / "x.zip", {"a.png": encoded(PIXELS[number])}).read_bytes()
        memory.pipe(f"/shards/{number}.zip", content)
        memory.pipe(f"/shards/{number}.png", encoded(PIXELS[number]))
    info = type(memory).info

    def with_version(self: Any, path: str, **how: Any) -> Any:
        found = info(self, path, **how)
        return {**found, "VersionId": "v1", "created": 1e9} if found["type"] == "file" else found

    monkeypatch.setattr(type(memory), "info", with_version)
    source = open_images(url)
    assert source.digest
    source.check_unchanged(every_file=True)
    np.testing.assert_array_equal(images_of(source), PIXELS[:2])


def test_a_folder_that_changes_while_it_is_opened(memory: Any) -> None:
    for number in range(2):
        memory.pipe(f"/d/{number}.png", encoded(PIXELS[number]))
    source = open_images("memory://d/")
    memory.pipe("/d/1.png", encoded(PIXELS[5]))
    with pytest.raises(InputError, match="changed while it was read"):
        source.identify()


def test_a_change_while_it_is_read(web: Shelf, small_ranges: None) -> None:
    pixels = large()
    web.files["/x.npz"] = npz_bytes(pixels)
    source = open_images(f"{web.address}/x.npz")
    source.identify()
    web.files["/x.npz"] = npz_bytes(pixels[::-1].copy())
    with pytest.raises(InputError, match=r"x\.npz changed while it was read"):
        source.check_unchanged()
    ranges._kept = ranges._Kept()
    with pytest.raises(InputError, match=r"x\.npz: changed while it was read"):
        images_of(source)


@pytest.mark.parametrize("name", ["npz", "folder", "parquet folder"])
def test_a_change_in_memory(name: str, tmp_path: Path, memory: Any, settled: None) -> None:
    (tmp_path / "all").mkdir()
    path = CONTAINERS[name](tmp_path / "all")
    memory.put(str(tmp_path / "all"), "/all", recursive=True)
    source = open_images(f"memory://all/{path.name}")
    first = source.digest
    source.check_unchanged(every_file=True)
    file = next(key for key in sorted(memory.store) if not key.endswith(".md"))
    memory.pipe(file, bytes(memory.cat(file)))
    with pytest.raises(InputError, match="changed while it was read"):
        source.check_unchanged(every_file=True)
    assert open_images(f"memory://all/{path.name}").digest == first


def test_a_large_file_is_announced(
    web: Shelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(evalkit.system.identity, "_LARGE_BYTES", 100)
    web.files["/x.npz"] = npz_bytes(PIXELS)
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert open_images(f"{web.address}/x.npz").digest
    said = [record.getMessage() for record in caplog.records if record.name.startswith("evalkit")]
    assert [text.partition(" all ")[0] for text in said] == [f"{web.address}/x.npz: reading"]
    monkeypatch.setattr(evalkit.system.identity, "size_of", lambda _: 150 * 10**9)
    with caplog.at_level("INFO"):
        evalkit.system.identity._announce("x", [Remote(f"{web.address}/x.npz")])
    assert caplog.records[-1].getMessage() == "x: reading all 150.0 GB once to compute a checksum"


# --------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("status", "words"),
    [(404, "there is no such file"), (403, "no permission"), (401, "no permission"), (503, "answered 503")],
)
def test_what_a_server_refuses(status: int, words: str, web: Shelf, run: Callable[..., Result]) -> None:
    web.always = status
    assert words in refusal(f"{web.address}/x.npz")
    result = run("compare", f"{web.address}/x.npz", f"{web.address}/x.npz")
    assert result.code == 2
    assert words in result.err


def test_a_failure_that_passes(web: Shelf) -> None:
    web.files["/x.npz"] = npz_bytes(PIXELS)
    web.statuses = [503, 429]
    np.testing.assert_array_equal(images_of(open_images(f"{web.address}/x.npz")), PIXELS)
    assert web.statuses == []


def test_a_server_that_is_silent(web: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_files, "TIMEOUT", 0.1)
    monkeypatch.setattr(attempts, "WAITS", (0.0,))
    file_systems.file_system.cache_clear()
    web.files["/x.npz"] = npz_bytes(PIXELS)
    web.delay = 0.5
    try:
        assert "did not answer" in refusal(f"{web.address}/x.npz")
    finally:
        file_systems.file_system.cache_clear()


def test_no_server(web: Shelf) -> None:
    assert "cannot be read" in refusal("http://127.0.0.1:9/x.npz")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://user:12/secret@host/x", "https://..."),
        ("https://secret#en:secret@host/x", "https://..."),
        ("https://user:secret?x@host/x", "https://..."),
        ("https://user:it's-secret@host/x?y='secret", "https://host/x"),
        ("https://host/x@2.png", "https://host/x@2.png"),
        ("https://user:secret@[::1]:80/x", "https://[::1]:80/x"),
    ],
)
def test_how_a_url_is_shown(url: str, text: str) -> None:
    assert urls.shown(url) == text
    assert urls.scrubbed(f'no file "{url}", <{url}>') == f'no file "{text}", <{text}>'


def test_urls_that_are_not_shown_are_told_apart(web: Shelf) -> None:
    web.files |= {"/d/a@2.npy": b"", "/d/b@2.npy": b""}
    one, other = (Remote(f"{web.address}/d/{name}@2.npy") for name in "ab")
    assert one.identity != other.identity
    assert (one.name, one.is_dir(), Remote(f"{web.address}/d@2/").is_dir()) == ("a@2.npy", False, True)


@pytest.mark.parametrize("secret", ["user:secret@", "user:se/secret@"])
def test_credentials_are_not_shown(secret: str, web: Shelf, run: Callable[..., Result]) -> None:
    url = f"{web.address}/x.npz?X-Amz-Signature=secret&id=secret".replace("://", f"://{secret}")
    for answer in (None, 403, 500):
        web.always = answer
        assert "secret" not in refusal(url, InputError)
        for verb in (("compare", url, url), ("features", url, "-o", "x.h5"), ("reference", "show", url)):
            result = run(*verb)
            assert result.code == 2, result
            assert "secret" not in result.err + result.out


def test_a_signed_url(web: Shelf, tmp_path: Path, pixels: Pixels, run: Callable[..., Result]) -> None:
    web.files["/x.npz"] = npz_bytes(PIXELS)
    web.has_head = False  # it is signed for GET alone
    url = f"{web.address}/x.npz?X-Amz-Signature=secret%2Fsecret%3D&id=secret"
    assert open_images(url).name == f"{web.address}/x.npz"
    result = run("compare", url, url, "--metrics", "fid", "--json", tmp_path / "out.json")
    assert result.code == 0, result.err
    assert "secret" not in result.out + result.err + (tmp_path / "out.json").read_text()
    remembered = [file.read_text() for file in tmp_path.parent.rglob("contents/*.json")]
    assert remembered
    assert "secret" not in "".join(remembered)
    assert {path for _, path, _ in web.asked} == {url.removeprefix(web.address)}
    one, other, third = (
        Remote(f"{web.address}/x.npz?{query}").identity
        for query in ("X-Amz-Signature=a&id=1", "X-Amz-Signature=b&id=1", "X-Amz-Signature=b&id=2")
    )
    assert one == other != third


def test_offline(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Result]) -> None:
    monkeypatch.setenv("EVALKIT_OFFLINE", "1")
    assert "EVALKIT_OFFLINE" in refusal("https://host.example/x.npz")
    assert run("compare", "s3://bucket/x.npz", "s3://bucket/y.npz").code == 2


@pytest.mark.parametrize("url", ["sftp://host/x.npz", "simplecache::s3://bucket/x.npz", "zip://x::file://y"])
def test_urls_of_other_kinds(url: str) -> None:
    assert "evalkit does not read URLs of this kind; expected one that begins with https://" in refusal(
        url, InputError
    )


@pytest.mark.parametrize("url", ["https://host.example/x.npz", "s3://bucket/x.npz", "gs://bucket/x.npz"])
def test_a_missing_package(url: str, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Result]) -> None:
    monkeypatch.setenv("EVALKIT_OFFLINE", "0")

    def missing(scheme: str, **_: Any) -> None:
        raise ImportError(f"Install what {scheme} needs")

    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.setattr(fsspec, "filesystem", missing)
    file_systems.file_system.cache_clear()
    result = run("compare", url, url)
    assert result.code == 2
    assert "pip install 'evalkit[remote]'" in result.err


def test_a_url_that_became_a_path() -> None:
    with pytest.raises(InputError, match=r"s3://bucket/x\.npz: give a URL as text"):
        open_images(Path("s3://bucket/x.npz"))


def test_a_missing_file_in_memory(memory: Any) -> None:
    assert "there is no such file or folder" in refusal("memory://nowhere/x.npz")
    assert "there is no such file or folder" in refusal("memory://nowhere/*.npz")
    memory.pipe("/somewhere/x.npy", b"")
    assert "no file or folder matches" in refusal("memory://somewhere/*.npz", InputError)


def test_patterns_over_http(web: Shelf) -> None:
    web.files |= {"/parts/b.npz": npz_bytes(PIXELS[3:]), "/parts/a.npz": npz_bytes(PIXELS[:3])}
    web.files["/parts/.hidden.npz"] = npz_bytes(PIXELS)
    source = open_images(f"{web.address}/parts/*.npz")
    np.testing.assert_array_equal(images_of(source), PIXELS)
    web.files["/parts/a b.npz"] = web.files.pop("/parts/b.npz")  # after a.npz only if it stays escaped
    assert len(images_of(open_images(f"{web.address}/parts/a*.npz"))) == 7
    np.testing.assert_array_equal(images_of(open_images(f"{web.address}/parts/a*.npz"))[:4], PIXELS[3:])
    assert "only the last part" in refusal(f"{web.address}/*/a.npz", InputError)


def test_a_page_of_links(web: Shelf) -> None:
    address = web.address.replace("://", "://user:secret@")
    web.pages["/a folder/"] = f"""
        <a href="http_1.png">1</a> <A class=x HREF = http_2.png>2</A>
        <a href='{web.address}/a%20folder/3.png'>3</a>
        <a href="/a%20folder/sub/#part">4</a> <a href="./5 a.png">5</a> <a href="http_1.png">again</a>
        <a href="https://{web.address[7:]}/a%20folder/6.png">other scheme</a>
        <a href="http://127.0.0.1:1/a%20folder/7.png">other port</a> <a href="8.png?C=N">order</a>
        <a href="../9.png">above</a> <a href="http://[">none</a> <a name="x">none</a>
        {web.address}/a%20folder/10.png <a href="x/%2e%2e/%2e%2e/11.png">above</a> <a href=".">itself</a>
    """
    web.pages["/a folder/sub/"] = '<a href="4.png">4</a>'
    found = Remote(f"{address}/a%20folder/").walk()
    assert list(found) == ["3.png", "5 a.png", "http_1.png", "http_2.png", "sub/4.png"]
    assert all(child.url.startswith(f"{address}/a%20folder/") for child in found.values())
    web.files |= {f"/a folder/{name}": encoded(PIXELS[0]) for name in found}
    assert len(images_of(open_images(f"{address}/a%20folder/"))) == 5
    assert len(images_of(open_images(f"{web.address}/a folder/"))) == 5


def test_a_page_that_leads_to_itself(web: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    web.pages[""] = '<a href="one/">1</a><a href="two/">2</a>'
    assert "with the same page" in refusal(f"{web.address}/d/", InputError)
    monkeypatch.setattr(http_files, "_PAGE_BYTES", 2**20)
    web.pages[""] = " " * (2**20 + 1)
    assert "page of links is larger than 1 MiB" in refusal(f"{web.address}/d/", InputError)


def test_the_settings_of_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    optional("aiohttp", "remote")
    settings = {"headers": {"A": "1", "B": "1"}, "client_kwargs": {"trust_env": False}}
    monkeypatch.setitem(fsspec.config.conf, "http", settings)
    monkeypatch.setitem(fsspec.config.conf, "https", {"headers": {"B": "2"}})
    for scheme, b in (("https", "2"), ("http", "1")):
        found = http_files.options(scheme, encoded=True)
        assert found["headers"] == {"Accept-Encoding": "identity", "A": "1", "B": b}
        assert found["client_kwargs"]["trust_env"] is False


def test_what_looks_like_a_pattern_or_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_pattern("https://[::1]:8000/x.npz")
    assert not is_pattern("https://host/x.npz?id=*")
    assert is_pattern("https://[::1]:8000/*.npz")
    monkeypatch.chdir(tmp_path)
    Path("run:").mkdir()
    Path("run:/x").write_bytes(npz_bytes(PIXELS))
    assert open_images("run://x").kind == "npz"
    features_of(PIXELS, extractor=Pixels(), run=NO_STORE).save(tmp_path / "features.h5")
    assert open_source("./features.h5").name == "./features.h5"


def test_hdf5_that_leads_to_other_files(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["images"] = PIXELS
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["images"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "images")
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout(PIXELS.shape, np.uint8)
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "images", PIXELS.shape)
        file.create_virtual_dataset("images", layout)
    for name in ("link", "virtual"):
        assert len(open_images(tmp_path / f"{name}.h5")) == 7
    assert "found none" in refusal(f"file://{tmp_path}/link.h5", InputError)
    assert "is stored in other files" in refusal(f"file://{tmp_path}/virtual.h5", InputError)


def test_garbage_of_h5py_does_not_stop_a_read(
    web: Shelf, tmp_path: Path, small_ranges: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that wait for a server would free it, which needs the lock that the reader holds."""
    monkeypatch.setattr(http_files, "_RANGE_SECONDS", 10.0)
    monkeypatch.setattr(attempts, "WAITS", ())
    source = open_images(put(web, CONTAINERS["hdf5 images"](tmp_path)))
    ranges._kept = ranges._Kept()
    with h5py.File(tmp_path / "other.h5", "w") as file:
        cycles: list[list[Any]] = [[file.create_group(str(number))] for number in range(20)]
        for cycle in cycles:
            cycle.append(cycle)

        def garbage(_: dict[str, str], body: bytes) -> bytes:
            cycles.clear()
            if gc.isenabled():  # then Python might do so now, while h5py waits for this answer
                gc.collect()
            return body

        web.mangle = garbage
        np.testing.assert_array_equal(images_of(source), PIXELS)
        assert gc.isenabled()
    assert not cycles


@pytest.mark.parametrize("name", ["npz", "zip", "tar", "parquet", "hdf5 images"])
def test_a_connection_that_is_lost_names_the_url(
    name: str, tmp_path: Path, web: Shelf, small_ranges: None
) -> None:
    if name == "parquet":
        optional("pyarrow", "parquet")
    source = open_images(put(web, CONTAINERS[name](tmp_path)))
    ranges._kept = ranges._Kept()
    web.always = 403
    with pytest.raises(RemoteError, match="no permission"):
        images_of(source)


def test_unsafe_archives_are_refused(tmp_path: Path, memory: Any) -> None:
    memory.pipe("/x.zip", write_zip(tmp_path / "x.zip", {"../a.png": encoded(PIXELS[0])}).read_bytes())
    assert "expected relative paths" in refusal("memory://x.zip", InputError)
    np.savez(tmp_path / "x.npz", np.array([{}]))
    memory.pipe("/x.npz", (tmp_path / "x.npz").read_bytes())
    assert "never loaded" in refusal("memory://x.npz", InputError)
