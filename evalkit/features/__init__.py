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
from collections.abc import Callable, Collection, Container, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from evalkit.errors import FeatureError, InputError, OutputError
from evalkit.images import ImageSource
from evalkit.metrics import Moments, Statistics
from evalkit.metrics.base import Layer, check_features
from evalkit.system.distributed import Team
from evalkit.system.files import remove_stale_partials, replace_atomically

__all__ = [
    "EXTRACTING",
    "SHARD",
    "Extractor",
    "FeatureStore",
    "Features",
    "Progress",
    "check_same_extractor",
    "extract",
    "fill",
    "first_features",
    "is_features_file",
]

Float32Array = NDArray[np.float32]
Progress = Callable[[str, int, int], None]
"""Told ``(stage, done, total)`` at a stage's start and after every step of it."""

SHARD = 512
"""Images in one file of the store: what a killed run may have to repeat. A power of two."""

GROUP = 64
"""Such files whose moments are summed up before they are merged with others': 32,768 images."""

EXTRACTING = "Inception features of"
"""How the stage begins in which images are extracted; reading back what is stored is another."""

FORMAT = "evalkit features 2"


class Extractor(Protocol):
    """A network that turns images into features.

    Attributes:
        name: What a report calls it.
        fingerprint: Hex digest of everything that decides the features: weights, preprocessing, precision,
            backend. Features of different fingerprints are never compared.
        dimensions: Features of each layer, ``{"pool": d, "spatial": d_s}``.
        batch_size: Preferred batch size.
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
        statistics: ``{"pool": ..., "spatial": ...}`` where the file carried ``mu`` and its fellows, which
            stand in for the statistics of the images, or where moments were asked for. Empty otherwise.
        image_shape: (height, width, 3) of the images, or None.
        labels: (n,) int64, or None.
        count: Images of the batch, where `pool` and its fellows hold only some or none; None: as many.
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
    count: int | None = None

    def __len__(self) -> int:
        if self.count is not None:
            return self.count
        return 0 if self.pool is None else len(self.pool)

    @property
    def statistics_digest(self) -> str | None:
        """Hex sha256 of :attr:`statistics`; None where there are none."""
        if not self.statistics:
            return None
        arrays = {
            f"{layer}/{key}": np.asarray(getattr(statistics, key))
            for layer, statistics in self.statistics.items()
            for key in ("mu", "sigma")
        }
        return _digest({}, arrays)

    def keeping(self, layers: Container[str]) -> Features:
        """The same batch with no other arrays than ``pool``, ``spatial`` and ``logits`` in ``layers``."""
        dropped: dict[str, Any] = {
            layer: None for layer in ("pool", "spatial", "logits") if layer not in layers
        }
        return replace(self, **dropped)

    def save(self, path: Path | str) -> None:
        """Write one HDF5 file, atomically. Logits are not kept: they follow from ``pool``.

        Raises:
            OutputError: The file cannot be written.
        """
        path = Path(path)
        # HDF5 takes no text that is not UTF-8, as the name of a file may be.
        texts = {
            key: str(getattr(self, key)).encode(errors="backslashreplace").decode() for key in _FEATURES_TEXTS
        }
        arrays = {key: getattr(self, key) for key in ("pool", "spatial", "labels")}
        arrays |= {
            f"statistics/{layer}/{key}": getattr(statistics, key)
            for layer, statistics in self.statistics.items()
            for key in ("mu", "sigma")
        }
        if self.image_shape is not None:
            arrays["image_shape"] = np.array(self.image_shape, np.int64)
        arrays = {key: array for key, array in arrays.items() if array is not None}
        with replace_atomically(path) as partial, h5py.File(partial, "w") as file:
            for key, value in (texts | {"format": FORMAT, "sha256": _digest(texts, arrays)}).items():
                file.attrs[key] = value
            for key, array in arrays.items():
                file.create_dataset(key, data=array)

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
                texts = {key: str(file.attrs[key]) for key in _FEATURES_TEXTS}
                arrays: dict[str, NDArray[Any]] = {}
                file.visititems(
                    lambda key, node: arrays.update({key: node[()]} if isinstance(node, h5py.Dataset) else {})
                )
                if str(file.attrs["sha256"]) != _digest(texts, arrays):
                    raise ValueError("its content is not what was written")
            layers = {key.split("/")[1] for key in arrays if key.startswith("statistics/")}
            shape = arrays.get("image_shape")
            return cls(
                name=texts["name"],
                digest=texts["digest"],
                extractor=texts["extractor"],
                fingerprint=texts["fingerprint"],
                pool=arrays.get("pool"),
                spatial=arrays.get("spatial"),
                labels=arrays.get("labels"),
                statistics={
                    layer: Statistics(
                        mu=arrays[f"statistics/{layer}/mu"], sigma=arrays[f"statistics/{layer}/sigma"]
                    )
                    for layer in sorted(layers)
                },
                image_shape=None if shape is None else tuple(shape.tolist()),
            )
        except InputError:
            raise
        except Exception as error:  # h5py raises almost anything for damage
            raise InputError(f"{path} is a damaged features file ({error}). Extract it again.") from error


_FEATURES_TEXTS = ("name", "digest", "extractor", "fingerprint")


def _digest(texts: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> str:
    """Hex sha256 of what a features file holds."""
    digest = hashlib.sha256(json.dumps([FORMAT, *sorted(texts.items())]).encode())
    for key in sorted(arrays):
        array = np.asarray(arrays[key])
        digest.update(f"{key} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def is_features_file(path: Path) -> bool:
    """Whether ``path`` is an HDF5 file that :meth:`Features.save` wrote, of this or another version."""
    try:
        if not path.is_file() or not h5py.is_hdf5(path):
            return False
        with h5py.File(path, "r") as file:
            return str(file.attrs.get("format", "")).startswith(FORMAT.rsplit(" ", 1)[0])
    except (OSError, KeyError, RuntimeError, ValueError, TypeError):  # what h5py raises for damage
        return False


def extract(
    images: ImageSource,
    extractor: Extractor,
    *,
    layers: Collection[Layer] = ("pool", "spatial", "logits"),
    rows: NDArray[np.int64] | None = None,
    moments: Collection[Layer] = (),
    store: FeatureStore | None = None,
    progress: Progress | None = None,
    team: Team | None = None,
) -> Features:
    """Features of a batch; what the store has is not computed again.

    The batch is taken a part of :data:`SHARD` images at a time: beyond what is kept of it, memory does not
    grow with it. A part is cut into the same forward passes whatever the store had before, and however many
    processes share the work.

    Args:
        images: The batch.
        extractor: The network.
        layers: What to keep of the images.
        rows: (m,) ascending indices of the images to keep it of; None for all.
        moments: Layers whose mean and covariance over all images become :attr:`Features.statistics`, unless
            the file has its own.
        store: Where features are kept between runs; None keeps them nowhere.
        progress: Told the stage, images done and images in all.
        team: Processes that share the work, by way of the store. Each has the layers that it asks for; the
            moments, for which all must ask, are rank 0's alone.

    Raises:
        InputError: The images are bad; the message names the first.
        OutputError: The store cannot be written. What was extracted before stays.
        WorkerError: Another process of the team died, failed or hangs.
    """
    if not isinstance(images, ImageSource):
        raise InputError(
            f"extract takes images that are open, such as evalkit.open_images(...), not {images!r}."
        )
    n = len(images)
    statistics = _statistics(images)
    new = {layer: extractor.dimensions[layer] for layer in moments if n and layer not in statistics}
    arrays = {
        layer: np.empty((n if rows is None else len(rows), d), np.float32)
        for layer, d in extractor.dimensions.items()
        if n and (layer in layers or (layer == "pool" and "logits" in layers))
    }

    def keep(begin: int, end: int, shard: Mapping[str, Float32Array]) -> None:
        for layer, array in arrays.items():
            if rows is None:
                array[begin:end] = shard[layer]
            else:
                first, last = np.searchsorted(rows, (begin, end))
                array[first:last] = shard[layer][rows[first:last] - begin]

    if new or arrays:
        with contextlib.closing(_Shards(images, extractor, store, progress, team, {*arrays, *new})) as shards:
            shards.fill()
            if new:
                statistics |= _moments(shards, new, keep)
            if arrays and (team or not new):
                for number, span in enumerate(shards.spans):
                    keep(*span, shards.read(number))
    return Features(
        name=images.name,
        digest=images.digest,
        extractor=extractor.name,
        fingerprint=extractor.fingerprint,
        pool=arrays.get("pool"),
        spatial=arrays.get("spatial"),
        logits=extractor.logits(arrays["pool"]) if n and "logits" in layers else None,
        statistics=statistics,
        image_shape=images.shape,
        labels=images.labels,
        count=n,
    )


def first_features(
    images: ImageSource, extractor: Extractor, count: int, *, store: FeatureStore | None = None
) -> Features:
    """Features of the first ``count`` images, or of all where there are fewer, as a batch of their own.

    They are read from the store where it has them, and else extracted, and not kept.

    Raises:
        InputError: The images are bad; the message names the first.
    """
    spans, count = _spans(len(images)), min(count, len(images))
    found = None
    if store and count <= spans[0][1]:
        shapes = {layer: (spans[0][1], d) for layer, d in extractor.dimensions.items()}
        found = _Entry(store, images, extractor, spans).read(0, shapes)
    if found is None:
        with contextlib.closing(images.batches(count)) as batches:
            found = dict(extractor(next(batches)))
    pool, spatial = (found[layer][:count] for layer in ("pool", "spatial"))
    return Features(
        name=images.name,
        digest="",
        extractor=extractor.name,
        fingerprint=extractor.fingerprint,
        pool=pool,
        spatial=spatial,
        logits=extractor.logits(pool),
        image_shape=images.shape,
        count=count,
    )


def fill(
    images: ImageSource,
    extractor: Extractor,
    *,
    store: FeatureStore,
    progress: Progress | None = None,
    team: Team | None = None,
) -> None:
    """Put the features of a batch into the store, all that it has not got.

    Arguments and errors are those of :func:`extract`. With a team, this ends as soon as nothing is left for
    this process to do; others may be at work still.
    """
    with contextlib.closing(_Shards(images, extractor, store, progress, team)) as shards:
        shards.fill(wait=False)


def _moments(
    shards: _Shards,
    dimensions: Mapping[Layer, int],
    also: Callable[[int, int, Mapping[str, Float32Array]], None],
) -> dict[str, Statistics]:
    """Statistics of these layers over a whole batch; each shard is shown to ``also``, too.

    Groups of shards are summed up one by one and then merged in order: the result has the same bits whoever
    did which.
    """
    team = shards.team
    groups = [range(len(shards.spans))[first : first + GROUP] for first in range(0, len(shards.spans), GROUP)]

    def sum_up(index: int) -> dict[str, NDArray[Any]]:
        found = {layer: Moments(d) for layer, d in dimensions.items()}
        for number in groups[index]:
            shard = shards.read(number)
            also(*shards.spans[number], shard)
            for layer, moments in found.items():
                first = shards.spans[number][0]
                check_features(shard[layer], f"{shards.name}, {layer}, counted from image {first}")
                moments.update(shard[layer])
            shards.report_read(number)
        return {
            f"{layer}.{key}": array
            for layer, moments in found.items()
            for key, array in moments.state().items()
        }

    if team is None:
        parts: Iterable[Mapping[str, NDArray[Any]]] = map(sum_up, range(len(groups)))
    else:
        parts = team.map(f"moments-{shards.key}", len(groups), sum_up)
        if team.rank:
            return {}
    total = {layer: Moments(d) for layer, d in dimensions.items()}
    for part in parts:
        for layer, moments in total.items():
            other = Moments(dimensions[layer])
            other.restore({key: part[f"{layer}.{key}"] for key in ("n", "mean", "scatter")})
            moments.merge(other)
    return {layer: Statistics(mu=moments.mean, sigma=moments.covariance) for layer, moments in total.items()}


def _spans(n: int) -> list[tuple[int, int]]:
    """First image of each part of a batch of n, and the one after its last."""
    return [(begin, min(begin + SHARD, n)) for begin in range(0, n, SHARD)]


class _Shards:
    """A batch's features a part at a time: from the store, where there is one, and else from the network."""

    def __init__(
        self,
        images: ImageSource,
        extractor: Extractor,
        store: FeatureStore | None,
        progress: Progress | None,
        team: Team | None,
        layers: Collection[str] = (),
    ):
        self.spans = _spans(len(images))
        self.team = team
        self._images = images
        self._extractor = extractor
        self._layers = {layer: d for layer, d in extractor.dimensions.items() if layer in layers}
        self._progress = team.noting(progress) if team else progress
        # What is in memory is hashed in no time.
        images.identify(None if images.kind == "array" else self._report_hashing)
        self._entry = _Entry(store, images, extractor, self.spans) if store else None
        if self._entry:
            self._entry.prepare()
        # A power of two, like SHARD, so that no forward pass goes over the end of a part.
        self._batch_size = min(SHARD, 1 << (extractor.batch_size.bit_length() - 1))
        self._batches: Generator[NDArray[Any], None, None] | None = None
        self._position = 0
        self._done = 0

    @property
    def name(self) -> str:
        """Of the images."""
        return self._images.name

    @property
    def key(self) -> str:
        """Names this batch with this extractor in the store."""
        assert self._entry is not None
        return self._entry.folder.name

    def fill(self, *, wait: bool = True) -> None:
        """Extract what the store has not got; wait for what other processes have in hand, or not."""
        if self._entry is None:
            return
        if self.team is None:
            claims: Generator[int | None, None, None] = (number for number in self._entry.missing())
        else:
            claims = self.team.claims(self._entry.folder / "claims.lock", self._entry.missing)
        written: list[int] = []
        with contextlib.closing(claims):
            for number in claims:
                self._count()
                if number is not None:
                    self._entry.write(number, self._extract(number))
                    written.append(number)
                elif not wait:
                    break
        try:
            if written:
                self._images.check_unchanged(every_file=True)
        except InputError:
            for number in written:  # they may be of other images than those that were hashed
                self._entry.remove(number)
            raise
        self._count()

    def read(self, number: int) -> Mapping[str, Float32Array]:
        """The layers asked for of part ``number``, ``{layer: (n, d) float32}``."""
        if self._entry is None:
            return self._extract(number)
        begin, end = self.spans[number]
        shard = self._entry.read(number, {layer: (end - begin, d) for layer, d in self._layers.items()})
        if shard is None:
            # Damaged by something other than us: the checksums noticed.
            self._entry.remove(number)
            self._count()
            shard = self._extract(number)
            self._entry.write(number, shard)
            self._count()
        return shard

    def report_read(self, number: int) -> None:
        """Say that ``number`` has been read; without a store that is said as it is extracted."""
        if self._progress and self._entry is not None:
            stage = f"mean and covariance of the images of {self._images.name}"
            self._progress(stage, self.spans[number][1], len(self._images))

    def close(self) -> None:
        """End the stream of images."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _extract(self, number: int) -> dict[str, Float32Array]:
        begin, end = self.spans[number]
        if self._batches is None or self._position != begin:
            self.close()
            self._batches = self._images.batches(self._batch_size, start=begin)
            self._position = begin
        shard = {
            layer: np.empty((end - begin, d), np.float32) for layer, d in self._extractor.dimensions.items()
        }
        while self._position < end:
            self._report()
            batch = next(self._batches, None)
            if batch is None:
                raise InputError(
                    f"{self._images.name} ended at image {self._position}; "
                    f"expected {len(self._images)} images."
                )
            for layer, values in self._extractor(batch).items():
                shard[layer][self._position - begin :][: len(batch)] = values
            self._position += len(batch)
            self._done += len(batch)
        self._images.check_unchanged()  # what it is stored under was computed before
        self._report()
        return shard

    def _report_hashing(self, done: int, total: int) -> None:
        if self._progress:
            self._progress(f"checksum of the images of {self._images.name}", done, total)

    def _count(self) -> None:
        """Say how much the store has."""
        assert self._entry is not None
        missing = (self.spans[number] for number in self._entry.missing())
        self._done = len(self._images) - sum(end - begin for begin, end in missing)
        self._report()

    def _report(self) -> None:
        if self._progress:
            self._progress(f"{EXTRACTING} {self._images.name}", self._done, len(self._images))


def _statistics(images: ImageSource) -> dict[str, Statistics]:
    found = images.statistics or {}
    try:
        return {
            layer: Statistics(mu=found[f"mu{suffix}"], sigma=found[f"sigma{suffix}"])
            for layer, suffix in (("pool", ""), ("spatial", "_s"))
            if f"mu{suffix}" in found
        }
    except FeatureError as error:
        raise FeatureError(f"{images.name}: {error}") from error


class FeatureStore:
    """A folder of features, keyed on the content of the images and the extractor's fingerprint.

    Several processes may use one store at once: a file appears whole or not at all, and two that write the
    same file write the same features.
    """

    def __init__(self, root: Path | str):
        self.root = Path(root)

    def folder(self, images: ImageSource, extractor: Extractor) -> Path:
        """Where this batch's features are kept. Any other pixel, weight or setting gives another folder."""
        key = json.dumps([FORMAT, images.digest, len(images), extractor.fingerprint, SHARD])
        return self.root / hashlib.sha256(key.encode()).hexdigest()[:32]


class _Entry:
    """One batch's folder in the store."""

    def __init__(
        self, store: FeatureStore, images: ImageSource, extractor: Extractor, spans: Sequence[tuple[int, int]]
    ):
        self.folder = store.folder(images, extractor)
        self._files = [self.folder / f"{begin:08d}-{end:08d}.h5" for begin, end in spans]
        self._name = images.name
        self._bytes = 4 * len(images) * sum(extractor.dimensions.values())

    def prepare(self) -> None:
        """Make the folder, and see that there is room for what is missing."""
        with _saying_what_to_do(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_stale_partials(self.folder)
            need = self._bytes - sum(file.stat().st_size for file in self.folder.glob("*.h5"))
            free = shutil.disk_usage(self.folder).free
        if need > free:
            raise OutputError(
                f"The feature store {self.folder.parent} needs {need / 1e9:.2f} GB for {self._name} and has "
                f"{free / 1e9:.2f} GB free. Free some space, point EVALKIT_CACHE elsewhere or use --no-store."
            )

    def missing(self) -> list[int]:
        """Numbers of the parts that are not there."""
        # The folder is listed, because a network file system may remember that a file was not there.
        there = set(self.folder.iterdir())
        return [number for number, file in enumerate(self._files) if file not in there]

    def read(self, number: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Float32Array] | None:
        """The layers of these shapes of a part; None where it is damaged or not there."""
        shard = {layer: np.empty(shape, np.float32) for layer, shape in shapes.items()}
        try:
            with h5py.File(self._files[number], "r") as file:
                for layer, array in shard.items():
                    file[layer].read_direct(array)
        except (OSError, KeyError, TypeError, ValueError, AttributeError):
            return None
        return shard

    def remove(self, number: int) -> None:
        with _saying_what_to_do(self.folder):
            self._files[number].unlink(missing_ok=True)

    def write(self, number: int, shard: Mapping[str, Float32Array]) -> None:
        with (
            _saying_what_to_do(self.folder),
            replace_atomically(self._files[number]) as partial,
            h5py.File(partial, "w") as file,
        ):
            for layer, array in shard.items():
                file.create_dataset(layer, data=array, chunks=array.shape, fletcher32=True)


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
