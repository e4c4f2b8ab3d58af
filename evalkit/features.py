"""Features of a batch of images: extracted once, kept in an HDF5 store, read back as arrays.

The main path is :func:`extract`. A batch's features live in the store as a folder of small HDF5 files, one
for every :data:`SHARD` images, each written under another name and renamed when it is whole: whatever moment
a run is killed at, the next one finds only whole files and goes on after the last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from evalkit.errors import FeatureError, InputError, OutputError
from evalkit.files import remove_stale_partials, replace_atomically
from evalkit.images import ImageSource
from evalkit.metrics import Statistics

__all__ = [
    "SHARD",
    "Extractor",
    "FeatureStore",
    "Features",
    "Progress",
    "check_same_extractor",
    "extract",
    "is_features_file",
]

Float32Array = NDArray[np.float32]
Progress = Callable[[str, int, int], None]
"""Told ``(stage, done, total)`` at a stage's start and after every step of it."""

SHARD = 512
"""Images in one file of the store: what a killed run may have to repeat."""

FORMAT = "evalkit features 1"


class Extractor(Protocol):
    """A network that turns images into features.

    Attributes:
        name: What a report calls it.
        fingerprint: Hex digest of everything that decides the features: weights, preprocessing, precision,
            backend. Features of different fingerprints are never compared.
        dimensions: Features of each layer, ``{"pool": d, "spatial": d_s}``.
        batch_size: How many images it likes to be given at a time.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - described above
    @property
    def fingerprint(self) -> str: ...  # noqa: D102
    @property
    def dimensions(self) -> Mapping[str, int]: ...  # noqa: D102
    @property
    def batch_size(self) -> int: ...  # noqa: D102

    def __call__(self, images: NDArray[Any], /) -> dict[str, Float32Array]:
        """``(n, h, w, 3)``, uint8 or float32 in [0, 255], to ``{layer: (n, d) float32}``."""

    def logits(self, pool: Float32Array, /) -> Float32Array | None:
        """``(n, d)`` to ``(n, classes)``; None where there is no classifier head."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """What the metrics are computed from.

    Attributes:
        name: Where the images came from.
        digest: Digest of the images (see :attr:`evalkit.images.ImageSource.digest`).
        extractor: The extractor's name.
        fingerprint: The extractor's fingerprint.
        pool: (n, d) float32, or None where a file holds statistics alone.
        spatial: (n, d_s) float32, flattened H, W, C, or None likewise.
        logits: (n, classes) float32, or None where there is no classifier head.
        statistics: ``{"pool": ..., "spatial": ...}`` where the file carried ``mu`` and its fellows; they
            stand in for the statistics of the images. Empty otherwise.
        image_shape: (height, width, 3) of the images, or None.
        labels: (n,) int64, or None.
    """

    name: str
    digest: str
    extractor: str
    fingerprint: str
    pool: Float32Array | None
    spatial: Float32Array | None
    logits: Float32Array | None = None
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    image_shape: tuple[int, ...] | None = None
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return 0 if self.pool is None else len(self.pool)

    def keeping(self, layers: Container[str]) -> Features:
        """The same batch with no other arrays than ``pool``, ``spatial`` and ``logits`` in ``layers``."""
        dropped: dict[str, Any] = {
            layer: None for layer in ("pool", "spatial", "logits") if layer not in layers
        }
        return replace(self, **dropped)

    def save(self, path: Path) -> None:
        """Write one HDF5 file, atomically. Logits are not kept: they follow from ``pool``.

        Raises:
            OutputError: The file cannot be written.
        """
        with replace_atomically(path) as partial, h5py.File(partial, "w") as file:
            file.attrs["format"] = FORMAT
            for name in ("name", "digest", "extractor", "fingerprint"):
                file.attrs[name] = getattr(self, name)
            if self.image_shape is not None:
                file.attrs["image_shape"] = self.image_shape
            for name in ("pool", "spatial", "labels"):
                if (array := getattr(self, name)) is not None:
                    file.create_dataset(name, data=array)
            for layer, statistics in self.statistics.items():
                file.create_dataset(f"statistics/{layer}/mu", data=statistics.mu)
                file.create_dataset(f"statistics/{layer}/sigma", data=statistics.sigma)

    @classmethod
    def load(cls, path: Path) -> Features:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: The file is damaged, or of another format.
        """
        try:
            with h5py.File(path, "r") as file:
                if file.attrs.get("format") != FORMAT:
                    raise InputError(f"{path} is not a features file of this version ({FORMAT!r}).")
                values: dict[str, Any] = {
                    name: file[name][()] if name in file else None for name in ("pool", "spatial", "labels")
                }
                values |= {
                    key: str(file.attrs[key]) for key in ("name", "digest", "extractor", "fingerprint")
                }
                values["statistics"] = {
                    layer: Statistics(mu=group["mu"][()], sigma=group["sigma"][()])
                    for layer, group in file.get("statistics", {}).items()
                }
                if "image_shape" in file.attrs:
                    values["image_shape"] = tuple(map(int, file.attrs["image_shape"]))
        except (OSError, KeyError) as error:
            raise InputError(f"{path} is a damaged features file ({error}). Extract it again.") from error
        return cls(**values)


def is_features_file(path: Path) -> bool:
    """Whether ``path`` is an HDF5 file that :meth:`Features.save` wrote, of this or another version."""
    if not path.is_file() or not h5py.is_hdf5(path):
        return False
    try:
        with h5py.File(path, "r") as file:
            return str(file.attrs.get("format", "")).startswith(FORMAT.rsplit(" ", 1)[0])
    except OSError:
        return False


def extract(
    images: ImageSource,
    extractor: Extractor,
    *,
    store: FeatureStore | None = None,
    progress: Progress | None = None,
) -> Features:
    """Features of every image, in order; what the store has is not computed again.

    Args:
        images: The batch.
        extractor: The network.
        store: Where features are kept; None keeps them in memory only.
        progress: Told the stage, images done and images in all.

    Raises:
        InputError: The images are bad; the message names the first.
        OutputError: The store cannot be written. What was extracted before stays.
    """
    n = len(images)
    arrays = {layer: np.empty((n, d), np.float32) for layer, d in extractor.dimensions.items()}
    if n:
        entry = _Entry(store, images, extractor) if store else None
        stage = f"Inception features of {images.name}"
        done = sum(end - begin for begin, end in _shards(n) if entry and entry.read(begin, end, arrays))
        todo = [span for span in _shards(n) if not (entry and span in entry.present)]
        if progress:
            progress(stage, done, n)
        for begin, end in _joined(todo):
            position = saved = begin
            with contextlib.closing(images.batches(extractor.batch_size, start=begin)) as batches:
                for batch in batches:
                    batch = batch[: end - position]
                    for layer, values in extractor(batch).items():
                        arrays[layer][position : position + len(batch)] = values
                    position += len(batch)
                    done += len(batch)
                    while entry and saved < position and position >= (upto := min(saved + SHARD, end)):
                        entry.write(saved, upto, arrays)
                        saved = upto
                    if progress:
                        progress(stage, done, n)
                    if position == end:
                        break
            if position != end:
                raise InputError(f"{images.name} ended at image {position}; expected {n} images.")
    return Features(
        name=images.name,
        digest=images.digest,
        extractor=extractor.name,
        fingerprint=extractor.fingerprint,
        pool=arrays["pool"] if n else None,
        spatial=arrays["spatial"] if n else None,
        logits=extractor.logits(arrays["pool"]) if n else None,
        statistics=_statistics(images),
        image_shape=images.shape,
        labels=images.labels,
    )


def _statistics(images: ImageSource) -> dict[str, Statistics]:
    found = images.statistics
    if found is None:
        return {}
    return {
        "pool": Statistics(mu=found["mu"], sigma=found["sigma"]),
        "spatial": Statistics(mu=found["mu_s"], sigma=found["sigma_s"]),
    }


def _shards(n: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + SHARD, n)) for begin in range(0, n, SHARD)]


def _joined(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Neighbouring spans as one, so that a stream is opened once for a run of them."""
    spans = list(spans)
    while spans:
        begin, end = spans.pop(0)
        while spans and spans[0][0] == end:
            end = spans.pop(0)[1]
        yield begin, end


class FeatureStore:
    """A folder of features, keyed on the content of the images and the extractor's fingerprint.

    Several processes may use one store at once: a file appears whole or not at all, and two that write the
    same file write the same features.
    """

    def __init__(self, root: Path):
        self.root = root

    def folder(self, images: ImageSource, extractor: Extractor) -> Path:
        """Where this batch's features are kept. Any other pixel, weight or setting gives another folder."""
        key = json.dumps([FORMAT, images.digest, len(images), extractor.fingerprint, SHARD])
        return self.root / hashlib.sha256(key.encode()).hexdigest()[:32]


class _Entry:
    """One batch's folder in the store."""

    def __init__(self, store: FeatureStore, images: ImageSource, extractor: Extractor):
        self.folder = store.folder(images, extractor)
        self.present: set[tuple[int, int]] = set()
        need = 4 * len(images) * sum(extractor.dimensions.values())
        with _saying_what_to_do(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_stale_partials(self.folder)
            need -= sum(file.stat().st_size for file in self.folder.glob("*.h5"))
            free = shutil.disk_usage(self.folder).free
        if need > free:
            raise OutputError(
                f"The feature store {store.root} needs {need / 1e9:.2f} GB for {images.name} and has "
                f"{free / 1e9:.2f} GB free. Free some space, point EVALKIT_CACHE elsewhere or use --no-store."
            )

    def _file(self, begin: int, end: int) -> Path:
        return self.folder / f"{begin:08d}-{end:08d}.h5"

    def read(self, begin: int, end: int, arrays: dict[str, Float32Array]) -> bool:
        """Fill ``arrays[layer][begin:end]`` from the store; False where it has not got them whole."""
        try:
            with h5py.File(self._file(begin, end), "r") as file:
                for layer, array in arrays.items():
                    file[layer].read_direct(array, dest_sel=np.s_[begin:end])
        except FileNotFoundError:
            return False
        except (OSError, KeyError, TypeError, ValueError):
            # Damaged by something other than us: the checksums noticed. It is extracted again.
            return False
        self.present.add((begin, end))
        return True

    def write(self, begin: int, end: int, arrays: dict[str, Float32Array]) -> None:
        with (
            _saying_what_to_do(self.folder),
            replace_atomically(self._file(begin, end)) as partial,
            h5py.File(partial, "w") as file,
        ):
            for layer, array in arrays.items():
                file.create_dataset(
                    layer, data=array[begin:end], chunks=(end - begin, array.shape[1]), fletcher32=True
                )
        self.present.add((begin, end))


@contextlib.contextmanager
def _saying_what_to_do(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"The feature store cannot be written at {folder}: {error.strerror or error}. "
            "Point EVALKIT_CACHE elsewhere or use --no-store."
        ) from error
    except OutputError as error:
        raise OutputError(
            f"{error} Features stored before are kept: free some space, point EVALKIT_CACHE elsewhere or use "
            "--no-store, and run the same command again."
        ) from error


def check_same_extractor(reference: Features, samples: Features) -> None:
    """Refuse to compare features of different networks, preprocessing or precision.

    Raises:
        FeatureError: The fingerprints differ.
    """
    if reference.fingerprint != samples.fingerprint:
        raise FeatureError(
            f"{reference.name} and {samples.name} hold features of different extractors "
            f"({reference.extractor}, {reference.fingerprint[:12]} and {samples.extractor}, "
            f"{samples.fingerprint[:12]}): weights, preprocessing, precision or backend differ. "
            "Extract both with the same settings."
        )
