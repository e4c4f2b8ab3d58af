"""`evalkit precision-check`."""

from __future__ import annotations

from typing import Any

import click

from evalkit.cli.parameters import text
from generation.cli.options import (
    PRECISION_CHOICES,
    guidance_options,
    network_options,
    sampler_options,
    scale_option,
    set_up,
)

__all__ = ["precision_check"]


@click.command("precision-check", short_help="Measure how a faster precision changes samples.")
@click.option("-n", "--count", type=int, default=4, show_default=True, help="Samples, all in one batch.")
@click.option(
    "--precision",
    type=text,
    metavar=PRECISION_CHOICES,
    default="fast",
    show_default=True,
    help="Arithmetic to compare with reference.",
)
@network_options
@scale_option
@guidance_options
@sampler_options
def precision_check(count: int, precision: str, **options: Any) -> None:
    """How much a faster precision changes samples: the same noise, sampled in it and in the reference.

    \b
    Example:
      evalkit precision-check --preset imagenet64 --precision fast
    """
    from generation.precision_check import check_precision

    settings, load = set_up(count, options)
    found = check_precision(settings, load("reference"), load(precision))
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
