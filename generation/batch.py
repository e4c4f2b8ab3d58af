"""From settings and networks to a batch of samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.errors import InputError
from generation.checkpoints import Loaded, load_network
from generation.denoisers import DENOISERS, BoundNetwork
from generation.guidance import ClassifierGuidance, Guide
from generation.networks.graphs import Graphs
from generation.networks.precision import Prepared, prepare
from generation.noise import Streams
from generation.pixels import from_uint8
from generation.presets import SamplingPreset, find_model
from generation.published import cached
from generation.samplers.base import Callback
from generation.schedule import Schedule, make_schedule
from generation.settings import Settings

__all__ = ["Networks", "bind", "load_networks", "sample_batch", "schedule_of"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Networks:
    """Networks on their device and in their precision, for any number of runs.

    Attributes:
        diffusion: A diffusion model or upsampler.
        classifier: The classifier that guides it, or None.
        precision: See :mod:`generation.networks.precision`.
        device: The device they are on.
        predict: ``diffusion``, prepared.
        logits: ``classifier``, prepared.
        graphs: What calls both, where their precision uses CUDA graphs.
    """

    diffusion: Loaded
    classifier: Loaded | None
    precision: str
    device: torch.device
    predict: Prepared
    logits: Prepared | None
    graphs: Graphs = field(default_factory=Graphs)

    @classmethod
    def prepare(
        cls, diffusion: Loaded, classifier: Loaded | None = None, *, precision: str, device: torch.device
    ) -> Networks:
        """Put loaded networks, which are modified in place, on a device and into a precision.

        Raises:
            InputError: They are not a diffusion model and a classifier of its size, classes and schedule.
        """
        if diffusion.preset.kind == "classifier":
            raise InputError(f"{diffusion.path} is a classifier; expected a diffusion model or upsampler.")
        if classifier is not None:
            _check_pair(diffusion, classifier)
        graphs, published = Graphs(), diffusion.preset.published_precision
        return cls(
            diffusion=diffusion,
            classifier=classifier,
            precision=precision,
            device=device,
            predict=prepare(diffusion.network, precision, device, published, graphs),
            logits=None
            if classifier is None
            else prepare(classifier.network, precision, device, graphs=graphs),
            graphs=graphs,
        )

    def num_classes(self, *, guided: bool) -> int | None:
        """Classes that a sample can be asked to have; None where there are none."""
        own = self.diffusion.preset.num_classes
        return self.classifier.preset.num_classes if own is None and guided and self.classifier else own


def load_networks(
    preset: SamplingPreset | None = None,
    *,
    model: Path | None = None,
    classifier: Path | None = None,
    guided: bool,
    precision: str,
    device: torch.device,
) -> Networks:
    """Load the networks of a published way of sampling, or your own.

    Args:
        preset: The published way of sampling; None: the networks are those that the files name.
        model: File of the diffusion model or upsampler; None: the published one in the cache.
        classifier: File of the classifier; None: the published one in the cache.
        guided: Whether the classifier is needed.
        precision: See :mod:`generation.networks.precision`.
        device: The device to put them on.

    Raises:
        InputError: A file does not exist or is not what it should be, or the networks do not fit together.
    """
    diffusion = _load(model, preset.diffusion if preset else None, "--model", device)
    if not guided:
        return Networks.prepare(diffusion, precision=precision, device=device)
    named = preset.classifier if preset else None
    if classifier is None and named is None:
        raise InputError("Guidance needs a classifier: give --classifier FILE, or --scale 0.")
    guiding = _load(classifier, named, "--classifier", device)
    return Networks.prepare(diffusion, guiding, precision=precision, device=device)


def _load(path: Path | None, name: str | None, option: str, device: torch.device) -> Loaded:
    preset = find_model(name) if name else None
    if path is None:
        if preset is None:
            raise InputError(f"Give --preset NAME or {option} FILE.")
        path = cached(preset)
        if not path.exists():
            raise InputError(
                f"The checkpoint {preset.name} is not in the cache, {path}. Give {option} FILE, or fetch it "
                f"with `evalkit checkpoint fetch {preset.name}`."
            )
    return load_network(path, preset, device=device)


def _check_pair(diffusion: Loaded, classifier: Loaded) -> None:
    ours, theirs = diffusion.preset, classifier.preset
    if theirs.kind != "classifier":
        raise InputError(f"{classifier.path} is no classifier but a model of kind {theirs.kind}.")
    for what, a, b in (
        ("image size", ours.image_size, theirs.image_size),
        ("number of classes", ours.num_classes or theirs.num_classes, theirs.num_classes),
        ("noise schedule", ours.noise_schedule, theirs.noise_schedule),
        ("number of timesteps", ours.diffusion_steps, theirs.diffusion_steps),
    ):
        if a != b:
            raise InputError(
                f"The classifier {classifier.path} ({theirs.name}) cannot guide {diffusion.path} "
                f"({ours.name}): its {what} is {b}, the model's {a}. Give the one trained for this model."
            )


def schedule_of(settings: Settings, networks: Networks) -> Schedule:
    """The steps that ``settings`` ask for, through the schedule that the model was trained with.

    Raises:
        InputError: The respacing does not fit.
    """
    preset = networks.diffusion.preset
    return make_schedule(preset.noise_schedule, preset.diffusion_steps, settings.respacing)


def bind(
    settings: Settings,
    networks: Networks,
    labels: NDArray[np.int64] | None,
    low_res: NDArray[np.uint8] | None = None,
) -> tuple[BoundNetwork, Guide | None]:
    """The networks, bound to the classes and small images of a batch.

    Args:
        settings: Scale and timesteps of the guidance.
        networks: The networks.
        labels: (b,) classes, or None.
        low_res: (b, h', w', 3) small images in [0, 255], for an upsampler.
    """
    device, conditional = networks.device, networks.diffusion.preset.num_classes is not None
    y = None if labels is None else torch.from_numpy(labels).to(device)
    inputs = {} if low_res is None else {"low_res": from_uint8(low_res).to(device)}

    def network(x: Tensor, timestep: int) -> Tensor:
        t = torch.full((len(x),), timestep, device=device)
        return networks.predict(x, t, y if conditional else None, **inputs)

    if networks.logits is None or y is None or settings.scale == 0:
        return network, None
    return network, ClassifierGuidance(
        classifier=networks.logits, y=y, scale=settings.scale, timesteps=settings.guidance_timesteps
    )


def sample_batch(
    settings: Settings,
    networks: Networks,
    indices: range,
    *,
    labels: NDArray[np.int64] | None,
    low_res: NDArray[np.uint8] | None = None,
    callback: Callback | None = None,
) -> tuple[Tensor, Tensor]:
    """The samples ``indices`` of a run. Call it within :func:`generation.networks.precision.arithmetic`.

    Args:
        settings: What to sample.
        networks: What samples it.
        indices: Indices of the samples in the run.
        labels: See :func:`bind`.
        low_res: See :func:`bind`.
        callback: Called after every step.

    Returns:
        (b, 3, h, w) float32, images in [-1, 1]; and (b,) bool, whether an image and all predictions that it
        came from are finite.
    """
    size = networks.diffusion.preset.image_size
    noise = Streams(settings.seed, indices, (3, size, size), networks.device)
    network, guide = bind(settings, networks, labels, low_res)
    finite = torch.ones(len(indices), dtype=torch.bool, device=networks.device)

    def checked(x: Tensor, timestep: int) -> Tensor:
        output = network(x, timestep)
        # Checked here, because clipping x_0 would hide an infinite prediction.
        finite.logical_and_(output.isfinite().flatten(1).all(dim=1))
        return output

    denoiser = DENOISERS[networks.diffusion.preset.prediction](checked, schedule_of(settings, networks))
    x = settings.sampler(denoiser, noise.start(), noise, guide=guide, callback=callback)
    return x, finite & x.isfinite().flatten(1).all(dim=1)
