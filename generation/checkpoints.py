"""Files of network weights: which model they are, strict loading, conversion to safetensors.

Files are read as data (``weights_only=True``, safetensors): nothing in them is ever run. They are mapped into
memory, so that a network takes its size once and not twice.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from evalkit.errors import InputError, brief, listing
from evalkit.system.download import download, published_urls
from evalkit.system.files import cache_directory, check_writable, kind_of, replace_atomically, tensor_digest
from generation.networks.unet import Trunk
from generation.presets import MODELS, Kind, ModelPreset

__all__ = [
    "Difference",
    "Inspection",
    "Loaded",
    "cached",
    "convert",
    "fetch",
    "identify",
    "inspect",
    "load_network",
    "save_network",
    "weights_digest",
]

Content: TypeAlias = Literal[
    "network", "averaged network (EMA)", "tensors and other things", "optimiser state", "no named tensors"
]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

FIRST_CONVOLUTION = "input_blocks.0.0.weight"
ALIGNMENT = 64
PRESET_KEY = "evalkit_preset"
TRAINING_FILES = "ema_*.pt holds averaged weights, model*.pt the last ones, opt*.pt the optimiser's state"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A network and where it came from.

    Attributes:
        network: In eval mode, its parameters without gradients.
        preset: What its weights do not say.
        digest: :func:`weights_digest` of its parameters.
        path: The file.
        prefix: What stood before every name in it and was left out; see :class:`Inspection`.
    """

    network: Trunk
    preset: ModelPreset
    digest: str
    path: Path
    prefix: str = ""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How the tensors of a file differ from those of a network.

    Attributes:
        missing: Names of the network's tensors that the file lacks.
        unexpected: Names in the file that the network lacks.
        reshaped: Names in both, of another shape.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        parts = [
            f"{len(names)} {what} (the first is {brief(names[0])})"
            for names, what in (
                (self.missing, "missing"),
                (self.unexpected, "unexpected"),
                (self.reshaped, "of another shape"),
            )
            if names
        ]
        return ", ".join(parts) or "none"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a file holds.

    Attributes:
        path: The file.
        container: How it was written.
        content: What it seems to be; that weights are an average (EMA) only the file's name can say.
        problem: Why :func:`load_network` would not take it, whatever the preset; None where it may.
        prefix: What stands before every name of an ADM network, such as ``module.`` of
            DistributedDataParallel or ``_orig_mod.`` of torch.compile; it is not part of the names.
        kind: Of an ADM network, by its keys; None for anything else.
        tensors: Number of named tensors.
        parameters: Number of their elements.
        dtypes: Their types.
        digest: :func:`weights_digest`; None where there are no named tensors.
        preset: What its metadata says; None where it says nothing.
        fits: ``preset`` and the published checkpoints, those of them with just these keys and shapes.
        nearest: ``preset``, or else the published checkpoint of that kind that shares most of them.
        difference: Between the file and ``nearest``.
    """

    path: Path
    container: Literal["PyTorch", "safetensors"]
    content: Content
    problem: str | None
    prefix: str
    kind: Kind | None
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    digest: str | None
    preset: ModelPreset | None
    fits: tuple[ModelPreset, ...]
    nearest: ModelPreset | None
    difference: Difference | None


@dataclass(frozen=True)
class _File:
    """A file as read: its tensors by name, or else the object it holds."""

    path: Path
    container: Literal["PyTorch", "safetensors"]
    content: Any
    preset: ModelPreset | None

    @cached_property
    def prefix(self) -> str:
        """What stands before every name of an ADM network; see :class:`Inspection`."""
        names = _named_tensors(self.content)
        first = next((name for name in names if name.endswith(f".{FIRST_CONVOLUTION}")), "")
        prefix = first.removesuffix(FIRST_CONVOLUTION)
        return prefix if all(name.startswith(prefix) for name in names) else ""

    @cached_property
    def named(self) -> dict[str, Tensor]:
        """The named tensors at its top, whatever is beside them; names without the prefix."""
        found = _named_tensors(self.content)
        return {name.removeprefix(self.prefix): tensor for name, tensor in found.items()}

    @property
    def problem(self) -> str | None:
        """Why these are not the named tensors of a network, in words; None if they are."""
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
            f"{self.path} holds {_describe(content)}, not the named tensors of a network.{nested} Of a "
            f"training run, {TRAINING_FILES}."
        )

    def tensors(self) -> dict[str, Tensor]:
        """The named tensors, without the prefix.

        Raises:
            InputError: It holds something else.
        """
        if self.problem:
            raise InputError(self.problem)
        return self.named


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Digest of weights, the same whatever file and floating-point type they came in."""
    return tensor_digest({name: tensor.detach().cpu().float().numpy() for name, tensor in state.items()})


def identify(shapes: Shapes) -> list[ModelPreset]:
    """The published checkpoints whose keys and shapes these are.

    Several may share one layout: what else is known of the file must decide between them.
    """
    return [preset for preset in MODELS.values() if _expected(preset) == dict(shapes)]


def load_network(
    path: str | Path, preset: ModelPreset | None = None, *, device: str | torch.device = "cpu"
) -> Loaded:
    """Read a network's weights. Strict: every tensor must be there, and no other.

    One prefix before all names is left out, such as DistributedDataParallel's ``module.``.

    Args:
        path: A state dict as PyTorch writes it, or safetensors.
        preset: What the network is; None takes what a converted file says of itself.
        device: Where the network goes.

    Returns:
        The network in eval mode, its parameters float32 and without gradients.

    Raises:
        InputError: There is no such file, or it is damaged or something else; the preset is missing, or is
            not that of the file.
    """
    file = _read(Path(path))
    state = file.tensors()
    preset = _agreed_preset(file, preset, state)
    _check_layout(file, preset)
    network = preset.build("meta")
    if wrong := next((name for name, tensor in state.items() if not tensor.is_floating_point()), None):
        raise InputError(f"{path}: {brief(wrong)} is of type {state[wrong].dtype}, expected floating point.")
    network.load_state_dict({name: _aligned(tensor.float()) for name, tensor in state.items()}, assign=True)
    network.to(device).eval().requires_grad_(False)
    return Loaded(
        network=network, preset=preset, digest=weights_digest(state), path=Path(path), prefix=file.prefix
    )


def save_network(
    state: Mapping[str, Tensor], preset: ModelPreset, path: str | Path, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write weights as safetensors with the preset in its metadata: :func:`load_network` needs no other.

    Args:
        state: The network's state dict.
        preset: What its weights do not say.
        path: The file to write; appears whole or not at all.
        dtype: Of the file's tensors; the network is loaded as float32 whatever it is.

    Raises:
        InputError: A weight is not finite, or beyond the range of ``dtype``.
        OutputError: The file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in state.items()}
    if wrong := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise InputError(
            f"{brief(wrong)} of {brief(preset.name)} is not finite in {dtype}; {path} is not written."
        )
    with replace_atomically(Path(path)) as partial:
        mode = partial.stat().st_mode
        safetensors.torch.save_file(tensors, partial, metadata={PRESET_KEY: preset.to_json()})
        partial.chmod(mode)  # safetensors lets nobody else read its files


def convert(
    path: str | Path, out: str | Path, preset: ModelPreset | None = None, *, half: bool = False
) -> Loaded:
    """Write the weights of ``path`` as safetensors that say what they are.

    Args:
        path: As for :func:`load_network`.
        out: The file to write.
        preset: As for :func:`load_network`.
        half: Write float16: half the size, weights rounded to 11 bits.

    Returns:
        What was written.

    Raises:
        InputError: As :func:`load_network` and :func:`save_network`.
        OutputError: The file cannot be written.
    """
    check_writable(Path(out), path)
    loaded = load_network(path, preset)
    dtype = torch.float16 if half else torch.float32
    try:
        save_network(loaded.network.state_dict(), loaded.preset, out, dtype=dtype)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return load_network(out) if half else loaded


def cached(preset: ModelPreset) -> Path:
    """Where :func:`fetch` puts a published checkpoint; it may not be there."""
    return cache_directory() / "checkpoints" / preset.file


def fetch(preset: ModelPreset, *, progress: Callable[[int, int], None] | None = None) -> Path:
    """Download a published checkpoint to :func:`cached`, where it is not there yet; resumes what broke off.

    No digest of these files was published: what arrives must have the published keys and shapes.

    Args:
        preset: One of ``MODELS``.
        progress: Called with (bytes so far, bytes in all).

    Raises:
        DownloadError: No address gave the file, or what came is not the checkpoint.
        OutputError: It cannot be written, or the disk has not the room.
    """

    def check(path: Path) -> None:
        _check_layout(_read(path), preset)

    # Four bytes a parameter, and little else.
    most = 5 * preset.parameters
    urls = published_urls(preset.file)
    return download(urls, cached(preset), max_bytes=most, check=check, progress=progress).path


def inspect(path: str | Path) -> Inspection:
    """Look into a file of weights.

    Raises:
        InputError: There is no such file, or it is damaged or no container of weights.
    """
    file = _read(Path(path))
    state = file.named
    shapes = _shapes(state)
    kind = _kind(shapes)
    fits = identify(shapes)
    nearest = file.preset
    if nearest is None:
        alike = {
            preset: _likeness(_expected(preset), shapes) for preset in MODELS.values() if preset.kind == kind
        }
        nearest = max(alike, key=alike.__getitem__) if alike else None
    elif nearest not in fits and _expected(nearest) == shapes:
        fits = [nearest, *fits]
    return Inspection(
        path=file.path,
        container=file.container,
        content=_content(file),
        problem=file.problem,
        prefix=file.prefix,
        kind=kind,
        tensors=len(state),
        parameters=sum(tensor.numel() for tensor in state.values()),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})),
        digest=weights_digest(state) if state else None,
        preset=file.preset,
        fits=tuple(fits),
        nearest=nearest,
        difference=_difference(_expected(nearest), shapes) if nearest else None,
    )


def _content(file: _File) -> Content:
    if _is_optimiser(file.content):
        return "optimiser state"
    if not file.named:
        return "no named tensors"
    if file.problem:
        return "tensors and other things"
    return "averaged network (EMA)" if file.path.name.startswith("ema") else "network"


def _kind(shapes: Shapes) -> Kind | None:
    """The ADM network that these are the tensors of, if any."""
    if FIRST_CONVOLUTION not in shapes:
        return None
    if not any(name.startswith("output_blocks.") for name in shapes):
        return "classifier"
    return "upsampler" if shapes[FIRST_CONVOLUTION][1] == 6 else "diffusion"


def _agreed_preset(file: _File, preset: ModelPreset | None, state: Mapping[str, Tensor]) -> ModelPreset:
    """The preset that was asked for, or that the file names; they may not contradict each other."""
    if preset is None and file.preset is None:
        raise InputError(
            f"{file.path} does not say what it is. {_which(identify(_shapes(state)))} Give the preset, or "
            "write it into the file once with `evalkit checkpoint convert`."
        )
    if preset is not None and file.preset not in (None, preset):
        raise InputError(
            f"{file.path} says that it is {brief(file.preset.name)}, but {preset.name} was asked for."
        )
    return preset or file.preset  # type: ignore[return-value]


def _check_layout(file: _File, preset: ModelPreset) -> None:
    """Raise an InputError unless the file has just the tensors of the preset's network."""
    shapes = _shapes(file.tensors())
    if difference := _difference(_expected(preset), shapes):
        raise InputError(
            f"{file.path} is no {brief(preset.name)}: of its tensors, {difference}. "
            f"{_which(identify(shapes))}"
        )


def _which(fits: Iterable[ModelPreset]) -> str:
    names = [preset.name for preset in fits]
    if not names:
        return "Its layout is that of no published checkpoint; `evalkit checkpoint inspect` says more."
    return f"Its layout is that of {' or '.join(names)}."


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@cache
def _expected(preset: ModelPreset) -> dict[str, tuple[int, ...]]:
    return _shapes(preset.build("meta").state_dict())


def _difference(expected: Shapes, found: Shapes) -> Difference:
    return Difference(
        missing=tuple(name for name in expected if name not in found),
        unexpected=tuple(name for name in found if name not in expected),
        reshaped=tuple(name for name in expected if name in found and found[name] != expected[name]),
    )


def _aligned(tensor: Tensor) -> Tensor:
    """Copied where a file's mapping does not start it as torch would: some kernels would round otherwise."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _likeness(expected: Shapes, found: Shapes) -> float:
    """Share of the tensors of either side that both have, 0 to 1."""
    common = len(expected.items() & found.items())
    return common / (len(expected) + len(found) - common)


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


def _read(path: Path) -> _File:
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
        return _File(path, "PyTorch", _read_pytorch(path), None)
    raise InputError(
        f"{path} is no file of weights, it is {kind_of(start)}. Expected a PyTorch state dict (.pt) or "
        "safetensors; a published checkpoint is had by `evalkit checkpoint fetch`."
    )


@contextmanager
def _utf8_name(path: Path) -> Iterator[str]:
    """A name of the file for readers that open no other; a file's own may be any bytes on Linux."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield os.fspath(path)


def _read_safetensors(path: Path) -> _File:
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
    return _File(path, "safetensors", content, preset)


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
    except Exception as error:  # damaged bytes end in any exception
        why = str(error).partition("\n")[0] or "it ends early"
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
