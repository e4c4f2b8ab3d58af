"""How a network gets to another process: as weights and settings. What is built of them is kept there."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, TypeVar

import torch

from evalkit.system.devices import resolve_device

__all__ = ["Travels", "kept"]

T = TypeVar("T")

_MOST = 4
_KEPT: dict[Hashable, Any] = {}


def kept(key: Hashable, build: Callable[[], T]) -> T:
    """What was built for this key in this process, or is built now; the last few are kept."""
    found: T = _KEPT.pop(key) if key in _KEPT else build()
    _KEPT[key] = found
    for old in [*_KEPT][:-_MOST]:
        del _KEPT[old]
    return found


class Travels:
    """A network on a torch device. What is built for the device is in cached properties, which stay behind.

    In another process it is on a device of the same kind. There, what :meth:`_keep` builds is kept for the
    fingerprint: the next batch through the same network does not wait for it.
    """

    _device: torch.device
    device: str
    fingerprint: Any
    _has_travelled = False

    def _keep(self, build: Callable[[], T]) -> T:
        """What ``build`` returns, now or before."""
        if not self._has_travelled:
            return build()
        return kept((type(self), self.fingerprint, self.device), build)

    def __getstate__(self) -> dict[str, Any]:
        kind = self._device.type  # another process has its own numbers of GPUs
        state = {
            key: value
            for key, value in vars(self).items()
            if not isinstance(getattr(type(self), key, None), cached_property)
        }
        return state | {"_device": kind, "device": kind, "_has_travelled": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_device": resolve_device(state["_device"])})
