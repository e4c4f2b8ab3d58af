"""Several sets of samples as text: one table, the best in every score, and which differences stand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from evalkit.pairs import LEVEL, Pair, Runs
from evalkit.report.classes import left_out
from evalkit.report.published import published_cells, published_note
from evalkit.report.text import (
    MARKS,
    adm_lines,
    aligned,
    bar_note,
    describe_batch,
    describe_extractors,
    drawn,
    mark,
    markdown_table,
    remarks,
    shown_error,
    titles_by,
)
from evalkit.results import Comparison, ScoreSpec
from evalkit.several import Comparisons

__all__ = [
    "FORMATS",
    "by_set",
    "in_words",
    "legend",
    "markdown",
    "marks",
    "members",
    "notes",
    "table",
    "verdicts",
    "what_is_missing",
]

MOST_PAIRS = 3
"""Up to so many pairs in a score all are listed; of more, those with the best."""

LEAST_P = 1e-4
"""Below, a p value is not spelled out."""


def table(found: Comparisons, width: int | None = None) -> str:
    """A table for the terminal: the scores of each set, with marks, and the differences in words.

    Args:
        found: The comparisons.
        width: Width of the terminal; see :func:`evalkit.report.text.aligned`.
    """
    first = found.comparisons[0]
    lines = [
        f"{'reference':<10} {describe_batch(first.reference)}",
        f"{'protocol':<10} {first.protocol}; {describe_extractors(first)}",
        "",
        *aligned([*_rows(found)], width=width),
        "",
    ]
    lines += _below(found)
    if first.published:
        cells = published_cells(found.specs, first.published)
        lines += ["", published_note(found.comparisons), *aligned(cells, others=9, width=width)]
    notes = [*_remarks(found)]
    return "\n".join([*lines, *([""] if first.published and notes else []), *notes])


def markdown(found: Comparisons) -> str:
    """A Markdown table with the same content."""
    first = found.comparisons[0]
    rows = [[cell.replace("|", r"\|") for cell in row] for row in _rows(found)]
    lines = markdown_table(rows)
    about = (
        f"Reference: {describe_batch(first.reference)}. "
        f"Protocol {first.protocol}; {describe_extractors(first)}."
    )
    lines += [text for line in _below(found) for text in ("", line)]
    if first.published:
        cells = published_cells(found.specs, first.published)
        lines += ["", published_note(found.comparisons), "", *markdown_table(cells)]
    return "\n".join([*lines, *(text for line in (*_remarks(found), about) for text in ("", line))])


def adm(found: Comparisons) -> str:
    """The reference evaluator's five lines for each set, under its name."""
    blocks = zip(found.labels, map(adm_lines, found.comparisons), strict=True)
    return "\n\n".join(f"{name}\n{lines}" for name, lines in blocks)


# The table -------------------------------------------------------------------------------------------------


def members(found: Comparisons) -> list[str]:
    """What is compared: each set by its name, each setting by its number, from 1."""
    if not found.settings:
        return found.labels
    return [f"setting {number}" for number in range(1, len(found.settings) + 1)]


def _shown_specs(found: Comparisons) -> list[ScoreSpec]:
    """The scores that any of the sets has."""
    known = {score.name for each in found.comparisons for score in each.scores}
    return [spec for spec in found.specs if spec.name in known]


def _compares_unbiased(found: Comparisons, spec: ScoreSpec) -> bool:
    """Whether values without bias were compared, which the table shows then."""
    return any(pair.unbiased for pair in found.pairs if pair.score == spec.name)


def _rows(found: Comparisons) -> Iterator[list[str]]:
    header = ["mean of the runs", "runs"] if found.settings else ["samples", "images"]
    columns = []
    for spec in _shown_specs(found):
        header.append(spec.title)
        columns.append(_column(found, spec, unbiased=False))
        if _compares_unbiased(found, spec):
            header.append("unbiased")
            columns.append(_column(found, spec, unbiased=True))
        # The marks are of the values that were compared.
        columns[-1] = [f"{cell} {each}" for cell, each in zip(columns[-1], marks(found, spec), strict=True)]
        header[-1] += "  "
    yield header
    for number, name in enumerate(members(found)):
        if found.settings:
            count = len(found.settings[number].members)
        else:
            count = found.comparisons[number].samples.images
        yield [name, f"{count:,}" if count else "-", *(column[number] for column in columns)]


def _column(found: Comparisons, spec: ScoreSpec, *, unbiased: bool) -> list[str]:
    if found.settings:
        known = [setting.unbiased if unbiased else setting.scores for setting in found.settings]
        return [_mean(spec, runs.get(spec.name)) for runs in known]
    cells = []
    for comparison in found.comparisons:
        score = comparison.score(spec.name)
        value = None if score is None else score.unbiased if unbiased else score.value
        error = "" if score is None or unbiased else shown_error(spec, score)
        cells.append("-" if value is None else " ".join(filter(None, (spec.format(value), error))))
    return cells


def _mean(spec: ScoreSpec, runs: Runs | None) -> str:
    return "-" if runs is None else f"{spec.format(runs.mean)} ± {spec.format(runs.stderr)}"


def marks(found: Comparisons, spec: ScoreSpec) -> list[str]:
    """Of each set or setting: whether it is the best, or how it compares with that."""
    from_best = found.from_best(spec)
    members = range(len(found.settings or found.comparisons))
    return [mark(from_best[number]) if number in from_best else " " for number in members]


# Below it --------------------------------------------------------------------------------------------------


def _below(found: Comparisons) -> list[str]:
    """Everything under the table but remarks, a line each."""
    return [*legend(found), *verdicts(found), *notes(found, all_pairs="JSON has all")]


def _remarks(found: Comparisons) -> Iterator[str]:
    return by_set(_sets(found), remarks)


def legend(found: Comparisons) -> list[str]:
    """What marks mean, and which runs the settings have."""
    return [*_legend(found), *_runs(found)]


def verdicts(found: Comparisons) -> list[str]:
    """The differences in words, and which scores were not tested."""
    lines = []
    for spec in _shown_specs(found):
        pairs = [pair for pair in found.pairs if pair.score == spec.name]
        if any(pair.difference is not None for pair in pairs):
            lines += _differences(found, spec, pairs)
    return lines + [f"{', '.join(titles)}: not tested: {why}" for why, titles in _untested(found).items()]


def notes(found: Comparisons, *, all_pairs: str) -> list[str]:
    """How differences were tested, what error bars are, and what is missing.

    Args:
        found: The comparisons.
        all_pairs: Where the differences are that :func:`verdicts` leaves out.
    """
    lines = [*_about_tests(found, all_pairs)]
    if found.settings:
        lines.append("±: standard error of the mean of the runs.")
    else:
        lines += bar_note(found.comparisons)
    said = _untested(found)
    return [*lines, *what_is_missing(_sets(found), said=said)]


def what_is_missing(sets: Sequence[tuple[str, Comparison]], *, said: Collection[str] = ()) -> Iterator[str]:
    """Why there are no error bars or no scores, and which scores are of a subset of the images.

    Args:
        sets: Each comparison with its name.
        said: Reasons for no error bars that are not repeated.
    """
    yield from by_set(sets, lambda each: _no_bar(each, said=said))
    yield from by_set(sets, _missing)
    yield from by_set(sets, _subsets)
    yield from by_set(sets, _left_out)


def _sets(found: Comparisons) -> list[tuple[str, Comparison]]:
    return [*zip(found.labels, found.comparisons, strict=True)]


def _untested(found: Comparisons) -> dict[str, list[str]]:
    """The scores of which no pair could be tested, by the reason."""
    untested: dict[str, list[str]] = {}
    for spec in _shown_specs(found):
        pairs = [pair for pair in found.pairs if pair.score == spec.name]
        if all(pair.difference is None for pair in pairs):
            for why in dict.fromkeys(str(pair.why) for pair in pairs):
                untested.setdefault(why, []).append(spec.title)
    return untested


def _legend(found: Comparisons) -> Iterator[str]:
    used = {mark(pair) for spec in _shown_specs(found) for pair in found.from_best(spec).values()}
    meanings = [f"{each} {meaning}" for each, meaning in MARKS.items() if each in used]
    if " " in used:
        meanings.append("no mark: worse than the best")
    if meanings:
        yield f"Marks: {', '.join(meanings)}."


def _runs(found: Comparisons) -> Iterator[str]:
    """Which runs a setting has, and how much they differ, beside the error of drawing samples."""
    for name, setting in zip(members(found), found.settings, strict=False):
        parts = []
        for spec in _shown_specs(found):
            runs = setting.unbiased.get(spec.name) or setting.scores.get(spec.name)
            if runs is not None and runs.between is not None and runs.sampling is not None:
                parts.append(f"{spec.title} {spec.format(runs.between)} ({spec.format(runs.sampling)})")
        files = ", ".join(found.labels[i] for i in setting.members)
        spread = "standard deviation between runs (of sampling): " + ", ".join(parts)
        yield f"{name}: {files}{'; ' + spread if parts else ''}"


def _differences(found: Comparisons, spec: ScoreSpec, pairs: Sequence[Pair]) -> list[str]:
    if len(pairs) > MOST_PAIRS:
        pairs = [pair for pair in found.from_best(spec).values() if pair is not None]
    return [in_words(found, pair, spec) for pair in pairs]


def in_words(found: Comparisons, pair: Pair, spec: ScoreSpec) -> str:
    """Which of two is better in a score, by how much; or that no difference is shown."""
    names, ratio = members(found), "t" if found.settings else "z"
    a, b = names[pair.first], names[pair.second]
    if pair.difference is None or pair.corrected is None:
        return f"{spec.title}: {a} and {b} not tested: {pair.why}"
    value, z = pair.difference.value, pair.difference.z
    p = f"p = {pair.corrected:.2g}" if pair.corrected >= LEAST_P else f"p < {LEAST_P:.4f}"
    by = f"{spec.format(abs(value))} ± {spec.format(pair.difference.stderr)}"
    numbers = f"{by}, {ratio} = {abs(z):.1f}, {p}"
    if not pair.stands:
        return f"{spec.title}: no difference shown between {a} and {b}: {numbers}"
    if (value > 0) != spec.higher_is_better:
        a, b = b, a
    return f"{spec.title}: {a} is better than {b} by {numbers}"


def _about_tests(found: Comparisons, all_pairs: str) -> Iterator[str]:
    """How differences were tested."""
    tested = [pair for pair in found.pairs if pair.difference is not None]
    if not tested:
        return
    what = "Settings are tested" if found.settings else "Differences are tested"
    how = " by how much their runs vary (Welch's t-test)" if found.settings else ""
    parts = [f"{what} at {LEVEL * 100:.0f} %{how}"]
    counts = [sum(pair.score == spec.name for pair in tested) for spec in _shown_specs(found)]
    if max(counts) > 1:
        many = str(max(counts)) if len(set(counts)) == 1 else f"up to {max(counts)}"
        parts.append(f"p is corrected for the {many} pairs tested for each score (Holm)")
    if any(pair.unbiased for pair in tested):
        parts.append("unbiased values are compared where there are any")
    paired = {pair.difference.paired for pair in tested if pair.difference is not None}
    if True in paired:
        some = "" if len(paired) == 1 else " of some sets"
        parts.append(f"images{some} are paired by index, as they come from the same noise and class")
    if len(found.pairs) > MOST_PAIRS * len(counts):
        parts.append(f"only differences from the best are listed here, and {all_pairs}")
    yield "; ".join(parts) + "."


def _no_bar(comparison: Comparison, said: Collection[str]) -> Iterator[str]:
    """Why scores have no standard errors, but for the reasons that are said already."""
    reasons = titles_by(comparison, {score.name: score.no_stderr for score in comparison.scores})
    for why, titles in reasons.items():
        if why not in said:
            yield f"no error bar of {', '.join(titles)}: {why}"


def _missing(comparison: Comparison) -> Iterator[str]:
    for why, titles in titles_by(comparison, comparison.missing).items():
        yield f"{', '.join(titles)} not computed: {why}"


def _subsets(comparison: Comparison) -> Iterator[str]:
    said = {score.name: drawn(score, comparison) or None for score in comparison.scores}
    for of, titles in titles_by(comparison, said).items():
        yield f"{', '.join(titles)}: {of.strip().strip('()')}"


def _left_out(comparison: Comparison) -> Iterator[str]:
    for why, titles in titles_by(comparison, {s.name: left_out(s) for s in comparison.scores}).items():
        yield f"{', '.join(titles)}: {why}"


def by_set(
    sets: Sequence[tuple[str, Comparison]], texts: Callable[[Comparison], Iterable[str]]
) -> Iterator[str]:
    """Each note once: as it is if it is of all sets, else with the sets that it is of.

    Args:
        sets: Each comparison with its name.
        texts: The notes on one.
    """
    of: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for label, comparison in sets:
        for text in texts(comparison):
            # Notes on different sets that say the same are one.
            key = text.replace(comparison.samples.name, "\0").replace(f"{comparison.samples.images:,}", "\1")
            of.setdefault(key, []).append(label)
            first.setdefault(key, text)
    for key, labels in of.items():
        if "\0" in key:
            others = f" (likewise for {', '.join(labels[1:])})" if len(labels) > 1 else ""
            yield first[key] + others
        elif len(labels) == len(sets):
            yield first[key]
        else:
            yield f"{', '.join(labels)}: {first[key]}"


FORMATS: dict[str, Callable[[Comparisons], str]] = {
    "table": table,
    "adm": adm,
    "markdown": markdown,
    "json": lambda found: found.to_json().rstrip("\n"),
}
