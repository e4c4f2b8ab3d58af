"""compare(): from two batches to a record that can be believed, and every way in which it can be refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from invoked import Result
from numpy.typing import NDArray
from PIL import Image
from stand_ins import NO_STORE, stand_in
from stand_ins import InceptionPixels as Pixels

import evalkit.features.store
from evalkit.cli.options import ExtractorSetup
from evalkit.comparison import Subset, compare, features_of
from evalkit.comparison.plan import choose_metrics
from evalkit.errors import FeatureError, InputError, UndefinedMetricError
from evalkit.extractors.inception import HEAD_MISSING, Inception
from evalkit.extractors.weights import InceptionWeights, describe_weights
from evalkit.features.adm_npz import statistics_of
from evalkit.features.extraction import extract
from evalkit.features.record import Features
from evalkit.images import open_images
from evalkit.metrics.frechet import frechet_distance
from evalkit.protocols import PROTOCOLS
from evalkit.report.text import FORMATS, adm_lines, markdown, table
from evalkit.results import Comparison, PublishedRow
from evalkit.system.run import Run

Invoke = Callable[..., Result]


@pytest.fixture
def batches(tmp_path: Path, images: NDArray[np.uint8]) -> tuple[Path, Path]:
    """ref.npz and samples.npz, 30 images each."""
    paths = tmp_path / "ref.npz", tmp_path / "samples.npz"
    for path, part in zip(paths, (images[::2], images[1::2]), strict=True):
        np.savez(path, arr_0=part, arr_1=np.arange(30) % 10)
    return paths


def published_statistics(seed: int = 0) -> dict[str, NDArray[Any]]:
    generator = np.random.default_rng(seed)
    arrays: dict[str, NDArray[Any]] = {}
    for suffix, d in (("", 2048), ("_s", 2023)):
        rows = generator.standard_normal((50, d))
        arrays |= {f"mu{suffix}": rows.mean(0), f"sigma{suffix}": np.cov(rows, rowvar=False)}
    return arrays


def test_record(batches: tuple[Path, Path], tmp_path: Path) -> None:
    comparison = compare(*batches, extractor=Pixels(), run=Run(store=tmp_path / "store"))
    assert [score.name for score in comparison.scores] == [
        "fid",
        "sfid",
        "inception_score",
        "precision",
        "recall",
    ]
    assert comparison.missing == {}
    assert comparison.reference.images == comparison.samples.images == 30
    assert comparison.reference.image_shape == (12, 10, 3)
    assert comparison.reference.digest == open_images(batches[0]).digest
    assert comparison.extractors["inception"]["fingerprint"] == Pixels().fingerprint
    assert {"evalkit", "torch", "numpy", "scipy", "python"} <= set(comparison.versions)
    assert {"fid", "features of samples", "precision and recall"} <= set(comparison.seconds)
    assert comparison.reference.features == "extracted"
    again = compare(*batches, extractor=Pixels(), run=Run(store=tmp_path / "store"))
    assert again.reference.features == "stored"
    assert again.scores == comparison.scores
    assert Comparison.from_json(comparison.to_json()) == comparison
    with pytest.raises(KeyError, match="no score 'kid'"):
        _ = comparison["kid"]


def test_scores_are_the_metrics_of_the_features(batches: tuple[Path, Path]) -> None:
    a, b = (Pixels()(np.load(path)["arr_0"])["pool"] for path in batches)
    comparison = compare(*batches, protocol="exact", extractor=Pixels(), run=NO_STORE)
    assert comparison["fid"] == frechet_distance(a, b)
    assert comparison["fid"] > 0


def test_arrays_features_and_files_give_the_same(batches: tuple[Path, Path], tmp_path: Path) -> None:
    arrays = [np.load(path)["arr_0"] for path in batches]
    for path, array in zip(batches, arrays, strict=True):  # arrays have no labels, which count in error bars
        np.savez(path, arr_0=array)
    expected = compare(*batches, extractor=Pixels(), run=NO_STORE).scores
    assert compare(*arrays, extractor=Pixels(), run=NO_STORE).scores == expected
    features = [extract(open_images(array), Pixels()) for array in arrays]
    assert compare(*features, run=NO_STORE).scores == expected
    files = [tmp_path / "a.h5", tmp_path / "b.h5"]
    for one, path in zip(features, files, strict=True):
        one.save(path)
    from_files = compare(*files, extractor=Pixels())
    assert from_files.scores == expected
    assert from_files.samples.features == "file"
    assert from_files.samples.name == str(files[1])


def test_features_of_another_extractor_are_refused(batches: tuple[Path, Path], tmp_path: Path) -> None:
    features_of(batches[0], extractor=Pixels("other"), run=NO_STORE).save(tmp_path / "a.h5")
    with pytest.raises(FeatureError, match=r"a\.h5 holds features of another extractor"):
        compare(tmp_path / "a.h5", batches[1], extractor=Pixels(), run=NO_STORE)


def test_features_of_a_network_that_no_metric_needs(batches: tuple[Path, Path], tmp_path: Path) -> None:
    other = stand_in("pixels")
    features_of(batches[0], extractor=other, run=NO_STORE).save(tmp_path / "a.h5")
    with pytest.raises(
        InputError, match=r"a\.h5 has features of pixels, but features of inception are needed.*fd@"
    ):
        compare(tmp_path / "a.h5", batches[1], extractor=Pixels(), run=NO_STORE)
    found = compare(tmp_path / "a.h5", batches[1], metrics="fd@pixels", extractor=other, run=NO_STORE)
    assert found["fd@pixels"] > 0


def test_statistics_of_a_file_replace_those_of_its_images(tmp_path: Path) -> None:
    statistics = published_statistics()
    np.savez(tmp_path / "ref.npz", **statistics)  # type: ignore[arg-type]
    np.savez(tmp_path / "same.npz", **statistics)  # type: ignore[arg-type]
    np.savez(tmp_path / "other.npz", **published_statistics(1))  # type: ignore[arg-type]
    same = compare(tmp_path / "ref.npz", tmp_path / "same.npz", extractor=Pixels(), run=NO_STORE)
    assert same["fid"] == pytest.approx(0, abs=1e-6)
    assert same.reference.statistics == "file"
    assert set(same.missing) == {"inception_score", "precision", "recall"}
    assert "is statistics alone; this needs the images" in same.missing["precision"]
    with pytest.raises(KeyError, match="is statistics alone"):
        _ = same["precision"]
    assert any("was given as samples and carries mu" in warning for warning in same.warnings)
    other = compare(tmp_path / "ref.npz", tmp_path / "other.npz", extractor=Pixels(), run=NO_STORE)
    assert other["fid"] > 100


def test_statistics_written_are_those_read(batches: tuple[Path, Path]) -> None:
    features = features_of(batches[0], extractor=Pixels(), run=NO_STORE)
    arrays = statistics_of(features)
    assert features.arrays["pool"] is not None
    np.testing.assert_allclose(
        arrays["sigma"], np.cov(features.arrays["pool"], rowvar=False), rtol=1e-10, atol=1e-14
    )
    np.testing.assert_allclose(
        arrays["mu"], features.arrays["pool"].mean(axis=0, dtype=np.float64), rtol=1e-14
    )
    assert arrays["mu_s"].shape == (12,)


def test_warnings(images: NDArray[np.uint8], tmp_path: Path) -> None:
    skewed = np.concatenate([np.zeros(50, np.int64), np.arange(10)])
    np.savez(tmp_path / "skewed.npz", arr_0=images, arr_1=skewed)
    comparison = compare(images[:30], tmp_path / "skewed.npz", extractor=Pixels(), run=NO_STORE)
    text = "\n".join(comparison.warnings)
    assert "published numbers use 50,000" in text
    assert "labels of" in text
    assert "far from uniform: 10 classes of 1 to 51" in text
    assert "singular covariances, in <array> (30 images): FID" in text
    comparison = compare(images, np.float32(images[:, :, :8]), extractor=Pixels(), run=NO_STORE)
    text = "\n".join(comparison.warnings)
    assert "Image sizes differ: 10x12 and 8x12" in text
    assert "float" in text
    comparison = compare(images, images, extractor=Pixels(), run=NO_STORE)
    assert any("are the same images" in warning for warning in comparison.warnings)
    assert comparison["fid"] == pytest.approx(0, abs=1e-9)
    assert comparison["precision"] == comparison["recall"] == 1


def test_missing_head_is_said_with_the_remedy(
    images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_head(self: Pixels, output: str, rows: object) -> None:
        raise UndefinedMetricError(HEAD_MISSING)

    monkeypatch.setattr(Pixels, "derive", no_head)
    comparison = compare(images[:30], images[30:], extractor=Pixels(), run=NO_STORE)
    assert set(comparison.missing) == {"inception_score"}
    assert "evalkit weights --fetch" in table(comparison)
    assert adm_lines(comparison).startswith("Inception Score: unavailable (")


def test_progress_names_the_stages(batches: tuple[Path, Path]) -> None:
    stages: list[str] = []
    compare(
        *batches,
        extractor=Pixels(),
        run=Run(store=None, progress=lambda stage, done, total: stages.append(stage)),
    )
    assert str(batches[0]) in stages[0]


def test_undefined_is_an_error(images: NDArray[np.uint8]) -> None:
    with pytest.raises(UndefinedMetricError, match="holds one image"):
        compare(images, images[:1], extractor=Pixels(), run=NO_STORE)
    with pytest.raises(InputError, match=r"Unknown protocol 'clean'.*adm, exact"):
        compare(images, images, protocol="clean", extractor=Pixels(), run=NO_STORE)


def test_protocols_report_their_parameters(batches: tuple[Path, Path]) -> None:
    for protocol in PROTOCOLS:
        networks = [stand_in(network) for network in choose_metrics(protocol).networks]
        comparison = compare(*batches, protocol=protocol, extractor=networks, run=NO_STORE)
        assert all(score.parameters for score in comparison.scores)
        assert comparison.protocol == protocol


@pytest.mark.parametrize(
    "text", ["", "{}", '{"format": "evalkit comparison 1"}', "[]", '{"format": "other"}']
)
def test_a_foreign_json_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="Not a comparison written by evalkit"):
        Comparison.from_json(text)


# The command line ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("pixels")
def test_compare_prints_a_table_and_writes_json(
    run: Invoke, batches: tuple[Path, Path], tmp_path: Path
) -> None:
    result = run("compare", *batches, "--json", tmp_path / "out.json")
    assert result.code == 0
    assert result.err == ""
    comparison = Comparison.from_json((tmp_path / "out.json").read_text())
    assert f"{comparison['fid']:.4f}" in result.out
    assert "30 images 10x12" in result.out
    for format_ in FORMATS:
        result = run("compare", *batches, "--format", format_)
        assert result.code == 0
        assert f"{comparison['recall']:.4f}"[:5] in result.out


@pytest.mark.usefixtures("pixels")
def test_adm_format_is_the_reference_evaluators(run: Invoke, batches: tuple[Path, Path]) -> None:
    result = run("compare", *batches, "--format", "adm")
    lines = result.out.splitlines()
    assert result.err.startswith(f"warning: {batches[1]} holds 30 images")
    assert [line.split(":")[0] for line in lines] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    comparison = compare(*batches, extractor=Pixels(), run=NO_STORE)
    names = ("inception_score", "fid", "sfid", "precision", "recall")
    assert [float(line.split(":")[1]) for line in lines] == [comparison[name] for name in names]


@pytest.mark.usefixtures("pixels")
def test_features_and_stats_commands(run: Invoke, batches: tuple[Path, Path], tmp_path: Path) -> None:
    expected = run("compare", *batches, "--format", "adm").out
    files = [tmp_path / "a.h5", tmp_path / "b.h5"]
    for batch, file in zip(batches, files, strict=True):
        assert run("features", batch, "-o", file).code == 0
    assert run("compare", *files, "--format", "adm").out == expected
    assert run("stats", batches[0], "-o", tmp_path / "stats.npz").code == 0
    with np.load(tmp_path / "stats.npz", allow_pickle=False) as written:
        assert sorted(written) == ["mu", "mu_s", "provenance", "sigma", "sigma_s"]
        assert json.loads(str(written["provenance"]))["statistics"]["images"] == 30
        assert written["mu"].dtype == np.float64
        assert written["sigma"].dtype == np.float64


@pytest.mark.usefixtures("pixels")
def test_no_store_leaves_nothing(run: Invoke, batches: tuple[Path, Path], own_cache: Path) -> None:
    assert run("compare", *batches, "--no-store").code == 0
    assert list(own_cache.rglob("*.h5")) == []
    assert run("compare", *batches).code == 0
    assert len(list(own_cache.rglob("*.h5"))) == 2


def broken_folder(folder: Path) -> Path:
    folder.mkdir()
    for index in range(5):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / f"{index}.png")
    data = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(data[: len(data) // 2])
    return folder


def mixed_folder(folder: Path) -> Path:
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    Image.new("RGB", (9, 8)).save(folder / "b.png")
    return folder


def truncated(path: Path) -> Path:
    np.savez(path, arr_0=np.zeros((50, 16, 16, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:20_000])
    return path


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def text_file(path: Path) -> Path:
    path.write_text("hello")
    return path


def empty_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no images")
    return path


def float_npz(path: Path, value: float) -> Path:
    array = np.linspace(0, 200, 4 * 8 * 8 * 3).reshape(4, 8, 8, 3).astype(np.float32)
    array[2, 3, 3, 1] = value
    return npz(path, arr_0=array)


def with_statistics(path: Path, **changes: NDArray[Any] | None) -> Path:
    arrays = {key: value for key, value in (published_statistics() | changes).items() if value is not None}
    return npz(path, arr_0=np.zeros((4, 8, 8, 3), np.uint8), **arrays)


def foreign_features(path: Path) -> Path:
    extract(open_images(np.zeros((4, 8, 8, 3), np.uint8)), Pixels("foreign")).save(path)
    return path


BAD_INPUT: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "missing file": (lambda p: p / "absent.npz", ("absent.npz",)),
    "directory without images": (lambda p: p, ("no images",)),
    "not a zip": (lambda p: text_file(p / "x.npz"), ("x.npz",)),
    "truncated zip": (lambda p: truncated(p / "x.npz"), ("x.npz",)),
    "zip without images": (lambda p: empty_zip(p / "x.zip"), ("x.zip",)),
    "no arr_0": (
        lambda p: npz(p / "x.npz", images=np.zeros(3), more=np.zeros(2)),
        ("arr_0", "images", "more"),
    ),
    "pickled": (lambda p: npz(p / "x.npz", arr_0=np.array([{}, None], dtype=object)), ("x.npz", "pickle")),
    "wrong rank": (lambda p: npz(p / "x.npz", arr_0=np.zeros((4, 8, 8), np.uint8)), ("(4, 8, 8)",)),
    "one channel": (lambda p: npz(p / "x.npz", arr_0=np.zeros((4, 8, 8, 1), np.uint8)), ("1", "channel")),
    "four channels": (lambda p: npz(p / "x.npz", arr_0=np.zeros((4, 8, 8, 4), np.uint8)), ("4", "channel")),
    "empty": (lambda p: npz(p / "x.npz", arr_0=np.zeros((0, 8, 8, 3), np.uint8)), ("x.npz",)),
    "one image": (lambda p: npz(p / "x.npz", arr_0=np.zeros((1, 8, 8, 3), np.uint8)), ("one image",)),
    "NaN": (lambda p: float_npz(p / "x.npz", np.nan), ("2",)),
    "infinity": (lambda p: float_npz(p / "x.npz", np.inf), ("2",)),
    "negative": (lambda p: float_npz(p / "x.npz", -3), ("2", "-3")),
    "over 255": (lambda p: float_npz(p / "x.npz", 256.5), ("2", "256.5")),
    "floats in [0, 1]": (lambda p: npz(p / "x.npz", arr_0=np.full((4, 8, 8, 3), 0.5)), ("[0, 1]", "255")),
    "floats in [-1, 1]": (
        lambda p: npz(p / "x.npz", arr_0=np.linspace(-1, 1, 768).reshape(4, 8, 8, 3)),
        ("[-1, 1]", "127.5"),
    ),
    "mixed sizes": (lambda p: mixed_folder(p / "x"), ("a.png", "b.png")),
    "corrupt image": (lambda p: broken_folder(p / "x"), ("3.png",)),
    "mu without the others": (
        lambda p: with_statistics(p / "x.npz", sigma=None, mu_s=None),
        ("sigma", "mu_s"),
    ),
    "mu of another size": (lambda p: with_statistics(p / "x.npz", mu=np.zeros(64)), ("mu", "64", "2048")),
    "features of another extractor": (lambda p: foreign_features(p / "x.h5"), ("another extractor",)),
}


@pytest.mark.usefixtures("pixels")
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line(
    run: Invoke, batches: tuple[Path, Path], tmp_path: Path, case: str
) -> None:
    make, words = BAD_INPUT[case]
    (tmp_path / "bad").mkdir()
    bad = make(tmp_path / "bad")
    out = tmp_path / "out.json"
    for arguments in ((bad, batches[1]), (batches[0], bad)):
        result = run("compare", *arguments, "--json", out)
        assert result.code == 2, result
        assert result.out == ""
        assert result.err.startswith("Error: ")
        assert result.err.count("\n") == 1
        assert all(word in result.err for word in words), result.err
        assert not out.exists()


@pytest.mark.usefixtures("pixels")
def test_unwritable_output_is_said_before_the_work(
    run: Invoke, batches: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the work had begun")

    monkeypatch.setattr(Pixels, "__call__", never)
    for command in (
        ["compare", *batches, "--json"],
        ["features", batches[0], "-o"],
        ["stats", batches[0], "-o"],
    ):
        for target in (tmp_path / "absent" / "x", tmp_path):
            result = run(*command, target)
            assert result.code == 2
            assert result.err.startswith(f"Error: Cannot write {target}")


@pytest.mark.usefixtures("pixels")
def test_full_disk_while_writing_the_result(
    run: Invoke, batches: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.h5"
    out.write_text("old")
    real = h5py.File

    def full(path: Path, mode: str) -> Any:
        if mode == "w" and ".out.h5" in str(path):
            raise OSError(28, "No space left on device")
        return real(path, mode)

    monkeypatch.setattr(h5py, "File", full)
    result = run("features", batches[0], "-o", out)
    assert result.code == 2
    assert "no space left" in result.err
    assert out.read_text() == "old"


def test_damaged_weights_are_said(run: Invoke, batches: tuple[Path, Path], tmp_path: Path) -> None:
    bad = tmp_path / "weights.pth"
    bad.write_bytes(b"PK\x03\x04" + bytes(1000))
    result = run("compare", *batches, "--weights", bad)
    assert result.code == 2
    assert "weights.pth" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.usefixtures("pixels")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch-size", "zero"), "'zero'"),
        (("--batch-size", "0"), "'0'"),
        (("--precision", "int4"), "int4"),
        (("--backend", "tensorflow"), "--graph"),
        (("--graph", "x.pb"), "--backend tensorflow"),
        (("--protocol", "clean"), "clean"),
        (("--nonsense",), "--nonsense"),
    ],
)
def test_bad_usage(run: Invoke, batches: tuple[Path, Path], arguments: tuple[str, ...], words: str) -> None:
    result = run("compare", *batches, *arguments)
    assert result.code == 2
    assert words in result.err


@pytest.mark.usefixtures("pixels")
def test_interruption(
    run: Invoke, batches: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pixels, "__call__", interrupted)
    result = run("compare", *batches, "--json", tmp_path / "x.json")
    assert result.code == 130
    assert "run the same command again" in result.err
    assert not (tmp_path / "x.json").exists()


def test_a_bug_keeps_its_traceback(
    run: Invoke, monkeypatch: pytest.MonkeyPatch, batches: tuple[Path, Path]
) -> None:
    def bug(self: object, network: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(ExtractorSetup, "extractor", bug)
    with pytest.raises(ZeroDivisionError):
        run("compare", *batches)


def test_as_a_program(batches: tuple[Path, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "evalkit", "compare", "absent.npz", str(batches[1])],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


# Published rows beside the measured one ---------------------------------------------------------------


def published_rows() -> tuple[PublishedRow, ...]:
    common: dict[str, Any] = {"dataset": "digits", "paper": "A paper, arXiv:0000.00000", "images": 30}
    return (
        PublishedRow(model="GAN", scores={"fid": 6.95, "recall": 0.28}, table=5, **common),
        PublishedRow(model="ADM-G", scale=1.0, scores={"inception_score": 186.7}, table=6, **common),
    )


def test_published_rows_are_shown_and_kept(batches: tuple[Path, Path]) -> None:
    plain = compare(*batches, extractor=Pixels(), run=NO_STORE)
    comparison = replace(plain, published=published_rows())
    assert Comparison.from_json(comparison.to_json()) == comparison
    measured = [f"{comparison[name]:.2f}" for name in ("fid", "inception_score", "recall")]
    shown = [
        ["model", "FID", "Inception", "Score", "Recall", "source"],  # what a published row has
        ["these", "samples", *measured],
        ["GAN", "6.95", "-", "0.28", "arXiv:0000.00000,", "table", "5"],
        ["ADM-G,", "scale", "1", "-", "186.70", "-", "arXiv:0000.00000,", "table", "6"],
    ]
    lines = [line.split() for line in table(comparison).splitlines()]
    first = lines.index(shown[0])
    assert lines[first : first + 4] == shown
    block = table(comparison).splitlines()[first - 1 : first + 4]
    assert block[0] == "digits as published, 30 samples each, evaluator adm."
    assert len({len(line) for line in block[1:2] + block[3:]}) == 1  # columns line up
    rows = [line.replace("|", " ").split() for line in markdown(comparison).splitlines()]
    assert [row for row in shown if row in rows] == shown
    assert adm_lines(comparison) == adm_lines(plain)
    assert "as published" not in table(plain) + markdown(plain)


def test_published_rows_that_are_not_like_for_like(batches: tuple[Path, Path]) -> None:
    comparison = compare(*batches, protocol="exact", extractor=Pixels(), run=NO_STORE)
    for format_ in (table, markdown):
        text = format_(replace(comparison, published=published_rows()))
        assert "evaluator adm. Not like for like, here: protocol exact." in text
    rows = tuple(replace(row, images=50_000) for row in published_rows())
    text = table(replace(comparison, protocol="adm", published=rows))
    assert "digits as published, 50,000 samples each" in text
    assert "evaluator adm. Not like for like, here: 30 samples." in text
    text = table(replace(comparison, protocol="adm", published=rows, published_rows=9))
    other = tuple(replace(row, reference="img512.pkl") for row in rows)
    assert "evaluator adm, against img512.pkl. Not" in table(replace(comparison, published=other))
    assert "The nearest 2 of 9; all: evalkit published digits --evaluator adm. Not like" in text


def test_a_comparison_from_before_published_rows_is_read(batches: tuple[Path, Path]) -> None:
    comparison = compare(*batches, extractor=Pixels(), run=NO_STORE)
    values = json.loads(comparison.to_json())
    assert values.pop("published") == []
    assert values.pop("published_rows") == 0
    assert Comparison.from_json(json.dumps(values)) == comparison


def test_published_rows_from_before_they_had_an_evaluator_are_read(batches: tuple[Path, Path]) -> None:
    comparison = compare(*batches, extractor=Pixels(), run=NO_STORE)
    row = {"dataset": "d", "model": "m", "scores": {"fid": 1.5}, "images": 9, "paper": "p", "table": 5}
    values = json.loads(comparison.to_json()) | {"published": [row | {"scale": 1.0}]}
    del values["published_rows"]
    (found,) = Comparison.from_json(json.dumps(values)).published
    assert found == PublishedRow(**row, scale=1.0, evaluator="adm")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("guidance", "scale", "shown"),
    [
        (None, None, "M"),
        (None, 1.5, "M, scale 1.5"),
        ("none", 1.0, "M"),
        ("cfg", 1.5, "M, cfg scale 1.5"),
        ("cfg interval", None, "M, cfg interval"),
    ],
)
def test_guidance_of_published_rows(
    batches: tuple[Path, Path], guidance: str | None, scale: float | None, shown: str
) -> None:
    comparison = compare(*batches, metrics=["fid"], extractor=Pixels(), run=NO_STORE)
    row = replace(published_rows()[0], model="M", guidance=guidance, scale=scale, table="README")
    lines = markdown(replace(comparison, published=(row,))).splitlines()
    assert f"| {shown} | 6.95 | 0.28 | arXiv:0000.00000, README |" in lines


# Some metrics, some images, files in parts ------------------------------------------------------------


def test_fid_and_sfid_alone_are_streamed(batches: tuple[Path, Path]) -> None:
    whole = compare(*batches, extractor=Pixels(), run=NO_STORE)
    some = compare(*batches, metrics=["sfid", "fid"], extractor=Pixels(), run=NO_STORE)
    assert [score.name for score in some.scores] == ["fid", "sfid"]
    for score in some.scores:
        assert score.value == pytest.approx(whole[score.name], rel=1e-6)
        assert score.parameters["mean_dtype"] == "float64"
    exact = compare(*batches, protocol="exact", extractor=Pixels(), run=NO_STORE)
    for name in ("fid", "sfid"):
        assert some[name] == pytest.approx(exact[name], rel=1e-9)
    assert dict.fromkeys(("inception_score", "precision", "recall"), "not requested") == some.missing
    assert some.samples.images == 30
    assert (some.samples.statistics, some.samples.features) == ("images", "extracted")
    for origin in ("extracted", "stored"):
        stored = compare(*batches, metrics=["sfid", "fid"], extractor=Pixels())
        assert stored.scores == some.scores
        assert stored.samples.features == origin
    assert some.warnings == whole.warnings
    assert "not requested" in table(some)
    assert Comparison.from_json(some.to_json()) == some


def test_few_images_are_not_streamed(images: NDArray[np.uint8], tmp_path: Path) -> None:
    """Their covariances are singular."""
    sides = images[:12], images[20:32]
    whole = compare(*sides, extractor=Pixels(), run=NO_STORE)
    some = compare(*sides, metrics=["sfid", "fid"], extractor=Pixels(), run=NO_STORE)
    assert some.scores == tuple(score for score in whole.scores if score.name in ("fid", "sfid"))
    more = compare(images[:49], sides[1], metrics=["fid"], extractor=Pixels(), run=NO_STORE)
    assert more.scores[0].parameters["mean_dtype"] == "float64"


def test_other_metrics_alone(batches: tuple[Path, Path]) -> None:
    whole = compare(*batches, extractor=Pixels(), run=NO_STORE)
    some = compare(*batches, metrics=["recall", "fid"], extractor=Pixels(), run=NO_STORE)
    assert some.scores == tuple(
        score for score in whole.scores if score.name in ("fid", "precision", "recall")
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["fid", "mmd"], "Unknown metric 'mmd'.*fid, sfid, inception_score, precision, recall.*fd@pixels"),
        ([""], "Unknown metric ''"),
        ("mmd@pixels", "Unknown metric 'mmd@pixels'"),
        ("fid@", "Unknown network '' in 'fid@'. Give one of inception.*fid@pixels"),
        ("fd@nowhere", "Unknown network 'nowhere'"),
        ("inception_score@pixels", "inception_score needs inception:logits, which pixels does not have"),
    ],
)
def test_unknown_metrics(batches: tuple[Path, Path], names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(*batches, metrics=names, extractor=Pixels(), run=NO_STORE)


def test_statistics_of_the_file_leave_nothing_to_extract(
    images: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FID with statistics alone needs no image, though the files have some."""
    for seed, name in enumerate("ab"):
        np.savez(tmp_path / f"{name}.npz", arr_0=images, **published_statistics(seed))
    paths = tmp_path / "a.npz", tmp_path / "b.npz"
    monkeypatch.setattr(Pixels, "__call__", lambda *_: pytest.fail("extracted"))
    some = compare(*paths, metrics=["fid"], extractor=Pixels())
    assert some["fid"] > 100
    assert some.samples.images == 0
    assert some.samples.statistics == "file"


def test_a_subset_is_what_it_says(images: NDArray[np.uint8], tmp_path: Path) -> None:
    reference, samples = images[:36], images[36:]
    comparison = compare(
        reference, samples, subset=Subset(images=25, seed=5), extractor=Pixels(), run=NO_STORE
    )
    drawn = [
        np.sort(np.random.RandomState(5).permutation(36)[:25]),
        np.arange(24),  # fewer than 25: all
    ]
    by_hand = compare(reference[drawn[0]], samples[drawn[1]], extractor=Pixels(), run=NO_STORE)
    whole = compare(reference, samples, protocol="exact", extractor=Pixels(), run=NO_STORE)
    for name in ("inception_score", "precision", "recall"):
        assert comparison[name] == by_hand[name]
    assert by_hand["recall"] != whole["recall"]
    for name in ("fid", "sfid"):
        assert comparison[name] == pytest.approx(whole[name], rel=1e-9)
    assert (comparison.reference.images, comparison.samples.images) == (36, 24)
    recorded = {score.name: dict(score.parameters) for score in comparison.scores}
    assert recorded["precision"] == {
        "output": "inception:pool",
        "k": 3,
        "arithmetic": "float16",
        "subset": 25,
        "seed": 5,
    }
    assert "subset" not in recorded["fid"]
    for text in (table(comparison), markdown(comparison)):
        assert text.count("of 25 and 24 images, seed 5") == 3
    files = []
    for number, side in enumerate((reference, samples)):
        files.append(tmp_path / f"{number}.h5")
        features_of(side, extractor=Pixels(), run=NO_STORE).save(files[-1])
    from_files = compare(*files, subset=Subset(images=25, seed=5), extractor=Pixels())
    assert from_files.scores == comparison.scores


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (-3, 0), (5, -1), (5, 2**32)])
def test_impossible_subsets(count: int, seed: int) -> None:
    with pytest.raises(InputError, match="expected"):
        Subset(images=count, seed=seed)


def test_a_subset_of_too_few_images_has_no_recall(batches: tuple[Path, Path]) -> None:
    comparison = compare(*batches, subset=Subset(images=3), extractor=Pixels(), run=NO_STORE)
    assert set(comparison.missing) == {"precision", "recall"}
    assert "at least 4" in comparison.missing["recall"]


@pytest.mark.usefixtures("pixels")
def test_parts_are_compared_as_one_file(run: Invoke, batches: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    with np.load(batches[1]) as arrays:
        for number, part in enumerate(np.array_split(np.arange(30), [7, 8])):
            np.savez(
                tmp_path / "parts" / f"{number}.npz", arr_0=arrays["arr_0"][part], arr_1=arrays["arr_1"][part]
            )
    pattern = tmp_path / "parts" / "*.npz"
    options = ("--format", "adm")
    assert run("compare", batches[0], pattern, *options).out == run("compare", *batches, *options).out
    for source, out in ((batches[1], "a.npz"), (pattern, "b.npz")):
        assert run("stats", source, "-o", tmp_path / out).code == 0
    with np.load(tmp_path / "a.npz") as one, np.load(tmp_path / "b.npz") as parts:
        assert all(np.array_equal(one[key], parts[key]) for key in ("mu", "sigma", "mu_s", "sigma_s"))
    result = run("compare", batches[0], tmp_path / "parts" / "*.tar")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "no file or folder matches" in result.err


@pytest.mark.usefixtures("pixels")
def test_metrics_and_subset_options(run: Invoke, batches: tuple[Path, Path]) -> None:
    result = run("compare", *batches, "--metrics", "fid, sfid")
    assert result.code == 0
    assert "not computed: not requested" in result.out
    result = run("compare", *batches, "--subset", 20, "--seed", 3)
    assert "(of 20 images a side, seed 3)" in result.out
    for option, value in (("--metrics", "fid,is"), ("--subset", 0), ("--seed", "x")):
        result = run("compare", *batches, option, value)
        assert result.code == 2, option
        assert result.out == ""


def test_memory_is_said_before_the_work(
    batches: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    run: Invoke,
    pixels: Pixels,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def saying(**settings: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level("INFO", "evalkit"):
            compare(*batches, extractor=SmallInception(), run=NO_STORE, **settings)
        return caplog.messages

    assert saying() == []
    assert run("compare", *batches).err == ""
    monkeypatch.setattr("evalkit.comparison.advice.WORTH_SAYING", 1e6)
    # 60 images of (2048 + 2023 + 2048) float32, and 8 bytes for each of 2048; 12 for their error bars.
    assert saying(error_bars=False) == [
        "Memory: 1.5 MB for the features of 60 images, and up to 1.0 MB more for precision and recall."
    ]
    assert saying() == [
        "Memory: 1.5 MB for the features of 60 images, and up to 1.5 MB more for error bars of precision and "
        "recall."
    ]
    assert saying(metrics=["inception_score"]) == []
    assert saying(metrics=["fid", "sfid"]) == []
    assert saying(subset=Subset(images=10)) == []
    monkeypatch.setattr("evalkit.comparison.advice.physical_memory", lambda: 2_000_000)
    assert "This machine has 2.0 MB: use a subset (--subset 50000)" in saying()[0]
    assert "--metrics fid,sfid" in saying()[0]
    monkeypatch.setattr(SmallInception, "__call__", lambda *_: pytest.fail("extracted"))
    with pytest.raises(pytest.fail.Exception):
        saying()
    assert len(caplog.messages) == 1


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (80_000, 4, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "20000.npy", pixels[:20_000])
    np.save(tmp_path / "80000.npy", pixels)
    del pixels
    peaks = {}
    choices: tuple[dict[str, Any], ...] = ({"metrics": ["fid", "sfid"]}, {"subset": Subset(images=500)})
    for settings in choices:
        for count in (20_000, 80_000):
            sides = [open_images(tmp_path / f"{count}.npy") for _ in range(2)]
            tracemalloc.start()
            try:
                compare(*sides, extractor=Pixels(), run=Run(store=tmp_path / "store"), **settings)
                peaks[f"{settings} {count}"] = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
    streamed, streamed_4, subset, subset_4 = peaks.values()
    side = 60_000 * (48 + 12) * 4
    assert streamed_4 < streamed + side / 20, peaks
    assert subset_4 < subset + side / 20, peaks


def test_a_reduced_precision_tells_what_it_moves(
    inception_weights: InceptionWeights,
    images: NDArray[np.uint8],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("evalkit.comparison.precision_check.LEAST", 6)  # all of them
    sides = images[:6], images[30:36]
    full, reduced = (Inception(inception_weights, device="cpu", precision=p) for p in ("float32", "bfloat16"))
    store = tmp_path / "store"
    assert compare(*sides, extractor=full, run=Run(store=store)).precision_check == {}
    # From the store, where both precisions have features; and extracted anew.
    stored = compare(*sides, extractor=reduced, run=Run(store=store))
    assert stored.precision_check == compare(*sides, extractor=reduced, run=NO_STORE).precision_check
    assert stored.precision_check["images"] == [6, 6]
    assert set(stored.precision_check) == {"images", "float32", "bfloat16"}
    for name in ("fid", "sfid", "precision", "recall"):
        assert stored.precision_check["bfloat16"][name] == pytest.approx(stored[name], rel=1e-6)
        exact = compare(*sides, extractor=full, run=Run(store=store))
        assert stored.precision_check["float32"][name] == pytest.approx(exact[name], rel=1e-6)
    assert stored.precision_check["bfloat16"]["fid"] != stored.precision_check["float32"]["fid"]


@pytest.mark.usefixtures("inception_weights")
def test_features_and_statistics_in_a_reduced_precision_tell_what_it_moves(
    images: NDArray[np.uint8], tmp_path: Path, run: Invoke
) -> None:
    batch = tmp_path / "batch.npz"
    np.savez(batch, images[:4])
    reduced = ("--precision", "bfloat16", "--device", "cpu")
    assert (
        "precision check" not in run("features", batch, "-o", tmp_path / "float32.h5", "--device", "cpu").out
    )
    told = [
        run("features", batch, "-o", tmp_path / "bfloat16.h5", *reduced).out,
        run("stats", batch, "-o", tmp_path / "statistics.npz", *reduced).out,
        run("reference", "build", batch, "-o", tmp_path / "built.npz", "--size", 10, *reduced).out,
    ]
    pattern = r"bfloat16 instead of float32 changes pool features by (.*)% and spatial features by (.*)% on"
    shares = [[float(share) for share in re.search(pattern, out).groups()] for out in told]  # type: ignore[union-attr]
    exact, moved = (Features.load(tmp_path / f"{precision}.h5") for precision in ("float32", "bfloat16"))
    for layer, share in zip(("pool", "spatial"), shares[0], strict=True):
        difference = moved.arrays[layer] - exact.arrays[layer]
        expected = np.linalg.norm(difference) / np.linalg.norm(exact.arrays[layer])
        assert share == pytest.approx(100 * expected, abs=0.006)
        assert share > 0.05
    assert shares[1] == shares[0]
    assert shares[2] != shares[0]  # the images are cropped


def test_samples_that_are_statistics_alone_need_images_for_the_rest(
    images: NDArray[np.uint8], tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", images, **published_statistics(1))
    np.savez(tmp_path / "b.npz", **published_statistics(2))
    comparison = compare(tmp_path / "a.npz", tmp_path / "b.npz", extractor=Pixels(), run=NO_STORE)
    assert [score.name for score in comparison.scores] == ["fid", "sfid"]
    assert "b.npz is statistics alone; this needs the images" in comparison.missing["inception_score"]
    assert "b.npz is statistics alone" in comparison.missing["recall"]


# What users write, have and hand over ---------------------------------------------------------------


def test_what_one_writes_first_is_understood(images: NDArray[np.uint8], tmp_path: Path) -> None:
    def names(**arguments: Any) -> list[str]:
        how = Run(store=arguments.pop("store"))
        comparison = compare(images[::2], images[1::2], extractor=Pixels(), run=how, **arguments)
        return [score.name for score in comparison.scores]

    assert names(store=None, metrics="fid") == ["fid"]
    assert names(store=None, metrics="fid, recall") == ["fid", "precision", "recall"]
    assert names(store=str(tmp_path / "store"), metrics=("sfid",)) == ["sfid"]
    assert names(store=tmp_path / "store", metrics={"sfid"}) == ["sfid"]
    assert len(list((tmp_path / "store").rglob("*.h5"))) == 2
    ten = compare(images[::2], images[1::2], extractor=Pixels(), run=NO_STORE, subset=10)
    assert (
        ten.scores
        == compare(
            images[::2], images[1::2], extractor=Pixels(), run=NO_STORE, subset=Subset(images=10)
        ).scores
    )
    np.savez(tmp_path / "x.npz", images)
    assert (
        len(features_of(tmp_path / "x.npz", extractor=Pixels(), run=Run(store=str(tmp_path / "store")))) == 60
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["fid", 3]}, r"metrics=\['fid', 3\]: expected names"),
        ({"metrics": 3}, "metrics=3: expected names"),
        ({"metrics": ""}, "Unknown metric ''"),
        ({"metrics": "fid;recall"}, "Unknown metric 'fid;recall'"),
        ({"metrics": []}, r"metrics=\[\]: expected names"),
        ({"subset": True}, "subset=True: expected a number of images"),
        ({"subset": 0}, "A subset of 0 images"),
        ({"subset": "10"}, "subset='10': expected a number"),
        ({"protocol": None}, "Unknown protocol None"),
        ({"extractor": "inception"}, "extractor='inception': expected a network"),
        ({"value_range": "0..1"}, "there are none in <array>, <array>. Integers"),
        ({"value_range": "0-1"}, r"Value range '0-1': expected one of 0\.\.1"),
    ],
)
def test_slips_are_explained(images: NDArray[np.uint8], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(images, images, **({"extractor": Pixels(), "run": NO_STORE} | arguments))


def test_fields_of_a_run_may_be_given_by_themselves(batches: tuple[Path, Path], tmp_path: Path) -> None:
    stages: list[str] = []
    found = compare(
        *batches,
        extractor=Pixels(),
        store=tmp_path / "store",
        progress=lambda stage, done, total: stages.append(stage),
    )
    assert found.scores == compare(*batches, extractor=Pixels(), run=NO_STORE).scores
    assert stages
    assert list((tmp_path / "store").rglob("*.h5"))
    with pytest.raises(InputError, match=r"Unknown arguments stor.*store"):
        compare(*batches, extractor=Pixels(), stor=tmp_path)
    with pytest.raises(InputError, match="Give run=, or store=, not both"):
        compare(*batches, extractor=Pixels(), run=NO_STORE, store=None)
    with pytest.raises(InputError, match=r"run='x': expected evalkit\.Run"):
        compare(*batches, extractor=Pixels(), run="x")  # type: ignore[arg-type]


def test_a_store_is_a_folder() -> None:
    for store in ("", 3):
        with pytest.raises(InputError, match=f"store={store!r}: expected a folder"):
            Run(store=store)  # type: ignore[arg-type]


def test_a_range_is_of_floats_alone(
    batches: tuple[Path, Path], tmp_path: Path, run: Invoke, pixels: Pixels
) -> None:
    expected = compare(*batches, extractor=Pixels(), run=NO_STORE)
    scaled = np.load(batches[1])["arr_0"] / np.float32(127.5) - 1
    np.savez(tmp_path / "x.npz", scaled.clip(-1, 1))
    found = compare(batches[0], tmp_path / "x.npz", value_range="-1..1", extractor=Pixels(), run=NO_STORE)
    assert found["fid"] == pytest.approx(expected["fid"], rel=1e-4)
    store = tmp_path / "store"
    wrong = compare(
        batches[0], scaled * 0 + 200, value_range="0..255", extractor=Pixels(), run=Run(store=store)
    )
    assert wrong["fid"] != found["fid"]
    result = run("compare", batches[0], tmp_path / "x.npz", "--metrics", "fid", "--format", "json")
    assert result.code == 2
    assert "scaled to [-1, 1] it seems" in result.err
    line = (
        "compare",
        batches[0],
        tmp_path / "x.npz",
        "--metrics",
        "fid",
        "--format",
        "json",
        "--value-range",
    )
    result = run(*line, "-1..1")
    assert json.loads(result.out)["scores"][0]["value"] == pytest.approx(expected["fid"], rel=1e-4)
    assert run(*line, "0..255").code == run(*line, "0..2").code == 2
    assert run("features", tmp_path / "x.npz", "-o", tmp_path / "f.h5", "--value-range", "-1..1").code == 0
    assert run("stats", tmp_path / "x.npz", "-o", tmp_path / "s.npz", "--value-range", "-1..1").code == 0
    assert (
        "there are none in" in run("stats", batches[0], "-o", tmp_path / "s.npz", "--value-range", "0..1").err
    )


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_labels_that_are_seeds(images: NDArray[np.uint8], tmp_path: Path, dtype: Any) -> None:
    seeds = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 60, dtype)
    np.savez(tmp_path / "x.npz", images, seeds)
    comparison = compare(images[:30], tmp_path / "x.npz", extractor=Pixels(), run=NO_STORE)
    assert any(
        "60 different numbers up to" in text and "seeds or ids" in text for text in comparison.warnings
    )
    np.savez(tmp_path / "y.npz", images, np.where(np.arange(60) % 2, -(2**63), 2**63 - 1))
    assert any(
        "seeds or ids" in text
        for text in compare(images[:30], tmp_path / "y.npz", extractor=Pixels(), run=NO_STORE).warnings
    )


@pytest.mark.parametrize("keep", ["mu", "mu_s"])
def test_one_pair_of_statistics_gives_its_distance(tmp_path: Path, keep: str) -> None:
    statistics = published_statistics()
    pair = {key: statistics[key] for key in (keep, keep.replace("mu", "sigma"))}
    np.savez(tmp_path / "all.npz", **statistics)  # type: ignore[arg-type]
    np.savez(tmp_path / "pair.npz", **pair)  # type: ignore[arg-type]
    np.savez(tmp_path / "other.npz", **published_statistics(1))  # type: ignore[arg-type]
    name, other = ("fid", "sfid") if keep == "mu" else ("sfid", "fid")
    right = compare(
        tmp_path / "all.npz", tmp_path / "other.npz", metrics=name, extractor=Pixels(), run=NO_STORE
    )
    found = compare(tmp_path / "pair.npz", tmp_path / "other.npz", extractor=Pixels(), run=NO_STORE)
    assert found[name] == pytest.approx(right[name], rel=1e-9)
    assert other in found.missing
    assert any(f"has only {' and '.join(pair)}" in text for text in found.warnings)
    arrays = statistics_of(features_of(tmp_path / "pair.npz", extractor=Pixels(), run=NO_STORE))
    assert sorted(arrays) == sorted(pair)


class SmallInception(Pixels):
    """Pixels under the widths of published statistics."""

    outputs = {"pool": 2048, "spatial": 2023}  # noqa: RUF012

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        found = super().__call__(images)
        return {
            layer: np.resize(found[layer], (len(images), d)).astype(np.float32)
            for layer, d in self.outputs.items()
        }


@pytest.mark.parametrize("metrics", [None, "fid,sfid"])
def test_a_pair_and_images_share_the_work(
    images: NDArray[np.uint8], tmp_path: Path, metrics: str | None
) -> None:
    statistics = published_statistics()
    np.savez(tmp_path / "x.npz", images, mu=statistics["mu"], sigma=statistics["sigma"])
    extractor = SmallInception()
    found = compare(tmp_path / "x.npz", images[:40], metrics=metrics, extractor=extractor, run=NO_STORE)
    without = compare(images, images[:40], extractor=extractor, run=NO_STORE)
    assert found["sfid"] == pytest.approx(without["sfid"], rel=1e-6)
    assert found["fid"] != without["fid"]
    assert any("FID uses these, sFID uses its images" in text for text in found.warnings)


# Printing -----------------------------------------------------------------------------------------------

PRINTING = """
import sys
from evalkit.cli.root import main
from evalkit.cli.options import ExtractorSetup
from evalkit.extractors.pixels import Pixels; Pixels.network = 'inception'
from evalkit.system.run import Run
ExtractorSetup.extractor = lambda self, network: Pixels()
main()
"""


def printing(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", PRINTING, *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, check=False, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_loses_no_record(
    batches: tuple[Path, Path], tmp_path: Path
) -> None:
    with Path("/dev/full").open("w") as full:
        done = printing("compare", *batches, "--json", tmp_path / "x.json", stdout=full)
    assert done.returncode == 2
    assert b"Cannot write to standard output: No space left" in done.stderr
    assert b"Traceback" not in done.stderr
    assert Comparison.from_json((tmp_path / "x.json").read_text())["fid"] > 0


def test_a_reader_that_has_gone_is_no_error(batches: tuple[Path, Path], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = printing("compare", *batches, "--json", tmp_path / "x.json", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr.count(b"Traceback")) == (0, 0)
    assert Comparison.from_json((tmp_path / "x.json").read_text())["fid"] > 0


def test_a_record_that_cannot_be_written_does_not_lose_the_scores(
    run: Invoke, batches: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: Pixels
) -> None:
    def removed(comparison: Comparison) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Comparison, "to_json", removed)
    result = run("compare", *batches, "--json", tmp_path / "x.json", "--format", "adm")
    assert result.code == 2
    assert "no space left on the device" in result.err
    assert result.out.startswith("Inception Score: ")


@pytest.mark.parametrize(
    ("encoding", "format_"),
    [("ascii", "table"), ("cp932", "markdown"), ("latin-1", "json"), ("cp437", "adm")],
)
def test_terminals_that_are_not_utf8(
    batches: tuple[Path, Path], tmp_path: Path, encoding: str, format_: str
) -> None:
    name = os.fsdecode(b"caf\xe9 \xe2\x80\x93.npz")
    (tmp_path / "x").mkdir()
    path = tmp_path / "x" / name
    path.write_bytes(batches[1].read_bytes())
    done = printing(
        "compare",
        batches[0],
        path,
        "--metrics",
        "fid",
        "--format",
        format_,
        "--json",
        tmp_path / "x.json",
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    assert b"fid" in done.stdout.lower()
    assert Comparison.from_json((tmp_path / "x.json").read_text()).samples.name == str(path)


def test_usage_errors_are_short(run: Invoke) -> None:
    result = run("compare", "a", "b", "--protocol", "x" * 5000)
    assert result.code == 2
    assert len(result.err) < 1000
    assert run("x" * 5000).code == 2


# Concurrency --------------------------------------------------------------------------------------------


def test_two_comparisons_in_threads_on_one_store(images: NDArray[np.uint8], tmp_path: Path) -> None:
    """Both have extracted the reference before either writes it."""
    barrier = threading.Barrier(2)

    class Meeting(Pixels):
        def __init__(self) -> None:
            super().__init__()
            self.met = False

        def __call__(self, batch: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
            found = super().__call__(batch)
            if not self.met:
                self.met = True
                barrier.wait(300)
            return found

    writing = threading.Barrier(2)
    replace_atomically = evalkit.features.store.replace_atomically

    @contextmanager
    def together(path: Path) -> Iterator[Path]:
        with replace_atomically(path) as partial:
            if path.name.startswith("00000000"):
                with suppress(threading.BrokenBarrierError):
                    writing.wait(300)
            yield partial

    def one(shift: int) -> float:
        other = np.roll(images[:30], shift, axis=1)
        return compare(images, other, metrics="fid", extractor=Meeting(), run=Run(store=tmp_path / "store"))[
            "fid"
        ]

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(evalkit.features.store, "replace_atomically", together)
        found = list(pool.map(one, (1, 2)))
    expected = [
        compare(
            images,
            np.roll(images[:30], shift, axis=1),
            metrics="fid",
            extractor=Pixels(),
            run=NO_STORE,
        )["fid"]
        for shift in (1, 2)
    ]
    assert found == expected
    assert list((tmp_path / "store").rglob("*.partial")) == []


MEETING = """
import os, sys, time
from pathlib import Path
import numpy as np
import evalkit.features.store
from evalkit.comparison import compare
from evalkit.extractors.pixels import Pixels; Pixels.network = 'inception'
from evalkit.system.run import Run

folder, me, other, pid = Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4])
os.getpid = lambda: pid  # as in two containers
replace_atomically = evalkit.features.store.replace_atomically

class Together:
    def __init__(self, path):
        self.inner = replace_atomically(path)
    def __enter__(self):
        partial = self.inner.__enter__()
        (folder / me).touch()
        while not (folder / other).exists():
            time.sleep(0.01)
        return partial
    def __exit__(self, *error):
        return self.inner.__exit__(*error)

evalkit.features.store.replace_atomically = Together
images = np.load(folder / "x.npz")["arr_0"]
print(compare(images, images[:30], metrics="fid", extractor=Pixels(), run=Run(store=folder / "store"))["fid"])
"""


@pytest.mark.parametrize("pids", [(1, 1), (1, 2)], ids=["containers", "processes"])
def test_two_comparisons_in_processes_on_one_store(
    images: NDArray[np.uint8], tmp_path: Path, pids: tuple[int, int]
) -> None:
    np.savez(tmp_path / "x.npz", images)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEETING, str(tmp_path), me, other, str(pid)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me, other, pid in (("a", "b", pids[0]), ("b", "a", pids[1]))
    ]
    found = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], found
    expected = compare(images, images[:30], metrics="fid", extractor=Pixels(), run=NO_STORE)["fid"]
    assert [float(out) for out, _ in found] == [expected, expected]
    assert list((tmp_path / "store").rglob("*.partial")) == []


FORKED = """
import os, sys
import numpy as np, torch
from evalkit.comparison import compare
from evalkit.extractors.pixels import Pixels; Pixels.network = 'inception'
from evalkit.system.run import Run
from evalkit.extractors.preprocess import resize_tf1

def work():
    images = np.load(sys.argv[1])["arr_0"]
    x = torch.from_numpy(np.tile(images, (4, 1, 1, 1))).float()
    resized = resize_tf1(x, 299)[-1, -1, -1].tolist()  # far more than one thread is given
    found = compare(images, images[:30], protocol="exact", extractor=Pixels(), run=Run(store=None))
    return found["recall"], resized

torch.set_num_threads(2)
torch.ones(10_000_000).exp_()
before = work()
child = os.fork()
if not child:
    print(work() == before, torch.get_num_threads(), flush=True)
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_is_forked_after_a_comparison(images: NDArray[np.uint8], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images)
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            FORKED.replace(
                "    x = ",
                "    compare(images, images[:30], extractor=Pixels(), run=Run(store=None))\n    x = ",
            ),
            str(tmp_path / "x.npz"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stdout) == (0, "True 1\n"), done.stderr


# A user without a home ----------------------------------------------------------------------------------


def test_a_user_without_a_home(
    run: Invoke, batches: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, own_cache: Path, pixels: Pixels
) -> None:
    def homeless(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(Path, "expanduser", lambda path: homeless() if str(path)[:1] == "~" else path)
    for name in ("XDG_CACHE_HOME", "HOME", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert run("compare", *batches, "--metrics", "fid").code == 0
    assert list(find_weights_places())
    monkeypatch.delenv("EVALKIT_CACHE")
    result = run("compare", *batches, "--metrics", "fid")
    assert result.code == 2
    assert "no home folder. Set EVALKIT_CACHE" in result.err
    assert run("compare", *batches, "--metrics", "fid", "--no-store").code == 0


def find_weights_places() -> Iterator[Path]:
    return (Path(row.path) for row in describe_weights())
