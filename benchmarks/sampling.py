"""Guided images per second in each precision, and of a plain loop arranged as in the published scripts.

    python benchmarks/sampling.py --size 256 --loops plain,fast --json

The networks have the shapes of the published ImageNet models of 64, 128 and 256 pixels and random weights;
``--small`` (the default without a GPU) makes images and widths a quarter of that. The plain loop runs these
modules eagerly in half precision, NCHW, with attention by matrix products; the classifier's gradient goes
through log_softmax, with parameters that ask for gradients, and every table is copied to the device at every
step. Each loop has the device to itself; a round is a few steps of one batch, and images/s are for 250 steps,
from the median of the rounds.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
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

Loop: TypeAlias = Callable[[NDArray[np.int64]], Tensor]


def shrunk(preset: ModelPreset) -> ModelPreset:
    """A quarter of the size and, as far as 32 groups allow, of the width."""
    network = preset.network
    narrowest = min(network.widths) / network.model_channels
    width = round((32 if preset.kind == "classifier" else 64) / min(narrowest, 1))
    head_channels = 16 if network.num_head_channels else None
    size = preset.image_size // 4
    small = replace(network, image_size=size, model_channels=width, num_head_channels=head_channels)
    return replace(preset, network=small)


def random_network(preset: ModelPreset, device: torch.device) -> Trunk:
    """In eval mode, the same at every call; what training starts at zero is random too.

    Made on the device: initialising half a billion parameters on a CPU takes longer than all measurements.
    """
    network = preset.build("meta").eval().to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    parameter.normal_(generator=generator).div_(math.sqrt(3 * parameter[0].numel()))
                else:
                    parameter.fill_(float(isinstance(module, nn.GroupNorm) and name == "weight"))
    return network


def our_loop(
    presets: tuple[ModelPreset, ModelPreset],
    settings: Settings,
    device: torch.device,
    precision: str,
    *,
    graphs: bool = True,
) -> tuple[Loop, str]:
    """A function of the labels that samples a batch, and its arithmetic."""
    diffusion, classifier = (
        Loaded(
            network=random_network(preset, device).requires_grad_(False),
            preset=preset,
            digest="",
            path=Path(),
        )
        for preset in presets
    )
    networks = Networks.prepare(diffusion, classifier, precision=precision, device=device)
    assert networks.logits is not None
    if not graphs:
        networks.predict.graphs = networks.logits.graphs = None

    def run(labels: NDArray[np.int64]) -> Tensor:
        with arithmetic(precision):
            return sample_batch(settings, networks, range(len(labels)), labels=labels)[0]

    own, guide = networks.predict.description, networks.logits.description
    return run, own if own == guide else f"{own}; classifier: {guide}"


def plain_loop(
    presets: tuple[ModelPreset, ModelPreset], settings: Settings, device: torch.device
) -> tuple[Loop, str]:
    """As :func:`our_loop`, arranged as the published scripts."""
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    unet, classifier = (random_network(preset, device) for preset in presets)
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


LOOPS: dict[str, Callable[..., tuple[Loop, str]]] = {
    "plain": plain_loop,
    **{precision: partial(our_loop, precision=precision) for precision in PRECISIONS},
    "fast-without-graphs": partial(our_loop, precision="fast", graphs=False),
}


def measure(
    size: int,
    loop: str,
    *,
    device: torch.device,
    small: bool = False,
    batch_size: int | None = None,
    steps: int = 3,
    rounds: int = 5,
) -> dict[str, Any]:
    """One row: a loop alone on the device, whose memory is free again afterwards.

    ``sha256`` is that of the samples, or None where the rounds gave different ones.

    Args:
        size: 64, 128 or 256, of the published models.
        loop: A key of ``LOOPS``.
        device: The device to sample on.
        small: A quarter of the size and of the width.
        batch_size: Images at a time.
        steps: Sampling steps a round, at least 2.
        rounds: Rounds that are timed, after one that warms up.
    """
    sampling = find_sampling(f"imagenet{size}-guided")
    assert sampling.classifier is not None
    presets = find_model(sampling.diffusion), find_model(sampling.classifier)
    if small:
        presets = shrunk(presets[0]), shrunk(presets[1])
    batch = batch_size or (SMALL_BATCH if small else BATCHES[size])
    settings = Settings(count=batch, scale=sampling.scale, respacing=str(steps))
    labels = np.arange(batch, dtype=np.int64)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    row: dict[str, Any] = {"pixels": presets[0].image_size, "batch": batch, "loop": loop}
    try:
        run, row["arithmetic"] = LOOPS[loop](presets, settings, device)
        (row["first_seconds"], _), *timings = (timed(run, labels, device) for _ in range(rounds + 1))
        step = statistics.median(seconds for seconds, _ in timings) / steps
        digests = {digest for _, digest in timings}
        # Ours make the same noise again; the plain loop does not.
        row["sha256"] = digests.pop() if len(digests) == 1 else None
        row |= {"seconds_per_step": step, "images_per_second": batch / (step * PUBLISHED_STEPS)}
    except torch.OutOfMemoryError:
        row["error"] = "out of memory"
    if cuda:
        row["allocated_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        row["reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    run = None  # type: ignore[assignment]
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return row


def timed(run: Loop, labels: NDArray[np.int64], device: torch.device) -> tuple[float, str]:
    """Seconds of a batch, and the digest of its samples."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    wait(device)
    begin = time.perf_counter()
    x = run(labels)
    wait(device)
    seconds = time.perf_counter() - begin
    assert x.isfinite().all()
    return seconds, hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest()


@click.command()
@click.option(
    "--size", "sizes", multiple=True, type=click.Choice(["64", "128", "256"]), help="By default all."
)
@click.option("--loops", default="plain,reference,published,fast", show_default=True, help=", ".join(LOOPS))
@click.option(
    "--small/--full", default=not torch.cuda.is_available(), help="Small is the default without a GPU."
)
@click.option("--batch-size", type=int, help="Images at a time; by default 128, 64 and 32, or 4 if small.")
@click.option("--steps", default=3, show_default=True, help="Sampling steps a round.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--device", "device_name", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="A line of JSON a row, in the place of the table.")
def main(sizes: tuple[str, ...], loops: str, device_name: str, as_json: bool, **options: Any) -> None:
    device = resolve_device(device_name)
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} CPU threads"
    if not as_json:
        shapes = "a quarter of the published size and width" if options["small"] else "the published shapes"
        rounds, steps = options["rounds"], options["steps"]
        print(f"Guided, {shapes}, random weights; {rounds} rounds of {steps} steps; {where}, torch {VERSION}")
        print("\n| images | batch | loop | arithmetic | images/s | against the plain loop | GiB |")
        print("|---|---|---|---|---|---|---|")
    for size in sizes or ("64", "128", "256"):
        plain = None
        for loop in loops.split(","):
            if loop == "published" and not cuda:
                continue  # float16 on a CPU is for nobody
            row = measure(int(size), loop, device=device, **options)
            rate = row.get("images_per_second")
            plain = rate if loop == "plain" else plain
            row["against_plain"] = rate / plain if rate and plain else None
            print(
                json.dumps(row | {"device": where, "torch": VERSION}) if as_json else cells(row), flush=True
            )


def cells(row: dict[str, Any]) -> str:
    """A row of the table."""
    shown = (
        f"{row['pixels']}x{row['pixels']}",
        row["batch"],
        row["loop"],
        row.get("arithmetic", "-"),
        row.get("error") or f"{row['images_per_second']:.3g}",
        f"{row['against_plain']:.2f}" if row["against_plain"] else "-",
        f"{row['reserved_gib']:.1f}" if "reserved_gib" in row else "-",
    )
    return f"| {' | '.join(map(str, shown))} |"


if __name__ == "__main__":
    main()
