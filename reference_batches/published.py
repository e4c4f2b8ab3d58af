"""What papers report on the datasets that generators are compared on.

The content is ``published.toml``; here it becomes frozen objects::

    published_rows("imagenet256")  # of every evaluator
    published_rows("imagenet256", "adm")  # of one, so that they are like for like
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from evalkit.errors import InputError, brief, did_you_mean, listing
from evalkit.results import Comparison, PublishedRow, ScoreSpec

__all__ = [
    "FORMATS",
    "SCORES",
    "all_rows",
    "beside",
    "curves",
    "evaluators",
    "published_rows",
    "ranked",
]

FILE = Path(__file__).with_name("published.toml")
SCORES = tuple(
    ScoreSpec(name=name, title=title, higher_is_better=higher, decimals=2)
    for name, title, higher in (
        ("fid", "FID", False),
        ("sfid", "sFID", False),
        ("inception_score", "IS", True),
        ("precision", "precision", True),
        ("recall", "recall", True),
        ("fd_dinov2", "FD-DINOv2", False),
    )
)
# Whose rows stand beside a comparison, where the protocol is called otherwise.
EVALUATOR_OF = {"exact": "adm"}
NEAREST = 5
# evalkit's own presets are the models of this paper.
OWN_PAPER = "Diffusion Models Beat GANs on Image Synthesis"
SAME_AT_ALL_STEPS = ("classifier", "cfg", "cfg (XS guide)")
# Cells of the terminal's table are cut to this, but for sources; Markdown and JSON have all of them.
WIDEST = 36


def all_rows() -> tuple[PublishedRow, ...]:
    """Every row, in the order of the file."""
    rows, _ = _read(FILE)
    return rows


def published_rows(
    dataset: str, evaluator: str | None = None, model: str | None = None
) -> tuple[PublishedRow, ...]:
    """Rows on a dataset in the order of the file.

    Args:
        dataset: Such as ``imagenet256``.
        evaluator: Only rows of this one.
        model: Only models with this in their names, in upper or lower case.

    Raises:
        InputError: Nothing was published on that dataset, or nothing of that evaluator or model.
    """
    found = [row for row in all_rows() if row.dataset == dataset]
    if not found:
        datasets = dict.fromkeys(row.dataset for row in all_rows())
        raise InputError(
            f"There are no published rows on a dataset {brief(repr(dataset))}; expected "
            f"{', '.join(datasets)}.{did_you_mean(dataset, datasets)}"
        )
    rows = tuple(row for row in found if evaluator in (None, row.evaluator))
    if not rows:
        others = dict.fromkeys(row.evaluator for row in found)
        raise InputError(
            f"No row on {dataset} comes from an evaluator {brief(repr(evaluator))}; expected "
            f"{', '.join(others)}.{did_you_mean(evaluator, others)}"
        )
    named = tuple(row for row in rows if model is None or model.lower() in row.model.lower())
    if not named:
        known = listing(dict.fromkeys(row.model for row in rows))
        raise InputError(
            f"None of the models has {brief(repr(model))} in its name; expected part of {known}."
        )
    return named


def evaluators() -> dict[str, str]:
    """What each evaluator is, by name."""
    _, known = _read(FILE)
    return dict(known)


def ranked(rows: Iterable[PublishedRow], score: str) -> list[PublishedRow]:
    """The rows by a score, the best first; those without it last.

    Raises:
        InputError: There is no such score.
    """
    signs = {spec.name: -1 if spec.higher_is_better else 1 for spec in SCORES}
    if score not in signs:
        raise InputError(
            f"No row has a score {brief(repr(score))}; expected one of {', '.join(signs)}."
            f"{did_you_mean(score, signs)}"
        )
    return sorted(rows, key=lambda row: (score not in row.scores, signs[score] * row.scores.get(score, 0.0)))


def beside(comparison: Comparison, rows: Iterable[PublishedRow]) -> Comparison:
    """The comparison with the rows of the same evaluator that are nearest to it: in FID where both have it.

    They are sorted by that score, the best first. ``published_rows`` becomes the number of all of them.
    """
    evaluator = EVALUATOR_OF.get(comparison.protocol, comparison.protocol)
    alike = [row for row in rows if row.evaluator == evaluator]
    for spec in SCORES:
        having = [row for row in alike if spec.name in row.scores]
        measured = comparison.score(spec.name)
        if having and measured is not None:
            value = measured.value
            near = sorted(having, key=lambda row: abs(row.scores[spec.name] - value))[:NEAREST]
            chosen = tuple(ranked(near, spec.name))
            return replace(comparison, published=chosen, published_rows=len(alike))
    return comparison


def curves(dataset: str) -> list[PublishedRow]:
    """What a figure of sweeps shows: the models of ADM, and of each other paper one model at several scales.

    That is the model with the lowest FID of those whose FID is known at two scales or more. They are of one
    kind of guidance, with the same scale at all steps; one may be without guidance. Rows of another evaluator
    than ADM's carry its name in that of the model.

    Raises:
        InputError: Nothing was published on that dataset, or no such model.
    """
    shown, others = [], dict[str, dict[tuple[str | None, ...], list[PublishedRow]]]()
    for row in published_rows(dataset):
        if row.paper.startswith(OWN_PAPER):
            shown += [row] if row.model.startswith("ADM") else []
        elif row.scale is not None and "fid" in row.scores:
            models = others.setdefault(row.paper, {})
            models.setdefault((row.model, row.steps, row.evaluator), []).append(row)
    for models in others.values():
        found = [curve for same in models.values() for curve in _curves_of(same)]
        for row in min(found, key=lambda curve: min(row.scores["fid"] for row in curve), default=()):
            of = "" if row.evaluator == "adm" else f", evaluator {row.evaluator}"
            shown.append(replace(row, model=f"{row.model}{of}"))
    if not shown:
        raise InputError(f"No model on {dataset} is published at several guidance scales; leave it out.")
    return shown


def _curves_of(same: Sequence[PublishedRow]) -> Iterator[list[PublishedRow]]:
    """The rows of one model, by kind of guidance; those without any belong to each kind."""
    plain = [row for row in same if row.guidance == "none"]
    for guidance in dict.fromkeys(row.guidance for row in same if row.guidance in SAME_AT_ALL_STEPS):
        curve = [*plain, *(row for row in same if row.guidance == guidance)]
        if len({row.scale for row in curve}) > 1:
            yield curve


def _table(rows: Sequence[PublishedRow]) -> str:
    """A table for the terminal, with the papers, evaluators and notes below it."""
    head, *lines = _cells(rows)
    lines = [
        [
            f"{cell[: WIDEST - 1]}…" if title != "source" and len(cell) > WIDEST else cell
            for title, cell in zip(head, line, strict=True)
        ]
        for line in lines
    ]
    titles = {spec.title for spec in SCORES} | {"scale"}
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    text = [
        "  ".join(
            f"{cell:>{width}}" if title in titles else f"{cell:<{width}}"
            for title, cell, width in zip(head, line, widths, strict=True)
        ).rstrip()
        for line in (head, *lines)
    ]
    for title, found in _explained(rows):
        width = max(map(len, found))
        text += ["", title, *(f"  {key:<{width}}  {what}" for key, what in found.items())]
    return "\n".join(text)


def _markdown(rows: Sequence[PublishedRow]) -> str:
    """The same as Markdown."""
    head, *lines = ([cell.replace("|", "\\|") for cell in line] for line in _cells(rows))
    text = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]
    for title, found in _explained(rows):
        text += ["", title, "", *(f"- {key}: {what}" for key, what in found.items())]
    return "\n".join(text)


def _cells(rows: Sequence[PublishedRow]) -> list[list[str]]:
    """A heading and a line for each row; without columns that are empty, and that of a single evaluator."""
    notes = _notes(rows)
    several = len({row.evaluator for row in rows}) > 1
    head = ["model", "guidance", "scale", "steps", *(spec.title for spec in SCORES)]
    lines = [
        [
            row.model,
            row.guidance or "",
            "" if row.scale is None else f"{row.scale:g}",
            row.steps or "",
            *(spec.format(row.scores[spec.name]) if spec.name in row.scores else "" for spec in SCORES),
            row.evaluator if several else "",
            row.source,
            str(notes[row.note]) if row.note else "",
        ]
        for row in rows
    ]
    columns = zip([*head, "evaluator", "source", "note"], *lines, strict=True)
    return [list(line) for line in zip(*(column for column in columns if any(column[1:])), strict=True)]


def _explained(rows: Sequence[PublishedRow]) -> Iterator[tuple[str, dict[str, str]]]:
    """What stands below a table of the rows: papers, evaluators and notes, by what the table has of them."""
    images = " or ".join(f"{images:,}" for images in dict.fromkeys(row.images for row in rows))
    papers = {row.source.partition(", ")[0]: row.paper.rpartition(", arXiv:")[0] for row in rows}
    yield f"Papers ({images} samples each):", {key: title for key, title in papers.items() if title}
    known = evaluators()
    yield "Evaluators:", {name: known[name] for name in dict.fromkeys(row.evaluator for row in rows)}
    if notes := _notes(rows):
        yield "Notes:", {str(number): note for note, number in notes.items()}


def _notes(rows: Iterable[PublishedRow]) -> dict[str, int]:
    """The notes, numbered as they first appear."""
    notes = dict.fromkeys(row.note for row in rows if row.note)
    return {note: number for number, note in enumerate(notes, start=1)}


@cache
def _read(file: Path) -> tuple[tuple[PublishedRow, ...], dict[str, str]]:
    """The rows, and what each evaluator is."""
    content = tomllib.loads(file.read_text("utf-8"))
    rows = tuple(row for paper in content["papers"] for row in _rows_of(paper, content["images"]))
    return rows, content.get("evaluators", {})


def _rows_of(paper: dict[str, Any], images: int) -> Iterator[PublishedRow]:
    title, arxiv, text = paper.pop("title"), paper.pop("arxiv", None), paper.pop("rows")
    columns, *lines = ([cell.strip() for cell in line.split("|")] for line in text.strip().splitlines())
    for line in lines:
        line += [""] * (len(columns) - len(line))
        own = {column: cell for column, cell in zip(columns, line, strict=True) if cell}
        values: dict[str, Any] = {**paper, **own}
        scores = {spec.name: float(values.pop(spec.name)) for spec in SCORES if spec.name in values}
        if "scale" in values:
            values["scale"] = float(values["scale"])
        if str(values["table"]).isdecimal():
            values["table"] = int(values["table"])
        if isinstance(values.get("reference"), dict):
            values["reference"] = values["reference"].get(values["dataset"])
        if values["evaluator"] == "adm":
            values.setdefault("reference", values["dataset"])
        yield PublishedRow(
            **values, scores=scores, images=images, paper=f"{title}, arXiv:{arxiv}" if arxiv else title
        )


FORMATS: dict[str, Callable[[Sequence[PublishedRow]], str]] = {
    "table": _table,
    "markdown": _markdown,
    "json": lambda rows: json.dumps([asdict(row) for row in rows], indent=2),
}
