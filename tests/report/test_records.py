"""`evalkit table`: records of every kind in one table, with marks, in every format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invoked import Result
from numpy.typing import NDArray
from stand_ins import NO_STORE, InceptionPixels

from evalkit.cli.messages import terminal_width
from evalkit.comparison import compare
from evalkit.report.records import FORMATS, Records
from evalkit.report.text import aligned
from evalkit.results import Comparison, Point, Sweep
from evalkit.several import Comparisons, comparisons_in, record_in

Invoke = Callable[..., Result]

LABELS = np.arange(30) % 10


@pytest.fixture
def made(images: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records of two protocols, of several sets of samples, and of a sweep."""
    monkeypatch.chdir(tmp_path)
    np.savez("ref.npz", images[:30])
    np.savez("a.npz", images[30:], LABELS)
    np.savez("b.npz", images[29:59], np.repeat([0, 1], 15))

    def measured(*samples: str, protocol: str = "adm") -> Any:
        options: dict[str, Any] = {
            "metrics": "fid,precision,kid",
            "extractor": InceptionPixels(),
            "run": NO_STORE,
        }
        return compare("ref.npz", *samples, protocol=protocol, **options)

    a, b, exact = measured("a.npz"), measured("b.npz"), measured("a.npz", protocol="exact")
    Path("a.json").write_text(a.to_json())
    Path("exact.json").write_text(exact.to_json())
    Path("two.json").write_text(measured("a.npz", "b.npz").to_json())
    (tmp_path / "s").mkdir()
    points = (Point(scale=0.0, comparison=a), Point(scale=1.5, comparison=b))
    Path("s/results.json").write_text(Sweep(name="s", points=points).to_json())
    return tmp_path


@pytest.mark.usefixtures("made")
def test_records_that_may_stand_side_by_side(run: Invoke) -> None:
    result = run("table", "a.json", "two.json", "--strict")
    assert result.code == 2
    Path("one.json").write_text(Path("a.json").read_text())
    result = run("table", "a.json", "one.json", "--strict")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    value = Comparison.from_json(Path("a.json").read_text())["fid"]
    assert lines[:2] == ["reference  ref.npz, 30 images 10x12", "protocol   adm; pixels"]
    assert lines[3].split() == ["record", "images", "FID", "Precision", "Recall", "KID"]
    assert [line.split()[:3] for line in lines[4:6]] == [
        [name, "30", f"{value:.4f}"] for name in ("a.json", "one.json")
    ]
    assert "Values in the same column can be compared, as far as the records say." in lines


@pytest.mark.usefixtures("made")
def test_marks_and_reasons(run: Invoke) -> None:
    result = run("table", "a.json", "exact.json", "two.json", "s")
    assert (result.code, result.err) == (0, "")
    rows = {line.split("  ")[0]: line for line in result.out.splitlines()}
    marks = {
        "a.json": "",
        "exact.json": "a",
        "two.json: a.npz": "",
        "two.json: b.npz": "b",
        "results.json: scale 0": "",
        "results.json: scale 1.5": "b",
    }
    for name, mark in marks.items():
        cells = rows[name].removeprefix(name)
        assert (" a" in cells, " b" in cells) == (mark == "a", mark == "b"), name
    assert "a: different protocol: exact instead of adm (all scores of exact.json)" in result.out
    balanced = "balanced, 2 classes of 15 images instead of balanced, 10 classes of 3 images"
    assert (
        f"b: different label balance of the samples: {balanced} (all scores of two.json: b.npz, "
        in result.out
    )


@pytest.mark.usefixtures("made")
def test_strict_refuses_and_prints_nothing(run: Invoke) -> None:
    result = run("table", "a.json", "exact.json", "--strict")
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert (
        "cannot be compared: different protocol: exact instead of adm (all scores of exact.json)"
        in result.err
    )
    assert run("table", "exact.json", "--strict").code == 0


@pytest.mark.usefixtures("made")
def test_every_format_has_the_same(run: Invoke) -> None:
    paths = [*map(Path, ("a.json", "exact.json"))]
    fids = [Comparison.from_json(path.read_text())["fid"] for path in paths]
    text = "different protocol: exact instead of adm"
    outputs = {name: run("table", *paths, "--format", name).out for name in FORMATS}
    assert all(text in output for output in outputs.values())
    header, *_ = outputs["markdown"].splitlines()
    assert header == "| record | images | FID | Precision | Recall | KID |"
    first, second = csv.DictReader(io.StringIO(outputs["csv"]))
    assert [float(row["fid"]) for row in (first, second)] == fids
    assert (first["fid_reasons"], second["fid_reasons"]) == ("", text)
    assert (first["reference"], first["samples"], first["images"]) == ("ref.npz", "a.npz", "30")
    found = json.loads(outputs["json"])
    assert found["format"] == "evalkit table 1"
    assert [row["scores"]["fid"]["value"] for row in found["rows"]] == fids
    assert [row["scores"]["fid"]["marks"] for row in found["rows"]] == [[], ["a"]]
    assert found["reasons"] == {
        "a": {"text": text, "scores": ["fid", "precision", "recall", "kid"], "records": ["exact.json"]}
    }


def test_earlier_records_are_marked(run: Invoke, made: Path) -> None:
    """Format 3 has neither byte rules nor labels: that is said, and nothing is assumed."""
    old = json.loads((made / "a.json").read_text()) | {"format": "evalkit comparison 3"}
    del old["byte_rules"]
    for batch in (old["reference"], old["samples"]):
        for name in ("statistics_preprocess", "output_digests", "extracted_by", "source", "labels"):
            del batch[name]
    for score in old["scores"]:
        del score["outputs"], score["reference"], score["samples"]
    (made / "old.json").write_text(json.dumps(old))
    result = run("table", "a.json", "old.json")
    assert result.code == 0
    reasons = [line for line in result.out.splitlines() if " not recorded (" in line]
    assert reasons == [
        "a: label balance of the samples not recorded (all scores of old.json)",
        "b: byte rule not recorded (all scores of old.json)",
    ]


def test_records_from_before_digests_of_outputs_are_read(run: Invoke, made: Path) -> None:
    """They have the same format, and suffice for a reference without statistics."""
    old = json.loads((made / "a.json").read_text())
    for batch in (old["reference"], old["samples"]):
        del batch["output_digests"], batch["extracted_by"]
    for score in old["scores"]:
        del score["samples"]
    (made / "old.json").write_text(json.dumps(old))
    result = run("table", "a.json", "old.json", "--strict")
    assert (result.code, result.err) == (0, "")


@pytest.mark.usefixtures("made")
def test_what_is_no_record(run: Invoke) -> None:
    Path("plan.json").write_text('{"format": "evalkit plan 1"}')
    Path("text.json").write_text("scores")
    Path("stats.npz").write_bytes(b"PK\x03\x04\xba\xff")
    Path("cut.json").write_text('{"format": "evalkit comparison 4"}')
    Path("odd.json").write_text('{"format": ["evalkit comparison 4"]}')
    Path("empty").mkdir()
    for arguments, words in (
        (("plan.json",), "plan.json: Not a record of `evalkit compare` or `evalkit sweep`: its format is"),
        (("a.json", "text.json"), "text.json: Not a record"),
        (
            ("stats.npz",),
            "stats.npz: Not a record of `evalkit compare` or `evalkit sweep`: it is not text. Give",
        ),
        (("cut.json",), "cut.json: Not a comparison written by evalkit"),
        (("odd.json",), "odd.json: Not a record"),
        (
            ("absent.json",),
            "absent.json: No such file or directory. Give what `evalkit compare --json` wrote",
        ),
        (("empty",), "results.json: No such file"),
        ((), "Missing argument"),
    ):
        result = run("table", *arguments)
        assert (result.code, result.out) == (2, ""), arguments
        assert words in result.err


def test_files_of_one_name_are_told_apart(run: Invoke, made: Path) -> None:
    for folder in ("x", "y"):
        (made / folder).mkdir()
        (made / folder / "a.json").write_text((made / "a.json").read_text())
    out = run("table", "x/a.json", "y/a.json").out
    assert "\nx/a.json " in out
    assert "\ny/a.json " in out


def test_every_kind_of_record_is_read(made: Path) -> None:
    a = Comparison.from_json((made / "a.json").read_text())
    assert comparisons_in(record_in((made / "a.json").read_bytes())) == [("", a)]
    two = Comparisons.from_json((made / "two.json").read_text())
    assert comparisons_in(record_in(two.to_json())) == [
        *zip(("a.npz", "b.npz"), two.comparisons, strict=True)
    ]
    swept = comparisons_in(record_in((made / "s" / "results.json").read_bytes()))
    assert [name for name, _ in swept] == ["scale 0", "scale 1.5"]


def test_more_reasons_than_letters(made: Path) -> None:
    a = Comparison.from_json((made / "a.json").read_text())
    rows = [(str(count), replace(a, samples=replace(a.samples, images=count))) for count in range(30, 60)]
    found = Records(tuple(rows))
    assert list(found.reasons)[24:29] == ["y", "z", "aa", "ab", "ac"]
    assert found.marks(29, "fid") == ["ac"]
    assert found.marks(29, "kid") == []


def test_columns_that_a_terminal_has_no_room_for_follow_below() -> None:
    rows = [["set", "FID", "KID", "unbiased", "recall"], ["a.npz", "2.10", "0.12", "0.11", "0.5"]]
    whole = ["set     FID   KID  unbiased  recall", "a.npz  2.10  0.12      0.11     0.5"]
    assert [*aligned(rows)] == [*aligned(rows, width=35)] == whole
    assert [*aligned(rows, width=30)] == [
        *["set     FID   KID  unbiased", "a.npz  2.10  0.12      0.11", ""],
        *["set    recall", "a.npz     0.5"],
    ]
    # An unbiased value stays next to its score; at least one column is shown, however narrow the terminal.
    blocks = [*aligned(rows, width=20)]
    assert [line.split() for line in blocks[::3]] == [
        ["set", "FID"],
        ["set", "KID", "unbiased"],
        ["set", "recall"],
    ]
    assert [*aligned(rows, width=3)] == blocks


def test_a_narrow_terminal(run: Invoke, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("table", "a.json", "two.json").out
    with monkeypatch.context() as patch:
        patch.setattr("evalkit.cli.table.terminal_width", lambda: 45)
        narrow = run("table", "a.json", "two.json").out
    heads = [line for line in narrow.splitlines() if line.startswith("record ")]
    (head,) = (line for line in whole.splitlines() if line.startswith("record "))
    assert len(heads) > 1
    assert max(map(len, heads)) <= 45
    assert " ".join(heads).replace("record", "").split() == head.split()[1:]


def test_only_a_terminal_has_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    for is_terminal, width in ((True, 72), (False, None)):
        monkeypatch.setattr("sys.stdout.isatty", lambda is_terminal=is_terminal: is_terminal)
        assert terminal_width() == width
