"""Sweeps as figures: each metric against the guidance scale, and fidelity against diversity."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evalkit.errors import InputError, MissingDependencyError
from evalkit.results import PublishedRow, ScoreSpec, Sweep, specs_of
from evalkit.system.files import replace_atomically
from evalkit.system.storage import Place

__all__ = ["FORMATS", "write_curves"]

FORMATS = (".pdf", ".png", ".svg")

# Okabe & Ito's colours, which the colour-blind can tell apart; with them go marker and line style, for print.
STYLES = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#E69F00", "v", (0, (5, 1, 1, 1, 1, 1))),
    ("#56B4E9", "P", (0, (1, 2))),
)
# Published models: open and black.
PUBLISHED_MARKERS = "*XdpP<h>s^vDoH8"
TRADE_OFFS = (("recall", "precision"), ("inception_score", "fid"))
"""What is drawn beside each score against the scale where both are there, (horizontal, vertical)."""

# Published points further from the curves than this, in heights of the curves, would flatten them.
REACH = 0.75
# With more names than this, the legend is set smaller, so that it leaves room for the notes below it.
MANY_NAMES = 10
# Ticks closer than this share of the axis would run into one another.
TICK_DISTANCE = 0.07


def write_curves(path: Place, sweeps: Sequence[Sweep], published: Sequence[PublishedRow] = ()) -> None:
    """Draw sweeps into a PNG, SVG or PDF, atomically.

    Every score against the guidance scale; then precision against recall and FID against the Inception Score
    with the scale written at each point, in the manner of figures 3 and 4 of the ADM paper. What was computed
    nowhere is left out, and the figure says why.

    Args:
        path: Ends in one of ``FORMATS``.
        sweeps: One curve each; at most six.
        published: Points of papers, open and black; those of one model are joined by a dotted line. Those
            far from the curves are left out, and counted.

    Raises:
        InputError: Another suffix, no sweep or too many.
        MissingDependencyError: Matplotlib is not installed.
        OutputError: The file cannot be written.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: a figure ends in {', '.join(FORMATS)}.")
    if not 1 <= len(sweeps) <= len(STYLES):
        raise InputError(f"{len(sweeps)} sweeps; one figure shows 1 to {len(STYLES)}.")
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            "Curves are drawn with Matplotlib, which is not installed: pip install 'evalkit[plot]'"
        ) from None
    of_all = specs_of(point.comparison for sweep in sweeps for point in sweep.points)
    specs = {spec.name: spec for spec in of_all}
    known = [name for name in specs if any(_known(sweep, name) for sweep in sweeps)]
    panels = [("scale", name) for name in known]
    panels += [panel for panel in TRADE_OFFS if set(known).issuperset(panel)]
    labels = {"scale": "guidance scale"} | {name: spec.title for name, spec in specs.items()}
    columns = max(1, math.ceil((len(panels) + 1) / 2))  # one place for the legend
    figure = Figure(figsize=(3.6 * columns, 6.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(2, columns, squeeze=False).flat)
    models = list(dict.fromkeys(row.model for row in published))
    markers = dict(zip(models, itertools.cycle(PUBLISHED_MARKERS)))
    outside = sum(
        _draw(
            axis, x, y, sweeps, [row for row in published if x != "scale" or row.scale is not None], markers
        )
        for axis, (x, y) in zip(axes, panels, strict=False)
    )
    for axis, (x, y) in zip(axes, panels, strict=False):
        axis.set_xlabel(labels[x])
        axis.set_ylabel(labels[y])
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    for axis in axes[len(panels) :]:
        axis.axis("off")
    legend = axes[len(panels)]
    size = 9 if len(handles) <= MANY_NAMES else 7
    box = legend.legend(handles.values(), handles.keys(), loc="upper left", frameon=False, fontsize=size)
    notes = [_why_missing(sweeps, spec) for spec in specs.values() if spec.name not in known]
    if len({point.comparison.reference.digest for sweep in sweeps for point in sweep.points}) > 1:
        notes.append("The curves were measured against different references.")
    if any(score.stderr for sweep in sweeps for point in sweep.points for score in point.comparison.scores):
        notes.append("Bars: one standard error to each side, from the draw of the images.")
    if outside:
        notes.append(f"{outside} published points lie outside the panels.")
    text = "\n\n".join(textwrap.fill(note, 42) for note in notes)
    note = legend.text(0, 0, text, transform=legend.transAxes, va="bottom", fontsize=8)
    for item in (box, note):
        item.set_in_layout(False)  # long names may reach into the margin; they must not squeeze the panels
    # The same sweeps give the same bytes.
    fixed = rc_context({"svg.hashsalt": "evalkit"})
    with replace_atomically(path) as partial, partial.open("wb") as file, fixed:
        figure.savefig(file, format=path.suffix[1:], dpi=150, metadata=_WITHOUT_DATE.get(path.suffix))


_WITHOUT_DATE: dict[str, dict[str, None]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def _known(sweep: Sweep, score: str) -> bool:
    return any(value is not None for value in sweep.values(score))


def _why_missing(sweeps: Sequence[Sweep], spec: ScoreSpec) -> str:
    found = [point.comparison.missing for sweep in sweeps for point in sweep.points]
    reasons = [missing[spec.name] for missing in found if spec.name in missing]
    return f"{spec.title} was not computed: {reasons[0] if reasons else 'it is not in the results'}."


def _draw(
    axis: Any,
    x: str,
    y: str,
    sweeps: Sequence[Sweep],
    rows: Sequence[PublishedRow],
    markers: Mapping[str, str],
) -> int:
    """One panel. Returns how many published points lie outside it."""
    for index, (sweep, (colour, marker, line)) in enumerate(zip(sweeps, STYLES, strict=False)):
        scales = [point.scale for point in sweep.points]
        points = _points(scales if x == "scale" else sweep.values(x), sweep.values(y), scales)
        if not points:  # an empty line has no place, which would upset the layout
            continue
        known = [point[2] for point in points]
        axis.errorbar(
            [point[0] for point in points],
            [point[1] for point in points],
            xerr=None if x == "scale" else _bars(sweep, x, known),
            yerr=_bars(sweep, y, known),
            capsize=2,
            color=colour,
            marker=marker,
            linestyle=line,
            markersize=5,
            label=_plain(f"{sweep.name}, {sweep.points[0].comparison.samples.images:,} samples"),
            clip_on=False,
        )
        if x != "scale":
            # To the upper right of one curve and the lower left of the next, which mostly lies there.
            side = 1 if index % 2 == 0 else -1
            for right, up, scale in points:
                axis.annotate(
                    f"{scale:g}",
                    (right, up),
                    xytext=(5 * side, 5 * side),
                    textcoords="offset points",
                    ha="left" if side > 0 else "right",
                    va="bottom" if side > 0 else "top",
                    fontsize=8,
                    color=colour,
                )
    low, high = axis.get_ylim()
    low, high = low - REACH * (high - low), high + REACH * (high - low)
    outside = 0
    for model, same in _by_model(rows).items():
        scales = [row.scale or 0.0 for row in same]
        found = _points(
            scales if x == "scale" else [row.scores.get(x) for row in same],
            [row.scores.get(y) for row in same],
            scales,
        )
        near = [point for point in found if low <= point[1] <= high]
        outside += len(found) - len(near)
        if near:
            axis.plot(
                [point[0] for point in near],
                [point[1] for point in near],
                color="black",
                marker=markers[model],
                linestyle=":",
                linewidth=0.8,
                fillstyle="none",
                markersize=8,
                label=_plain(f"{model} (published)"),
                clip_on=False,
            )
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if x == "scale":
        own = {point.scale for sweep in sweeps for point in sweep.points}
        _scale_axis(axis, sorted(own), sorted({row.scale or 0.0 for row in rows} - own))
    return outside


def _by_model(rows: Sequence[PublishedRow]) -> dict[str, list[PublishedRow]]:
    """The rows of each model, by ascending scale."""
    models: dict[str, list[PublishedRow]] = {}
    for row in sorted(rows, key=lambda row: row.scale or 0.0):
        models.setdefault(row.model, []).append(row)
    return models


def _bars(sweep: Sweep, score: str, scales: Sequence[float]) -> list[float] | None:
    """Half lengths of the bars of a score at these scales; None where no scale has one."""
    known = dict(zip((point.scale for point in sweep.points), sweep.stderrs(score), strict=True))
    found = [known[scale] for scale in scales]
    # Bars of no length have caps still; those of NaN are not drawn.
    return None if not any(found) else [math.nan if each is None else each for each in found]


def _plain(text: str) -> str:
    """Text shown as it is: Matplotlib takes ``$`` for mathematics, and hides what begins with ``_``."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return f"{' ' if shown.startswith('_') else ''}{shown}".replace("$", r"\$")


def _points(
    across: Sequence[float | None], up: Sequence[float | None], scales: Sequence[float]
) -> list[tuple[float, float, float]]:
    """(x, y, scale) where both are known."""
    return [
        (x, y, scale)
        for x, y, scale in zip(across, up, scales, strict=True)
        if x is not None and y is not None
    ]


def _scale_axis(axis: Any, own: list[float], others: list[float]) -> None:
    """Square roots, so that 0, 0.5 and 1 stay apart beside 10; a tick at every scale that has the room."""
    scales = own + others
    at = dict(zip(scales, np.sign(scales) * np.abs(scales) ** 0.5, strict=True))
    low, high = min(at.values()), max(at.values())
    ticks: list[float] = []
    for scale in scales:
        if all(abs(at[scale] - at[tick]) > TICK_DISTANCE * (high - low) for tick in ticks):
            ticks.append(scale)
    axis.set_xscale(
        "function", functions=(lambda x: np.sign(x) * np.abs(x) ** 0.5, lambda x: np.sign(x) * np.square(x))
    )
    margin = 0.05 * (high - low) or 0.5
    axis.set_xlim(*(np.sign(end) * end**2 for end in (low - margin, high + margin)))
    axis.set_xticks(sorted(ticks), [f"{scale:g}" for scale in sorted(ticks)])
    axis.minorticks_off()
