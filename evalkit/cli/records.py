"""Records that a command is given: files of `evalkit compare --json`, and folders of `evalkit sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from evalkit.errors import InputError

if TYPE_CHECKING:
    from evalkit.results import Comparison, Sweep
    from evalkit.several import Comparisons

__all__ = ["record_at"]


def record_at(path: Path) -> Comparison | Comparisons | Sweep:
    """The record in a file, or in ``results.json`` of a folder, whichever kind it is.

    Raises:
        InputError: There is none.
    """
    from evalkit.several import record_in

    place = path / "results.json" if path.is_dir() else path
    try:
        content = place.read_bytes()
    except OSError as error:
        raise InputError(
            f"{place}: {error.strerror}. Give what `evalkit compare --json` wrote, or a folder that "
            "`evalkit sweep` has filled."
        ) from error
    try:
        return record_in(content)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
