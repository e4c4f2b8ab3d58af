"""HDF5 files of images: one dataset, read by slices."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
from numpy.typing import NDArray

from evalkit.errors import InputError, brief, listing
from evalkit.images.arrays import Layout, check_layout, check_only_images
from evalkit.images.reading import Candidate, readable
from evalkit.images.source import ImageSource
from evalkit.system.hdf5_files import opened_hdf5, paused_collection
from evalkit.system.storage import Place, Remote, file_or_path

__all__ = ["Hdf5"]


class Hdf5(ImageSource):
    """One dataset of an HDF5 file, read by slices."""

    def __init__(self, path: Place) -> None:
        name = str(path)
        self._path = path
        with readable(name), opened_hdf5(path) as file:
            datasets: dict[str, Any] = {}
            file.visititems(
                lambda key, node: datasets.update({key: node} if isinstance(node, h5py.Dataset) else {})
            )
            for key in ("images", "arr_0", "labels", "arr_1"):
                # visititems passes over links.
                if key not in datasets and isinstance(file.get(key), h5py.Dataset):
                    datasets[key] = file[key]
            with_four_axes = [key for key, dataset in datasets.items() if dataset.ndim == 4]
            named = [key for key in ("images", "arr_0") if key in datasets]
            if not named and len(with_four_axes) != 1:
                found = listing(f"{key} {dataset.shape}" for key, dataset in datasets.items()) or "none"
                raise InputError(
                    f"{name}: which dataset holds the images? "
                    f"Expected images, arr_0 or exactly one with four axes; found {found}"
                )
            self._key = (named or with_four_axes)[0]
            numbered = {key: Layout(str(d.dtype), d.shape or ()) for key, d in datasets.items()}
            check_only_images(
                name, {key: d for key, d in numbered.items() if re.fullmatch(r"arr_[0-9]+", key)}
            )
            dataset = datasets[self._key]
            if isinstance(path, Remote):
                _check_no_other_files(name, file, datasets)
            shape = check_layout(f"{name}, {self._key}", dataset.shape or (), dataset.dtype)
            super().__init__(name, "hdf5", len(dataset), shape, dataset.dtype)
            _check_written(f"{name}, {self._key}", dataset)
            labels = next((key for key in ("labels", "arr_1") if key in datasets), None)
            if labels is not None:
                found = datasets[labels]
                self._take_labels(labels, found.shape or (), found.dtype, lambda: found[:])
            unused = [
                f"{key} {found.shape}" for key, found in datasets.items() if key not in (self._key, labels)
            ]
            if unused:
                self.notes += (f"Datasets of {name} that are not used: {listing(unused)}.",)
            links = [
                key
                for key in file
                if key not in datasets and not isinstance(file.get(key, getlink=True), h5py.HardLink)
            ]
            if links:
                self.notes += (f"Links in {name} that are not followed: {listing(links)}.",)
            # Values may lie in other files, and changes of those would not be noticed.
            own = isinstance(path, Remote) or Path(dataset.file.filename).samefile(path)
            self._is_whole = own and not (dataset.is_virtual or dataset.external)

    @classmethod
    def claims(cls, candidate: Candidate) -> bool:
        """Whether HDF5's signature is at one of its places."""
        if isinstance(candidate.path, Remote):
            return candidate.head.startswith(b"\x89HDF")
        return not candidate.is_folder and bool(h5py.is_hdf5(candidate.path))

    def _paths(self) -> Sequence[Place] | None:
        return [self._path] if self._is_whole else None

    def _read(self, size: int, start: int) -> Iterator[NDArray[Any]]:
        remote, stack = isinstance(self._path, Remote), ExitStack()
        with readable(self.name):
            try:
                with paused_collection(needed=remote):
                    opened = stack.enter_context(file_or_path(self._path))
                    dataset = stack.enter_context(h5py.File(opened, "r"))[self._key]
                for first in range(start, len(self), size):
                    with paused_collection(needed=remote):
                        images = dataset[first : first + size]
                    yield images
            finally:
                with paused_collection(needed=remote):
                    stack.close()


def _check_no_other_files(name: str, file: Any, datasets: Mapping[str, Any]) -> None:
    """Raise an InputError if a file at a URL leads to others: these would be looked for on this machine."""
    for key, dataset in datasets.items():
        if dataset.file.id != file.id or dataset.is_virtual or dataset.external:
            raise InputError(
                f"{name}: the data of {brief(key)} is stored in other files, which are not read over the "
                "network. Copy all of the files to this machine and give the local path."
            )


def _check_written(where: str, dataset: Any) -> None:
    """Raise an InputError if parts of a dataset were never written: they would read as black."""
    folder = Path(dataset.file.filename).parent
    if dataset.is_virtual:
        files = {source.file_name for source in dataset.virtual_sources()} - {"."}
        if missing := [file for file in sorted(files) if not (folder / file).exists()]:
            raise InputError(f"{where}: its values are in other files that are missing: {listing(missing)}")
    for file, offset, size in dataset.external or ():
        there = (folder / file).stat().st_size if (folder / file).exists() else 0
        if there < offset + min(size, dataset.nbytes):
            raise InputError(f"{where}: its values are in {file}, which is missing or too short")
    if dataset.chunks is not None:
        chunks = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
        if (written := dataset.id.get_num_chunks()) < chunks:
            raise InputError(
                f"{where}: {written:,} of its {chunks:,} chunks were written; the rest would count as "
                "black. The program that wrote it did not finish"
            )
