"""`evalkit checkpoint`: the networks that samples come from."""

from __future__ import annotations

from pathlib import Path

import click

from evalkit.console import bytes_bar

__all__ = ["checkpoint"]

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
@click.argument("name")
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
@click.argument("file", type=click.Path(path_type=Path))
def inspect(file: Path) -> None:
    """What FILE holds: which model by its keys, its parameters, what is missing or unexpected.

    \b
    Example:
      evalkit checkpoint inspect 256x256_diffusion.pt
    """
    from generation.checkpoints import inspect

    found = inspect(file)
    click.echo(f"{file}: {found.container} file, {found.content}")
    if not found.tensors:
        return
    click.echo(f"tensors     {found.tensors:,}, {found.parameters:,} parameters, {', '.join(found.dtypes)}")
    click.echo(f"digest      {found.digest}")
    if found.preset:
        click.echo(f"says it is  {found.preset.name} ({found.preset.kind})")
    click.echo(f"kind        {found.kind or 'no ADM network'}")
    if found.fits:
        click.echo(f"layout of   {' or '.join(preset.name for preset in found.fits)}")
    elif found.nearest and found.difference:
        click.echo(f"nearest     {found.nearest.name}, from which differ:")
        for what, names in vars(found.difference).items():
            if names:
                more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
                click.echo(f"  {what + ':':12}{', '.join(names[:SHOWN])}{more}")


@checkpoint.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--preset", metavar="NAME", help="What FILE is, as in `evalkit checkpoint list`.")
def convert(file: Path, out: Path, preset: str | None) -> None:
    """Write the weights of FILE to OUT as safetensors that say what they are.

    \b
    Example:
      evalkit checkpoint convert 64x64_diffusion.pt 64.safetensors --preset 64x64_diffusion
    """
    from generation.checkpoints import convert
    from generation.presets import find_model

    loaded = convert(file, out, find_model(preset) if preset else None)
    click.echo(f"{out}: {loaded.preset.name}, {loaded.digest}")
