"""Guided images per second in each precision, and of a plain loop arranged as in the published scripts.

    python benchmarks/sampling.py --rounds 5

The networks have the shapes of the published ImageNet models of 64, 128 and 256 pixels and random weights;
``--small`` (the default without a GPU) makes images and widths a quarter of that. The plain loop runs these
modules eagerly in half precision, NCHW, with attention by matrix products; the classifier's gradient goes
through log_softmax, with parameters that ask for gradients, and every table is copied to the device at every
step. All take turns in this process; a round is a few steps of one batch by each, and images/s are for 250
steps. The table gives medians over the rounds, and of the ratios within a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evalkit.system.devices import resolve_device
from generation.batch import Networks, sample_batch
from generation.checkpoints import Loaded
from generation.networks import layers
from generation.networks.precision import PRECISIONS, arithmetic
from generation.networks.unet import Trunk
from generation.presets import ModelPreset, find_model, find_sampling
from generation.schedule import make_schedule
from generation.settings import Settings

VERSION = torch.__version__
PUBLISHED_STEPS = 250
BATCHES = {64: 128, 128: 64, 256: 32}  # of full size; small ones fit the caches of a CPU
SMALL_BATCH = 4


def shrunk(preset: ModelPreset) -> ModelPreset:
    """A quarter of the size and, as far as 32 groups allow, of the width."""
    network = preset.network
    width = 32 if preset.kind == "classifier" else 64
    head_channels = 16 if network.num_head_channels else None
    size = preset.image_size // 4
    small = replace(network, image_size=size, model_channels=width, num_head_channels=head_channels)
    return replace(preset, network=small)


def random_network(preset: ModelPreset) -> Trunk:
    """In eval mode; what training starts at zero is random too, so that nothing is left out."""
    torch.manual_seed(0)
    network = preset.build("cpu").eval()
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network


def our_loop(
    presets: tuple[ModelPreset, ModelPreset], settings: Settings, precision: str, device: torch.device
) -> tuple[Callable[[NDArray[np.int64]], Tensor], str]:
    """A function of the labels that samples a batch, and its arithmetic."""
    diffusion, classifier = (
        Loaded(network=random_network(preset).requires_grad_(False), preset=preset, digest="", path=Path())
        for preset in presets
    )
    networks = Networks.prepare(diffusion, classifier, precision=precision, device=device)
    assert networks.logits is not None

    def run(labels: NDArray[np.int64]) -> Tensor:
        with arithmetic(precision):
            return sample_batch(settings, networks, range(len(labels)), labels=labels)[0]

    own, guide = networks.predict.description, networks.logits.description
    return run, own if own == guide else f"{own}; classifier: {guide}"


def plain_loop(
    presets: tuple[ModelPreset, ModelPreset], settings: Settings, device: torch.device
) -> tuple[Callable[[NDArray[np.int64]], Tensor], str]:
    """As :func:`our_loop`, arranged as the published scripts."""
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    unet, classifier = (random_network(preset).to(device) for preset in presets)
    for network in (unet, classifier):
        for block in (network.input_blocks, network.middle_block, getattr(network, "output_blocks", None)):
            for module in () if block is None else block.modules():
                if isinstance(module, nn.Conv1d | nn.Conv2d):
                    module.to(dtype)
    preset = presets[0]
    schedule = make_schedule(preset.noise_schedule, preset.diffusion_steps, settings.respacing)

    def extract(table: NDArray[np.float64], t: Tensor) -> Tensor:
        return torch.from_numpy(table).to(device)[t].float()[:, None, None, None]

    def gradient(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            chosen = classifier(x, t).log_softmax(dim=-1)[range(len(y)), y]
            return torch.autograd.grad(chosen.sum(), x)[0] * settings.scale

    @torch.no_grad()
    def run(labels: NDArray[np.int64]) -> Tensor:
        y = torch.from_numpy(labels).to(device)
        x = torch.randn(len(y), 3, preset.image_size, preset.image_size, device=device)
        for step in reversed(range(len(schedule))):
            t = torch.tensor([step] * len(y), device=device)
            original = torch.tensor(schedule.timesteps, device=device)[t]
            eps, v = unet(x, original, y).chunk(2, dim=1)
            low = extract(schedule.posterior_log_variance_clipped, t)
            fraction = (v + 1) / 2
            log_variance = fraction * extract(np.log(schedule.betas), t) + (1 - fraction) * low
            variance = log_variance.exp()
            x_0 = extract(schedule.sqrt_recip_alphas_cumprod, t) * x
            x_0 = (x_0 - extract(schedule.sqrt_recipm1_alphas_cumprod, t) * eps).clamp(-1, 1)
            mean = extract(schedule.posterior_mean_coef1, t) * x_0
            mean = mean + extract(schedule.posterior_mean_coef2, t) * x
            mean = mean.float() + variance * gradient(x, original, y).float()
            mask = (t != 0).float()[:, None, None, None]
            x = mean + mask * (0.5 * log_variance).exp() * torch.randn_like(x)
        return x

    attend = layers.attend

    def with_plain_attention(labels: NDArray[np.int64]) -> Tensor:
        with mock.patch.object(layers, "attend", lambda q, k, v, **_: attend(q, k, v, repeatable=True)):
            return run(labels)

    return with_plain_attention, f"{str(dtype).removeprefix('torch.')} convolutions"


def measure(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in every round; the one before the first warms up and compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            assert run().isfinite().all()  # waits for the device too
            if round_:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


@click.command()
@click.option(
    "--size", "sizes", multiple=True, type=click.Choice(["64", "128", "256"]), help="By default all."
)
@click.option(
    "--small/--full", default=not torch.cuda.is_available(), help="Small is the default without a GPU."
)
@click.option("--batch-size", type=int, help="Images at a time; by default 128, 64 and 32, or 4 if small.")
@click.option("--steps", default=5, show_default=True, help="Sampling steps a round.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--device", "device_name", default="auto", show_default=True)
def main(
    sizes: tuple[str, ...], small: bool, batch_size: int | None, steps: int, rounds: int, device_name: str
) -> None:
    device = resolve_device(device_name)
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} CPU threads"
    shapes = "a quarter of the published size and width" if small else "the published shapes"
    print(f"Guided, {shapes}, random weights; {rounds} rounds of {steps} steps; {where}, torch {VERSION}")
    print("\n| images | batch | loop | arithmetic | images/s | against the plain loop |")
    print("|---|---|---|---|---|---|")
    for size in sizes or ("64", "128", "256"):
        sampling = find_sampling(f"imagenet{size}-guided")
        assert sampling.classifier is not None
        presets = find_model(sampling.diffusion), find_model(sampling.classifier)
        if small:
            presets = shrunk(presets[0]), shrunk(presets[1])
        batch = batch_size or (SMALL_BATCH if small else BATCHES[int(size)])
        settings = Settings(count=batch, scale=sampling.scale, respacing=str(steps))
        labels = np.arange(batch, dtype=np.int64)
        loops = {"plain loop": plain_loop(presets, settings, device)}
        for precision in PRECISIONS:
            if precision != "reference-fp16" or cuda:
                loops[precision] = our_loop(presets, settings, precision, device)
        seconds = measure({name: partial(run, labels) for name, (run, _) in loops.items()}, rounds)
        pixels = f"{presets[0].image_size}x{presets[0].image_size}"
        for name, own in seconds.items():
            ratio = statistics.median(
                plain / mine for plain, mine in zip(seconds["plain loop"], own, strict=True)
            )
            rate = batch / (statistics.median(own) * PUBLISHED_STEPS / steps)
            print(
                f"| {pixels} | {batch} | {name} | {loops[name][1]} | {rate:.3g} | {ratio:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
