"""Sweeps as figures: each metric against the guidance scale, and fidelity against diversity."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from evalkit.errors import InputError, MissingDependencyError
from evalkit.results import PublishedRow, ScoreSpec, Sweep, specs_of
from evalkit.system.files import replace_atomically
from evalkit.system.storage import Place

__all__ = [
    "FORMATS",
    "STYLES",
    "Axis",
    "check_count",
    "draw_panel",
    "markers_of",
    "new_figure",
    "notes_on",
    "panels_of",
    "plain",
    "published_label",
    "save_figure",
    "sweep_label",
    "write_curves",
]

SCALE = "scale"
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


class Axis(NamedTuple):
    """What one axis of a panel shows: a score, or the guidance scale."""

    name: str
    title: str


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
    check_count(sweeps)
    panels = panels_of(sweeps)
    columns = max(1, math.ceil((len(panels) + 1) / 2))  # one place for the legend
    figure = new_figure(3.6 * columns, 6.8)
    axes = list(figure.subplots(2, columns, squeeze=False).flat)
    markers = markers_of(published)
    outside = sum(
        draw_panel(axis, panel, sweeps, published, markers) for axis, panel in zip(axes, panels, strict=False)
    )
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
    notes = [_why_missing(sweeps, spec) for spec in _specs(sweeps) if not _is_known(sweeps, spec)]
    notes += notes_on(sweeps, outside)
    text = "\n\n".join(textwrap.fill(plain(" ".join(note.split())), 42) for note in notes)
    note = legend.text(0, 0, text, transform=legend.transAxes, va="bottom", fontsize=8)
    for item in (box, note):
        item.set_in_layout(False)  # long names may reach into the margin; they must not squeeze the panels
    with replace_atomically(path) as partial, partial.open("wb") as file:
        save_figure(figure, file, path.suffix[1:])


def new_figure(width: float, height: float) -> Any:
    """An empty figure of Matplotlib, in inches.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            "Curves are drawn with Matplotlib, which is not installed: pip install 'evalkit[plot]'"
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, file: IO[bytes], kind: str, **settings: Any) -> None:
    """Write a figure; the same one gives the same bytes.

    Args:
        figure: From :func:`new_figure`.
        file: Is written to.
        kind: ``pdf``, ``png`` or ``svg``.
        settings: Of Matplotlib, such as ``svg_fonttype="none"`` for ``svg.fonttype``.
    """
    from matplotlib import rc_context

    chosen = {name.replace("_", ".", 1): value for name, value in settings.items()}
    with rc_context({"svg.hashsalt": "evalkit"} | chosen):
        figure.savefig(file, format=kind, dpi=150, metadata=_WITHOUT_DATE.get(kind))


_WITHOUT_DATE: dict[str, dict[str, None]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


def check_count(sweeps: Sequence[Sweep]) -> None:
    """Raise an InputError where there is no sweep, or more than there are styles of curves."""
    if not 1 <= len(sweeps) <= len(STYLES):
        raise InputError(f"{len(sweeps)} sweeps; one figure shows 1 to {len(STYLES)}.")


def panels_of(sweeps: Sequence[Sweep]) -> list[tuple[Axis, Axis]]:
    """What is drawn against what, horizontally and vertically: each score, and trade-offs between scores."""
    known = {spec.name: Axis(spec.name, spec.title) for spec in _specs(sweeps) if _is_known(sweeps, spec)}
    scale = Axis(SCALE, "guidance scale")
    trade_offs = [(known[x], known[y]) for x, y in TRADE_OFFS if {x, y} <= known.keys()]
    return [*((scale, score) for score in known.values()), *trade_offs]


def markers_of(published: Sequence[PublishedRow]) -> dict[str, str]:
    """The marker of each model."""
    models = dict.fromkeys(row.model for row in published)
    return dict(zip(models, itertools.cycle(PUBLISHED_MARKERS)))


def sweep_label(sweep: Sweep) -> str:
    """What the legend calls a curve."""
    return f"{sweep.name}, {sweep.points[0].comparison.samples.images:,} samples"


def published_label(model: str) -> str:
    """What the legend calls the points of a model."""
    return f"{model} (published)"


def notes_on(sweeps: Sequence[Sweep], outside: int) -> list[str]:
    """What has to be said of the panels, a sentence each.

    Args:
        sweeps: What is drawn.
        outside: How many published points are not, see :func:`draw_panel`.
    """
    notes = []
    if len({point.comparison.reference.digest for sweep in sweeps for point in sweep.points}) > 1:
        notes.append("The curves were measured against different references.")
    if any(score.stderr for sweep in sweeps for point in sweep.points for score in point.comparison.scores):
        notes.append("Bars: one standard error to each side, from the draw of the images.")
    if outside:
        notes.append(f"{outside} published points lie outside the panels.")
    return notes


def _specs(sweeps: Sequence[Sweep]) -> tuple[ScoreSpec, ...]:
    return specs_of(point.comparison for sweep in sweeps for point in sweep.points)


def _is_known(sweeps: Sequence[Sweep], spec: ScoreSpec) -> bool:
    return any(value is not None for sweep in sweeps for value in sweep.values(spec.name))


def _why_missing(sweeps: Sequence[Sweep], spec: ScoreSpec) -> str:
    found = [point.comparison.missing for sweep in sweeps for point in sweep.points]
    reasons = [missing[spec.name] for missing in found if spec.name in missing]
    return f"{spec.title} was not computed: {reasons[0] if reasons else 'it is not in the results'}."


def draw_panel(
    axis: Any,
    panel: tuple[Axis, Axis],
    sweeps: Sequence[Sweep],
    published: Sequence[PublishedRow],
    markers: Mapping[str, str],
) -> int:
    """Draw one panel.

    Args:
        axis: Matplotlib's axes.
        panel: One of :func:`panels_of`.
        sweeps: The curves.
        published: The points of papers.
        markers: From :func:`markers_of`.

    Returns:
        How many published points lie outside it.
    """
    x, y = (each.name for each in panel)
    rows = [row for row in published if x != SCALE or row.scale is not None]
    for index, (sweep, (colour, marker, line)) in enumerate(zip(sweeps, STYLES, strict=False)):
        scales = [point.scale for point in sweep.points]
        points = _points(scales if x == SCALE else sweep.values(x), sweep.values(y), scales)
        if not points:  # an empty line has no place, which would upset the layout
            continue
        known = [point[2] for point in points]
        axis.errorbar(
            [point[0] for point in points],
            [point[1] for point in points],
            xerr=None if x == SCALE else _bars(sweep, x, known),
            yerr=_bars(sweep, y, known),
            capsize=2,
            color=colour,
            marker=marker,
            linestyle=line,
            markersize=5,
            label=plain(sweep_label(sweep)),
            clip_on=False,
        )
        if x != SCALE:
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
            scales if x == SCALE else [row.scores.get(x) for row in same],
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
                label=plain(published_label(model)),
                clip_on=False,
            )
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if x == SCALE:
        own = {point.scale for sweep in sweeps for point in sweep.points}
        _scale_axis(axis, sorted(own), sorted({row.scale or 0.0 for row in rows} - own))
    axis.set_xlabel(plain(panel[0].title))
    axis.set_ylabel(plain(panel[1].title))
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


def plain(text: str) -> str:
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
