"""`evalkit reference`: reference batches, published or your own; `evalkit published`: what papers report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evalkit.cli import completion
from evalkit.cli.engine import engine_options, open_engine
from evalkit.cli.options import (
    ExtractorSetup,
    echo_precision_check,
    extractor_options,
    value_range_option,
)
from evalkit.cli.parameters import file, output, text
from evalkit.cli.progress import progress_bars
from evalkit.errors import InputError
from evalkit.layouts import LAYOUTS
from evalkit.system.urls import shown

if TYPE_CHECKING:
    from evalkit.system.storage import Place

__all__ = ["published", "reference"]


@click.group()
def reference() -> None:
    """Fetch, build, inspect and convert reference batches."""


@reference.command("list", short_help="List published batches, and which are downloaded.")
@click.option(
    "--dataset",
    type=text,
    metavar="NAME",
    help="Only the batches of this one, such as imagenet256.",
    shell_complete=completion.datasets,
)
@click.option("--json", "as_json", is_flag=True, help="All that is known about them, as JSON.")
def list_(dataset: str | None, as_json: bool) -> None:
    """List the published reference and sample batches, and the statistics that other tools measure against.

    Their names can be given in place of paths to `evalkit compare`, `features` and `stats`. --json also says
    where each file is, and all who use it.

    \b
    Example:
      evalkit reference list --dataset imagenet256
    """
    import json
    from dataclasses import asdict

    from reference_batches.catalog import Entry, published_files, table
    from reference_batches.fetch import cache_path
    from reference_batches.statistics import StatisticsFile, statistics_table

    everything = published_files(dataset)
    here = {name for name, entry in everything.items() if cache_path(entry).is_file()}
    if as_json:
        content = [asdict(entry) | {"here": name in here} for name, entry in everything.items()]
        click.echo(json.dumps(content, indent=2))
        return
    batches = [entry for entry in everything.values() if isinstance(entry, Entry)]
    others = [entry for entry in everything.values() if isinstance(entry, StatisticsFile)]
    parts = [table(batches, here)] if batches else []
    if others:
        parts.append(f"Statistics of other tools:\n{statistics_table(others, here)}")
    click.echo("\n\n".join(parts))


@reference.command(short_help="Download a published batch.")
@click.argument("name", type=text, shell_complete=completion.names_of)
@click.option("-o", "--out", metavar="FILE", type=file, help="Save it here, not in the cache.")
def fetch(name: str, out: Path | None) -> None:
    """Download the published batch NAME, unless it is there already. An interrupted download resumes.

    EVALKIT_MIRROR names a copy of the published folder to try first; EVALKIT_CACHE moves the cache.

    \b
    Example:
      evalkit reference fetch imagenet256
    """
    from evalkit.system.files import check_writable
    from reference_batches.fetch import fetch

    if out:
        check_writable(out)
    click.echo(fetch(name, out=out, progress=progress_bars(in_bytes=True)))


@reference.command(short_help="Build a reference batch from your images (ADM's crop).")
@click.argument("source", type=text)
@click.option("-o", "--out", required=True, metavar="FILE", type=output, help="npz to write, also at a URL.")
@click.option("--size", required=True, type=int, metavar="PIXELS", help="Side of the square images.")
@click.option("--images", type=int, metavar="N", help="Images to keep, drawn at random; all by default.")
@click.option("--seed", default=0, show_default=True, help="Random seed of --images.")
@click.option(
    "--statistics",
    type=click.Choice(["all", "kept", "none"]),
    default="all",
    show_default=True,
    help="Mean and covariance: of all images of SOURCE, of those kept, or none.",
)
@click.option(
    "--labels",
    type=click.Choice(["auto", "folders", "names", "none"]),
    default="auto",
    show_default=True,
    help="Classes: from folders, from what precedes _ in file names, none; auto: SOURCE's own, or folders.",
)
@click.option(
    "--class-order",
    type=click.Choice(["text", "natural"]),
    default="text",
    show_default=True,
    help="How class names are numbered: text has 10 before 2, natural 2 before 10.",
)
@value_range_option
@click.option("--skip-bad", is_flag=True, help="Leave out images that cannot be decoded, and name them.")
@click.option("--workers", type=click.IntRange(1), help="Decoding threads a process; one a core by default.")
@extractor_options
@engine_options
def build(
    source: str,
    out: Place,
    size: int,
    images: int | None,
    seed: int,
    statistics: Any,
    labels: Any,
    class_order: Any,
    value_range: str | None,
    skip_bad: bool,
    workers: int | None,
    engine: str,
    **options: Any,
) -> None:
    """Build a reference batch from the images in SOURCE, with ADM's crop, for ADM's evaluator.

    SOURCE is a folder (class folders give labels), zip or tar of images of any size, a parquet file or a
    folder of them, or an npz, npy or HDF5 file. Repeat the command to resume an interrupted build.

    \b
    Example:
      evalkit reference build imagenet/train -o ref256.npz --size 256 --images 10000
    """
    from evalkit.system.run import Run
    from reference_batches.build import Settings, build

    settings = Settings(
        size=size, images=images, seed=seed, statistics=statistics, labels=labels, class_order=class_order
    )
    extractor = None if statistics == "none" else ExtractorSetup(**options).extractor()
    with open_engine(engine) as (someone, progress):
        report = build(
            source,
            out,
            settings,
            extractor=extractor,
            skip_bad=skip_bad,
            value_range=value_range,
            workers=workers,
            progress=progress,
            engine=someone,
        )
    classes = "no labels" if report.classes is None else f"{report.classes:,} classes"
    counted = f"statistics of {report.counted:,} images" if report.counted else "no statistics"
    click.echo(f"{out}: {report.kept:,} images of {size}x{size}, {classes}, {counted}")
    for note in report.notes:
        click.echo(f"note: {note}")
    if report.bad:
        click.echo(f"{len(report.bad):,} images were left out:")
    for reason in report.bad:
        click.echo(f"  {reason}")
    if extractor:
        written = out if isinstance(out, Path) else out.url
        echo_precision_check(written, extractor, Run(device=options["device"]))


@reference.command(short_help="Show the contents of a file, and a grid of its images.")
@click.argument("file", type=text)
@click.option("--grid", metavar="PNG", type=output, help="Draw a grid of images.")
@click.option("--images", default=64, show_default=True, type=click.IntRange(1), help="Images in the grid.")
@click.option("--check", is_flag=True, help="Check every image, and list what is unusual.")
def show(file: str, grid: Place | None, images: int, check: bool) -> None:
    """Show what FILE holds: arrays, images, labels, statistics and how it was made.

    \b
    Example:
      evalkit reference show ref256.npz --check --grid ref256.png
    """
    from evalkit.report.image_grid import check_picture
    from reference_batches import show as looking

    if grid:
        check_picture(grid, file)
    found = looking.contents(file)
    click.echo(looking.describe(found))
    if found.images is None or not len(found.images):
        if grid:
            raise InputError(f"{shown(file)} holds no images, so there is nothing to draw.")
        return
    if grid:
        looking.draw(found.images, grid, images)
        click.echo(f"wrote {grid}")
    if check:
        findings = looking.check(found.images, progress_bars())
        for finding in findings:
            click.echo(f"- {finding.what}\n  {finding.meaning}")
        what = "nothing odd" if not findings else f"{len(findings)} finding{'s' if len(findings) > 1 else ''}"
        click.echo(f"checked {len(found.images):,} images: {what}")


@reference.command(short_help="Convert images or statistics to another format.")
@click.argument("source", type=text)
@click.argument("out", type=output)
@click.option(
    "--as",
    "tool",
    type=click.Choice(list(LAYOUTS)),
    help="Write the statistics alone, as this tool reads them.",
)
def convert(source: str, out: Place, tool: str | None) -> None:
    """Write the images of SOURCE to OUT: an npz, a zip of PNG files, or (any other name) a folder of them.

    Order and labels are kept, and statistics where OUT is an npz. With --as, only the statistics are written.

    \b
    Example:
      evalkit reference convert samples.npz samples.zip
      evalkit reference convert img512.pkl jit_stats.npz --as jit
    """
    from reference_batches.convert import convert, convert_statistics

    if tool:
        images = convert_statistics(source, out, tool)
        click.echo(f"{out}: statistics of {shown(source)}, for {LAYOUTS[tool].tools}")
    else:
        images = convert(source, out, progress_bars())
        click.echo(f"{out}: {len(images):,} images of {shown(source)}")
    for note in images.notes:
        click.echo(f"note: {note}")


@click.command(short_help="List the scores that papers report on a dataset.")
@click.argument("dataset", type=text, shell_complete=completion.datasets)
@click.option(
    "--evaluator",
    type=text,
    metavar="NAME",
    help="Only rows of this one, such as adm: they are like for like.",
)
@click.option("--model", type=text, metavar="TEXT", help="Only models with this in their names.")
@click.option(
    "--sort",
    type=text,
    metavar="SCORE",
    help="The best in this first, such as fid; by default as in the papers.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "markdown", "json"]),
    default="table",
    show_default=True,
    help="How to show them.",
)
def published(dataset: str, evaluator: str | None, model: str | None, sort: str | None, format_: str) -> None:
    """What papers report on DATASET, with evaluator, guidance and source of each row.

    DATASET is, for example, imagenet256 or cifar10; for another name, the error lists all. Papers that print
    different numbers for the same model have a row each.

    \b
    Example:
      evalkit published imagenet256 --sort fid --evaluator adm
      evalkit published imagenet512 --model EDM2 --format markdown
    """
    from reference_batches.published import FORMATS, published_rows, ranked

    rows = published_rows(dataset, evaluator, model)
    click.echo(FORMATS[format_](rows if sort is None else ranked(rows, sort), sort))
