"""Builds a frozen TensorFlow graph with the nodes of classify_image_graph_def.pb, as an oracle for the tests.

The layers, strides and paddings are written here for themselves; only the names of the convolutions come from
evalkit. So the graph checks evalkit's PyTorch network, and not the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.extractors.weights import CONVOLUTIONS

__all__ = ["build_graph", "standin_head"]

_NAMES = {convolution.scope: convolution.name for convolution in CONVOLUTIONS}


def standin_head() -> NDArray[np.float32]:
    """The (2048, 1008) head of the golden values; the genuine one is in no package."""
    return np.random.RandomState(0).randn(2048, 1008).astype(np.float32) * np.float32(0.15)


def build_graph(
    path: Path, convolutions: Mapping[str, NDArray[np.float32]], head: NDArray[np.float32] | None
) -> Path:
    """Write the frozen graph to `path`.

    Args:
        path: The file to write.
        convolutions: As in ``InceptionWeights.convolutions``.
        head: (2048, 1008) float32; None leaves the classifier out.
    """
    graph = _Graph(convolutions)
    x = graph.preprocess()
    x = graph.conv(x, "conv", stride=2, padding="VALID")
    x = graph.conv(x, "conv_1", padding="VALID")
    x = graph.conv(x, "conv_2")
    x = graph.pool(x, "pool", "MaxPool", stride=2, padding="VALID")
    x = graph.conv(x, "conv_3", padding="VALID")
    x = graph.conv(x, "conv_4", padding="VALID")
    x = graph.pool(x, "pool_1", "MaxPool", stride=2, padding="VALID")
    for block in ("mixed", "mixed_1", "mixed_2"):
        x = graph.block(x, block, tower=2, tower_1=3)
    x = graph.reduction(x, "mixed_3", conv=1, tower=3)
    for block in ("mixed_4", "mixed_5", "mixed_6", "mixed_7"):
        x = graph.block(x, block, tower=3, tower_1=5)
    x = graph.reduction(x, "mixed_8", tower=2, tower_1=4)
    x = graph.block(x, "mixed_9", tower=1, tower_1=2, split=True)
    x = graph.block(x, "mixed_10", tower=1, tower_1=2, split=True, pool="MaxPool")
    x = graph.pool(x, "pool_3", "AvgPool", size=8, padding="VALID")
    if head is not None:
        graph.classify(x, head)
    path.write_bytes(graph.definition.SerializeToString())
    return path


class _Graph:
    def __init__(self, convolutions: Mapping[str, NDArray[np.float32]]) -> None:
        import tensorflow as tf

        self.tf = tf
        self.convolutions = convolutions
        self.definition = tf.compat.v1.GraphDef()
        self.definition.versions.producer = 8  # the last one with BatchNormWithGlobalNormalization

    def node(self, op: str, name: str, inputs: list[str], **attributes: Any) -> str:
        node = self.definition.node.add(name=name, op=op, input=inputs)
        for key, value in attributes.items():
            attribute = node.attr[key]
            if isinstance(value, bool):
                attribute.b = value
            elif isinstance(value, float):
                attribute.f = value
            elif isinstance(value, int):
                attribute.i = value
            elif isinstance(value, str):
                attribute.s = value.encode()
            elif isinstance(value, list):
                attribute.list.i.extend(value)
            elif isinstance(value, np.ndarray):
                attribute.tensor.CopyFrom(self.tf.make_tensor_proto(value))
            else:
                attribute.type = value.as_datatype_enum
        return name

    def const(self, name: str, value: NDArray[Any]) -> str:
        return self.node("Const", name, [], dtype=self.tf.as_dtype(value.dtype), value=value)

    def preprocess(self) -> str:
        float32 = self.tf.float32
        x = self.node("Placeholder", "ExpandDims", [], dtype=float32)
        size = self.const("ResizeBilinear/size", np.array([299, 299], np.int32))
        x = self.node("ResizeBilinear", "ResizeBilinear", [x, size], T=float32, align_corners=False)
        x = self.node("Sub", "Sub", [x, self.const("Sub/y", np.array(128, np.float32))], T=float32)
        return self.node("Mul", "Mul", [x, self.const("Mul/y", np.array(0.0078125, np.float32))], T=float32)

    def conv(self, x: str, scope: str, stride: int = 1, padding: str = "SAME") -> str:
        name, float32 = _NAMES[scope], self.tf.float32
        weight = self.convolutions[f"{name}.conv.weight"].transpose(2, 3, 1, 0)
        weight = self.const(f"{scope}/conv2d_params", np.ascontiguousarray(weight))
        x = self.node(
            "Conv2D",
            f"{scope}/Conv2D",
            [x, weight],
            T=float32,
            strides=[1, stride, stride, 1],
            padding=padding,
        )
        mean = self.const(f"{scope}/batchnorm/moving_mean", self.convolutions[f"{name}.bn.running_mean"])
        variance = self.const(
            f"{scope}/batchnorm/moving_variance", self.convolutions[f"{name}.bn.running_var"]
        )
        beta = self.const(f"{scope}/batchnorm/beta", self.convolutions[f"{name}.bn.bias"])
        gamma = self.const(f"{scope}/batchnorm/gamma", np.ones_like(self.convolutions[f"{name}.bn.bias"]))
        x = self.node(
            "BatchNormWithGlobalNormalization",
            f"{scope}/batchnorm",
            [x, mean, variance, beta, gamma],
            T=float32,
            variance_epsilon=0.001,
            scale_after_normalization=False,
        )
        return self.node("Relu", scope, [x], T=float32)

    def pool(self, x: str, name: str, op: str, size: int = 3, stride: int = 1, padding: str = "SAME") -> str:
        ksize, strides = [1, size, size, 1], [1, stride, stride, 1]
        return self.node(op, name, [x], T=self.tf.float32, ksize=ksize, strides=strides, padding=padding)

    def concat(self, name: str, inputs: list[str]) -> str:
        axis = self.const(f"{name}/concat_dim", np.array(3, np.int32))
        return self.node("Concat", name, [axis, *inputs], T=self.tf.float32, N=len(inputs))

    def tower(self, x: str, scope: str, length: int, last: dict[str, Any] | None = None) -> str:
        for index in range(length):
            options = last if last is not None and index == length - 1 else {}
            x = self.conv(x, f"{scope}/conv_{index}" if index else f"{scope}/conv", **options)
        return x

    def block(
        self, x: str, scope: str, *, tower: int, tower_1: int, split: bool = False, pool: str = "AvgPool"
    ) -> str:
        branches = [self.conv(x, f"{scope}/conv")]
        for name, length in (("tower", tower), ("tower_1", tower_1)):
            end = self.tower(x, f"{scope}/{name}", length)
            if split:
                mixed = f"{scope}/{name}/mixed"
                branches += [self.conv(end, f"{mixed}/conv"), self.conv(end, f"{mixed}/conv_1")]
            else:
                branches.append(end)
        pooled = self.pool(x, f"{scope}/tower_2/pool", pool)
        branches.append(self.conv(pooled, f"{scope}/tower_2/conv"))
        return self.concat(f"{scope}/join", branches)

    def reduction(self, x: str, scope: str, *, conv: int = 0, **towers: int) -> str:
        last = {"stride": 2, "padding": "VALID"}
        branches = [self.tower(x, scope, conv, last)] if conv else []
        branches += [self.tower(x, f"{scope}/{name}", length, last) for name, length in towers.items()]
        branches.append(self.pool(x, f"{scope}/pool", "MaxPool", stride=2, padding="VALID"))
        return self.concat(f"{scope}/join", branches)

    def classify(self, x: str, head: NDArray[np.float32]) -> str:
        float32 = self.tf.float32
        shape = self.const("pool_3/_reshape/shape", np.array([-1, 2048], np.int32))
        x = self.node("Reshape", "pool_3/_reshape", [x, shape], T=float32, Tshape=self.tf.int32)
        weights = self.const("softmax/weights", head)
        x = self.node("MatMul", "softmax/logits/MatMul", [x, weights], T=float32)
        biases = self.const("softmax/biases", np.zeros(head.shape[1], np.float32))
        x = self.node("BiasAdd", "softmax/logits", [x, biases], T=float32)
        return self.node("Softmax", "softmax", [x], T=float32)
