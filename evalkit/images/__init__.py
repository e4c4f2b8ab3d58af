"""Where images come from: npz archives, folders, zips, tars, HDF5 files and arrays, all read the same way.

The main path is two lines::

    images = open_images("samples.npz")
    for batch in images.batches(64):  # (n, height, width, 3), uint8, or float32 if the file holds floats
        ...

Opening makes the cheap checks (is the file there, its kind, its header, its statistics); pixels are checked
while they stream past. No container is ever held in memory whole, except arrays in Fortran order.
"""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from evalkit.errors import InputError, RemoteError
from evalkit.images.arrays import SupportsArray, open_array
from evalkit.images.decode import Decoded
from evalkit.images.files import ImageFiles
from evalkit.images.labels import are_ids
from evalkit.images.parts import is_pattern, open_parts
from evalkit.images.reading import Candidate, readable
from evalkit.images.source import ImageSource, Known
from evalkit.images.value_range import VALUE_RANGES, ValueRange, check_range_used, parse_value_range
from evalkit.images.write import NpzWriter
from evalkit.system.background import read_ahead
from evalkit.system.files import kind_of
from evalkit.system.storage import Place, Remote, place_of
from evalkit.system.urls import is_url

__all__ = [
    "FORMATS",
    "VALUE_RANGES",
    "Format",
    "ImageFiles",
    "ImageSource",
    "NpzWriter",
    "SupportsArray",
    "ValueRange",
    "are_ids",
    "check_range_used",
    "is_pattern",
    "open_image_files",
    "open_images",
    "parse_value_range",
    "read_ahead",
    "reopen",
]

# To add a format, write its class (see Format) in a file of its own, add a row "kind": "module:Class" here,
# and tests/images/test_<module>.py with a maker (see tests/images/test_format_contract.py). Rows are asked in
# this order, and the first that claims a path opens it: put a special kind of zip or tar before the general.
FORMATS: Mapping[str, str] = {
    "npz": "evalkit.images.npz:Npz",
    "npy": "evalkit.images.arrays:Npy",
    "pkl": "evalkit.images.pkl:Pkl",
    "parquet": "evalkit.images.parquet:Parquet",
    "folder": "evalkit.images.files:Folder",
    "hdf5": "evalkit.images.hdf5:Hdf5",
    "zip": "evalkit.images.archives:Zip",
    "webdataset": "evalkit.images.webdataset:WebDataset",
    "tar": "evalkit.images.archives:Tar",
}


class Format(Protocol):
    """What a row of :data:`FORMATS` names: a subclass of ImageSource (arrays) or of ImageFiles (pictures)."""

    def __call__(self, path: Place) -> ImageSource | ImageFiles:
        """Open the path.

        Raises:
            InputError: It is damaged, or holds no images.
        """

    def claims(self, candidate: Candidate) -> bool:
        """Whether this class reads the file or folder; a class method, and a cheap check."""


def open_images(
    source: str | os.PathLike[str] | SupportsArray | Remote, *, value_range: ValueRange | None = None
) -> ImageSource:
    """Open images from any container; its kind is recognised by the content, not by the suffix.

    - npz: ``arr_0`` as for the reference evaluator, with labels in ``arr_1`` and statistics if it has them.
      An npz with statistics and no images is a source of length 0. Several arrays of images are an error.
    - folder, zip, tar (also compressed): image files (png, jpg, webp, bmp, tif, ppm) at any depth, in the
      order of their relative POSIX paths. Hidden files are left out. Pillow decodes them to RGB; as in other
      tools, EXIF orientation is not applied and of several frames the first counts. Nothing is extracted.
    - parquet, one file or a folder of them: a column of encoded images, with labels in ``label``.
    - HDF5: the dataset ``images`` or ``arr_0``, or the only one with four axes.
    - pkl: the statistics of EDM2, read without unpickling; a source of length 0.
    - npy and arrays, also torch tensors on the CPU.
    - Files and folders at URLs: ``https://``, ``s3://``, ``gs://``; see :mod:`evalkit.system.storage`.
    - Several of these as one: a pattern such as ``parts/*.npz``, in the order of their sorted names
      (``10`` before ``9``). All of one size, without statistics; labels if all have them.

    Arrays are ``(n, height, width, 3)``, integers or floats, in [0, 255]. Floats are all read, once (see
    :meth:`ImageSource.identify`): a batch, or a single image, that is scaled for a network is refused, unless
    ``value_range`` says how it is scaled.

    Args:
        source: A path, a URL or an array.
        value_range: What floats hold: ``"0..1"``, ``"-1..1"`` or ``"0..255"``. The first two are scaled to
            [0, 255], not rounded; values outside are an error. Integers are from 0 to 255 in any case.

    Raises:
        ImageError: The first image file is bad.
        InputError: The file is missing, is none of the above, is damaged, has no images, or they have the
            wrong shape, type or range; or its statistics are incomplete or not finite.
    """
    wanted = parse_value_range(value_range)
    images: ImageSource
    if not isinstance(source, str | os.PathLike | Remote):
        images = open_array(source)
    elif not isinstance(source, Remote) and not os.fspath(source):
        raise InputError("A path is empty. Give a file, a folder or a pattern; . is the current folder.")
    elif not isinstance(source, Remote) and is_pattern(source):
        pattern = str(source) if is_url(source) else str(Path(source))
        return open_parts(pattern, lambda path: open_images(path, value_range=value_range))
    else:
        images = _open_one(place_of(source))
    images.take_value_range(wanted)
    return images


def _open_one(place: Place) -> ImageSource:
    with readable(str(place)):
        opened = _find_format(place)(place)
        images = Decoded(opened) if isinstance(opened, ImageFiles) else opened
    images.opened_by = partial(reopen, place.url if isinstance(place, Remote) else str(place.absolute()))
    return images


def reopen(place: str, known: Known) -> ImageSource:
    """Open in this process what was opened in another one: what unpickling an ImageSource does.

    The content is hashed and compared. It is not where the files have the sizes, inodes and times, or the
    versions of the server, that they had for the other process: on the same machine, and at most URLs. Other
    machines remember the hash (see :mod:`evalkit.system.identity`). So the check costs one reading of the
    file on each, little beside extracting features, and leaves no way for other pixels to come in.

    Args:
        place: An absolute path, or a URL.
        known: What the content was.

    Raises:
        InputError: There is nothing, or something else.
    """
    try:
        images = _open_one(place_of(place))
        images.take_known(known)
    except RemoteError:
        raise
    except InputError as error:
        raise InputError(
            f"{str(error).rstrip('.')}. All workers must see the same file: put it where they all find it "
            "under this path, or give a URL."
        ) from error
    return images


def open_image_files(path: Place) -> ImageFiles | None:
    """Open a folder, zip, tar or parquet file of images of any size; None if ``path`` holds arrays.

    Files ending in png, jpg, webp, bmp, tif or ppm count, at any depth; hidden ones do not. A folder of
    parquet files is read as one, in the order of their names.

    Raises:
        InputError: It is missing, damaged, holds no images, or has members with unsafe paths.
        MissingDependencyError: Parquet needs pyarrow.
    """
    with readable(str(path)):
        format_ = _find_format(path)
        holds_files = isinstance(format_, type) and issubclass(format_, ImageFiles)
        opened = format_(path) if holds_files else None
    return opened if isinstance(opened, ImageFiles) else None


def _find_format(path: Place) -> Format:
    """The class of the first row that claims the path."""
    candidate = Candidate.at(path)
    for row in FORMATS.values():
        format_: Format = pkgutil.resolve_name(row)
        if format_.claims(candidate):
            return format_
    *kinds, last = FORMATS
    raise InputError(
        f"{path}: its content (first bytes {candidate.head[:8]!r}) is not that of a known container; it is "
        f"{kind_of(candidate.head)}; expected an {', '.join(kinds)} or {last} of images"
    )
