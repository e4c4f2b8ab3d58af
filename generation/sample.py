"""The sampling run: from settings and networks, by shards, to one npz.

The main path is :func:`run`. A sample depends on the settings, the weights and its index alone: which worker
makes it, when and among which others changes nothing but the rounding of the networks. So any number of
processes may run the same command on one folder (:mod:`generation.shards`), by hand or by torchrun, and any
of them may be killed: whoever runs the command again goes on. None waits for another inside the work.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import EvalkitError, InputError
from evalkit.images import ImageSource
from evalkit.system.files import versions
from generation.batch import Networks, sample_batch, schedule_of
from generation.cost import describe_cost
from generation.interrupts import noted_interrupts
from generation.networks.modes import arithmetic
from generation.samplers import Watch, to_uint8
from generation.settings import Settings, check_labels, choose_labels
from generation.shards import Shard, ShardFolder, check_disk

__all__ = ["Progress", "Say", "rank_of_worker", "run"]

Progress: TypeAlias = Callable[[float, int], None]
"""Told ``(done, total)`` samples after every step; of samples in hand, a part is done."""

Say: TypeAlias = Callable[[str], None]
"""Told what the user should know, a line at a time."""

POLL_SECONDS = 1.0
CPU_BATCH = 16


def run(
    settings: Settings,
    networks: Networks,
    out: Path,
    *,
    base: ImageSource | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    say: Say = print,
) -> Path:
    """Sample, or go on with a run that was begun, together with whoever else runs it.

    Args:
        settings: What to sample.
        networks: What samples it; the classifier is left aside where ``settings.scale`` is 0.
        out: The run's folder.
        base: For an upsampler: the small images, whose labels and order the samples have.
        batch_size: Samples at a time; None: as many of a shard as the device's memory takes.
        progress: Told after every step.
        say: Told what the user should know.

    Returns:
        The npz: ``arr_0`` (n, h, w, 3) uint8, ``arr_1`` (n,) int64 classes where there are any, and
        ``provenance``, JSON.

    Raises:
        EvalkitError: A sample is not finite, or a single one takes more memory than the device has.
        InputError: Settings and networks do not go together, or the folder holds samples of others.
        KeyboardInterrupt: After Ctrl-C, when the shard in hand is finished; at a second one, at once.
        OutputError: The folder cannot be written, or has not enough space.
    """
    size = networks.diffusion.preset.image_size
    check_disk(out, settings.count * size * size * 3)
    worker = _Worker(settings, networks, base, batch_size, progress, say)
    rank, workers = rank_of_worker(), int(os.environ.get("WORLD_SIZE", "1"))
    with (
        ShardFolder.open(
            out,
            identity=worker.identity(),
            made_with=worker.made_with(),
            shape=(settings.count, size, size, 3),
            shard_size=settings.shard_size,
        ) as folder,
        arithmetic(networks.mode),
        noted_interrupts(say, "the shard in hand") as interrupted,
    ):
        for note in folder.notes:
            say(f"Note: {note}; samples may differ by rounding from those that this run was begun with.")
        if not folder.shareable:
            say("This system has no file locks: let no second process run in this folder meanwhile.")
        if rank == 0 and folder.missing():
            say(describe_cost(settings, networks))
        while True:
            with closing(folder.claims(rank, workers)) as claims:
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
            say("Damaged shards were found; they are made again.")


class _Worker:
    """Makes the samples of a shard, a batch at a time."""

    def __init__(
        self,
        settings: Settings,
        networks: Networks,
        base: ImageSource | None,
        batch_size: int | None,
        progress: Progress | None,
        say: Say,
    ):
        if batch_size is not None and batch_size < 1:
            raise InputError(f"A batch of {batch_size} samples; expected a number from 1.")
        self.settings = settings
        self.networks = networks
        self.base = base
        self.labels = _labels(settings, networks, base)
        self.steps = len(schedule_of(settings, networks))
        largest = CPU_BATCH if networks.device.type == "cpu" else settings.shard_size
        self.batch_size = min(batch_size or largest, settings.shard_size)
        self.done = 0.0
        self._progress = progress
        self._say = say
        self._timed = self._waiting = False

    def identity(self) -> dict[str, Any]:
        """What decides the samples."""
        networks = {"mode": self.networks.mode}
        classifier = self.networks.classifier if self.settings.scale else None
        for kind, loaded in (("model", self.networks.diffusion), ("classifier", classifier)):
            if loaded is not None:
                networks |= {kind: loaded.preset.name, f"{kind}_sha256": loaded.digest}
        base = None if self.base is None else {"images": len(self.base), "sha256": self.base.digest}
        labels = None if self.labels is None else hashlib.sha256(self.labels.tobytes()).hexdigest()
        return {
            "settings": asdict(self.settings),
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

    def wait(self) -> None:
        """For other workers, which have all that is missing in hand and may die over it."""
        if not self._waiting:
            self._waiting = True
            self._say("All that is missing is in the hands of other workers: waiting for them.")
        self._report()
        time.sleep(POLL_SECONDS)

    def make(self, shard: Shard) -> NDArray[np.uint8]:
        """The samples of a shard; in smaller batches, if the device's memory does not suffice."""
        done = self.done
        while True:
            try:
                return np.concatenate(list(self._batches(shard)))
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise EvalkitError(
                        f"{self.networks.device} has too little memory for a single sample. Close what else "
                        "uses it, or give another --device."
                    ) from None
            # The whole shard again, so that its bytes are those of one batch size.
            self.done = done
            self.batch_size = math.ceil(self.batch_size / 2)
            torch.cuda.empty_cache()
            self._say(f"{self.networks.device} is out of memory: going on with {self.batch_size} at a time.")

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
                watch=self._watch(end - first),
            )
            if not finite.all():
                raise EvalkitError(
                    f"Sample {first + int(finite.int().argmin())} (counted from 0) is not finite: a network "
                    "returned infinity or NaN. Most likely half precision overflows (use --mode reference), "
                    "the weights are damaged or of another model, or the guidance scale is far too large."
                )
            yield to_uint8(x)

    def _report(self) -> None:
        if self._progress:
            self._progress(self.done, self.settings.count)

    def _watch(self, count: int) -> Watch:
        """Progress of a batch of ``count``; from the first batch, also how long the rest will take."""
        before, begun = self.done, time.monotonic()

        def watch(step: int, x: Tensor, _: Tensor) -> None:
            nonlocal begun
            self.done = before + count * (self.steps - step) / self.steps
            self._report()
            if not self._timed and step == self.steps - 1:
                _synchronize(x)
                begun = time.monotonic()  # the first step may compile; it is left out
            if not self._timed and step == 0:
                _synchronize(x)
                self._timed = True
                seconds = (time.monotonic() - begun) * self.steps / (self.steps - 1) / count
                left = timedelta(seconds=round((self.settings.count - self.done) * seconds))
                self._say(
                    f"{1 / seconds:.3g} images/s on {self.networks.device}: {left} for the rest, with more "
                    "workers less."
                )

        return watch


def _labels(settings: Settings, networks: Networks, base: ImageSource | None) -> NDArray[np.int64] | None:
    """The classes of a run, after the checks of what goes together."""
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
        raise InputError(f"{base.name} holds {len(base)} images; {settings.count} samples were asked for.")
    if preset.num_classes is not None:
        if base.labels is None:
            raise InputError(f"{base.name} has no labels (arr_1), and {preset.name} needs classes.")
        check_labels(base.labels, preset.num_classes, base.name)
    return base.labels


def rank_of_worker() -> int:
    """Which worker this is, where torchrun says so; else the first, 0."""
    return int(os.environ.get("RANK", "0"))


def _images(source: ImageSource, begin: int, end: int) -> NDArray[Any]:
    with closing(source.batches(end - begin, start=begin)) as batches:
        return next(batches)


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
