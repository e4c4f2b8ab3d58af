"""Stand-ins: for what a peer imports and never uses, and for the Inception network."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
from numpy.typing import NDArray

from evalkit.extractors import extractor_class
from evalkit.extractors.pixels import Pixels
from evalkit.features.moments import Gaussian
from evalkit.features.record import BatchFeatures, Features
from evalkit.system.run import Run

NO_STORE = Run(store=None)

STATISTICS_OF_PIXELS = {"mu": (48,), "sigma": (48, 48), "mu_s": (12,), "sigma_s": (12, 12)}
"""Shapes of the statistics of pixels, in the place of those of the Inception network."""


class _Anything(types.ModuleType):
    """A module that has every name, each of them an empty class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def torchvision_modules() -> dict[str, types.ModuleType]:
    """For ``sys.modules``: torch-fidelity imports torchvision, which has no build for every torch."""
    names = [f"torchvision{part}" for part in ("", ".datasets", ".transforms", ".transforms.functional")]
    modules = {name: _Anything(name) for name in names}
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, modules[name])
    return modules


def batch(*, gaussians: Mapping[str, Gaussian] | None = None, **arrays: NDArray[np.float32]) -> BatchFeatures:
    """A batch with these outputs of the Inception network."""
    return BatchFeatures.of(
        Features(
            name="batch",
            digest="",
            network="inception",
            extractor="made up",
            fingerprint="",
            arrays=arrays,
            gaussians=gaussians or {},
        )
    )


class InceptionPixels(Pixels):
    """Pixels in the place of the Inception network: every path of a comparison, in no time."""

    network: ClassVar[str] = "inception"


def stand_in(network: str, precision: str = "float32") -> Pixels:
    """An extractor in the place of any network, with its outputs: instant, without weights.

    In another precision than float32 its features are a little off.
    """
    row = extractor_class(network)

    class StandIn(Pixels):
        outputs: ClassVar[Mapping[str, int]] = dict.fromkeys(row.outputs, 12)
        derived: ClassVar[Mapping[str, str]] = row.derived

        def at_precision(self, precision: str) -> Pixels:
            return stand_in(network, precision)

        def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
            found = super().__call__(images)["spatial"]
            return dict.fromkeys(self.outputs, found * np.float32(1.01 if precision != "float32" else 1))

    StandIn.network = network
    extractor = StandIn(precision)
    extractor.precision = precision  # type: ignore[attr-defined]
    return extractor


def stored(root: Path) -> dict[str, bytes]:
    """Every row in the store, by folder and output, in the order of the images."""
    found: dict[str, bytes] = {}
    for path in sorted(root.glob("*/*.h5")):
        with h5py.File(path) as opened:
            for output, dataset in opened.items():
                key = f"{path.parent.name} {output}"
                found[key] = found.get(key, b"") + dataset[()].tobytes()
    return found
