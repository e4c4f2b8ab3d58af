"""compare(): from two batches to a record that can be believed, and every way in which it can be refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import Result
from numpy.typing import NDArray
from PIL import Image

from evalkit.comparison import Subset, compare, features_of, statistics_of
from evalkit.console import ExtractorSetup
from evalkit.errors import FeatureError, InputError, UndefinedMetricError
from evalkit.extractors.inception import Inception
from evalkit.extractors.inception_weights import InceptionWeights
from evalkit.extractors.pixels import Pixels
from evalkit.features import Features, FeatureStore, extract
from evalkit.images import open_images
from evalkit.metrics import PROTOCOLS, frechet_distance
from evalkit.report import FORMATS, adm_lines, markdown, table
from evalkit.results import Comparison, PublishedRow

Run = Callable[..., Result]


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
    comparison = compare(*batches, extractor=Pixels(), store=FeatureStore(tmp_path / "store"))
    assert [score.name for score in comparison.scores] == [
        "inception_score",
        "fid",
        "sfid",
        "precision",
        "recall",
    ]
    assert comparison.missing == {}
    assert comparison.reference.images == comparison.samples.images == 30
    assert comparison.reference.image_shape == (12, 10, 3)
    assert comparison.reference.digest == open_images(batches[0]).digest
    assert comparison.extractor["fingerprint"] == Pixels().fingerprint
    assert {"evalkit", "torch", "numpy", "scipy", "python"} <= set(comparison.versions)
    assert {"fid", "features of samples", "precision and recall"} <= set(comparison.seconds)
    assert comparison.reference.features == "extracted"
    again = compare(*batches, extractor=Pixels(), store=FeatureStore(tmp_path / "store"))
    assert again.reference.features == "stored"
    assert again.scores == comparison.scores
    assert Comparison.from_json(comparison.to_json()) == comparison
    with pytest.raises(KeyError, match="no score 'kid'"):
        _ = comparison["kid"]


def test_scores_are_the_metrics_of_the_features(batches: tuple[Path, Path]) -> None:
    a, b = (Pixels()(np.load(path)["arr_0"])["pool"] for path in batches)
    comparison = compare(*batches, protocol="exact", extractor=Pixels(), store=None)
    assert comparison["fid"] == frechet_distance(a, b)
    assert comparison["fid"] > 0


def test_arrays_features_and_files_give_the_same(batches: tuple[Path, Path], tmp_path: Path) -> None:
    expected = compare(*batches, extractor=Pixels(), store=None).scores
    arrays = [np.load(path)["arr_0"] for path in batches]
    assert compare(*arrays, extractor=Pixels(), store=None).scores == expected
    features = [extract(open_images(array), Pixels()) for array in arrays]
    assert compare(*features, store=None).scores == expected
    files = [tmp_path / "a.h5", tmp_path / "b.h5"]
    for one, path in zip(features, files, strict=True):
        one.save(path)
    from_files = compare(*files, extractor=Pixels())
    assert from_files.scores == expected
    assert from_files.samples.features == "file"
    assert from_files.samples.name == str(files[1])


def test_features_of_another_extractor_are_refused(batches: tuple[Path, Path], tmp_path: Path) -> None:
    features_of(batches[0], extractor=Pixels("other"), store=None).save(tmp_path / "a.h5")
    with pytest.raises(FeatureError, match=r"a\.h5 holds features of another extractor"):
        compare(tmp_path / "a.h5", batches[1], extractor=Pixels(), store=None)


def test_statistics_of_a_file_replace_those_of_its_images(tmp_path: Path) -> None:
    statistics = published_statistics()
    np.savez(tmp_path / "ref.npz", **statistics)  # type: ignore[arg-type]
    np.savez(tmp_path / "same.npz", **statistics)  # type: ignore[arg-type]
    np.savez(tmp_path / "other.npz", **published_statistics(1))  # type: ignore[arg-type]
    same = compare(tmp_path / "ref.npz", tmp_path / "same.npz", extractor=Pixels(), store=None)
    assert same["fid"] == pytest.approx(0, abs=1e-6)
    assert same.reference.statistics == "file"
    assert set(same.missing) == {"inception_score", "precision", "recall"}
    assert "not only their statistics" in same.missing["precision"]
    with pytest.raises(KeyError, match="not only their statistics"):
        _ = same["precision"]
    assert any("was given as samples and carries mu" in warning for warning in same.warnings)
    other = compare(tmp_path / "ref.npz", tmp_path / "other.npz", extractor=Pixels(), store=None)
    assert other["fid"] > 100


def test_statistics_written_are_those_read(batches: tuple[Path, Path]) -> None:
    features = features_of(batches[0], extractor=Pixels(), store=None)
    arrays = statistics_of(features)
    assert features.pool is not None
    np.testing.assert_allclose(arrays["sigma"], np.cov(features.pool, rowvar=False), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(arrays["mu"], features.pool.mean(axis=0, dtype=np.float64), rtol=1e-14)
    assert arrays["mu_s"].shape == (12,)


def test_warnings(images: NDArray[np.uint8], tmp_path: Path) -> None:
    skewed = np.concatenate([np.zeros(50, np.int64), np.arange(10)])
    np.savez(tmp_path / "skewed.npz", arr_0=images, arr_1=skewed)
    comparison = compare(images[:30], tmp_path / "skewed.npz", extractor=Pixels(), store=None)
    text = "\n".join(comparison.warnings)
    assert "published numbers use 50,000" in text
    assert "labels of" in text
    assert "far from uniform: 10 classes of 1 to 51" in text
    assert "singular covariances, in <array> (30 images): FID" in text
    comparison = compare(images, np.float32(images[:, :, :8]), extractor=Pixels(), store=None)
    text = "\n".join(comparison.warnings)
    assert "Image sizes differ: 10x12 and 8x12" in text
    assert "float" in text
    comparison = compare(images, images, extractor=Pixels(), store=None)
    assert any("are the same images" in warning for warning in comparison.warnings)
    assert comparison["fid"] == pytest.approx(0, abs=1e-9)
    assert comparison["precision"] == comparison["recall"] == 1


def test_missing_head_is_said_with_the_remedy(
    images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pixels, "logits", lambda self, pool: None)
    comparison = compare(images[:30], images[30:], extractor=Pixels(), store=None)
    assert set(comparison.missing) == {"inception_score"}
    assert "evalkit weights --fetch" in table(comparison)
    assert adm_lines(comparison).startswith("Inception Score: unavailable (")


def test_progress_names_the_stages(batches: tuple[Path, Path]) -> None:
    stages: list[str] = []
    compare(
        *batches, extractor=Pixels(), store=None, progress=lambda stage, done, total: stages.append(stage)
    )
    assert str(batches[0]) in stages[0]


def test_undefined_is_an_error(images: NDArray[np.uint8]) -> None:
    with pytest.raises(UndefinedMetricError, match="holds one image"):
        compare(images, images[:1], extractor=Pixels(), store=None)
    with pytest.raises(InputError, match=r"Unknown protocol 'clean'.*adm, exact"):
        compare(images, images, protocol="clean", extractor=Pixels(), store=None)


def test_protocols_report_their_parameters(batches: tuple[Path, Path]) -> None:
    for protocol in PROTOCOLS:
        comparison = compare(*batches, protocol=protocol, extractor=Pixels(), store=None)
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
def test_compare_prints_a_table_and_writes_json(run: Run, batches: tuple[Path, Path], tmp_path: Path) -> None:
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
def test_adm_format_is_the_reference_evaluators(run: Run, batches: tuple[Path, Path]) -> None:
    result = run("compare", *batches, "--format", "adm")
    lines = result.out.splitlines()
    assert result.err.startswith(f"warning: {batches[1]} holds 30 images")
    assert [line.split(":")[0] for line in lines] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    comparison = compare(*batches, extractor=Pixels(), store=None)
    assert [float(line.split(":")[1]) for line in lines] == [score.value for score in comparison.scores]


@pytest.mark.usefixtures("pixels")
def test_features_and_stats_commands(run: Run, batches: tuple[Path, Path], tmp_path: Path) -> None:
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
def test_no_store_leaves_nothing(run: Run, batches: tuple[Path, Path], own_cache: Path) -> None:
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
def test_bad_input_is_one_clear_line(run: Run, batches: tuple[Path, Path], tmp_path: Path, case: str) -> None:
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
    run: Run, batches: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    run: Run, batches: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_damaged_weights_are_said(run: Run, batches: tuple[Path, Path], tmp_path: Path) -> None:
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
def test_bad_usage(run: Run, batches: tuple[Path, Path], arguments: tuple[str, ...], words: str) -> None:
    result = run("compare", *batches, *arguments)
    assert result.code == 2
    assert words in result.err


@pytest.mark.usefixtures("pixels")
def test_interruption(
    run: Run, batches: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pixels, "__call__", interrupted)
    result = run("compare", *batches, "--json", tmp_path / "x.json")
    assert result.code == 130
    assert "run the same command again" in result.err
    assert not (tmp_path / "x.json").exists()


def test_a_bug_keeps_its_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, batches: tuple[Path, Path]
) -> None:
    def bug(self: object) -> None:
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
    plain = compare(*batches, extractor=Pixels(), store=None)
    comparison = replace(plain, published=published_rows())
    assert Comparison.from_json(comparison.to_json()) == comparison
    measured = [
        f"{comparison[name]:.2f}" for name in ("fid", "sfid", "inception_score", "precision", "recall")
    ]
    shown = [
        ["model", "FID", "sFID", "IS", "Precision", "Recall", "table"],
        ["these", "samples", *measured],
        ["GAN", "6.95", "-", "-", "-", "0.28", "5"],
        ["ADM-G,", "scale", "1", "-", "-", "186.70", "-", "-", "6"],
    ]
    lines = [line.split() for line in table(comparison).splitlines()]
    first = lines.index(shown[0])
    assert lines[first : first + 4] == shown
    block = table(comparison).splitlines()[first - 1 : first + 4]
    assert block[0] == "digits as published, 30 samples each: A paper, arXiv:0000.00000."
    assert len({len(line) for line in block[1:2] + block[3:]}) == 1  # columns line up
    rows = [line.replace("|", " ").split() for line in markdown(comparison).splitlines()]
    assert [row for row in shown if row in rows] == shown
    assert adm_lines(comparison) == adm_lines(plain)
    assert "as published" not in table(plain) + markdown(plain)


def test_published_rows_that_are_not_like_for_like(batches: tuple[Path, Path]) -> None:
    comparison = compare(*batches, protocol="exact", extractor=Pixels(), store=None)
    for format_ in (table, markdown):
        text = format_(replace(comparison, published=published_rows()))
        assert "arXiv:0000.00000. Not like for like, here: protocol exact." in text
    rows = tuple(replace(row, images=50_000) for row in published_rows())
    text = table(replace(comparison, protocol="adm", published=rows))
    assert "digits as published, 50,000 samples each" in text
    assert "arXiv:0000.00000. Not like for like, here: 30 samples." in text


def test_a_comparison_from_before_published_rows_is_read(batches: tuple[Path, Path]) -> None:
    comparison = compare(*batches, extractor=Pixels(), store=None)
    values = json.loads(comparison.to_json())
    assert values.pop("published") == []
    assert Comparison.from_json(json.dumps(values)) == comparison


# Some metrics, some images, files in parts ------------------------------------------------------------


def test_fid_and_sfid_alone_are_streamed(batches: tuple[Path, Path]) -> None:
    whole = compare(*batches, extractor=Pixels(), store=None)
    some = compare(*batches, metrics=["sfid", "fid"], extractor=Pixels(), store=None)
    assert [score.name for score in some.scores] == ["fid", "sfid"]
    for score in some.scores:
        assert score.value == pytest.approx(whole[score.name], rel=1e-6)
        assert score.parameters["mean_dtype"] == "float64"
    exact = compare(*batches, protocol="exact", extractor=Pixels(), store=None)
    for name in ("fid", "sfid"):
        assert some[name] == pytest.approx(exact[name], rel=1e-9)
    assert dict.fromkeys(("inception_score", "precision", "recall"), "not asked for") == some.missing
    assert some.samples.images == 30
    assert (some.samples.statistics, some.samples.features) == ("images", "extracted")
    for origin in ("extracted", "stored"):
        stored = compare(*batches, metrics=["sfid", "fid"], extractor=Pixels())
        assert stored.scores == some.scores
        assert stored.samples.features == origin
    assert some.warnings == whole.warnings
    assert "not asked for" in table(some)
    assert Comparison.from_json(some.to_json()) == some


def test_few_images_are_not_streamed(images: NDArray[np.uint8], tmp_path: Path) -> None:
    """Their covariances are singular."""
    sides = images[:12], images[20:32]
    whole = compare(*sides, extractor=Pixels(), store=None)
    some = compare(*sides, metrics=["sfid", "fid"], extractor=Pixels(), store=None)
    assert some.scores == tuple(score for score in whole.scores if score.name in ("fid", "sfid"))
    more = compare(images[:13], sides[1], metrics=["fid"], extractor=Pixels(), store=None)
    assert more.scores[0].parameters["mean_dtype"] == "float64"


def test_other_metrics_alone(batches: tuple[Path, Path]) -> None:
    whole = compare(*batches, extractor=Pixels(), store=None)
    some = compare(*batches, metrics=["recall", "fid"], extractor=Pixels(), store=None)
    assert some.scores == tuple(
        score for score in whole.scores if score.name in ("fid", "precision", "recall")
    )


@pytest.mark.parametrize("names", [[], ["fid", "kid"], [""]])
def test_unknown_metrics(batches: tuple[Path, Path], names: list[str]) -> None:
    with pytest.raises(InputError, match=r"Unknown metrics .*inception_score, fid, sfid, precision, recall"):
        compare(*batches, metrics=names, extractor=Pixels(), store=None)


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
    comparison = compare(reference, samples, subset=Subset(images=25, seed=5), extractor=Pixels(), store=None)
    drawn = [
        np.sort(np.random.RandomState(5).permutation(36)[:25]),
        np.arange(24),  # fewer than 25: all
    ]
    by_hand = compare(reference[drawn[0]], samples[drawn[1]], extractor=Pixels(), store=None)
    whole = compare(reference, samples, protocol="exact", extractor=Pixels(), store=None)
    for name in ("inception_score", "precision", "recall"):
        assert comparison[name] == by_hand[name]
    assert by_hand["recall"] != whole["recall"]
    for name in ("fid", "sfid"):
        assert comparison[name] == pytest.approx(whole[name], rel=1e-9)
    assert (comparison.reference.images, comparison.samples.images) == (36, 24)
    recorded = {score.name: dict(score.parameters) for score in comparison.scores}
    assert recorded["precision"] == {"k": 3, "arithmetic": "float16", "subset": 25, "seed": 5}
    assert "subset" not in recorded["fid"]
    for text in (table(comparison), markdown(comparison)):
        assert text.count("of 25 and 24 images, seed 5") == 3
    files = []
    for number, side in enumerate((reference, samples)):
        files.append(tmp_path / f"{number}.h5")
        features_of(side, extractor=Pixels(), store=None).save(files[-1])
    from_files = compare(*files, subset=Subset(images=25, seed=5), extractor=Pixels())
    assert from_files.scores == comparison.scores


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (-3, 0), (5, -1), (5, 2**32)])
def test_impossible_subsets(count: int, seed: int) -> None:
    with pytest.raises(InputError, match="expected"):
        Subset(images=count, seed=seed)


def test_a_subset_of_too_few_images_has_no_recall(batches: tuple[Path, Path]) -> None:
    comparison = compare(*batches, subset=Subset(images=3), extractor=Pixels(), store=None)
    assert set(comparison.missing) == {"precision", "recall"}
    assert "at least 4" in comparison.missing["recall"]


@pytest.mark.usefixtures("pixels")
def test_parts_are_compared_as_one_file(run: Run, batches: tuple[Path, Path], tmp_path: Path) -> None:
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
def test_metrics_and_subset_options(run: Run, batches: tuple[Path, Path]) -> None:
    result = run("compare", *batches, "--metrics", "fid, sfid")
    assert result.code == 0
    assert "not computed: not asked for" in result.out
    result = run("compare", *batches, "--subset", 20, "--seed", 3)
    assert "(of 20 images a side, seed 3)" in result.out
    for option, value in (("--metrics", "fid,is"), ("--subset", 0), ("--seed", "x")):
        result = run("compare", *batches, option, value)
        assert result.code == 2, option
        assert result.out == ""


def test_memory_is_said_before_the_work(
    batches: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, run: Run, pixels: Pixels
) -> None:
    said: list[str] = []

    def saying(**settings: Any) -> list[str]:
        said.clear()
        compare(*batches, extractor=Pixels(), store=None, say=said.append, **settings)
        return said

    assert saying() == []
    assert run("compare", *batches).err == ""
    monkeypatch.setattr("evalkit.comparison.WORTH_SAYING", 1e6)
    # 60 images of (2048 + 2023 + 1008) float32, and 8 bytes for each of 2048.
    assert saying() == [
        "Memory: 1.2 MB for the features of 60 images, and up to 1.0 MB more for precision and recall."
    ]
    assert saying(metrics=["inception_score"]) == []
    assert saying(metrics=["fid", "sfid"]) == []
    assert saying(subset=Subset(images=10)) == []
    monkeypatch.setattr("evalkit.comparison._physical_memory", lambda: 2_000_000)
    assert "This machine has 2.0 MB: take a subset (--subset 50000)" in saying()[0]
    assert "--metrics fid,sfid" in run("compare", *batches).err
    monkeypatch.setattr(Pixels, "__call__", lambda *_: pytest.fail("extracted"))
    with pytest.raises(pytest.fail.Exception):
        saying()
    assert len(said) == 1


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
                compare(*sides, extractor=Pixels(), store=FeatureStore(tmp_path / "store"), **settings)
                peaks[f"{settings} {count}"] = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
    streamed, streamed_4, subset, subset_4 = peaks.values()
    side = 60_000 * (48 + 12) * 4
    assert streamed_4 < streamed + side / 20, peaks
    assert subset_4 < subset + side / 20, peaks


def test_a_reduced_precision_tells_its_drift(
    inception_weights: InceptionWeights, images: NDArray[np.uint8], tmp_path: Path
) -> None:
    sides = images[:6], images[30:36]
    full, reduced = (Inception(inception_weights, device="cpu", precision=p) for p in ("float32", "bfloat16"))
    store = FeatureStore(tmp_path / "store")
    assert compare(*sides, extractor=full, store=store).drift == {}
    # From the store, where both precisions have features; and extracted anew.
    stored = compare(*sides, extractor=reduced, store=store)
    assert stored.drift == compare(*sides, extractor=reduced, store=None).drift
    assert stored.drift["images"] == [6, 6]
    assert set(stored.drift) == {"images", "float32", "bfloat16"}
    for name in ("fid", "sfid", "precision", "recall"):
        assert stored.drift["bfloat16"][name] == pytest.approx(stored[name], rel=1e-6)
        exact = compare(*sides, extractor=full, store=store)
        assert stored.drift["float32"][name] == pytest.approx(exact[name], rel=1e-6)
    assert stored.drift["bfloat16"]["fid"] != stored.drift["float32"]["fid"]


@pytest.mark.usefixtures("inception_weights")
def test_features_and_statistics_in_a_reduced_precision_tell_their_drift(
    images: NDArray[np.uint8], tmp_path: Path, run: Run
) -> None:
    batch = tmp_path / "batch.npz"
    np.savez(batch, images[:4])
    reduced = ("--precision", "bfloat16", "--device", "cpu")
    assert "drift" not in run("features", batch, "-o", tmp_path / "float32.h5", "--device", "cpu").out
    told = [
        run("features", batch, "-o", tmp_path / "bfloat16.h5", *reduced).out,
        run("stats", batch, "-o", tmp_path / "statistics.npz", *reduced).out,
        run("reference", "build", batch, "-o", tmp_path / "built.npz", "--size", 10, *reduced).out,
    ]
    pattern = (
        r"drift: against float32, bfloat16 moves pool features by (.*)% and spatial features by (.*)% on"
    )
    shares = [[float(share) for share in re.search(pattern, out).groups()] for out in told]  # type: ignore[union-attr]
    exact, moved = (Features.load(tmp_path / f"{precision}.h5") for precision in ("float32", "bfloat16"))
    for layer, share in zip(("pool", "spatial"), shares[0], strict=True):
        difference = getattr(moved, layer) - getattr(exact, layer)
        expected = np.linalg.norm(difference) / np.linalg.norm(getattr(exact, layer))
        assert share == pytest.approx(100 * expected, abs=0.006)
        assert share > 0.05
    assert shares[1] == shares[0]
    assert shares[2] != shares[0]  # the images are cropped


def test_samples_that_are_statistics_alone_need_images_for_the_rest(
    images: NDArray[np.uint8], tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", images, **published_statistics(1))
    np.savez(tmp_path / "b.npz", **published_statistics(2))
    comparison = compare(tmp_path / "a.npz", tmp_path / "b.npz", extractor=Pixels(), store=None)
    assert [score.name for score in comparison.scores] == ["fid", "sfid"]
    assert "b.npz is statistics alone; this needs the images" in comparison.missing["inception_score"]
    assert "b.npz has no pool features" in comparison.missing["recall"]
