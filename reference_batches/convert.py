"""One batch for every tool: its images as an npz, a folder or a zip of PNG files; its statistics as any's."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evalkit.errors import InputError, OutputError
from evalkit.features.adm_npz import written_images, written_preprocess
from evalkit.features.other_tools import check_name, resize_warning, write_statistics
from evalkit.images import ImageSource, NpzWriter, open_images
from evalkit.images.files import DATASET
from evalkit.layouts import LAYOUTS
from evalkit.system.files import check_writable, remove_stale_partials, replace_atomically
from evalkit.system.progress import Progress
from evalkit.system.storage import Place, Remote

__all__ = ["convert", "convert_statistics"]

Write = Callable[[str, bytes], object]

BATCH = 64
# PNG is lossless at any level; higher ones take several times as long.
PNG_LEVEL = 1
# Names that are surely not meant for a folder.
_NOT_WRITTEN = {".bz2", ".gz", ".h5", ".hdf5", ".jpeg", ".jpg", ".npy", ".parquet", ".pkl", ".png", ".tar"}
_NOT_WRITTEN |= {".tgz", ".webp", ".xz"}


def convert(source: str | PathLike[str], out: Place, progress: Progress | None = None) -> ImageSource:
    """Write the images of ``source`` to another container, in the same order, a few at a time.

    An ``out`` that ends in ``.npz`` becomes an npz, with labels and statistics if the source has them. One
    that ends in ``.zip`` becomes a zip, and anything else a folder, of files ``000000.png``, ``000001.png``
    and so on, with labels in ``dataset.json`` as in the datasets of EDM and StyleGAN, which evalkit reads
    back. A folder or zip has no place for statistics; a note says that they were left out. Files can be
    written to URLs, and folders not.

    Args:
        source: Equally large images, as :func:`evalkit.images.open_images` takes them.
        out: The file or folder to write. A file is replaced at the end; a folder must not exist.
        progress: Called with (stage, done, total).

    Returns:
        The source, with its notes.

    Raises:
        InputError: The source cannot be read, has no images, or holds floats, which rounding would change; or
            ``out`` has the suffix of another kind of file.
        OutputError: ``out`` cannot be written.
    """
    if out.suffix.lower() in _NOT_WRITTEN:
        raise InputError(
            f"{out}: converting writes an npz, a zip or a folder, not a {out.suffix} file. Give a name that "
            "ends in .npz or .zip, or the name of a folder."
        )
    suffix = out.suffix.lower()
    if isinstance(out, Remote) and suffix not in (".npz", ".zip"):
        raise OutputError(
            f"Cannot write {out}: a folder cannot be written to a URL. Give a name that ends in .npz or "
            ".zip, or a folder on this machine."
        )
    images = open_images(source)
    if isinstance(out, Remote) or out.is_file():
        check_writable(out, source)
    if images.shape is None:
        raise InputError(
            f"{images.name}: holds statistics and no images, so there are none to write. To write the "
            f"statistics for another tool, give --as: {', '.join(LAYOUTS)}."
        )
    if images.dtype != np.uint8:
        raise InputError(
            f"{images.name}: holds floats, and 8-bit files would change the metrics. If that is meant, round "
            "them yourself: np.rint(x).clip(0, 255).astype(np.uint8)"
        )
    if suffix == ".npz":
        _to_npz(images, out, progress)
        return images
    with _folder(out) if isinstance(out, Path) and suffix != ".zip" else _zip(out) as write:
        names = _write_files(images, write, progress)
        if images.labels is not None:
            labels = [list(row) for row in zip(names, images.labels.tolist(), strict=True)]
            write(str(DATASET), json.dumps({"labels": labels}).encode())
    if images.statistics:
        images.notes += (f"The statistics of {images.name} are left out: {out} has no place for them.",)
    return images


def convert_statistics(source: str | PathLike[str], out: Place, tool: str) -> ImageSource:
    """Write the mean and covariance in a file as another tool reads them; images are left out.

    Args:
        source: What :func:`evalkit.images.open_images` takes, with statistics.
        out: The file to write.
        tool: A row of :data:`evalkit.layouts.LAYOUTS`.

    Returns:
        The source, with its notes; among them whether the tool resizes images in another way.

    Raises:
        InputError: The source cannot be read, or has none of the statistics that the tool uses.
        OutputError: ``out`` cannot be written.
    """
    check_name(out, tool)
    check_writable(out, source)
    images = open_images(source)
    if not images.statistics:
        raise InputError(
            f"{images.name}: holds no mean and covariance. This makes them of its images: "
            f"evalkit stats {images.name} -o {out} --as {tool}"
        )
    write_statistics(
        out, tool, images.statistics, images=written_images(images), provenance=images.provenance
    )
    if images.shape:
        images.notes += (f"The images of {images.name} are left out: {out} holds statistics alone.",)
    left = [key for key in images.statistics if key.startswith("mu") and key not in LAYOUTS[tool].keys]
    if left:
        images.notes += (
            f"Left out, as files for {LAYOUTS[tool].tools} have no place for it: {', '.join(left)}.",
        )
    if warning := resize_warning(tool, images.name, written_preprocess(images)):
        images.notes += (warning,)
    return images


def _to_npz(images: ImageSource, out: Place, progress: Progress | None) -> None:
    assert images.shape is not None
    with NpzWriter.create(out, (len(images), *images.shape)) as writer:
        for batch in _batches(images, progress):
            writer.append(batch)
        if images.labels is not None:
            writer.add("arr_1", images.labels)
        for key, array in (images.statistics or {}).items():
            writer.add(key, array)
        if images.provenance is not None:
            writer.add("provenance", np.array(json.dumps(images.provenance)))


def _write_files(images: ImageSource, write: Write, progress: Progress | None) -> list[str]:
    digits = max(6, len(str(len(images) - 1)))
    names = [f"{index:0{digits}d}.png" for index in range(len(images))]
    remaining = iter(names)
    with ThreadPoolExecutor() as pool:
        for batch in _batches(images, progress):
            for encoded in pool.map(_png, batch):
                write(next(remaining), encoded)
    return names


def _batches(images: ImageSource, progress: Progress | None) -> Iterator[NDArray[np.uint8]]:
    stage, done = f"images of {images.name}", 0
    if progress:
        progress(stage, done, len(images))
    with closing(images.batches(BATCH)) as batches:
        for batch in batches:
            yield batch
            done += len(batch)
            if progress:
                progress(stage, done, len(images))


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


@contextmanager
def _zip(out: Place) -> Iterator[Write]:
    with replace_atomically(out) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        # Without times, so that the same images give the same bytes.
        yield lambda name, data: archive.writestr(zipfile.ZipInfo(name), data)


@contextmanager
def _folder(out: Path) -> Iterator[Write]:
    if out.exists():
        raise OutputError(f"{out} is there already. Name a folder that is not, or remove it.")
    remove_stale_partials(out.parent, out.name)
    with replace_atomically(out, folder=True) as partial:
        yield lambda name, data: (partial / name).write_bytes(data)
