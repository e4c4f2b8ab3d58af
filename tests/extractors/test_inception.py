"""Our Inception network against TensorFlow, torch-fidelity and itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from inception_graphdef import build_graph, standin_head
from numpy.typing import NDArray
from optional import optional

from evalkit.errors import InputError
from evalkit.extractors.inception import Inception
from evalkit.extractors.inception_graph import InceptionGraph
from evalkit.extractors.inception_network import Network
from evalkit.extractors.preprocess import resize_tf1
from evalkit.extractors.weights import InceptionWeights, load_weights
from evalkit.verify import SIZES, pictures, state_dict


@pytest.fixture(scope="module")
def network(inception_weights: InceptionWeights) -> Inception:
    return Inception(inception_weights, device="cpu")


@pytest.fixture(scope="module")
def graph_file(inception_weights: InceptionWeights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    optional("tensorflow", "tensorflow")
    path = tmp_path_factory.mktemp("graph") / "graph.pb"
    return build_graph(path, inception_weights.convolutions, standin_head())


def noise(height: int, width: int, count: int = 2) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_features_are_tensorflows(network: Inception, graph_file: Path, height: int, width: int) -> None:
    with InceptionGraph(graph_file) as graph:
        for images in (pictures(height, width), noise(height, width)):
            ours, theirs = network(images), graph(images)
            for layer in ("pool", "spatial"):
                np.testing.assert_allclose(ours[layer], theirs[layer], rtol=0, atol=2e-4)


def test_float_images_are_not_quantised(network: Inception, graph_file: Path) -> None:
    images = np.float32(noise(32, 32)) * np.float32(0.97)
    with InceptionGraph(graph_file) as graph:
        theirs = graph(images)["pool"]
    np.testing.assert_allclose(network(images)["pool"], theirs, rtol=0, atol=2e-4)
    assert np.abs(network(np.uint8(images))["pool"] - theirs).max() > 1e-3


def test_logits_are_tensorflows(graph_file: Path) -> None:
    network = Inception(load_weights(graph_file), device="cpu")
    pool = network(pictures(32, 32, 3))["pool"]
    with InceptionGraph(graph_file) as graph:
        ours, theirs = network.derive("logits", pool), graph.derive("logits", pool)
    assert ours is not None
    assert theirs is not None
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours, pool.astype(np.float64) @ standin_head(), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("torchvision_stand_in")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_features_are_torch_fidelitys(
    network: Inception, inception_weights: InceptionWeights, tmp_path: Path
) -> None:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=ImportError)
    file = tmp_path / "weights.pth"
    torch.save(state_dict(inception_weights), file)
    theirs = module.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(file))
    for height, width in SIZES:
        images = np.concatenate([pictures(height, width), noise(height, width)])
        with torch.inference_mode():
            expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))[0].numpy()
        np.testing.assert_allclose(network(images)["pool"], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 8, 100, 298, 299, 300, 512])
def test_resize_is_tensorflows(size: int) -> None:
    tensorflow = optional("tensorflow", "tensorflow")
    images = noise(size, max(1, size // 2), 1).astype(np.float32)
    expected = tensorflow.compat.v1.image.resize_bilinear(images, (299, 299), align_corners=False).numpy()
    np.testing.assert_allclose(resize_tf1(torch.from_numpy(images), 299).numpy(), expected, rtol=0, atol=5e-5)


def test_resize_by_hand() -> None:
    image = torch.tensor([0.0, 100.0]).reshape(1, 1, 2, 1)
    row = resize_tf1(image, 4)[0, 0, :, 0]
    # Source positions 0, .5, 1, 1.5: no half-pixel centres, and the last neighbour clamped.
    assert row.tolist() == [0, 50, 100, 100]


@torch.inference_mode()
def test_fused_convolutions_give_the_same_bits_as_plain_ones(inception_weights: InceptionWeights) -> None:
    images = resize_tf1(torch.from_numpy(noise(40, 40, 2)).float(), 299)
    x = ((images - 128) / 128).permute(0, 3, 1, 2)
    fused, plain = (
        Network(inception_weights.convolutions, torch.device("cpu"), torch.float32, fused=choice)
        for choice in (None, False)
    )
    for values, expected in zip(fused(x), plain(x), strict=True):
        np.testing.assert_allclose(values.numpy(), expected.numpy(), rtol=0, atol=2e-5)


def test_batch_size_does_not_matter(network: Inception, inception_weights: InceptionWeights) -> None:
    images = noise(32, 32, 5)
    together = network(images)
    small = Inception(inception_weights, device="cpu", batch_size=2)(images)
    for layer, values in together.items():
        assert values.shape == (5, network.outputs[layer])
        assert values.dtype == np.float32
        np.testing.assert_allclose(small[layer], values, rtol=0, atol=2e-5)


def test_bfloat16_is_close_and_has_its_own_fingerprint(network: Inception) -> None:
    half = network.at_precision("bfloat16")
    assert half.fingerprint != network.fingerprint
    images = pictures(64, 64)
    exact, rounded = network(images)["pool"], half(images)["pool"]
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.05


def test_fingerprint_depends_on_weights_and_not_on_the_head(
    network: Inception, graph_file: Path, inception_weights: InceptionWeights
) -> None:
    assert Inception(load_weights(graph_file), device="cpu").fingerprint == network.fingerprint
    with InceptionGraph(graph_file) as graph:
        assert graph.fingerprint != network.fingerprint


def test_out_of_memory_halves_the_batch(
    inception_weights: InceptionWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Inception(inception_weights, device="cpu", batch_size=4)
    forward = network._forward

    def short_of_memory(images: NDArray[np.uint8]) -> tuple[torch.Tensor, torch.Tensor]:
        if len(images) > 2:
            raise torch.OutOfMemoryError("simulated")
        return forward(images)

    monkeypatch.setattr(network, "_forward", short_of_memory)
    with pytest.warns(UserWarning, match="continuing with 2 images per batch"):
        assert network(noise(16, 16, 5))["pool"].shape == (5, 2048)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "Unknown precision 'int8'.*float32"),
        ({"precision": "tf32"}, "tf32 needs a CUDA device, and this is cpu"),
        ({"batch_size": 0}, "Batch size 0"),
        ({"device": "warp"}, "Unknown device 'warp'"),
        ({"device": "xla"}, "not supported"),
    ],
)
def test_bad_options(inception_weights: InceptionWeights, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Inception(inception_weights, **{"device": "cpu"} | options)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_features_are_the_cpus(inception_weights: InceptionWeights) -> None:
    images = np.concatenate([pictures(64, 64), noise(64, 64)])
    expected = Inception(inception_weights, device="cpu")(images)
    for layer, values in Inception(inception_weights, device="cuda")(images).items():
        np.testing.assert_allclose(values, expected[layer], rtol=0, atol=2e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
def test_cuda_runs_ahead(inception_weights: InceptionWeights, precision: str) -> None:
    network = Inception(inception_weights, device="cuda", precision=precision, batch_size=4)
    images = [np.roll(pictures(64, 64, 6), shift, axis=2) for shift in range(8)]
    pending = [network.submit(batch) for batch in images]
    for batch, later in zip(images, pending, strict=True):
        for output, values in later.result().items():
            np.testing.assert_array_equal(values, network(batch)[output])


def test_a_cpu_does_not_run_ahead(network: Inception) -> None:
    pending = network.submit(pictures(16, 16))
    assert pending.done()
    np.testing.assert_array_equal(pending.result()["pool"], network(pictures(16, 16))["pool"])


def test_what_cuda_is_asked_for(inception_weights: InceptionWeights) -> None:
    """On a stand-in for a GPU that counts: what a batch launches, and that the host waits only at its end."""
    counting = pytest.importorskip("counting", reason="needs the stand-in for a GPU that counts")
    pytest.importorskip("fakeconv", reason="needs the stand-in for a GPU that counts")
    images = pictures(64, 64, 2)
    for precision in ("float32", "bfloat16"):
        network = Inception(inception_weights, device="cuda", precision=precision)
        network(images)
        with counting.Delta() as beginning:
            pending = network.submit(images)
        with counting.Delta() as ending:
            pending.result()
        assert beginning["launch"] <= 105  # besides 75 convolutions
        assert (beginning["h2d"], beginning["d2h"]) == (1, 2)
        assert not {"sync", "evsync"} & set(beginning)
        assert ending == {"evsync": 1}
