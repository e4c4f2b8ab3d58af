"""Several sets of samples, or several settings with their runs: which differ, and how that is shown."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from invoked import Result
from numpy.typing import NDArray
from stand_ins import NO_STORE
from stand_ins import InceptionPixels as Pixels

from evalkit.comparison import compare, features_of
from evalkit.comparison.pairs import are_paired
from evalkit.errors import FeatureError, InputError
from evalkit.features.extraction import Extraction
from evalkit.features.record import BatchFeatures, Features
from evalkit.images import open_images
from evalkit.metrics.frechet import SFID, FrechetDistance
from evalkit.report import several
from evalkit.results import Comparison, Score, ScoreSpec
from evalkit.several import Comparisons
from evalkit.system.run import Run
from evalkit.uncertainty import holm

Invoke = Callable[..., Result]
Images = NDArray[np.uint8]

HOW: dict[str, Any] = {"extractor": Pixels(), "run": NO_STORE}


def images(seed: int, count: int = 160, low: int = 10) -> Images:
    return np.random.default_rng(seed).integers(low, 256, (count, 8, 8, 3), dtype=np.uint8)


REFERENCE = images(0, 200, low=0)
SAMPLES = images(1)
DARKER = SAMPLES.copy()
DARKER[:40] //= 2


def sampled(
    path: Path, arr: Images, *, seed: int = 3, classes: int = 4, form: str = "evalkit samples 2"
) -> Path:
    """An npz such as `evalkit sample` writes."""
    provenance = json.dumps({"format": form, "settings": {"seed": seed, "scale": 1.0}})
    np.savez(path, arr_0=arr, arr_1=np.arange(len(arr)) % classes, provenance=np.array(provenance))
    return path


# What is compared with what --------------------------------------------------------------------------------


def test_each_set_has_the_scores_that_it_has_alone() -> None:
    found = compare(REFERENCE, SAMPLES, DARKER, images(2), **HOW)
    for each, samples in zip(found.comparisons, (SAMPLES, DARKER, images(2)), strict=True):
        alone = compare(REFERENCE, samples, **HOW)
        assert each.scores == alone.scores
        assert (each.warnings, each.missing, each.samples) == (alone.warnings, alone.missing, alone.samples)
    assert Comparisons.from_json(found.to_json()) == found


def test_every_two_sets_are_tested_in_every_score_and_corrected_together() -> None:
    found = compare(REFERENCE, SAMPLES, DARKER, images(2), **HOW)
    for name in ("fid", "sfid", "inception_score", "precision", "recall"):
        pairs = [pair for pair in found.pairs if pair.score == name]
        assert [(pair.first, pair.second) for pair in pairs] == [(0, 1), (0, 2), (1, 2)]
        tested = [pair.difference for pair in pairs if pair.difference is not None]
        assert len(tested) == 3
        assert [pair.corrected for pair in pairs] == holm([each.p for each in tested])
        values = [each.score(name) for each in found.comparisons]
        for pair in pairs:
            a, b = values[pair.first], values[pair.second]
            assert a is not None
            assert b is not None
            assert pair.difference is not None
            assert pair.unbiased == (name in ("fid", "sfid", "inception_score"))
            if pair.unbiased:
                assert a.unbiased is not None
                assert b.unbiased is not None
                assert pair.difference.value == a.unbiased - b.unbiased
            else:
                assert pair.difference.value == a.value - b.value
    assert found.difference("fid", 0, 1).stands
    assert not found.difference("precision", 0, 2).stands


def test_a_difference_is_asked_for_by_number_or_name_and_in_either_order(tmp_path: Path) -> None:
    paths = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for path, arr in zip(paths, (SAMPLES, DARKER), strict=True):
        np.savez(path, arr_0=arr)
    found = compare(REFERENCE, *paths, metrics="fid,precision", **HOW)
    forth, back = found.difference("fid", 0, 1), found.difference("fid", str(paths[1]), str(paths[0]))
    assert forth.difference is not None
    assert back.difference is not None
    assert (back.first, back.second) == (1, 0)
    assert forth.difference.value == -back.difference.value < 0
    assert forth.difference.z == -back.difference.z
    assert forth.corrected == back.corrected
    assert found.difference("fid", paths[0], "b.npz") == forth
    for wrong, said in (
        (("fid", 0, 0), "0 and 0 are the same"),
        (("fid", 0, 2), "2 is none of the 2 sets of samples; give a number from 0 to 1, or the path"),
        (("fid", -1, 0), "-1 is none"),
        (("fid", SAMPLES, 0), "is none of the 2"),
        (("fid", "a", 1), "'a' is none"),
        (("kid", 0, 1), "no score 'kid' here; give one of fid, precision"),
    ):
        with pytest.raises(InputError, match=said):
            found.difference(*wrong)  # type: ignore[arg-type]


def test_sets_of_different_numbers_are_compared_where_the_bias_is_known() -> None:
    found = compare(REFERENCE, SAMPLES, images(2, 120), metrics="fid,precision", **HOW)
    assert found.difference("fid", 0, 1).difference is not None
    precision = found.difference("precision", 0, 1)
    assert precision.difference is None
    assert precision.corrected is None
    assert "160 and 120 images" in str(precision.why)
    text = several.table(found)
    assert "Precision, Recall: not tested: they are of 160 and 120 images" in text
    three = several.table(compare(REFERENCE, SAMPLES, images(2, 120), images(3), metrics="recall", **HOW))
    marks = [line.split()[-1] for line in three.splitlines() if line.startswith("<array> (")]
    # The set of another size is not tested, and cannot be the best.
    assert sorted(marks) == ["*", "=", "?"]
    assert marks[1] == "?"
    assert "? not tested against the best" in three
    assert "p is corrected" not in three  # a single pair was tested


def test_without_error_bars_nothing_is_tested() -> None:
    found = compare(REFERENCE, SAMPLES, DARKER, error_bars=False, **HOW)
    assert {pair.why for pair in found.pairs} == {"error bars were not requested"}
    text = several.table(found)
    assert text.count("not tested") == 1
    assert "tested at" not in text
    sums = compare(REFERENCE, SAMPLES, DARKER, metrics="fid", subset=60, **HOW)
    assert all("only sums" in str(pair.why) for pair in sums.pairs if pair.score == "fid")
    assert several.table(sums).count("only sums") == 1


def test_fid_alone_is_tested_too() -> None:
    """Of a single set it needs sums alone; for a difference the features of every image are kept."""
    found = compare(REFERENCE, SAMPLES, DARKER, metrics="fid", **HOW)
    assert found.difference("fid", 0, 1).stands
    assert found.difference("fid", 0, 1) == compare(REFERENCE, SAMPLES, DARKER, **HOW).difference("fid", 0, 1)


# One set after the other -----------------------------------------------------------------------------------


class Alive:
    """Which of the rows that were extracted are in memory still, by side in the order of extraction."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._sides: list[dict[str, weakref.ref[Any]]] = []
        self.before: list[list[set[str]]] = []
        extract = Extraction.features

        def watched(extraction: Extraction) -> list[Features]:
            self.before.append(self.now())
            (found,) = extract(extraction)
            self._sides.append({output: weakref.ref(rows) for output, rows in found.arrays.items()})
            return [found]

        monkeypatch.setattr(Extraction, "features", watched)

    def now(self) -> list[set[str]]:
        return [{output for output, rows in side.items() if rows() is not None} for side in self._sides]


@pytest.mark.parametrize("is_stored", [False, True])
def test_rows_of_the_reference_and_of_one_set_are_in_memory(
    is_stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, every = Alive(monkeypatch), {"pool", "spatial", "logits"}
    run = Run(store=tmp_path if is_stored else None)
    found = compare(REFERENCE, SAMPLES, DARKER, images(2), extractor=Pixels(), run=run)
    assert alive.before == [[], [every], [every, set()], [every, set(), set()]]
    assert alive.now() == [set()] * 4
    assert len(found.pairs) == 3 * 5


@pytest.mark.parametrize("sets", [1, 2])
def test_rows_go_when_no_later_metric_needs_them(sets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the reference, when no later set needs them."""
    alive = Alive(monkeypatch)
    seen: list[list[set[str]]] = []

    @dataclass(frozen=True)
    class Last:
        uses_reference: ClassVar[bool] = True
        scores: ClassVar[tuple[ScoreSpec, ...]] = (
            ScoreSpec(name="last", title="Last", higher_is_better=False),
        )
        needs: ClassVar[Mapping[str, Any]] = {"inception:pool": "rows"}

        def __call__(self, reference: BatchFeatures, samples: BatchFeatures, run: Run) -> tuple[Score, ...]:
            seen.append(alive.now())
            return (Score(name="last", value=0.0),)

    compare(REFERENCE, *[SAMPLES, DARKER][:sets], metrics=[SFID, Last()], **HOW)
    assert seen[-1] == [{"pool"}, *[set()] * (sets - 1), {"pool"}]
    assert len(seen) == sets
    if sets == 2:
        assert seen[0] == [{"pool", "spatial"}, {"pool"}]


def test_features_of_the_user_stay() -> None:
    given = [features_of(each, extractor=Pixels(), run=NO_STORE) for each in (REFERENCE, SAMPLES, DARKER)]
    expected = compare(REFERENCE, SAMPLES, DARKER, **HOW)
    for _ in range(2):
        found = compare(*given)
        assert [each.scores for each in found.comparisons] == [each.scores for each in expected.comparisons]
        assert found.pairs == expected.pairs
    assert all(set(each.arrays) == {"pool", "spatial", "logits"} for each in given)


def test_features_of_another_extractor_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = features_of(DARKER, extractor=Pixels("other"), run=NO_STORE)
    ours = features_of(SAMPLES, extractor=Pixels(), run=NO_STORE)
    other.save(tmp_path / "old.h5")

    def never(*_: object) -> None:
        raise AssertionError("the work had begun")

    monkeypatch.setattr(Pixels, "__call__", never)
    monkeypatch.setattr(FrechetDistance, "__call__", never)
    with pytest.raises(FeatureError, match=r"old\.h5 holds features of another extractor"):
        compare(REFERENCE, SAMPLES, tmp_path / "old.h5", **HOW)
    for sources in ((ours, ours, other), (ours, other, ours)):
        with pytest.raises(FeatureError, match="hold features of different extractors"):
            compare(*sources)


def test_scores_are_said_before_an_error_in_a_later_set(caplog: pytest.LogCaptureFixture) -> None:
    broken = SAMPLES.astype(np.float32)
    broken[100, 0, 0, 0] = np.nan
    caplog.set_level(logging.INFO, "evalkit")
    with pytest.raises(InputError, match="100"):
        compare(REFERENCE, SAMPLES, broken, metrics="fid,precision", **HOW)
    (said,) = caplog.messages
    caplog.clear()
    alone = compare(REFERENCE, SAMPLES, metrics="fid,precision", **HOW)
    scores = ", ".join(f"{name} {alone[name]:.4f}" for name in ("fid", "precision", "recall"))
    assert said == f"<array>: {scores}"
    assert not caplog.messages


# Pairs of images -------------------------------------------------------------------------------------------


def test_files_of_one_seed_and_the_same_classes_are_paired(tmp_path: Path) -> None:
    base = open_images(sampled(tmp_path / "base.npz", SAMPLES))
    like = {
        "like": {},
        "seed": {"seed": 4},
        "classes": {"classes": 5},
        "format": {"form": "evalkit samples 3"},
    }
    found = {
        name: are_paired(base, open_images(sampled(tmp_path / f"{name}.npz", DARKER, **how)))  # type: ignore[arg-type]
        for name, how in like.items()
    }
    assert found == {"like": True, "seed": False, "classes": False, "format": False}
    assert not are_paired(base, open_images(sampled(tmp_path / "fewer.npz", DARKER[:80])))
    assert not are_paired(base, open_images(sampled(tmp_path / "small.npz", DARKER[:, ::2, ::2])))
    np.savez(tmp_path / "plain.npz", arr_0=SAMPLES, arr_1=np.arange(160) % 4)
    plain = open_images(tmp_path / "plain.npz")
    assert not are_paired(plain, plain)


def test_pairs_have_smaller_errors_and_can_be_said_or_denied(tmp_path: Path) -> None:
    noise = np.random.default_rng(5).integers(-8, 9, SAMPLES.shape)
    near = np.clip(SAMPLES.astype(int) + noise, 0, 255).astype(np.uint8)
    paths = [sampled(tmp_path / "a.npz", SAMPLES), sampled(tmp_path / "b.npz", near)]
    found = {
        paired: compare(REFERENCE, *paths, metrics="fid,recall", paired=paired, **HOW)
        for paired in (None, True, False)
    }
    errors = {}
    for paired, each in found.items():
        difference = each.difference("fid", 0, 1).difference
        assert difference is not None
        assert difference.paired == (paired is not False)
        errors[paired] = difference.stderr
    assert errors[None] == errors[True] < 0.5 * errors[False]
    plain = compare(REFERENCE, SAMPLES, near, metrics="fid,recall", **HOW).difference("fid", 0, 1)
    assert plain.difference is not None
    assert not plain.difference.paired
    assert "paired by index" in several.table(found[None])
    assert "paired by index" not in several.table(found[False])


def test_sets_of_different_numbers_or_classes_cannot_be_paired(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="160 in <array>, 150 in <array>"):
        compare(REFERENCE, SAMPLES, images(2, 150), paired=True, **HOW)
    paths = [sampled(tmp_path / "a.npz", SAMPLES), sampled(tmp_path / "b.npz", DARKER, classes=5)]
    with pytest.raises(InputError, match="have the same classes"):
        compare(REFERENCE, *paths, paired=True, **HOW)


# Runs of settings ------------------------------------------------------------------------------------------


def test_settings_are_compared_by_how_much_their_runs_vary() -> None:
    runs = [[SAMPLES, images(2), images(3)], [DARKER, images(4, low=40)]]
    found = compare(REFERENCE, runs=runs, metrics="fid,precision", **HOW)
    assert [setting.members for setting in found.settings] == [(0, 1, 2), (3, 4)]
    values = np.array([each["fid"] for each in found.comparisons])
    first = found.settings[0].scores["fid"]
    assert first.mean == pytest.approx(values[:3].mean())
    sampling = [each.score("fid").stderr_sampling for each in found.comparisons[:3]]  # type: ignore[union-attr]
    assert first.sampling == pytest.approx(np.sqrt(np.mean(np.square(sampling))))
    # The mean is no better known than sampling allows, though runs happen to be near each other.
    assert first.stderr == pytest.approx(max(values[:3].std(ddof=1), first.sampling) / np.sqrt(3))
    (pair,) = (pair for pair in found.pairs if pair.score == "fid")
    unbiased = np.array([each.score("fid").unbiased for each in found.comparisons])  # type: ignore[union-attr]
    assert pair.unbiased
    assert pair.difference is not None
    assert pair.difference.value == pytest.approx(unbiased[:3].mean() - unbiased[3:].mean())
    assert Comparisons.from_json(found.to_json()) == found
    text = several.table(found)
    assert "mean of the runs" in text
    assert "setting 2: <array> (4), <array> (5); standard deviation between runs" in text
    assert "Settings are tested at 5 % by how much their runs vary (Welch's t-test)" in text
    assert ", t = " in text


def test_runs_of_different_sizes_have_a_mean_without_bias_alone() -> None:
    """Their spread would be that of the bias."""
    runs = [[SAMPLES, images(2, 120)], [images(3), images(4)]]
    found = compare(REFERENCE, runs=runs, metrics="fid,precision", **HOW)
    assert "fid" not in found.settings[0].scores
    assert found.settings[0].unbiased["fid"].runs == 2
    assert "precision" not in found.settings[0].scores
    text = several.table(found)
    row = next(line for line in text.splitlines() if line.startswith("setting 1  "))
    assert row.split()[3] == "-"
    (pair,) = (pair for pair in found.pairs if pair.score == "fid")
    means = [setting.unbiased["fid"].mean for setting in found.settings]
    assert pair.difference is not None
    assert pair.difference.value == pytest.approx(means[0] - means[1])


def test_one_run_of_a_setting_is_not_enough_to_tell() -> None:
    runs = [[SAMPLES], [DARKER, images(2)], [images(3), images(4)]]
    found = compare(REFERENCE, runs=runs, metrics="fid,precision", **HOW)
    untested = [pair for pair in found.pairs if pair.difference is None]
    assert {(pair.first, pair.second) for pair in untested} == {(0, 1), (0, 2)}
    assert all("1 and 2 runs" in str(pair.why) for pair in untested)
    assert found.settings[0].scores["fid"].between is None


def test_runs_need_no_error_bars() -> None:
    """The spread of the runs is there without."""
    runs = [[SAMPLES, images(2)], [DARKER, images(3)]]
    found = compare(REFERENCE, runs=runs, metrics="precision", error_bars=False, **HOW)
    (pair,) = (pair for pair in found.pairs if pair.score == "precision")
    assert pair.difference is not None
    assert found.settings[0].scores["precision"].sampling is None


@pytest.mark.parametrize(
    ("samples", "runs", "message"),
    [
        ((), [], "no samples to compare"),
        ((SAMPLES,), [[SAMPLES], [DARKER]], "not both"),
        ((), [[SAMPLES, DARKER]], "1 setting with 2 runs"),
        ((), [[SAMPLES], [DARKER]], "2 settings with 1 and 1 runs"),
        ((), [[SAMPLES], []], "2 settings with 1 and 0 runs"),
        ((), "a.npz", "Give runs as lists"),
        ((), ["a.npz", "b.npz"], "Give runs as lists"),
    ],
)
def test_what_is_no_choice_of_samples_is_refused(samples: Any, runs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(REFERENCE, *samples, runs=runs, **HOW)


# Text ------------------------------------------------------------------------------------------------------


def test_the_table_names_the_best_and_what_stands() -> None:
    found = compare(REFERENCE, SAMPLES, DARKER, metrics="fid,precision", **HOW)
    lines = several.table(found).splitlines()
    rows = [line for line in lines if line.startswith("<array> (")]
    fid = [each.score("fid") for each in found.comparisons]
    assert [f"{score.value:.4f} ± {score.stderr:.4f}" in row for score, row in zip(fid, rows, strict=True)]  # type: ignore[union-attr]
    # Values without bias are compared, so they have the mark.
    assert rows[0].split()[6:8] == [f"{fid[0].unbiased:.4f}", "*"]  # type: ignore[union-attr]
    (verdict,) = (line for line in lines if line.startswith("FID: "))
    assert verdict.startswith("FID: <array> (1) is better than <array> (2) by ")
    (other,) = (line for line in lines if line.startswith("Precision: "))
    assert other.startswith("Precision: no difference shown between ")
    assert "Marks: * best, = not shown to differ from the best, no mark: worse than the best." in lines
    in_markdown = several.markdown(found)
    for line in (verdict, other):
        assert line in in_markdown
    header, rule, *_ = in_markdown.splitlines()
    assert header.count("|") == rule.count("|") == 7


def test_of_many_pairs_those_with_the_best_are_listed() -> None:
    found = compare(REFERENCE, *(images(seed) for seed in range(1, 6)), metrics="fid", subset=80, **HOW)
    assert all(pair.why for pair in found.pairs)  # of sums alone
    found = compare(REFERENCE, *(images(seed) for seed in range(1, 6)), metrics="recall", **HOW)
    lines = [line for line in several.table(found).splitlines() if line.startswith("Recall: ")]
    best = 1 + int(np.argmax([each["recall"] for each in found.comparisons]))
    assert len(lines) == 4
    assert all(f"<array> ({best})" in line for line in lines)
    assert len([pair for pair in found.pairs if pair.score == "recall"]) == 10


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["x/a.npz", "x/b.npz"], ["a.npz", "b.npz"]),
        (["x/1/a.npz", "x/2/a.npz"], ["1/a.npz", "2/a.npz"]),
        (["a.npz", "a.npz"], ["a.npz (1)", "a.npz (2)"]),
        (["s3://bucket/a.npz", "b.npz"], ["a.npz", "b.npz"]),
    ],
)
def test_labels_are_as_short_as_tells_them_apart(names: list[str], shown: list[str]) -> None:
    found = compare(REFERENCE, SAMPLES, metrics="recall", **HOW)
    record = json.loads(found.to_json())
    each = []
    for name in names:
        record["samples"]["name"] = name
        each.append(Comparison.from_json(json.dumps(record)))
    assert Comparisons(comparisons=tuple(each)).labels == shown


# Command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {"ref": REFERENCE, "a": SAMPLES, "b": DARKER, "c": images(2), "d": images(3, low=40)}
    for name, arr in found.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=arr)
    return {name: tmp_path / f"{name}.npz" for name in found}


@pytest.mark.usefixtures("pixels")
def test_command_with_several_sets(run: Invoke, files: dict[str, Path], tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    shown = run("compare", files["ref"], files["a"], files["b"], files["c"], "--json", record)
    assert "FID: a.npz is better than b.npz by " in shown.out
    found = Comparisons.from_json(record.read_text())
    assert several.table(found) == shown.out.rstrip("\n")
    adm = run("compare", files["ref"], files["a"], files["b"], "--format", "adm").out
    alone = [run("compare", files["ref"], files[name], "--format", "adm").out for name in "ab"]
    assert adm == f"a.npz\n{alone[0]}\nb.npz\n{alone[1]}"
    in_json = run("compare", files["ref"], files["a"], files["b"], "--format", "json", "--unpaired").out
    assert len(Comparisons.from_json(in_json).comparisons) == 2


@pytest.mark.usefixtures("pixels")
def test_command_with_runs(run: Invoke, files: dict[str, Path], tmp_path: Path) -> None:
    text = run(
        "compare", files["ref"], "--metrics", "fid,recall",
        "--runs", files["a"], files["c"], "--runs", files["b"], files["d"], "--seed", "1",
    ).out  # fmt: skip
    assert "setting 1: a.npz, c.npz" in text
    assert "setting 2: b.npz, d.npz" in text
    for folder, names in (("first", "ac"), ("second", "bd")):
        (tmp_path / folder / "run").mkdir(parents=True)
        files[names[0]].rename(tmp_path / folder / f"{names[0]}.npz")
        files[names[1]].rename(tmp_path / folder / "run" / f"samples_{names[1]}.npz")
    folders = run(
        "compare", files["ref"], "--metrics", "fid,recall",
        "--runs", tmp_path / "first", "--runs", tmp_path / "second",
    ).out  # fmt: skip

    def rows(each: str) -> list[str]:
        return [line for line in each.splitlines() if line.startswith("setting ") and "±" in line]

    assert rows(text) == rows(folders)
    assert len(rows(text)) == 2
    (tmp_path / "second" / "run").rename(tmp_path / "alone")
    mixed = run(
        "compare", files["ref"], "--metrics", "fid,recall",
        "--runs", tmp_path / "first", "--runs", tmp_path / "second" / "b.npz", tmp_path / "alone",
    ).out  # fmt: skip
    assert rows(mixed) == rows(text)


@pytest.mark.usefixtures("pixels")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{ref}"], "There are no samples to compare"),
        (["{ref}", "{a}", "--runs", "{b}", "{c}"], "not both"),
        (["{ref}", "--runs", "{a}", "{c}"], "1 setting with 2 runs"),
        (["--runs", "{a}", "{c}", "{ref}"], "put REFERENCE before it"),
        (["{ref}", "{a}", "--unpaired"], "with one set"),
        (["nowhere.npz", "{a}", "--paired"], "with one set"),  # before anything is opened
        (["{ref}", "--runs", "{a}", "{c}", "--runs", "{b}", "{c}", "--paired"], "with runs of settings"),
        (["{ref}", "--runs", "--runs", "{a}"], "--runs is followed by no run"),
        (["{ref}", "--runs", "{a}", "--runs", "{empty}"], "no npz or h5 file of samples"),
        (["{ref}", "--runs", "{a}", "", "--runs", "{b}"], "it is empty"),
        (["{ref}", "{a}", "{d}", "--paired"], "160 in"),
    ],
)
def test_command_says_what_is_wrong(
    run: Invoke, files: dict[str, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(files["d"], arr_0=images(3, 150))
    filled = [each.format(**files, empty=tmp_path / "empty") for each in arguments]
    failed = run("compare", *filled)
    assert failed.code == 2
    assert message in failed.err
    assert failed.out == ""
