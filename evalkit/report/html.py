"""Records as one page that needs nothing else, for a colleague; and as what notebooks show.

::

    write_page(Path("report.html"), [comparison, sweep])

The page asks for nothing from elsewhere, and its Content-Security-Policy forbids it: style and script are
allowed by their digests, pictures as ``data:``. All texts come from records and files and are escaped.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from evalkit.errors import InputError, MissingDependencyError
from evalkit.report.inline_svg import draw_curves
from evalkit.report.pictures import Picture, fitted
from evalkit.report.plot import STYLES
from evalkit.report.sections import section_of, side_by_side, title_of
from evalkit.report.tables import Record
from evalkit.results import PublishedRow, Sweep
from evalkit.system.files import replace_atomically, versions
from evalkit.system.storage import Place

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

__all__ = ["fragment", "page", "write_page"]

MOST_BYTES = 5_000_000
"""A page is smaller, so that it can be sent by mail."""

PARTS = resources.files("evalkit.report") / "page"


def write_page(
    path: Place,
    records: Sequence[Record],
    figures: Sequence[Picture] = (),
    *,
    published: Sequence[PublishedRow] = (),
    command: str = "",
) -> list[str]:
    """Write :func:`page` to a file, atomically.

    Returns:
        What was done to figures so that they fit, a sentence each.

    Raises:
        InputError: See :func:`page`.
        MissingDependencyError: Likewise.
        OutputError: The file cannot be written.
    """
    text, notes = _page(records, figures, published, command)
    with replace_atomically(path) as partial:
        partial.write_bytes(text)
    return notes


def page(
    records: Sequence[Record],
    figures: Sequence[Picture] = (),
    *,
    published: Sequence[PublishedRow] = (),
    command: str = "",
) -> str:
    """A page of HTML with the scores of all records, what they mean and where they come from.

    Args:
        records: At least one; in the order of the page.
        figures: Pictures, such as sheets of samples. If the page would become too large, they are shrunk.
        published: Points of papers, for the curves of sweeps.
        command: How the page was made, to be shown at its end.

    Raises:
        InputError: There is no record, or the page would have 5 MB or more.
        MissingDependencyError: Jinja2 or Matplotlib is not installed.
    """
    return _page(records, figures, published, command)[0].decode()


def fragment(record: Record) -> str | None:
    """What a notebook shows of a record: the same tables and figures, without provenance.

    Without Matplotlib there are no figures; without Jinja2 it is None, and the notebook shows its text.
    """
    try:
        environment = _environment()
    except MissingDependencyError:
        return None
    # Several records may be shown in one notebook, and ids have to differ.
    key = "e" + hashlib.sha256(record.to_json().encode()).hexdigest()[:10]
    curves = None
    try:
        section = section_of(record, key)
        if isinstance(record, Sweep):
            curves = draw_curves([record], (), key)
    except MissingDependencyError:
        section = section_of(record, key, figures=False)
    template = environment.get_template("notebook.html")
    return _clean(template.render(section=section, curves=curves, key=key, css=_part("page.css")))


def _page(
    records: Sequence[Record], figures: Sequence[Picture], published: Sequence[PublishedRow], command: str
) -> tuple[bytes, list[str]]:
    if not records:
        raise InputError("There is no record to show. Give at least one.")
    environment = _environment()
    keyed = {f"r{number}": record for number, record in enumerate(records, 1)}
    sections = [section_of(record, key) for key, record in keyed.items()]
    sweeps = {key: [record] for key, record in keyed.items() if isinstance(record, Sweep)}
    if 1 < len(sweeps) <= len(STYLES):  # in the same figures
        sweeps = {"all": [sweep for (sweep,) in sweeps.values()]}
    css, script = _part("page.css"), _part("page.js")
    values: dict[str, Any] = {
        "title": title_of(records),
        "sections": sections,
        "together": side_by_side(records) if len(records) > 1 else None,
        "curves": {key: draw_curves(found, published, key) for key, found in sweeps.items()},
        "css": css,
        "script": script,
        "digests": {"style": _digest(css), "script": _digest(script)},
        "version": versions("evalkit")["evalkit"],
        "command": command,
    }
    template = environment.get_template("page.html")

    def rendered(pictures: Sequence[Picture]) -> bytes:
        return _clean(template.render(pictures=pictures, **values)).encode()

    without = rendered([])
    bare = len(without)
    if bare >= MOST_BYTES:
        raise InputError(
            f"The page would have {bare / 1e6:.1f} MB, and it has to be under {MOST_BYTES / 1e6:.0f} MB. "
            "Give fewer records."
        )
    if not figures:
        return without, []
    # Heading and text of a figure take some room, too.
    room = MOST_BYTES - bare - sum(3000 + 12 * len(each.heading + each.description) for each in figures)
    pictures = fitted(figures, room)
    return rendered(pictures), [picture.note for picture in pictures if picture.note]


@cache
def _environment() -> Environment:
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
    except ImportError:
        raise MissingDependencyError(
            "Pages are made with Jinja2, which is not installed: pip install 'evalkit[report]'"
        ) from None
    environment = Environment(
        autoescape=True,
        loader=FunctionLoader(_part),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(text: str) -> Markup:
    """A name that may be broken after its parts, as of a path."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in _PART.split(text))


@cache
def _part(name: str) -> str:
    """A file of the page."""
    return (PARTS / name).read_text("utf-8")


def _digest(text: str) -> str:
    """As a Content-Security-Policy names what it allows."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _clean(text: str) -> str:
    """Without what HTML cannot have and names in a record may hold: control codes, halves of characters."""
    return text.encode("utf-8", "backslashreplace").decode().translate(_NO_CHARACTERS)


# Between the last character of one part and the first of the next.
_PART = re.compile(r"(?<=[/_.])(?=[^\W\d])")
_NO_CHARACTERS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160)], "\ufffd")
