"""What every metric promises, whatever it measures.

Each test runs over every row of METRICS, the same rows on another network, and every metric of every
protocol. A new row inherits all of them.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from optional import optional
from parsed import parsed
from stand_ins import NO_STORE, stand_in

from evalkit.comparability import reasons_of
from evalkit.comparison import compare
from evalkit.deviations import Deviations, HalfSplit, Influence
from evalkit.errors import FeatureError, InputError, UndefinedMetricError
from evalkit.features.moments import Moments
from evalkit.features.record import BatchFeatures, Features
from evalkit.images import open_images
from evalkit.metrics import METRICS, named
from evalkit.metrics.base import Metric, influence_of, with_error_bars
from evalkit.protocols import PROTOCOLS, protocol_named
from evalkit.report.html import page
from evalkit.report.plot import write_curves
from evalkit.report.text import FORMATS, sweep_table
from evalkit.results import Comparison, Point, PublishedRow, Score, Sweep
from evalkit.system.run import Run

CPU = Run(store=None, device="cpu")
N, D = 80, 12


def all_metrics() -> dict[str, Metric]:
    found = {f"METRICS[{row}]": named(row) for row in METRICS}
    for row in METRICS:
        try:
            found[f"{row}@pixels"] = named(f"{row}@pixels")
        except InputError:  # it is defined for its own network alone
            continue
    for name in PROTOCOLS:
        for metric in protocol_named(name).metrics:
            found[f"{name} {metric.scores[0].name}"] = metric
    return found


CASES = all_metrics()


@pytest.fixture(params=CASES, ids=list(CASES))
def metric(request: pytest.FixtureRequest) -> Metric:
    return CASES[request.param]


def rows(seed: int = 0, n: int = N, offset: float = 0.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((n, D)) + offset).astype(np.float32)


def needs_labels(metric: Metric) -> bool:
    return getattr(metric, "needs_labels", False)


def side(
    metric: Metric,
    array: NDArray[np.float32],
    *,
    as_gaussian: bool = False,
    labelled: bool | None = None,
    order: NDArray[np.int64] | slice = slice(None),
) -> BatchFeatures:
    """A batch in which every output that the metric needs has these rows, with labels where it needs them."""
    labels = np.arange(len(array)) % 4 if (needs_labels(metric) if labelled is None else labelled) else None
    array = array[order]
    networks: dict[str, list[str]] = {}
    for output in metric.needs:
        network, _, key = output.partition(":")
        networks.setdefault(network, []).append(key)
    return BatchFeatures.of(
        *(
            Features(
                name="batch",
                digest="",
                network=network,
                extractor=network,
                fingerprint="",
                arrays={} if as_gaussian else dict.fromkeys(keys, array),
                gaussians=dict.fromkeys(keys, Moments.of(array).gaussian()) if as_gaussian else {},
                labels=None if labels is None else labels[order],
            )
            for network, keys in networks.items()
        )
    )


def values(metric: Metric, reference: BatchFeatures, samples: BatchFeatures) -> list[float]:
    return [score.value for score in metric(reference, samples, CPU)]


def test_it_says_what_it_yields(metric: Metric) -> None:
    assert isinstance(metric, Metric)
    assert hash(metric) == hash(replace(metric))  # type: ignore[type-var]
    assert set(metric.needs.values()) <= {"rows", "gaussian"}
    assert all(output.count(":") == 1 for output in metric.needs)
    names = [spec.name for spec in metric.scores]
    assert names == list(dict.fromkeys(names)) != []
    for spec in metric.scores:
        assert spec.title
        assert "," not in spec.name  # which separates them in --metrics and CSV
    found = metric(side(metric, rows()), side(metric, rows(1)), CPU)
    assert [score.name for score in found] == names
    for score in found:
        assert type(score.value) is float
        assert math.isfinite(score.value)
        assert json.loads(json.dumps(dict(score.parameters))) == dict(score.parameters)
    assert found == metric(side(metric, rows()), side(metric, rows(1)), CPU)


def test_the_order_of_images_does_not_matter_or_it_says_so(metric: Metric) -> None:
    order = np.random.default_rng(9).permutation(N)
    expected = values(metric, side(metric, rows()), side(metric, rows(1)))
    found = values(metric, *(side(metric, rows(seed), order=order) for seed in (0, 1)))
    if getattr(metric, "depends_on_order", False):
        assert found != pytest.approx(expected, rel=1e-5)
    else:
        assert found == pytest.approx(expected, rel=1e-5)


def test_labels_do_not_matter_or_it_says_so(metric: Metric) -> None:
    without = [side(metric, rows(seed), labelled=False) for seed in (0, 1)]
    if needs_labels(metric):
        for missing in (0, 1):
            sides = [side(metric, rows(seed)) for seed in (0, 1)]
            sides[missing] = without[missing]
            with pytest.raises(UndefinedMetricError, match="batch has no labels"):
                metric(*sides, CPU)
    else:
        expected = values(metric, *(side(metric, rows(seed), labelled=True) for seed in (0, 1)))
        assert values(metric, *without) == expected


def test_nothing_is_closer_than_the_same_images(metric: Metric) -> None:
    same = values(metric, side(metric, rows()), side(metric, rows()))
    other = values(metric, side(metric, rows()), side(metric, rows(1, offset=3)))
    for spec, best, worse in zip(metric.scores, same, other, strict=True):
        direction = 1 if spec.higher_is_better else -1
        if getattr(metric, "finds_copies", False):
            assert direction * (best - worse) < 0  # these are copies, if any are
        elif metric.uses_reference:
            assert direction * (best - worse) >= 0
        else:
            assert values(metric, side(metric, rows(5)), side(metric, rows())) == same


def test_what_it_cannot_answer_is_refused(metric: Metric) -> None:
    good = side(metric, rows())
    nothing = replace(good, networks={key: replace(found, arrays={}) for key, found in good.networks.items()})
    with pytest.raises(UndefinedMetricError, match="batch has no"):
        metric(good, nothing, CPU)
    broken = rows()
    broken[7, 3] = np.nan
    with pytest.raises(FeatureError, match="image 7"):
        metric(good, side(metric, broken), CPU)
    try:
        found = metric(side(metric, rows(n=1)), side(metric, rows(n=1)), CPU)
    except UndefinedMetricError:
        return
    assert all(math.isfinite(score.value) for score in found)


def test_a_gaussian_is_enough_where_that_is_said(metric: Metric) -> None:
    sides = [side(metric, rows(seed), as_gaussian=True) for seed in (0, 1)]
    if "rows" in metric.needs.values():
        with pytest.raises(UndefinedMetricError):
            metric(*sides, CPU)
    else:
        expected = values(metric, side(metric, rows()), side(metric, rows(1)))
        assert values(metric, *sides) == pytest.approx(expected, rel=1e-4)


def test_it_has_a_standard_error_or_says_why_not(metric: Metric) -> None:
    reference, samples = side(metric, rows()), side(metric, rows(1, offset=0.3))
    scores = {score.name: score for score in metric(reference, samples, CPU)}
    found = influence_of(metric, reference, samples, CPU)
    assert list(found) == list(scores)
    for name, each in found.items():
        shown = with_error_bars(scores[name], each)
        assert replace(shown, **without_error_bars(scores[name])) == scores[name]
        if isinstance(each, str):
            assert each
            assert (shown.no_stderr, shown.stderr) == (each, None)
            continue
        check_deviations(each, has_reference=metric.uses_reference)
        assert shown.stderr == each.stderr
        assert shown.n == each.images == N
        assert (shown.unbiased is None) == (each.bias is None) == bool(each.no_bias)
    # The same again, and the score has not changed.
    assert [score.value for score in metric(reference, samples, CPU)] == [s.value for s in scores.values()]
    again = influence_of(metric, reference, samples, CPU)
    assert [getattr(each, "stderr", each) for each in again.values()] == [
        getattr(each, "stderr", each) for each in found.values()
    ]


def without_error_bars(score: Score) -> dict[str, object]:
    names = ("stderr", "stderr_sampling", "stderr_reference", "no_stderr", "unbiased", "n")
    return {name: getattr(score, name) for name in names}


def check_deviations(found: Deviations, *, has_reference: bool) -> None:
    assert has_reference == (found.reference is not None)
    sides = [found.samples] if found.reference is None else [found.samples, found.reference]
    if isinstance(found, HalfSplit):
        sides.append(found.both)
    for each in sides:
        assert each.dtype == np.float64
        assert np.isfinite(each).all()
        assert abs(each.mean()) < (1e-12 if isinstance(found, Influence) else 0.2) * np.abs(each).max()
        if isinstance(found, Influence):
            assert each.shape == (N,)
    for error in (found.stderr, found.stderr_sampling, found.stderr_reference):
        assert error is None or (type(error) is float and 0 < error < math.inf)
    json.dumps([found.stderr, found.stderr_sampling, found.stderr_reference, found.bias])


def test_it_has_no_standard_error_of_too_few_images(metric: Metric) -> None:
    """Two images: no number, or one that is finite; never an error of another kind."""
    sides = [side(metric, rows(seed, n=2)) for seed in (0, 1)]
    for each in influence_of(metric, *sides, CPU).values():
        assert isinstance(each, str) or math.isfinite(each.stderr)
    without = [replace(each, networks={}) for each in sides]
    for each in influence_of(metric, sides[0], without[1], CPU).values():
        assert isinstance(each, str)
        assert each


# In a comparison and in every report -------------------------------------------------------------------


def compared(metric: Metric, images: NDArray[np.uint8], **settings: object) -> Comparison:
    precision, shift = str(settings.pop("precision", "float32")), settings.pop("shift", 0)
    networks = {output.partition(":")[0] for output in metric.needs}
    sources = [open_images(images[start::2]) for start in (0, 1)]
    for source in sources:
        source.labels = np.arange(len(source)) % 3 if needs_labels(metric) else None
    if shift and sources[1].labels is not None:
        sources[1].labels[0] = 1  # classes of other sizes
    return compare(
        *sources,
        metrics=[metric],
        extractor=[stand_in(network, precision) for network in sorted(networks)],
        run=NO_STORE,
        **settings,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_of_torch_does_not_matter(
    metric: Metric, images: NDArray[np.uint8], dtype: torch.dtype
) -> None:
    """Training code may have set it."""
    before = torch.get_default_dtype()
    expected = compared(metric, images).scores
    torch.set_default_dtype(dtype)
    try:
        assert compared(metric, images).scores == expected
    finally:
        torch.set_default_dtype(before)


def test_another_draw_of_as_many_samples_has_the_same_parameters(
    metric: Metric, images: NDArray[np.uint8]
) -> None:
    """Else `evalkit table` would say that no two models may be compared."""
    others = images.copy()
    others[1::2] = others[1::2, ::-1]  # the samples
    found = compared(metric, images), compared(metric, others, shift=1)
    reasons = [reason.text for reason in reasons_of(found)]
    assert not [text for text in reasons if "label balance" not in text]


def test_it_is_shown_everywhere(metric: Metric, images: NDArray[np.uint8], tmp_path: Path) -> None:
    comparison = compared(metric, images)
    published = PublishedRow(
        dataset="d", model="m", scores={metric.scores[0].name: 1.25}, images=30, paper="p", table=1
    )
    bars = {"stderr": 0.5, "stderr_sampling": 0.4, "stderr_reference": 0.3, "unbiased": 1.5, "n": 30}
    shown = replace(
        comparison,
        published=(published,),
        scores=tuple(replace(score, **bars) for score in comparison.scores),
    )
    assert Comparison.from_json(shown.to_json()) == shown
    without: dict[str, Any] = dict.fromkeys((*bars, "no_stderr"))
    plain = replace(comparison, scores=tuple(replace(score, **without) for score in comparison.scores))
    earlier = json.loads(plain.to_json()) | {"format": "evalkit comparison 2"}
    for score in earlier["scores"]:
        for name in without:
            assert score.pop(name) is None
    assert Comparison.from_json(json.dumps(earlier)) == plain  # written before there were error bars
    sweep = Sweep(
        name="s", points=(Point(scale=0.0, comparison=comparison), Point(scale=1.0, comparison=comparison))
    )
    assert Sweep.from_json(sweep.to_json()) == sweep
    csv = sweep.to_csv().splitlines()
    for spec in metric.scores:
        value = comparison[spec.name]
        text = f"{value:.{spec.decimals}f}"
        for format_ in ("table", "markdown"):
            lines = [line for line in FORMATS[format_](shown).splitlines() if spec.title in line]
            assert any(text in line and spec.better in line for line in lines), format_
        assert spec.title in sweep_table(sweep)
        assert text in sweep_table(sweep)
        assert csv[1].split(",")[csv[0].split(",").index(spec.name)] == repr(value)
        assert f'"{spec.name}"' in FORMATS["json"](shown)
    assert "1.25" in FORMATS["table"](shown)
    FORMATS["adm"](shown)
    with optional("matplotlib", "plot").rc_context({"svg.fonttype": "none"}):
        write_curves(tmp_path / "curves.svg", [sweep])
    drawn = (tmp_path / "curves.svg").read_text()
    assert all(f">{spec.title}<" in drawn for spec in metric.scores)
    optional("jinja2", "report")
    tables = {
        each.one("caption").text: each.rows() for each in parsed(page([shown, comparison])).all("table")
    }
    (head, first, _), (_, *by_metric) = tables["Side by side"], tables["Scores"]
    for spec in metric.scores:
        text = spec.format(comparison[spec.name])
        assert first[head.index(f"{spec.title} {spec.better} is better")].startswith(text)
        assert any(row[0] == spec.title and row[1].startswith(text) for row in by_metric)


def test_what_is_missing_is_shown_with_its_reason(metric: Metric, images: NDArray[np.uint8]) -> None:
    full = compared(metric, images)
    names = [spec.name for spec in metric.scores]
    without = replace(full, scores=(), missing=dict.fromkeys([*names, *full.missing], "the moon is full"))
    sweep = Sweep(name="s", points=(Point(scale=0.0, comparison=without),))
    for spec in metric.scores:
        for text in (FORMATS["table"](without), FORMATS["markdown"](without), sweep_table(sweep)):
            assert any(spec.title in line and "the moon" in line for line in text.splitlines())
    assert Comparison.from_json(without.to_json()) == without


def test_a_subset_and_a_reduced_precision_are_recorded(
    metric: Metric, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evalkit.comparison.precision_check.LEAST", 128)  # too few, and some are undefined
    some = compared(metric, images, subset=20)
    for score in some.scores:
        assert ("subset" in score.parameters) == ("rows" in metric.needs.values())
    if needs_labels(metric):
        assert all("leave out the subset" in some.missing[spec.name] for spec in metric.scores)
    else:
        assert [score.name for score in some.scores] == [spec.name for spec in metric.scores]
    reduced = compared(metric, images, precision="bfloat16")
    names = {spec.name for spec in metric.scores}
    assert set(reduced.precision_check["bfloat16"]) == set(reduced.precision_check["float32"]) == names
    moved = next(
        line for line in FORMATS["table"](reduced).splitlines() if line.startswith("precision check")
    )
    assert all(spec.title in moved for spec in metric.scores)
