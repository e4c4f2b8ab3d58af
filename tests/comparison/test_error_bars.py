"""compare() with standard errors: which scores have them, what they leave alone, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from invoked import Result
from numpy.typing import NDArray
from stand_ins import NO_STORE
from stand_ins import InceptionPixels as Pixels

from evalkit.comparison import compare, features_of
from evalkit.features.moments import Moments
from evalkit.metrics.frechet import FID
from evalkit.report.text import markdown, table
from evalkit.results import Comparison, Score
from evalkit.system.run import Run

Invoke = Callable[..., Result]


@pytest.fixture
def sides() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """120 images a side, of 48 features as the stand-in sees them."""
    rng = np.random.default_rng(0)
    first, second = (rng.integers(low, 256, (120, 8, 8, 3), dtype=np.uint8) for low in (0, 20))
    return first, second


def without_bars(score: Score) -> Score:
    bars = ("stderr", "stderr_sampling", "stderr_reference", "no_stderr", "unbiased", "n")
    return replace(score, **dict.fromkeys(bars))


@pytest.mark.parametrize("protocol", ["adm", "exact"])
def test_no_digit_changes(sides: tuple[NDArray[np.uint8], ...], protocol: str) -> None:
    with_bars = compare(*sides, protocol=protocol, extractor=Pixels(), run=NO_STORE)
    without = compare(*sides, protocol=protocol, error_bars=False, extractor=Pixels(), run=NO_STORE)
    assert tuple(map(without_bars, with_bars.scores)) == without.scores
    assert (with_bars.warnings, with_bars.missing) == (without.warnings, without.missing)
    assert "error bars of fid" in with_bars.seconds
    assert not any(stage.startswith("error bars") for stage in without.seconds)


def test_every_score_has_a_bar(sides: tuple[NDArray[np.uint8], ...]) -> None:
    found = compare(*sides, metrics="fid,sfid,inception_score,recall,kid", extractor=Pixels(), run=NO_STORE)
    for score in found.scores:
        assert score.stderr is not None, score.no_stderr
        assert score.stderr > 0
        assert score.n == 120
        assert score.no_stderr is None
        assert (score.stderr_reference is None) == (score.name == "inception_score")
    fid = found.score("fid")
    assert fid is not None
    assert fid.unbiased is not None
    assert fid.unbiased < fid.value
    assert Comparison.from_json(found.to_json()) == found


def test_each_stage_of_progress_begins_and_ends(sides: tuple[NDArray[np.uint8], ...]) -> None:
    seen: list[tuple[str, int, int]] = []
    compare(
        *sides,
        extractor=Pixels(),
        run=Run(store=None, progress=lambda *told: seen.append(told)),
    )
    bars = [told for told in seen if told[0].startswith("error bars")]
    assert bars[:2] == [("error bars of fid", 0, 1), ("error bars of fid", 1, 1)]
    assert bars[-1] == ("error bars of precision and recall", 1, 1)


def test_sums_alone_give_no_bar_and_the_reason_once(sides: tuple[NDArray[np.uint8], ...]) -> None:
    found = compare(*sides, metrics=["fid", "sfid"], extractor=Pixels(), run=NO_STORE)
    assert [score.stderr for score in found.scores] == [None, None]
    text = table(found)
    assert text.count("needs the features of every image") == 1
    assert "no error bar of FID and sFID: only sums" in text
    assert markdown(found).count("needs the features of every image") == 1
    some = compare(*sides, subset=60, extractor=Pixels(), run=NO_STORE)
    assert [score.name for score in some.scores if score.stderr is None] == ["fid", "sfid"]
    assert {score.n for score in some.scores if score.stderr is not None} == {60}


def test_no_more_images_than_features_give_no_bar(sides: tuple[NDArray[np.uint8], ...]) -> None:
    found = compare(sides[0], sides[1][:40], extractor=Pixels(), run=NO_STORE)
    fid = found.score("fid")
    assert fid is not None
    assert fid.stderr is None
    assert fid.unbiased is None
    assert "singular covariance" in str(fid.no_stderr)


def test_a_reference_of_statistics_adds_no_error_of_its_own(
    sides: tuple[NDArray[np.uint8], ...],
) -> None:
    reference, samples = (features_of(side, extractor=Pixels(), run=NO_STORE) for side in sides)
    gaussians = {output: Moments.of(rows).gaussian() for output, rows in reference.arrays.items()}
    alone = replace(reference, arrays={}, gaussians=gaussians, count=120)
    fid = compare(alone, samples, metrics="fid,recall", run=NO_STORE).score("fid")
    whole = compare(reference, samples, protocol="exact", metrics="fid,recall", run=NO_STORE).score("fid")
    assert fid is not None
    assert whole is not None
    assert fid.stderr == fid.stderr_sampling == pytest.approx(whole.stderr_sampling, rel=1e-6)
    assert fid.stderr_reference is None


def test_a_metric_without_influence_says_so(sides: tuple[NDArray[np.uint8], ...]) -> None:
    class Plain:
        scores = FID.scores
        needs = FID.needs
        uses_reference = True

        def __call__(self, *features: object, run: Run | None = None) -> tuple[Score, ...]:
            return (Score(name="fid", value=1.0),)

    found = compare(*sides, metrics=[Plain(), "recall"], extractor=Pixels(), run=NO_STORE)
    score = found.score("fid")
    assert score is not None
    assert score.no_stderr == "this metric has no standard error"


def test_balanced_labels_count_and_change_no_score(
    sides: tuple[NDArray[np.uint8], ...], tmp_path: Path
) -> None:
    labels = np.arange(120) % 4
    brighter = sides[1] // 2 + 30 * labels[:, None, None, None].astype(np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=brighter, arr_1=labels)
    np.savez(tmp_path / "b.npz", arr_0=brighter)
    with_labels, without = (
        compare(sides[0], tmp_path / name, extractor=Pixels(), run=NO_STORE) for name in ("a.npz", "b.npz")
    )
    assert tuple(map(without_bars, with_labels.scores)) == tuple(map(without_bars, without.scores))
    within, plain = (found.score("fid") for found in (with_labels, without))
    assert within is not None
    assert plain is not None
    assert within.stderr_sampling is not None
    assert plain.stderr_sampling is not None
    assert within.stderr_sampling < 0.9 * plain.stderr_sampling


@pytest.mark.usefixtures("pixels")
def test_command(run: Invoke, sides: tuple[NDArray[np.uint8], ...], tmp_path: Path) -> None:
    paths = [tmp_path / "ref.npz", tmp_path / "samples.npz"]
    for path, side in zip(paths, sides, strict=True):
        np.savez(path, arr_0=side)
    lines = run("compare", *paths).out.splitlines()
    fid = next(line for line in lines if line.startswith("FID"))
    assert fid.split()[2] == "±"
    assert any(line.startswith("±: standard error") and "FID" in line for line in lines)
    plain = run("compare", *paths, "--no-error-bars").out
    assert not [line for line in plain.splitlines() if line.startswith("±")]
    assert "unbiased" not in plain
    adm = run("compare", *paths, "--format", "adm")
    record = tmp_path / "record.json"
    assert run("compare", *paths, "--format", "adm", "--json", record) == adm
    assert run("compare", *paths, "--format", "adm", "--no-error-bars") == adm
    found = Comparison.from_json(record.read_text())
    assert all(score.stderr for score in found.scores)
    assert adm.out == "".join(
        f"{title}: {found[name]!r}\n"
        for title, name in (
            ("Inception Score", "inception_score"),
            ("FID", "fid"),
            ("sFID", "sfid"),
            ("Precision", "precision"),
            ("Recall", "recall"),
        )
    )
