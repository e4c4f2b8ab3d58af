"""WebDataset shards: tars in which ``000001.jpg``, ``000001.cls`` and so on are one sample.

See https://github.com/webdataset/webdataset. A sample's key is the path of its members up to the first dot of
the last part: ``a/000001`` for ``a/000001.jpg``. What follows the dot is the field.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Set
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from evalkit.errors import InputError, brief, listing
from evalkit.images.archives import Tar, open_tar
from evalkit.images.names import is_hidden, is_image
from evalkit.images.reading import Candidate, readable

__all__ = ["WebDataset"]

_LABEL_FIELDS = {"cls", "json"}
_JSON_NAMES = ("label", "class", "cls", "label_id")
_MAX_LABEL_BYTES = 2**20
_MEMBERS_LOOKED_AT = 64
_INTEGER = re.compile(rb"[+-]?[0-9]{1,19}")


class WebDataset(Tar):
    """A WebDataset shard, plain or compressed: one image for each sample, and its label if it has one.

    The images are in the order of the keys in the tar, as WebDataset itself reads them, not sorted by name.

    A label is an integer of 64 bits: the text of ``.cls``, or the value in ``.json`` of ``label``, ``class``,
    ``cls`` or ``label_id``. Labels are used if every sample with an image has one. Nothing else is read:
    other fields, such as captions and pickles (``.pyd``, ``.pickle``, ``.pth``), are only counted in a note.

    Raises:
        InputError: As for any tar; or a sample has several images, several members of the same name, or
            different labels.
    """

    _kind = "webdataset"

    @classmethod
    def claims(cls, candidate: Candidate) -> bool:
        """Whether it is a tar among whose first members an image has a ``.cls`` or ``.json`` of its key."""
        if not super().claims(candidate):
            return False
        found: defaultdict[str, set[str]] = defaultdict(set)
        with open_tar(candidate.path) as tar:
            for info in islice(tar, _MEMBERS_LOOKED_AT):
                path = PurePosixPath(info.name)
                if info.isreg():
                    key, field = _key_and_field(path)
                    found[key].add("image" if is_image(path) else field)
                    if "image" in found[key] and found[key] & _LABEL_FIELDS:
                        return True
        return False

    def _in_order(self, images: Mapping[str, tarfile.TarInfo]) -> Mapping[str, tarfile.TarInfo]:
        return dict(sorted(images.items(), key=lambda item: item[1].offset))

    def _take_repeated(self, names: list[str]) -> None:
        if names:
            raise InputError(
                f"{self.name}: has several members of the same name: {listing(names)}; expected one key for "
                "each sample of a WebDataset shard. Write the shard again with a new key for each"
            )

    def _take_labels(self, others: Mapping[PurePosixPath, tarfile.TarInfo]) -> Set[PurePosixPath]:
        """Set the labels, and note samples without an image; see :meth:`Members._take_labels`."""
        keys = [_key_and_field(PurePosixPath(name))[0] for name in self.names]
        self._check_one_image_each(keys)
        found: dict[str, dict[str, int | None]] = {key: {} for key in keys}
        without_image: dict[str, None] = {}
        used = set()
        with readable(self.name), self._open() as read:
            for path, info in others.items():
                key, field = _key_and_field(path)
                if not field or is_hidden(path):
                    continue
                if key not in found:
                    without_image[key] = None
                elif field in _LABEL_FIELDS:
                    used.add(path)
                    too_large = self._size(info) > _MAX_LABEL_BYTES
                    found[key] |= {path.name: None} if too_large else _parsed(path.name, field, read(info))
        if without_image:
            self.notes += (
                f"Samples without an image are left out: {len(without_image):,} "
                f"({listing(without_image, 3)}).",
            )
        labels = {key: self._label(key, places) for key, places in found.items()}
        if None not in labels.values():
            self.labels = np.array([*labels.values()], np.int64)
        else:
            missing = [key for key, places in found.items() if not places]
            unusable = [key for key, places in found.items() if places and labels[key] is None]
            reasons = ("none", missing), ("not a 64-bit integer, or in more than 1 MiB,", unusable)
            problem = "; ".join(
                f"{reason} for {len(without):,} of {len(keys):,} samples ({listing(without, 3)})"
                for reason, without in reasons
                if without
            )
            self.leave_labels_out(f"The labels are left out: {problem}.")
        return used

    def _check_one_image_each(self, keys: Iterable[str]) -> None:
        key, count = Counter(keys).most_common(1)[0]
        if count > 1:
            images = [name for name in self.names if _key_and_field(PurePosixPath(name))[0] == key]
            raise InputError(
                f"{self.name}: the sample {brief(key)} has {count:,} images: {listing(images)}; expected one "
                "for each key, the name up to its first dot. Write the shard again with the images to be "
                "measured alone"
            )

    def _label(self, key: str, places: Mapping[str, int | None]) -> int | None:
        """The integer that was found in these places; None if there is none."""
        values = {place: value for place, value in places.items() if value is not None}
        if len({*values.values()}) > 1:
            found = listing(f"{value} in {place}" for place, value in values.items())
            raise InputError(
                f"{self.name}: the sample {brief(key)} has different labels: {found}; expected one class for "
                "each image. Write the shard again with the right one alone"
            )
        return next(iter(values.values()), None)


def _key_and_field(path: PurePosixPath) -> tuple[str, str]:
    """``a/000001`` and ``seg.png`` for ``a/000001.seg.PNG``; the field is empty without a dot."""
    key, _, field = path.name.partition(".")
    return str(path.parent / key), field.lower()


def _parsed(name: str, field: str, content: bytes) -> dict[str, int | None]:
    """The labels in a ``.cls`` or ``.json``, by the place for a message; None for what is no integer."""
    if field == "cls":
        text = content.strip()
        return {name: _fitting(int(text)) if _INTEGER.fullmatch(text) else None}
    try:
        values: Any = json.loads(content)
    except (ValueError, RecursionError):
        return {name: None}
    known = [entry for entry in _JSON_NAMES if isinstance(values, dict) and entry in values]
    return {f"{entry} of {name}": _fitting(values[entry]) for entry in known}


def _fitting(value: Any) -> int | None:
    """The value if it is an integer that fits into 64 bits, else None; a boolean is no class."""
    fits = type(value) is int and -(2**63) <= value < 2**63
    return value if fits else None
