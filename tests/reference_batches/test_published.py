"""What papers report: the rows, `evalkit published`, and what `compare` and `curves` show of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from invoked import Result

from evalkit.batches import Batch
from evalkit.errors import InputError
from evalkit.report import several
from evalkit.results import Comparison, PublishedRow, Score
from evalkit.several import Comparisons
from reference_batches import published
from reference_batches.catalog import entries, find, published_files, rows_against
from reference_batches.published import (
    SCORES,
    all_rows,
    beside,
    beside_all,
    curves,
    evaluators,
    published_rows,
    ranked,
)

Invoke = Callable[..., Result]

GOLDEN: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "golden" / "adm_published.json").read_text(encoding="utf-8")
)["rows"]
DATASETS = ["imagenet64", "imagenet128", "imagenet256", "imagenet512"]
DATASETS += ["lsun_bedroom", "lsun_cat", "lsun_horse", "cifar10"]


# The rows ----------------------------------------------------------------------------------------------


def test_rows_of_adm_are_the_golden_ones() -> None:
    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(str(value) for value in row.values())

    names = ("fid", "sfid", "inception_score", "precision", "recall")
    found = [
        {"dataset": row.dataset, "model": row.model, "scale": row.scale}
        | {name: row.scores.get(name) for name in names}
        for row in all_rows()
        if "2105.05233" in row.paper
    ]
    expected = [
        {
            name: row["is" if name == "inception_score" else name]
            for name in ("dataset", "model", "scale", *names)
        }
        for row in GOLDEN
    ]
    more = [row for row in found if row not in expected]
    assert sorted((row for row in found if row in expected), key=key) == sorted(expected, key=key)
    # Rows of its tables 5 and 6 that are not in the golden file, which is of ADM's own results at 250 steps.
    assert [(row["dataset"], row["model"], row["fid"]) for row in more] == [
        ("imagenet64", "IDDPM", 2.92),
        ("imagenet256", "IDDPM", 12.26),
        ("imagenet512", "ADM-G+U (25 steps)", 5.96),
        ("imagenet512", "ADM-G+U (25 steps upsampling)", 4.11),
    ]


def test_every_row_is_complete_and_plausible() -> None:
    bounds = {"fid": (0, 400), "sfid": (0, 20), "inception_score": (1, 450), "fd_dinov2": (0, 250)}
    bounds |= {"precision": (0, 1), "recall": (0, 1)}
    known = evaluators()
    for row in all_rows():
        assert row.dataset in DATASETS, row
        assert row.model, row
        assert row.images == 50_000, row
        assert row.table, row
        assert row.paper, row
        assert row.evaluator in known, row
        assert row.scores, row
        assert row.scores.keys() <= bounds.keys(), row
        for name, value in row.scores.items():
            low, high = bounds[name]
            assert low < value < high, (row, name)
        assert row.scale is None or 0.5 <= row.scale <= 30, row
        if (row.guidance or "none").startswith("none"):
            assert row.scale in (None, 1), row
        if row.evaluator == "adm":
            assert row.reference == row.dataset, row
        if row.evaluator in ("edm", "edm2", "torch-fidelity", "score-sde", "jax-fid"):
            assert row.reference, row
        numbers = re.findall(r"arXiv:(.*)", row.paper)
        assert all(re.fullmatch(r"\d{4}\.\d{5}(v\d)?", number) for number in numbers), row
        texts = (row.model, row.guidance, row.steps, row.paper, str(row.table), row.reference, row.note)
        assert all(text is None or (text == text.strip() and "|" not in text) for text in texts), row
    assert {row.evaluator for row in all_rows()} == known.keys()
    assert {row.dataset for row in all_rows()} == set(DATASETS)


def test_no_row_is_there_twice() -> None:
    def identity(row: PublishedRow) -> tuple[Any, ...]:
        run = (row.dataset, row.model, row.guidance, row.scale, row.steps)
        return (*run, row.source, row.evaluator, *row.scores)

    assert [row for row, count in Counter(map(identity, all_rows())).items() if count > 1] == []


def test_batches_of_rows_are_published_ones() -> None:
    named = [row for row in all_rows() if row.batch is not None]
    assert len({row.batch for row in named}) == len(named) == 17
    for row in named:
        assert row.batch is not None
        assert find(row.batch).published == row
        assert find(row.batch).dataset == row.dataset
    assert sum(entry.published is not None for entry in entries().values()) == len(named)


# By hand, from the papers.
@pytest.mark.parametrize(
    ("dataset", "model", "guidance", "scale", "evaluator", "scores"),
    [
        ("imagenet256", "DiT-XL/2", "cfg", 1.5, "adm", (2.27, 4.60, 278.24, 0.83, 0.57)),
        ("imagenet512", "DiT-XL/2", "cfg", 1.5, "adm", (3.04, 5.02, 240.82, 0.84, 0.54)),
        ("imagenet256", "LDM-4", "cfg", 1.5, "unstated", (3.60, None, 247.67, 0.87, 0.48)),
        ("imagenet256", "LDM-8 @4.8M", "classifier", 10, "unstated", (7.76, None, 209.52, 0.84, 0.35)),
        (
            "imagenet256",
            "LlamaGen-3B (300 epochs, 384x384)",
            "cfg",
            1.65,
            "adm",
            (2.189, 5.965, 263.334, 0.819, 0.581),
        ),
        ("imagenet64", "CFG diffusion 64 (p_uncond=0.1)", "cfg", 1.1, "unstated", (1.55, None, 66.11)),
        ("imagenet256", "MAR-H", "cfg, linear up to", 3.2, "torch-fidelity", (1.55, None, 303.7, 0.81, 0.62)),
        ("imagenet64", "EDM2-S", "autoguidance (XS, T/8)", 1.7, "edm2", (1.01,)),
    ],
)
def test_some_rows(
    dataset: str, model: str, guidance: str, scale: float, evaluator: str, scores: tuple[float | None, ...]
) -> None:
    found = [
        row
        for row in published_rows(dataset, evaluator)
        if (row.model, row.guidance, row.scale) == (model, guidance, scale) and "fid" in row.scores
    ]
    names = ("fid", "sfid", "inception_score", "precision", "recall")
    expected = {name: value for name, value in zip(names, scores, strict=False) if value is not None}
    assert expected in [row.scores for row in found]


def test_contradictions_are_rows_of_their_own() -> None:
    def fids(model: str, **where: Any) -> set[tuple[float, str]]:
        rows = (row for row in published_rows("imagenet256", model=model) if row.guidance != "none")
        return {(row.scores["fid"], row.source) for row in rows if row.model == model}

    assert {
        (1.97, "arXiv:2404.02905, README"),
        (1.92, "arXiv:2404.02905, as reprinted by others"),
        (1.97, "arXiv:2604.28190, table 4"),
    } == fids("VAR-d30")
    scores = [row.scores["inception_score"] for row in published_rows("imagenet256", model="SiT-XL/2")
              if row.model == "SiT-XL/2" and row.scores["fid"] == 2.06]  # fmt: skip
    assert sorted(scores) == [270.27, 277.5]


@pytest.mark.parametrize(
    ("change", "error"),
    [(("1.5", "1.5 | 2 | 3"), ValueError), (("model |", "modell |"), TypeError), (("1.5", "x"), ValueError)],
)
def test_a_mistake_in_the_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], error: type[Exception]
) -> None:
    text = (
        'images = 9\n[[papers]]\ntitle = "T"\nevaluator = "adm"\ndataset = "d"\ntable = "README"\n'
        "rows = '''\nmodel | note | fid\nm | | 1.5\n'''\n"
    )
    for name, content in (("good", text), ("bad", text.replace(*change))):
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(published, "FILE", tmp_path / "good")
    expected = PublishedRow(
        dataset="d", model="m", scores={"fid": 1.5}, images=9, paper="T", table="README", reference="d"
    )
    assert all_rows() == (expected,)
    monkeypatch.setattr(published, "FILE", tmp_path / "bad")
    with pytest.raises(error):
        all_rows()


# The command -------------------------------------------------------------------------------------------


def test_the_table(run: Invoke) -> None:
    result = run("published", "imagenet256", "--sort", "fid", "--evaluator", "adm")
    assert result.code == 0
    table, left_out, papers, known, notes = result.out.split("\n\n")
    head, *lines = table.splitlines()
    rows = published_rows("imagenet256", "adm")
    assert len(lines) == len(rows)
    start, end = head.index("scale") + len("scale"), head.index("FID") + len("FID")
    fids = [float(line[start:end].split()[-1]) for line in lines]
    assert fids == sorted(fids)
    assert sorted(fids) == sorted(round(row.scores["fid"], 2) for row in rows)
    (line,) = (line for line in lines if line.startswith("ADM-G+U "))
    assert "classifier" in line
    assert "3.94   6.14  215.84   0.83  0.53  " in line
    number = line[: head.index("paper") + len("paper")].split()[-1]
    paper = "Diffusion Models Beat GANs on Image Synthesis, arXiv:2105.05233v4"
    assert f"  {number:<2}  {paper}" in papers.splitlines()
    assert "evaluator" not in head  # one alone, named below
    assert left_out == "Left out: steps; --format markdown has every column."
    assert known == "Evaluators:\n  adm  the evaluator of the ADM paper, or a copy of it"
    numbers = [line.split()[0] for line in notes.splitlines()[1:]]
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
    assert any(line.endswith(f"  {numbers[-1]}") for line in lines)


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_table_fits_the_terminal(dataset: str) -> None:
    """And no row is without a score, nor the table without what it is sorted by."""
    every = published_rows(dataset)
    for evaluator in (None, *dict.fromkeys(row.evaluator for row in every)):
        rows = published_rows(dataset, evaluator)
        for sort in (None, *dict.fromkeys(name for row in rows for name in row.scores)):
            text = published.FORMATS["table"](rows, sort)
            assert max(map(len, text.splitlines())) <= 110
            head, *lines = text.partition("\n\n")[0].splitlines()
            there = [spec for spec in SCORES if published.SHORT.get(spec.title, spec.title) in head.split()]
            assert sort in (None, *(spec.name for spec in there))
            for line, row in zip(lines, rows, strict=True):
                shown = [spec for spec in there if spec.name in row.scores]
                assert shown
                assert all(f" {spec.format(row.scores[spec.name])}" in line for spec in shown)


def test_a_long_cell_keeps_its_beginning_and_its_end() -> None:
    lines = published.FORMATS["table"](published_rows("cifar10"), None).splitlines()
    models = {line.split("  ")[0] for line in lines if line.startswith("EDM config A")}
    assert {model.rpartition("…")[2] for model in models} == {
        " VP, conditional",
        " VE, conditional",
        "P, unconditional",
        "E, unconditional",
    }


def test_markdown_and_json(run: Invoke) -> None:
    rows = published_rows("imagenet512", model="edm2")
    content = json.loads(run("published", "imagenet512", "--model", "edm2", "--format", "json").out)
    assert content == [asdict(row) for row in rows]
    text = run("published", "imagenet512", "--model", "edm2", "--format", "markdown").out
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == len(rows) + 2
    assert len({line.count("|") for line in lines}) == 1
    assert (
        "| EDM2-XXL | cfg (XS guide) | 1.2 | Heun 32 (63 NFE) | 1.81 |  |  |  |  |  | edm2 | "
        "arXiv:2312.02696, table 2 | 1 |"
    ) in lines


@pytest.mark.parametrize("score", [spec.name for spec in SCORES])
def test_the_best_come_first_and_the_unknown_last(score: str) -> None:
    values = [row.scores.get(score) for row in ranked(published_rows("imagenet512"), score)]
    known = [value for value in values if value is not None]
    assert values == known + [None] * (len(values) - len(known))
    assert len(known) > 5
    assert known == sorted(known, reverse=score in ("inception_score", "precision", "recall"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("imagenet257",), f"a dataset 'imagenet257'; expected {', '.join(DATASETS)}."),
        (
            ("cifar10", "--evaluator", "adm"),
            "an evaluator 'adm'; expected pytorch-fid, edm, stylegan, unstated",
        ),
        (
            ("lsun_cat", "--model", "DiT"),
            "has 'DiT' in its name; expected part of ADM (dropout), 1000 steps.",
        ),
        (
            ("imagenet64", "--sort", "kid"),
            "a score 'kid'; expected one of fid, sfid, inception_score, precision, recall, fd_dinov2.",
        ),
        (("x" * 5000,), "a dataset 'xxx"),
        ((), "Missing argument 'DATASET'"),
    ],
)
def test_unknown_names(run: Invoke, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run("published", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err) < 1000


# Beside a comparison and in figures --------------------------------------------------------------------


def comparison(protocol: str = "adm", samples: str = "a", **scores: float) -> Comparison:
    side = Batch(
        name=samples, images=9, image_shape=(8, 8, 3), digest="0", statistics="images", features="extracted"
    )
    return Comparison(
        specs=tuple(spec for spec in SCORES if spec.name in scores),
        scores=tuple(Score(name=name, value=value) for name, value in scores.items()),
        missing={},
        protocol=protocol,
        reference=side,
        samples=side,
        extractors={},
    )


def test_the_nearest_rows_of_the_same_evaluator() -> None:
    rows = published_rows("imagenet256")
    alike = published_rows("imagenet256", "adm")
    shown = beside(comparison(fid=4.0, inception_score=500.0), rows)
    assert shown.published_rows == len(alike)
    fids = [row.scores["fid"] for row in shown.published]
    assert len(fids) == 5
    assert fids == sorted(fids)
    assert all(row in alike for row in shown.published)
    reach = max(abs(fid - 4.0) for fid in fids)
    others = [row.scores["fid"] for row in alike if row not in shown.published]
    assert min(abs(fid - 4.0) for fid in others) >= reach
    assert any(abs(row.scores["fid"] - 4.0) < reach for row in rows if row.evaluator != "adm")
    assert beside(comparison("exact", fid=4.0), rows).published == shown.published


def test_nearest_in_another_score_where_there_is_no_fid() -> None:
    (best, *_) = beside(comparison(recall=0.9), published_rows("imagenet256")).published
    assert best.scores["recall"] == max(
        row.scores.get("recall", 0) for row in published_rows("imagenet256", "adm")
    )


@pytest.mark.parametrize("form", ["table", "markdown"])
def test_rows_near_any_of_several_sets_are_shown_once(form: str) -> None:
    rows = published_rows("imagenet256")
    far = max(row.scores["fid"] for row in published_rows("imagenet256", "adm"))
    sets = [comparison(samples="a", fid=4.0), comparison(samples="b", fid=far), comparison(samples="c")]
    plain = several.FORMATS[form](Comparisons(comparisons=tuple(sets)))
    found = beside_all(sets, rows)
    fids = [row.scores["fid"] for row in found[0].published]
    assert len(fids) == 5
    assert fids == sorted(fids)
    assert fids[0] < 4.5
    assert fids[-1] == far
    distances = [
        min(abs(row.scores["fid"] - 4.0), abs(row.scores["fid"] - far))
        for row in sorted(published_rows("imagenet256", "adm"), key=lambda row: row not in found[0].published)
    ]
    assert max(distances[:5]) <= min(distances[5:])
    assert all(each.published == found[0].published for each in found)
    assert all(each.published_rows == beside(sets[0], rows).published_rows for each in found)
    shown = several.FORMATS[form](Comparisons(comparisons=found))
    assert shown.count("imagenet256 as published, 50,000 samples each, evaluator adm. The nearest 5 of") == 1
    assert "Not like for like, here: 9 samples" in shown
    assert all(sum(f"{fid:.2f}" in line for line in shown.splitlines()) for fid in fids)
    head, *_ = shown.partition("imagenet256 as published")
    assert plain.startswith(head.rstrip())


def test_of_several_sets_without_rows_nothing_is_said() -> None:
    sets = (comparison(fid=4.0), comparison(fid=5.0))
    assert beside_all(sets, published_rows("cifar10")) == sets
    assert "as published" not in several.table(Comparisons(comparisons=sets))


@pytest.mark.parametrize("protocol", ["adm", "no-such-evaluator"])
def test_nothing_beside_where_nothing_is_alike(protocol: str) -> None:
    rows = published_rows("cifar10")  # none with ADM's evaluator
    plain = comparison(protocol, fid=4.0)
    assert beside(plain, rows) == plain


def test_rows_measured_against_a_file_of_statistics() -> None:
    """Only these rows are shown next to it; there are none for a file that no source names."""
    files = published_files()
    rows = rows_against(files["adm-in256"])
    expected = [row for row in all_rows() if row.reference == "adm_in256_stats.npz"]
    assert rows == tuple(replace(row, reference="adm-in256") for row in expected)
    assert {"MAR-H", "FractalMAR-H", "xAR-L"} <= {row.model for row in rows}
    assert rows_against(files["jit-in256"]) == ()  # the source of JiT's rows does not name a reference
    edm2 = rows_against(files["edm2-img512"])
    assert {row.dataset for row in edm2} == {"imagenet512"}
    assert any("fd_dinov2" in row.scores for row in edm2)
    assert rows_against(files["imagenet256"]) == published_rows("imagenet256")
    assert rows_against(files["admnet_imagenet256"]) == ()


def test_the_file_that_both_were_measured_against_is_like_for_like() -> None:
    rows = rows_against(published_files()["adm-in256"])

    def shown(source: str, protocol: str = "torch-fidelity") -> str:
        plain = comparison(protocol, fid=2.0)
        side = replace(plain.reference, source=source)
        samples = replace(plain.samples, images=50_000)
        found = beside(replace(plain, reference=side, samples=samples), rows)
        return several.FORMATS["table"](Comparisons(comparisons=(found, found)))

    text = shown("published adm-in256")
    assert "evaluator torch-fidelity, against adm-in256. The nearest 5 of" in text
    assert "Not like for like" not in text
    assert "Not like for like, here: reference jit-in256." in shown("published jit-in256")
    assert "Not like for like" not in shown("results/published before/ref.npz")
    assert "as published" not in shown("published adm-in256", "adm")


def test_models_at_several_scales() -> None:
    def found(dataset: str) -> dict[str, list[float | None]]:
        shown: dict[str, list[float | None]] = {}
        for row in curves(dataset):
            shown.setdefault(row.model, []).append(row.scale)
        return shown

    models = found("imagenet256")
    assert models["ADM-G"] == [1, 10]
    assert models["ADM-U"] == [None]
    assert models["DiT-XL/2"] == [1, 1.25, 1.5]
    assert models["LDM-4, evaluator unstated"] == [1, 1.25, 1.5]
    assert models["LlamaGen-3B (300 epochs, 384x384)"] == [1, 1.5, 1.6, 1.65, 1.75, 1.8, 2]
    assert sum(name.startswith("LlamaGen") for name in models) == 1  # the best of its paper
    assert not any("interval" in (row.guidance or "") for row in curves("imagenet256"))
    assert found("imagenet512")["EDM2-XXL, evaluator edm2"] == [1, 1.2]
    assert len(found("imagenet64")["CFG diffusion 64 (p_uncond=0.1), evaluator unstated"]) == 14
    with pytest.raises(InputError, match="No model on cifar10 is published at several guidance scales"):
        curves("cifar10")
