"""`evalkit sweep`."""

from __future__ import annotations

import shlex
from typing import Any

import click

from evalkit.cli import completion
from evalkit.cli.engine import engine_options, open_engine
from evalkit.cli.messages import terminal_width
from evalkit.cli.parameters import text
from evalkit.errors import InputError
from evalkit.protocols import PROTOCOLS
from generation.cli.options import (
    guidance_options,
    network_options,
    parse_batch_size,
    run_options,
    sampler_options,
    set_up,
)

__all__ = ["sweep"]


@click.command(short_help="Sample and compare at several guidance scales.")
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
    shell_complete=completion.batches,
    help="What `evalkit compare` takes, or a batch's name.",
)
@network_options
@guidance_options
@sampler_options
@run_options
@engine_options
@click.option("--name", type=text, help="Name of the curve in plots; by default the model's.")
@click.option(
    "--protocol",
    type=text,
    metavar="|".join(PROTOCOLS),
    shell_complete=completion.several_of(PROTOCOLS),
    default="adm",
    show_default=True,
    help="As in `evalkit compare`.",
)
@click.option(
    "--metrics",
    type=text,
    metavar="LIST",
    help="As in `evalkit compare`.",
    shell_complete=completion.metrics,
)
@click.option(
    "--extractor-precision",
    type=text,
    metavar="TYPE",
    default="float32",
    show_default=True,
    help="Arithmetic of Inception: --precision of `evalkit compare`.",
)
@click.option(
    "--weights", type=text, metavar="FILE", help="Inception weights; by default what `evalkit weights` shows."
)
def sweep(scales: str, count: int, reference: str, **options: Any) -> None:
    """Sample at several guidance scales with the same noise and classes, and compare each with REF.

    Repeat the command to resume an interrupted sweep. `evalkit curves` draws the result.

    \b
    Example:
      evalkit sweep --preset imagenet256-guided --scales 0,0.5,1 -n 5000 --reference imagenet256 --out runs/s
    """
    from evalkit.cli.options import ExtractorSetup, open_batches
    from evalkit.comparison.plan import choose_metrics
    from evalkit.report.text import sweep_table
    from generation.sweep import sweep

    try:
        values = [float(scale) for scale in scales.split(",")]
    except ValueError:
        raise InputError(f"--scales {scales!r} are not numbers. Give for example 0,0.5,1,2,4.") from None
    settings, load = set_up(count, {**options, "scale": max(values, key=abs)})
    batch_size = parse_batch_size(options["batch_size"])
    setup = ExtractorSetup(
        device=options["device"],
        batch_size="auto",
        precision=options["extractor_precision"],
        backend="torch",
        weights=options["weights"],
        graph=None,
    )
    choice = choose_metrics(options["protocol"], options["metrics"])
    (opened,), _ = open_batches(reference)
    with open_engine(options["engine"]) as (engine, progress):
        result = sweep(
            settings,
            values,
            load(options["precision"]),
            opened,
            options["out"],
            extractor=[setup.extractor(network) for network in choice.networks],
            name=options["name"],
            protocol=options["protocol"],
            metrics=options["metrics"],
            batch_size=batch_size,
            progress=progress,
            engine=engine,
        )
    click.echo(sweep_table(result, terminal_width()))
    click.echo(f"next: evalkit curves {shlex.quote(str(options['out']))} -o curves.png")
