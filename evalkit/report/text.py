"""A comparison as text: a table to read, Markdown, or the reference evaluator's five lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from evalkit.results import Batch, Comparison, Score, Sweep

__all__ = ["FORMATS", "adm_lines", "markdown", "remarks", "sweep_table", "table"]

TITLES = {
    "inception_score": "Inception Score",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
}
# Headline first for a reader; `adm_lines` keeps the reference evaluator's order.
READING_ORDER = ("fid", "sfid", "inception_score", "precision", "recall")


def adm_lines(comparison: Comparison) -> str:
    """The reference evaluator's output: five lines in its order, values in full."""
    values = {score.name: repr(score.value) for score in comparison.scores}
    missing = {name: f"unavailable ({reason})" for name, reason in comparison.missing.items()}
    return "\n".join(f"{title}: {(values | missing)[name]}" for name, title in TITLES.items())


def table(comparison: Comparison) -> str:
    """A table for the terminal: what was compared, the scores, what is missing and why, warnings."""
    header = [
        ("reference", _describe_batch(comparison.reference)),
        ("samples", _describe_batch(comparison.samples)),
        ("protocol", f"{comparison.protocol}; {_describe_extractor(comparison)}"),
    ]
    lines = [f"{key:<10} {text}" for key, text in header]
    lines += ["", f"{'metric':<16} {'value':>10}  better"]
    for name in _names(comparison):
        score = _score(comparison, name)
        if score is None:
            lines.append(f"{TITLES[name]:<16} {'-':>10}  not computed: {comparison.missing[name]}")
        else:
            spread = "" if score.spread is None else f"   (± {score.spread:.2f} over splits)"
            lines.append(
                f"{TITLES[name]:<16} {_rounded(score):>10}  {score.better}{spread}{_drawn(score, comparison)}"
            )
    if comparison.published:
        rows = _beside_published(comparison)
        width = max(len(model) for model, *_ in rows)
        lines += ["", _citation(comparison)]
        for model, *cells in rows:
            lines.append(f"{model:<{width}}{''.join(f'{cell:>11}' for cell in cells)}".rstrip())
    for text in remarks(comparison):
        lines += ["", text]
    return "\n".join(lines)


def markdown(comparison: Comparison) -> str:
    """A Markdown table with the same content."""
    lines = ["| metric | value | better |", "|---|---|---|"]
    for name in _names(comparison):
        score = _score(comparison, name)
        if score is None:
            lines.append(f"| {TITLES[name]} | - | not computed: {comparison.missing[name]} |")
        else:
            lines.append(
                f"| {TITLES[name]} | {_rounded(score)}{_drawn(score, comparison)} | {score.better} |"
            )
    if comparison.published:
        header, *rows = (f"| {' | '.join(row)} |" for row in _beside_published(comparison))
        lines += ["", _citation(comparison), "", header, "|---" * len(READING_ORDER) + "|---|---|", *rows]
    lines += [
        "",
        f"Reference: {_describe_batch(comparison.reference)}. "
        f"Samples: {_describe_batch(comparison.samples)}. "
        f"Protocol {comparison.protocol}; {_describe_extractor(comparison)}.",
    ]
    for text in remarks(comparison):
        lines += ["", text]
    return "\n".join(lines)


def _beside_published(comparison: Comparison) -> list[list[str]]:
    """A heading, the measured scores and the published ones: model, scores, table of the paper."""
    measured = {score.name: score.value for score in comparison.scores}
    rows: list[tuple[str, Mapping[str, float], str]] = [("these samples", measured, "")]
    for row in comparison.published:
        scale = "" if row.scale is None else f", scale {row.scale:g}"
        rows.append((f"{row.model}{scale}", row.scores, str(row.table)))
    heading = ["model", *("IS" if name == "inception_score" else TITLES[name] for name in READING_ORDER)]
    return [
        [*heading, "table"],
        *(
            [model, *(f"{scores[name]:.2f}" if name in scores else "-" for name in READING_ORDER), table]
            for model, scores, table in rows
        ),
    ]


def _citation(comparison: Comparison) -> str:
    """What the published rows are, and where the measured one is not like them."""
    row, here = comparison.published[0], []
    if comparison.samples.images != row.images:
        count = comparison.samples.images
        here.append(f"{count:,} samples" if count else "statistics alone")
    if comparison.protocol != "adm":
        here.append(f"protocol {comparison.protocol}")
    unlike = f" Not like for like, here: {', '.join(here)}." if here else ""
    return f"{row.dataset} as published, {row.images:,} samples each: {row.paper}.{unlike}"


def sweep_table(sweep: Sweep) -> str:
    """The scores at every scale; below, why one was not computed, and the warnings of the first scale."""
    columns = {name: sweep.values(name) for name in READING_ORDER}
    known = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    rows = [["scale", *(TITLES[name] for name in known)]]
    for (scale, _), *values in zip(sweep.points, *known.values(), strict=True):
        rows.append([f"{scale:g}", *("-" if value is None else f"{value:.4f}" for value in values)])
    widths = [max(8, *map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    missing = {name: why for _, comparison in sweep.points for name, why in comparison.missing.items()}
    lines += [f"{TITLES[name]} was not computed: {why}" for name, why in missing.items()]
    # Those of the other scales say the same of other files.
    return "\n".join([*lines, *(f"warning: {text}" for text in sweep.points[0][1].warnings)])


def _names(comparison: Comparison) -> list[str]:
    known = {score.name for score in comparison.scores} | set(comparison.missing)
    return [name for name in READING_ORDER if name in known]


def _score(comparison: Comparison, name: str) -> Score | None:
    return next((score for score in comparison.scores if score.name == name), None)


def _rounded(score: Score) -> str:
    return f"{score.value:.4f}"


def _drawn(score: Score, comparison: Comparison) -> str:
    """Of which images a score is, where not of all."""
    if "subset" not in score.parameters:
        return ""
    subset = score.parameters["subset"]
    counts = [min(subset, batch.images) for batch in (comparison.reference, comparison.samples)]
    of = f"{subset:,} images a side" if counts == [subset] * 2 else f"{counts[0]:,} and {counts[1]:,} images"
    return f"   (of {of}, seed {score.parameters['seed']})"


def _describe_batch(batch: Batch) -> str:
    parts = [batch.name]
    if batch.images:
        size = "" if batch.image_shape is None else f" {batch.image_shape[1]}x{batch.image_shape[0]}"
        parts.append(f"{batch.images:,} images{size}")
    if batch.statistics == "file":
        of = f" of {batch.statistics_images:,} images" if batch.statistics_images else ""
        parts.append(f"mean and covariance{of} from the file")
    if batch.features != "extracted" and batch.images:
        parts.append(f"features from {'the store' if batch.features == 'stored' else 'the file'}")
    return ", ".join(parts)


def _describe_extractor(comparison: Comparison) -> str:
    extractor = comparison.extractor
    how = ", ".join(str(extractor[key]) for key in ("backend", "precision", "device") if key in extractor)
    return f"{extractor['name']} ({how})" if how else str(extractor["name"])


def remarks(comparison: Comparison) -> Iterator[str]:
    """The drift of a reduced precision, and the warnings, a line each."""
    drift = comparison.drift
    if drift:
        precision = next(key for key in drift if key not in ("images", "float32"))
        moved = ", ".join(
            f"{TITLES[name]} {value - drift['float32'][name]:+.4f}"
            for name, value in drift[precision].items()
        )
        first = " and ".join(map(str, drift["images"]))
        yield f"drift: against float32, {precision} moves on the first {first} images: {moved}"
    for warning in comparison.warnings:
        yield f"warning: {warning}"


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "table": table,
    "adm": adm_lines,
    "markdown": markdown,
    "json": lambda comparison: comparison.to_json().rstrip("\n"),
}
