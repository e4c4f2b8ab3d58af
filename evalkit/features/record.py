"""Features of one batch of images from one network, in memory and as an HDF5 file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from evalkit.errors import FeatureError, InputError, UndefinedMetricError
from evalkit.extractors.base import Rows
from evalkit.features.moments import Gaussian, check_rows
from evalkit.system.files import replace_atomically
from evalkit.system.hdf5_files import opened_hdf5
from evalkit.system.storage import Place, Remote, place_of

__all__ = ["BatchFeatures", "Features", "check_same_extractor", "is_features_file", "split_output"]

FORMAT = "evalkit features 3"
_TEXTS = ("name", "digest", "network", "extractor", "fingerprint")


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """Features of one batch of images from one network.

    Attributes:
        name: Where the images came from.
        digest: Digest of the images (see :attr:`evalkit.images.ImageSource.digest`).
        network: The extractor's network, such as ``inception``.
        extractor: The extractor's name.
        fingerprint: The extractor's fingerprint; empty if another tool extracted the features.
        arrays: (n, d) float32 rows by output, for the outputs that are kept.
        gaussians: Mean and covariance by output: those in the file, which take precedence over those of its
            images, and those that were requested.
        absent: By output, why there are neither rows nor a Gaussian.
        image_shape: (height, width, 3) of the images, or None.
        labels: (n,) int64, or None.
        count: Number of images in the batch, if `arrays` has rows of only some or none of them.
        published: Name of the published batch, or empty; not saved in files.
    """

    name: str
    digest: str
    network: str
    extractor: str
    fingerprint: str
    arrays: Mapping[str, Rows] = field(default_factory=dict)
    gaussians: Mapping[str, Gaussian] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    image_shape: tuple[int, ...] | None = None
    labels: NDArray[np.int64] | None = None
    count: int | None = None
    published: str = ""

    def __len__(self) -> int:
        if self.count is not None:
            return self.count
        return max(map(len, self.arrays.values()), default=0)

    @property
    def statistics_digest(self) -> str | None:
        """Hex sha256 of :attr:`gaussians`; None if there are none."""
        return _digest({}, _gaussian_arrays(self.gaussians)) if self.gaussians else None

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user, one sentence each."""
        if self.fingerprint:
            return ()
        return (
            f"{self.name} has features of {self.extractor}, from images resized in its way: "
            "scores are comparable only with features of the same resize.",
        )

    def select(self, outputs: Collection[str]) -> Features:
        """The same batch with only the rows of these outputs."""
        return replace(self, arrays={key: rows for key, rows in self.arrays.items() if key in outputs})

    def save(self, path: Place | str) -> None:
        """Write one HDF5 file, atomically, to a path or a URL.

        Raises:
            OutputError: The file cannot be written.
        """
        # HDF5 rejects text that is not valid UTF-8, and a file name may not be.
        texts = {key: str(getattr(self, key)).encode(errors="backslashreplace").decode() for key in _TEXTS}
        arrays: dict[str, NDArray[Any]] = {f"arrays/{key}": rows for key, rows in self.arrays.items()}
        arrays |= _gaussian_arrays(self.gaussians)
        if self.labels is not None:
            arrays["labels"] = self.labels
        if self.image_shape is not None:
            arrays["image_shape"] = np.array(self.image_shape, np.int64)
        with replace_atomically(place_of(path)) as partial, h5py.File(partial, "w") as file:
            for key, value in (texts | {"format": FORMAT, "sha256": _digest(texts, arrays)}).items():
                file.attrs[key] = value
            for key, array in arrays.items():
                file.create_dataset(key, data=array)

    @classmethod
    def load(cls, path: Place) -> Features:
        """Read a file written by :meth:`save`.

        Raises:
            InputError: The file is damaged, or has a different format.
        """
        try:
            with opened_hdf5(path) as file:
                if file.attrs.get("format") != FORMAT:
                    raise InputError(
                        f"{path} is not a features file of this version ({FORMAT!r}). Extract it again."
                    )
                texts = {key: str(file.attrs[key]) for key in _TEXTS}
                arrays: dict[str, NDArray[Any]] = {}
                file.visititems(
                    lambda key, node: arrays.update({key: node[()]} if isinstance(node, h5py.Dataset) else {})
                )
                if str(file.attrs["sha256"]) != _digest(texts, arrays):
                    raise ValueError("its content is not what was written")
            shape = arrays.get("image_shape")
            return cls(
                name=texts["name"],
                digest=texts["digest"],
                network=texts["network"],
                extractor=texts["extractor"],
                fingerprint=texts["fingerprint"],
                arrays={key.split("/")[1]: rows for key, rows in arrays.items() if key.startswith("arrays/")},
                gaussians=_gaussians(arrays),
                labels=arrays.get("labels"),
                image_shape=None if shape is None else tuple(shape.tolist()),
            )
        except InputError:
            raise
        except Exception as error:  # h5py raises almost any exception for a damaged file
            raise InputError(f"{path} is a damaged features file ({error}). Extract it again.") from error


def _gaussian_arrays(gaussians: Mapping[str, Gaussian]) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    for output, gaussian in gaussians.items():
        arrays[f"gaussians/{output}/mean"] = gaussian.mean
        arrays[f"gaussians/{output}/covariance"] = gaussian.covariance
        if gaussian.n is not None:
            arrays[f"gaussians/{output}/n"] = np.array(gaussian.n, np.int64)
    return arrays


def _gaussians(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Gaussian]:
    found = {}
    for output in sorted({key.split("/")[1] for key in arrays if key.startswith("gaussians/")}):
        n = arrays.get(f"gaussians/{output}/n")
        found[output] = Gaussian(
            mean=arrays[f"gaussians/{output}/mean"],
            covariance=arrays[f"gaussians/{output}/covariance"],
            n=None if n is None else int(n),
        )
    return found


def _digest(texts: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> str:
    """Hex sha256 of the content of a features file."""
    digest = hashlib.sha256(json.dumps([FORMAT, *sorted(texts.items())]).encode())
    for key in sorted(arrays):
        array = np.asarray(arrays[key])
        digest.update(f"{key} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def is_features_file(path: Place) -> bool:
    """Whether ``path`` is an HDF5 file written by :meth:`Features.save`, in any version."""
    try:
        if isinstance(path, Remote):
            if path.is_dir() or path.fetch(0, min(4, path.size)) != b"\x89HDF":
                return False
        elif not path.is_file() or not h5py.is_hdf5(path):
            return False
        with opened_hdf5(path) as file:
            return str(file.attrs.get("format", "")).startswith(FORMAT.rsplit(" ", 1)[0])
    except (OSError, KeyError, RuntimeError, ValueError, TypeError):  # raised by h5py for damaged files
        return False


def split_output(output: str) -> tuple[str, str]:
    """Split ``"network:output"`` into its two parts."""
    network, _, key = output.partition(":")
    return network, key


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchFeatures:
    """Features of one batch from every network of a comparison. Metrics are called with these.

    Outputs are named ``"network:output"``, such as ``"inception:pool"``.

    Attributes:
        name: Where the images came from.
        networks: Features by network.
    """

    name: str
    networks: Mapping[str, Features]

    @classmethod
    def of(cls, *features: Features) -> BatchFeatures:
        """Combine the features of one batch from one or more networks."""
        return cls(name=features[0].name, networks={found.network: found for found in features})

    def rows(self, output: str) -> Rows:
        """(n, d) float32 rows of an output, validated.

        Raises:
            UndefinedMetricError: The batch has no such rows; the message says why.
            FeatureError: The rows are not a two-dimensional array of finite floating-point numbers.
        """
        network, key = split_output(output)
        if (features := self.networks.get(network)) is None:
            raise UndefinedMetricError(f"{self.name} holds no features of {network}; this needs the images")
        if key not in features.arrays:
            reason = f"{self.name} has no {key} features; give the images, not only their statistics"
            raise UndefinedMetricError(features.absent.get(key, reason))
        check_rows(features.arrays[key], f"{self.name}, {key}")
        return features.arrays[key]

    def gaussian(self, output: str) -> Gaussian | None:
        """Mean and covariance of an output, if they were in the file or were computed."""
        network, key = split_output(output)
        return self.networks[network].gaussians.get(key) if network in self.networks else None

    def width(self, output: str) -> int | None:
        """Number of features of an output; None if the batch has neither its rows nor its Gaussian."""
        network, key = split_output(output)
        if network in self.networks and key in self.networks[network].arrays:
            return int(self.networks[network].arrays[key].shape[1])
        gaussian = self.gaussian(output)
        return None if gaussian is None else gaussian.mean.size

    def gaussian_or_rows(self, output: str) -> Gaussian | Rows:
        """The Gaussian of an output if there is one, otherwise its rows.

        Raises:
            UndefinedMetricError: The batch has neither.
        """
        gaussian = self.gaussian(output)
        return self.rows(output) if gaussian is None else gaussian

    def select(self, outputs: Collection[str]) -> BatchFeatures:
        """The same batch with only the rows of these outputs (``"network:output"``)."""
        return replace(
            self,
            networks={
                network: features.select([key for key in features.arrays if f"{network}:{key}" in outputs])
                for network, features in self.networks.items()
            },
        )


def check_same_extractor(reference: Features, samples: Features) -> None:
    """Refuse to compare features of different networks, preprocessing or precision.

    Features from another tool have no fingerprint, and get a note instead.

    Raises:
        FeatureError: The fingerprints differ.
    """
    if reference.fingerprint != samples.fingerprint and reference.fingerprint and samples.fingerprint:
        raise FeatureError(
            f"{reference.name} and {samples.name} hold features of different extractors "
            f"({reference.extractor}, {reference.fingerprint[:12]} and {samples.extractor}, "
            f"{samples.fingerprint[:12]}): weights, preprocessing, precision or backend differ. "
            "Extract both with the same settings."
        )
