"""Published rows beside measured scores, as cells of a table and a sentence on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evalkit.results import Comparison, PublishedRow, ScoreSpec

__all__ = ["published_cells", "published_note"]


def published_cells(
    specs: Sequence[ScoreSpec],
    published: Sequence[PublishedRow],
    measured: Sequence[tuple[str, Comparison]] = (),
) -> list[list[str]]:
    """A heading, measured scores if given, and the published ones: model, scores, source.

    Args:
        specs: Scores that may be shown; those that no published row has are left out.
        published: What is shown below the measured ones.
        measured: Each with what the table calls it.
    """
    rows: list[tuple[str, Mapping[str, float], str]] = [
        (name, {score.name: score.value for score in each.scores}, "") for name, each in measured
    ]
    rows += [(_model(row), row.scores, row.source) for row in published]
    printed = {name for row in published for name in row.scores}
    shown = [spec for spec in specs if spec.name in printed]
    return [
        ["model", *(spec.title for spec in shown), "source"],
        *(
            [model, *(f"{scores[spec.name]:.2f}" if spec.name in scores else "-" for spec in shown), source]
            for model, scores, source in rows
        ),
    ]


def _model(row: PublishedRow) -> str:
    """Model and guidance, such as ``DiT-XL/2, cfg scale 1.5``."""
    if (row.guidance or "").startswith("none"):
        return row.model
    scale = None if row.scale is None else f"scale {row.scale:g}"
    return ", ".join(filter(None, (row.model, " ".join(filter(None, (row.guidance, scale))))))


def published_note(comparisons: Sequence[Comparison]) -> str:
    """What the published rows are, how many more there are, and where the measured ones are not like them.

    Args:
        comparisons: All with the same rows, of one protocol.
    """
    first = comparisons[0]
    row, here = first.published[0], []
    counts = dict.fromkeys(comparison.samples.images for comparison in comparisons)
    if {*counts} != {row.images}:
        here.append(" or ".join(f"{count:,} samples" if count else "statistics alone" for count in counts))
    if first.protocol.partition(",")[0] != row.evaluator:  # the scores shown are those of the first
        here.append(f"protocol {first.protocol}")
    source = first.reference.source or ""
    name = source.removeprefix("published ")
    if name not in (source, row.dataset, row.reference):
        here.append(f"reference {name}")
    unlike = f" Not like for like, here: {', '.join(here)}." if here else ""
    shown, count, all_of = len(first.published), first.published_rows, ""
    if count > shown:
        command = f"evalkit published {row.dataset} --evaluator {row.evaluator}"
        all_of = f" The nearest {shown} of {count}; all: {command}."
    others = dict.fromkeys(row.reference for row in first.published if row.reference)
    against = "" if {*others} <= {row.dataset} else f", against {' or '.join(others)}"
    kind = f"{row.images:,} samples each, evaluator {row.evaluator}{against}"
    return f"{row.dataset} as published, {kind}.{all_of}{unlike}"
