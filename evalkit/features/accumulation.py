"""Features of images that arrive in batches of any size, bit-identical to extraction from a single batch.

:class:`~evalkit.features.extraction.Extraction` splits images into forward passes, shards and groups by
position alone. This module does the same: it buffers images until a forward pass is full, and rows until a
shard is full.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import FeatureError
from evalkit.extractors.base import Extractor, Rows
from evalkit.features import extraction, store
from evalkit.features.extraction import Part, Wanted
from evalkit.features.record import Features
from evalkit.features.work import Begun, Sums, pass_size, sums_device, tensor_device
from evalkit.features.writer import RowsOf
from evalkit.images import ImageSource

__all__ = ["Accumulation", "Collected", "features_from"]


class Collected(NamedTuple):
    """Rows and sums of all images so far.

    Attributes:
        rows: (n, d) by network and output, for outputs whose rows are kept.
        sums: Sums of the outputs that need only moments.
    """

    rows: RowsOf
    sums: Sums


class Accumulation:
    """Rows and sums of images that arrive in batches.

    Args:
        name: Name of the images, for messages.
        extractors: The networks.
        rows: Outputs whose rows are kept, by network. For a derived output, the output it is computed from.
        sums: Widths of the outputs that are accumulated as sums, by network.

    Attributes:
        count: Number of images so far.
        passes: Images per forward pass, by network.
    """

    def __init__(
        self,
        name: str,
        extractors: Sequence[Extractor],
        rows: Mapping[str, Sequence[str]],
        sums: Mapping[str, Mapping[str, int]],
    ) -> None:
        self.count = 0
        self._extractors = extractors
        self.passes = {each.network: pass_size(each) for each in extractors}
        self._unit = max(self.passes.values())
        self._device = tensor_device(extractors)  # images on this device are not copied
        self._stream: torch.cuda.Stream | None = None
        self._waiting: Tensor | None = None  # (unit, h, w, 3); the first `_held` are in use
        self._held = 0
        self._shard = Begun(store.SHARD, extractors)
        self._filled = 0
        self._full: deque[Begun] = deque()  # shards that may still be in progress on the device
        self._rows: dict[str, dict[str, list[Rows]]] = {
            network: {output: [] for output in outputs} for network, outputs in rows.items()
        }
        self._taken = 0  # images of the shards whose rows are in `_rows` and `_group`
        self._sums_device = sums_device(extractors)
        self._group, self._total = (Sums(name, sums, self._sums_device) for _ in range(2))

    @property
    def keeps_rows(self) -> bool:
        """Whether rows of any output are kept."""
        return bool(self._rows)

    def drop_rows(self) -> None:
        """Discard all rows, and keep none from now on."""
        self._rows = {}

    def add(self, images: Tensor) -> None:
        """Add (n, h, w, 3) images, uint8 or float32 in [0, 255], all of one size and dtype.

        The caller may reuse the tensor. If the networks accept tensors of its device, the images stay there.

        Raises:
            FeatureError: Features are not finite; the message says where.
        """
        self.count += len(images)
        self._order()
        if images.device != self._device:
            images = images.cpu()
        while len(images):
            if not self._held and len(images) >= self._unit:
                self._extract(images[: self._unit])
                images = images[self._unit :]
                continue
            if self._waiting is None or (not self._held and self._waiting.device != images.device):
                self._waiting = self._room_like(images)
            taken = images[: self._unit - self._held]
            self._waiting[self._held : self._held + len(taken)] = taken
            self._held += len(taken)
            images = images[len(taken) :]
            if self._held == self._unit:
                self._held = 0
                self._extract(self._waiting)

    def collected(self) -> Collected:
        """Rows and sums of all images so far. More images may be added afterwards.

        Raises:
            FeatureError: Features are not finite, or are missing for some images.
        """
        self._settle()
        part = self._part()
        rows = {
            network: {
                output: np.concatenate([*kept, part[network][output]]) for output, kept in outputs.items()
            }
            for network, outputs in self._rows.items()
        }
        total, group = copy.deepcopy(self._total), copy.deepcopy(self._group)
        if self.count > self._taken:
            group.add(self._taken, part)
        total.merge(group)
        counts = {each.n for moments in total.moments.values() for each in moments.values()}
        counts |= {len(kept) for outputs in rows.values() for kept in outputs.values()}
        if counts - {self.count}:
            raise FeatureError(
                f"Of {self.count:,} images only the features of {min(counts):,} are there: an update failed, "
                "or was interrupted. Call reset(), and give all images again."
            )
        return Collected(rows, total)

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays from which :meth:`restore` rebuilds this object."""
        self._settle()
        found: dict[str, NDArray[Any]] = {"count": np.array(self.count), "taken": np.array(self._taken)}
        if self._held:
            assert self._waiting is not None
            found["waiting"] = self._waiting[: self._held].cpu().numpy().copy()
        for network, outputs in self._shard.result().items():
            found |= {f"shard/{network}:{key}": rows[: self._filled].copy() for key, rows in outputs.items()}
        for network, kept in self._rows.items():
            empty = self._shard.result()[network]
            found |= {
                f"rows/{network}:{key}": np.concatenate([empty[key][:0], *parts])
                for key, parts in kept.items()
            }
        for name, sums in (("group", self._group), ("total", self._total)):
            for network, moments in sums.moments.items():
                for output, each in moments.items():
                    found |= {
                        f"{name}/{network}:{output}/{key}": array.copy()
                        for key, array in each.state().items()
                    }
        return found

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore what :meth:`state` returned.

        Call it only before any images are added. Arguments and :attr:`passes` must be the same.
        """
        self.count, self._taken = int(state["count"]), int(state["taken"])
        if (waiting := state.get("waiting")) is not None:
            held = torch.from_numpy(waiting)
            self._waiting = self._room_like(held)
            self._held = len(held)
            self._waiting[: self._held] = held
        for network, outputs in self._shard.result().items():
            for key, rows in outputs.items():
                kept = state[f"shard/{network}:{key}"]
                self._filled = len(kept)
                rows[: self._filled] = kept
        if not any(key.startswith("rows/") for key in state):
            self.drop_rows()
        for network, lists in self._rows.items():
            for output, parts in lists.items():
                parts.append(state[f"rows/{network}:{output}"])
        for name, sums in (("group", self._group), ("total", self._total)):
            for network, moments in sums.moments.items():
                for output, each in moments.items():
                    each.restore(
                        {key: state[f"{name}/{network}:{output}/{key}"] for key in ("n", "mean", "scatter")}
                    )

    def __getstate__(self) -> dict[str, Any]:
        """State for pickle and copy, without CUDA streams and pending results."""
        self._settle()
        self._shard.result()
        return {**vars(self), "_stream": None}

    def _settle(self) -> None:
        """Wait for all full shards, and process them."""
        self._order()
        while self._full:
            self._take(self._full.popleft().result())

    def _room_like(self, images: Tensor) -> Tensor:
        """A buffer for the images of a forward pass, on their device."""
        # A tensor created in inference mode cannot be modified in place outside of it.
        with torch.inference_mode(False):
            return images.new_empty((self._unit, *images.shape[1:]))

    def _order(self) -> None:
        """Make the current CUDA stream wait for the stream that last used the sums or buffered images."""
        device = self._device or self._sums_device
        if device is not None and device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            if self._stream is not None and self._stream != stream:
                stream.wait_stream(self._stream)
            self._stream = stream

    def _extract(self, images: Tensor) -> None:
        """Start a full forward pass of the largest batch size."""
        self._begin(self._shard, images, self._filled)
        self._filled += len(images)
        if self._filled == store.SHARD:
            self._full.append(self._shard)
            self._shard, self._filled = Begun(store.SHARD, self._extractors), 0
        while self._full and (self._full[0].done() or len(self._full) > 1):
            self._take(self._full.popleft().result())

    def _begin(self, begun: Begun, images: Tensor, at: int) -> None:
        given = images if images.device == self._device else images.numpy()
        for extractor in self._extractors:
            size = self.passes[extractor.network]
            for first in range(0, len(given), size):
                begun.add(extractor, given[first : first + size], at + first)

    def _part(self) -> RowsOf:
        """The rows of the last, partial shard, including those of buffered images."""
        rest = Begun(self._held, self._extractors)
        if self._held:
            assert self._waiting is not None
            self._begin(rest, self._waiting[: self._held], 0)
        of_rest = rest.result()
        return {
            network: {
                output: np.concatenate([rows[: self._filled], of_rest[network][output]])
                for output, rows in outputs.items()
            }
            for network, outputs in self._shard.result().items()
        }

    def _take(self, shard: RowsOf) -> None:
        """Store the rows of a full shard and add them to the sums, merged in groups as for a whole batch."""
        for network, outputs in self._rows.items():
            for output, kept in outputs.items():
                kept.append(shard[network][output])
        self._group.add(self._taken, shard)
        self._taken += store.SHARD
        if self._taken % (extraction.GROUP * store.SHARD) == 0:
            self._total.merge(self._group)
            self._group = self._group.empty()


def features_from(collected: Collected, images: ImageSource, wanted: Sequence[Wanted]) -> list[Features]:
    """The features of a batch from collected rows and sums, in the order of ``wanted``."""
    found = []
    for each in wanted:
        part = Part(images, each, None, {})
        part.put(0, len(images), collected.rows.get(part.network, {}))
        for output in part.new_moments:
            part.gaussians[output] = collected.sums.moments[part.network][output].gaussian()
        found.append(part.features())
    return found
