"""The whole path in minutes: a small model of digits, sampled at five guidance scales, compared, drawn.

The images are scikit-learn's 1,797 handwritten digits, in a seeded random order: the second half trained
the shipped model (``generation/models``), the first half is the reference, which the model has never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.errors import MissingDependencyError, OutputError
from evalkit.extractors.base import Extractor
from evalkit.report.plot import write_curves
from evalkit.results import Sweep
from evalkit.system.files import replace_atomically
from evalkit.system.progress import Progress
from generation.batch import Networks
from generation.checkpoints import load_network
from generation.recipe import SHIPPED
from generation.samplers.ddim import DDIM
from generation.settings import Settings
from generation.sweep import sweep

__all__ = ["SCALES", "SETTINGS", "demo", "digits", "digits_model", "write_digits"]

TRAINING_IMAGES = 899
SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)
SETTINGS = Settings(count=800, classes="balanced", sampler=DDIM(), respacing="ddim25", shard_size=100)


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
    images, labels = digits()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"Cannot make the folder {folder}: {error.strerror}. Give another --out."
        ) from error
    halves = {
        folder / "training.npz": slice(-TRAINING_IMAGES, None),
        folder / "reference.npz": slice(-TRAINING_IMAGES),
    }
    for path, half in halves.items():
        with replace_atomically(path) as partial, partial.open("wb") as file:
            np.savez(file, arr_0=images[half], arr_1=labels[half])
    training, reference = halves
    return training, reference


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
) -> Sweep:
    """Sweep the digits model over guidance scales, against digits that it has not seen.

    Args:
        out: The folder for the two halves of the digits, a folder ``sweep`` as `evalkit sweep` fills it,
            ``results.csv``, ``samples.png`` and ``curves.png``.
        extractor: The Inception network.
        settings: What to sample at each scale.
        scales: Guidance scales.
        progress: Called with (stage, done, total), see :func:`generation.sweep.sweep`.

    Raises:
        EvalkitError: As :func:`generation.sweep.sweep`; MissingDependencyError: scikit-learn or Matplotlib is
            not installed.
    """
    _, reference = write_digits(out)
    result = sweep(
        settings,
        scales,
        digits_model(),
        reference,
        out / "sweep",
        extractor=extractor,
        name="digits",
        protocol="exact",
        batch_size=settings.shard_size,  # the images are small
        progress=progress,
    )
    write_curves(out / "curves.png", [result])
    for name in ("results.csv", "samples.png"):
        with replace_atomically(out / name) as partial:
            partial.write_bytes((out / "sweep" / name).read_bytes())
    return result
