"""The state of a training run, and what a step does to it."""

from __future__ import annotations

import copy
import hashlib
import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from evalkit.errors import EvalkitError, InputError
from evalkit.images import ImageSource
from evalkit.system.devices import is_out_of_memory
from evalkit.system.differences import differences
from evalkit.system.files import replace_atomically
from generation.losses import TIMESTEP_SAMPLERS, hybrid_loss
from generation.networks.unet import Trunk
from generation.noise import normal
from generation.process_group import ProcessGroup
from generation.recipe import Recipe
from generation.schedule import make_schedule
from generation.training_data import Batch, Use, uniform

__all__ = ["Trainer", "noise_at"]

FORMAT = "evalkit training 1"
COLUMNS = {"diffusion": ("loss", "mse", "vb"), "classifier": ("loss", "accuracy")}


class Trainer:
    """A network, its average and its optimiser, a step at a time.

    Args:
        recipe: What is trained and how.
        images: What it learns from; only counted and identified here.
        device: The device to train on.
        microbatch: Images at a time; None: the process's whole share.
        group: The processes that share each batch.

    Attributes:
        step: Updates done.
        loss: Mean loss at the last :meth:`metrics`; NaN before.
        weights_file: Name of the file of averaged weights.
        share: The positions in each batch that this process learns from.
        ema: The averaged network, in eval mode.

    Raises:
        InputError: The batch cannot be divided among the processes.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: ImageSource,
        *,
        device: torch.device,
        microbatch: int | None,
        group: ProcessGroup,
    ):
        self.model, self.settings, self.group = recipe.model, recipe.settings, group
        self.device = device
        self._microbatch = microbatch
        self.step = 0
        self.loss = float("nan")
        self.weights_file = f"{self.model.name}.safetensors"
        self._identity = _identity(recipe, images)
        self.share = group.share(self.settings.batch_size)
        self.schedule = make_schedule(self.model.noise_schedule, self.model.diffusion_steps)
        self.timesteps = TIMESTEP_SAMPLERS[self.settings.timesteps](len(self.schedule))
        torch.manual_seed(self.settings.seed)
        network = self.model.build("cpu").to(device)
        self.network: Trunk = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(),
            lr=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        self._parallel: nn.Module = self.network
        if group.size > 1:
            self._parallel = nn.parallel.DistributedDataParallel(self.network)
        self._unread: list[tuple[Tensor, NDArray[np.int64]]] = []

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
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise EvalkitError(
                f"{self.device} is out of memory with {len(t)} images at a time. Give a smaller "
                "--microbatch; the result is the same but for rounding."
            ) from None
        self.optimiser.step()
        self._average()
        if settings.timesteps != "uniform":
            self.timesteps.update(t_all, self.group.gather(losses[:, 0]).double().cpu().numpy())
        self._unread.append((losses, t))
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
        """Learning rate of the next step."""
        settings = self.settings
        return settings.learning_rate * (1 - self.step / settings.steps if settings.anneal else 1)

    def _backward(self, batch: Batch, t: NDArray[np.int64], weights: NDArray[np.float32]) -> Tensor:
        """Gradients of the mean weighted loss; returns the losses, (b, columns)."""
        device = self.device
        steps, weight = torch.from_numpy(t).to(device), torch.from_numpy(weights).to(device)
        x_0 = batch.x_0.to(device)
        noise = noise_at(self.settings.seed, batch.positions, self.step, Use.NOISE, x_0)
        y = None if batch.y is None else batch.y.to(device)
        at_once = self._microbatch or len(t)
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

    # -------------------------------------------------------------------------------- metrics and checkpoints

    def metrics(self) -> dict[str, float]:
        """Means over the steps since the last call, and of the loss in each quarter of the timesteps.

        Raises:
            EvalkitError: A loss is not finite.
        """
        local = torch.stack([losses for losses, _ in self._unread])
        values = self.group.gather(local, dim=1).double().cpu().numpy()
        where = torch.from_numpy(np.stack([t for _, t in self._unread])).to(local.device)
        t = self.group.gather(where, dim=1).cpu().numpy()
        self._unread = []
        finite = np.isfinite(values).all(axis=(1, 2))
        if not finite.all():
            step = self.step - len(finite) + int(finite.argmin())
            raise EvalkitError(
                f"The loss of step {step} is not finite. The last checkpoint is from before; with the same "
                "settings this happens again. Lower --learning-rate, or use --precision float32."
            )
        scalars = dict(zip(COLUMNS[self.model.kind], values.mean(axis=(0, 1)).tolist(), strict=True))
        self.loss = scalars["loss"]
        quarters = t * 4 // len(self.schedule)
        for quarter in np.unique(quarters).tolist():
            scalars[f"loss_q{quarter}"] = float(values[..., 0][quarters == quarter].mean())
        return scalars | {"learning_rate": self.learning_rate}

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def cost(self, images: int) -> str:
        """What the run takes, in words."""
        settings = self.settings
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        passes = settings.steps * settings.batch_size / images
        begun = f"resuming at step {self.step:,}, " if self.step else ""
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
        """Resume the run that was saved at ``path``, if there is one.

        Raises:
            InputError: The file holds a run with other settings, or is damaged.
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
                "resume it, or another folder."
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
    """What decides the result of a run, in one flat table of JSON."""
    settings, model = asdict(recipe.settings), asdict(recipe.model)
    del model["published_precision"], model["prediction"]  # matters to sampling alone; always eps
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
        f"{path} is damaged, or not a checkpoint of a training run. Remove it to start over, or give "
        "another folder."
    )


def noise_at(seed: int, positions: Tensor, step: int, use: Use, like: Tensor) -> Tensor:
    """Standard normal numbers for each position, of the shape of ``like`` and on its device."""
    device = like.device if like.device.type != "mps" else torch.device("cpu")  # it has no float64
    numbers = normal(seed, positions.to(device), step, use, like[0].numel())
    return numbers.view(like.shape).to(like.device)
