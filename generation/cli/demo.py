"""`evalkit demo`."""

from __future__ import annotations

from pathlib import Path

import click

from evalkit.cli.messages import say
from evalkit.cli.parameters import file

__all__ = ["demo"]


@click.command()
@click.option(
    "--out",
    type=file,
    default="demo",
    show_default=True,
    metavar="FOLDER",
    help="Folder for samples, results and pictures.",
)
def demo(out: Path) -> None:
    """The whole path in minutes: sample digits at five guidance scales, compare with real ones, draw.

    A small model that is part of evalkit was trained on half of scikit-learn's digits; the other half is the
    reference. Repeat the command to resume an interrupted demo.

    \b
    Example:
      evalkit demo --out demo
    """
    from evalkit.cli.options import ExtractorSetup
    from evalkit.cli.progress import progress_bars
    from evalkit.report.text import sweep_table
    from generation.demo import SCALES, SETTINGS, demo

    setup = ExtractorSetup(
        device="auto", batch_size="auto", precision="float32", backend="torch", weights=None, graph=None
    )
    extractor = setup.extractor()
    say(
        f"{len(SCALES)} scales of {SETTINGS.count} samples of 8x8, a small network; then as many passes of "
        "Inception, which takes most of the time: about 5 minutes on 2 cores."
    )
    result = demo(out, extractor=extractor, settings=SETTINGS, scales=SCALES, progress=progress_bars())
    click.echo(sweep_table(result))
    first, last = result.points[0], result.points[-1]
    unguided, strongest = first.comparison, last.comparison
    click.echo(
        f"\nGuidance trades diversity for fidelity. From scale {first.scale:g} to {last.scale:g}:\n"
        f"  precision from {unguided['precision']:.2f} to {strongest['precision']:.2f}\n"
        f"  recall    from {unguided['recall']:.2f} to {strongest['recall']:.2f}\n"
        f"See {out / 'curves.png'}, and {out / 'samples.png'}: one row per scale, "
        "the same noise in each column.\n"
        "Next: evalkit compare YOUR_REFERENCE YOUR_SAMPLES"
    )
