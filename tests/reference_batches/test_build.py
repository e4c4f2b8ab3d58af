"""Building a reference batch: the evaluator reads the file, and bad images are left out."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invoked import Result
from optional import optional
from photographs import Wide, by_hand, contents
from stand_ins import NO_STORE

from evalkit.cli.options import ExtractorSetup
from evalkit.comparison import compare
from evalkit.errors import ImageError, InputError, UndefinedMetricError
from evalkit.images import open_images
from evalkit.report.text import table
from reference_batches.build import Settings, build

Invoke = Callable[..., Result]


def test_the_file_is_what_the_reference_evaluator_reads(tree: Path, tmp_path: Path) -> None:
    report = build(tree, tmp_path / "ref.npz", Settings(size=16, images=50), extractor=Wide())
    assert (report.kept, report.classes, report.counted, report.bad) == (50, 7, 300, ())
    with zipfile.ZipFile(tmp_path / "ref.npz") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.namelist()[0] == "arr_0.npy"
    file = contents(tmp_path / "ref.npz")
    assert file["arr_0"].shape == (50, 16, 16, 3)
    assert file["arr_0"].dtype == np.uint8
    assert file["arr_1"].dtype == np.int64
    everything = build(tree, tmp_path / "all.npz", Settings(size=16, statistics="none"))
    assert everything.kept == 300
    whole = contents(tmp_path / "all.npz")
    np.testing.assert_array_equal(file["indices"], np.random.RandomState(0).permutation(300)[:50])
    np.testing.assert_array_equal(file["arr_0"], whole["arr_0"][file["indices"]])
    np.testing.assert_array_equal(file["arr_1"], whole["arr_1"][file["indices"]])
    # Statistics of all 300, not of the 50.
    features = Wide()(whole["arr_0"])
    for layer, suffix in (("pool", ""), ("spatial", "_s")):
        np.testing.assert_allclose(
            file[f"mu{suffix}"], features[layer].mean(axis=0, dtype=np.float64), atol=1e-12
        )
        np.testing.assert_allclose(file[f"sigma{suffix}"], np.cov(features[layer], rowvar=False), atol=1e-12)
    source = open_images(tmp_path / "ref.npz")
    assert source.provenance is not None
    assert source.provenance["statistics"]["images"] == 300
    assert source.provenance["classes"] == [f"n{index:08d}" for index in range(7)]
    assert source.provenance == json.loads(str(file["provenance"]))


def test_another_seed_draws_others(tree: Path, tmp_path: Path) -> None:
    build(tree, tmp_path / "ref.npz", Settings(size=16, images=50, seed=3, statistics="none"))
    np.testing.assert_array_equal(
        contents(tmp_path / "ref.npz")["indices"], np.random.RandomState(3).permutation(300)[:50]
    )


def test_statistics_of_those_kept_or_none(tree: Path, tmp_path: Path) -> None:
    report = build(tree, tmp_path / "a.npz", Settings(size=8, images=20, statistics="kept"), extractor=Wide())
    file = contents(tmp_path / "a.npz")
    assert report.counted == 20
    pool = Wide()(file["arr_0"])["pool"]
    np.testing.assert_allclose(file["mu"], pool.mean(axis=0, dtype=np.float64), atol=1e-12)
    build(tree, tmp_path / "b.npz", Settings(size=8, images=20, statistics="none"))
    assert set(contents(tmp_path / "b.npz")) == {"arr_0", "arr_1", "indices", "provenance"}


def test_compare_uses_the_statistics_and_says_so(tree: Path, tmp_path: Path) -> None:
    build(tree, tmp_path / "ref.npz", Settings(size=16), extractor=Wide())
    images = contents(tmp_path / "ref.npz")["arr_0"]
    comparison = compare(tmp_path / "ref.npz", images, extractor=Wide(), run=NO_STORE)
    assert comparison.reference.statistics == "file"
    assert comparison.samples.statistics == "images"
    assert comparison.reference.statistics_images == 300
    assert "mean and covariance of 300 images from the file" in table(comparison)
    assert not any("another extractor" in warning for warning in comparison.warnings)
    assert comparison["fid"] < 1e-3
    assert comparison["sfid"] < 1e-3


def test_statistics_of_another_extractor_are_noticed(tree: Path, tmp_path: Path) -> None:
    build(tree, tmp_path / "ref.npz", Settings(size=16, images=20), extractor=Wide("other"))
    images = contents(tmp_path / "ref.npz")["arr_0"]
    comparison = compare(tmp_path / "ref.npz", images, extractor=Wide(), run=NO_STORE)
    assert any("ref.npz are of another extractor" in warning for warning in comparison.warnings)


def test_the_number_of_workers_changes_nothing(tree: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 5):
        settings = Settings(size=24, images=40)
        build(tree, tmp_path / f"{workers}.npz", settings, extractor=Wide(), workers=workers)
    one, two, five = ((tmp_path / f"{workers}.npz").read_bytes() for workers in (1, 2, 5))
    assert one == two == five


def test_every_container_gives_the_same(tree: Path, tmp_path: Path) -> None:
    files = {path.relative_to(tree.parent).as_posix(): path.read_bytes() for path in tree.rglob("n*_*")}
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    names = sorted(files)
    pyarrow, parquet = optional("pyarrow", "parquet"), optional("pyarrow.parquet", "parquet")
    table = pyarrow.table(
        {
            "image": [{"bytes": files[name], "path": name} for name in names],
            "label": [int(name.split("/")[1][1:]) for name in names],
        }
    )
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=50)
    expected = None
    for source in (tree, tmp_path / "x.zip", tmp_path / "x.tar", tmp_path / "x.parquet"):
        build(source, tmp_path / "ref.npz", Settings(size=16, images=60, statistics="none"))
        file = contents(tmp_path / "ref.npz")
        found = {key: file[key].tobytes() for key in ("arr_0", "arr_1", "indices")}
        assert expected in (None, found), source
        expected = found


def test_a_bad_image_stops_the_build_and_is_named(with_bad: tuple[Path, list[int]], tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"000\.jpg: cannot be decoded.*--skip-bad"):
        build(with_bad[0], tmp_path / "ref.npz", Settings(size=16, statistics="none"))
    assert not (tmp_path / "ref.npz").exists()


@pytest.mark.parametrize("images", [None, 20, 55])
@pytest.mark.parametrize("statistics", ["all", "kept", "none"])
def test_bad_images_are_left_out(
    with_bad: tuple[Path, list[int]], tmp_path: Path, images: int | None, statistics: Any
) -> None:
    folder, bad = with_bad
    out = tmp_path / "ref.npz"
    settings = Settings(size=16, images=images, statistics=statistics)
    report = build(folder, out, settings, extractor=Wide(), skip_bad=True)
    file = contents(out)
    order = np.arange(60) if images is None else np.random.RandomState(0).permutation(60)
    chosen = order[:images]
    spare = [index for index in order[len(chosen) :] if index not in bad]
    expected = [index if index not in bad else None for index in chosen.tolist()]
    if images is None:
        expected = [index for index in expected if index is not None]
    else:
        expected = [spare.pop(0) if index is None else index for index in expected]
    assert file["indices"].tolist() == expected
    for index, pixels in zip(file["indices"], file["arr_0"], strict=True):
        np.testing.assert_array_equal(pixels, by_hand((folder / f"{index:03d}.jpg").read_bytes(), 16))
    if statistics != "none":
        counted = np.setdiff1d(np.arange(60), bad) if statistics == "all" else file["indices"]
        assert report.counted == len(counted)
        pixels = np.stack([by_hand((folder / f"{index:03d}.jpg").read_bytes(), 16) for index in counted])
        np.testing.assert_allclose(
            file["mu"], Wide()(pixels)["pool"].mean(axis=0, dtype=np.float64), atol=1e-9
        )
    named = json.loads(str(file["provenance"]))["left_out"]
    assert tuple(named) == report.bad
    if statistics == "all" or images is None:
        assert [int(text.split("/")[-1].split(".jpg")[0].split(", ")[-1]) for text in named] == bad


def test_too_few_are_left(with_bad: tuple[Path, list[int]], tmp_path: Path) -> None:
    settings = Settings(size=16, images=56, statistics="none")
    with pytest.raises(ImageError, match="5 of 60 images cannot be decoded and 55 are left"):
        build(with_bad[0], tmp_path / "ref.npz", settings, skip_bad=True)


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    peaks = []
    for count in (1000, 4000):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
        np.savez(tmp_path / "big.npz", pixels)
        del pixels
        tracemalloc.start()
        build(tmp_path / "big.npz", tmp_path / "ref.npz", Settings(size=64, images=count, statistics="none"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 3,000 images more are 37 MB of pixels; what may grow is their indices.
    assert peaks[1] - peaks[0] < 4e6, f"{peaks} bytes"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "Size 0"),
        ({"size": 8, "images": 0}, "0 images to keep"),
        ({"size": 8, "seed": -1}, "Seed -1"),
        ({"size": 8, "images": 301}, "301 images to keep of 300"),
    ],
)
def test_bad_settings(tree: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(tree, tmp_path / "ref.npz", Settings(**settings, statistics="none"))
    assert list(tmp_path.iterdir()) == []


def test_statistics_of_one_image(tmp_path: Path) -> None:
    with pytest.raises(UndefinedMetricError, match="statistics of one image"):
        build(np.zeros((1, 8, 8, 3), np.uint8), tmp_path / "ref.npz", Settings(size=8), extractor=Wide())


def test_statistics_alone_are_no_source(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "x.npz", mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(2023), sigma_s=np.eye(2023)
    )
    with pytest.raises(InputError, match="statistics and no images"):
        build(tmp_path / "x.npz", tmp_path / "ref.npz", Settings(size=8, statistics="none"))


def test_command(tree: Path, tmp_path: Path, run: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExtractorSetup, "extractor", lambda self, network="inception": Wide())
    out = tmp_path / "ref.npz"
    result = run("reference", "build", tree, "-o", out, "--size", 16, "--images", 20)
    assert result.code == 0
    assert result.out == f"{out}: 20 images of 16x16, 7 classes, statistics of 300 images\n"
    shown = run("reference", "show", out)
    assert "statistics of 300 images" in shown.out


def test_command_names_what_it_left_out(
    with_bad: tuple[Path, list[int]], tmp_path: Path, run: Invoke
) -> None:
    arguments = [
        "reference",
        "build",
        with_bad[0],
        "-o",
        tmp_path / "r.npz",
        "--size",
        16,
        "--statistics",
        "none",
    ]
    stopped = run(*arguments)
    assert (stopped.code, stopped.out) == (2, "")
    assert stopped.err.startswith("Error: ")
    assert "000.jpg" in stopped.err
    result = run(*arguments, "--skip-bad")
    assert result.code == 0
    assert "5 images were left out:" in result.out
    assert result.out.count("cannot be decoded") == 5


@pytest.mark.parametrize("arguments", [["nowhere"], [__file__]])
def test_command_with_a_bad_source(tmp_path: Path, run: Invoke, arguments: list[str]) -> None:
    result = run(
        "reference", "build", *arguments, "-o", tmp_path / "r.npz", "--size", 8, "--statistics", "none"
    )
    assert result.code == 2
    assert result.err.startswith("Error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("source", "message"), [("", "A path is empty"), ("a" * 300, "File name too long")])
def test_a_source_whose_name_cannot_be(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(source, tmp_path / "r.npz", Settings(size=8, statistics="none"))
    assert list(tmp_path.iterdir()) == []
