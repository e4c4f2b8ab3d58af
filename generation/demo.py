"""The whole path in two minutes: real digits against real digits, then a model's at four guidance scales.

The images are scikit-learn's 1,797 handwritten digits, in a seeded random order. The second half trained the
shipped model (``generation/models``). The first half, which the model has never seen, has the reference and
as many other real images: what they score is what a perfect model would.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.comparison import compare
from evalkit.errors import MissingDependencyError, OutputError
from evalkit.extractors.base import Extractor
from evalkit.report.html import write_page
from evalkit.report.pictures import read_picture
from evalkit.report.plot import new_figure, write_curves
from evalkit.results import Comparison, Sweep
from evalkit.system.files import replace_atomically
from evalkit.system.progress import Progress
from evalkit.system.run import Run
from generation.batch import Networks
from generation.checkpoints import load_network
from generation.recipe import SHIPPED
from generation.samplers.ddim import DDIM
from generation.settings import Settings
from generation.sweep import sweep

__all__ = ["SCALES", "SETTINGS", "demo", "digits", "digits_model", "write_digits"]

TRAINING_IMAGES = 899
logger = logging.getLogger(__name__)

PROTOCOL = "exact"
SCALES = (0.0, 1.0, 4.0, 8.0)
SETTINGS = Settings(count=400, classes="random", sampler=DDIM(), respacing="ddim10", shard_size=100)


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The 1,797 digits of UCI's optical recognition set, in a seeded random order.

    Returns:
        (1797, 8, 8, 3) uint8 in [0, 255], grey; (1797,) int64 labels, the digits.

    Raises:
        MissingDependencyError: scikit-learn, which ships them, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingDependencyError(
            "The demo's images come with scikit-learn, which is not installed: pip install 'evalkit[demo]'"
        ) from None
    data = load_digits()
    grey = np.round(data.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(grey))
    return np.repeat(grey[order, :, :, None], 3, axis=3), data.target[order].astype(np.int64)


def write_digits(folder: Path) -> tuple[Path, Path]:
    """Write ``training.npz``, the half that trained the model, and ``reference.npz``, the other, with labels.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
        OutputError: ``folder`` cannot be made or written.
    """
    halves = {"training.npz": slice(-TRAINING_IMAGES, None), "reference.npz": slice(-TRAINING_IMAGES)}
    training, reference = _write(folder, halves)
    return training, reference


def _write(folder: Path, parts: Mapping[str, slice]) -> list[Path]:
    """Write these parts of the digits, with labels, under these names."""
    images, labels = digits()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"Cannot make the folder {folder}: {error.strerror}. Give another --out."
        ) from error
    paths = [folder / name for name in parts]
    for path, part in zip(paths, parts.values(), strict=True):
        with replace_atomically(path) as partial, partial.open("wb") as file:
            np.savez(file, arr_0=images[part], arr_1=labels[part])
    return paths


def digits_model() -> Networks:
    """The shipped model and its classifier, on the CPU."""
    diffusion, classifier = (
        load_network(SHIPPED / f"digits_{kind}.safetensors") for kind in ("diffusion", "classifier")
    )
    return Networks.prepare(diffusion, classifier, precision="reference", device=torch.device("cpu"))


def demo(
    out: Path,
    *,
    extractor: Extractor,
    settings: Settings = SETTINGS,
    scales: Sequence[float] = SCALES,
    progress: Progress | None = None,
    measured: Callable[[Comparison], object] | None = None,
) -> Sweep:
    """Compare real digits with real digits, then the model's at several guidance scales with the same.

    Args:
        out: The folder for ``reference.npz`` and ``real.npz``, digits that the model has not seen;
            ``real.json``, their comparison; a folder ``sweep`` as `evalkit sweep` fills it;
            ``results.csv``, ``samples.png``, ``curves.png``; and ``report.html``, all of it on one page.
        extractor: The Inception network.
        settings: What to sample at each scale; there are as many real images of either kind, at most 449.
        scales: Guidance scales.
        progress: Called with (stage, done, total), see :func:`generation.sweep.sweep`.
        measured: Called with the comparison of real with real digits, before the model samples.

    Raises:
        EvalkitError: As :func:`generation.sweep.sweep`; MissingDependencyError: scikit-learn, Matplotlib or
            jinja2 is not installed.
    """
    new_figure(1, 1)  # what draws the curves may be missing: better now than at the end
    count = min(settings.count, TRAINING_IMAGES // 2)
    parts = {"reference.npz": slice(count), "real.npz": slice(count, 2 * count)}
    reference, others = _write(out, parts)
    real = compare(reference, others, protocol=PROTOCOL, extractor=extractor, run=Run(progress=progress))
    with replace_atomically(out / "real.json") as partial:
        partial.write_text(real.to_json(), encoding="utf-8")
    write_page(out / "report.html", [real])
    if measured is not None:
        measured(real)
    logger.info(
        "A perfect model would score about that with %d samples. Now the model, at %d guidance scales.",
        count,
        len(scales),
    )
    result = sweep(
        settings,
        scales,
        digits_model(),
        reference,
        out / "sweep",
        extractor=extractor,
        name="digits",
        protocol=PROTOCOL,
        batch_size=settings.shard_size,  # the images are small
        progress=progress,
    )
    write_curves(out / "curves.png", [result])
    for name in ("results.csv", "samples.png"):
        with replace_atomically(out / name) as partial:
            partial.write_bytes((out / "sweep" / name).read_bytes())
    write_page(out / "report.html", [real, result], [read_picture(out / "samples.png")])
    return result
