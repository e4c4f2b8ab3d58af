"""The verb that plans: how many samples a difference takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from evalkit.cli import completion
from evalkit.cli.engine import engine_options
from evalkit.cli.options import (
    ExtractorSetup,
    extractor_options,
    no_store_option,
    open_batches,
    value_range_option,
)

if TYPE_CHECKING:
    from evalkit.comparison.sample_size import SamplePlan, SampleSize

__all__ = ["plan"]


@click.command(short_help="Estimate how many samples you need.")
@click.argument("reference", shell_complete=completion.batches)
@click.argument("samples", shell_complete=completion.batches)
@click.argument("other", required=False, shell_complete=completion.batches)
@click.option(
    "--detect",
    required=True,
    metavar="DIFFERENCE",
    type=float,
    help="The difference between two scores that you want to show, such as 0.1.",
)
@click.option(
    "--metrics",
    default="fid",
    show_default=True,
    metavar="LIST",
    shell_complete=completion.metrics,
    help="Metrics to plan for, separated by commas, as in `compare`.",
)
@click.option(
    "--paired/--unpaired",
    default=None,
    help="Whether images with the same index in SAMPLES and OTHER come from the same noise and class, so "
    "that fewer images are needed. Default: what the files of `evalkit sample` say.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="A table to read, or everything as JSON.",
)
@value_range_option
@extractor_options
@no_store_option
@engine_options
def plan(
    reference: str,
    samples: str,
    other: str | None,
    detect: float,
    metrics: str,
    paired: bool | None,
    format_: str,
    value_range: str | None,
    **options: Any,
) -> None:
    """How many samples it takes to show a difference, from the error bar of SAMPLES against REFERENCE.

    With OTHER: how small a difference these two sets can show, and how many images each needs.

    \b
    Example:
      evalkit plan ref.npz samples.npz --detect 0.1
      evalkit plan ref.npz a.npz b.npz --detect 0.1 --metrics fid,sfid
    """
    from evalkit.comparison.plan import choose_metrics
    from evalkit.comparison.sample_size import check_request, plan_samples

    sets = [samples] if other is None else [samples, other]
    check_request(detect, sets, paired)
    setup = ExtractorSetup(**options)
    choice = choose_metrics("adm", metrics)
    with setup.run() as run:
        # Before the networks are set up: a mistyped name should not cost a download.
        sides, _ = open_batches(reference, *sets, value_range=value_range)
        found = plan_samples(
            *sides,
            detect=detect,
            metrics=metrics,
            paired=paired,
            extractor=[setup.extractor(network) for network in choice.networks],
            run=run,
        )
    click.echo("\n".join(_table(found)) if format_ == "table" else found.to_json(), nl=format_ == "table")


def _table(found: SamplePlan) -> Iterator[str]:
    """The answer by score, what it assumes, and warnings."""
    from evalkit.comparison.advice import PUBLISHED_NUMBERS
    from evalkit.report.text import aligned, remarks
    from evalkit.results import specs_of

    two = len(found.comparisons) > 1
    batches = [("reference", found.comparisons[0].reference)]
    batches += [("samples", each.samples) for each in found.comparisons]
    for what, batch in batches:
        yield f"{what:<10} {batch.name}{f', {batch.images:,} images' if batch.images else ''}"
    yield ""
    head = ["metric", "n now", *(("difference", "p") if two else ("standard error",)), "smallest shown"]
    head += [f"n for {found.detect:g}", *(("n as measured",) if two else ())]
    rows = [head, *([*_cells(size)] for size in found.sizes)]
    yield from aligned(rows, first=16)
    yield ""
    titles = {spec.name: spec.title for spec in specs_of(found.comparisons)}
    for size in found.sizes:
        for why in dict.fromkeys(each.why for each in size.required if each.why):
            yield f"{size.spec.title}: {why.rstrip('.')}."
    for name, why in found.missing.items():
        yield f"no answer for {titles[name]}: {why.rstrip('.')}."
    yield from _assumed(found)
    for remark in dict.fromkeys(text for each in found.comparisons for text in remarks(each)):
        # Nothing is compared with published numbers here.
        if PUBLISHED_NUMBERS not in remark.lower():
            yield from ("", remark)


def _cells(size: SampleSize) -> Iterator[str]:
    yield size.spec.title
    yield " and ".join(dict.fromkeys(f"{count:,}" for count in size.images))
    if size.difference is None:
        yield size.spec.format(size.stderrs[0])
    else:
        yield f"{size.difference.value:+.{size.spec.decimals}f} ± {size.spec.format(size.difference.stderr)}"
        yield f"{size.difference.p:.2g}"
    yield size.spec.format(size.detectable) if size.detectable else "-"
    for each in size.required:
        yield "-" if each.images is None else f"{each.images:,}"


def _assumed(found: SamplePlan) -> Iterator[str]:
    """What the numbers mean, and what they rest on; a line each."""
    from evalkit.pairs import LEVEL
    from evalkit.uncertainty import POWER

    yield (
        f"smallest shown: the difference that is found in {POWER * 100:.0f} % of draws, tested at the "
        f"{LEVEL * 100:.0f} % level. n for "
        f"{found.detect:g}: how many images each set needs to find a difference of {found.detect:g} as often."
    )
    if len(found.comparisons) == 1:
        yield (
            "Assumed: two independent sets that vary like this one, against the same reference, so that its "
            "own error cancels. Sets with the same noise and classes can need far fewer: give two such sets."
        )
    else:
        differences = [size.difference for size in found.sizes if size.difference is not None]
        if differences[0].paired:
            yield "The sets are paired: images with the same index come from the same noise and class."
        else:
            yield "The sets are taken to be independent of each other; if they are paired, give --paired."
        if any(size.unbiased for size in found.sizes):
            titles = " and ".join(size.spec.title for size in found.sizes if size.unbiased)
            yield f"The difference in {titles} is that of the unbiased values."
        yield (
            "n as measured: for a true difference as large as the measured one, which is itself only as "
            "certain as its ± says. The reference's part of the error stays, whatever n is."
        )
    yield (
        "The variance from the draw of the samples is taken to fall as 1/n. Training again changes a score "
        "more, whatever n is."
    )
