"""Figures as SVG inside a page: curves of sweeps, and bars of classes.

Matplotlib draws them. What it writes is then made fit for a page: text stays text, in the page's own font;
black becomes the colour of the text around it; and styles become attributes, which a strict
Content-Security-Policy allows.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from evalkit.errors import brief
from evalkit.report.plot import (
    STYLES,
    check_count,
    draw_panel,
    markers_of,
    new_figure,
    notes_on,
    panels_of,
    plain,
    published_label,
    save_figure,
    sweep_label,
)
from evalkit.results import PublishedRow, ScoreSpec, Sweep

__all__ = ["Curves", "Drawing", "draw_classes", "draw_curves"]

# In inches. At the width of a phone, text in a drawing is then about as large as that around it.
WIDTH, HEIGHT, FONT_SIZE = 3.7, 2.7, 9
# Up to so many classes, each has a bar with its name.
NAMED_CLASSES = 30
LONGEST_NAME = 24
BAR_HEIGHT = 0.19

_HREF = "{http://www.w3.org/1999/xlink}href"
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_LINK = re.compile(r"#(\w+)")
_DROPPED = ("metadata", "style")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One figure in a page.

    Attributes:
        title: Its heading.
        summary: What stands below the heading; may be empty.
        svg: The element, which is named by ``title`` and a summary of what it shows.
    """

    title: str
    summary: str = ""
    svg: str


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Sweeps as figures.

    Attributes:
        drawings: One for each score against the guidance scale, and for each trade-off.
        legend: A small SVG of line and marker, and what is drawn like that.
        notes: What else has to be said, a sentence each.
    """

    drawings: tuple[Drawing, ...]
    legend: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def draw_curves(sweeps: Sequence[Sweep], published: Sequence[PublishedRow], key: str) -> Curves:
    """Every score against the guidance scale, then fidelity against diversity.

    Args:
        sweeps: One curve each; at most six.
        published: Points of papers.
        key: Begins the ids of this figure, which have to be unique in a page.

    Raises:
        InputError: No sweep or too many.
        MissingDependencyError: Matplotlib is not installed.
    """
    check_count(sweeps)
    markers, drawings, handles, outside = markers_of(published), [], dict[str, Any](), 0
    for number, panel in enumerate(panels_of(sweeps)):
        figure = new_figure(WIDTH, HEIGHT)
        axis = figure.subplots()
        outside += draw_panel(axis, panel, sweeps, published, markers)
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        x, y = (each.title for each in panel)
        title = f"{y} against {x}"
        drawings.append(Drawing(title=title, svg=_inline(figure, f"{title}, as curves", f"{key}-{number}")))
    labels = [*map(sweep_label, sweeps), *map(published_label, markers)]
    legend = [
        (_swatch(handles[plain(label)], f"{key}-l{number}"), label)
        for number, label in enumerate(dict.fromkeys(labels))
        if plain(label) in handles
    ]
    return Curves(drawings=tuple(drawings), legend=tuple(legend), notes=tuple(notes_on(sweeps, outside)))


def draw_classes(spec: ScoreSpec, values: Mapping[str, float], of: str, key: str) -> Drawing:
    """The values of all classes as bars, the best class first.

    Args:
        spec: Of the score.
        values: By label of the class; at least one.
        of: What the samples are called.
        key: As for :func:`draw_curves`.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    ranked = sorted(values.items(), key=lambda item: item[1], reverse=spec.higher_is_better)
    heights = [value for _, value in ranked]
    named = len(ranked) <= NAMED_CLASSES
    figure = new_figure(WIDTH * 1.25, max(1.2, 0.6 + BAR_HEIGHT * len(ranked)) if named else HEIGHT)
    axis = figure.subplots()
    if named:
        names = [plain(brief(name, LONGEST_NAME)) for name, _ in ranked]
        places = range(len(ranked))
        axis.barh(places, heights, color=STYLES[0][0], height=0.7)
        axis.set_yticks(places, names)
        axis.invert_yaxis()
        axis.set_xlabel(plain(spec.title))
    else:
        # One outline in place of a thousand bars.
        edges = [rank + 0.5 for rank in range(len(ranked) + 1)]
        axis.stairs(heights, edges, fill=True, color=STYLES[0][0], linewidth=0)
        axis.set_xlim(edges[0], edges[-1])
        axis.set_xlabel(f"rank of the class, the best first ({len(ranked):,} classes)")
        axis.set_ylabel(plain(spec.title))
    axis.grid(alpha=0.3, axis="x" if named else "y")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    (best, first), (worst, last) = ranked[0], ranked[-1]
    summary = f"best {best}, {spec.format(first)}; worst {worst}, {spec.format(last)}"
    title = f"{spec.title} by class, {of}"
    svg = _inline(figure, f"{title}: {len(ranked):,} classes; {summary}", key)
    return Drawing(title=title, summary=summary, svg=svg)


def _swatch(handle: Any, key: str) -> str:
    """Line and marker of a legend's entry, hidden from screen readers."""
    from matplotlib.lines import Line2D

    line = handle[0] if isinstance(handle, tuple) else handle  # of a curve with error bars
    figure = new_figure(0.5, 0.2)
    figure.set_layout_engine("none")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    axis.set(xlim=(0, 1), ylim=(0, 1))
    drawn = Line2D([0.02, 0.5, 0.98], [0.5] * 3, markevery=[1])
    drawn.update_from(line)
    drawn.set(markevery=[1], markersize=min(6, line.get_markersize()), transform=axis.transData)
    axis.add_line(drawn)
    return _inline(figure, "", key)


def _inline(figure: Any, label: str, key: str) -> str:
    """The figure as an SVG element; without a label it is hidden from screen readers."""
    figure.set_facecolor("none")
    for axis in figure.axes:
        axis.set_facecolor("none")
        axis.tick_params(labelsize=FONT_SIZE)
        for each in (axis.xaxis.label, axis.yaxis.label):
            each.set_fontsize(FONT_SIZE)
    buffer = io.BytesIO()
    save_figure(figure, buffer, "svg", svg_fonttype="none")
    root = ElementTree.fromstring(buffer.getvalue())
    _clean(root)
    used = {name for each in root.iter() for value in each.attrib.values() for name in _LINK.findall(value)}
    for each in root.iter():
        if each.attrib.get("id") not in used:
            each.attrib.pop("id", None)
        for name, value in each.attrib.items():
            if name == "id":
                each.set(name, f"{key}-{value}")
            elif value.startswith(("#m", "url(#")):
                each.set(name, value.replace("#", f"#{key}-"))
    viewbox = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"viewBox": viewbox, "fill": "currentColor", "stroke-linejoin": "round"})
    root.attrib.update({"role": "img", "aria-label": label} if label else {"aria-hidden": "true"})
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element) -> None:
    """Make plain attributes of styles, round numbers, and drop what a page has no use for; below it, too."""
    element.tag = element.tag.rpartition("}")[2]
    for declaration in filter(None, element.attrib.pop("style", "").split(";")):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name != "font-family":
            element.set(name, "currentColor" if value == "#000000" else value)
    if _HREF in element.attrib:
        element.set("href", element.attrib.pop(_HREF))
    for name, value in element.attrib.items():
        element.set(name, _LONG_NUMBER.sub(lambda found: f"{float(found[0]):.2f}", value).replace("\n", ""))
    for child in list(element):
        if child.tag.rpartition("}")[2] in _DROPPED:
            element.remove(child)
        else:
            child.tail = None
            _clean(child)
    if element.tag not in ("text", "tspan"):
        element.text = None
