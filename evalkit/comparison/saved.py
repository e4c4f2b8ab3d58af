"""How scores deviate, in a file beside the record of their comparison: to compare it with others later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evalkit.deviations import Deviations, Excess, HalfSplit, Influence
from evalkit.system.files import replace_atomically
from evalkit.system.records import read_record

__all__ = ["load_deviations", "save_deviations"]

FORMAT = "evalkit deviations 1"

_FLOATS = ("samples", "reference", "both")
_CLASSES = {"classes": "samples", "reference_classes": "reference"}
"""Labels, and the values that they are the classes of."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """What the header says of one score: fields of the same names, and which of them are arrays."""

    score: str
    kind: Literal["Influence", "HalfSplit"]
    images: int
    bias: float | None
    no_bias: str
    no_reference: str
    arrays: tuple[str, ...]
    excess: tuple[float, ...] = ()
    halves: str = ""


@dataclass(frozen=True, kw_only=True)
class _Header:
    comparison: str
    scores: tuple[_Entry, ...]


def save_deviations(path: Path, deviations: Mapping[str, Deviations], record: bytes) -> None:
    """Write an npz: a header in JSON, and the arrays of each score.

    Influence values take 8 bytes for each image of either side; classes compress to next to nothing.

    Args:
        path: An existing file is replaced, atomically.
        deviations: By score: :class:`Influence` or :class:`HalfSplit`.
        record: The text of the comparison's record. Its digest tells later whose deviations they are.

    Raises:
        OutputError: The file cannot be written.
    """
    entries = [_entry(name, found) for name, found in deviations.items()]
    header = _Header(comparison=_digest(record), scores=tuple(entries))
    text = json.dumps({"format": FORMAT, **asdict(header)})
    arrays = {
        f"{number}_{field}": getattr(found, field)
        for number, (entry, found) in enumerate(zip(entries, deviations.values(), strict=True))
        for field in entry.arrays
    }
    with replace_atomically(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, header=text, **arrays)


def load_deviations(path: Path, record: bytes) -> dict[str, Deviations] | None:
    """What :func:`save_deviations` wrote for the same record, to the bit.

    None if there is no such file, or it is damaged, of another format or of another comparison.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            header = read_record(str(arrays["header"]), _Header, formats=(FORMAT,), what="header")
            if header.comparison != _digest(record):
                return None
            return {entry.score: _restored(entry, arrays, n) for n, entry in enumerate(header.scores)}
    except Exception:  # NumPy parses headers as Python source, and lets any error out
        return None


def _digest(record: bytes) -> str:
    return hashlib.sha256(record).hexdigest()


def _entry(name: str, found: Deviations) -> _Entry:
    common: dict[str, Any] = {
        "score": name,
        "images": int(found.images),
        "bias": None if found.bias is None else float(found.bias),
        "no_bias": found.no_bias,
        "no_reference": found.no_reference,
        "arrays": tuple(f for f in (*_FLOATS, *_CLASSES) if getattr(found, f, None) is not None),
    }
    if isinstance(found, HalfSplit):
        return _Entry(kind="HalfSplit", halves=found.halves, **common)
    assert isinstance(found, Influence), f"{type(found).__name__} cannot be saved"
    return _Entry(kind="Influence", excess=tuple(map(float, found.excess)), **common)


def _restored(entry: _Entry, arrays: Mapping[str, NDArray[Any]], number: int) -> Deviations:
    """The deviations of one score; any exception if the arrays do not fit."""
    found = {field: arrays[f"{number}_{field}"] for field in entry.arrays}
    for field, values in found.items():
        if field in _CLASSES:
            fits = values.dtype == np.int64 and values.shape == found[_CLASSES[field]].shape
        else:
            fits = values.dtype.kind == "f" and values.ndim == 1 and bool(np.isfinite(values).all())
        if not (fits and len(values)):
            raise ValueError(f"{field} of {entry.score} does not fit")
    more = {
        "images": entry.images,
        "bias": entry.bias,
        "no_bias": entry.no_bias,
        "no_reference": entry.no_reference,
    }
    if entry.kind == "HalfSplit":
        return HalfSplit(halves=entry.halves, **more, **found)  # type: ignore[arg-type]
    if len(found["samples"]) != entry.images:
        raise ValueError(f"{entry.score} has another number of images")
    return Influence(excess=Excess(*entry.excess), **more, **found)  # type: ignore[arg-type]
