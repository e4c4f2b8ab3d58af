"""EDM2's statistics, a pickle: ``{num_images, fid: {mu, sigma}, fd_dinov2: {mu, sigma}}``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError, listing
from evalkit.images.pickles import MOST_BYTES, read_pickle
from evalkit.images.reading import Candidate, readable
from evalkit.images.source import ImageSource
from evalkit.images.statistics import check_finite, check_header
from evalkit.layouts import LAYOUTS, SHAPES
from evalkit.system.storage import Place, size_of

__all__ = ["Pkl"]


_SCORES = {"mu": "FID", "mu_dinov2": "FD-DINOv2"}


class Pkl(ImageSource):
    """Statistics out of a pickle, which is read as data; a source without images."""

    def __init__(self, path: Place) -> None:
        name = str(path)
        if (size := size_of(path)) > MOST_BYTES:
            raise InputError(
                f"{name}: a pickle of {size:,} bytes; evalkit reads statistics out of pickles of at most "
                f"{MOST_BYTES:,}"
            )
        with readable(name):
            content = read_pickle(name, path.read_bytes())
        super().__init__(name, "pkl", 0, None, np.dtype(np.uint8))
        self._path = path
        self.statistics = _statistics(name, content)
        self.provenance = _provenance(content)
        scores = [score for key, score in _SCORES.items() if key in self.statistics]
        missing = ["no mu_s for sFID"] if "mu" in self.statistics else ["no mu for FID", "no mu_s for sFID"]
        self.notes = (
            f"{name} holds statistics and no images.",
            f"{name} has mean and covariance for {' and '.join(scores)}, and there is "
            f"{' and '.join(missing)}.",
        )

    @classmethod
    def claims(cls, candidate: Candidate) -> bool:
        """Whether it begins as a pickle of protocol 2 or higher does."""
        head = candidate.head
        return head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")

    def _paths(self) -> Sequence[Place]:
        return [self._path]

    def _read(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        del size, start
        return iter(())


def _statistics(name: str, content: Any) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    groups = content if isinstance(content, Mapping) else {}
    for key, place in LAYOUTS["edm2"].keys.items():
        group, _, member = place.partition("/")
        if group not in groups:
            continue
        array = groups[group].get(member) if isinstance(groups[group], Mapping) else None
        where = f"{group}, {member}"
        if not isinstance(array, np.ndarray):
            raise InputError(f"{name}: {where} is no array; expected what EDM2's calculate_metrics.py writes")
        check_header(name, where, array.shape, array.dtype, SHAPES[key])
        found[key] = check_finite(name, where, array)
    if not found:
        keys = listing(groups) or "none"
        raise InputError(
            f"{name}: is a Python pickle without the statistics of EDM2; expected num_images, fid and "
            f"fd_dinov2, and its keys are {keys}. Save images with np.savez(path, images)"
        )
    return found


def _provenance(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record that evalkit wrote; for EDM2's own files, the number of images alone."""
    try:
        record = json.loads(content["provenance"])
    except (KeyError, TypeError, ValueError):
        record = None
    if isinstance(record, dict):
        return record
    count = content.get("num_images")
    return {"statistics": {"images": count}} if isinstance(count, int) and count > 0 else None
