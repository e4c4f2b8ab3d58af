"""The verbs that measure: compare, features, stats, curves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evalkit.cli import completion
from evalkit.cli.engine import engine_options
from evalkit.cli.messages import say, terminal_width
from evalkit.cli.options import (
    ExtractorSetup,
    echo_notes,
    echo_precision_check,
    extractor_options,
    no_store_option,
    open_batches,
    value_range_option,
)
from evalkit.cli.parameters import WithRuns, file, members_of, output, text
from evalkit.cli.sheets import Sheets, sheet_options
from evalkit.errors import EvalkitError, InputError, OutputError
from evalkit.extractors import EXTRACTORS
from evalkit.layouts import LAYOUTS
from evalkit.protocols import PROTOCOLS
from evalkit.system.urls import shown

if TYPE_CHECKING:
    from evalkit.system.storage import Place

__all__ = ["compare", "curves", "features", "stats"]


@click.command(cls=WithRuns, short_help="Compute FID and others of SAMPLES against REFERENCE.")
@click.argument("reference", shell_complete=completion.batches)
@click.argument("samples", nargs=-1, shell_complete=completion.batches)
@click.option(
    "--runs",
    multiple=True,
    metavar="RUN...",
    help="Instead of SAMPLES, once for each setting: its runs (trainings, seeds or checkpoints), or a folder "
    "with a file for each run. Settings are compared by how much their runs vary.",
)
@click.option(
    "--paired/--unpaired",
    default=None,
    help="Whether images with the same index in two SAMPLES come from the same noise and class, which makes "
    "differences more certain. Default: what the files of `evalkit sample` say.",
)
@click.option(
    "--protocol",
    type=text,
    metavar="LIST",
    shell_complete=completion.several_of(PROTOCOLS),
    default="adm",
    show_default=True,
    help=f"{', '.join(PROTOCOLS)}; or several, separated by commas, in one pass over the images. adm: the "
    "reference evaluator's arithmetic, float16 distances included; exact: no rounding; others: see "
    "docs/protocols.md.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "adm", "markdown", "json"]),
    default="table",
    show_default=True,
    help="adm prints the reference evaluator's five lines.",
)
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    type=output,
    help="Write the full record as JSON, to a path or a URL.",
)
@click.option(
    "--metrics",
    metavar="LIST",
    shell_complete=completion.metrics,
    help="Metrics to compute, separated by commas: those of the protocol (fid, sfid, inception_score, "
    "precision, recall), and others such as fd@pixels, a Fréchet distance on another network. With fid and "
    "sfid alone, memory does not grow with the number of images of a single set.",
)
@click.option(
    "--subset",
    metavar="N",
    type=int,
    help="Compute Inception Score, precision and recall on N random images of each side. FID and sFID use "
    "all images, in constant memory.",
)
@click.option("--seed", default=0, show_default=True, help="Random seed of --subset.")
@sheet_options
@click.option(
    "--no-error-bars",
    is_flag=True,
    help="Leave out standard errors and unbiased values, which take some time: see docs/error-bars.md.",
)
@value_range_option
@extractor_options
@no_store_option
@engine_options
def compare(
    reference: str,
    samples: tuple[str, ...],
    runs: tuple[str, ...],
    paired: bool | None,
    protocol: str,
    format_: str,
    json_file: Place | None,
    metrics: str | None,
    subset: int | None,
    seed: int,
    worst: tuple[int, Place] | None,
    nearest: tuple[int, Place] | None,
    no_error_bars: bool,
    value_range: str | None,
    **options: Any,
) -> None:
    """FID, sFID, Inception Score, precision and recall of SAMPLES against REFERENCE.

    Several SAMPLES are also compared with each other: which is best, and which differences are significant.

    Each may be an npz (arr_0, and mu, sigma, mu_s, sigma_s where it has them), a folder, zip or tar of
    images, an HDF5 file, several of these by a quoted pattern, features kept by `evalkit features`, any of
    these at a URL (https://, s3://, gs://), or the name of a published batch (see `evalkit reference list`),
    which is fetched when first needed.

    With --engine ray, workers on several GPUs or hosts share the work: see docs/clusters.md.

    \b
    Example:
      evalkit compare imagenet256 samples_50000x256x256x3.npz
      evalkit compare ref.npz 'samples/*.npz' --subset 50000
      evalkit compare ref.npz a.npz b.npz c.npz
      evalkit compare ref.npz --runs a1.npz a2.npz --runs b1.npz b2.npz
      evalkit compare ref.npz samples.npz --engine ray
    """
    from evalkit.system.files import check_writable, replace_atomically

    setup = ExtractorSetup(**options)
    groups = [members_of(group) for group in runs]
    if json_file:
        check_writable(json_file, reference, *samples, *(run for members in groups for run in members))
    from evalkit.comparison import Subset, compare, measure
    from evalkit.comparison.pairs import sets_of
    from evalkit.comparison.plan import choose_metrics
    from evalkit.report import several
    from evalkit.report import text as single
    from evalkit.results import Comparison
    from evalkit.several import Comparisons
    from reference_batches.published import beside, beside_all

    choice = choose_metrics(protocol, metrics)
    every, numbers = sets_of(samples, groups, paired)
    drawn = Subset(images=subset, seed=seed) if subset is not None else None
    # The five lines of `adm` do not show them.
    error_bars = not no_error_bars and (format_ != "adm" or json_file is not None or worst is not None)
    sheets = Sheets(worst, nearest)
    sheets.check_places(len(every), reference, *samples)
    with setup.run() as run:
        # Before the networks are set up: a mistyped name should not cost a download.
        (opened, *others), published = open_batches(reference, *map(str, every), value_range=value_range)
        networks = [setup.extractor(network) for network in choice.networks]
        found: Comparison | Comparisons
        if sheets:
            sheets.check(opened, others[0], choice, networks, subset=drawn, error_bars=error_bars)
            (measured,) = measure(
                [opened, *others],
                choice,
                extractor=networks,
                error_bars=error_bars,
                keep_rows=True,
                nearest=nearest[0] if nearest else 0,
                run=run,
            )
            found = measured.comparison
        else:
            found = compare(
                opened,
                *(() if numbers else others),
                runs=[[others[i] for i in members] for members in numbers],
                protocol=protocol,
                metrics=metrics,
                subset=drawn,
                extractor=networks,
                error_bars=error_bars,
                paired=paired,
                run=run,
            )
        is_table, width = format_ == "table", terminal_width()
        if isinstance(found, Comparison):
            found = beside(found, published)
            shown_text = single.table(found, width) if is_table else single.FORMATS[format_](found)
            notes = [*single.remarks(found)]
        else:
            found = replace(found, comparisons=beside_all(found.comparisons, published))
            shown_text = several.table(found, width) if is_table else several.FORMATS[format_](found)
            notes = [*dict.fromkeys(note for each in found.comparisons for note in single.remarks(each))]
        failure: EvalkitError | None = None
        try:  # before printing, which may fail
            if json_file:
                with replace_atomically(json_file) as partial:
                    partial.write_text(found.to_json())
        except OutputError as error:
            failure = error  # after printing, so that the scores are not lost
        click.echo(shown_text)
        for note in notes if format_ == "adm" else ():
            say(note)  # the five lines have no place for it
        if sheets:
            of_sheets = sheets.write(opened, others[0], measured)
            failure = failure or of_sheets
        if failure:
            raise failure


@click.command(short_help="Extract features once and save them to a file.")
@click.argument("images", shell_complete=completion.batches)
@click.option("-o", "--out", required=True, metavar="FILE", type=output, help="HDF5 to write, also at a URL.")
@click.option(
    "--network",
    default="inception",
    show_default=True,
    help="Network to use, such as inception or pixels.",
    shell_complete=completion.one_of(EXTRACTORS),
)
@value_range_option
@extractor_options
@no_store_option
@engine_options
def features(images: str, out: Place, network: str, value_range: str | None, **options: Any) -> None:
    """Extract the features of IMAGES once, and keep them as an HDF5 file that `compare` takes.

    \b
    Example:
      evalkit features ref.npz -o ref_features.h5
    """
    from evalkit.system.files import check_writable

    setup = ExtractorSetup(**options)
    check_writable(out, images)
    from evalkit.comparison import features_of

    with setup.run() as run:
        (side,), _ = open_batches(images, value_range=value_range)
        extractor = setup.extractor(network)
        extracted = features_of(side, outputs=[*extractor.outputs], extractor=extractor, run=run)
        extracted.save(out)
        click.echo(f"{out}: features of {len(extracted):,} images of {shown(images)}")
        echo_notes(side)
        echo_precision_check(side, extractor, run)


@click.command(short_help="Write mean and covariance in a format of other tools.")
@click.argument("images", shell_complete=completion.batches)
@click.option("-o", "--out", required=True, metavar="FILE", type=output, help="File to write, also at a URL.")
@click.option(
    "--as",
    "tool",
    type=click.Choice(list(LAYOUTS)),
    default="adm",
    show_default=True,
    help="The tool that will read the file; jit is also for MAR and fractal. A warning follows if that tool "
    "resizes images in another way, because its FID would be wrong.",
)
@value_range_option
@extractor_options
@no_store_option
@engine_options
def stats(images: str, out: Place, tool: str, value_range: str | None, **options: Any) -> None:
    """Mean and covariance of IMAGES, as mu, sigma, mu_s, sigma_s in an npz like the published references.

    With --as, in the file of another tool. Memory does not grow with the number of images.

    \b
    Example:
      evalkit stats train_images/ -o train_statistics.npz
      evalkit stats 'parts/*.npz' -o train_statistics.npz
      evalkit stats train_images/ -o jit_stats.npz --as jit
    """
    from evalkit.system.files import check_writable

    setup = ExtractorSetup(**options)
    check_writable(out, images)
    from evalkit.comparison import features_of
    from evalkit.comparison.sources import file_outputs
    from evalkit.features.adm_npz import (
        OUTPUTS,
        statistics_of,
        statistics_record,
        written_images,
        written_preprocess,
    )
    from evalkit.features.other_tools import check_name, resize_warning, write_statistics
    from evalkit.features.record import Features

    check_name(out, tool)
    with setup.run() as run:
        (side,), _ = open_batches(images, value_range=value_range)
        extractor = setup.extractor()
        moments = [output for suffix, output in OUTPUTS.items() if f"mu{suffix}" in LAYOUTS[tool].keys]
        summed = features_of(side, outputs=(), moments=moments, extractor=extractor, run=run)
        # Statistics of the file's own, or features of another tool: how they were made is not known here.
        of_file = bool(file_outputs(side)) or (isinstance(side, Features) and not side.fingerprint)
        write_statistics(
            out,
            tool,
            statistics_of(summed),
            images=written_images(side) if file_outputs(side) else len(summed),
            provenance=None if of_file else statistics_record(summed, extractor.preprocess),
        )
        click.echo(f"{out}: statistics of {len(summed):,} images of {shown(images)}")
        preprocess = written_preprocess(side) if of_file else extractor.preprocess
        if warning := resize_warning(tool, shown(images), preprocess):
            say(f"warning: {warning}")
        echo_notes(side)
        echo_precision_check(side, extractor, run)


@click.command(short_help="Plot every metric of a sweep against guidance scale.")
@click.argument("sweeps", nargs=-1, required=True, type=file)
@click.option(
    "-o",
    "--out",
    required=True,
    metavar="FILE",
    type=output,
    help="png, svg or pdf to write, also at a URL.",
)
@click.option(
    "--published",
    metavar="DATASET",
    shell_complete=completion.datasets,
    help="Overlay what papers report on this dataset, such as imagenet256; see `evalkit published`.",
)
def curves(sweeps: tuple[Path, ...], out: Place, published: str | None) -> None:
    """Draw SWEEPS, one curve each: every metric against the guidance scale, and fidelity against diversity.

    A sweep is a folder that `evalkit sweep` has filled, or the results.json in it.

    \b
    Example:
      evalkit curves runs/s -o curves.png --published imagenet256
    """
    from evalkit.system.files import check_writable

    check_writable(out, *sweeps)
    from evalkit.report.plot import write_curves
    from evalkit.results import Sweep

    found = []
    for path in sweeps:
        results = path / "results.json" if path.is_dir() else path
        if not results.is_file():
            raise InputError(
                f"{results}: there is no such file. Give a folder that `evalkit sweep` has filled."
            )
        try:
            found.append(Sweep.from_json(results.read_bytes()))
        except InputError as error:
            raise InputError(f"{results}: {error}") from error
    from reference_batches.published import curves as published_curves

    write_curves(out, found, published_curves(published) if published is not None else ())
    click.echo(f"wrote {out}")
