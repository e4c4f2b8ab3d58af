"""Intermediate results that two calls of a metric share, such as a value and its standard error."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from evalkit.features.record import BatchFeatures

__all__ = ["Kept"]

T = TypeVar("T")


class Kept(Generic[T]):
    """What was computed of batches, for as long as these are in use; batches do not change."""

    def __init__(self) -> None:
        self._found: WeakKeyDictionary[BatchFeatures, dict[Hashable, T]] = WeakKeyDictionary()

    def of(self, batch: BatchFeatures, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returned for this batch and key, now or before."""
        found = self._found.setdefault(batch, {})
        if key not in found:
            found[key] = make()
        return found[key]
