"""Inception features computed by TensorFlow, as in the reference evaluator.

This runs ``classify_image_graph_def.pb`` as guided-diffusion's ``evaluations/evaluator.py`` does: images
enter at ``ExpandDims:0``, and the graph does everything from the resize on. Needs the optional package
TensorFlow (``pip install evalkit[tensorflow]``), which is imported when an ``InceptionGraph`` is made.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError, MissingDependencyError, UndefinedMetricError, WeightsError
from evalkit.extractors.inception import HEAD_MISSING, weights_record
from evalkit.extractors.sharing import kept
from evalkit.extractors.weights import load_weights

__all__ = ["InceptionGraph"]

_SPATIAL_CHANNELS = 7
# Part of the fingerprint: how images are prepared for the network.
_PREPROCESSING = "resize and scale by the graph"
# The operations of the published graph, and Placeholder. No others are run: some of TensorFlow's write files.
# fmt: off
_OPERATIONS = frozenset({
    "AvgPool", "BatchNormWithGlobalNormalization", "BiasAdd", "Cast", "CheckNumerics", "Concat",
    "Const", "Conv2D", "DecodeJpeg", "ExpandDims", "Identity", "MatMul", "MaxPool", "Mul",
    "Placeholder", "Relu", "Reshape", "ResizeBilinear", "Softmax", "Sub",
})
# fmt: on


class InceptionGraph:
    """Extractor that runs the frozen TensorFlow graph of the 2015-12-05 Inception network.

    Use it as a context manager, or call ``close``, to free TensorFlow's session.

    Attributes:
        name: Name of the extractor.
        backend: ``"tensorflow"``.
        network: ``"inception"``.
        preprocess: What the graph does to the images.
        outputs: Width of each output; ``derived``: the class scores, from ``pool``.
        batch_size: Images a run of the graph.
        fingerprint: Digest of the weights and of how images reach them. Equal fingerprints mean features that
            may be compared.
        device: ``"cpu"``, or the name TensorFlow gives its first GPU, for example ``"GPU:0"``.
        precision: ``"float32"``; TensorFloat-32 is switched off for the process.
        weights: The weights in the graph, from ``load_weights``.
    """

    name: ClassVar[str] = "inception-2015-12-05 (TensorFlow graph)"
    backend: ClassVar[str] = "tensorflow"
    precision: ClassVar[str] = "float32"
    network: ClassVar[str] = "inception"
    preprocess: ClassVar[str] = _PREPROCESSING
    outputs: ClassVar[Mapping[str, int]] = {"pool": 2048, "spatial": 17 * 17 * _SPATIAL_CHANNELS}
    derived: ClassVar[Mapping[str, str]] = {"logits": "pool"}

    def __init__(self, graph: str | Path, *, batch_size: int = 64, allow_other: bool = False) -> None:
        """Read and import the graph.

        Args:
            graph: Path of the frozen graph, ``classify_image_graph_def.pb``.
            batch_size: Images per run of the graph; the reference evaluator's is 64.
            allow_other: Accept a graph whose convolutions are not the published ones.

        Raises:
            InputError: The batch size is below 1.
            MissingDependencyError: TensorFlow is not installed.
            WeightsError: The file is not such a graph, or not the published one.
        """
        if batch_size < 1:
            raise InputError(f"Batch size {batch_size} is below 1.")
        tensorflow = _import_tensorflow()
        self.weights = load_weights(graph, allow_other=allow_other)
        if self.weights.container != "TensorFlow graph":
            raise WeightsError(
                f"{graph} is a {self.weights.container}, expected the frozen TensorFlow graph "
                "classify_image_graph_def.pb. Give that file, or use the PyTorch backend, which reads either."
            )
        parts = (self.name, self.backend, self.weights.digest, _PREPROCESSING, self.precision)
        self.fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        self.batch_size = batch_size
        with _quiet():
            self._session, self._images, self._outputs, self._head = _open(tensorflow, self.weights.source)
        gpus = [device.name for device in self._session.list_devices() if device.device_type == "GPU"]
        self.device = gpus[0].partition("device:")[2] if gpus else "cpu"

    def __reduce__(self) -> tuple[Any, ...]:
        path = str(Path(self.weights.source).absolute())
        return _reopen, (type(self), path, self.batch_size, self.fingerprint)

    @property
    def weights_record(self) -> dict[str, Any]:
        """Source and digests of the weights."""
        return weights_record(self.weights)

    def __call__(self, images: NDArray[np.uint8] | NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Extract features.

        Args:
            images: (n, h, w, 3) uint8, or float32 in [0, 255]; any height and width.

        Returns:
            ``"pool"``, (n, 2048) float32 from ``pool_3:0``, and ``"spatial"``, (n, 2023) float32, the first 7
            channels of ``mixed_6/conv:0`` flattened as height, width, channel.

        Raises:
            InputError: The array has another shape or type.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype not in (np.uint8, np.float32):
            raise InputError(
                f"The images are an array of shape {images.shape} and type {images.dtype}, expected "
                "(n, h, w, 3) uint8, or float32 in [0, 255]. Convert them to RGB with the channels last."
            )
        features = {layer: np.empty((len(images), d), np.float32) for layer, d in self.outputs.items()}
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            pool, spatial = self._session.run(self._outputs, {self._images: batch.astype(np.float32)})
            rows = slice(start, start + len(batch))
            features["pool"][rows] = pool.reshape(len(batch), -1)
            features["spatial"][rows] = spatial[..., :_SPATIAL_CHANNELS].reshape(len(batch), -1)
        return features

    def derive(self, output: str, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """``logits``: class scores ``pool @ W`` of the Inception Score, without bias.

        Args:
            output: ``"logits"``.
            rows: (n, 2048) float32 ``pool``.

        Returns:
            (n, 1008) float32.

        Raises:
            UndefinedMetricError: The graph has no classifier head.
        """
        del output
        if self._head is None:
            raise UndefinedMetricError(HEAD_MISSING)
        inputs, product = self._head
        scores: NDArray[np.float32] = self._session.run(product, {inputs: rows})
        return scores

    def close(self) -> None:
        """Free the session. The extractor cannot be used afterwards."""
        self._session.close()

    def __enter__(self) -> InceptionGraph:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _reopen(cls: type[InceptionGraph], path: str, batch_size: int, fingerprint: str) -> InceptionGraph:
    """The graph in this process: what unpickling does.

    Raises:
        WeightsError: The file is not there, or is another.
    """

    def make() -> InceptionGraph:
        made = cls(path, batch_size=batch_size, allow_other=True)
        if made.fingerprint != fingerprint:
            raise WeightsError(f"{path} holds other weights here than for the process that gives the work.")
        return made

    try:
        return kept((cls, path, fingerprint, batch_size), make)
    except WeightsError as error:
        raise WeightsError(
            f"{error} All workers must see the same file {path}: put it where they all find it."
        ) from error


def _open(tensorflow: Any, path: str) -> tuple[Any, Any, Any, tuple[Any, Any] | None]:
    """Import the graph. Returns the session, the images' placeholder, (pool, spatial) and the head.

    The head is a placeholder for pool features and the scores; None if the graph has none.
    """
    v1 = tensorflow.compat.v1
    try:
        definition = v1.GraphDef.FromString(Path(path).read_bytes())
        if strange := {node.op for node in definition.node} - _OPERATIONS:
            raise ValueError(f"it has operations that are not in that graph: {', '.join(sorted(strange))}")
        graph = tensorflow.Graph()
        with graph.as_default():
            images = v1.placeholder(tensorflow.float32, [None, None, None, 3])
            outputs = v1.import_graph_def(
                definition,
                input_map={"ExpandDims:0": images},
                return_elements=["pool_3:0", "mixed_6/conv:0"],
                name="inception",
            )
    except Exception as error:  # TensorFlow raises many kinds
        raise WeightsError(
            f"{path} has the weights of the Inception network but is not the published graph: {error}. "
            "Expected classify_image_graph_def.pb, with its nodes ExpandDims, pool_3 and mixed_6/conv."
        ) from error
    head = None
    with graph.as_default(), contextlib.suppress(KeyError):
        matrix = graph.get_operation_by_name("inception/softmax/logits/MatMul").inputs[1]
        pool = v1.placeholder(tensorflow.float32, [None, 2048])
        head = (pool, tensorflow.matmul(pool, matrix))
    options = v1.ConfigProto(gpu_options=v1.GPUOptions(allow_growth=True))
    return v1.Session(graph=graph, config=options), images, outputs, head


def _import_tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with _quiet():
            import tensorflow
    except ImportError as error:
        raise MissingDependencyError(
            f"The TensorFlow backend needs the package tensorflow, which cannot be imported ({error}). "
            "Run `pip install evalkit[tensorflow]`, or use the PyTorch backend."
        ) from error
    tensorflow.config.experimental.enable_tensor_float_32_execution(False)
    return tensorflow


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what native code writes to standard error: TensorFlow prints there at any log level."""
    try:
        kept = os.dup(2)
    except OSError:  # standard error is closed, so there is nothing to hide
        yield
        return
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
