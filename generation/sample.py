"""The sampling run: from settings and networks, by batches, to one npz.

The main path is :func:`run_all`. A sample depends on the settings, the weights and its index alone: which
worker makes it, when and among which others changes nothing but the rounding of the networks. This process
has an engine make the batches (:mod:`generation.work`) and writes them (:mod:`generation.shards`). If it is
killed, repeat the command to resume the run.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError
from evalkit.images import ImageSource
from evalkit.system.engine import Engine, Inline
from evalkit.system.progress import Progress
from generation.batch import Networks, schedule_of
from generation.cost import describe_cost
from generation.interrupts import defer_sigint
from generation.settings import Settings, check_labels, choose_labels
from generation.shards import ShardFolder, check_disk, check_space
from generation.work import Item, MakeSamples, made_with

__all__ = ["STAGE", "run", "run_all"]

STAGE = "sampling images"
"""The stage that :func:`run` reports to ``progress``."""

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
    engine: Engine | None = None,
) -> Path:
    """Sample, or resume a run that was begun.

    Args:
        settings: What to sample.
        networks: What samples it; the classifier is not used where ``settings.scale`` is 0.
        out: The run's folder.
        base: For an upsampler: the small images. The samples have their labels and their order.
        batch_size: Samples at a time; None: as many of a shard as the device's memory takes.
        progress: Called with (``"sampling images"``, done, total) after every step. Samples of the current
            batches count in part, rounded down.
        engine: Who makes the samples; None: this process.

    Returns:
        The npz: ``arr_0`` (n, h, w, 3) uint8, ``arr_1`` (n,) int64 classes where there are any, and
        ``provenance``, JSON.

    Raises:
        EvalkitError: A sample is not finite, or a single one takes more memory than the device has.
        InputError: Settings and networks do not fit, or the folder holds samples of other settings.
        KeyboardInterrupt: After Ctrl-C, when the current batches are finished; at a second one, at once.
        OutputError: The folder cannot be written, has not enough space, or another process samples into it.
        WorkerError: A batch could not be made in several tries.
    """
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "engine": engine}
    ((_, path),) = run_all([(settings, out)], networks, base=base, **how)
    return path


def run_all(
    runs: Sequence[tuple[Settings, Path]],
    networks: Networks,
    *,
    base: ImageSource | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> Generator[tuple[int, Path], None, None]:
    """Sample several runs as one list of batches, so that no worker waits between two runs.

    A run that is finished is yielded while no worker is busy. In this process that is before the next run
    begins; of workers some are busy until the last.

    Args:
        runs: Settings and folder of each.
        networks: See :func:`run`, also for the others.
        base: For all runs.
        batch_size: Likewise.
        progress: Called with the samples of all runs.
        engine: Free for other work whenever a run is yielded.

    Yields:
        The number of a run, and its npz.

    Raises:
        EvalkitError: See :func:`run`, also for the others.
    """
    size = networks.diffusion.preset.image_size
    for settings, out in runs:
        check_disk(out, settings.count * size * size * 3)
    work = _work(tuple(settings for settings, _ in runs), networks, base, batch_size)
    with ExitStack() as stack:
        folders = [
            stack.enter_context(
                ShardFolder.open(
                    out,
                    identity=_identity(settings, networks, base, labels),
                    made_with=made_with(networks, work.batch_size),
                    shape=(settings.count, size, size, 3),
                    shard_size=settings.shard_size,
                )
            )
            for (settings, out), labels in zip(runs, work.labels, strict=True)
        ]
        check_space(folders)
        driver = _Driver(work, folders, progress)
        driver.announce(networks)
        while driver.unfinished:
            try:
                finished = driver.advance(engine or Inline())
            finally:
                networks.graphs.resize(None)  # what comes next in this process may need the memory
            for number in finished:
                yield number, folders[number].final


class _Driver:
    """Has batches made and writes them.

    Attributes:
        unfinished: The folders without a final file, by the number of their run.
    """

    def __init__(self, work: MakeSamples, folders: Sequence[ShardFolder], progress: Progress | None):
        self.work = work
        self.unfinished = dict(enumerate(folders))
        self.total = sum(folder.shape[0] for folder in folders)
        self._progress = progress
        self._timed = False

    def announce(self, networks: Networks) -> None:
        """Say what is still to be done, and what has changed since it was begun."""
        for note in sorted({note for folder in self.unfinished.values() for note in folder.notes}):
            logger.info("%s; samples may differ by rounding from those that are there.", note)
        batch_size = self.work.batch_size
        runs = [
            self.work.runs[number] for number, folder in self.unfinished.items() if folder.missing(batch_size)
        ]
        if runs:
            logger.info(describe_cost(runs, networks))

    def advance(self, engine: Engine) -> list[int]:
        """Make samples until a run is finished and no worker is busy; returns the numbers of finished runs.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; the batches that were begun are finished.
        """
        missing = {number: folder.missing(self.work.batch_size) for number, folder in self.unfinished.items()}
        finished = [number for number, pieces in missing.items() if not pieces and self._merge(number)]
        if finished or not any(missing.values()):
            return finished
        left = {number: len(pieces) for number, pieces in missing.items()}
        before = self.total - sum(end - begin for pieces in missing.values() for begin, end in pieces)
        clock, taken, saved = _Clock(), list[Item](), 0

        def items() -> Iterator[Item]:
            for item in (Item(number, piece) for number, pieces in missing.items() for piece in pieces):
                if interrupted() or (finished and saved == len(taken)):
                    return
                taken.append(item)
                yield item

        def report(done: float) -> None:
            clock.note(done)
            if self._progress:
                self._progress(STAGE, int(before + done), self.total)

        with (
            defer_sigint("the current batches") as interrupted,
            closing(engine.map(self.work, items(), report)) as results,
        ):
            for index, made in results:
                number, piece = taken[index]
                self.unfinished[number].save(piece, *made)
                saved += 1
                left[number] -= 1
                if not left[number] and self._merge(number):
                    finished.append(number)
                if not self._timed and (rate := clock.rate()):
                    self._timed = True
                    seconds = timedelta(seconds=round((self.total - before - clock.done) / rate))
                    logger.info("%.3g images/s on %s: %s left at this rate.", rate, self.work.device, seconds)
            if interrupted():
                raise KeyboardInterrupt
        return finished

    def _merge(self, number: int) -> bool:
        """Whether a run of which all samples are there is finished now."""
        if not self.unfinished[number].merge(self.work.labels[number]):
            logger.info("Damaged shards were found; they are made again.")
            return False
        del self.unfinished[number]
        return True


class _Clock:
    """The rate from the first note on, before which workers load networks, compile and record graphs."""

    def __init__(self) -> None:
        self.done = 0.0
        self._first: tuple[float, float] | None = None

    def note(self, done: float) -> None:
        """Note how much is done."""
        self.done = done
        self._first = self._first or (time.perf_counter(), done)

    def rate(self) -> float:
        """How much is done a second; 0 where nothing shows it."""
        begun, before = self._first or (0.0, self.done)
        return (self.done - before) / (time.perf_counter() - begun)


def _work(
    runs: tuple[Settings, ...], networks: Networks, base: ImageSource | None, batch_size: int | None
) -> MakeSamples:
    if batch_size is not None and batch_size < 1:
        raise InputError(f"A batch of {batch_size} samples; expected a number from 1.")
    labels = tuple(_labels(settings, networks, base) for settings in runs)
    most = max(min(settings.shard_size, settings.count) for settings in runs)
    largest = CPU_BATCH if networks.device.type == "cpu" else most
    return MakeSamples(
        name=f"samples of {networks.diffusion.preset.name}",
        runs=runs,
        labels=labels,
        base=base,
        batch_size=min(batch_size or largest, most),
        networks=networks,
    )


def _identity(
    settings: Settings, networks: Networks, base: ImageSource | None, labels: NDArray[np.int64] | None
) -> dict[str, Any]:
    """What decides the samples."""
    described = {"precision": networks.precision}
    classifier = networks.classifier if settings.scale else None
    for kind, loaded in (("model", networks.diffusion), ("classifier", classifier)):
        if loaded is not None:
            described |= {kind: loaded.preset.name, f"{kind}_sha256": loaded.digest}
    return {
        "settings": settings.record(),
        "networks": described,
        "base": None if base is None else {"images": len(base), "sha256": base.digest},
        "labels_sha256": None if labels is None else hashlib.sha256(labels.tobytes()).hexdigest(),
    }


def _labels(settings: Settings, networks: Networks, base: ImageSource | None) -> NDArray[np.int64] | None:
    """The classes of a run, after checking that settings, networks and small images fit."""
    schedule_of(settings, networks)  # which checks the respacing
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
