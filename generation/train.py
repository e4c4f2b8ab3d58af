"""Training of diffusion models and of the classifiers that guide them.

The main path is :func:`train`. The seed and the step decide what a step does: which images, their crops,
timesteps, noise and dropout all come from counters. So a run that was killed and resumed is, on a CPU, the
run that was not, bit for bit; and processes that share the batch (torchrun) change nothing but rounding and
dropout masks.

One file, ``checkpoint.pt``, holds all there is to resume; it is replaced whole. Beside it are the averaged
weights as ``evalkit sample`` takes them, the log and the sheets of samples.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from evalkit.errors import EvalkitError, InputError, MissingDependencyError, OutputError
from evalkit.images import ImageSource, read_ahead
from evalkit.report.image_grid import write_sheet
from evalkit.system.differences import differences
from evalkit.system.files import check_writable, only_process, physical_memory, replace_atomically
from generation.checkpoints import save_network
from generation.interrupts import noted_interrupts
from generation.losses import TIMESTEP_SAMPLERS, hybrid_loss
from generation.networks.layers import GROUPS
from generation.networks.unet import Trunk
from generation.noise import Streams, normal
from generation.presets import ModelPreset
from generation.recipe import Recipe
from generation.samplers import ddim, to_uint8
from generation.schedule import Schedule, make_schedule
from generation.training_data import Batch, Use, as_bytes, batches, check_images, keep, resize_crop, uniform

__all__ = ["Options", "Progress", "accuracy_by_noise", "train"]

Progress: TypeAlias = Callable[[int, int, float], None]
"""Told ``(steps done, steps in all, loss)`` after every step."""
Say: TypeAlias = Callable[[str], None]

FORMAT = "evalkit training 1"
LOOK_EVERY = 50
TIMED_STEPS = 20
SHEET = 64
SHEET_STEPS = 25
LEVELS = 10
MOST_VALIDATED = 2000
COLUMNS = {"diffusion": ("loss", "mse", "vb"), "classifier": ("loss", "accuracy")}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What does not decide the result of a run, but for rounding.

    Attributes:
        device: Where it runs.
        microbatch: Images at a time on each process; None: its whole share. Gradients are summed.
        save_every: Steps between checkpoints, sheets of samples and accuracies.
        validation: Labelled images for the accuracy of a classifier; None: those it is trained on.
        tensorboard: Also log for TensorBoard.

    Raises:
        InputError: A number is not positive.
        MissingDependencyError: TensorBoard is asked for and not installed.
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
    recipe: Recipe,
    images: ImageSource,
    out: Path,
    options: Options,
    *,
    progress: Progress | None = None,
    say: Say = print,
) -> Path:
    """Train a network, or go on with a run that was begun in ``out``.

    Args:
        recipe: What and how.
        images: What it learns from, with labels if it has classes.
        out: The run's folder; made if need be, its parent must be there.
        options: Where, and what to tell.
        progress: Told after every step.
        say: Told what the user should know, a line each.

    Returns:
        The averaged weights, safetensors that :func:`generation.checkpoints.load_network` reads.

    Raises:
        EvalkitError: The loss is not finite, or the device's memory does not suffice.
        InputError: The images do not fit the network, or ``out`` holds a run with other settings.
        KeyboardInterrupt: After Ctrl-C, when the step in hand is finished and saved; at a second one, at
            once. Of several processes, at once.
        OutputError: The folder cannot be written, or another process trains in it.
    """
    model, settings = recipe.model, recipe.settings
    for source in (images, options.validation):
        if source is not None:
            check_images(source, model.image_size, model.num_classes, larger=settings.crop)
    _check_batch(settings.batch_size, model.image_size)
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot make {out}: {error.strerror}. Its parent must be there.") from error
    check_writable(out / "checkpoint.pt")
    with _joined(options.device) as group, _alone(out, group):
        trainer = _Trainer(recipe, _identity(recipe, images), options, group)
        trainer.resume(out / "checkpoint.pt")
        if group.rank:
            progress, say = None, _silent
        say(trainer.cost(len(images)))
        if model.kind == "diffusion" and model.network.widths[0] == GROUPS:
            say(
                f"Warning: with {GROUPS} channels at full size, group norm takes the mean of every channel "
                "away, and with it the colour of an image as a whole: samples come out garish. "
                f"Give it {2 * GROUPS} or more."
            )
        if trainer.step < settings.steps:
            _loop(trainer, images, out, progress, say)
        if group.rank == 0:
            _report(trainer, images, out, say)
        group.wait()
    return out / trainer.weights_file


def _loop(trainer: _Trainer, images: ImageSource, out: Path, progress: Progress | None, say: Say) -> None:
    """The remaining steps."""
    model, settings, options, group = trainer.model, trainer.settings, trainer.options, trainer.group
    pixels = _kept(images, out, group)
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
    # Of several processes each would finish another step, and wait there for the others.
    alone = group.size == 1
    noting = noted_interrupts(say, "the step in hand and saving") if alone else nullcontext(lambda: False)
    with closing(data), closing(log), noting as interrupted:
        for batch in data:
            trainer.learn(batch)
            if trainer.step == first + 1:  # the first step allocates, and is slow
                trainer.synchronize()
                started = time.monotonic()
            stop = interrupted()
            save = stop or trainer.step % options.save_every == 0 or trainer.step == settings.steps
            if save or trainer.step % LOOK_EVERY == 0 or trainer.step == first + TIMED_STEPS:
                scalars = trainer.look()
                rate = (trainer.step - first - 1) / max(time.monotonic() - started, 1e-9)
                if trainer.step == first + TIMED_STEPS:
                    left = (settings.steps - trainer.step) / rate / 3600
                    say(f"{rate:.3g} steps/s on {options.device}; at this rate {_hours(left)} are left.")
                if group.rank == 0:
                    log.write(trainer.step, scalars | {"images_per_second": rate * settings.batch_size})
            if progress:
                progress(trainer.step, settings.steps, trainer.loss)
            if save and group.rank == 0:
                trainer.save(out / "checkpoint.pt")
                if trainer.step < settings.steps and not stop:
                    _report(trainer, images, out, say)
            if stop:
                raise KeyboardInterrupt


class _Group:
    """The processes that share the batch."""

    def __init__(self, rank: int, size: int):
        self.rank = rank
        self.size = size

    def gather(self, values: Tensor, dim: int = 0) -> Tensor:
        """The values of all processes, joined in the order of their ranks."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts, dim)

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def _joined(device: torch.device) -> Iterator[_Group]:
    """The group that torchrun started, or this process alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield _Group(0, 1)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield _Group(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def _alone(out: Path, group: _Group) -> AbstractContextManager[None]:
    """Keeps other runs out of the folder: two would overwrite each other's checkpoints."""
    return only_process(out / "lock", f"training in {out}") if group.rank == 0 else nullcontext()


class _Trainer:
    """A network, its average and its optimiser, a step at a time."""

    def __init__(self, recipe: Recipe, identity: dict[str, Any], options: Options, group: _Group):
        self.model, self.settings, self.options, self.group = recipe.model, recipe.settings, options, group
        self.step = 0
        self.loss = float("nan")
        self.weights_file = f"{self.model.name}.safetensors"
        self._identity = identity
        self.share = _share(self.settings.batch_size, group)
        self.schedule = make_schedule(self.model.noise_schedule, self.model.diffusion_steps)
        self.timesteps = TIMESTEP_SAMPLERS[self.settings.timesteps](len(self.schedule))
        torch.manual_seed(self.settings.seed)
        network = self.model.build("cpu").to(options.device)
        self.network: Trunk = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(),
            lr=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            fused=options.device.type in ("cpu", "cuda"),
        )
        self._parallel: nn.Module = self.network
        if group.size > 1:
            self._parallel = nn.parallel.DistributedDataParallel(self.network)
        self._unseen: list[tuple[Tensor, NDArray[np.int64]]] = []

    # ---------------------------------------------------------------------------------------------- a step

    def learn(self, batch: Batch) -> None:
        """One update from this process's share of a batch.

        Raises:
            EvalkitError: The device's memory does not suffice.
        """
        settings = self.settings
        everywhere = uniform(settings.seed, torch.arange(settings.batch_size), self.step, Use.TIMESTEP)[:, 0]
        t_all, weights = self.timesteps.draw(everywhere.numpy())
        t = t_all[self.share]
        self._prepare_step()
        try:
            losses = self._backward(batch, t, weights[self.share])
        except torch.OutOfMemoryError:
            raise EvalkitError(
                f"{self.options.device} is out of memory with {len(t)} images at a time. Give a smaller "
                "--microbatch; the result is the same but for rounding."
            ) from None
        self.optimiser.step()
        self._average()
        if settings.timesteps != "uniform":
            self.timesteps.update(t_all, self.group.gather(losses[:, 0]).double().cpu().numpy())
        self._unseen.append((losses, t))
        self.step += 1

    def _prepare_step(self) -> None:
        settings = self.settings
        self.network.train()
        self.optimiser.zero_grad(set_to_none=True)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate
        if self.model.network.dropout:
            rank = torch.tensor([self.group.rank])
            torch.manual_seed(int(uniform(settings.seed, rank, self.step, Use.DROPOUT)[0, 0] * 2**32))

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        settings = self.settings
        return settings.learning_rate * (1 - self.step / settings.steps if settings.anneal else 1)

    def _backward(self, batch: Batch, t: NDArray[np.int64], weights: NDArray[np.float32]) -> Tensor:
        """Gradients of the mean weighted loss; returns the losses, (b, columns)."""
        device = self.options.device
        steps, weight = torch.from_numpy(t).to(device), torch.from_numpy(weights).to(device)
        x_0 = batch.x_0.to(device)
        noise = _noise(self.settings.seed, batch.positions, self.step, Use.NOISE, x_0)
        y = None if batch.y is None else batch.y.to(device)
        at_once = self.options.microbatch or len(t)
        found = []
        for first in range(0, len(t), at_once):
            part = slice(first, first + at_once)
            last = part.stop >= len(t)
            sync = nullcontext() if last or self.group.size == 1 else self._parallel.no_sync()  # type: ignore[operator]
            with sync:
                losses = self._losses(x_0[part], steps[part], noise[part], None if y is None else y[part])
                (losses[:, 0] * weight[part]).sum().div(len(t)).backward()  # type: ignore[no-untyped-call]
            found.append(losses.detach())
        return torch.cat(found)

    def _losses(self, x_0: Tensor, t: Tensor, noise: Tensor, y: Tensor | None) -> Tensor:
        """(b, columns), see ``COLUMNS``."""
        x_t = self.schedule.diffuse(x_0, t, noise)
        half = self.settings.precision == "bfloat16"
        x = x_t.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x_0.device.type, torch.bfloat16, enabled=half):
            output = self._parallel(x, t) if self.model.kind == "classifier" else self._parallel(x, t, y)
        output = output.float()
        if self.model.kind == "diffusion":
            return torch.stack(hybrid_loss(output, x_0, x_t, noise, t, self.schedule), dim=1)
        assert y is not None
        loss = F.cross_entropy(output, y, reduction="none")
        return torch.stack([loss, (output.argmax(1) == y).float()], dim=1)

    @torch.no_grad()
    def _average(self) -> None:
        rate = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.network.parameters()), 1 - rate)

    # ------------------------------------------------------------------------------------- looking and saving

    def look(self) -> dict[str, float]:
        """Means over the steps since the last look, and of the loss in each quarter of the timesteps.

        Raises:
            EvalkitError: A loss is not finite.
        """
        local = torch.stack([losses for losses, _ in self._unseen])
        values = self.group.gather(local, dim=1).double().cpu().numpy()
        where = torch.from_numpy(np.stack([t for _, t in self._unseen])).to(local.device)
        t = self.group.gather(where, dim=1).cpu().numpy()
        self._unseen = []
        finite = np.isfinite(values).all(axis=(1, 2))
        if not finite.all():
            step = self.step - len(finite) + int(finite.argmin())
            raise EvalkitError(
                f"The loss of step {step} is not finite. The last checkpoint is from before; with the same "
                "settings the run would come here again. Lower --learning-rate, or use --precision float32."
            )
        scalars = dict(zip(COLUMNS[self.model.kind], values.mean(axis=(0, 1)).tolist(), strict=True))
        self.loss = scalars["loss"]
        quarters = t * 4 // len(self.schedule)
        for quarter in np.unique(quarters).tolist():
            scalars[f"loss_q{quarter}"] = float(values[..., 0][quarters == quarter].mean())
        return scalars | {"learning_rate": self.learning_rate}

    def synchronize(self) -> None:
        """Until the device has done what it was given."""
        if self.options.device.type == "cuda":
            torch.cuda.synchronize(self.options.device)

    def cost(self, images: int) -> str:
        """What the run will take, in words."""
        settings = self.settings
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        passes = settings.steps * settings.batch_size / images
        begun = f"going on at step {self.step:,}, " if self.step else ""
        return (
            f"{self.model.name}: {parameters / 1e6:.3g} M parameters; {begun}{settings.steps:,} steps of "
            f"{settings.batch_size} images, {passes:,.1f} passes over {images:,}; a checkpoint takes "
            f"{parameters * 16 / 1e6:,.0f} MB."
        )

    def save(self, path: Path) -> None:
        """Write all that :meth:`resume` needs, atomically."""
        content = {
            "format": FORMAT,
            "identity": json.dumps(self._identity),
            "step": self.step,
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "timesteps": self.timesteps.state(),
        }
        with replace_atomically(path) as partial:
            torch.save(content, partial)

    def resume(self, path: Path) -> None:
        """Take up the run that was saved at ``path``, if there is one.

        Raises:
            InputError: It is a run with other settings, or damaged.
        """
        if not path.exists():
            return
        content = _read(path)
        try:
            theirs: dict[str, Any] = dict(json.loads(content["identity"]))
            step = int(content["step"])
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise InputError(_damaged(path)) from error
        if changed := differences(theirs, self._identity):
            raise InputError(
                f"{path.parent} holds a run with other settings: {'; '.join(changed)}. Give the same ones to "
                "go on with it, or another folder."
            )
        if not 0 <= step <= self.settings.steps:
            raise InputError(
                f"{path.parent} holds a run of {step:,} steps, more than {self.settings.steps:,}. "
                "Give at least as many, or another folder."
            )
        try:
            self.network.load_state_dict(content["network"])
            self.ema.load_state_dict(content["ema"])
            self.optimiser.load_state_dict(content["optimiser"])
            self.timesteps.restore(content["timesteps"])
        except Exception as error:  # PyTorch raises almost anything
            raise InputError(_damaged(path)) from error
        self.step = step


def _identity(recipe: Recipe, images: ImageSource) -> dict[str, Any]:
    """What decides the run, flat and as JSON holds it."""
    settings, model = asdict(recipe.settings), asdict(recipe.model)
    del model["published_precision"]  # of sampling
    network = model.pop("network")
    if not recipe.settings.anneal:
        del settings["steps"]  # a run may be lengthened
    flat = settings | {f"model.{key}": value for key, value in {**model, **network}.items()}
    flat["images"] = [len(images), images.digest]
    if recipe.model.num_classes and images.labels is not None:
        flat["labels"] = hashlib.sha256(images.labels.tobytes()).hexdigest()
    loaded: dict[str, Any] = json.loads(json.dumps(flat))
    return loaded


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes end in almost any
        raise InputError(_damaged(path)) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(_damaged(path))
    return content


def _damaged(path: Path) -> str:
    return (
        f"{path} is no checkpoint of a training run, or damaged. Remove it to begin anew, or give "
        "another folder"
    )


def _check_batch(batch_size: int, size: int) -> None:
    """Refuse a batch that memory cannot hold, before it is laid out."""
    need = batch_size // int(os.environ.get("WORLD_SIZE", "1")) * size * size * 3 * 4
    memory = physical_memory()
    if memory is not None and need > memory:
        raise InputError(
            f"--batch-size {batch_size}: its images alone take {need / 1e9:,.0f} GB on each process, and "
            f"this machine has {memory / 1e9:,.0f} GB. Give a smaller one."
        )


def _share(batch_size: int, group: _Group) -> slice:
    if batch_size % group.size:
        raise InputError(
            f"A batch of {batch_size} images cannot be shared by {group.size} processes; give a multiple."
        )
    size = batch_size // group.size
    return slice(group.rank * size, (group.rank + 1) * size)


def _kept(images: ImageSource, out: Path, group: _Group) -> NDArray[np.uint8]:
    """The images; if they go to disk, the first process writes them."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    file = out / f"images_{images.digest[:16]}.u8"
    if group.rank == 0:
        kept = keep(images, file, processes=local)
    group.wait()
    return kept if group.rank == 0 else keep(images, file, processes=local)


# --------------------------------------------------------------------------------------------- what is told


def _report(trainer: _Trainer, images: ImageSource, out: Path, say: Say) -> None:
    """A sheet of samples, or the accuracy at each level of noise; and the averaged weights so far."""
    model = trainer.model
    save_network(trainer.ema.state_dict(), model, out / trainer.weights_file)
    if model.kind == "diffusion":
        path = out / f"samples_{trainer.step:07d}.png"
        write_sheet(path, _samples(trainer.ema, model, trainer.options.device))
        say(f"Step {trainer.step:,}: {path}")
        return
    source = trainer.options.validation or images
    accuracy = accuracy_by_noise(trainer.ema, model, source, trainer.options.device)
    levels = ", ".join(f"{t}: {value:.3f}" for t, value in accuracy.items())
    where = "validation" if trainer.options.validation else "training"
    say(f"Step {trainer.step:,}: accuracy on {where} images by timestep: {levels}")


def _samples(network: Trunk, model: ModelPreset, device: torch.device) -> NDArray[np.uint8]:
    """A sheet's images by DDIM, always from the same noise; a class a column as far as there is room."""
    steps = min(SHEET_STEPS, model.diffusion_steps)
    schedule = make_schedule(model.noise_schedule, model.diffusion_steps, str(steps))
    shape = (3, model.image_size, model.image_size)
    y = torch.arange(SHEET, device=device) % 8 % (model.num_classes or 1)
    noise = Streams(0, range(SHEET), shape, device)

    def denoiser(x: Tensor, t: int) -> Tensor:
        output: Tensor = network(x, torch.full((len(x),), t, device=device), y if model.num_classes else None)
        return output

    return to_uint8(ddim(denoiser, noise.start(), schedule, noise))


@torch.no_grad()
def accuracy_by_noise(
    network: Trunk, model: ModelPreset, images: ImageSource, device: torch.device
) -> dict[int, float]:
    """Share of images whose class a classifier tells, at ten timesteps from the first to the noisiest.

    Args:
        network: In eval mode.
        model: What it is.
        images: With labels; the first 2,000 are looked at.
        device: Where the network is.
    """
    assert images.labels is not None
    schedule: Schedule = make_schedule(model.noise_schedule, model.diffusion_steps)
    count = min(len(images), MOST_VALIDATED)
    right = dict.fromkeys((level * len(schedule) // LEVELS for level in range(LEVELS)), 0)
    first = 0
    with closing(images.batches(100)) as source:
        while first < count:
            pixels = torch.from_numpy(as_bytes(next(source)[: count - first])).permute(0, 3, 1, 2)
            x_0 = (resize_crop(pixels, model.image_size).float() / 127.5 - 1).to(device)
            y = torch.from_numpy(images.labels[first : first + len(x_0)]).to(device)
            positions = torch.arange(first, first + len(x_0))
            for t in right:
                x_t = schedule.diffuse(x_0, t, _noise(0, positions, t, Use.VALIDATION, x_0))
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


def _noise(seed: int, positions: Tensor, step: int, use: Use, like: Tensor) -> Tensor:
    """Standard normal numbers for each position, of the shape of ``like`` and on its device."""
    device = like.device if like.device.type != "mps" else torch.device("cpu")  # it has no float64
    numbers = normal(seed, positions.to(device), step, use, like[0].numel())
    return numbers.view(like.shape).to(like.device)


def _silent(line: str) -> None:
    del line


def _hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
