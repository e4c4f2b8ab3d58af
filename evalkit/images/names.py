"""What the names of files say: images, hidden ones, splits of a data set; and the messages on them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from evalkit.errors import listing

__all__ = [
    "duplicates_note",
    "is_hidden",
    "is_image",
    "kinds_of",
    "no_images",
    "split_of",
    "splits_note",
]

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Words by which data sets name their splits, in folders and in files of the hub.
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}


def kinds_of(members: Iterable[PurePosixPath]) -> str:
    """How many files there are of each kind: ``1 .csv, 2 hidden``."""
    kinds = Counter(_kind(member) for member in members)
    return listing(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _kind(member: PurePosixPath) -> str:
    return "hidden" if is_hidden(member) else member.suffix or "without suffix"


def no_images(name: str, kind: str, members: Iterable[PurePosixPath], notes: Iterable[str]) -> str:
    """The message about a container without images."""
    members = list(members)
    packed = {".npz", ".npy", ".tar", ".zip", ".h5", ".hdf5"} & {_kind(member) for member in members}
    advice = f". For these give a pattern: '{name}/*{min(packed)}'" if kind == "folder" and packed else ""
    return (
        f"{name}: no images; expected files ending in {', '.join(_SUFFIXES)}, "
        f"found {kinds_of(members) or 'no files'}{advice}. {' '.join(notes)}"
    ).rstrip()


def is_image(name: PurePosixPath) -> bool:
    """Whether the suffix is that of an image file and no part of the path is hidden."""
    return name.suffix.lower() in _SUFFIXES and not is_hidden(name)


def is_hidden(name: PurePosixPath) -> bool:
    """Whether a part of the path begins with a dot, or is what macOS adds to archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.parts)


def duplicates_note(name: str, members: list[str]) -> str:
    """The note on members of an archive that have the same name."""
    return f"{name} has several members of the same name; only the last is used: {listing(members)}."


def split_of(parts: Iterable[str]) -> str:
    """The split in a path, such as ``data/train-00000-of-00001.parquet`` or ``val2017/0.png``."""
    for part in parts:
        words: list[str] = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", part)
        if (word := next((word.lower() for word in words if word.lower() in _SPLITS), None)) is not None:
            return word
    return ""


def splits_note(name: str, counts: Mapping[str, int], what: str) -> str | None:
    """A note on a folder that holds several splits of a data set, which are measured together."""
    splits = {split: count for split, count in counts.items() if split}
    if len(splits) < 2:
        return None
    found = ", ".join(f"{split} ({count:,} {what})" for split, count in sorted(splits.items()))
    return (
        f"{name} holds several splits, all of which are used: {found}. If that is not intended, give only "
        "one of them."
    )
