"""Scores within classes, in a table, in Markdown and side by side: ranked, and with what was left out."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from stand_ins import NO_STORE, InceptionPixels

from evalkit.comparison import compare
from evalkit.images import open_images
from evalkit.report import several
from evalkit.report.classes import class_lines
from evalkit.report.text import markdown, sweep_table, table
from evalkit.results import Comparison, Point, Score, ScoreSpec, Sweep
from evalkit.several import Comparisons

LOWER = ScoreSpec(name="class_fid", title="Class FID", higher_is_better=False, decimals=2)
HIGHER = replace(LOWER, name="class_recall", title="Class recall", higher_is_better=True)
VALUES = {"0": 5.0, "1": 2.0, "2": 9.0, "3": 2.0}


def score(values: dict[str, float], **parameters: object) -> Score:
    return Score(name="class_fid", value=4.5, std=1.25, parameters=parameters, by_class=values)


def test_few_classes_are_all_shown_and_equal_ones_keep_their_order() -> None:
    assert class_lines(LOWER, score(VALUES)) == [
        "classes, best first: 1 (2.00), 3 (2.00), 0 (5.00), 2 (9.00)"
    ]
    assert class_lines(HIGHER, score(VALUES)) == [
        "classes, best first: 2 (9.00), 0 (5.00), 1 (2.00), 3 (2.00)"
    ]


def test_of_many_classes_the_best_and_the_worst_are_shown() -> None:
    many = {str(label): float(label % 7 * 10 + label / 100) for label in range(11)}
    assert class_lines(LOWER, score(many, left_out=0)) == [
        "best of 11 classes: 0 (0.00), 7 (0.07), 1 (10.01), 8 (10.08), 2 (20.02)",
        "worst: 6 (60.06), 5 (50.05), 4 (40.04), 10 (30.10), 3 (30.03)",
    ]


@pytest.mark.parametrize(("count", "text"), [(1, "1 class is"), (1200, "1,200 classes are")])
def test_what_is_left_out_is_said(count: int, text: str) -> None:
    lines = class_lines(LOWER, score(VALUES, left_out=count, least_images=4))
    assert lines[-1] == f"{text} left out, with fewer than 4 images in the reference or the samples"


def test_scores_that_are_not_of_classes_have_no_such_lines() -> None:
    assert class_lines(LOWER, score({}, left_out=3)) == []


def compared(images: NDArray[np.uint8], labels: list[int]) -> Comparison:
    reference, samples = open_images(images[::2]), open_images(images[1::2])
    reference.labels, samples.labels = np.array(labels), np.array(labels)
    return compare(reference, samples, metrics="class_fid,fid", extractor=InceptionPixels(), run=NO_STORE)


def test_it_is_in_every_table(images: NDArray[np.uint8]) -> None:
    comparison = compared(images, [3] * 14 + [5] * 15 + [6])
    within = comparison.score("class_fid")
    assert within is not None
    assert within.std is not None
    best, worst = sorted(within.by_class.items(), key=lambda each: each[1])
    ranked = f"classes, best first: {best[0]} ({best[1]:.4f}), {worst[0]} ({worst[1]:.4f})"
    absent = "1 class is left out, with fewer than 2 images in the reference or the samples"
    lines = table(comparison).splitlines()
    row = next(number for number, line in enumerate(lines) if line.startswith("Class FID"))
    assert lines[row].endswith(f"lower   (± {within.std:.4f} over classes)")
    assert lines[row + 1 : row + 3] == [f"  {ranked}", f"  {absent}"]
    assert f"\nClass FID, {ranked}; {absent}.\n" in markdown(comparison)
    assert Comparison.from_json(comparison.to_json()) == comparison

    other = compared(images, [3] * 13 + [5] * 15 + [6, 7])
    both = Comparisons(comparisons=(comparison, other))
    shown = several.table(both)
    assert f"{within.value:.4f}" in shown
    assert f"<array> (1): Class FID: {absent}" in shown
    assert f"<array> (2): Class FID: {absent.replace('1 class is', '2 classes are')}" in shown
    points = (Point(scale=0.0, comparison=comparison), Point(scale=1.0, comparison=other))
    assert f"{within.value:.4f}" in sweep_table(Sweep(name="s", points=points))


def test_records_without_classes_are_read(images: NDArray[np.uint8]) -> None:
    comparison = compared(images, [0, 1] * 15)
    earlier = json.loads(comparison.to_json())
    for each in earlier["scores"]:
        del each["by_class"]
    found = Comparison.from_json(json.dumps(earlier))
    assert found.scores == tuple(replace(each, by_class={}) for each in comparison.scores)
