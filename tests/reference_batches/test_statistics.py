"""Statistics of other tools by name: listed, downloaded and checked, or got by hand."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from containers import npz_bytes
from file_server import Server, serving
from invoked import Result
from stand_ins import STATISTICS_OF_PIXELS

from evalkit.errors import DownloadError, InputError
from evalkit.layouts import LAYOUTS
from evalkit.results import Comparison, PublishedRow
from reference_batches import statistics
from reference_batches.catalog import closest, entries
from reference_batches.fetch import cache_path, fetch, named
from reference_batches.statistics import statistics_files, statistics_table

Invoke = Callable[..., Result]


def npz(value: float = 0.0) -> bytes:
    return npz_bytes(mu=np.full(2048, value), sigma=np.eye(2048))


CONTENT = npz()


def git_blob(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def toml(url: str, blob: str) -> str:
    common = 'keys = "mu sigma", users = "someone/tool"'
    known = f'url = "{url}/a/near.npz", git_blob = "{blob}", tool = "jit"'
    return f"""files = [
  {{ name = "near", file = "near.npz", dataset = "tiny", at = "x", {known}, {common} }},
  {{ name = "unknown", file = "unknown.npz", at = "x", url = "{url}/unknown.npz", {common} }},
  {{ name = "far", file = "far.npz", at = "https://tool.example, fid_stats/", {common} }},
  {{ name = "net", file = "net.pt", kind = "network", at = "https://tool.example/net.pt", {common} }},
]
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """Has the file of `near`; the small catalogue knows git's digest of it."""
    with serving(CONTENT) as (server, url):
        file = tmp_path / "statistics.toml"
        file.write_text(toml(url, git_blob(CONTENT)))
        monkeypatch.setattr(statistics, "FILE", file)
        monkeypatch.delenv("EVALKIT_OFFLINE")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.chdir(tmp_path)
        yield server


# The real catalogue ------------------------------------------------------------------------------------


def test_all_files_in_use_are_there() -> None:
    """What the field measures with, by the names of the files."""
    files = {row.file for row in statistics_files().values()} | {entry.file for entry in entries().values()}
    expected = [
        "VIRTUAL_imagenet64_labeled.npz",
        "VIRTUAL_imagenet128_labeled.npz",
        "VIRTUAL_imagenet256_labeled.npz",
        "VIRTUAL_imagenet512.npz",
        "admnet_guided_upsampled_imagenet256.npz",
        "admnet_imagenet256.npz",
        "admnet_guided_imagenet256.npz",
        "admnet_guided_25step_imagenet256.npz",
        "admnet_upsampled_imagenet256.npz",
        "biggan_deep_trunc1_imagenet256.npz",
        "admnet_imagenet512.npz",
        "admnet_guided_imagenet512.npz",
        "admnet_guided_upsampled_imagenet512.npz",
        "biggan_deep_trunc1_imagenet512.npz",
        "admnet_imagenet64.npz",
        "iddpm_imagenet64.npz",
        "biggan_deep_imagenet64.npz",
        "classify_image_graph_def.pb",
        "adm_in256_stats.npz",
        "adm_in64_stats.npz",
        "adm_stats_512.npz",
        "train_imagenet256_stats.npz",
        "ffhq_stats.npz",
        "cifar10-32x32.npz",
        "imagenet-64x64.npz",
        "imagenet-64x64-baseline.npz",
        "ffhq-64x64.npz",
        "afhqv2-64x64.npz",
        "img512.pkl",
        "img64.pkl",
        "imagenet_256_fid_stats.npz",
        "imagenet_256_fid_stats_torch.npz",
        "fid_stats_cifar10_train_pytorch.npz",
        "fid_stats_imagenet64_guided_diffusion.npz",
        "fid_stats_imagenet256_guided_diffusion.npz",
        "fid_stats_imagenet512_guided_diffusion.npz",
        "cifar10_stats.npz",
        "gan-metrics.zip",
        "cifar10_MODE_SPLIT_32.npz",
        "inception-2015-12-05.pkl",
        "inception-2015-12-05.pt",
        "jit_in256_stats.npz",
        "jit_in512_stats.npz",
    ]
    assert len(expected) == 43  # JiT's two are one of the 42
    assert set(expected) <= files


def test_every_row_is_sound() -> None:
    rows = statistics_files()
    assert not rows.keys() & entries().keys()
    assert len({row.file for row in rows.values()}) == len(rows)
    for name, row in rows.items():
        assert name == row.name
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert row.users
        assert row.at.startswith("https://")
        assert row.url or not row.git_blob
        assert not row.url or row.url.endswith(row.file)
        assert re.fullmatch("([0-9a-f]{40})?", row.git_blob)
        assert ("raw.githubusercontent.com" in row.url) == bool(row.git_blob)
        assert bool(row.keys) == (row.kind == "statistics")
        assert bool(row.statistics) == (row.kind == "statistics" and row.keys != "pool_3")
        assert row.tool in ("", *LAYOUTS)
    assert "facebookresearch/DiT" in entries()["imagenet256"].users


def test_the_table_stays_readable() -> None:
    lines = statistics_table(statistics_files().values(), {"jit-in256"}).splitlines()
    assert max(map(len, lines)) <= 165
    columns = {line.index(word) for line, word in zip(lines[:2], ("used by", "LTH14/JiT"), strict=True)}
    assert len(columns) == 1
    assert " yes  LTH14/JiT" in lines[1]
    assert "edm2-img512" in closest("img512.pkl")
    assert "adm-in256" in closest("fid_stats/adm_in256_stats.npz")
    assert named("jit-in256") == statistics_files()["jit-in256"]


def test_jits_is_downloaded_by_its_name(run: Invoke, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", np.zeros((9, 8, 8, 3), np.uint8))
    result = run("compare", "jit-in256", tmp_path / "x.npz")  # offline, as all tests are
    assert (result.code, result.out) == (2, "")
    assert "Get https://raw.githubusercontent.com/LTH14/JiT/" in result.err
    assert "/fid_stats/jit_in256_stats.npz by other means" in result.err


def test_uvits_is_got_by_hand(run: Invoke, tmp_path: Path, own_cache: Path) -> None:
    np.savez(tmp_path / "x.npz", np.zeros((9, 8, 8, 3), np.uint8))
    result = run("compare", "uvit-cifar10", tmp_path / "x.npz")
    place = own_cache / "reference_batches" / "fid_stats_cifar10_train_pytorch.npz"
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        "Error: uvit-cifar10: fid_stats_cifar10_train_pytorch.npz is not on this machine. It is not "
        "downloaded, because it has no direct address. Get it from https://drive.google.com/drive/folders/"
        "1yo-XhqbPue3rp5P57j6QbA5QZx6KybvP, assets/fid_stats/. Then give its path in place of the name, or "
        f"save it as {place}.\n"
    )


# Fetching ----------------------------------------------------------------------------------------------


def test_fetched_once_and_recorded(server: Server) -> None:
    path = fetch("near")
    assert path == cache_path(statistics_files()["near"])
    assert path.read_bytes() == CONTENT
    assert server.paths == ["/a/near.npz"]
    assert fetch("near") == path
    assert len(server.paths) == 1
    path.write_bytes(npz(1.0))
    assert fetch("near").read_bytes() == CONTENT
    assert len(server.paths) == 2


def test_another_content_gets_no_name(server: Server) -> None:
    server.content = npz(2.0)
    with pytest.raises(DownloadError, match=f"git's digest of it is .*, expected {git_blob(CONTENT)}"):
        fetch("near")
    path = cache_path(statistics_files()["near"])
    assert list(path.parent.iterdir()) == []
    path.write_bytes(server.content)  # and put there by hand it is refused, and stays
    with pytest.raises(InputError, match=r"is not near\.npz as someone/tool has it"):
        fetch("near")
    assert path.read_bytes() == server.content


def test_without_a_known_digest_that_of_the_first_download_holds(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "reference_batches")
    path = fetch("unknown")
    assert path.read_bytes() == CONTENT
    said = [text for text in caplog.messages if "no digest of this file was published" in text]
    assert len(said) == 1
    assert "this first download, in unknown.npz.json beside it, has to stay" in said[0]
    path.unlink()
    server.content = npz(1.0)
    digest = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(DownloadError, match=f"sha256 .*, expected {digest}"):
        fetch("unknown")
    assert not path.exists()
    server.content = CONTENT
    assert fetch("unknown").read_bytes() == CONTENT
    assert len([text for text in caplog.messages if "no digest" in text]) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npz_bytes(mu=np.zeros(1024), sigma=np.eye(1024)), "Statistics 1024 wide are of another network"),
        (npz_bytes(mu=np.zeros(2048)), "has mu without sigma"),
        (npz_bytes(mu_s=np.zeros(2023), sigma_s=np.eye(2023)), "holds mu_s, sigma_s; expected unknown.npz"),
        (npz_bytes(np.zeros((3, 8, 8, 3), np.uint8)), "holds no statistics; expected unknown.npz"),
        (npz_bytes(mu=np.array([{}]), sigma=np.eye(2048)), "pickled Python objects"),
        (b"<html>sign in</html>", "not that of a known container"),
    ],
    ids=["other shapes", "no sigma", "other keys", "images", "pickled objects", "web page"],
)
def test_what_holds_no_statistics_gets_no_name(server: Server, content: bytes, words: str) -> None:
    server.content = content
    with pytest.raises(DownloadError, match=re.escape(words)):
        fetch("unknown")
    assert list(cache_path(statistics_files()["unknown"]).parent.iterdir()) == []


def test_by_hand(server: Server) -> None:
    with pytest.raises(DownloadError, match="it has no direct address"):
        fetch("far")
    path = cache_path(statistics_files()["far"])
    path.parent.mkdir(parents=True)
    path.write_bytes(npz(3.0))
    assert fetch("far") == path
    path.write_bytes(npz(4.0))
    with pytest.raises(InputError, match=r"is not the file that was first used.*remove far\.npz\.json"):
        fetch("far")
    path.with_name("far.npz.json").unlink()
    assert fetch("far") == path
    path.with_name("far.npz.json").unlink()
    path.write_bytes(npz_bytes(np.zeros((3, 8, 8, 3), np.uint8)))
    with pytest.raises(InputError, match=r"holds no statistics; expected far\.npz, with mu sigma"):
        fetch("far")
    assert server.paths == []


@pytest.mark.usefixtures("server")
def test_a_network_is_no_reference(run: Invoke) -> None:
    for command in (("compare", "net", "near"), ("reference", "fetch", "net")):
        result = run(*command)
        assert (result.code, result.out) == (2, "")
        assert "net names a file of the kind network, with which nothing can be compared" in result.err


@pytest.mark.usefixtures("server", "pixels")
def test_compare_by_name(
    run: Invoke, monkeypatch: pytest.MonkeyPatch, server: Server, tmp_path: Path
) -> None:
    monkeypatch.setattr("evalkit.images.npz.STATISTICS", STATISTICS_OF_PIXELS)
    server.content = npz_bytes(mu=np.zeros(48, np.float32), sigma=np.eye(48))
    Path("statistics.toml").write_text(
        Path("statistics.toml").read_text().replace(git_blob(CONTENT), git_blob(server.content))
    )
    statistics._read.cache_clear()
    np.savez("mine.npz", np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8))
    result = run("compare", "near", "mine.npz", "--json", "out.json")
    assert result.code == 0, result.err
    batch = Comparison.from_json(Path("out.json").read_text()).reference
    assert (batch.source, batch.statistics_preprocess) == ("published near", "TF1 bilinear")
    assert "FID" in result.out
    assert "there is no mu_s for sFID" in result.out
    assert "as published" not in result.out
    # Rows that were measured against this file are shown.
    row = PublishedRow(
        dataset="tiny",
        model="a model",
        scores={"fid": 3.5},
        images=60,
        paper="A paper",
        table=1,
        evaluator="torch-fidelity",
        reference="fid_stats/near.npz",
    )
    monkeypatch.setattr(
        "reference_batches.catalog.all_rows", lambda: (row, replace(row, reference="far.npz"))
    )
    result = run("compare", "near", "mine.npz", "--protocol", "torch-fidelity", "--metrics", "fid")
    assert "tiny as published, 60 samples each, evaluator torch-fidelity, against near.\n" in result.out
    listed = run("reference", "list", "--dataset", "tiny").out.splitlines()
    assert listed[2].split()[:6] == ["near", "near.npz", "mu", "sigma", "fetch", "yes"]
