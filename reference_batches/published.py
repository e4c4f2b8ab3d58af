"""What papers report on the datasets that generators are compared on.

The content is ``published.toml``; here it becomes frozen objects::

    published_rows("imagenet256")  # of every evaluator
    published_rows("imagenet256", "adm")  # of one, so that they are like for like
"""

from __future__ import annotations

import json
import textwrap
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from evalkit.errors import InputError, brief, did_you_mean, listing
from evalkit.results import Comparison, PublishedRow, ScoreSpec

__all__ = [
    "FORMATS",
    "SCORES",
    "all_rows",
    "beside",
    "beside_all",
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
# The terminal's table is at most so wide; Markdown and JSON have every column, and whole cells.
WIDEST = 110
GAP = 2
# Columns of text, and how narrow each may become; and shorter titles. Sources are numbers of papers there.
TEXTS = {"model": 30, "guidance": 14, "steps": 12, "evaluator": 14}
SHORT = {"precision": "prec.", "recall": "rec.", "source": "paper"}


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
    (found,) = beside_all([comparison], rows)
    return found


def beside_all(comparisons: Sequence[Comparison], rows: Iterable[PublishedRow]) -> tuple[Comparison, ...]:
    """The same for several of one protocol: each with the rows that are nearest to any of them."""
    protocol = comparisons[0].protocol.partition(",")[0]  # of several, that of the scores without a suffix
    evaluator = EVALUATOR_OF.get(protocol, protocol)
    alike = [row for row in rows if row.evaluator == evaluator]
    for spec in SCORES:
        having = [row for row in alike if spec.name in row.scores]
        measured = [score.value for each in comparisons if (score := each.score(spec.name)) is not None]
        if having and measured:
            near = sorted(having, key=partial(_distance, name=spec.name, values=measured))[:NEAREST]
            chosen = tuple(ranked(near, spec.name))
            return tuple(replace(each, published=chosen, published_rows=len(alike)) for each in comparisons)
    return tuple(comparisons)


def _distance(row: PublishedRow, name: str, values: Iterable[float]) -> float:
    return min(abs(row.scores[name] - value) for value in values)


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


def _table(rows: Sequence[PublishedRow], sort: str | None) -> str:
    """A table for the terminal, with the papers, evaluators and notes below it."""
    papers = {paper: number for number, paper in enumerate(dict.fromkeys(row.paper for row in rows), 1)}
    columns = _columns(rows) | {"source": [str(papers[row.paper]) for row in rows]}
    columns = {SHORT.get(title, title): column for title, column in columns.items()}
    left_out = _left_out(columns, rows, sort)
    columns = {title: column for title, column in columns.items() if title not in left_out}
    widths = _fitted(columns)
    text = [
        "  ".join(
            f"{_cut(cell, width):{'<' if title in TEXTS else '>'}{width}}"
            for (title, width), cell in zip(widths.items(), line, strict=True)
        ).rstrip()
        for line in (columns, *zip(*columns.values(), strict=True))
    ]
    if left_out:
        text += ["", f"Left out: {', '.join(left_out)}; --format markdown has every column."]
    numbered = {str(number): paper for paper, number in papers.items()}
    for title, found in (_heading(rows, numbered), *_explained(rows)):
        width = max(map(len, found))
        text += ["", title]
        for key, what in found.items():
            first, others = f"  {key:<{width}}  ", " " * (width + 4)
            text += textwrap.wrap(what, WIDEST, initial_indent=first, subsequent_indent=others)
    return "\n".join(text)


def _left_out(
    columns: Mapping[str, Sequence[str]], rows: Sequence[PublishedRow], sort: str | None
) -> list[str]:
    """The columns without which the table is narrow enough, those with the fewest entries first.

    Never FID, what is sorted by, or the only score of a row.
    """
    only = {name for row in rows if len(row.scores) == 1 for name in row.scores}
    needed = {spec.title for spec in SCORES if spec.name in {"fid", sort, *only}}
    titles = {SHORT.get(spec.title, spec.title) for spec in SCORES if spec.title not in needed} | {"steps"}
    candidates = [title for title in columns if title in titles]
    candidates.sort(key=lambda title: sum(map(bool, columns[title])))
    least = {
        title: min(TEXTS.get(title, WIDEST), max(map(len, (title, *column))))
        for title, column in columns.items()
    }
    found: list[str] = []
    while candidates and sum(least.values()) + GAP * (len(least) - 1) > WIDEST:
        found.append(candidates.pop(0))
        del least[found[-1]]
    return [title for title in columns if title in found]


def _fitted(columns: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Width of each column; of text, the widest are narrowed until the table is narrow enough."""
    widths = {title: max(map(len, (title, *column))) for title, column in columns.items()}
    over = sum(widths.values()) + GAP * (len(widths) - 1) - WIDEST
    for _ in range(over):
        narrowed = [title for title in widths if widths[title] > TEXTS.get(title, WIDEST)]
        if narrowed:
            widths[max(narrowed, key=lambda title: widths[title] - TEXTS[title])] -= 1
    return widths


def _cut(cell: str, width: int) -> str:
    """The beginning and the end of a cell that is too long: often only the end tells two models apart."""
    if len(cell) <= width:
        return cell
    end = (width - 1) // 2
    return f"{cell[: width - 1 - end]}…{cell[len(cell) - end :]}"


def _markdown(rows: Sequence[PublishedRow], sort: str | None) -> str:
    """The same as Markdown, with every column."""
    del sort
    columns = _columns(rows)
    head, *lines = (
        [cell.replace("|", "\\|") for cell in line]
        for line in (columns, *zip(*columns.values(), strict=True))
    )
    text = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]
    papers = {row.source.partition(", ")[0]: row.paper.rpartition(", arXiv:")[0] for row in rows}
    titled = {key: title for key, title in papers.items() if title}
    for title, found in (_heading(rows, titled), *_explained(rows)):
        text += ["", title, "", *(f"- {key}: {what}" for key, what in found.items())]
    return "\n".join(text)


def _columns(rows: Sequence[PublishedRow]) -> dict[str, list[str]]:
    """The cells by title of their column; without empty columns, and that of a single evaluator."""
    notes = _notes(rows)
    several = len({row.evaluator for row in rows}) > 1
    scores = {
        spec.title: [spec.format(row.scores[spec.name]) if spec.name in row.scores else "" for row in rows]
        for spec in SCORES
    }
    columns = {
        "model": [row.model for row in rows],
        "guidance": [row.guidance or "" for row in rows],
        "scale": ["" if row.scale is None else f"{row.scale:g}" for row in rows],
        "steps": [row.steps or "" for row in rows],
        **scores,
        "evaluator": [row.evaluator if several else "" for row in rows],
        "source": [row.source for row in rows],
        "note": [str(notes[row.note]) if row.note else "" for row in rows],
    }
    return {title: column for title, column in columns.items() if any(column)}


def _heading(rows: Iterable[PublishedRow], papers: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The papers under their heading."""
    images = " or ".join(f"{images:,}" for images in dict.fromkeys(row.images for row in rows))
    return f"Papers ({images} samples each):", papers


def _explained(rows: Sequence[PublishedRow]) -> Iterator[tuple[str, dict[str, str]]]:
    """What else stands below a table of the rows: evaluators and notes, by what the table has of them."""
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


FORMATS: dict[str, Callable[[Sequence[PublishedRow], str | None], str]] = {
    "table": _table,
    "markdown": _markdown,
    "json": lambda rows, _: json.dumps([asdict(row) for row in rows], indent=2),
}
