"""What the command lines of all packages share: the network's options, batches by name, progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import click

from evalkit.cli.engine import open_engine
from evalkit.cli.messages import say
from evalkit.cli.progress import progress_bars
from evalkit.errors import InputError

if TYPE_CHECKING:
    from evalkit.comparison.sources import Opened, Source
    from evalkit.extractors.base import Extractor
    from evalkit.extractors.weights import InceptionWeights
    from evalkit.results import PublishedRow
    from evalkit.system.run import Run

__all__ = [
    "ExtractorSetup",
    "echo_notes",
    "echo_precision_check",
    "extractor_options",
    "no_store_option",
    "open_batches",
    "value_range_option",
]

F = TypeVar("F", bound=Callable[..., Any])


def extractor_options(command: F) -> F:
    """The options that choose and set up the network; one home for all verbs that extract."""
    options = [
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
        click.option(
            "--batch-size",
            default="auto",
            show_default=True,
            help="Images per forward pass, or auto. Changes scores only by rounding.",
        ),
        click.option(
            "--precision",
            type=click.Choice(["float32", "tf32", "bfloat16", "float16"]),
            default="float32",
            show_default=True,
            help="Use float32 for published numbers. Other precisions print how much they change.",
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
    ]
    for option in reversed(options):
        command = option(command)
    return command


no_store_option = click.option(
    "--no-store",
    is_flag=True,
    help="Do not use the feature store: neither read features from it nor save any.",
)
"""For verbs that extract from whole batches and can keep the features."""


value_range_option = click.option(
    "--value-range",
    metavar="0..1|-1..1|0..255",
    help="Range of the pixels in files of floats. Floats scaled to 0..1 or -1..1 are refused without it.",
)
"""For verbs that open images of any kind."""


class ExtractorSetup:
    """What the options of :func:`extractor_options` ask for, and others of verbs that extract.

    Those are ``--engine`` and ``--no-store``.
    """

    def __init__(
        self,
        *,
        device: str,
        batch_size: str,
        precision: str,
        backend: str,
        weights: str | None,
        graph: str | None,
        no_store: bool = False,
        engine: str = "inline",
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
        self.engine = engine

    def extractor(self, network: str = "inception") -> Extractor:
        """A network, its weights loaded. The options of weights, precision and backend are Inception's."""
        from evalkit.extractors import extractor_class, make_extractor
        from evalkit.extractors.inception import Inception

        row = extractor_class(network)
        if not issubclass(row, Inception):
            return make_extractor(network, device=self.device, batch_size=self.batch_size)
        if self.graph is not None:
            from evalkit.extractors.inception_graph import InceptionGraph

            if row is not Inception:
                raise InputError(
                    f"{network}: the graph resizes images itself. Leave out --backend and --graph."
                )
            if self.precision != "float32" or self.weights or self.device not in ("auto", "cpu"):
                raise InputError(
                    "--backend tensorflow runs the graph as it is: no --precision, --weights or --device."
                )
            return InceptionGraph(self.graph, batch_size=self.batch_size or 64)
        made: Extractor = row(
            self._loaded_weights, device=self.device, precision=self.precision, batch_size=self.batch_size
        )
        return made

    @cached_property
    def _loaded_weights(self) -> InceptionWeights:
        """Read once for all networks that have them."""
        from evalkit.extractors.weights import load_weights

        return load_weights(self.weights, progress=progress_bars(in_bytes=True))

    @contextmanager
    def run(self) -> Iterator[Run]:
        """How the work is done, while the block runs."""
        from evalkit.system.run import Run

        store = None if self.no_store else "default"
        with open_engine(self.engine) as (engine, progress):
            yield Run(device=self.device, store=store, progress=progress, engine=engine)


def echo_precision_check(images: Source, extractor: Extractor, run: Run) -> None:
    """Print how much a reduced precision changes the features; nothing in float32."""
    from evalkit.comparison.precision_check import check_features, reduced_precision

    count, moved = check_features(images, extractor, run)
    if count:
        by = " and ".join(f"{output} features by {share:.2%}" for output, share in moved.items())
        precision = reduced_precision(extractor)
        click.echo(
            f"precision check: {precision} instead of float32 changes {by} on the first {count} images"
        )


def echo_notes(images: object) -> None:
    """Print notes on images that are not errors, such as parts of a file that are not used."""
    for note in getattr(images, "notes", ()):
        say(f"note: {note}")


def open_batches(
    *arguments: str, value_range: str | None = None
) -> tuple[list[Opened], tuple[PublishedRow, ...]]:
    """Open each argument; also return the published rows measured against the first one.

    Paths are opened first, so that nothing is downloaded if one of them is damaged.
    """
    from evalkit.comparison.sources import as_published, open_source
    from evalkit.images import check_range_used
    from reference_batches.fetch import fetch, named

    batches = [named(argument) for argument in arguments]
    opened = {
        argument: open_source(argument, value_range)
        for argument, batch in zip(arguments, batches, strict=True)
        if batch is None
    }
    for batch in batches:
        if batch is not None:
            path = fetch(batch.name, progress=progress_bars(in_bytes=True))
            resize = getattr(batch, "resize", None)  # of statistics of another tool
            opened[batch.name] = as_published(open_source(path), batch.name, resize)
    check_range_used(opened.values(), value_range)
    first = batches[0]
    rows: tuple[PublishedRow, ...] = ()
    if first is not None:
        from reference_batches.catalog import rows_against  # slow: reads a long file

        rows = rows_against(first)
    return [opened[argument] for argument in arguments], rows
