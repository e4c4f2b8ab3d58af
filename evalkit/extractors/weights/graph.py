"""Reads the weights out of a frozen TensorFlow graph with the package protobuf alone, without TensorFlow.

The file is a protocol buffer, ``GraphDef``. It is parsed as data: no operation of the graph is run, and the
values of the nodes that hold no weights are not looked at.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import MissingDependencyError
from evalkit.extractors.weights.layout import GRAPH_NAMES, check_shape

__all__ = ["read_graph"]

# The published graph has 95,673,916 bytes and about 1,000 nodes, of at most 8 MB each. Anything larger is
# refused before it is parsed: parsing a hostile file can take many times its size.
_MAX_BYTES = 128 * 1024**2
_MAX_NODES = 10_000
_MAX_NODE_BYTES = 16 * 1024**2

_DT_FLOAT = 1

# The fields that lead to a constant's value, out of graph.proto, node_def.proto, attr_value.proto,
# tensor.proto and tensor_shape.proto in tensorflow/core/framework; all others are skipped. For each message:
# name, number and type of its fields; "*" marks a repeated one. Nodes stay bytes, to be parsed one by one.
_SCHEMA = {
    "GraphDef": (("node", 1, "bytes*"),),
    "NodeDef": (("name", 1, "bytes"), ("attr", 5, "Attr*")),
    "Attr": (("key", 1, "bytes"), ("value", 2, "AttrValue")),
    "AttrValue": (("tensor", 8, "TensorProto"),),
    "TensorProto": (
        ("dtype", 1, "int32"),
        ("tensor_shape", 2, "TensorShapeProto"),
        ("tensor_content", 4, "bytes"),
        ("float_val", 5, "float*"),
    ),
    "TensorShapeProto": (("dim", 2, "Dim*"),),
    "Dim": (("size", 1, "int64"),),
}


def read_graph(file: Path) -> dict[str, NDArray[np.float32]]:
    """Read the constants that the network needs.

    Args:
        file: A frozen graph such as ``classify_image_graph_def.pb``.

    Returns:
        Arrays by PyTorch name and in PyTorch's layout; those that the graph lacks are missing.

    Raises:
        ValueError: The file is too large, is no such graph, or a tensor has another type or shape.
        MissingDependencyError: The package protobuf is not installed.
        OSError: The file cannot be read.
    """
    if (size := file.stat().st_size) > _MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes, expected about 96 million")
    message, parse_error = _messages()
    wanted = {node.encode(): name for name, node in GRAPH_NAMES.items()}
    tensors: dict[str, NDArray[np.float32]] = {}
    try:
        nodes = message["GraphDef"].FromString(file.read_bytes()).node
        if len(nodes) > _MAX_NODES:
            raise ValueError(f"it has {len(nodes):,} nodes, expected about 1,000")
        for content in nodes:
            if len(content) > _MAX_NODE_BYTES:
                raise ValueError(f"a node has {len(content):,} bytes, expected at most 8 million")
            node = message["NodeDef"].FromString(content)
            if (name := wanted.get(node.name)) is not None:
                tensors[name] = _value(name, node)
    except parse_error as error:
        raise ValueError(str(error)) from error
    return tensors


def _value(name: str, node: Any) -> NDArray[np.float32]:
    """Value of a Const node in PyTorch's layout: filters HWIO to OIHW, the head transposed."""
    attribute = next((attribute for attribute in node.attr if attribute.key == b"value"), None)
    if attribute is None:
        raise ValueError(f"{name} has no value")
    tensor = attribute.value.tensor
    if tensor.dtype != _DT_FLOAT:
        raise ValueError(f"{name} has TensorFlow data type {tensor.dtype}, expected {_DT_FLOAT} (float32)")
    shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), tuple(range(len(shape))))
    check_shape(name, [shape[axis] for axis in axes])
    if tensor.tensor_content:
        values = np.frombuffer(tensor.tensor_content, "<f4")
    else:
        values = np.fromiter(tensor.float_val, np.float32, len(tensor.float_val))
    if len(values) == 1:  # TensorFlow writes equal values once
        values = np.repeat(values, math.prod(shape))
    return np.array(values.reshape(shape).transpose(axes), dtype=np.float32, order="C")


def _messages() -> tuple[dict[str, Any], type[Exception]]:
    """Classes of the messages of ``_SCHEMA`` by name, and the error that they raise."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
    except ImportError as error:
        raise MissingDependencyError(
            f"Reading weights from a TensorFlow graph needs the package protobuf ({error}). Run "
            "`pip install 'evalkit[graph]'`, or get the published state dict with `evalkit weights --fetch`."
        ) from error
    package, kinds = "evalkit.graph", descriptor_pb2.FieldDescriptorProto
    described = descriptor_pb2.FileDescriptorProto(name="graph.proto", package=package, syntax="proto2")
    for name, fields in _SCHEMA.items():
        entry = described.message_type.add(name=name)
        for field, number, kind in fields:
            label = kinds.LABEL_REPEATED if kind.endswith("*") else kinds.LABEL_OPTIONAL
            kind = kind.removesuffix("*")
            if kind in _SCHEMA:
                of: dict[str, Any] = {"type": kinds.TYPE_MESSAGE, "type_name": f".{package}.{kind}"}
            else:
                of = {"type": kinds.Type.Value(f"TYPE_{kind.upper()}")}
            entry.field.add(name=field, number=number, label=label, **of)
    pool = descriptor_pool.DescriptorPool()  # of its own, beside TensorFlow's messages
    pool.AddSerializedFile(described.SerializeToString())
    find = pool.FindMessageTypeByName
    classes = {name: message_factory.GetMessageClass(find(f"{package}.{name}")) for name in _SCHEMA}
    return classes, message.DecodeError
