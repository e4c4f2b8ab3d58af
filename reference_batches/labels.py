"""The class of each image of a source: from its labels, its folders or its file names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError, listing
from evalkit.images import ImageFiles, ImageSource

__all__ = ["ClassOrder", "Classes", "LabelsFrom", "labels_of"]

LabelsFrom: TypeAlias = Literal["auto", "folders", "names", "none"]
ClassOrder: TypeAlias = Literal["text", "natural"]


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The class of each image.

    Attributes:
        labels: (n,) int64, or None if there are no classes.
        names: Names of the classes, by label, if they were read from names.
        notes: What the user should know, one sentence each.
    """

    labels: NDArray[np.int64] | None = None
    names: list[str] | None = None
    notes: tuple[str, ...] = ()


def labels_of(items: ImageFiles | ImageSource, how: LabelsFrom, order: ClassOrder = "text") -> Classes:
    """The class of each image.

    Args:
        items: The source.
        how: Where classes come from: ``folders`` (the first folder that is not common to all), ``names`` (the
            part of the file's name before the first underscore), ``none``, or ``auto``: the container's
            labels, or else folders if there are any.
        order: How the names of classes are sorted before they are numbered: as ``text``, which has 10 before
            2 and is what other tools do, or ``natural``, which has 2 before 10.

    Raises:
        InputError: Classes from names were requested, and some names have none.
    """
    if how == "none" or (how == "auto" and items.labels is not None):
        return Classes(labels=None if how == "none" else items.labels)
    if isinstance(items, ImageSource):
        if how != "auto":
            raise InputError(f"{items.name}: a {items.kind} has no file names to take classes from.")
        return Classes()
    if how == "names":
        files = [name.rpartition("/")[2] for name in items.names]
        found = [file.split("_")[0] if "_" in file else "" for file in files]
        expected = "names such as n01440764_10026.JPEG, the class before the first underscore"
    else:
        found = _first_folders(items.names)
        expected = "a folder for each class"
    if not all(found):
        if how == "auto":
            return Classes()
        outside = items.names[found.index("")]
        raise InputError(f"{items.name}: {outside} has no class; expected {expected}.")
    text = sorted(set(found))
    natural = sorted(text, key=_natural)
    names = natural if order == "natural" else text
    notes: tuple[str, ...] = ()
    if text != natural:
        first = next(a for a, b in zip(text, natural, strict=True) if a != b)
        other = "natural" if order == "text" else "text"
        notes = (
            f"Classes are numbered by name, in {order} order: {listing(names)}. "
            f"So {first} is class {names.index(first)}; --class-order {other} would number them differently.",
        )
    places = {name: label for label, name in enumerate(names)}
    return Classes(labels=np.array([places[name] for name in found], np.int64), names=names, notes=notes)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key to sort by that compares digits as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts if part]


def _first_folders(names: list[str]) -> list[str]:
    """For each relative POSIX path the first folder that not all share; empty if it has none."""
    paths = [name.split("/") for name in names]
    depths = zip(*(path[:-1] for path in paths), strict=False)
    common = sum(1 for _ in takewhile(lambda folders: len(set(folders)) == 1, depths))
    return [path[common] if len(path) > common + 1 else "" for path in paths]
