"""The sampling run: from settings and networks, by shards, to one npz.

The main path is :func:`run`. A sample depends on the settings, the weights and its index alone: which worker
makes it, when and among which others changes nothing but the rounding of the networks. So any number of
processes may run the same command on one folder (:mod:`generation.shards`), by hand or by torchrun, and any
of them may be killed: repeat the command to resume the run. No worker waits for another inside the work.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import EvalkitError, InputError, brief, first_line
from evalkit.images import ImageSource
from evalkit.system.devices import with_smaller_batches
from evalkit.system.files import versions
from evalkit.system.processes import rank, world_size
from evalkit.system.progress import Progress
from generation.batch import Networks, sample_batch, schedule_of
from generation.cost import describe_cost
from generation.interrupts import defer_sigint
from generation.networks.precision import arithmetic
from generation.pixels import to_uint8
from generation.samplers.base import Callback
from generation.settings import Settings, check_labels, choose_labels
from generation.shards import Shard, ShardFolder, check_disk

__all__ = ["STAGE", "run"]

STAGE = "sampling images"
"""The stage that :func:`run` reports to ``progress``."""

POLL_SECONDS = 1.0
CPU_BATCH = 16

logger = logging.getLogger(__name__)


def run(
    settings: Settings,
    networks: Networks,
    out: Path,
    *,
    base: ImageSource | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Sample, or resume a run that was begun, together with all other processes that run it.

    Args:
        settings: What to sample.
        networks: What samples it; the classifier is not used where ``settings.scale`` is 0.
        out: The run's folder.
        base: For an upsampler: the small images. The samples have their labels and their order.
        batch_size: Samples at a time; None: as many of a shard as the device's memory takes.
        progress: Called with (``"sampling images"``, done, total) after every step. Samples of the current
            batch count in part, rounded down.

    Returns:
        The npz: ``arr_0`` (n, h, w, 3) uint8, ``arr_1`` (n,) int64 classes where there are any, and
        ``provenance``, JSON.

    Raises:
        EvalkitError: A sample is not finite, or a single one takes more memory than the device has.
        InputError: Settings and networks do not fit, or the folder holds samples of other settings.
        KeyboardInterrupt: After Ctrl-C, when the current shard is finished; at a second one, at once.
        OutputError: The folder cannot be written, or has not enough space.
    """
    size = networks.diffusion.preset.image_size
    check_disk(out, settings.count * size * size * 3)
    with (
        closing(_Worker(settings, networks, base, batch_size, progress)) as worker,
        ShardFolder.open(
            out,
            identity=worker.identity(),
            made_with=worker.made_with(),
            shape=(settings.count, size, size, 3),
            shard_size=settings.shard_size,
        ) as folder,
        defer_sigint("the current shard") as interrupted,
    ):
        for note in folder.notes:
            logger.info("%s; samples may differ by rounding from those that are there.", note)
        if not folder.shareable:
            logger.warning("This system has no file locks: start no second process in this folder.")
        if rank() == 0 and folder.missing():
            logger.info(describe_cost(settings, networks))
        while True:
            with closing(folder.claims(rank(), world_size())) as claims:
                for shard in claims:
                    if interrupted():
                        raise KeyboardInterrupt
                    worker.done = settings.count - sum(end - begin for _, begin, end in folder.missing())
                    if shard is None:
                        worker.wait()
                    else:
                        folder.save(shard, worker.make(shard), worker.made_with())
            if folder.merge(worker.labels):
                return folder.final
            logger.info("Damaged shards were found; they are made again.")


class _Worker:
    """Makes the samples of a shard, a batch at a time."""

    def __init__(
        self,
        settings: Settings,
        networks: Networks,
        base: ImageSource | None,
        batch_size: int | None,
        progress: Progress | None,
    ):
        if batch_size is not None and batch_size < 1:
            raise InputError(f"A batch of {batch_size} samples; expected a number from 1.")
        self.settings = settings
        self.networks = networks
        self.base = base
        self.labels = _labels(settings, networks, base)
        self.steps = len(schedule_of(settings, networks))
        largest = CPU_BATCH if networks.device.type == "cpu" else settings.shard_size
        self.batch_size = min(batch_size or largest, settings.shard_size, settings.count)
        self.done = 0.0
        self._progress = progress
        self._timed = self._waiting = False

    def identity(self) -> dict[str, Any]:
        """What decides the samples."""
        networks = {"precision": self.networks.precision}
        classifier = self.networks.classifier if self.settings.scale else None
        for kind, loaded in (("model", self.networks.diffusion), ("classifier", classifier)):
            if loaded is not None:
                networks |= {kind: loaded.preset.name, f"{kind}_sha256": loaded.digest}
        base = None if self.base is None else {"images": len(self.base), "sha256": self.base.digest}
        labels = None if self.labels is None else hashlib.sha256(self.labels.tobytes()).hexdigest()
        return {
            "settings": self.settings.record(),
            "networks": networks,
            "base": base,
            "labels_sha256": labels,
        }

    def made_with(self) -> dict[str, Any]:
        """What changes no more than rounding."""
        device = self.networks.device
        if device.type == "cuda":
            where = torch.cuda.get_device_name(device)
        else:
            where = f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads"
        return versions("evalkit") | {
            "torch": torch.__version__,
            "device": where,
            "arithmetic": self.networks.predict.description,
            "batch_size": self.batch_size,
        }

    def close(self) -> None:
        """Free the memory of the CUDA graphs: what comes next in this process may need it."""
        self.networks.graphs.resize(None)

    def wait(self) -> None:
        """Sleep while other workers hold all missing shards; they may die and leave some."""
        if not self._waiting:
            self._waiting = True
            logger.info("Other workers have claimed all missing shards: waiting for them.")
        self._report()
        time.sleep(POLL_SECONDS)

    def make(self, shard: Shard) -> NDArray[np.uint8]:
        """The samples of a shard; in smaller batches, if the device's memory does not suffice."""
        before, device = self.done, self.networks.device

        # The whole shard anew at each batch size, so that its bytes are those of one batch size.
        def make(batch_size: int) -> NDArray[np.uint8]:
            self.batch_size, self.done = batch_size, before
            self.networks.graphs.resize(batch_size)
            return np.concatenate(list(self._batches(shard)))

        def tell(batch_size: int) -> None:
            logger.info("%s is out of memory: continuing with %d images per batch.", device, batch_size)

        try:
            with arithmetic(self.networks.precision):
                return with_smaller_batches(make, self.batch_size, tell)
        except torch.OutOfMemoryError as error:
            raise EvalkitError(
                f"{device} has too little memory for a single sample. End other programs that use it, or "
                f"give another --device. It said: {brief(first_line(error))}"
            ) from error

    def _batches(self, shard: Shard) -> Iterator[NDArray[np.uint8]]:
        small = None if self.base is None else _images(self.base, shard.begin, shard.end)
        for first in range(shard.begin, shard.end, self.batch_size):
            end = min(first + self.batch_size, shard.end)
            x, finite = sample_batch(
                self.settings,
                self.networks,
                range(first, end),
                labels=None if self.labels is None else self.labels[first:end],
                low_res=None if small is None else small[first - shard.begin : end - shard.begin],
                callback=self._callback(end - first),
            )
            if not finite.all():
                raise EvalkitError(
                    f"Sample {first + int(finite.int().argmin())} (counted from 0) is not finite: a network "
                    "returned infinity or NaN. Most likely half precision overflows (use --precision "
                    "reference), the weights are damaged or of another model, or the guidance scale is far "
                    "too large."
                )
            yield to_uint8(x)

    def _report(self) -> None:
        if self._progress:
            self._progress(STAGE, int(self.done), self.settings.count)

    def _callback(self, count: int) -> Callback:
        """Progress of a batch of ``count``; from the first batch, also how long the rest will take."""
        before, begun = self.done, time.monotonic()

        def callback(step: int, x: Tensor, _: Tensor) -> None:
            nonlocal begun
            self.done = before + count * (self.steps - step) / self.steps
            self._report()
            if not self._timed and step == self.steps - 1:
                _synchronize(x)
                begun = time.monotonic()  # without the first step, which may compile and record graphs
            if not self._timed and step == 0:
                _synchronize(x)
                self._timed = True
                seconds = (time.monotonic() - begun) * self.steps / (self.steps - 1) / count
                left = timedelta(seconds=round((self.settings.count - self.done) * seconds))
                device = self.networks.device
                logger.info(
                    "%.3g images/s on %s: %s left, less with more workers.", 1 / seconds, device, left
                )

        return callback


def _labels(settings: Settings, networks: Networks, base: ImageSource | None) -> NDArray[np.int64] | None:
    """The classes of a run, after checking that settings, networks and small images fit."""
    preset = networks.diffusion.preset
    if settings.guidance_timesteps and settings.guidance_timesteps[1] > preset.diffusion_steps:
        raise InputError(
            f"Guidance at timesteps {':'.join(map(str, settings.guidance_timesteps))}; {preset.name} has "
            f"{preset.diffusion_steps}: expected 0 <= first < end <= {preset.diffusion_steps}."
        )
    if settings.scale and networks.classifier is None:
        raise InputError(f"Guidance scale {settings.scale} without a classifier. Give one, or scale 0.")
    if base is None:
        if preset.kind == "upsampler":
            raise InputError(f"{preset.name} is an upsampler: it needs small images. Use `evalkit upsample`.")
        return choose_labels(settings, networks.num_classes(guided=settings.scale != 0))
    if preset.kind != "upsampler":
        raise InputError(f"{preset.name} is no upsampler: it takes no small images. Use `evalkit sample`.")
    size = preset.low_res_size
    if base.shape != (size, size, 3):
        raise InputError(
            f"{base.name} holds images of shape {base.shape}; {preset.name} takes ({size}, {size}, 3)."
        )
    if len(base) != settings.count:
        raise InputError(f"{base.name} holds {len(base)} images; {settings.count} samples were requested.")
    if preset.num_classes is not None:
        if base.labels is None:
            raise InputError(f"{base.name} has no labels (arr_1), and {preset.name} needs classes.")
        check_labels(base.labels, preset.num_classes, base.name)
    return base.labels


def _images(source: ImageSource, begin: int, end: int) -> NDArray[Any]:
    with closing(source.batches(end - begin, start=begin)) as batches:
        return next(batches)


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
