"""Write statistics in the formats of other tools, and read features from their files."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError
from evalkit.features.adm_npz import NETWORK
from evalkit.features.moments import check_rows
from evalkit.features.record import Features
from evalkit.images.npz import array_header, load_array
from evalkit.images.reading import readable
from evalkit.layouts import SHAPES, layout_named
from evalkit.system.files import replace_atomically
from evalkit.system.storage import Place, Remote, file_or_path

__all__ = ["check_name", "modes_of", "read_rows", "resize_warning", "write_statistics"]

ROWS = {"feats": "clean-fid's KID", "pool_3": "score_sde"}
"""Npz keys of ``(n, 2048)`` features of Inception's pool, and the tool that writes them."""

# By tool: the networks its features may come from, most likely first. The files do not say which.
_MODES = {
    ROWS["feats"]: {
        "inception_clean_fid": "clean (protocol clean-fid)",
        "inception_clean_fid_legacy_pytorch": "legacy_pytorch (protocol clean-fid-legacy-pytorch)",
        NETWORK: "legacy_tensorflow (protocol adm)",
    },
    ROWS["pool_3"]: {NETWORK: "TensorFlow's Inception (protocol adm)"},
}

_HEAD = 2**10
# More than ImageNet's training set. A header in a small archive can claim any number of rows.
_MOST_ROWS = 2_000_000


def check_name(out: Place, tool: str) -> None:
    """Raise an InputError if the tool would not read a file of this name; see :mod:`evalkit.layouts`."""
    layout = layout_named(tool)
    if not layout.own and out.suffix.lower() != layout.suffix:
        raise InputError(
            f"{out}: statistics for {layout.tools} have to be in a {layout.suffix} file; change its suffix."
        )


def write_statistics(
    out: Place,
    tool: str,
    statistics: Mapping[str, NDArray[Any]],
    *,
    images: int | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write mean and covariance in a tool's format, atomically.

    Args:
        out: The file, at a path or a URL.
        tool: A row of :data:`evalkit.layouts.LAYOUTS`. ``adm`` keeps the dtypes of the arrays.
        statistics: By evalkit's names, ``mu`` (2048,) and so on; see :data:`evalkit.layouts.SHAPES`.
        images: Number of images, if known; only EDM2's format stores it.
        provenance: How they were computed. Other tools ignore it; evalkit reads it.

    Raises:
        InputError: The mean and covariance that the tool needs are missing, or the file has the wrong suffix.
        OutputError: The file cannot be written.
    """
    layout = layout_named(tool)
    check_name(out, tool)
    arrays = {
        name: statistics[key] if layout.own else statistics[key].astype(layout.dtypes.get(key, "float64"))
        for key, name in layout.keys.items()
        if key in statistics
    }
    if layout.keys["mu"] not in arrays and not layout.own:
        raise InputError(
            f"{out}: there are only {', '.join(statistics)}; statistics for {layout.tools} need mu and "
            "sigma. Make them from the images with `evalkit stats`."
        )
    record = {} if provenance is None else {"provenance": json.dumps(provenance)}
    with replace_atomically(out) as partial, partial.open("wb") as file:
        if layout.suffix == ".pkl":
            file.write(_pickled(arrays, record if images is None else {"num_images": images} | record))
        else:
            texts = {key: np.array(text) for key, text in record.items()}
            np.savez(file, **(arrays | texts))  # type: ignore[arg-type]


def _pickled(arrays: Mapping[str, NDArray[Any]], others: Mapping[str, Any]) -> bytes:
    content: dict[str, Any] = dict(others)
    for name, array in arrays.items():
        group, _, member = name.partition("/")
        content.setdefault(group, {})[member] = np.ascontiguousarray(array)
    # NumPy 1 and 2 both import the function by its old name, but only the latest NumPy 1 by the new one. Up
    # to protocol 3, a name ends with a newline, and this one is written once, before any array data.
    old, new = b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"
    return pickle.dumps(content, protocol=3).replace(new, old, 1)


def resize_warning(tool: str, name: str, preprocess: str | None) -> str | None:
    """A warning if the tool's resize differs, or may differ, from that of the statistics; otherwise None.

    There is no warning for evalkit's own layout, because `evalkit compare` checks the extractor itself.

    Args:
        tool: A row of :data:`evalkit.layouts.LAYOUTS`.
        name: Name of the statistics, for the message.
        preprocess: How the images were preprocessed, as in
            :attr:`evalkit.extractors.base.Extractor.preprocess`; None if unknown.
    """
    layout = layout_named(tool)
    if layout.own:
        return None
    if layout.resize is None:
        return f"The resize of {layout.tools} is not known here: check a FID there before you rely on it."
    if preprocess is None:
        return (
            f"{name} does not say how its images were resized. The resize of {layout.tools} is "
            f"{layout.resize}; if another was used, a FID there is wrong."
        )
    if layout.resize in preprocess:
        return None
    advice = f" {layout.advice}" if layout.advice else ""
    return (
        f"Another resize: these statistics are of images resized with {preprocess}, and that of "
        f"{layout.tools} is {layout.resize}. The file can be read there, but a FID with it is WRONG.{advice}"
    )


def modes_of(features: Features) -> Mapping[str, str]:
    """Networks that another tool's features may come from, with their modes; empty for evalkit's own."""
    return {} if features.fingerprint else _MODES.get(features.extractor, {})


def read_rows(path: Place) -> Features | None:
    """Read features from another tool's npz: ``feats`` of clean-fid's KID, or ``pool_3`` of score_sde.

    Returns:
        Rows of Inception's pool; None for any other file. The fingerprint is empty, because the extractor's
        settings are unknown.

    Raises:
        InputError: The array is not (n, 2048) floats, not finite, or damaged.
    """
    name = str(path)
    if not _begins_with_array(path):
        return None
    with readable(name), file_or_path(path) as file, zipfile.ZipFile(file) as archive:
        keys = {member.removesuffix(".npy") for member in archive.namelist() if member.endswith(".npy")}
        found = [key for key in ROWS if key in keys]
        if not found or keys & {"arr_0", "mu", "mu_s"}:
            return None
        (key,) = found[:1]
        header = array_header(name, archive, key)
        (width,) = SHAPES["mu"]
        if header.shape[1:] != (width,) or header.dtype.kind != "f" or header.shape[0] > _MOST_ROWS:
            raise InputError(
                f"{name}: {key} is {header.dtype} of shape {header.shape}; expected floats of shape "
                f"(n, {width}), at most {_MOST_ROWS:,} rows"
            )
        rows = np.ascontiguousarray(load_array(archive, key, header), np.float32)
    check_rows(rows, f"{name}, {key}")
    digest = hashlib.sha256(f"rows {rows.shape}\n".encode())
    digest.update(rows.data)
    return Features(
        name=name,
        digest=digest.hexdigest(),
        network=NETWORK,
        extractor=ROWS[key],
        fingerprint="",
        arrays={"pool": rows},
    )


def _begins_with_array(path: Place) -> bool:
    """Whether the first member of a zip is an array, found without listing a large zip of images."""
    if isinstance(path, Remote):
        head = b"" if path.is_dir() else path.fetch(0, min(_HEAD, path.size))
    elif path.is_file():
        with path.open("rb") as file:
            head = file.read(_HEAD)
    else:
        return False
    return head.startswith(b"PK\x03\x04") and head[30 : 30 + int.from_bytes(head[26:28], "little")].endswith(
        b".npy"
    )
