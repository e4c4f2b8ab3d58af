"""Fetching published batches, and naming them where a path is accepted: a small catalog on loopback."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from containers import npz_bytes
from file_server import Server, serving
from invoked import Result
from numpy.typing import NDArray
from patience import SECONDS, until
from stand_ins import STATISTICS_OF_PIXELS
from stand_ins import InceptionPixels as Pixels

import evalkit.images.npz
import evalkit.system.download
from evalkit.errors import DownloadError, InputError
from evalkit.results import Comparison
from reference_batches import catalog, published
from reference_batches.fetch import cache_path, fetch, named

Invoke = Callable[..., Result]

CATALOG = """
folder = "ref_batches"
reference_images = 20
sample_images = 12

[datasets.tiny]
size = 8
labels = true
folder = "small/tiny"
reference = "VIRTUAL_tiny_labeled.npz"
samples = ["model_tiny.npz"]

[exact]
"""
PUBLISHED = """
images = 12
[[papers]]
title = "A paper"
arxiv = "0000.00000"
dataset = "tiny"
evaluator = "adm"
rows = '''
model | scale | fid | sfid | inception_score | precision | table | batch
MODEL | | 2.5 | 4.25 | | 0.75 | 5 | model_tiny
MODEL-G | 1.5 | 1.5 | 3.25 | 99.5 | | 6
'''
"""


@pytest.fixture(autouse=True)
def small_catalog(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    file = tmp_path / "catalog.toml"
    file.write_text(CATALOG)
    monkeypatch.setattr(catalog, "FILE", file)
    rows = tmp_path / "published.toml"
    rows.write_text(PUBLISHED)
    monkeypatch.setattr(published, "FILE", rows)
    monkeypatch.delenv("EVALKIT_OFFLINE")
    monkeypatch.delenv("EVALKIT_MIRROR", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    return file


def pictures(n: int, size: int = 8) -> NDArray[np.uint8]:
    return np.random.default_rng(n).integers(0, 256, (n, size, size, 3), np.uint8)


def statistics() -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(0)
    arrays = {}
    for suffix, d in (("", 2048), ("_s", 2023)):
        rows = generator.standard_normal((30, d))
        arrays |= {f"mu{suffix}": rows.mean(0), f"sigma{suffix}": np.cov(rows, rowvar=False)}
    return {key: array.astype(np.float32) for key, array in arrays.items()}


@pytest.fixture(scope="module")
def reference() -> bytes:
    return npz_bytes(arr_0=pictures(20), arr_1=np.arange(20) % 10, **statistics())


@pytest.fixture(scope="module")
def samples() -> bytes:
    return npz_bytes(arr_0=pictures(12), arr_1=np.arange(12) % 4)


@pytest.fixture
def server(samples: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The place where the batches are published; serves samples."""
    with serving(samples) as (server, url):
        monkeypatch.setattr(evalkit.system.download, "PUBLISHED", url)
        yield server


def record(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.with_name(f"{file.name}.json").read_text())
    return content


# Fetching ------------------------------------------------------------------------------------------


def test_fetched_once_and_recorded(
    server: Server, samples: bytes, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "reference_batches")
    steps: list[tuple[str, int, int]] = []
    path = fetch("model_tiny", progress=lambda *step: steps.append(step))
    assert path == own_cache / "reference_batches" / "model_tiny.npz"
    assert path.read_bytes() == samples
    assert server.paths == ["/ref_batches/small/tiny/model_tiny.npz"]
    assert steps[-1] == ("model_tiny.npz", len(samples), len(samples))
    assert record(path)["sha256"] == hashlib.sha256(samples).hexdigest()
    assert record(path)["bytes"] == len(samples)
    about, checking = caplog.messages
    assert about.startswith("model_tiny: about 2.4e-06 GB from http://127.0.0.1")
    assert about.endswith(f"/model_tiny.npz to {path}")
    assert "checking every image" in checking
    assert fetch("model_tiny") == path
    assert (len(caplog.messages), len(server.paths)) == (2, 1)


def test_a_reference_has_statistics(server: Server, reference: bytes) -> None:
    server.content = reference
    assert fetch("tiny").read_bytes() == reference
    assert server.paths == ["/ref_batches/small/tiny/VIRTUAL_tiny_labeled.npz"]


def test_the_mirror_comes_first(server: Server, samples: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(samples) as (mirror, url):
        monkeypatch.setenv("EVALKIT_MIRROR", f"{url}/copy/")
        path = fetch("model_tiny")
        assert (mirror.paths, server.paths) == (["/copy/ref_batches/small/tiny/model_tiny.npz"], [])
        path.unlink()
        mirror.statuses = [404]
        assert fetch("model_tiny").read_bytes() == samples
        assert len(server.paths) == 1


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "too few images": (lambda: npz_bytes(arr_0=pictures(11), arr_1=np.arange(11)), "found 11 images of 8x8"),
    "other images": (lambda: npz_bytes(arr_0=pictures(12, 9), arr_1=np.arange(12)), "found 12 images of 9x9"),
    "no labels": (lambda: npz_bytes(arr_0=pictures(12)), "expected .* with labels.*found .* without labels"),
    "a reference": (
        lambda: npz_bytes(arr_0=pictures(12), arr_1=np.arange(12), **statistics()),
        "expected .* without statistics; found .* with statistics",
    ),
    "statistics alone": (lambda: npz_bytes(**statistics()), "found 0 images without labels, with statistics"),
    "a web page": (lambda: b"<html>sign in</html>", "not that of a known container"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_the_batch_gets_no_name(server: Server, case: str) -> None:
    make, message = BAD[case]
    server.content = make()
    path = cache_path(catalog.find("model_tiny"))
    # What is far too large is not even downloaded.
    too_large = len(server.content) > 2 * catalog.find("model_tiny").approximate_bytes
    with pytest.raises(DownloadError, match="at most 4,800" if too_large else message):
        fetch("model_tiny")
    assert list(path.parent.iterdir()) == []
    path.write_bytes(server.content)  # and put there by hand it is refused, and stays
    with pytest.raises(InputError, match=message):
        fetch("model_tiny")
    assert path.read_bytes() == server.content


def test_one_wrong_byte_anywhere(server: Server, small_catalog: Path) -> None:
    small_catalog.write_text(CATALOG.replace("size = 8", "size = 64"))  # more than is read with the header
    good = npz_bytes(arr_0=pictures(12, 64), arr_1=np.arange(12))
    for position in (5_000, len(good) // 2, 147_000):
        damaged = bytearray(good)
        damaged[position] ^= 1
        server.content = bytes(damaged)
        with pytest.raises(DownloadError, match="CRC"):
            fetch("model_tiny")
    server.content = good
    assert fetch("model_tiny").read_bytes() == good


def test_the_digest_of_the_first_fetch_holds(server: Server, samples: bytes) -> None:
    path = fetch("model_tiny")
    os.utime(path, (1, 1))
    fetch("model_tiny")
    assert len(server.paths) == 1  # copied or touched, but the same
    assert record(path)["changed"] == 1_000_000_000
    for damage in (samples[:-1], bytes(len(samples))):
        changed = path.stat().st_mtime_ns
        path.write_bytes(damage)
        if len(damage) != len(samples):
            os.utime(path, ns=(changed, changed))  # the size alone tells
        assert fetch("model_tiny").read_bytes() == samples
    assert len(server.paths) == 3
    path.unlink()
    server.content = npz_bytes(arr_0=pictures(12)[::-1], arr_1=np.arange(12) % 4)
    with pytest.raises(DownloadError, match=f"sha256 .*, expected {record(path)['sha256']}"):
        fetch("model_tiny")


def test_offline_a_file_put_there_by_hand_serves(
    server: Server,
    samples: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "reference_batches")
    monkeypatch.setenv("EVALKIT_OFFLINE", "1")
    path = cache_path(catalog.find("model_tiny"))
    with pytest.raises(
        DownloadError, match=f"Get http.*/model_tiny.npz by other means and save it as {path}"
    ):
        fetch("model_tiny")
    assert caplog.messages == []
    path.parent.mkdir(parents=True)
    path.write_bytes(samples)
    assert fetch("model_tiny") == path
    assert record(path)["sha256"] == hashlib.sha256(samples).hexdigest()
    assert server.paths == []


@pytest.mark.usefixtures("server")
def test_fetch_command(run: Invoke, samples: bytes, tmp_path: Path) -> None:
    result = run("reference", "fetch", "model_tiny", "--out", tmp_path / "mine.npz")
    assert (result.code, result.out) == (0, f"{tmp_path / 'mine.npz'}\n")
    assert result.err.startswith("model_tiny: about ")
    assert (tmp_path / "mine.npz").read_bytes() == samples
    result = run("reference", "fetch", "model_tiny")
    assert Path(result.out.strip()).read_bytes() == samples
    for arguments, words in (
        (("modeltiny",), "such as model_tiny"),
        (("tiny", "--out", tmp_path / "absent" / "x.npz"), "Cannot write"),
    ):
        result = run("reference", "fetch", *arguments)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert words in result.err


def test_killed_midway_and_run_again(
    server: Server, reference: bytes, small_catalog: Path, tmp_path: Path
) -> None:
    code = (
        "import sys, evalkit.system.download; from pathlib import Path; from evalkit.cli import root as cli\n"
        "from reference_batches import catalog\n"
        "evalkit.system.download.PUBLISHED, catalog.FILE = sys.argv.pop(1), Path(sys.argv.pop(1))\n"
        f"evalkit.system.download.download.__kwdefaults__['timeout'] = {SECONDS}\n"
        "cli.main()"
    )
    out, part = tmp_path / "out.npz", tmp_path / "out.npz.part"
    command = [sys.executable, "-c", code, evalkit.system.download.PUBLISHED, small_catalog]
    command += ["reference", "fetch", "tiny", "--out", out]
    server.content, server.stall, server.drop_after = reference, True, [10_000_000]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True) as child:
        until(lambda: part.exists() and part.stat().st_size == 10_000_000, child)
        child.send_signal(signal.SIGKILL)
    assert not out.exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{out}\n"
    assert server.ranges == [None, "bytes=10000000-"]
    assert out.read_bytes() == reference
    assert not part.exists()


# Names where a path is accepted ----------------------------------------------------------------------


def test_an_existing_path_is_no_name(tmp_path: Path) -> None:
    assert named("tiny") == catalog.find("tiny")
    Path("tiny").mkdir()
    assert named("tiny") is None
    assert named(str(tmp_path)) is None
    with pytest.raises(InputError, match="no such file or folder, and no published batch"):
        named("zero\0byte/mine.npz")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tiney", "did you mean tiny?"),
        ("somewhere/model_tiny.npz", "did you mean model_tiny?"),
        ("mein.npz", "did you mean mine.npz?"),
        ("absent.npz", "`evalkit reference list`"),
        ("bells.npz", "`evalkit reference list`"),
    ],
)
@pytest.mark.usefixtures("pixels")
def test_neither_path_nor_name(run: Invoke, server: Server, samples: bytes, text: str, words: str) -> None:
    Path("mine.npz").write_bytes(samples)
    Path("bell\a.npz").write_bytes(samples)  # nobody meant that, and a terminal would ring
    for command in (
        ["compare", text, "mine.npz"],
        ["compare", "tiny", text],
        ["features", text, "-o", "x.h5"],
        ["stats", text, "-o", "x.npz"],
    ):
        result = run(*command)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert result.err.startswith(f"Error: {text}: there is no such file or folder")
        assert words in result.err
    assert server.paths == []


@pytest.mark.usefixtures("pixels")
def test_nothing_is_fetched_for_a_damaged_file(run: Invoke, server: Server) -> None:
    Path("bad.npz").write_bytes(b"PK\x03\x04")
    for arguments in (("tiny", "bad.npz"), ("bad.npz", "model_tiny")):
        result = run("compare", *arguments)
        assert result.code == 2
        assert "bad.npz" in result.err
    assert server.paths == []


@pytest.mark.usefixtures("pixels")
def test_compare_with_a_published_reference(
    run: Invoke, server: Server, samples: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Statistics of as many features as pixels have, rather than minutes with those of the network.
    monkeypatch.setattr(evalkit.images.npz, "STATISTICS", STATISTICS_OF_PIXELS)
    statistics = {"mu": np.zeros(48), "sigma": np.eye(48), "mu_s": np.zeros(12), "sigma_s": np.eye(12)}
    server.content = npz_bytes(arr_0=pictures(20), arr_1=np.arange(20) % 10, **statistics)
    Path("mine.npz").write_bytes(samples)
    result = run("compare", "tiny", "mine.npz", "--json", "out.json")
    assert result.code == 0, result.err
    assert "tiny: about" in result.err
    comparison = Comparison.from_json(Path("out.json").read_text())
    assert comparison.published == tuple(reversed(published.published_rows("tiny")))  # the better FID first
    assert comparison.published_rows == 2
    assert comparison.reference.name.endswith("VIRTUAL_tiny_labeled.npz")
    assert comparison.reference.statistics == "file"
    assert "tiny as published, 12 samples each, evaluator adm.\n" in result.out
    assert "Not like for like" not in result.out  # the small catalog's numbers are of 12 samples
    table = {line.split("  ")[0]: line.split() for line in result.out.splitlines()}
    assert table["MODEL-G, scale 1.5"][-7:-2] == ["1.50", "3.25", "99.50", "-", "arXiv:0000.00000,"]
    assert table["these samples"][2:4] == [f"{comparison['fid']:.2f}", f"{comparison['sfid']:.2f}"]
    Path("other.npz").write_bytes(samples)
    both = run("compare", "tiny", "mine.npz", "other.npz", "--metrics", "fid", "--no-error-bars")
    assert both.out.count("tiny as published, 12 samples each, evaluator adm.\n") == 1
    assert sum(line.startswith("MODEL-G, scale 1.5  ") for line in both.out.splitlines()) == 1


@pytest.mark.usefixtures("pixels")
def test_samples_by_name(run: Invoke, server: Server, samples: bytes) -> None:
    Path("mine.npz").write_bytes(npz_bytes(arr_0=pictures(20)))
    result = run("compare", "mine.npz", "model_tiny", "--format", "adm")
    assert result.code == 0
    assert len(result.out.splitlines()) == 5
    assert len(server.paths) == 1
    # Samples as a reference are possible, and none of the published numbers is of that.
    assert "as published" not in run("compare", "model_tiny", "mine.npz").out
    expected = Pixels()(pictures(12))["pool"]
    assert run("features", "model_tiny", "-o", "x.h5").code == 0
    assert run("stats", "model_tiny", "-o", "x.npz").code == 0
    with np.load("x.npz", allow_pickle=False) as written:
        np.testing.assert_allclose(written["mu"], expected.mean(axis=0), rtol=1e-6)
    assert len(server.paths) == 1
