"""What networks on torch devices have in common; they get to another process as weights and settings."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, Self, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import InputError
from evalkit.extractors.sharing import kept, shared
from evalkit.system.devices import (
    check_not_forked,
    prepare_forked_process,
    resolve_device,
    with_smaller_batches,
)

__all__ = ["Travels"]

T = TypeVar("T")


class Travels:
    """A network on a torch device. What is built for the device is in cached properties, which stay behind.

    In another process it is on a device of the same kind. There, the layers are kept when nothing uses them:
    the next batch does not wait for them. A subclass sets ``batch_size`` and has ``_forward``, which makes
    features of a batch.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        batch_size: Images per forward pass, or None.

    Raises:
        InputError: The device is unknown or this machine does not have it; the batch size is below 1.
    """

    _device: torch.device
    device: str
    batch_size: int
    _has_travelled = False

    def __init__(self, device: str, batch_size: int | None) -> None:
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise InputError(f"Batch size {batch_size!r}: expected a whole number from 1, or None.")
        self._device = resolve_device(device)
        self.device = str(self._device)

    def _shared(self, network: type[T], settings: Hashable, build: Callable[[], T]) -> T:
        """The layers on this device: those of another extractor with the same settings, or what is built now.

        Args:
            network: Class of the layers.
            settings: Everything that they depend on besides the device, such as the digest of the weights.
            build: Makes them.
        """
        return (kept if self._has_travelled else shared)((network, settings, self._device), build)

    def _forward(self, images: Any) -> Any:
        raise NotImplementedError

    def _in_batches(self, images: NDArray[Any] | Tensor, finish: Callable[[list[Any]], T]) -> T:
        """What ``finish`` makes of the results of ``_forward``, one for each batch.

        If the device runs out of memory, all of it is done again with smaller batches.
        """
        prepare_forked_process()
        check_not_forked(self._device)

        def forward(batch_size: int) -> T:
            begins = range(0, len(images), batch_size)
            return finish([self._forward(images[begin : begin + batch_size]) for begin in begins])

        return with_smaller_batches(forward, self.batch_size, self._use_batch_size)

    def _use_batch_size(self, batch_size: int) -> None:
        self.batch_size = batch_size
        # The level is that of who calls the extractor: with_smaller_batches, _in_batches and the extractor's
        # own method are between.
        warnings.warn(
            f"{self.device} is out of memory: continuing with {batch_size} images per batch.", stacklevel=5
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy in this process, which stays on the same device, and shares the layers there."""
        found = memo[id(self)] = type(self).__new__(type(self))
        stays = ("_device", "device", "_has_travelled")
        vars(found).update(copy.deepcopy(self.__getstate__(), memo))
        vars(found).update({key: getattr(self, key) for key in stays})
        return found

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
