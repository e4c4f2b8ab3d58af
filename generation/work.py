"""What is done with each batch of a sampling run, here or by a worker elsewhere."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import EvalkitError, InputError, brief, first_line
from evalkit.images import ImageSource
from evalkit.system.devices import with_smaller_batches
from evalkit.system.engine import Done, Pulse
from evalkit.system.files import versions
from generation.batch import Networks, sample_batch, schedule_of
from generation.checkpoints import Loaded, load_network, network_of
from generation.networks.precision import arithmetic
from generation.pixels import to_uint8
from generation.presets import ModelPreset
from generation.published import cached
from generation.samplers.base import Callback
from generation.settings import Settings
from generation.shards import Piece

__all__ = ["Item", "Made", "MakeSamples", "Recipe", "made_with"]

logger = logging.getLogger(__name__)


class Item(NamedTuple):
    """Samples of one of the runs: number ``run`` of :attr:`MakeSamples.runs`."""

    run: int
    piece: Piece


class Made(NamedTuple):
    """The samples of an item.

    Attributes:
        images: ``(n, height, width, 3)``.
        made_with: What changed no more than their rounding, see :func:`made_with`.
    """

    images: NDArray[np.uint8]
    made_with: dict[str, Any]


def made_with(networks: Networks, batch_size: int) -> dict[str, Any]:
    """What changes no more than the rounding of samples that this process makes."""
    device = networks.device
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads"
    return versions("evalkit") | {
        "torch": torch.__version__,
        "device": where,
        "arithmetic": networks.predict.description,
        "batch_size": batch_size,
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class MakeSamples:
    """Makes batches of several runs with the same networks. Pickled, it holds a recipe for the networks.

    Attributes:
        name: See :class:`evalkit.system.engine.Work`.
        runs: Settings of each run.
        labels: ``(n,)`` classes of each run, or None.
        base: For an upsampler: the small images.
        batch_size: Samples at a time, unless memory does not suffice.
        networks: What samples them.
    """

    name: str
    runs: tuple[Settings, ...]
    labels: tuple[NDArray[np.int64] | None, ...]
    base: ImageSource | None
    batch_size: int
    networks: Networks | Recipe

    @property
    def device(self) -> str:
        """See :class:`evalkit.system.engine.Work`."""
        return str(self.networks.device)

    def prepare(self) -> _Maker:
        """Load the networks, unless they are there.

        Raises:
            InputError: Their files are not there, or hold other weights.
        """
        networks = self.networks.load() if isinstance(self.networks, Recipe) else self.networks
        return _Maker(self, networks)

    def __getstate__(self) -> dict[str, Any]:
        networks = self.networks
        return self.__dict__ | {"networks": networks if isinstance(networks, Recipe) else Recipe.of(networks)}


class _Maker:
    """Makes the samples of an item, in one batch; or in smaller ones, if the device's memory is full."""

    def __init__(self, work: MakeSamples, networks: Networks):
        self.work = work
        self.networks = networks
        self.batch_size = work.batch_size
        self._timed = False

    def __call__(self, item: Item, pulse: Pulse) -> Done[Made]:
        device = self.networks.device

        # All of it anew at each batch size, so that its bytes are those of one batch size.
        def make(batch_size: int) -> NDArray[np.uint8]:
            self.batch_size = batch_size
            self.networks.graphs.resize(batch_size)
            return np.concatenate(list(self._batches(item, pulse)))

        def tell(batch_size: int) -> None:
            logger.info("%s is out of memory: continuing with %d images per batch.", device, batch_size)

        try:
            with arithmetic(self.networks.precision):
                images = with_smaller_batches(make, self.batch_size, tell)
        except torch.OutOfMemoryError as error:
            raise EvalkitError(
                f"{device} has too little memory for a single sample. End other programs that use it, or "
                f"give another --device. It said: {brief(first_line(error))}"
            ) from error
        return Done(Made(images, made_with(self.networks, self.batch_size)))

    def _batches(self, item: Item, pulse: Pulse) -> Iterator[NDArray[np.uint8]]:
        (begin, end), labels, base = item.piece, self.work.labels[item.run], self.work.base
        small = None if base is None else _images(base, begin, end)
        for first in range(begin, end, self.batch_size):
            last = min(first + self.batch_size, end)
            x, finite = sample_batch(
                self.work.runs[item.run],
                self.networks,
                range(first, last),
                labels=None if labels is None else labels[first:last],
                low_res=None if small is None else small[first - begin : last - begin],
                callback=self._callback(item, first - begin, last - first, pulse),
            )
            if not finite.all():
                raise EvalkitError(
                    f"Sample {first + int(finite.int().argmin())} (counted from 0) is not finite: a network "
                    "returned infinity or NaN. Most likely half precision overflows (use --precision "
                    "reference), the weights are damaged or of another model, or the guidance scale is far "
                    "too large."
                )
            yield to_uint8(x)

    def _callback(self, item: Item, done: int, count: int, pulse: Pulse) -> Callback:
        """Progress of a batch of ``count`` after ``done`` others of the item."""
        steps = len(schedule_of(self.work.runs[item.run], self.networks))

        def callback(step: int, x: Tensor, _: Tensor) -> None:
            # The driver times the first batch from its first step on.
            if not self._timed and step == steps - 1 and x.is_cuda:
                torch.cuda.synchronize(x.device)
                self._timed = True
            pulse(done + count * (steps - step) / steps)

        return callback


@dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """Networks as a worker loads them: where their files are, and digests of what these hold.

    Attributes:
        diffusion: The diffusion model or upsampler.
        classifier: The classifier, or None.
        precision: See :mod:`generation.networks.precision`.
        kind: Kind of device.
    """

    diffusion: _Weights
    classifier: _Weights | None
    precision: str
    kind: str

    @classmethod
    def of(cls, networks: Networks) -> Recipe:
        """The recipe of networks; it holds the weights themselves where these have no file."""
        return cls(
            diffusion=_Weights.of(networks.diffusion),
            classifier=None if networks.classifier is None else _Weights.of(networks.classifier),
            precision=networks.precision,
            kind=networks.device.type,
        )

    @property
    def device(self) -> torch.device:
        """The device of that kind which torch uses by default."""
        return torch.device(self.kind)

    def load(self) -> Networks:
        """The networks.

        Raises:
            InputError: A file is not there, or holds other weights.
        """
        return Networks.prepare(
            self.diffusion.load(self.device),
            None if self.classifier is None else self.classifier.load(self.device),
            precision=self.precision,
            device=self.device,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Weights:
    path: Path
    preset: ModelPreset
    digest: str
    state: dict[str, Tensor] | None

    @classmethod
    def of(cls, loaded: Loaded) -> _Weights:
        path = loaded.path.absolute()
        state = None
        if not path.is_file():
            state = {name: tensor.cpu() for name, tensor in loaded.network.state_dict().items()}
        return cls(path=path, preset=loaded.preset, digest=loaded.digest, state=state)

    def load(self, device: torch.device) -> Loaded:
        if self.state is not None:
            network = network_of(self.state, self.preset, device)
            return Loaded(network=network, preset=self.preset, digest=self.digest, path=self.path)
        # A published checkpoint may be in this machine's own cache.
        path = next((path for path in (self.path, cached(self.preset)) if path.is_file()), None)
        if path is None:
            raise InputError(
                f"{self.path}: the worker on {platform.node()} sees no such file. All workers must see the "
                "checkpoint that the run was started with, at the same path."
            )
        loaded = load_network(path, self.preset, device=device)
        if loaded.digest != self.digest:
            raise InputError(
                f"{path}: the worker on {platform.node()} sees other weights than those that the run was "
                "started with. All workers must see the same checkpoint."
            )
        return loaded


def _images(source: ImageSource, begin: int, end: int) -> NDArray[Any]:
    with closing(source.batches(end - begin, start=begin)) as batches:
        return next(batches)
