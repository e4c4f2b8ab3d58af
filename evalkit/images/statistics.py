"""Mean and covariance that a file carries: checks before and after loading, and a note."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError

__all__ = ["check_finite", "check_header", "one_pair_note"]


def check_header(
    name: str, key: str, shape: tuple[int, ...], dtype: np.dtype[Any], expected: tuple[int, ...]
) -> None:
    """Raise an InputError unless an array of this type and shape may be a mean or covariance."""
    if shape != expected or dtype.kind != "f":
        other = ""
        if dtype.kind == "f" and shape == shape[:1] * len(expected):
            other = f". Statistics {shape[0]} wide are of another network than this one"
        raise InputError(
            f"{name}: {key} is {dtype} of shape {shape}; expected floats of shape {expected}{other}"
        )


def check_finite(name: str, key: str, array: NDArray[Any]) -> NDArray[Any]:
    """The array in native byte order.

    Raises:
        InputError: A value is not finite.
    """
    if not np.isfinite(array).all():
        raise InputError(f"{name}: {key} holds values that are not finite; compute the statistics again")
    return array.astype(array.dtype.newbyteorder("="))


def one_pair_note(name: str, names: Mapping[str, str], images: bool) -> str:
    """The note on statistics for only one of FID and sFID; ``names`` are the file's, by ours."""
    (missing, which), (there, of) = (("mu_s", "sFID"), ("mu", "FID"))
    if "mu" not in names:
        (missing, which), (there, of) = (there, of), (missing, which)
    pair = " and ".join(names.values())
    rest = f"{which} uses its images" if images else f"there is no {missing} for {which}"
    return f"{name} has only {pair}: {of} uses these, {rest}."
