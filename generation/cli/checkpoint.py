"""`evalkit checkpoint`: fetch, inspect and convert files of weights."""

from __future__ import annotations

from pathlib import Path

import click

from evalkit.cli.parameters import file, text
from evalkit.cli.progress import progress_bars
from evalkit.errors import brief, shortened

__all__ = ["checkpoint"]

# Names of tensors listed before "and more".
SHOWN = 4


@click.group(short_help="Fetch, inspect and convert model checkpoints.")
def checkpoint() -> None:
    """Fetch, look at and convert checkpoints of diffusion models and classifiers."""


@checkpoint.command("list", short_help="List published checkpoints, and which are downloaded.")
def list_() -> None:
    """The published checkpoints, and which of them are in the cache.

    \b
    Example:
      evalkit checkpoint list
    """
    from generation.presets import MODELS
    from generation.published import cached

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


@checkpoint.command(short_help="Download a published checkpoint.")
@click.argument("name", type=text)
def fetch(name: str) -> None:
    """Download the published checkpoint NAME to the cache, or resume a download.

    \b
    Example:
      evalkit checkpoint fetch 64x64_diffusion
    """
    from generation.presets import find_model
    from generation.published import fetch

    preset = find_model(name)
    click.echo(fetch(preset, progress=progress_bars(in_bytes=True)))


@checkpoint.command(short_help="Show which model is in a file.")
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


@checkpoint.command(short_help="Convert a checkpoint to safetensors.")
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
