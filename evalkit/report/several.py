"""Several sets of samples as text: one table, the best in every score, and which differences stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath

from evalkit.pairs import LEVEL, Pair
from evalkit.report.text import (
    adm_lines,
    describe_batch,
    describe_extractors,
    error_notes,
    no_error_notes,
    remarks,
    shown_error,
)
from evalkit.results import Comparison, ScoreSpec
from evalkit.several import Comparisons

__all__ = ["FORMATS", "markdown", "table"]

MOST_PAIRS = 3
"""Up to so many pairs in a score all are listed; of more, those with the best."""

BEST, LIKE_BEST, NOT_TESTED = "*", "=", "?"
MARKS = {BEST: "best", LIKE_BEST: "not shown to differ from the best", NOT_TESTED: "not tested against it"}


def table(found: Comparisons) -> str:
    """For the terminal: the scores of each set, marks, and the differences in words."""
    first = found.comparisons[0]
    header, *rows = _rows(found)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        f"{'reference':<10} {describe_batch(first.reference)}",
        f"{'protocol':<10} {first.protocol}; {describe_extractors(first)}",
        "",
    ]
    for cells in (header, *rows):
        shown = (f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
        lines.append("  ".join([f"{cells[0]:<{widths[0]}}", *shown]).rstrip())
    return "\n".join([*lines, "", *_below(found)])


def markdown(found: Comparisons) -> str:
    """A Markdown table with the same content."""
    first = found.comparisons[0]
    header, *rows = (f"| {' | '.join(row)} |" for row in _rows(found))
    lines = [header, "|---" * (1 + len(_shown_specs(found)) + 1) + "|", *rows]
    about = (
        f"Reference: {describe_batch(first.reference)}. "
        f"Protocol {first.protocol}; {describe_extractors(first)}."
    )
    return "\n".join([*lines, *(text for line in (*_below(found), about) for text in ("", line))])


def adm(found: Comparisons) -> str:
    """The reference evaluator's five lines for each set, under its name."""
    names = labels(found.comparisons)
    blocks = zip(names, map(adm_lines, found.comparisons), strict=True)
    return "\n\n".join(f"{name}\n{lines}" for name, lines in blocks)


def labels(comparisons: Sequence[Comparison]) -> list[str]:
    """What tells the sets apart: the last parts of their paths, as many as that takes."""
    paths = [PurePosixPath(each.samples.name).parts or (each.samples.name,) for each in comparisons]
    for depth in range(1, max(map(len, paths))):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    names = [each.samples.name for each in comparisons]
    return [f"{name} ({n})" if names.count(name) > 1 else name for n, name in enumerate(names, 1)]


def _members(found: Comparisons) -> list[str]:
    """What is compared: each set, or each setting by its runs."""
    names = labels(found.comparisons)
    if not found.settings:
        return names
    listed = [[names[i] for i in setting.members] for setting in found.settings]
    return [", ".join(each) if len(each) < 3 else f"{each[0]} ... {each[-1]}" for each in listed]


def _shown_specs(found: Comparisons) -> list[ScoreSpec]:
    """The scores that any of the sets has."""
    known = {score.name for each in found.comparisons for score in each.scores}
    return [spec for spec in found.specs if spec.name in known]


def _rows(found: Comparisons) -> Iterator[list[str]]:
    specs = _shown_specs(found)
    marks = {spec.name: _marks(found, spec) for spec in specs}
    titles = [spec.title for spec in specs]
    if found.settings:
        yield ["mean of the runs of", "runs", *titles]
    else:
        yield ["samples", "images", *titles]
    for number, name in enumerate(_members(found)):
        if found.settings:
            count = str(len(found.settings[number].members))
        else:
            count = f"{found.comparisons[number].samples.images:,}"
        cells = (f"{_cell(found, spec, number)} {marks[spec.name][number]}" for spec in specs)
        yield [name, count, *cells]


def _cell(found: Comparisons, spec: ScoreSpec, number: int) -> str:
    if found.settings:
        runs = found.settings[number].scores.get(spec.name)
        return "-" if runs is None else f"{spec.format(runs.mean)} ± {spec.format(runs.stderr)}"
    score = found.comparisons[number].score(spec.name)
    if score is None:
        return "-"
    return " ".join(filter(None, (spec.format(score.value), shown_error(spec, score))))


def _best(found: Comparisons, spec: ScoreSpec) -> int | None:
    """The number of the best set or setting, by the values that were compared; None if not all have one."""
    pairs = [pair for pair in found.pairs if pair.score == spec.name]
    values: list[float | None] = []
    if found.settings:
        runs = [setting.scores.get(spec.name) for setting in found.settings]
        values = [None if each is None else each.mean for each in runs]
    else:
        scores = [each.score(spec.name) for each in found.comparisons]
        unbiased = bool(pairs) and all(pair.unbiased for pair in pairs)
        values = [None if s is None else s.unbiased if unbiased else s.value for s in scores]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return values.index(max(known) if spec.higher_is_better else min(known))


def _marks(found: Comparisons, spec: ScoreSpec) -> list[str]:
    """Of each set or setting: whether it is the best, or not shown to differ from it."""
    count = len(found.settings or found.comparisons)
    marks = [" "] * count
    best = _best(found, spec)
    if best is None:
        return marks
    marks[best] = BEST
    for pair in found.pairs:
        if pair.score == spec.name and best in (pair.first, pair.second) and not pair.stands:
            other = pair.second if pair.first == best else pair.first
            marks[other] = NOT_TESTED if pair.difference is None else LIKE_BEST
    return marks


def _below(found: Comparisons) -> list[str]:
    """Everything under the table, a line each."""
    used = {mark for spec in _shown_specs(found) for mark in _marks(found, spec)}
    legend = ", ".join(f"{mark} {meaning}" for mark, meaning in MARKS.items() if mark in used)
    lines = [f"Marks: {legend}.", *_spreads(found)] if legend else [*_spreads(found)]
    for spec in _shown_specs(found):
        lines += _differences(found, spec)
    lines.append(_about_tests(found))
    if found.settings:
        lines.append("±: standard error of the mean; of a single run, from the draw of its images alone.")
        lines += no_error_notes(found.comparisons)
    else:
        lines += error_notes(found.comparisons)
    lines += _missing(found)
    return [*lines, *dict.fromkeys(text for each in found.comparisons for text in remarks(each))]


def _spreads(found: Comparisons) -> Iterator[str]:
    """How much runs of one setting differ, beside the error of drawing samples."""
    for name, setting in zip(_members(found), found.settings, strict=False):
        parts = []
        for spec in _shown_specs(found):
            runs = setting.scores.get(spec.name)
            if runs is not None and runs.between is not None and runs.sampling is not None:
                parts.append(f"{spec.title} {spec.format(runs.between)} ({spec.format(runs.sampling)})")
        if parts:
            yield (
                f"{name}: standard deviation between runs, and in brackets that of sampling: "
                f"{', '.join(parts)}"
            )


def _differences(found: Comparisons, spec: ScoreSpec) -> list[str]:
    pairs = [pair for pair in found.pairs if pair.score == spec.name]
    best = _best(found, spec)
    if len(pairs) > MOST_PAIRS and best is not None:
        pairs = [pair for pair in pairs if best in (pair.first, pair.second)]
    reasons = {pair.why for pair in pairs}
    if len(reasons) == 1 and None not in reasons:
        return [f"{spec.title}: not tested: {reasons.pop()}"]
    names = _members(found)
    return [_in_words(pair, spec, names) for pair in pairs]


def _in_words(pair: Pair, spec: ScoreSpec, names: Sequence[str]) -> str:
    a, b = names[pair.first], names[pair.second]
    if pair.difference is None:
        return f"{spec.title}: {a} and {b} not tested: {pair.why}"
    value, z = pair.difference.value, pair.difference.z
    by = f"{spec.format(abs(value))} ± {spec.format(pair.difference.stderr)}, z = {abs(z):.1f}"
    numbers = f"{by}, p = {pair.corrected:.2g}"
    if not pair.stands:
        return f"{spec.title}: no difference shown between {a} and {b}: {numbers}"
    if (value > 0) != spec.higher_is_better:
        a, b = b, a
    return f"{spec.title}: {a} is better than {b} by {numbers}"


def _about_tests(found: Comparisons) -> str:
    """How differences were tested."""
    tested = [pair for pair in found.pairs if pair.difference is not None]
    if not tested:
        return "No difference was tested."
    each = len(found.settings or found.comparisons)
    count = each * (each - 1) // 2
    parts = [f"Differences are tested at {LEVEL:.0%}"]
    if count > 1:
        parts.append(f"p is corrected for {count} pairs in each score (Holm)")
    titles = {spec.name: spec.title for spec in found.specs}
    unbiased = dict.fromkeys(titles[pair.score] for pair in tested if pair.unbiased)
    if unbiased:
        parts.append(f"of {', '.join(unbiased)} the values without bias are compared")
    paired = {pair.difference.paired for pair in tested if pair.difference is not None}
    if found.settings:
        parts.append("by how much the runs of a setting vary (Welch)")
    elif True in paired:
        some = "" if len(paired) == 1 else " of some sets"
        parts.append(f"images{some} are paired by index, being of the same noise and class")
    if count > MOST_PAIRS:
        parts.append("those with the best are listed; JSON has all")
    return "; ".join(parts) + "."


def _missing(found: Comparisons) -> Iterator[str]:
    """Why scores were not computed, each reason once."""
    titles = {spec.name: spec.title for spec in found.specs}
    reasons: dict[str, dict[str, None]] = {}
    for each in found.comparisons:
        for name, why in each.missing.items():
            reasons.setdefault(why, {})[titles[name]] = None
    for why, names in reasons.items():
        yield f"{' and '.join(names)} not computed: {why}"


FORMATS: dict[str, Callable[[Comparisons], str]] = {
    "table": table,
    "adm": adm,
    "markdown": markdown,
    "json": lambda found: found.to_json().rstrip("\n"),
}
