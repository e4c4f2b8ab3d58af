"""`evalkit sample` and `evalkit upsample`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from evalkit.cli.engine import engine_options, open_engine
from evalkit.cli.options import echo_notes
from evalkit.cli.parameters import text
from generation.cli.options import (
    grid_option,
    guidance_options,
    network_options,
    parse_batch_size,
    run_options,
    sampler_options,
    scale_option,
    set_up,
)

if TYPE_CHECKING:
    from evalkit.images import ImageSource
    from generation.batch import Networks
    from generation.settings import Settings

__all__ = ["sample", "upsample"]


@click.command(short_help="Sample images from a diffusion model.")
@click.option("-n", "--count", type=int, required=True, help="Samples in all.")
@network_options
@scale_option
@guidance_options
@sampler_options
@run_options
@engine_options
@grid_option
def sample(count: int, **options: Any) -> None:
    """Sample images from a diffusion model, guided by a classifier, to one npz.

    Repeat the command to resume an interrupted run. --engine ray uses all GPUs of this machine.

    \b
    Example:
      evalkit sample --preset imagenet256-guided --scale 1.0 -n 50000 --out runs/guided
      evalkit sample --preset imagenet64 -n 50000 --out runs/64 --engine ray
    """
    settings, load = set_up(count, options)
    _run(settings, load, options)


@click.command(short_help="Upsample small images with a diffusion model.")
@click.argument("base", type=text)
@network_options
@sampler_options
@run_options
@engine_options
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
    settings, load = set_up(len(images), options, upsampler=True)
    _run(settings, load, options, base=images)


def _run(
    settings: Settings,
    load: Callable[[str], Networks],
    options: dict[str, Any],
    *,
    base: ImageSource | None = None,
) -> None:
    from evalkit.report.image_grid import check_picture
    from generation.sample import run

    grid, batch_size = options["grid"], parse_batch_size(options["batch_size"])
    if grid:
        check_picture(grid, *([base.name] if base else []))
    with open_engine(options["engine"]) as (engine, progress):
        path = run(
            settings,
            load(options["precision"]),
            options["out"],
            base=base,
            batch_size=batch_size,
            progress=progress,
            engine=engine,
        )
    if grid:
        from evalkit.images import open_images
        from evalkit.report.image_grid import write_grid

        first = next(open_images(path).batches(64))
        write_grid(
            grid,
            first,
            title=f"Samples of {path.name}",
            description=f"The first {len(first):,} of the {settings.count:,} samples in {path.name}.",
        )
    click.echo(f"{path}: {settings.count:,} samples")
