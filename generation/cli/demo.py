"""`evalkit demo`."""

from __future__ import annotations

from pathlib import Path

import click

from evalkit.cli.messages import say, terminal_width
from evalkit.cli.parameters import file

__all__ = ["demo"]


@click.command(short_help="Run all steps in two minutes, on handwritten digits.")
@click.option(
    "--out",
    type=file,
    default="demo",
    show_default=True,
    metavar="FOLDER",
    help="Folder for samples, results and pictures.",
)
def demo(out: Path) -> None:
    """The whole path in two minutes: compare real digits, then a model's at four guidance scales; draw.

    A small model that is part of evalkit was trained on half of scikit-learn's digits; the reference is from
    the other half. Repeat the command to resume an interrupted demo.

    \b
    Example:
      evalkit demo --out demo
    """
    from evalkit.cli.options import ExtractorSetup
    from evalkit.cli.progress import progress_bars
    from evalkit.report.text import sweep_table, table
    from evalkit.system.devices import has_fast_bfloat16
    from generation.demo import SCALES, SETTINGS, demo

    # The convolutions of a CPU take most of the time.
    fast = has_fast_bfloat16("auto")
    setup = ExtractorSetup(
        device="auto",
        batch_size="auto",
        precision="bfloat16" if fast else "float32",
        backend="torch",
        weights=None,
        graph=None,
    )
    extractor = setup.extractor()
    passes = SETTINGS.count * (len(SCALES) + 2)
    say(
        f"{passes:,} images through Inception in {setup.precision} take most of the time: about "
        f"{'2' if fast else '4'} minutes on 2 cores of a CPU."
    )

    result = demo(
        out,
        extractor=extractor,
        settings=SETTINGS,
        scales=SCALES,
        progress=progress_bars(),
        measured=lambda real: click.echo(table(real, terminal_width())),
    )
    click.echo(f"\n{sweep_table(result, terminal_width())}")
    first, last = result.points[0], result.points[-1]
    unguided, strongest = first.comparison, last.comparison
    click.echo(
        f"\nGuidance trades diversity for fidelity. From scale {first.scale:g} to {last.scale:g}:\n"
        f"  precision from {unguided['precision']:.2f} to {strongest['precision']:.2f}\n"
        f"  recall    from {unguided['recall']:.2f} to {strongest['recall']:.2f}\n"
        f"See {out / 'report.html'}: the scores, their error bars, curves and samples on one page.\n"
        "Next: evalkit compare YOUR_REFERENCE YOUR_SAMPLES"
    )
