"""Pages of HTML: what they show, what they may not do, and what is read aloud."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invoked import Result
from optional import optional
from parsed import Node, parsed
from PIL import Image, PngImagePlugin
from shown import (
    FID,
    HEADLESS,
    HOSTILE,
    KINDS,
    hostile,
    one,
    several,
    sweep,
    with_classes,
    with_published,
)

from evalkit.errors import InputError
from evalkit.report import html
from evalkit.report import several as in_text
from evalkit.report.html import page, write_page
from evalkit.report.pictures import Picture, read_picture
from evalkit.report.sections import side_by_side
from evalkit.report.tables import Record, sets_of
from evalkit.report.text import FORMATS
from evalkit.results import NOT_REQUESTED, Comparison, ScoreSpec, Sweep
from evalkit.several import Comparisons

Invoke = Callable[..., Result]


@pytest.fixture(autouse=True)
def _needed() -> None:
    optional("jinja2", "report")
    optional("matplotlib", "report")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@cache
def page_of(kind: str) -> Node:
    """The page of a record alone."""
    return parsed(page([KINDS[kind]()]))


def table(tree: Node, caption: str) -> list[list[str]]:
    found = [each for each in tree.all("table") if each.one("caption").text == caption]
    assert len(found) == 1, f"{len(found)} tables are called {caption}"
    return found[0].rows()


def lists(tree: Node, kind: str) -> list[Node]:
    return [each for each in tree.all("ul") if each.attributes.get("class") == kind]


# What a page shows -----------------------------------------------------------------------------------------


def test_every_score_of_every_kind_is_shown(kind: str) -> None:
    record, tree = KINDS[kind](), page_of(kind)
    lines = [row for each in tree.all("table") for row in each.rows()]
    for name, comparison in sets_of(record):
        label = "FID" if isinstance(record, Comparison) else name
        for score in comparison.scores:
            spec = next(spec for spec in comparison.specs if spec.name == score.name)
            label = spec.title if isinstance(record, Comparison) else name
            shown = f"{spec.format(score.value)} ± {spec.format(score.stderr or 0)}"
            assert any(row[0] == label and any(shown in cell for cell in row) for row in lines), shown
            if score.unbiased is not None:
                assert any(
                    row[0] == label and any(spec.format(score.unbiased) in cell for cell in row)
                    for row in lines
                )
    assert HEADLESS in tree.text
    assert "holds 2,500 images" in tree.text


def test_a_metric_is_a_row_where_there_is_one_set() -> None:
    assert table(parsed(page([one(unbiased=11.5)])), "Scores") == [
        ["metric", "value", "unbiased", "better", "notes"],
        ["FID", "12.3456 ± 0.2500", "11.5000", "lower", ""],
        ["Inception Score", "–", "–", "higher", f"not computed: {HEADLESS}"],
        ["Recall", "0.6250 ± 0.0125", "–", "higher", ""],
    ]


def test_what_was_not_requested_has_no_row() -> None:
    """Otherwise it would be an empty table."""
    found = replace(one(), missing={"inception_score": NOT_REQUESTED})
    assert [row[0] for row in table(parsed(page([found])), "Scores")] == ["metric", "FID", "Recall"]
    line = "Inception Score not computed: not requested"
    assert line in parsed(page([found])).text
    for shown in (FORMATS["table"](found), FORMATS["markdown"](found)):
        assert shown.count("not requested") == 1
        assert line in shown.splitlines()


def test_marks_are_words_and_stand_at_what_was_compared() -> None:
    best, like = "*(best)", "=(not shown to differ from the best)"
    lower, higher = " lower is better", " higher is better"
    assert table(page_of("several"), "Scores") == [
        ["samples", f"FID{lower}", "FID, unbiased", f"Recall{higher}", "images"],
        ["a/samples.npz", "12.5000 ± 0.2500", f"11.5000 {best}", "0.6250 ± 0.0125", "2,500"],
        ["b/samples.npz", "12.5500 ± 0.2500", f"11.5500 {like}", f"0.6875 ± 0.0125 {like}", "2,500"],
        ["c.npz", "14.2500 ± 0.2500", "13.2500", f"0.6896 ± 0.0125 {best}", "2,500"],
    ]


@pytest.mark.parametrize("kind", ["several", "five", "settings"], indirect=True)
def test_verdicts_are_those_of_the_terminal(kind: str) -> None:
    found = KINDS[kind]()
    assert isinstance(found, Comparisons)
    tree = page_of(kind)
    (verdicts,) = lists(tree, "verdicts")
    assert [item.text for item in verdicts.all("li")] == in_text.verdicts(found)
    assert all(" ".join(note.split()) in tree.text for note in in_text.legend(found))
    # All pairs are in a table, where the verdicts are not all.
    listed = [each for each in tree.all("caption") if each.text == "All differences"]
    assert len(listed) == (kind == "five")
    if listed:
        assert len(table(tree, "All differences")) == 1 + len(found.pairs) == 21
        assert "and the table of all differences has the others" in tree.text
        assert ["FID", "a.npz", "c.npz", "-1.7500 ± 0.5833", "-3.0", "0.001", "a.npz is better"] in table(
            tree, "All differences"
        )


def test_settings_come_before_their_runs() -> None:
    tree = page_of("settings")
    assert table(tree, "Means of the settings")[1:] == [
        ["setting 1", "2", "12.5125 ± 0.0500 *(best)"],
        ["setting 2", "2", "13.6875 ± 0.0500"],
    ]
    assert [row[0] for row in table(tree, "Scores of the runs")[1:]] == [
        "a1.npz",
        "a2.npz",
        "b1.npz",
        "b2.npz",
    ]


def test_a_sweep_says_which_scale_is_best() -> None:
    tree = page_of("sweep")
    (verdicts,) = lists(tree, "verdicts")
    assert [item.text for item in verdicts.all("li")] == [
        "FID: best at guidance scale 0.5; not shown to differ from the best: 1; worse than the best: 0, 4",
        "Recall: best at guidance scale 0; worse than the best: 0.5, 1, 4",
    ]
    assert ["sampler, name", "ddim"] in table(tree, "Settings of the samples")


def test_bars_lie_where_the_errors_are() -> None:
    tree = page_of("several")
    bars = [each for each in tree.all("svg") if each.attributes.get("class") == "bar"]
    assert len(bars) == 6
    # 12.25 to 14.5 is the whole column; the last ends it.
    whiskers = [path.attributes["d"] for bar in bars[:5:2] for path in bar.all("path")[1:2]]
    assert whiskers == ["M0.0 5H22.2", "M2.2 5H24.4", "M77.8 5H100.0"]
    assert not [each for each in page_of("one").all("svg") if each.attributes.get("class") == "bar"]


@pytest.mark.parametrize("kind", ["one", "several", "sweep"])
def test_published_rows_stand_below_the_scores(kind: str) -> None:
    record = KINDS[kind]()
    if isinstance(record, Comparison):
        record = with_published(record)
    elif isinstance(record, Comparisons):
        record = replace(record, comparisons=tuple(map(with_published, record.comparisons)))
    else:
        points = (replace(point, comparison=with_published(point.comparison)) for point in record.points)
        record = replace(record, points=tuple(points))
    rows_of_paper = with_published(one()).published
    tree = parsed(page([record], published=rows_of_paper))
    head, *rows = table(tree, "Beside published scores")
    assert head == ["model", "FID", "Inception Score", "source"]
    assert rows[-1] == ["ADM-G, classifier scale 1", "4.59", "186.70", "arXiv:2105.05233v4, table 5"]
    names = [name for name, _ in sets_of(record)]
    assert [row[0] for row in rows[:-1]] == (["these samples"] if kind == "one" else names)
    assert "The nearest 1 of 7; all: evalkit published imagenet256 --evaluator adm." in tree.text
    assert ("ADM-G (published)" in tree.text) == (kind == "sweep")


def test_where_the_numbers_come_from() -> None:
    tree = parsed(page([several()], command="evalkit report x.html 'a b.json'"))
    assert [
        "reference",
        "train.npz",
        "2,500",
        "32x32",
        "reference-digest",
        "of the images",
        "extracted",
    ] in table(tree, "Batches")
    assert table(tree, "Batches")[2][:2] == ["a/samples.npz", "runs/a/samples.npz"]
    assert ["inception, fingerprint", "f1"] in table(tree, "Networks")
    assert ["recall, k", "3"] in table(tree, "Parameters")
    assert ["torch", "2.13.0"] in table(tree, "Versions")
    assert ["features", "12.3"] in table(tree, "Seconds")
    assert "evalkit report x.html 'a b.json'" in tree.one("footer").text


def test_what_differs_between_sets_is_told_apart() -> None:
    found = several()
    other = replace(found.comparisons[1], seconds={"features": 99.0, "fid": 0.5})
    tree = parsed(page([replace(found, comparisons=(found.comparisons[0], other, *found.comparisons[2:]))]))
    assert table(tree, "Seconds") == [
        ["name", "value", "of"],
        ["features", "12.3", "a/samples.npz, c.npz"],
        ["fid", "0.5", "all"],
        ["features", "99.0", "b/samples.npz"],
    ]


def test_records_stand_side_by_side_where_they_may() -> None:
    tree = parsed(page([one("x.npz"), several(), sweep()]))
    names = [row[0] for row in table(tree, "Side by side")[1:]]
    assert names == [
        "x.npz",
        "a/samples.npz",
        "b/samples.npz",
        "c.npz",
        *(f"adm, scale {s}" for s in ("0", "0.5", "1", "4")),
    ]
    assert tree.one("title").text == "8 sets of samples against train.npz"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"protocol": "exact"}, "different protocol: exact instead of adm"),
        (
            {"reference": replace(one().reference, digest="x", name="other")},
            "different reference: the images of other (2,500 images, digest x) "
            "instead of the images of train.npz (2,500 images, digest reference-di)",
        ),
        (
            {"samples": replace(one("b.npz").samples, images=50_000)},
            "different number of samples: 50,000 instead of 2,500",
        ),
        (
            {"extractors": {"inception": {"name": "x", "fingerprint": "f2"}}},
            "different network: x (fingerprint f2) instead of inception-2015 (fingerprint f1)",
        ),
        ({"extractors": {**one().extractors, "dinov2": {"name": "x", "fingerprint": "f2"}}}, ""),
    ],
)
def test_records_that_may_not_be_compared_are_marked(changes: dict[str, Any], why: str) -> None:
    a, b = one("a.npz"), replace(one("b.npz"), **changes)
    found, lines = side_by_side([a, b, a])
    assert lines[1:] == ([f"a: {why} (all scores of b.npz)"] if why else [])
    marks = [[cell.mark for cell in row if cell.number is not None][:2] for row in found.rows]
    assert marks == [["", ""], ["a", "a"] if why else ["", ""], ["", ""]]
    assert (why in parsed(page([a, b])).text) or not why


def test_a_difference_in_one_score_marks_no_other() -> None:
    a, b = one("a.npz"), one("b.npz")
    scores = tuple(
        replace(score, parameters={"k": 5}) if score.name == "recall" else score for score in b.scores
    )
    found, lines = side_by_side([a, replace(b, scores=scores)])
    assert lines[1:] == ["a: different parameters: k 5 instead of 3 (Recall of b.npz)"]
    assert [cell.mark for cell in found.rows[1]].count("a") == 1


# Figures ---------------------------------------------------------------------------------------------------


def drawings(tree: Node) -> list[Node]:
    return [each for each in tree.all("svg") if each.attributes.get("role") == "img"]


def test_curves_are_drawings_with_text(kind: str) -> None:
    tree = page_of(kind)
    titles = ["FID against guidance scale", "Recall against guidance scale"]
    found = drawings(tree)
    if kind != "sweep":
        assert found == []
        return
    assert [each.attributes["aria-label"] for each in found] == [f"{title}, as curves" for title in titles]
    texts = [each.text for each in found[0].all("text")]
    assert {"FID", "guidance scale", "0.5", "4"} <= set(texts)
    (legend,) = lists(tree, "legend")
    assert legend.text == "adm, 2,500 samples"
    assert "Bars: one standard error" in tree.text


def test_several_sweeps_share_their_figures() -> None:
    tree = parsed(page([sweep("adm"), one(), sweep("dit")]))
    assert len(drawings(tree)) == 2
    (legend,) = lists(tree, "legend")
    assert [item.text for item in legend.all("li")] == ["adm, 2,500 samples", "dit, 2,500 samples"]
    colours = {node.attributes.get("stroke") for node in drawings(tree)[0].walk()}
    assert {"#0072b2", "#d55e00"} <= colours


@pytest.mark.parametrize(("count", "higher_is_better"), [(10, True), (10, False), (1000, False)])
def test_classes_are_ranked_from_the_best(count: int, higher_is_better: bool) -> None:
    specs = [replace(FID, higher_is_better=higher_is_better)]
    found = replace(with_classes(one(), count), specs=(specs[0], *one().specs[1:]))
    text = page([found])
    assert len(text) < 400_000
    tree = parsed(text)
    better = "higher" if higher_is_better else "lower"
    head, *rows = table(tree, f"FID by class: {count:,} classes, {better} is better")
    assert head == ["class", "FID", "rank"]
    values = {row[0]: float(row[1]) for row in rows}
    assert len(values) == count
    assert [int(row[2]) for row in rows] == [*range(1, count + 1)]
    assert [*values.values()] == sorted(values.values(), reverse=higher_is_better)
    first, last = rows[0], rows[-1]
    label = drawings(tree)[0].attributes["aria-label"]
    assert f"{count:,} classes; best {first[0]}, {first[1]}; worst {last[0]}, {last[1]}" in label
    bars = [path for path in drawings(tree)[0].all("path") if path.attributes.get("fill") == "#0072b2"]
    assert len(bars) == (count if count == 10 else 1)


def test_classes_of_several_sets_share_a_table() -> None:
    found = several()
    a, b, c = found.comparisons
    tree = parsed(page([replace(found, comparisons=(with_classes(a, 4), with_classes(b, 3), c))]))
    head, *rows = table(tree, "Recall by class: 4 classes, higher is better")
    assert head == [
        "class",
        "Recall, a/samples.npz",
        "rank, a/samples.npz",
        "Recall, b/samples.npz",
        "rank, b/samples.npz",
    ]
    assert [row[0] for row in rows if row[3:] == ["–", "–"]] == ["class 3"]
    assert len(drawings(tree)) == 4


def png(path: Path, size: int = 40, **texts: str) -> Path:
    pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    Image.fromarray(pixels).save(path, pnginfo=info)
    return path


def test_pictures_have_the_heading_and_description_of_their_files(tmp_path: Path) -> None:
    described = png(tmp_path / "a.png", Title="Worst <samples>", Description='The "worst" & first')
    plain = png(tmp_path / "b<i>.png")
    tree = parsed(page([one()], [read_picture(described), read_picture(plain)]))
    first, second = tree.all("img")
    assert first.attributes["alt"] == 'The "worst" & first'
    assert second.attributes["alt"] == "b<i>.png, a picture of 40x40 pixels"
    headings = [each.text for sheet in tree.all("figure") for each in sheet.all("h3")]
    assert headings == ["Worst <samples>", "b<i>.png"]
    assert (first.attributes["width"], first.attributes["height"]) == ("40", "40")
    kind, _, content = first.attributes["src"].partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(content) == described.read_bytes()


def test_pictures_are_shrunk_to_fit_the_largest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = (600, 100, 500)
    figures = [read_picture(png(tmp_path / f"{size}.png", size)) for size in sizes]
    monkeypatch.setattr(html, "MOST_BYTES", 450_000)
    notes = write_page(tmp_path / "x.html", [one()], figures)
    content = (tmp_path / "x.html").read_bytes()
    assert len(content) < 450_000
    assert len(notes) == 2
    large, small, _ = parsed(content.decode()).all("img")
    assert large.attributes["src"].startswith("data:image/jpeg")
    assert small.attributes["src"] == figures[1].uri
    assert large.attributes["width"] == "600"
    assert all(note in parsed(content.decode()).text for note in notes)
    monkeypatch.setattr(html, "MOST_BYTES", len(page([one()])) + 4_000)
    with pytest.raises(InputError, match=r"figures do not fit .* Give fewer"):
        write_page(tmp_path / "y.html", [one()], figures)
    monkeypatch.setattr(html, "MOST_BYTES", 1000)
    with pytest.raises(InputError, match=r"page would have .* MB.* Give fewer records"):
        write_page(tmp_path / "y.html", [one()])
    assert not list(tmp_path.glob("y*"))


# What a page may not do, and what is read aloud -------------------------------------------------------------


@pytest.fixture(scope="module")
def full() -> str:
    """One page with everything in it."""
    optional("jinja2", "report")
    optional("matplotlib", "report")
    pixel = Picture(
        path=Path("p.png"),
        heading="Sheet",
        description="Samples",
        width=1,
        height=1,
        uri="data:image/png;base64,AAAA",
    )
    five = KINDS["five"]()
    return page([with_published(with_classes(one(), 12)), five, sweep(), sweep("another")], [pixel])


def test_nothing_is_asked_from_elsewhere(full: str) -> None:
    assert not re.search("https?:|//[a-z]", re.sub(r"<script>.*?</script>", "", full, flags=re.S))
    tree = parsed(full)
    for node in tree.walk():
        for name, value in node.attributes.items():
            if name in ("src", "href", "data", "action", "poster", "srcset"):
                assert value.startswith(("data:image/", "#")), value
            assert name != "style"
            assert not name.startswith("on")
    assert not tree.all("link", "iframe", "object", "embed", "base", "form", "foreignobject")
    style = tree.one("style").raw
    assert "url(" not in style
    assert "@import" not in style


def test_style_and_script_are_allowed_by_their_digests_alone(full: str) -> None:
    tree = parsed(full)
    (policy,) = [
        each.attributes["content"]
        for each in tree.all("meta")
        if each.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    digests = {
        tag: base64.b64encode(hashlib.sha256(tree.one(tag).raw.encode()).digest()).decode()
        for tag in ("style", "script")
    }
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": f"'sha256-{digests['style']}'",
        "script-src": f"'sha256-{digests['script']}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_it_can_be_read_aloud_and_used_with_keys(full: str) -> None:
    assert full.lstrip().startswith("<!DOCTYPE html>")
    tree = parsed(full)
    assert tree.one("html").attributes["lang"] == "en"
    assert tree.one("title").text == tree.one("h1").text
    assert all(len(tree.all(tag)) == 1 for tag in ("main", "header", "footer", "nav"))
    ids = [node.attributes["id"] for node in tree.walk() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    for node in tree.walk():
        for name in ("aria-labelledby", "href"):
            target = node.attributes.get(name, "#").removeprefix("#")
            assert not target or target in ids, target
        for target in re.findall(r"url\(#(.*?)\)", " ".join(node.attributes.values())):
            assert target in ids
    levels = [int(node.tag[1]) for node in tree.walk() if re.fullmatch("h[1-6]", node.tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for each in tree.all("table"):
        assert each.one("caption").text
        head, *body = each.all("tr")
        assert all(cell.attributes.get("scope") == "col" for cell in head.all("th"))
        assert head.all("td") == []
        assert all([cell.attributes.get("scope") for cell in row.all("th")] == ["row"] for row in body)
    regions = [node for node in tree.walk() if node.attributes.get("class") == "scroll"]
    assert len(regions) == len(tree.all("table"))
    assert all(region.attributes["tabindex"] == "0" for region in regions)
    assert all(image.attributes["alt"] for image in tree.all("img"))
    outer = [each for each in tree.all("svg") if not each.attributes.get("aria-label")]
    assert all(each.attributes["aria-hidden"] == "true" for each in outer)
    assert all(each.attributes["aria-label"] for each in drawings(tree))


def test_the_same_records_give_the_same_page() -> None:
    assert parsed(page([sweep()])) == page_of("sweep")


def cleaned(text: str) -> str:
    """As a page has it: what is no character becomes a mark."""
    return " ".join(text.replace("\0", "\ufffd").replace("\ud800", "\\ud800").split())


def test_hostile_names_are_text(tmp_path: Path) -> None:
    figure = png(tmp_path / "a.png", Title=HOSTILE[:60], Description=HOSTILE[:60])
    write_page(tmp_path / "x.html", hostile(), [read_picture(figure)], command=HOSTILE)
    tree = parsed((tmp_path / "x.html").read_text("utf-8"))
    assert len(tree.all("script")) == 1
    assert len(tree.all("img")) == 1
    assert not [name for node in tree.walk() for name in node.attributes if name.startswith("on")]
    text, name = tree.text, cleaned(HOSTILE)
    for shown in (name, f"FID{name}", f"not computed: {name}", f"protocol {name}", f"not tested: {name}"):
        assert shown in text, shown
    assert name in tree.one("footer").text
    labels = [each.attributes["aria-label"] for each in drawings(tree)]
    assert any(name in cleaned(label) for label in labels)
    in_drawings = " ".join(node.text for each in drawings(tree) for node in each.all("text"))
    assert '"><script>alert(1)</script>' in in_drawings


@pytest.mark.parametrize("record", hostile(), ids=lambda record: type(record).__name__)
def test_hostile_names_are_text_in_notebooks(record: Record) -> None:
    tree = parsed(str(record._repr_html_()))
    assert tree.all("script", "img") == []
    assert cleaned(HOSTILE) in tree.text


# Notebooks -------------------------------------------------------------------------------------------------


def test_a_notebook_shows_tables_and_figures(kind: str) -> None:
    record = KINDS[kind]()
    tree = parsed(str(record._repr_html_()))
    assert tree.all("script", "html", "body", "h1") == []
    for _, comparison in sets_of(record):
        assert f"{comparison['fid']:.4f}" in tree.text
    assert len(drawings(tree)) == (2 if isinstance(record, Sweep) else 0)


def test_two_outputs_of_a_notebook_share_no_ids() -> None:
    ids = [
        node.attributes["id"]
        for record in (several(), sweep(), one(), one("x"))
        for node in parsed(str(record._repr_html_())).walk()
        if "id" in node.attributes
    ]
    assert len(ids) == len(set(ids)) > 8


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Make packages missing."""

    def remove(package: str) -> None:
        html._environment.cache_clear()
        monkeypatch.setitem(__import__("sys").modules, package, None)

    yield remove
    html._environment.cache_clear()


def test_a_notebook_does_without_what_is_not_installed(without: Callable[[str], None]) -> None:
    without("matplotlib.figure")
    tree = parsed(str(sweep()._repr_html_()))
    assert drawings(tree) == []
    assert "12.5000" in tree.text
    without("jinja2")
    assert sweep()._repr_html_() is None


# The command -----------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Records of every kind in files, as commands write them, and a picture."""
    for name, make in KINDS.items():
        (tmp_path / f"{name}.json").write_text(make().to_json())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(sweep().to_json())
    png(tmp_path / "sheet.png", Title="Sheet")
    return tmp_path


def test_command(files: Path, run: Invoke) -> None:
    out = files / "page.html"
    records = [files / "one.json", files / "several.json", files / "run"]
    figures = ["--figure", files / "sheet.png"]
    assert run("report", out, *records, *figures, "--published", "imagenet256") == (0, f"wrote {out}\n", "")
    tree = parsed(out.read_text("utf-8"))
    assert [each.text for each in tree.all("h2")] == [
        "All scores",
        "samples.npz against train.npz",
        "3 sets of samples against train.npz",
        "adm at 4 guidance scales",
        "Images",
        "Where the numbers come from",
    ]
    # Five rows: the nearest to the comparison, to any of the three sets, and to the best scale of the sweep.
    beside = [
        each.rows() for each in tree.all("table") if each.one("caption").text == "Beside published scores"
    ]
    assert [len(rows) for rows in beside] == [1 + 1 + 5, 1 + 3 + 5, 1 + 4 + 5]
    (legend,) = lists(tree, "legend")
    assert "DiT-XL/2 (published)" in legend.text
    assert f"evalkit report {out}" in tree.one("footer").text
    assert "--published imagenet256" in tree.one("footer").text


def test_nothing_was_published_as_it_was_measured(files: Path, run: Invoke) -> None:
    result = run("report", files / "page.html", files / "one.json", "--published", "cifar10")
    assert result.code == 0
    assert "none was measured as with --protocol adm. `evalkit published cifar10`" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["p.html"], "Missing argument"),
        (["one.json", "several.json"], "the name of a page ends in .html"),
        (["no/p.html", "one.json"], "there is no folder"),
        (["p.html", "nowhere.json"], "No such file or directory. Give what `evalkit compare --json` wrote"),
        (["p.html", "."], "results.json: No such file"),
        (
            ["p.html", "other.json"],
            "its format is 'evalkit plan 1'. Give what `evalkit compare",
        ),
        (
            ["p.html", "list.json"],
            "`evalkit sweep`: it is no JSON object",
        ),
        (["p.html", "sheet.png"], "Not a record of `evalkit compare`"),
        (["p.html", "old.json"], "Not a comparison written by evalkit"),
        (["p.html", "many.json"], "fid has 1000000000 decimals; expected 0 to 20"),
        (["p.html", "junk.json"], "holds values that evalkit does not write"),
        (["p.html", "one.json", "--figure", "nowhere.png"], "No such file or directory. Give a PNG"),
        (["p.html", "one.json", "--figure", "one.json"], "one.json is no PNG file"),
        (["p.html", "one.json", "--figure", "cut.png"], "cut.png: a damaged PNG file"),
        (["p.html", "one.json", "--published", "mnist"], "no published rows on a dataset 'mnist'"),
        (["one.html", "one.html"], "it is the input"),
    ],
)
def test_bad_input(
    files: Path, run: Invoke, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(files)
    good = json.loads(one().to_json())
    (files / "one.html").write_text(one().to_json())
    (files / "other.json").write_text('{"format": "evalkit plan 1"}')
    (files / "list.json").write_text("[]")
    (files / "old.json").write_text(json.dumps(good | {"format": "evalkit comparison 1"}))
    (files / "many.json").write_text(json.dumps(good | {"specs": [good["specs"][0] | {"decimals": 10**9}]}))
    junk = good["scores"][0] | {"parameters": {"subset": "all"}}
    (files / "junk.json").write_text(json.dumps(good | {"scores": [junk]}))
    (files / "cut.png").write_bytes((files / "sheet.png").read_bytes()[:1000])
    result = run("report", *arguments)
    assert result.code == 2
    assert message in result.err
    assert len(result.err) < 1000
    assert not list(files.glob("**/p.html*"))


def test_a_page_without_records_is_refused() -> None:
    with pytest.raises(InputError, match="no record to show"):
        page([])


def test_decimals_are_few() -> None:
    with pytest.raises(ValueError, match="fid has -1 decimals; expected 0 to 20"):
        ScoreSpec(name="fid", title="FID", higher_is_better=False, decimals=-1)
