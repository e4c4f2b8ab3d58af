"""Outputs at URLs: the bytes of local files, put as whole objects; refusals come before the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invoked import Result
from numpy.typing import NDArray
from optional import optional
from photographs import encoded, photographs
from s3_server import Buckets
from stand_ins import InceptionPixels as Pixels

from evalkit.comparison import compare, features_of
from evalkit.errors import ImageError, InputError, OutputError
from evalkit.results import Point, Sweep
from evalkit.system import attempts, file_systems
from evalkit.system.files import replace_atomically, working_path
from evalkit.system.storage import Remote
from reference_batches.build import Settings, build

fsspec = pytest.importorskip("fsspec", reason="needs fsspec, which comes with torch")

Invoke = Callable[..., Result]

MODEL = Path(__file__).parents[2] / "generation" / "models" / "digits_diffusion.safetensors"


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, empty."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


@pytest.fixture
def batch(tmp_path: Path, images: NDArray[np.uint8]) -> Path:
    np.savez(tmp_path / "batch.npz", images)
    return tmp_path / "batch.npz"


@pytest.fixture
def sweep(tmp_path: Path, images: NDArray[np.uint8]) -> Path:
    found = compare(images, images[::-1], metrics="fid", extractor=Pixels(), store=None)
    points = tuple(Point(scale=scale, comparison=found) for scale in (0.0, 1.0))
    (tmp_path / "results.json").write_text(Sweep(name="s", points=points).to_json())
    return tmp_path / "results.json"


# OUT stands for a URL or a local path, and batch and sweep for what the fixtures of these names wrote.
VERBS: dict[str, list[Any]] = {
    "features.h5": ["features", "batch", "-o", "OUT"],
    "statistics.npz": ["stats", "batch", "-o", "OUT"],
    "record.json": ["compare", "batch", "batch", "--metrics", "fid", "--json", "OUT"],
    "curves.svg": ["curves", "sweep", "-o", "OUT"],
    "reference.npz": ["reference", "build", "batch", "-o", "OUT", "--size", "8"],
    "converted.npz": ["reference", "convert", "batch", "OUT"],
    "converted.zip": ["reference", "convert", "batch", "OUT"],
    "grid.png": ["reference", "show", "batch", "--grid", "OUT"],
}


@pytest.mark.parametrize("name", VERBS)
def test_every_single_file(
    name: str, batch: Path, request: Any, tmp_path: Path, s3: Buckets, pixels: Pixels, run: Invoke
) -> None:
    if name == "curves.svg":
        optional("matplotlib", "plot")
    words = [request.getfixturevalue(word) if word in ("batch", "sweep") else word for word in VERBS[name]]
    for out in (tmp_path / name, f"s3://bucket/results/{name}"):
        result = run(*(out if word == "OUT" else word for word in words))
        assert result.code == 0, result.err
        assert name == "record.json" or str(out) in result.out
    assert list(s3.objects) == [f"bucket/results/{name}"]
    local, there = (tmp_path / name).read_bytes(), s3.objects[f"bucket/results/{name}"]
    if name == "record.json":  # with the seconds that it took
        assert json.loads(there)["scores"] == json.loads(local)["scores"]
    else:
        assert there == local
    assert [method for method, *_ in s3.asked].count("PUT") == 1  # the whole, at the end
    assert not list(working_path(Remote(f"s3://bucket/results/{name}")).parent.iterdir())


def test_the_grid_of_samples(tmp_path: Path, s3: Buckets, run: Invoke) -> None:
    words = ["sample", "--model", MODEL, "-n", 2, "--respacing", 2, "--out", tmp_path / "run", "--grid"]
    assert run(*words, "s3://bucket/grid.png").code == 0
    assert run(*words, tmp_path / "grid.png").code == 0
    assert s3.objects["bucket/grid.png"] == (tmp_path / "grid.png").read_bytes()


def test_features_save_to_a_url(images: NDArray[np.uint8], tmp_path: Path, s3: Buckets) -> None:
    features = features_of(images, extractor=Pixels(), store=None)
    features.save("s3://bucket/f.h5")
    features.save(str(tmp_path / "f.h5"))
    assert s3.objects["bucket/f.h5"] == (tmp_path / "f.h5").read_bytes()
    with pytest.raises(InputError, match="give a URL as text, not as a Path"):
        features.save(Path("s3://bucket/f.h5"))


# -------------------------------------------------------------------------------------- refused beforehand


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://host.example/x.npz", "https://host.example/x.npz cannot be written. Give s3://BUCKET/NAME"),
        (
            "file:///x.npz",
            "file:///x.npz cannot be written. Give s3://BUCKET/NAME, gs://BUCKET/NAME or a path",
        ),
        ("ftp://host/x.npz", "does not read URLs of this kind"),
        ("s3://bucket", "it is a folder. Give the name of a file"),
        ("s3://bucket/folder/", "it is a folder. Give the name of a file"),
        ("s3://elsewhere/x.npz", "there is no bucket elsewhere. Make it first, or check the URL"),
        ("s3://bucket/in.npz", "it is the input, or named like it"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(
    url: str, message: str, s3: Buckets, run: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evalkit.cli.options.open_batches", lambda *_, **__: pytest.fail("it has begun"))
    monkeypatch.setattr("reference_batches.build._open", lambda *_: pytest.fail("it has begun"))
    for words in (
        ["features", "s3://bucket/in.npz", "-o", url],
        ["stats", "s3://bucket/*.npz", "-o", url],
        ["compare", "s3://bucket/in.npz", "s3://bucket/in.npz", "--json", url],
        ["reference", "build", "s3://bucket/in.npz", "-o", url, "--size", "8", "--statistics", "none"],
    ):
        result = run(*words)
        assert (result.code, result.out) == (2, ""), words
        assert message in result.err, words
    assert s3.objects == {}


def test_a_package_that_is_missing(run: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVALKIT_OFFLINE", "0")

    def missing(scheme: str, **_: Any) -> None:
        raise ImportError(f"Install what {scheme} needs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    file_systems.file_system.cache_clear()
    for url in ("s3://bucket/x.npz", "gs://bucket/x.npz"):
        result = run("stats", "in.npz", "-o", url)
        assert result.code == 2
        assert "pip install 'evalkit[remote]'" in result.err


def test_offline(run: Invoke) -> None:
    result = run("stats", "in.npz", "-o", "s3://bucket/x.npz")
    assert result.code == 2
    assert "EVALKIT_OFFLINE forbids using the network" in result.err


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "-n", "2", "--out", "s3://bucket/run"],
        ["upsample", "base.npz", "--out", "gs://bucket/run"],
        ["sweep", "-n", "2", "--out", "s3://bucket/run"],
        ["train", "diffusion", "x.npz", "--out", "https://host.example/run"],
        ["reference", "fetch", "imagenet64", "--out", "s3://bucket/ref.npz"],
        ["curves", "s3://bucket/run", "-o", "x.png"],
        ["sample", "-n", "2", "--out", "run", "--model", "s3://bucket/m.safetensors"],
    ],
)
def test_what_has_to_be_on_this_machine(words: list[str], run: Invoke) -> None:
    result = run(*words)
    assert (result.code, result.out) == (2, "")
    assert "is a URL. Give a path on this machine" in result.err


def test_a_folder_at_a_url(batch: Path, s3: Buckets, run: Invoke) -> None:
    result = run("reference", "convert", batch, "s3://bucket/folder")
    assert result.code == 2
    assert "a folder cannot be written to a URL. Give a name that ends in .npz or .zip" in result.err


# ------------------------------------------------------------------------------------------- failures


def test_nothing_is_half_written(s3: Buckets) -> None:
    s3.objects["bucket/x.txt"] = b"before"
    out = Remote("s3://bucket/x.txt")
    with pytest.raises(UnicodeEncodeError), replace_atomically(out) as partial:
        partial.write_text("half\udcff", encoding="utf-8")
    s3.failing = {"PUT": (403, "AccessDenied"), "HEAD": (403, "AccessDenied")}
    with pytest.raises(OutputError) as caught, replace_atomically(out) as partial:
        partial.write_text("whole")
    assert str(caught.value).startswith("Cannot write s3://bucket/x.txt: no permission to write it")
    assert s3.objects == {"bucket/x.txt": b"before"}
    assert not list(working_path(out).parent.iterdir())


def test_a_failure_that_passes(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "WAITS", (0.0, 0.0))
    out, failures = Remote("memory://folder/x.txt"), [OSError("reset"), TimeoutError()]
    put = type(memory).put_file

    def put_file(self: Any, *arguments: Any) -> None:
        if failures:
            raise failures.pop()
        put(self, *arguments)

    monkeypatch.setattr(type(memory), "put_file", put_file)
    with replace_atomically(out) as partial:
        partial.write_text("x")
    assert memory.cat_file("/folder/x.txt") == b"x"
    failures += [OSError("reset")] * 4
    with (
        pytest.raises(
            OutputError, match=r"Cannot write memory://folder/x\.txt: it failed \(OSError: reset\)"
        ),
        replace_atomically(out) as partial,
    ):
        partial.write_text("y")
    assert memory.cat_file("/folder/x.txt") == b"x"


def test_google_refuses_in_its_own_words(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def put_file(self: Any, *arguments: Any) -> None:
        calls.append(arguments)
        raise OSError("Forbidden: https://storage/x\nno")  # as gcsfs does

    monkeypatch.setattr(type(memory), "put_file", put_file)
    out = Remote("memory://folder/x.txt")
    with pytest.raises(OutputError, match="no permission to write it"), replace_atomically(out) as partial:
        partial.write_text("x")
    assert len(calls) == 1


def test_scores_are_shown_although_the_record_cannot_be_written(
    batch: Path, s3: Buckets, pixels: Pixels, run: Invoke
) -> None:
    s3.failing = {"PUT": (403, "AccessDenied")}
    result = run("compare", batch, batch, "--metrics", "fid", "--json", "s3://bucket/x.json")
    assert result.code == 2
    assert "FID" in result.out
    assert "Cannot write s3://bucket/x.json: no permission to write it" in result.err
    assert s3.objects == {}


def test_a_build_is_resumed(tmp_path: Path, s3: Buckets, images: NDArray[np.uint8]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, photo in enumerate(photographs(20)):
        data = encoded(photo.convert("RGB"), "JPEG")
        (folder / f"{index:02}.jpg").write_bytes(data[: len(data) // 2] if index == 13 else data)
    out, settings = Remote("s3://bucket/ref.npz"), Settings(size=8)
    seen: list[int] = []

    class Small(Pixels):
        batch_size = 4

    with pytest.raises(ImageError, match=r"13\.jpg"):
        build(folder, out, settings, extractor=Small())
    assert s3.objects == {}
    assert working_path(out).with_name(f"{working_path(out).name}.building").is_dir()
    build(
        folder,
        out,
        settings,
        extractor=Small(),
        skip_bad=True,
        progress=lambda _, done, __: seen.append(done),
    )
    assert seen[0] == 12
    build(folder, tmp_path / "ref.npz", settings, extractor=Small(), skip_bad=True)
    assert s3.objects == {"bucket/ref.npz": (tmp_path / "ref.npz").read_bytes()}
    assert not list(working_path(out).parent.iterdir())


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL"])
def test_another_endpoint(variable: str, batch: Path, tmp_path: Path, s3: Buckets) -> None:
    """As docs/inputs.md says it is given."""
    environment = {name: value for name, value in os.environ.items() if "ENDPOINT" not in name}
    environment |= {variable: s3.address, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    for source, out in ((batch, "s3://bucket/x.npz"), ("s3://bucket/x.npz", tmp_path / "y.npz")):
        command = [sys.executable, "-m", "evalkit", "reference", "convert", str(source), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert s3.objects["bucket/x.npz"] == (tmp_path / "y.npz").read_bytes()
