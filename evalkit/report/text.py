"""A comparison as text: a table to read, Markdown, or the reference evaluator's five lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from evalkit.batches import Batch
from evalkit.pairs import LEVEL, Pair
from evalkit.report.classes import class_lines
from evalkit.report.published import published_cells, published_note
from evalkit.results import NOT_REQUESTED, Comparison, Score, ScoreSpec, Sweep

__all__ = [
    "FORMATS",
    "MARKS",
    "about_marks",
    "adm_lines",
    "aligned",
    "bar_note",
    "describe_batch",
    "describe_extractors",
    "drawn",
    "error_notes",
    "mark",
    "markdown",
    "markdown_table",
    "not_compared",
    "not_requested",
    "precision_notes",
    "remarks",
    "shown_error",
    "spread_of",
    "sweep_table",
    "table",
    "titles_by",
]

BEST, LIKE_BEST, NOT_TESTED = "*", "=", "?"
MARKS = {
    BEST: "best",
    LIKE_BEST: "not shown to differ from the best",
    NOT_TESTED: "not tested against the best",
}

# The five lines of the reference evaluator, in its order and words.
ADM_LINES = {
    "inception_score": "Inception Score",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
}


def adm_lines(comparison: Comparison) -> str:
    """The reference evaluator's output: five lines in its order, values in full."""
    values = {score.name: repr(score.value) for score in comparison.scores}
    missing = {name: f"unavailable ({reason})" for name, reason in comparison.missing.items()}
    lines = dict.fromkeys(ADM_LINES, "unavailable (not in this comparison)") | missing | values
    return "\n".join(f"{title}: {lines[name]}" for name, title in ADM_LINES.items())


def table(comparison: Comparison, width: int | None = None) -> str:
    """A table for the terminal: inputs, scores, reasons for missing scores, and warnings.

    Args:
        comparison: The comparison.
        width: Width of the terminal, for published scores; see :func:`aligned`.
    """
    header = [
        ("reference", describe_batch(comparison.reference)),
        ("samples", describe_batch(comparison.samples)),
        ("protocol", f"{comparison.protocol}; {describe_extractors(comparison)}"),
    ]
    lines = [f"{key:<10} {text}" for key, text in header]
    longest = max(16, *(len(spec.title) for spec in comparison.specs))
    with_bars = any(score.stderr is not None for score in comparison.scores)
    head = f"{'metric':<{longest}} {'value':>10}"
    lines += ["", f"{head} {'':>10} {'unbiased':>10}  better" if with_bars else f"{head}  better"]
    for spec, score, reason in _rows(comparison):
        if score is None:
            lines.append(f"{spec.title:<{longest}} {'-':>10}  not computed: {reason}")
        else:
            std = f"   ({spread})" if (spread := spread_of(spec, score)) else ""
            value = f"{spec.format(score.value):>10}"
            if with_bars:
                value += f" {shown_error(spec, score):<10} {_unbiased(spec, score):>10}"
            lines.append(f"{spec.title:<{longest}} {value}  {spec.better}{std}{drawn(score, comparison)}")
            lines += [f"  {line}" for line in class_lines(spec, score)]
    lines += [*not_requested(comparison), *error_notes(comparison)]
    if comparison.published:
        cells = published_cells(comparison.specs, comparison.published, [("these samples", comparison)])
        lines += ["", published_note([comparison]), *aligned(cells, others=9, width=width)]
    for text in remarks(comparison):
        lines += ["", text]
    return "\n".join(lines)


def spread_of(spec: ScoreSpec, score: Score) -> str:
    """The standard deviation over splits or classes, if there is one: ``± 0.1350 over classes``."""
    if score.std is None:
        return ""
    return f"± {spec.format(score.std)} over {'classes' if score.by_class else 'splits'}"


def markdown(comparison: Comparison) -> str:
    """A Markdown table with the same content."""
    with_bars = any(score.stderr is not None for score in comparison.scores)
    more = " unbiased |" if with_bars else ""
    lines = [f"| metric | value |{more} better |", f"|---|---|{'---|' if with_bars else ''}---|"]
    for spec, score, reason in _rows(comparison):
        if score is None:
            lines.append(f"| {spec.title} | - |{' |' if with_bars else ''} not computed: {reason} |")
        else:
            value = " ".join(filter(None, (spec.format(score.value), shown_error(spec, score))))
            more = f" {_unbiased(spec, score)} |" if with_bars else ""
            lines.append(f"| {spec.title} | {value}{drawn(score, comparison)} |{more} {spec.better} |")
    for spec, score, _ in _rows(comparison):
        if score is not None and (within := class_lines(spec, score)):
            lines += ["", f"{spec.title}, {'; '.join(within)}."]
    below = [*not_requested(comparison), *error_notes(comparison)]
    lines += [text for line in below for text in ("", line)]
    if comparison.published:
        cells = published_cells(comparison.specs, comparison.published, [("these samples", comparison)])
        lines += ["", published_note([comparison]), "", *markdown_table(cells)]
    lines += [
        "",
        f"Reference: {describe_batch(comparison.reference)}. "
        f"Samples: {describe_batch(comparison.samples)}. "
        f"Protocol {comparison.protocol}; {describe_extractors(comparison)}.",
    ]
    for text in remarks(comparison):
        lines += ["", text]
    return "\n".join(lines)


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells as lines of Markdown; the first row is the heading."""
    header, *others = (f"| {' | '.join(row)} |" for row in rows)
    return [header, "|---" * len(rows[0]) + "|", *others]


def sweep_table(sweep: Sweep, width: int | None = None) -> str:
    """The scores at every scale, with marks; below, their meaning, reasons for missing scores, and warnings.

    Only the warnings of the first scale are shown, because those of others differ only in the file name.

    Args:
        sweep: The sweep.
        width: Width of the terminal; see :func:`aligned`.
    """
    specs = [spec for spec in sweep.specs if any(value is not None for value in sweep.values(spec.name))]
    columns = [["scale", *(f"{point.scale:g}" for point in sweep.points)]]
    columns += [_sweep_column(sweep, spec) for spec in specs]
    longest = max(8, *map(len, columns[0]))
    rows = [[f"{row[0]:>{longest}}", *row[1:]] for row in zip(*columns, strict=True)]
    lines = [*aligned(rows, others=8, width=width)]
    lines += [*about_marks(sweep), *not_compared(sweep)]
    missing = {name: why for point in sweep.points for name, why in point.comparison.missing.items()}
    titles = {spec.name: spec.title for spec in sweep.specs}
    lines += [f"{titles[name]} was not computed: {why}" for name, why in missing.items()]
    return "\n".join([*lines, *(f"warning: {text}" for text in sweep.points[0].comparison.warnings)])


def _sweep_column(sweep: Sweep, spec: ScoreSpec) -> list[str]:
    """The title of a score, and at each scale its value, with the bar and the mark where it has them."""
    scores = [point.comparison.score(spec.name) for point in sweep.points]
    bars = ["" if score is None else shown_error(spec, score) for score in scores]
    width = max(map(len, bars))
    marks = {number: mark(pair) for number, pair in sweep.from_best(spec).items()}
    cells = [spec.title + ("  " if marks else "")]
    for number, (score, bar) in enumerate(zip(scores, bars, strict=True)):
        cell = "-" if score is None else spec.format(score.value)
        cell += f" {bar:<{width}}" if width else ""
        cells.append(f"{cell} {marks.get(number, ' ')}" if marks else cell)
    return cells


def mark(from_best: Pair | None) -> str:
    """How one of several compares with the best, by its pair with that; None for the best itself."""
    if from_best is None:
        return BEST
    if from_best.difference is None:
        return NOT_TESTED
    return " " if from_best.stands else LIKE_BEST


def about_marks(sweep: Sweep) -> Iterator[str]:
    """What bars and marks of a sweep mean, in one line."""
    parts = []
    if any(error is not None for spec in sweep.specs for error in sweep.stderrs(spec.name)):
        parts.append("±: standard error from the draw of the images")
    tested = [(pair, pair.difference) for pair in sweep.pairs if pair.difference is not None]
    if tested:
        parts.append(
            f"{BEST} {MARKS[BEST]}, {LIKE_BEST} {MARKS[LIKE_BEST]}: tested at {LEVEL * 100:.0f} %, corrected "
            "for all pairs of scales in each score (Holm)"
        )
        if any(NOT_TESTED in map(mark, sweep.from_best(spec).values()) for spec in sweep.specs):
            parts.append(f"{NOT_TESTED} {MARKS[NOT_TESTED]}")
        paired = {found.paired for _, found in tested}
        same = "images of the same noise and class are paired"
        some = f"{same}, where two scales have such"
        parts.append(some if len(paired) == 2 else same if True in paired else "images are not paired")
        compared = {pair.score for pair, _ in tested if pair.unbiased}
        if unbiased := [spec.title for spec in sweep.specs if spec.name in compared]:
            parts.append(f"of {' and '.join(unbiased)} the values without bias are compared")
    if parts:
        yield "; ".join(parts) + "."


def not_compared(sweep: Sweep) -> Iterator[str]:
    """Why scores were not compared between scales that have them; a line for each reason."""
    reasons: dict[tuple[str, bool], list[str]] = {}
    for spec in sweep.specs:
        known = [value is not None for value in sweep.values(spec.name)]
        pairs = [p for p in sweep.pairs if p.score == spec.name and known[p.first] and known[p.second]]
        untested = [pair.why for pair in pairs if pair.why is not None]
        if untested:
            reasons.setdefault((untested[0], len(untested) < len(pairs)), []).append(spec.title)
    for (why, partly), titles in reasons.items():
        yield f"{' and '.join(titles)}: {'some ' if partly else ''}scales were not compared: {why}"


def _rows(comparison: Comparison) -> Iterator[tuple[ScoreSpec, Score | None, str]]:
    """Every requested score, or the reason why it is missing."""
    for spec in comparison.specs:
        reason = comparison.missing.get(spec.name, "")
        if reason != NOT_REQUESTED:
            yield spec, comparison.score(spec.name), reason


def not_requested(comparison: Comparison) -> list[str]:
    """One line that lists the protocol's scores that were not requested, if any."""
    titles = [spec.title for spec in comparison.specs if comparison.missing.get(spec.name) == NOT_REQUESTED]
    return [f"{', '.join(titles)} not computed: {NOT_REQUESTED}"] if titles else []


def shown_error(spec: ScoreSpec, score: Score) -> str:
    """``± 0.03``; empty where there is no standard error."""
    return "" if score.stderr is None else f"± {spec.format(score.stderr)}"


def _unbiased(spec: ScoreSpec, score: Score) -> str:
    return "-" if score.unbiased is None else spec.format(score.unbiased)


def bar_note(comparisons: Sequence[Comparison]) -> list[str]:
    """What the standard errors are, if there are any, with the reference's part of those of the first."""
    if all(score.stderr is None for comparison in comparisons for score in comparison.scores):
        return []
    specs = {spec.name: spec for spec in comparisons[0].specs}
    parts = ", ".join(
        f"{specs[score.name].title} {specs[score.name].format(score.stderr_reference)}"
        for score in comparisons[0].scores
        if score.stderr_reference is not None
    )
    of = f"; the reference's part: {parts}" if parts else ""
    return [f"±: standard error from the draw of the images{of}. Training again varies more."]


def error_notes(comparison: Comparison) -> list[str]:
    """What the standard errors are, and why scores have none; a line each."""
    reasons = titles_by(comparison, {score.name: score.no_stderr for score in comparison.scores})
    none = [f"no error bar of {' and '.join(titles)}: {why}" for why, titles in reasons.items()]
    return [*bar_note([comparison]), *none]


def titles_by(comparison: Comparison, said: Mapping[str, str | None]) -> dict[str, list[str]]:
    """The titles of the scores of which the same is said, by what is said.

    Args:
        comparison: Whose scores these are.
        said: By name of the score; None for nothing.
    """
    titles = {spec.name: spec.title for spec in comparison.specs}
    found: dict[str, list[str]] = {}
    for name, text in said.items():
        if text is not None:
            found.setdefault(text, []).append(titles[name])
    return found


def aligned(
    rows: Sequence[Sequence[str]], *, first: int = 0, others: int = 0, width: int | None = None
) -> Iterator[str]:
    """Format cells as lines of text: the first column left-aligned, the others right-aligned.

    Args:
        rows: The cells; the first row is the heading.
        first: Minimum width of the first column.
        others: Minimum width of every other column.
        width: Maximum line length, such as the width of a terminal; None for no limit. Columns that do not
            fit follow in further blocks of lines, each of which repeats the first column.
    """
    left, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    left, widths = max(first, left), [max(others, each) for each in widths]
    blocks: list[list[int]] = [[]]
    whole = room = 0 if width is None else width - left
    for unit in _units(rows[0][1:]):
        needed = sum(2 + widths[column] for column in unit)
        if width is not None and blocks[-1] and needed > room:
            blocks.append([])
            room = whole
        blocks[-1] += unit
        room -= needed
    for number, block in enumerate(blocks):
        if number:
            yield ""
        for title, *cells in rows:
            shown = (f"{cells[column]:>{widths[column]}}" for column in block)
            yield "  ".join([f"{title:<{left}}", *shown]).rstrip()


def _units(headings: Sequence[str]) -> Iterator[list[int]]:
    """Groups of columns that stay together: ``unbiased`` belongs to the score before it."""
    unit: list[int] = []
    for column, heading in enumerate(headings):
        if unit and heading.strip() != "unbiased":
            yield unit
            unit = []
        unit.append(column)
    if unit:
        yield unit


def drawn(score: Score, comparison: Comparison) -> str:
    """Of which images a score is, where not of all."""
    if "subset" not in score.parameters:
        return ""
    subset = score.parameters["subset"]
    counts = [min(subset, batch.images) for batch in (comparison.reference, comparison.samples)]
    of = f"{subset:,} images a side" if counts == [subset] * 2 else f"{counts[0]:,} and {counts[1]:,} images"
    seed = score.parameters.get("subset_seed", score.parameters["seed"])
    return f"   (of {of}, seed {seed})"


def describe_batch(batch: Batch) -> str:
    """Its name, how many images of which size, and where statistics and features came from."""
    parts = [batch.name]
    if batch.images:
        size = "" if batch.image_shape is None else f" {batch.image_shape[1]}x{batch.image_shape[0]}"
        parts.append(f"{batch.images:,} images{size}")
    if batch.statistics == "file":
        of = f" of {batch.statistics_images:,} images" if batch.statistics_images else ""
        parts.append(f"mean and covariance{of} from the file")
    if batch.features != "extracted" and batch.images:
        of = f" of {batch.extracted_by}" if batch.extracted_by else ""
        parts.append(f"features{of} from {'the store' if batch.features == 'stored' else 'the file'}")
    return ", ".join(parts)


def describe_extractors(comparison: Comparison) -> str:
    """The networks, with precision and device."""
    described = []
    for extractor in comparison.extractors.values():
        keys = (key for key in ("backend", "precision", "device") if key in extractor)
        how = ", ".join(str(extractor[key]) for key in keys)
        described.append(f"{extractor['name']} ({how})" if how else str(extractor["name"]))
    return "; ".join(described)


def remarks(comparison: Comparison) -> Iterator[str]:
    """What a reduced precision moves, and the warnings, a line each."""
    yield from precision_notes(comparison)
    for warning in comparison.warnings:
        yield f"warning: {warning}"


def precision_notes(comparison: Comparison) -> Iterator[str]:
    """What a reduced precision moves, in a line; none in float32."""
    check = comparison.precision_check
    if check:
        precision = next(key for key in check if key not in ("images", "float32"))
        # With what it moves: a score of so few images is of another size than that of all.
        moved = ", ".join(
            f"{spec.title} {check[precision][spec.name] - check['float32'][spec.name]:+.{spec.decimals}f} "
            f"of {spec.format(check['float32'][spec.name])}"
            for spec in comparison.specs
            if spec.name in check[precision]
        )
        moved = moved or "no score is defined for so few"
        first = " and ".join(map(str, check["images"]))
        yield f"precision check: {precision} against float32, on the first {first} images: {moved}"


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "table": table,
    "adm": adm_lines,
    "markdown": markdown,
    "json": lambda comparison: comparison.to_json().rstrip("\n"),
}
