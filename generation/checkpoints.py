"""Networks from files of weights: strict loading, saving as safetensors, and which model a file holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias

import safetensors.torch
import torch
from torch import Tensor

from evalkit.errors import InputError, brief
from evalkit.system.files import check_writable, replace_atomically, tensor_digest
from generation.networks.unet import Trunk
from generation.presets import MODELS, Kind, ModelPreset
from generation.state_dicts import FIRST_CONVOLUTION, PRESET_KEY, Content, StateDictFile, read_state_dict

__all__ = [
    "Difference",
    "Inspection",
    "Loaded",
    "check_layout",
    "convert",
    "identify",
    "inspect",
    "load_network",
    "network_of",
    "save_network",
    "weights_digest",
]

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A network and where it came from.

    Attributes:
        network: The network in eval mode, its parameters without gradients.
        preset: Everything about it that its weights do not show.
        digest: :func:`weights_digest` of its parameters.
        path: The file.
        prefix: What preceded every name in it and was left out; see :class:`Inspection`.
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
        content: What it seems to hold.
        problem: Why :func:`load_network` would refuse it, whatever the preset; None where it may not.
        prefix: What precedes every name of an ADM network, such as ``module.`` of DistributedDataParallel;
            not part of the names below.
        kind: Kind of ADM network, by its keys; None for anything else.
        tensors: Number of named tensors.
        parameters: Number of their elements.
        dtypes: Their types.
        digest: :func:`weights_digest`; None where there are no named tensors.
        preset: The preset in its metadata; None without one.
        fits: ``preset`` and published checkpoints that have exactly these keys and shapes.
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


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Digest of weights, independent of the file and floating-point type they came in."""
    return tensor_digest({name: tensor.detach().cpu().float().numpy() for name, tensor in state.items()})


def identify(shapes: Shapes) -> list[ModelPreset]:
    """The published checkpoints with these keys and shapes.

    Several may share one layout: something else, such as the file's name, must decide between them.
    """
    return [preset for preset in MODELS.values() if _expected(preset) == dict(shapes)]


def load_network(
    path: str | Path, preset: ModelPreset | None = None, *, device: str | torch.device = "cpu"
) -> Loaded:
    """Read a network's weights. Strict: every tensor must be present, and no other.

    One prefix before all names is left out, such as DistributedDataParallel's ``module.``.

    Args:
        path: A state dict as PyTorch writes it, or safetensors.
        preset: Which network it is; None: the one in the metadata of a converted file.
        device: The device to put the network on.

    Returns:
        The network in eval mode, its parameters float32 and without gradients.

    Raises:
        InputError: There is no such file, or it is damaged or holds something else; the preset is missing,
            or is not that of the file.
    """
    file = read_state_dict(Path(path))
    state = file.tensors()
    preset = _agreed_preset(file, preset, state)
    check_layout(file, preset)
    if wrong := next((name for name, tensor in state.items() if not tensor.is_floating_point()), None):
        raise InputError(f"{path}: {brief(wrong)} is of type {state[wrong].dtype}, expected floating point.")
    return Loaded(
        network=network_of(state, preset, device),
        preset=preset,
        digest=weights_digest(state),
        path=Path(path),
        prefix=file.prefix,
    )


def network_of(state: Mapping[str, Tensor], preset: ModelPreset, device: str | torch.device) -> Trunk:
    """The network with these weights, in eval mode, its parameters float32 and without gradients."""
    network = preset.build("meta")
    network.load_state_dict({name: _aligned(tensor.float()) for name, tensor in state.items()}, assign=True)
    return network.to(device).eval().requires_grad_(False)


def save_network(
    state: Mapping[str, Tensor], preset: ModelPreset, path: str | Path, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write weights as safetensors with the preset in the metadata, so that they load without one.

    Args:
        state: The network's state dict.
        preset: Everything about it that its weights do not show.
        path: The file to write; appears whole or not at all.
        dtype: Type of the file's tensors; the network is always loaded as float32.

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
        partial.chmod(mode)  # safetensors makes files that only their owner can read


def convert(
    path: str | Path, out: str | Path, preset: ModelPreset | None = None, *, half: bool = False
) -> Loaded:
    """Write the weights of ``path`` as safetensors, with the preset in the metadata.

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


def inspect(path: str | Path) -> Inspection:
    """Look into a file of weights.

    Raises:
        InputError: There is no such file, or it is damaged or no container of weights.
    """
    file = read_state_dict(Path(path))
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
        content=file.kind_of_content,
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


def _kind(shapes: Shapes) -> Kind | None:
    """The kind of ADM network that has tensors of these names, if any."""
    if FIRST_CONVOLUTION not in shapes:
        return None
    if not any(name.startswith("output_blocks.") for name in shapes):
        return "classifier"
    return "upsampler" if shapes[FIRST_CONVOLUTION][1] == 6 else "diffusion"


def _agreed_preset(
    file: StateDictFile, preset: ModelPreset | None, state: Mapping[str, Tensor]
) -> ModelPreset:
    """The preset that was requested or that the file names; an InputError if they contradict each other."""
    if preset is None and file.preset is None:
        raise InputError(
            f"{file.path} does not say what it is. {_which(identify(_shapes(state)))} Give the preset, or "
            "write it into the file once with `evalkit checkpoint convert`."
        )
    if preset is not None and file.preset not in (None, preset):
        raise InputError(
            f"{file.path} says that it is {brief(file.preset.name)}, but {preset.name} was requested."
        )
    return preset or file.preset  # type: ignore[return-value]


def check_layout(file: StateDictFile, preset: ModelPreset) -> None:
    """Raise an InputError unless the file has exactly the tensors of the preset's network."""
    shapes = _shapes(file.tensors())
    if difference := _difference(_expected(preset), shapes):
        raise InputError(
            f"{file.path} is no {brief(preset.name)}: of its tensors, {difference}. "
            f"{_which(identify(shapes))}"
        )


def _which(fits: Iterable[ModelPreset]) -> str:
    names = [preset.name for preset in fits]
    if not names:
        return "Its layout is that of no published checkpoint; `evalkit checkpoint inspect` shows more."
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
    """A copy where the file's mapping is not aligned as torch's memory is: some kernels round differently."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _likeness(expected: Shapes, found: Shapes) -> float:
    """Tensors that both have, as a share of those that either has, 0 to 1."""
    common = len(expected.items() & found.items())
    return common / (len(expected) + len(found) - common)
