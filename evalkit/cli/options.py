"""What the command lines of all packages share: the network's options, batches by name, progress bars."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from evalkit.errors import InputError

if TYPE_CHECKING:
    from evalkit.comparison import Source
    from evalkit.features import Extractor, Features, FeatureStore, Progress
    from evalkit.images import ImageSource
    from evalkit.results import PublishedRow
    from evalkit.system.distributed import Team

__all__ = [
    "ExtractorSetup",
    "announce",
    "bytes_bar",
    "echo_drift",
    "echo_notes",
    "extractor_options",
    "leads",
    "no_store_option",
    "open_batches",
    "progress_bars",
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
    ]
    for option in reversed(options):
        command = option(command)
    return command


no_store_option = click.option(
    "--no-store", is_flag=True, help="Neither read nor keep features between runs."
)
"""For verbs that extract from whole batches and can keep the features."""


value_range_option = click.option(
    "--value-range",
    metavar="0..1|-1..1|0..255",
    help="Range of the pixels in files of floats. Floats scaled to 0..1 or -1..1 are refused without it.",
)
"""For verbs that open images of any kind."""


class ExtractorSetup:
    """The extractor and store that the options of :func:`extractor_options` ask for."""

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
        """The network, its weights loaded."""
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
            load_weights(self.weights, progress=bytes_bar("Inception weights")),
            device=self.device,
            precision=self.precision,
            batch_size=self.batch_size,
        )

    @property
    def store(self) -> FeatureStore | Literal["default"] | None:
        """Where features are kept between runs."""
        return None if self.no_store else "default"

    @contextmanager
    def team(self) -> Iterator[Team | None]:
        """The processes that torchrun started, this one among them; None where it is alone."""
        from evalkit.system.distributed import Team, world
        from evalkit.system.files import cache_directory

        if world()[1] == 1:
            yield None
            return
        if self.no_store:
            raise InputError(
                "--no-store: several processes share features by way of the store. Leave it out; "
                "EVALKIT_CACHE=FOLDER puts the store elsewhere."
            )
        with Team.join(cache_directory() / "jobs") as team:
            yield team


def leads() -> bool:
    """Whether this process is the one that prints: of those that torchrun started, the first."""
    return os.environ.get("RANK", "0") == "0"


def progress_bars() -> Progress:
    """On a terminal, what a stage will cost and then a bar with its rate and time left; silence elsewhere."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def report(stage: str, done: int, total: int) -> None:
        if done >= total and stage not in bars:
            return  # nothing to do, such as features that are all in the store
        if stage not in bars:
            for bar in bars.values():
                bar.close()
            unit = "image" if "images" in stage or stage.startswith("Inception") else "block"
            if stage.startswith("Inception") and sys.stderr.isatty():
                gigabytes = total * (2048 + 2023) * 4 / 1e9
                click.echo(f"{total - done:,} images to extract, {gigabytes:.2g} GB of features", err=True)
            bars[stage] = tqdm(desc=stage, total=total, initial=done, unit=unit, disable=None, leave=False)
        bar = bars[stage]
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return report


def echo_drift(images: Source, extractor: Extractor) -> None:
    """Print how far a reduced precision moves the features; nothing in float32."""
    from evalkit.comparison import default_store, feature_drift

    count, moved = feature_drift(images, extractor, store=default_store())
    if count:
        by = " and ".join(f"{layer} features by {share:.2%}" for layer, share in moved.items())
        precision = getattr(extractor, "precision", "")
        click.echo(f"drift: against float32, {precision} moves {by} on the first {count} images")


def echo_notes(images: object) -> None:
    """Print what there is to know of images and is no error, such as what of a file is not used."""
    for note in getattr(images, "notes", ()):
        click.echo(f"note: {note}", err=True)


def announce(text: str) -> None:
    """Say what is about to take time, beside the output proper."""
    click.echo(text, err=True)


def bytes_bar(title: str) -> Callable[[int, int], None]:
    """A bar for a download of ``title``: told bytes so far and bytes in all, 0 where that is not known."""
    from tqdm import tqdm

    bar: list[tqdm[Any]] = []

    def report(done: int, total: int) -> None:
        if not leads():
            return
        if not bar:
            bar.append(
                tqdm(
                    desc=title,
                    total=total or None,
                    initial=done,
                    unit="B",
                    unit_scale=True,
                    disable=None,
                    leave=False,
                )
            )
        bar[0].update(done - bar[0].n)
        if done == total:
            bar[0].close()

    return report


def open_batches(
    *arguments: str, value_range: str | None = None
) -> tuple[list[ImageSource | Features], tuple[PublishedRow, ...]]:
    """Open what each argument stands for; also what was published on the first one's dataset.

    What is a path is opened first: nothing is fetched for the sake of a file that is damaged.
    """
    from evalkit.comparison import open_source
    from evalkit.images import check_range_used
    from reference_batches.catalog import published_rows
    from reference_batches.fetch import fetch, named

    batches = [named(argument) for argument in arguments]
    opened = {
        argument: open_source(argument, value_range)
        for argument, batch in zip(arguments, batches, strict=True)
        if batch is None
    }
    for batch in batches:
        if batch is not None:
            say = announce if leads() else None
            path = fetch(batch.name, announce=say, progress=bytes_bar(batch.name))
            opened[batch.name] = open_source(path)
    check_range_used(opened.values(), value_range)
    first = batches[0]
    rows = published_rows(first.dataset) if first is not None and first.kind == "reference" else ()
    return [opened[argument] for argument in arguments], rows
