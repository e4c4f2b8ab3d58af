"""Training of diffusion models and of the classifiers that guide them.

The main path is :func:`train`. The seed and the step decide what a step does: which images, their crops,
timesteps, noise and dropout all come from counters. So a run that was killed and resumed is, on a CPU, equal
bit for bit to one that was not; and processes that share the batch (torchrun) change nothing but rounding and
dropout masks.

One file, ``checkpoint.pt``, holds all that is needed to resume; it is replaced as a whole. Beside it are the
averaged weights as ``evalkit sample`` takes them, the log and image grids of samples.
"""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import InputError, MissingDependencyError, OutputError
from evalkit.images import ImageSource, read_ahead
from evalkit.report.image_grid import write_grid
from evalkit.system.files import check_writable, physical_memory
from evalkit.system.locks import exclusive_lock
from evalkit.system.processes import local_world_size, world_size
from evalkit.system.progress import Progress
from generation.checkpoints import save_network
from generation.denoisers import EpsDenoiser
from generation.interrupts import defer_sigint
from generation.networks.layers import GROUPS
from generation.networks.unet import Trunk
from generation.noise import Streams
from generation.pixels import to_uint8
from generation.presets import ModelPreset
from generation.process_group import ProcessGroup, join_group
from generation.recipe import Recipe
from generation.samplers.ddim import DDIM
from generation.schedule import make_schedule
from generation.trainer import Trainer, noise_at
from generation.training_data import Use, as_bytes, batches, check_images, load_pixels, resize_crop

__all__ = ["Options", "accuracy_by_noise", "train"]

METRICS_EVERY = 50
TIMED_STEPS = 20
GRID_IMAGES = 64
GRID_STEPS = 25
NOISE_LEVELS = 10
MOST_VALIDATED = 2000

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that do not change the result of a run, except for rounding.

    Attributes:
        device: The device to train on.
        microbatch: Images at a time on each process; None: its whole share. Gradients are summed.
        save_every: Steps between checkpoints, image grids and accuracies.
        validation: Labelled images for the accuracy of a classifier; None: those it is trained on.
        tensorboard: Also log for TensorBoard.

    Raises:
        InputError: A number is not positive.
        MissingDependencyError: TensorBoard is requested and not installed.
    """

    device: torch.device
    microbatch: int | None = None
    save_every: int = 1000
    validation: ImageSource | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for option, value in (("--save-every", self.save_every), ("--microbatch", self.microbatch)):
            if value is not None and value < 1:
                raise InputError(f"{option} {value}: expected a number from 1.")
        if self.tensorboard:
            _summary_writer()


def train(
    recipe: Recipe, images: ImageSource, out: Path, options: Options, *, progress: Progress | None = None
) -> Path:
    """Train a network, or resume a run that was begun in ``out``.

    Args:
        recipe: What is trained and how.
        images: What it learns from, with labels if it has classes.
        out: The run's folder; made if need be, in an existing parent.
        options: Device, batches and logs.
        progress: Called with (``"training steps"``, done, total) after every step, on rank 0.

    Returns:
        The averaged weights, safetensors that :func:`generation.checkpoints.load_network` reads.

    Raises:
        EvalkitError: The loss is not finite, or the device's memory does not suffice.
        InputError: The images do not fit the network, or ``out`` holds a run with other settings.
        KeyboardInterrupt: After Ctrl-C, when the current step is finished and saved; at a second one, at
            once. With several processes, always at once.
        OutputError: The folder cannot be written, or another process trains in it.
    """
    model, settings = recipe.model, recipe.settings
    for source in (images, options.validation):
        if source is not None:
            check_images(source, model.image_size, model.num_classes, larger=settings.crop)
    _check_memory(settings.batch_size, model.image_size)
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot make {out}: {error.strerror}. Its parent must exist.") from error
    check_writable(out / "checkpoint.pt")
    with join_group(options.device) as group, _locked(out, group):
        trainer = Trainer(recipe, images, device=options.device, microbatch=options.microbatch, group=group)
        trainer.resume(out / "checkpoint.pt")
        if group.rank == 0:
            _announce(trainer, images)
        if trainer.step < settings.steps:
            _loop(trainer, images, out, options, progress if group.rank == 0 else None)
        if group.rank == 0:
            _report(trainer, images, out, options)
        group.wait()
    return out / trainer.weights_file


def _loop(
    trainer: Trainer, images: ImageSource, out: Path, options: Options, progress: Progress | None
) -> None:
    """The remaining steps."""
    model, settings, group = trainer.model, trainer.settings, trainer.group
    pixels = _all_pixels(images, out, group)
    data = read_ahead(
        batches(
            pixels,
            images.labels if model.num_classes else None,
            size=model.image_size,
            seed=settings.seed,
            batch_size=settings.batch_size,
            steps=range(trainer.step, settings.steps),
            share=trainer.share,
            flip=settings.flip,
            crop=settings.crop,
        )
    )
    first, started = trainer.step, time.monotonic()
    log = _Log(out, options.tensorboard and group.rank == 0)
    # With several processes each would finish another step, and wait there for the others.
    alone = group.size == 1
    deferred = defer_sigint("the current step and saving") if alone else nullcontext(lambda: False)
    with closing(data), closing(log), deferred as interrupted:
        for batch in data:
            trainer.learn(batch)
            if trainer.step == first + 1:  # the first step allocates, and is slow
                trainer.synchronize()
                started = time.monotonic()
            stop = interrupted()
            save = stop or trainer.step % options.save_every == 0 or trainer.step == settings.steps
            if save or trainer.step % METRICS_EVERY == 0 or trainer.step == first + TIMED_STEPS:
                scalars = trainer.metrics()
                rate = (trainer.step - first - 1) / max(time.monotonic() - started, 1e-9)
                if group.rank == 0:
                    if trainer.step == first + TIMED_STEPS:
                        left = _hours((settings.steps - trainer.step) / rate / 3600)
                        logger.info("%.3g steps/s on %s: %s left.", rate, options.device, left)
                    log.write(trainer.step, scalars | {"images_per_second": rate * settings.batch_size})
            if progress:
                progress("training steps", trainer.step, settings.steps)
            if save and group.rank == 0:
                trainer.save(out / "checkpoint.pt")
                if trainer.step < settings.steps and not stop:
                    _report(trainer, images, out, options)
            if stop:
                raise KeyboardInterrupt


def _locked(out: Path, group: ProcessGroup) -> AbstractContextManager[None]:
    """Keep other runs out of the folder: two would overwrite each other's checkpoints."""
    return exclusive_lock(out / "lock", f"training in {out}") if group.rank == 0 else nullcontext()


def _check_memory(batch_size: int, size: int) -> None:
    """Refuse a batch that memory cannot hold, before it is allocated."""
    need = batch_size // world_size() * size * size * 3 * 4
    memory = physical_memory()
    if memory is not None and need > memory:
        raise InputError(
            f"--batch-size {batch_size}: its images alone take {need / 1e9:,.0f} GB on each process, and "
            f"this machine has {memory / 1e9:,.0f} GB. Give a smaller one."
        )


def _all_pixels(images: ImageSource, out: Path, group: ProcessGroup) -> NDArray[np.uint8]:
    """The pixels of all images; if they go to disk, rank 0 writes them."""
    processes = local_world_size()
    file = out / f"images_{images.digest[:16]}.u8"
    if group.rank == 0:
        pixels = load_pixels(images, file, processes=processes)
    group.wait()
    return pixels if group.rank == 0 else load_pixels(images, file, processes=processes)


# -------------------------------------------------------------------------------------- messages and results


def _announce(trainer: Trainer, images: ImageSource) -> None:
    """Say what the run takes, and warn of a network that cannot learn colours."""
    logger.info(trainer.cost(len(images)))
    if trainer.model.kind == "diffusion" and trainer.model.network.widths[0] == GROUPS:
        logger.warning(
            "Warning: with %d channels at full size, group norm removes the mean of every channel, and so "
            "the colour of an image as a whole: samples come out garish. Give it %d or more.",
            GROUPS,
            2 * GROUPS,
        )


def _report(trainer: Trainer, images: ImageSource, out: Path, options: Options) -> None:
    """Write the averaged weights; and an image grid of samples, or log the accuracy at each noise level."""
    model = trainer.model
    save_network(trainer.ema.state_dict(), model, out / trainer.weights_file)
    if model.kind == "diffusion":
        path = out / f"samples_{trainer.step:07d}.png"
        samples = _samples(trainer.ema, model, options.device)
        write_grid(
            path,
            samples,
            title=f"Samples after {trainer.step:,} steps",
            description=f"{len(samples):,} samples of the averaged weights in {out.resolve().name} after "
            f"{trainer.step:,} steps of training.",
        )
        loss = (
            f"loss {trainer.loss:.4f}, " if math.isfinite(trainer.loss) else ""
        )  # NaN before the first step
        logger.info("Step %s: %ssamples in %s", f"{trainer.step:,}", loss, path)
        return
    accuracy = accuracy_by_noise(trainer.ema, model, options.validation or images, options.device)
    levels = ", ".join(f"{t}: {value:.3f}" for t, value in accuracy.items())
    where = "validation" if options.validation else "training"
    logger.info("Step %s: accuracy on %s images by timestep: %s", f"{trainer.step:,}", where, levels)


def _samples(network: Trunk, model: ModelPreset, device: torch.device) -> NDArray[np.uint8]:
    """The images of a grid by DDIM, always from the same noise; a class a column, up to 8."""
    steps = min(GRID_STEPS, model.diffusion_steps)
    schedule = make_schedule(model.noise_schedule, model.diffusion_steps, str(steps))
    shape = (3, model.image_size, model.image_size)
    y = torch.arange(GRID_IMAGES, device=device) % 8 % (model.num_classes or 1)
    noise = Streams(0, range(GRID_IMAGES), shape, device)

    def bound(x: Tensor, t: int) -> Tensor:
        output: Tensor = network(x, torch.full((len(x),), t, device=device), y if model.num_classes else None)
        return output

    return to_uint8(DDIM()(EpsDenoiser(bound, schedule), noise.start(), noise))


@torch.no_grad()
def accuracy_by_noise(
    network: Trunk, model: ModelPreset, images: ImageSource, device: torch.device
) -> dict[int, float]:
    """Share of images that a classifier assigns to their class, at ten timesteps from the first on.

    Args:
        network: The classifier, in eval mode.
        model: Its preset.
        images: Images with labels; the first 2,000 are used.
        device: The device that the network is on.

    Returns:
        The share, 0 to 1, by timestep.
    """
    assert images.labels is not None
    schedule = make_schedule(model.noise_schedule, model.diffusion_steps)
    count = min(len(images), MOST_VALIDATED)
    right = dict.fromkeys((level * len(schedule) // NOISE_LEVELS for level in range(NOISE_LEVELS)), 0)
    first = 0
    with closing(images.batches(100)) as source:
        while first < count:
            pixels = torch.from_numpy(as_bytes(next(source)[: count - first])).permute(0, 3, 1, 2)
            x_0 = (resize_crop(pixels, model.image_size).float() / 127.5 - 1).to(device)
            y = torch.from_numpy(images.labels[first : first + len(x_0)]).to(device)
            positions = torch.arange(first, first + len(x_0))
            for t in right:
                x_t = schedule.diffuse(x_0, t, noise_at(0, positions, t, Use.VALIDATION, x_0))
                logits = network(x_t, torch.full_like(y, t))
                right[t] += int((logits.argmax(1) == y).sum())
            first += len(x_0)
    return {t: hits / count for t, hits in right.items()}


class _Log:
    """Scalars as lines of JSON, and for TensorBoard; a resumed run may write a step twice, equally."""

    def __init__(self, out: Path, tensorboard: bool):
        self._path = out / "log.jsonl"
        self._board = _summary_writer()(out / "tensorboard") if tensorboard else None

    def write(self, step: int, scalars: dict[str, float]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | scalars) + "\n")
        except OSError as error:
            raise OutputError(f"Cannot write {self._path}: {error.strerror}.") from error
        if self._board:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self) -> None:
        if self._board:
            self._board.close()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingDependencyError(
            "--tensorboard needs TensorBoard, which is not installed: pip install 'evalkit[train]'"
        ) from None
    return SummaryWriter


def _hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
