"""Files of weights, read as data: nothing in them is ever run.

PyTorch's files are read with ``weights_only=True``, safetensors as they are. Files are mapped into memory, so
that a network takes its size once and not twice.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import safetensors
import torch
from torch import Tensor

from evalkit.errors import InputError, brief, first_line, listing
from evalkit.system.files import kind_of
from generation.presets import ModelPreset

__all__ = ["FIRST_CONVOLUTION", "PRESET_KEY", "Content", "StateDictFile", "read_state_dict"]

Content: TypeAlias = Literal[
    "network", "averaged network (EMA)", "tensors and other things", "optimiser state", "no named tensors"
]
"""What a file of weights may hold."""

FIRST_CONVOLUTION = "input_blocks.0.0.weight"
"""The tensor by which an ADM network is recognised."""

PRESET_KEY = "evalkit_preset"
"""Key of the preset in the metadata of safetensors."""

TRAINING_FILES = "ema_*.pt holds averaged weights, model*.pt the last ones, opt*.pt the optimiser's state"


@dataclass(frozen=True)
class StateDictFile:
    """A file of weights as read: its tensors by name, or anything else.

    Attributes:
        path: The file.
        container: How it was written.
        content: What it holds, as Python reads it.
        preset: The preset in its metadata; None without one.
    """

    path: Path
    container: Literal["PyTorch", "safetensors"]
    content: Any
    preset: ModelPreset | None

    @cached_property
    def prefix(self) -> str:
        """What precedes every name of an ADM network.

        Such as ``module.`` of DistributedDataParallel or ``_orig_mod.`` of torch.compile.
        """
        names = _named_tensors(self.content)
        first = next((name for name in names if name.endswith(f".{FIRST_CONVOLUTION}")), "")
        prefix = first.removesuffix(FIRST_CONVOLUTION)
        return prefix if all(name.startswith(prefix) for name in names) else ""

    @cached_property
    def named(self) -> dict[str, Tensor]:
        """The named tensors at the top level, without the prefix; other entries are left out."""
        found = _named_tensors(self.content)
        return {name.removeprefix(self.prefix): tensor for name, tensor in found.items()}

    @property
    def problem(self) -> str | None:
        """Why the file does not hold the named tensors of a network; None if it does."""
        content = self.content
        if self.named and len(self.named) == len(content):
            return None
        if self.named:
            others = [
                f"{brief(key, 40)} ({type(value).__name__})"
                for key, value in content.items()
                if not (isinstance(key, str) and isinstance(value, Tensor))
            ]
            return (
                f"{self.path} holds, beside {len(self.named):,} named tensors, {listing(others)}. Save the "
                "tensors alone, as a network's state_dict() has them."
            )
        within = {}
        if isinstance(content, dict) and not _is_optimiser(content):
            within = {key: len(_named_tensors(value)) for key, value in content.items()}
        holding = [f"{brief(key, 40)} ({count:,} tensors)" for key, count in within.items() if count]
        nested = (
            f" Tensors are under the keys {listing(holding)}: save those of one key alone, with "
            "torch.save(torch.load(FILE)[KEY], NEW)."
            if holding
            else ""
        )
        return (
            f"{self.path} holds {_describe(content)}, not the named tensors of a network.{nested} Among the "
            f"files of a training run, {TRAINING_FILES}."
        )

    def tensors(self) -> dict[str, Tensor]:
        """The named tensors, without the prefix.

        Raises:
            InputError: It holds something else.
        """
        if self.problem:
            raise InputError(self.problem)
        return self.named

    @property
    def kind_of_content(self) -> Content:
        """What the file seems to hold; that weights are an average (EMA) only the file's name can say."""
        if _is_optimiser(self.content):
            return "optimiser state"
        if not self.named:
            return "no named tensors"
        if self.problem:
            return "tensors and other things"
        return "averaged network (EMA)" if self.path.name.startswith("ema") else "network"


def read_state_dict(path: Path) -> StateDictFile:
    """Recognise the container by its content and map it into memory.

    Raises:
        InputError: There is no such file, or it cannot be read.
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
        return StateDictFile(path, "PyTorch", _read_pytorch(path), None)
    raise InputError(
        f"{path} is no file of weights, it is {kind_of(start)}. Expected a PyTorch state dict (.pt) or "
        "safetensors; download a published checkpoint with `evalkit checkpoint fetch`."
    )


@contextmanager
def _utf8_name(path: Path) -> Iterator[str]:
    """A name of the file in UTF-8, which some readers require; on Linux its own may be any bytes."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield os.fspath(path)


def _read_safetensors(path: Path) -> StateDictFile:
    try:
        with _utf8_name(path) as name, safetensors.safe_open(name, "pt") as file:
            metadata = file.metadata() or {}
            content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as safetensors: {brief(error, 300)}. Fetch or convert it again."
        ) from error
    stated = metadata.get(PRESET_KEY)
    try:
        preset = ModelPreset.from_json(stated) if stated else None
    except InputError as error:
        raise InputError(f"{path}, {PRESET_KEY} in its metadata: {error}") from error
    return StateDictFile(path, "safetensors", content, preset)


def _read_pytorch(path: Path) -> Any:
    _check_archive(path)
    try:
        with _utf8_name(path) as name:
            return torch.load(name, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to load the file unsafely.
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({brief(found[1])})" if found else ""
        raise InputError(
            f"{path} holds more than tensors{what}, and a file of weights never gets to run code. Save the "
            "network's state_dict() alone."
        ) from error
    except Exception as error:  # damaged bytes may raise anything
        why = first_line(error) or "it ends early"
        raise InputError(
            f"{path} cannot be read as a PyTorch file: {brief(why, 300)}. Fetch it again."
        ) from error


def _check_archive(path: Path) -> None:
    """Raise an InputError for a zip archive that torch.save did not write; a damaged one is left to it."""
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


def _named_tensors(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        return {}
    return {
        key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)
    }


def _is_optimiser(content: Any) -> bool:
    return isinstance(content, dict) and {"state", "param_groups"} <= set(content)


def _describe(content: Any) -> str:
    if _is_optimiser(content):
        return "an optimiser's state"
    if isinstance(content, dict):
        return f"a dictionary with the keys {listing([brief(key, 40) for key in content]) or '(none)'}"
    return f"a {type(content).__name__}"
