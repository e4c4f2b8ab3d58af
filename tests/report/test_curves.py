"""Sweeps as records and as figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from invoked import Result
from optional import optional
from PIL import Image

from evalkit.batches import Batch
from evalkit.errors import InputError
from evalkit.protocols import protocol_named
from evalkit.report import plot
from evalkit.results import Comparison, Point, PublishedRow, Score, Sweep
from reference_batches.published import curves

Invoke = Callable[..., Result]
BATCH = Batch(
    name="x.npz", images=800, image_shape=(8, 8, 3), digest="0", statistics="images", features="extracted"
)
SPECS = tuple(spec for metric in protocol_named("adm").metrics for spec in metric.scores)
HEADLESS = {"inception_score": "the weights have no classifier head"}


def write_curves(*arguments: Any) -> None:
    optional("matplotlib", "plot")
    plot.write_curves(*arguments)


def comparison(**scores: float) -> Comparison:
    return Comparison(
        specs=SPECS,
        scores=tuple(Score(name=name, value=value) for name, value in scores.items()),
        missing={} if "inception_score" in scores else HEADLESS,
        protocol="exact",
        reference=BATCH,
        samples=BATCH,
        extractors={"inception": {"name": "pixels", "fingerprint": "0"}},
    )


@pytest.fixture
def headless() -> Sweep:
    rows = [(0, 28.4, 0.4, 0.87), (1, 26.6, 0.49, 0.83), (4, 25.8, 0.52, 0.73)]
    points = [
        Point(
            scale=float(scale),
            comparison=comparison(fid=fid, sfid=2 * fid, precision=precision, recall=recall),
        )
        for scale, fid, precision, recall in rows
    ]
    return Sweep(name="digits", points=tuple(points), settings={"seed": 0})


@pytest.fixture
def scored() -> Sweep:
    points = [
        Point(
            scale=scale,
            comparison=comparison(
                fid=5 + (scale - 1) ** 2,
                sfid=6.0,
                inception_score=100 + 50 * scale,
                precision=0.7 + scale / 50,
                recall=0.6 - scale / 50,
            ),
        )
        for scale in (0.0, 0.5, 1.0, 2.0)
    ]
    return Sweep(name="ours", points=tuple(points))


def texts(path: Path) -> list[str]:
    """What an SVG says, with its text kept as text."""
    return [
        "".join(node.itertext()).strip()
        for node in ElementTree.parse(path).iter()
        if node.tag.endswith("text")
    ]


def test_json_both_ways(headless: Sweep, scored: Sweep) -> None:
    for sweep in (headless, scored):
        assert Sweep.from_json(sweep.to_json()) == sweep


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "evalkit sweep 1", "points": []}', "null"])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="Not a sweep written by evalkit"):
        Sweep.from_json(text)


def test_csv(headless: Sweep) -> None:
    assert headless.to_csv().splitlines() == [
        "scale,fid,sfid,inception_score,precision,recall,samples",
        "0,28.4,56.8,,0.4,0.87,800",
        "1,26.6,53.2,,0.49,0.83,800",
        "4,25.8,51.6,,0.52,0.73,800",
    ]


@pytest.fixture
def with_bars(headless: Sweep) -> Sweep:
    """The last scale has no bars."""
    *points, last = headless.points

    def barred(point: Point) -> Point:
        scores = tuple(
            replace(score, stderr=score.value / 10, unbiased=score.value - 1 if score.name == "fid" else None)
            for score in point.comparison.scores
        )
        return replace(point, comparison=replace(point.comparison, scores=scores))

    return replace(headless, points=(*map(barred, points), last))


def test_csv_has_what_is_known_of_errors_at_its_end(headless: Sweep, with_bars: Sweep) -> None:
    plain, lines = (sweep.to_csv().splitlines() for sweep in (headless, with_bars))
    more = "fid_stderr,fid_unbiased,sfid_stderr,precision_stderr,recall_stderr"
    assert lines[0] == f"{plain[0]},{more}"
    errors = [28.4 / 10, 27.4, 56.8 / 10, 0.4 / 10, 0.87 / 10]
    assert lines[1] == ",".join([plain[1], *map(repr, errors)])
    assert lines[-1] == f"{plain[-1]},,,,,"


def test_records_from_before_standard_errors_are_read(headless: Sweep, with_bars: Sweep) -> None:
    later = ("stderr", "stderr_sampling", "stderr_reference", "no_stderr", "unbiased", "n")
    record = json.loads(headless.to_json())
    assert record["format"] == "evalkit sweep 5"
    for point in record["points"]:
        one = point["comparison"]
        assert one.pop("byte_rules") == {}
        for batch in (one["reference"], one["samples"]):
            assert [batch.pop(name) for name in ("statistics_preprocess", "source", "labels")] == [
                None,
                "",
                None,
            ]
        for score in one["scores"]:
            assert [score.pop(name) for name in ("outputs", "reference")] == [[], None]
    assert Sweep.from_json(json.dumps(record | {"format": "evalkit sweep 4"})) == headless
    first = record["points"][0]["comparison"] | {"format": "evalkit comparison 3"}
    assert Comparison.from_json(json.dumps(first)) == headless.points[0].comparison
    assert record.pop("pairs") == []
    assert Sweep.from_json(json.dumps(record | {"format": "evalkit sweep 3"})) == headless
    record["format"] = "evalkit sweep 2"
    for point in record["points"]:
        for score in point["comparison"]["scores"]:
            for name in later:
                assert score.pop(name) is None
    assert Sweep.from_json(json.dumps(record)) == headless
    one = record["points"][0]["comparison"] | {"format": "evalkit comparison 2"}
    assert Comparison.from_json(json.dumps(one)) == headless.points[0].comparison
    assert Sweep.from_json(with_bars.to_json()) == with_bars


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_same_sweeps_give_the_same_figure(
    headless: Sweep, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    write_curves(tmp_path / f"a{suffix}", [headless])
    write_curves(tmp_path / f"b{suffix}", [headless])
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_the_figure_shows_the_curves(headless: Sweep, tmp_path: Path) -> None:
    write_curves(tmp_path / "a.png", [headless])
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    blue = np.abs(pixels - [0x00, 0x72, 0xB2]).max(axis=1) < 8
    assert blue.sum() > 3000


@pytest.fixture
def text_in_svg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(optional("matplotlib", "plot").rcParams, "svg.fonttype", "none")


@pytest.mark.usefixtures("text_in_svg")
def test_a_missing_score_is_left_out_with_its_reason(headless: Sweep, tmp_path: Path) -> None:
    write_curves(tmp_path / "a.svg", [headless])
    found = texts(tmp_path / "a.svg")
    assert found.count("guidance scale") == 4
    assert "Inception Score" not in found
    assert "Inception Score was not computed: the weights" in " ".join(found).replace("\n", " ")
    assert "digits, 800 samples" in found
    assert [text for text in found if text in ("0", "1", "4")][-3:] == ["0", "1", "4"]  # at the points


@pytest.mark.usefixtures("text_in_svg")
@pytest.mark.parametrize(
    ("name", "shown"), [("a_b^c$$", "a_b^c$$"), ("$x$", "$x$"), ("_digits", "_digits"), ("\ud800\0", "??")]
)
@pytest.mark.usefixtures("text_in_svg")
def test_any_name_is_shown_as_it_is(headless: Sweep, tmp_path: Path, name: str, shown: str) -> None:
    path = tmp_path / "x.svg"
    write_curves(path, [replace(headless, name=name)])
    assert any(text.strip() == f"{shown}, 800 samples" for text in texts(path))


@pytest.mark.usefixtures("text_in_svg")
def test_published_points_have_names_and_are_counted_where_left_out(scored: Sweep, tmp_path: Path) -> None:
    write_curves(tmp_path / "a.svg", [scored], curves("imagenet256"))
    found = texts(tmp_path / "a.svg")
    assert found.count("guidance scale") == 5
    for name in ("ADM-G", "ADM-U", "DiT-XL/2", "LDM-4, evaluator unstated"):
        assert f"{name} (published)" in found
    assert "published points lie outside" in " ".join(found)


@pytest.mark.usefixtures("text_in_svg")
def test_points_of_one_model_are_joined(scored: Sweep, tmp_path: Path) -> None:
    rows = [
        PublishedRow(
            dataset="d",
            model="M",
            scores={"fid": 5.0 + scale, "inception_score": 100.0 + 50 * scale},
            images=50_000,
            paper="p",
            table=1,
            scale=scale,
        )
        for scale in (1.0, 0.5)
    ]
    dotted = []
    for drawn in (rows[:1], rows):
        write_curves(tmp_path / "a.svg", [scored], drawn)
        paths = [node.attrib for node in ElementTree.parse(tmp_path / "a.svg").iter() if "d" in node.attrib]
        dotted.append(sum("dasharray" in path.get("style", "") and "L" in path["d"] for path in paths))
    assert dotted == [1, 4]  # in the legend; and in the panels of FID, of the Inception Score, and of both


@pytest.mark.usefixtures("text_in_svg")
def test_bars_are_drawn_and_explained(headless: Sweep, with_bars: Sweep, tmp_path: Path) -> None:
    for name, sweep in (("without", headless), ("with", with_bars)):
        write_curves(tmp_path / f"{name}.svg", [sweep])
    plain, barred = (tmp_path / f"{name}.svg" for name in ("without", "with"))
    words = "Bars: one standard error"
    assert words in " ".join(texts(barred))
    assert words not in " ".join(texts(plain))
    # One for FID, sFID, precision and recall; two where recall is the other axis, and two in the legend.
    collections = [file.read_text().count('id="LineCollection') for file in (plain, barred)]
    assert collections == [0, 8]


@pytest.mark.parametrize("count", [0, 7])
def test_too_many_or_none(headless: Sweep, tmp_path: Path, count: int) -> None:
    with pytest.raises(InputError, match=f"{count} sweeps; one figure shows 1 to 6"):
        write_curves(tmp_path / "a.png", [headless] * count)


@pytest.mark.usefixtures("text_in_svg")
def test_different_references_are_said(headless: Sweep, scored: Sweep, tmp_path: Path) -> None:
    other = replace(headless.points[0].comparison, reference=replace(BATCH, digest="1"))
    write_curves(
        tmp_path / "a.svg", [scored, Sweep(name="other", points=(Point(scale=0.0, comparison=other),))]
    )
    assert "measured against different" in " ".join(texts(tmp_path / "a.svg"))
    write_curves(tmp_path / "b.svg", [scored, headless])
    assert "measured against different" not in " ".join(texts(tmp_path / "b.svg"))


def test_one_scale_and_equal_values_can_be_drawn(tmp_path: Path) -> None:
    point = Point(scale=1.5, comparison=comparison(fid=1.0, sfid=1.0, precision=1.0, recall=1.0))
    write_curves(tmp_path / "a.png", [Sweep(name="x", points=(point,))])
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_command(headless: Sweep, scored: Sweep, tmp_path: Path, run: Invoke) -> None:
    optional("matplotlib", "plot")
    for name, sweep in (("a", headless), ("b", scored)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(sweep.to_json())
    out = tmp_path / "curves.png"
    result = run(
        "curves", tmp_path / "a", tmp_path / "b" / "results.json", "-o", out, "--published", "imagenet256"
    )
    assert (result.code, result.out) == (0, f"wrote {out}\n")
    with Image.open(out) as picture:
        width, height = picture.size
    assert math.isclose(width / height, 4 * 3.6 / 6.8, rel_tol=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "-o", "{tmp}/c.png"], "nowhere: there is no such file"),
        (["{tmp}", "-o", "{tmp}/c.png"], "results.json: there is no such file"),
        (["{tmp}/other.json", "-o", "{tmp}/c.png"], "Not a sweep"),
        (["{tmp}/bytes.json", "-o", "{tmp}/c.png"], "Not a sweep"),
        (["{tmp}/a.json", "-o", "{tmp}/c.jpg"], "a figure ends in .pdf, .png, .svg"),
        (["{tmp}/a.json", "-o", "{tmp}/c.png", "--published", "mnist"], "mnist"),
        (["{tmp}/a.json", "-o", "{tmp}/c.png", "--published", "cifar10"], "at several guidance scales"),
        (["{tmp}/a.json", "-o", "{tmp}/no/c.png"], "there is no folder"),
    ],
)
def test_bad_input(headless: Sweep, tmp_path: Path, run: Invoke, arguments: list[str], message: str) -> None:
    (tmp_path / "a.json").write_text(headless.to_json())
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "bytes.json").write_bytes(b"PK\xff\xfe")
    result = run("curves", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.code == 2
    assert message in result.err
    assert not list(tmp_path.glob("c.*"))
