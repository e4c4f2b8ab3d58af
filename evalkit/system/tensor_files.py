"""Read files of named tensors as data; code in them is never run.

PyTorch files are read with ``weights_only=True``; safetensors hold no code. Files are memory-mapped, so that
a network needs memory for its weights only once.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch

from evalkit.errors import InputError, brief, first_line, listing
from evalkit.system.files import kind_of

__all__ = ["TensorFile", "read_tensors"]


@dataclass(frozen=True)
class TensorFile:
    """The content of a file of weights.

    Attributes:
        container: The file format.
        content: Tensors by name, or anything else that PyTorch can read as data.
        metadata: Metadata of safetensors; empty for PyTorch files.
    """

    container: Literal["PyTorch", "safetensors"]
    content: Any
    metadata: Mapping[str, str]


def read_tensors(path: Path, advice: str) -> TensorFile:
    """Detect the format from the content, and map the file into memory.

    Args:
        path: The file.
        advice: What to do if the file has a different format, to end the message, without a full stop.

    Raises:
        InputError: The file does not exist, or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror or error}. Give a file of weights."
        ) from error
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return TensorFile("PyTorch", _read_pytorch(path), {})
    raise InputError(
        f"{path} is no file of weights, it is {kind_of(start)}. Expected a PyTorch state dict (.pt) or "
        f"safetensors; {advice}."
    )


@contextmanager
def _utf8_name(path: Path) -> Iterator[str]:
    """A UTF-8 name for the file, which some readers require; on Linux, file names may be any bytes."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield os.fspath(path)


def _read_safetensors(path: Path) -> TensorFile:
    try:
        with _utf8_name(path) as name, safetensors.safe_open(name, "pt") as file:
            metadata = file.metadata() or {}
            content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as safetensors: {brief(error, 300)}. Fetch or convert it again."
        ) from error
    return TensorFile("safetensors", content, metadata)


def _read_pytorch(path: Path) -> Any:
    _check_archive(path)
    try:
        with _utf8_name(path) as name:
            return torch.load(name, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # PyTorch's own message suggests loading the file unsafely.
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({brief(found[1])})" if found else ""
        raise InputError(
            f"{path} holds more than tensors{what}, and a file of weights never gets to run code. Save the "
            "network's state_dict() alone."
        ) from error
    except Exception as error:  # damaged files may raise any exception
        why = first_line(error) or "it ends early"
        raise InputError(
            f"{path} cannot be read as a PyTorch file: {brief(why, 300)}. Fetch it again."
        ) from error


def _check_archive(path: Path) -> None:
    """Raise an InputError for a zip archive that torch.save did not write; ignores damaged archives."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return
    if not any(name.endswith("data.pkl") for name in names):
        raise InputError(
            f"{path} is a zip archive, and not one that torch.save writes: it holds "
            f"{listing([brief(name, 40) for name in names]) or 'nothing'}. Unpack it, and give the weights."
        )
