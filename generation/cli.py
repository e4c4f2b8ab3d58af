"""`evalkit checkpoint`, `sample`, `upsample`, `drift`, `sweep`, `demo`, `train`."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from evalkit.cli.options import announce, bytes_bar, echo_notes, value_range_option
from evalkit.cli.parameters import file, text
from evalkit.errors import InputError, brief, shortened

if TYPE_CHECKING:
    from evalkit.images import ImageSource
    from generation.batch import Networks
    from generation.sample import Progress
    from generation.settings import Settings

__all__ = ["checkpoint", "demo", "drift", "sample", "sweep", "train", "upsample"]

F = TypeVar("F", bound=Callable[..., Any])

# Names of tensors listed before "and more".
SHOWN = 4


@click.group()
def checkpoint() -> None:
    """Fetch, look at and convert checkpoints of diffusion models and classifiers."""


@checkpoint.command("list")
def list_() -> None:
    """The published checkpoints, and which of them are in the cache.

    \b
    Example:
      evalkit checkpoint list
    """
    from generation.checkpoints import cached
    from generation.presets import MODELS

    for preset in MODELS.values():
        classes = f"{preset.num_classes} classes" if preset.num_classes else "unconditional"
        size = (
            f"{preset.low_res_size}->{preset.image_size}" if preset.low_res_size else str(preset.image_size)
        )
        place = cached(preset) if cached(preset).exists() else ""
        megabytes = preset.parameters * 4 / 1e6
        click.echo(
            f"{preset.name:25}{preset.kind:11}{size:>8}  {classes:14}{megabytes:7,.0f} MB  {place}".rstrip()
        )


@checkpoint.command()
@click.argument("name", type=text)
def fetch(name: str) -> None:
    """Download the published checkpoint NAME to the cache, or go on with a download.

    \b
    Example:
      evalkit checkpoint fetch 64x64_diffusion
    """
    from generation.checkpoints import fetch
    from generation.presets import find_model

    preset = find_model(name)
    click.echo(fetch(preset, progress=bytes_bar(preset.file)))


@checkpoint.command()
@click.argument("file", type=file)
def inspect(file: Path) -> None:
    """What FILE holds: which model by its keys, its parameters, what is missing or unexpected.

    \b
    Example:
      evalkit checkpoint inspect 256x256_diffusion.pt
    """
    from generation.checkpoints import inspect

    found = inspect(file)
    click.echo(f"{file}: {found.container} file, {found.content}")
    if found.problem:
        click.echo(f"problem     {shortened(found.problem)}")
    if not found.tensors:
        return
    click.echo(f"tensors     {found.tensors:,}, {found.parameters:,} parameters, {', '.join(found.dtypes)}")
    click.echo(f"digest      {found.digest}")
    if found.preset:
        click.echo(f"says it is  {brief(found.preset.name)} ({found.preset.kind})")
    if found.prefix:
        click.echo(f"prefix      {brief(found.prefix)} before every name; left out where the file is read")
    click.echo(f"kind        {found.kind or 'no ADM network'}")
    if found.fits:
        click.echo(f"layout of   {' or '.join(brief(preset.name) for preset in found.fits)}")
    elif found.nearest and found.difference:
        click.echo(f"nearest     {brief(found.nearest.name)}, from which differ:")
        for what, names in vars(found.difference).items():
            if names:
                more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
                click.echo(f"  {what + ':':12}{', '.join(map(brief, names[:SHOWN]))}{more}")


@checkpoint.command()
@click.argument("file", type=file)
@click.argument("out", type=file)
@click.option("--preset", type=text, metavar="NAME", help="What FILE is, as in `evalkit checkpoint list`.")
@click.option("--half", is_flag=True, help="Write float16: half the size, weights rounded to 11 bits.")
def convert(file: Path, out: Path, preset: str | None, half: bool) -> None:
    """Write the weights of FILE to OUT as safetensors that say what they are.

    \b
    Example:
      evalkit checkpoint convert 64x64_diffusion.pt 64.safetensors --preset 64x64_diffusion
    """
    from generation.checkpoints import convert
    from generation.presets import find_model

    loaded = convert(file, out, find_model(preset) if preset else None, half=half)
    click.echo(f"{out}: {brief(loaded.preset.name)}, {loaded.digest}")


MODES = "reference|reference-fp16|fast"


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


network_options = _options(
    click.option(
        "--preset", type=text, metavar="NAME", help="A published way of sampling: networks, steps, scale."
    ),
    click.option("--model", type=file, metavar="FILE", help="Its weights, where they are not in the cache."),
    click.option(
        "--device", type=text, default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."
    ),
)
sampler_options = _options(
    click.option(
        "--sampler",
        type=text,
        metavar="ddpm|ddim|dpm-solver++",
        help="By default as --preset or --respacing says.",
    ),
    click.option(
        "--respacing",
        metavar="STEPS",
        help='250, ddim25 or 90,60,60,20,20, or "" for all; by default the preset\'s, or 250.',
    ),
    click.option("--eta", type=float, default=0.0, show_default=True, help="Of ddim: its share of noise."),
    click.option(
        "--thresholding",
        type=text,
        metavar="static|dynamic",
        default="static",
        show_default=True,
        help="Of dpm-solver++.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Random seed of noise and classes."),
)
scale_option = click.option(
    "--scale",
    type=float,
    help="Of the guidance; by default the preset's, or 1 with a classifier. 0: no guidance.",
)
guidance_options = _options(
    click.option("--classifier", type=file, metavar="FILE", help="The classifier's weights, likewise."),
    click.option(
        "--guidance-steps", type=text, metavar="A:B", help="Guide only at timesteps A <= t < B (of 0 to 999)."
    ),
    click.option(
        "--classes",
        type=text,
        metavar="CLASSES",
        help="random (the default), balanced, one class, or a file (npy, or text, one a line).",
    ),
)
run_options = _options(
    click.option("--out", type=file, required=True, metavar="FOLDER", help="The run's folder."),
    click.option(
        "--mode", type=text, metavar=MODES, default="reference", show_default=True, help="The arithmetic."
    ),
    click.option(
        "--batch-size",
        type=text,
        metavar="N|auto",
        default="auto",
        show_default=True,
        help="Samples at a time.",
    ),
    click.option(
        "--shard-size", type=int, default=64, show_default=True, help="Samples a file until the end."
    ),
)
grid_option = click.option(
    "--grid", type=file, metavar="FILE", help="Write the first 64 samples as one PNG as well."
)


@click.command()
@click.option("-n", "--count", type=int, required=True, help="Samples in all.")
@network_options
@scale_option
@guidance_options
@sampler_options
@run_options
@grid_option
def sample(count: int, **options: Any) -> None:
    """Sample images from a diffusion model, guided by a classifier, to one npz.

    The same command goes on with a run that was interrupted, and joins one that is under way: on several GPUs
    or hosts, start it once each, or with torchrun.

    \b
    Example:
      evalkit sample --preset imagenet256-guided --scale 1.0 -n 50000 --out runs/guided
      torchrun --nproc-per-node 8 -m evalkit sample --preset imagenet64 -n 50000 --out runs/64
    """
    settings, load = _set_up(count, options)
    _run(settings, load, options)


@click.command()
@click.argument("base", type=text)
@network_options
@sampler_options
@run_options
@grid_option
def upsample(base: str, **options: Any) -> None:
    """Sample large images from the small ones of BASE, an npz; classes (arr_1) and order are kept.

    \b
    Example:
      evalkit upsample runs/64/samples_50000x64x64x3.npz --preset upsample-64-256 --out runs/256
    """
    from evalkit.images import open_images

    images = open_images(base)
    echo_notes(images)
    settings, load = _set_up(len(images), options, upsamples=True)
    _run(settings, load, options, base=images)


@click.command()
@click.option("-n", "--count", type=int, default=4, show_default=True, help="Samples, all in one batch.")
@click.option(
    "--mode",
    type=text,
    metavar=MODES,
    default="fast",
    show_default=True,
    help="What is compared with reference.",
)
@network_options
@scale_option
@guidance_options
@sampler_options
def drift(count: int, mode: str, **options: Any) -> None:
    """How far the arithmetic of a mode leads from the reference: the same noise, sampled in both.

    \b
    Example:
      evalkit drift --preset imagenet64 --mode fast
    """
    from generation.drift import measure

    settings, load = _set_up(count, options)
    found = measure(settings, load("reference"), load(mode))
    click.echo("timestep  prediction    gradient   mean difference   largest (grey levels)")
    for step in found.steps:
        gradient = "-" if step.gradient is None else f"{step.gradient:.2e}"
        click.echo(
            f"{step.timestep:8}{step.prediction:12.2e}{gradient:>12}{step.mean:18.4f}{step.largest:10.3f}"
        )
    click.echo(
        f"{count} images: mean difference {found.mean:.4f} grey levels, largest {found.largest}, "
        f"{found.changed:.2%} of the values differ"
    )


def _set_up(
    count: int, options: dict[str, Any], *, upsamples: bool = False
) -> tuple[Settings, Callable[[str], Networks]]:
    """The settings that options and preset say, and what loads the networks in a mode."""
    from generation.presets import find_model, find_sampling
    from generation.settings import Settings

    preset = find_sampling(options["preset"]) if options["preset"] else None
    # Before its checkpoint is asked for.
    if preset and (find_model(preset.diffusion).kind == "upsampler") != upsamples:
        raise InputError(
            f"{preset.name} makes images from noise: use `evalkit sample`."
            if upsamples
            else f"{preset.name} makes large images from small ones: use `evalkit upsample`."
        )
    respacing = options["respacing"]
    if respacing is None:  # "" is a value
        respacing = preset.respacing if preset else "250"
    scale = options.get("scale")
    if scale is None:
        scale = preset.scale if preset else float(options.get("classifier") is not None)
    by_default = preset.sampler if preset else "ddpm"
    settings = Settings(
        count=count,
        seed=options["seed"],
        classes=options.get("classes"),
        scale=scale,
        guidance_timesteps=_interval(options.get("guidance_steps")),
        sampler=options["sampler"] or ("ddim" if respacing.startswith("ddim") else by_default),
        respacing=respacing,
        eta=options["eta"],
        thresholding=options["thresholding"],
        shard_size=options.get("shard_size", 64),
    )

    def load(mode: str) -> Networks:
        from generation.batch import load_networks, pick_device

        networks = load_networks(
            preset,
            model=options["model"],
            classifier=options.get("classifier"),
            guided=settings.scale != 0,
            mode=mode,
            device=pick_device(options["device"]),
        )
        for loaded in (networks.diffusion, networks.classifier):
            if loaded and loaded.prefix:
                _say(f"{loaded.path}: the prefix {brief(loaded.prefix)} before every name was left out.")
        return networks

    return settings, load


def _interval(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, end = text.partition(":")
    if not (colon and _is_number(first) and _is_number(end)):
        raise InputError(
            f"--guidance-steps {text[:80]!r} is not understood. Give two timesteps, such as 200:800."
        )
    return int(first), int(end)


def _run(
    settings: Settings,
    load: Callable[[str], Networks],
    options: dict[str, Any],
    *,
    base: ImageSource | None = None,
) -> None:
    from evalkit.report.image_grid import check_picture
    from generation.sample import run

    grid = options["grid"]
    if grid:
        check_picture(grid, *([base.name] if base else []))
    first = os.environ.get("RANK", "0") == "0"
    path = run(
        settings,
        load(options["mode"]),
        options["out"],
        base=base,
        batch_size=_batch_size(options["batch_size"]),
        progress=_samples_bar() if first else None,
        say=_say,
    )
    if grid:
        from evalkit.images import open_images
        from evalkit.report.image_grid import write_sheet

        write_sheet(grid, next(open_images(path).batches(64)))
    if first:
        click.echo(f"{path}: {settings.count:,} samples")


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not _is_number(text):
        raise InputError(f"--batch-size {text[:80]!r} is neither a number from 1 nor auto.")
    return int(text)


def _is_number(text: str) -> bool:
    """Whether it is a whole number from 0, of up to 9 digits: Python reads none of thousands."""
    return text.isdecimal() and len(text) < 10


def _say(text: str) -> None:
    rank = os.environ.get("RANK")
    announce(text if rank is None else f"[worker {rank}] {text}")


def _samples_bar() -> Progress:
    """On a terminal, a bar with samples a second and time left."""
    from tqdm import tqdm

    bar: list[tqdm[Any]] = []

    def report(done: float, total: int) -> None:
        if not bar:
            form = "{l_bar}{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"
            bar.append(
                tqdm(total=total, initial=done, unit="image", bar_format=form, disable=None, leave=False)
            )
        bar[0].update(done - bar[0].n)
        if done >= total:
            bar[0].close()

    return report


@click.command()
@click.option(
    "--scales",
    type=text,
    required=True,
    metavar="S,S,...",
    help="Guidance scales, such as 0,0.5,1,2,4; 0 is unguided.",
)
@click.option("-n", "--count", type=int, required=True, help="Samples a scale.")
@click.option(
    "--reference",
    type=text,
    required=True,
    metavar="REF",
    help="What `evalkit compare` takes, or a batch's name.",
)
@network_options
@guidance_options
@sampler_options
@run_options
@click.option("--name", type=text, help="What a plot calls it; by default the model's name.")
@click.option(
    "--protocol",
    type=text,
    metavar="adm|exact",
    default="adm",
    show_default=True,
    help="As in `evalkit compare`.",
)
@click.option(
    "--precision",
    type=text,
    metavar="TYPE",
    default="float32",
    show_default=True,
    help="Of Inception, as in `evalkit compare`.",
)
@click.option(
    "--weights", type=text, metavar="FILE", help="Inception weights; by default what `evalkit weights` shows."
)
def sweep(scales: str, count: int, reference: str, **options: Any) -> None:
    """Sample at several guidance scales with the same noise and classes, and compare each with REF.

    The same command goes on with a sweep that was interrupted. `evalkit curves` draws the result.

    \b
    Example:
      evalkit sweep --preset imagenet256-guided --scales 0,0.5,1 -n 5000 --reference imagenet256 --out runs/s
    """
    from evalkit.cli.options import ExtractorSetup, open_batches, progress_bars
    from evalkit.report.text import sweep_table
    from generation.sweep import sweep

    try:
        values = [float(scale) for scale in scales.split(",")]
    except ValueError:
        raise InputError(f"--scales {scales!r} are not numbers. Give for example 0,0.5,1,2,4.") from None
    settings, load = _set_up(count, {**options, "scale": max(values, key=abs)})
    batch_size = _batch_size(options["batch_size"])
    setup = ExtractorSetup(
        device=options["device"],
        batch_size="auto",
        precision=options["precision"],
        backend="torch",
        weights=options["weights"],
        graph=None,
    )
    first = os.environ.get("RANK", "0") == "0"
    (opened,), _ = open_batches(reference)
    result = sweep(
        settings,
        values,
        load(options["mode"]),
        opened,
        options["out"],
        extractor=setup.extractor(),
        name=options["name"],
        protocol=options["protocol"],
        batch_size=batch_size,
        sampling=lambda _: _samples_bar() if first else None,
        comparing=progress_bars(),
        say=_say,
    )
    if result:
        click.echo(sweep_table(result))
        click.echo(f"next: evalkit curves {shlex.quote(str(options['out']))} -o curves.png")


@click.command()
@click.option(
    "--out",
    type=file,
    default="demo",
    show_default=True,
    metavar="FOLDER",
    help="Where samples, results and pictures go.",
)
def demo(out: Path) -> None:
    """The whole path in minutes: sample digits at five guidance scales, compare with real ones, draw.

    A small model that is part of evalkit was trained on half of scikit-learn's digits; the other half is the
    reference. An interrupted demo goes on.

    \b
    Example:
      evalkit demo --out demo
    """
    from evalkit.cli.options import ExtractorSetup, progress_bars
    from evalkit.report.text import sweep_table
    from generation.demo import SCALES, SETTINGS, demo

    setup = ExtractorSetup(
        device="auto", batch_size="auto", precision="float32", backend="torch", weights=None, graph=None
    )
    extractor = setup.extractor()
    announce(
        f"{len(SCALES)} scales of {SETTINGS.count} samples of 8x8, a small network; then as many passes of "
        "Inception, which takes most of the time: some 5 minutes on 2 cores."
    )
    result = demo(
        out,
        extractor=extractor,
        settings=SETTINGS,
        scales=SCALES,
        sampling=lambda _: _samples_bar(),
        comparing=progress_bars(),
        say=announce,
    )
    click.echo(sweep_table(result))
    (first, unguided), (last, strongest) = result.points[0], result.points[-1]
    click.echo(
        f"\nGuidance trades diversity for fidelity. From scale {first:g} to {last:g}:\n"
        f"  precision from {unguided['precision']:.2f} to {strongest['precision']:.2f}\n"
        f"  recall    from {unguided['recall']:.2f} to {strongest['recall']:.2f}\n"
        f"See {out / 'curves.png'}, and {out / 'samples.png'}: a row a scale, a column the same noise.\n"
        "Next: evalkit compare YOUR_REFERENCE YOUR_SAMPLES"
    )


@click.group()
def train() -> None:
    """Train diffusion models and the classifiers that guide them."""


training_options = _options(
    click.option(
        "--recipe",
        type=text,
        required=True,
        help="Network and settings: a TOML file, or a shipped one's name.",
    ),
    click.option("--out", type=file, required=True, metavar="FOLDER", help="The run's folder."),
    value_range_option,
    click.option("--steps", type=int, help="Updates, instead of the recipe's."),
    click.option("--batch-size", type=int, help="Images an update, of all processes; likewise."),
    click.option("--learning-rate", type=float, help="Likewise."),
    click.option("--precision", type=text, metavar="float32|bfloat16", help="Likewise."),
    click.option("--seed", type=int, help="Likewise."),
    click.option("--microbatch", type=int, help="Images at a time on each device, if not its whole share."),
    click.option(
        "--save-every", type=int, default=1000, show_default=True, help="Steps between checkpoints."
    ),
    click.option("--tensorboard", is_flag=True, help="Log for TensorBoard too, beside log.jsonl."),
    click.option(
        "--device", type=text, default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."
    ),
)


@train.command("diffusion")
@click.argument("images", type=text)
@training_options
def train_diffusion(images: str, **options: Any) -> None:
    """Train a diffusion model on IMAGES: an npz, folder, zip, tar, HDF5 or parquet file.

    The same command goes on with a run that was interrupted. The folder holds checkpoint.pt, the averaged
    weights as `evalkit sample --model` takes them, log.jsonl and sheets of samples.

    \b
    Example:
      evalkit train diffusion digits.npz --recipe digits_diffusion --out runs/digits
      torchrun --nproc-per-node 4 --no-python evalkit train diffusion cats.npz --recipe cats.toml --out cats
    """
    _train("diffusion", images, None, options)


@train.command("classifier")
@click.argument("images", type=text)
@training_options
@click.option("--validation", type=text, metavar="IMAGES", help="Labelled images to measure the accuracy on.")
def train_classifier(images: str, validation: str | None, **options: Any) -> None:
    """Train a classifier of noisy images on IMAGES, and say its accuracy at each level of noise.

    \b
    Example:
      evalkit train classifier digits.npz --recipe digits_classifier --out runs/digits-classifier
    """
    _train("classifier", images, validation, options)


def _train(kind: str, images: str, validation: str | None, options: dict[str, Any]) -> None:
    from evalkit.images import check_range_used, open_images
    from generation.batch import pick_device
    from generation.recipe import load_recipe
    from generation.train import Options, train

    changes = ("steps", "batch_size", "learning_rate", "precision", "seed")
    recipe = load_recipe(options["recipe"], **{name: options[name] for name in changes})
    if recipe.model.kind != kind:
        raise InputError(
            f"The recipe is for a {recipe.model.kind} model: use `evalkit train {recipe.model.kind}`."
        )
    opened = [
        open_images(path, value_range=options["value_range"])
        for path in (images, *([validation] if validation else []))
    ]
    check_range_used(opened, options["value_range"])
    for source in opened:
        echo_notes(source)
    first = os.environ.get("RANK", "0") == "0"
    path = train(
        recipe,
        opened[0],
        options["out"],
        Options(
            device=pick_device(options["device"]),
            microbatch=options["microbatch"],
            save_every=options["save_every"],
            validation=opened[1] if validation else None,
            tensorboard=options["tensorboard"],
        ),
        progress=_steps_bar() if first else None,
        say=announce,
    )
    if first:
        click.echo(f"{path}: averaged weights after {recipe.settings.steps:,} steps")


def _steps_bar() -> Callable[[int, int, float], None]:
    """On a terminal, a bar with steps a second, time left and the latest loss."""
    from tqdm import tqdm

    bar: list[tqdm[Any]] = []

    def report(done: int, total: int, loss: float) -> None:
        if not bar:
            bar.append(tqdm(total=total, initial=done - 1, unit="step", disable=None, leave=False))
        if math.isfinite(loss):  # none is known at first
            bar[0].set_postfix_str(f"loss {loss:.4f}", refresh=False)
        bar[0].update(done - bar[0].n)
        if done >= total:
            bar[0].close()

    return report
