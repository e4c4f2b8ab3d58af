"""The table of a sweep, and its CSV: which scales differ from the best."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evalkit.batches import Batch
from evalkit.pairs import Difference, Pair, pairs_with_best
from evalkit.protocols import protocol_named
from evalkit.report.text import sweep_table
from evalkit.results import Comparison, Point, Score, ScoreSpec, Sweep

BATCH = Batch(
    name="x.npz", images=800, image_shape=(8, 8, 3), digest="0", statistics="images", features="extracted"
)
FID, RECALL = (
    next(spec for metric in protocol_named("exact").metrics for spec in metric.scores if spec.name == name)
    for name in ("fid", "recall")
)

MARKS = (
    "±: standard error from the draw of the images; * best, = not shown to differ from the best: tested at "
    "5 %, corrected for all pairs of scales in each score (Holm); "
    "images of the same noise and class are paired"
)


def pair(
    score: str, first: int, second: int, p: float, *, paired: bool = True, unbiased: bool = False
) -> Pair:
    found = Difference(value=1.0, stderr=0.5, z=2.0, p=p / 3, paired=paired)
    return Pair(score=score, first=first, second=second, difference=found, corrected=p, unbiased=unbiased)


def untested(score: str, first: int, second: int, why: str) -> Pair:
    return Pair(score=score, first=first, second=second, why=why)


def sweep_of(fid: list[Score | None], recall: list[Score | None], *pairs: Pair) -> Sweep:
    """At scales 0, 1 and 10; a score that is None was not computed."""
    points = []
    for scale, *scores in zip((0.0, 1.0, 10.0), fid, recall, strict=True):
        comparison = Comparison(
            specs=(FID, RECALL),
            scores=tuple(score for score in scores if score is not None),
            missing={
                name: "too few images"
                for name, score in zip(("fid", "recall"), scores, strict=True)
                if score is None
            },
            protocol="exact",
            reference=BATCH,
            samples=BATCH,
            extractors={"inception": {"name": "pixels", "fingerprint": "0"}},
            warnings=("800 images are few",),
        )
        points.append(Point(scale=scale, comparison=comparison))
    return Sweep(name="ours", points=tuple(points), pairs=pairs)


def fid(value: float, stderr: float | None = 0.25, unbiased: float | None = None) -> Score:
    return Score(name="fid", value=value, stderr=stderr, unbiased=unbiased)


def recall(value: float) -> Score:
    return Score(name="recall", value=value, stderr=0.01)


@pytest.fixture
def paired() -> Sweep:
    """FID is best at scale 1 with its bias, and at 0 without."""
    return sweep_of(
        [fid(20.5, unbiased=18), fid(20.25, unbiased=18.5), fid(112.5, unbiased=110)],
        [recall(0.5), recall(0.75), recall(0.7)],
        *(pair("fid", 0, 1, 0.2, unbiased=True), pair("fid", 0, 2, 1e-9, unbiased=True)),
        pair("fid", 1, 2, 1e-9, unbiased=True),
        *(pair("recall", 0, 1, 0.04999), pair("recall", 0, 2, 0.9), pair("recall", 1, 2, 0.05)),
    )


def test_the_best_scales_are_marked(paired: Sweep) -> None:
    assert sweep_table(paired).splitlines() == [
        "   scale                FID             Recall",
        "       0   20.5000 ± 0.2500 *  0.5000 ± 0.0100",
        "       1   20.2500 ± 0.2500 =  0.7500 ± 0.0100 *",
        "      10  112.5000 ± 0.2500    0.7000 ± 0.0100 =",
        f"{MARKS}; of FID the values without bias are compared.",
        "warning: 800 images are few",
    ]


def test_csv_has_p_against_the_best(paired: Sweep) -> None:
    header, *rows = (line.split(",") for line in paired.to_csv().splitlines())
    assert header[:4] == ["scale", "fid", "recall", "samples"]
    assert header[4:7] == ["fid_stderr", "fid_unbiased", "fid_from_best"]
    assert header[7:] == ["recall_stderr", "recall_from_best"]
    found = [[row[header.index(f"{name}_from_best")] for row in rows] for name in ("fid", "recall")]
    assert found == [["", "0.2", "1e-09"], ["0.04999", "", "0.05"]]


@pytest.mark.parametrize(
    ("of_pairs", "told"),
    [
        ((True, True, True), "images of the same noise and class are paired."),
        ((False, False, False), "images are not paired."),
        ((False, False, True), "images of the same noise and class are paired, where two scales have such."),
    ],
)
def test_what_is_paired_is_told(paired: Sweep, of_pairs: tuple[bool, ...], told: str) -> None:
    pairs = tuple(
        pair("fid", *which, 0.5, paired=each)
        for which, each in zip(((0, 1), (0, 2), (1, 2)), of_pairs, strict=True)
    )
    text = sweep_table(replace(paired, pairs=pairs))
    assert f"(Holm); {told}" in text
    assert "without bias" not in text


def test_a_score_without_pairs_has_no_marks_and_its_reason_once() -> None:
    why = "only sums were kept"
    pairs = [untested("fid", i, j, why) for i, j in ((0, 1), (0, 2), (1, 2))]
    scores = [fid(value, None) for value in (20.5, 20.25, 112.5)], [recall(0.5), recall(0.75), recall(0.7)]
    recalls = [pair("recall", i, j, 0.5) for i, j in ((0, 1), (0, 2), (1, 2))]
    header, *rows, marks, reason, _ = sweep_table(sweep_of(*scores, *pairs, *recalls)).splitlines()
    assert header == "   scale       FID           Recall"
    assert rows == [
        "       0   20.5000  0.5000 ± 0.0100 =",
        "       1   20.2500  0.7500 ± 0.0100 *",
        "      10  112.5000  0.7000 ± 0.0100 =",
    ]
    assert marks.startswith("±: ")
    assert reason == f"FID: scales were not compared: {why}"
    both = pairs + [replace(each, score="recall") for each in pairs]
    # No pair of recall was tested either, and it has bars.
    *_, marks, reason, _ = sweep_table(sweep_of(*scores, *both)).splitlines()
    assert marks == "±: standard error from the draw of the images."
    assert reason == f"FID and Recall: scales were not compared: {why}"
    no_bars = scores[0], [replace(each, stderr=None) for each in scores[1]]
    assert "±" not in sweep_table(sweep_of(*no_bars, *both))
    assert sweep_table(sweep_of(*no_bars)).splitlines()[1:] == [
        "       0   20.5000    0.5000",
        "       1   20.2500    0.7500",
        "      10  112.5000    0.7000",
        "warning: 800 images are few",
    ]


def test_a_scale_that_could_not_be_compared_is_marked_as_such() -> None:
    pairs = pair("fid", 0, 1, 0.01), untested("fid", 0, 2, "singular"), untested("fid", 1, 2, "singular")
    found = sweep_of([fid(20.5), fid(30), fid(90, None)], [None, recall(0.5), recall(0.6)], *pairs)
    assert sweep_table(found).splitlines()[:-1] == [
        "   scale               FID             Recall",
        "       0  20.5000 ± 0.2500 *       -",
        "       1  30.0000 ± 0.2500    0.5000 ± 0.0100",
        "      10  90.0000          ?  0.6000 ± 0.0100",
        f"{MARKS}.".replace("(Holm); ", "(Holm); ? not tested against the best; "),
        "FID: some scales were not compared: singular",
        "Recall was not computed: too few images",
    ]
    assert [line.split(",")[-2] for line in found.to_csv().splitlines()] == ["fid_from_best", "", "0.01", ""]


@pytest.mark.parametrize("spec", [FID, RECALL])
def test_the_best_is_chosen_by_what_the_pairs_compare(spec: ScoreSpec) -> None:
    direction = 1 if spec.higher_is_better else -1
    values, unbiased = [direction * each for each in (3, 2, 1)], [direction * each for each in (1, 2, 3)]
    pairs = [pair("x", i, j, 0.5, unbiased=True) for i, j in ((0, 1), (0, 2), (1, 2))]
    by = {"higher_is_better": spec.higher_is_better}
    assert pairs_with_best(pairs, values, unbiased, **by) == {0: pairs[1], 1: pairs[2], 2: None}
    # One pair compares values with their bias, so that these decide.
    pairs[0] = replace(pairs[0], unbiased=False)
    assert pairs_with_best(pairs, values, unbiased, **by) == {0: None, 1: pairs[0], 2: pairs[1]}
    # Scales without the score take no part, and what could not be tested does not matter.
    pairs = [untested("x", 0, 1, "none"), untested("x", 0, 2, "none"), pair("x", 1, 2, 0.5)]
    assert pairs_with_best(pairs, [None, *values[1:]], [None] * 3, **by) == {1: None, 2: pairs[2]}
    assert pairs_with_best(pairs[:2], values, unbiased, **by) == {}
    assert pairs_with_best([], values, unbiased, **by) == {}
