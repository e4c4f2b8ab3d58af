"""The pictures of `evalkit compare`: the images that cost most, and the closest pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from evalkit.cli.messages import say
from evalkit.cli.parameters import output
from evalkit.errors import EvalkitError, InputError

if TYPE_CHECKING:
    from evalkit.comparison import Measured, Subset
    from evalkit.comparison.plan import Choice
    from evalkit.comparison.sources import Opened
    from evalkit.extractors.base import Extractor
    from evalkit.system.storage import Place

__all__ = ["Sheets", "sheet_options"]

F = TypeVar("F", bound=Callable[..., Any])


def sheet_options(command: F) -> F:
    """The options ``--worst`` and ``--nearest``."""
    for name, what in (
        (
            "--nearest",
            "Draw the N samples that are nearest to an image of REFERENCE, each next to that image. With the "
            "training images as REFERENCE, this shows whether samples are copies.",
        ),
        (
            "--worst",
            "Draw the N samples that raise FID most, and the N images of REFERENCE that SAMPLES cover least.",
        ),
    ):
        command = click.option(name, nargs=2, type=(int, output), metavar="N PNG", help=what)(command)
    return command


@dataclass(frozen=True)
class Sheets:
    """What is drawn of one set of samples: how many images or pairs, and where; None: nothing.

    Attributes:
        worst: Of ``--worst``.
        nearest: Of ``--nearest``.
    """

    worst: tuple[int, Place] | None
    nearest: tuple[int, Place] | None

    def __bool__(self) -> bool:
        return bool(self.worst or self.nearest)

    def check_places(self, sets: int, *inputs: str) -> None:
        """Raise an EvalkitError if a sheet cannot be written, or there are several sets of samples."""
        for option, sheet in (("--worst", self.worst), ("--nearest", self.nearest)):
            if sheet:
                from evalkit.report.image_grid import check_picture

                if sets > 1:
                    raise InputError(
                        f"{option} shows one set of samples, and {sets} were given. Give only one."
                    )
                check_picture(sheet[1], *inputs)
        if self.worst and self.nearest and self.worst[1] == self.nearest[1]:
            raise InputError(f"--worst and --nearest would both write {self.worst[1]}; give two files.")

    def check(
        self,
        reference: Opened,
        samples: Opened,
        choice: Choice,
        extractors: Sequence[Extractor],
        *,
        subset: Subset | None,
        error_bars: bool,
    ) -> None:
        """Cheap check before the long work; see :func:`check_worst` and :func:`check_nearest`."""
        from evalkit.comparison.nearest import check_nearest
        from evalkit.comparison.worst import check_worst

        if self.nearest:
            check_nearest(self.nearest[0], reference, samples, subset=subset)
        if self.worst:
            check_worst(
                self.worst[0],
                samples,
                choice,
                subset=subset,
                error_bars=error_bars,
                reference=reference,
                extractors=extractors,
            )

    def write(self, reference: Opened, samples: Opened, measured: Measured) -> EvalkitError | None:
        """Write each sheet. Returns the error if one could not be written."""
        from evalkit.comparison.nearest import write_nearest
        from evalkit.comparison.worst import write_worst

        failure: EvalkitError | None = None
        try:
            if self.worst:
                for note in write_worst(self.worst[1], self.worst[0], reference, samples, measured):
                    say(f"note: {note}")
        except EvalkitError as error:
            failure = error
        try:
            if self.nearest:
                write_nearest(self.nearest[1], reference, samples, measured)
        except EvalkitError as error:
            failure = failure or error
        return failure
