"""Evaluator: images given batch by batch, in one process and in two, have the scores of compare()."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_transformers import shrink
from stand_ins import NO_STORE, STATISTICS_OF_PIXELS, InceptionPixels, stand_in

from evalkit import Comparison, Evaluator, compare, features_of, open_images
from evalkit.errors import FeatureError, InputError, UndefinedMetricError
from evalkit.extractors.base import Rows
from evalkit.extractors.dinov2 import DINOv2ViTB14
from evalkit.extractors.inception import Inception
from evalkit.extractors.inception_network import _has_fused_convolution
from evalkit.extractors.weights import InceptionWeights
from evalkit.features import extraction, store
from evalkit.images.given import Intake
from evalkit.metrics.screening import fast_dtype
from evalkit.system.engine import Done, Pending

ROOT = Path(__file__).parent.parent
SUPPORT = Path(__file__).parent / "support"


class ByPass(InceptionPixels):
    """Features depend on how many images go through the network at once, more than on any real GPU."""

    batch_size = 4

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        found = super().__call__(images)
        return {key: rows * np.float32(1 + len(images) / 100) for key, rows in found.items()}


class OnDevice(ByPass):
    """Accepts tensors on its device, as on a GPU; here the device is the CPU."""

    tensor_device = torch.device("cpu")

    def submit(self, images: NDArray[Any]) -> Pending[Mapping[str, Rows]]:
        return Done(ByPass.__call__(self, images))

    def submit_tensor(self, images: torch.Tensor) -> Pending[Mapping[str, Rows]]:
        assert isinstance(images, torch.Tensor)
        return Done(ByPass.__call__(self, images.numpy().copy()))


class CallChanged(OnDevice):
    """Inherits methods that no longer match its call."""

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        assert isinstance(images, np.ndarray)
        return {key: 2 * rows for key, rows in super().__call__(images).items()}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shards and groups of few images."""
    monkeypatch.setattr(store, "SHARD", 8)
    monkeypatch.setattr(extraction, "GROUP", 3)


@pytest.fixture
def sides(images: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """60 and 57 images: more than there are features, so that sums alone are kept of them."""
    return images, images[:57, ::-1].copy()


def given(evaluator: Evaluator, images: NDArray[Any], sizes: tuple[int, ...]) -> Evaluator:
    begin = 0
    while begin < len(images):
        for size in sizes:
            evaluator.update(images[begin : begin + size])
            begin += size
    return evaluator


def same(found: Comparison, expected: Comparison) -> None:
    """To the bit, error bars and their reasons included."""
    assert found.scores == expected.scores
    assert found.scores
    assert found.missing == expected.missing
    named = [text.replace("<batches>", "<array>") for text in found.warnings]
    assert named == [*expected.warnings]
    of_array = replace(found.samples, name="<array>", source="<array>", digest=expected.samples.digest)
    assert of_array == expected.samples
    assert replace(found, scores=()) != found


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("sizes", [(57,), (1,), (5, 2, 13)])
@pytest.mark.parametrize("metrics", [None, ["fid", "sfid"], ["fid", "kid"]])
@pytest.mark.parametrize("network", [ByPass, OnDevice, CallChanged])
def test_scores_of_compare(
    sides: tuple[NDArray[np.uint8], NDArray[np.uint8]],
    sizes: tuple[int, ...],
    metrics: list[str] | None,
    network: type[ByPass],
) -> None:
    arguments: Mapping[str, Any] = {"metrics": metrics, "extractor": network(), "run": NO_STORE}
    evaluator = given(Evaluator(sides[0], **arguments), sides[1], sizes)
    same(evaluator.compute(), compare(*sides, **arguments))
    # To compute changes nothing, and more may follow.
    evaluator.update(sides[0][:6])
    expected = compare(sides[0], np.concatenate([sides[1], sides[0][:6]]), **arguments)
    same(evaluator.compute(), expected)
    same(evaluator.compute(), expected)
    evaluator.reset()
    same(given(evaluator, sides[1], (9,)).compute(), compare(*sides, **arguments))


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("count", [20, 48, 49])
def test_few_images(sides: tuple[NDArray[np.uint8], NDArray[np.uint8]], count: int) -> None:
    """With covariances that are singular on both sides, compare() keeps the features of FID, too."""
    reference, samples = sides[0][:20], sides[1][:count]
    arguments: Mapping[str, Any] = {"metrics": ["fid"], "extractor": ByPass(), "run": NO_STORE}
    same(
        given(Evaluator(reference, **arguments), samples, (3,)).compute(),
        compare(reference, samples, **arguments),
    )


def test_statistics_as_reference(
    sides: tuple[NDArray[np.uint8], NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evalkit.images.npz.STATISTICS", STATISTICS_OF_PIXELS)
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {}
    for key, shape in STATISTICS_OF_PIXELS.items():
        rows = rng.standard_normal((90, shape[-1]))
        arrays[key] = np.cov(rows, rowvar=False) if key.startswith("sigma") else rows.mean(0)
    np.savez(tmp_path / "ref.npz", **arrays)
    arguments: Mapping[str, Any] = {"extractor": InceptionPixels(), "run": NO_STORE}
    evaluator = given(Evaluator(tmp_path / "ref.npz", **arguments), sides[1], (10,))
    found = evaluator.compute()
    same(found, compare(tmp_path / "ref.npz", sides[1], **arguments))
    assert found.missing["precision"].startswith(str(tmp_path))


def test_published_batch_by_name(
    sides: tuple[NDArray[np.uint8], NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "fetched.npz", sides[0])
    monkeypatch.setattr(
        "reference_batches.fetch.fetch",
        lambda name, progress: tmp_path / {"imagenet256": "fetched.npz"}[name],
    )
    arguments: Mapping[str, Any] = {"metrics": "fid", "extractor": InceptionPixels(), "run": NO_STORE}
    found = given(Evaluator("imagenet256", **arguments), sides[1], (10,)).compute()
    assert found.reference.source == "published imagenet256"  # so that records say what they are against
    same(found, compare(tmp_path / "fetched.npz", sides[1], **arguments))


def test_two_networks_in_reduced_precision(sides: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    """The precision check looks at the first images, which are kept for it."""
    extractors = [stand_in("inception", "bfloat16"), stand_in("efficientnet_lite0")]
    extractors[0].batch_size = 16
    arguments: Mapping[str, Any] = {
        "metrics": "fid,kid@efficientnet_lite0",
        "extractor": extractors,
        "run": NO_STORE,
    }
    found = given(Evaluator(sides[0], **arguments), sides[1], (9,)).compute()
    expected = compare(*sides, **arguments)
    assert found.precision_check == expected.precision_check != {}
    same(found, expected)


def test_labels(sides: tuple[NDArray[np.uint8], NDArray[np.uint8]], tmp_path: Path) -> None:
    """Error bars depend on balanced classes, and some metrics are of each class."""
    labels = np.arange(57) % 3
    np.savez(tmp_path / "samples.npz", arr_0=sides[1], arr_1=labels)
    np.savez(tmp_path / "ref.npz", arr_0=sides[0], arr_1=np.arange(60) % 3)
    metrics = "fid,precision,class_fid"
    arguments: Mapping[str, Any] = {"metrics": metrics, "extractor": InceptionPixels(), "run": NO_STORE}
    evaluator = Evaluator(tmp_path / "ref.npz", **arguments)
    for begin in range(0, 57, 10):
        evaluator.update(sides[1][begin : begin + 10], labels=torch.from_numpy(labels[begin : begin + 10]))
    expected = compare(tmp_path / "ref.npz", tmp_path / "samples.npz", **arguments)
    found = evaluator.compute()
    assert found.scores == expected.scores
    assert {score.name for score in found.scores} == {"fid", "precision", "recall", "class_fid"}
    without = compare(tmp_path / "ref.npz", sides[1], **arguments)
    assert found.score("fid") != without.score("fid")
    with pytest.raises(InputError, match="for all or for none"):
        evaluator.update(sides[1][:3])
    with pytest.raises(InputError, match="expected 3 integers"):
        evaluator.update(sides[1][:3], labels=np.zeros(2, int))


def test_the_network_itself(inception_weights: InceptionWeights, images: NDArray[np.uint8]) -> None:
    """Its features depend, by rounding, on how many images are in a forward pass. No random number drawn."""
    extractor = Inception(inception_weights, device="cpu", batch_size=2)
    arguments: Mapping[str, Any] = {"metrics": ["kid"], "extractor": extractor, "run": NO_STORE}
    reference = features_of(images[:2], extractor=extractor, run=NO_STORE)
    expected = compare(reference, images[6:9], **arguments)
    before = torch.get_rng_state()
    found = given(Evaluator(reference, **arguments), images[6:9], (1,)).compute()
    assert found.scores == expected.scores
    assert torch.equal(torch.get_rng_state(), before)


def test_another_default_device(sides: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    """As after torch.set_default_device; tensors on this device have no values."""
    metrics = ["fid", "precision_recall", "density_coverage", "authpct", "vendi", "mind", "kid"]
    arguments: Mapping[str, Any] = {"metrics": metrics, "extractor": InceptionPixels(), "run": NO_STORE}
    expected = compare(*sides, **arguments)
    fast_dtype.cache_clear()  # its result depends on test products
    with torch.device("meta"):
        same(given(Evaluator(sides[0], **arguments), sides[1], (20,)).compute(), expected)
        fused = _has_fused_convolution(torch.float32)
    assert fused == _has_fused_convolution(torch.float32)


def test_autocast_around_it(
    images: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As around a training step. It does not reach the network."""
    shrink(DINOv2ViTB14, tmp_path, monkeypatch)
    extractor = DINOv2ViTB14(device="cpu")
    arguments: Mapping[str, Any] = {"metrics": "kid@dinov2_vitb14", "extractor": extractor, "run": NO_STORE}
    expected = compare(images[:4], images[6:10], **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = given(Evaluator(images[:4], **arguments), images[6:10], (3,)).compute()
        assert torch.is_autocast_enabled("cpu")
    assert found.scores == expected.scores


def test_floats_of_compare(sides: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    floats = np.random.default_rng(0).random((57, 12, 10, 3), np.float32)
    arguments: Mapping[str, Any] = {"extractor": InceptionPixels(), "run": NO_STORE}
    evaluator = Evaluator(sides[0], value_range="0..1", to_bytes="keep", **arguments)
    expected = compare(sides[0], open_images(floats, value_range="0..1"), **arguments)
    same(given(evaluator, floats, (10,)).compute(), expected)


# ------------------------------------------------------------------------------------------------- input

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (2, 5, 4, 3), np.uint8)
UNIT = RNG.random((2, 5, 4, 3), np.float32) * np.float32(1.2) - np.float32(0.1)


def taken(images: object, **arguments: Any) -> NDArray[Any]:
    intake = Intake(**{"value_range": None, "layout": None, "to_bytes": "truncate"} | arguments)
    return intake.batch(images).numpy()


@pytest.mark.parametrize(
    "make",
    [
        np.array,
        torch.from_numpy,
        lambda x: x.astype(np.int64),
        lambda x: x[:, ::-1][:, ::-1],
        lambda x: torch.from_numpy(x).to(torch.uint16),
        lambda x: torch.from_numpy(x).to(torch.uint64),
    ],
)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("is_declared", [True, False])
def test_bytes_in_either_layout(make: Any, layout: str, is_declared: bool) -> None:
    images = make(BYTES.transpose(0, 3, 1, 2).copy() if layout == "NCHW" else BYTES)
    found = taken(images, layout=layout if is_declared else None)
    np.testing.assert_array_equal(found, BYTES)
    assert found.dtype == np.uint8


def test_bytes_as_scripts_make_them() -> None:
    """The lines are those of guided-diffusion's image_sample.py and of torchvision's save_image."""
    x = torch.from_numpy(UNIT * 2 - 1).permute(0, 3, 1, 2)
    adm = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    y = torch.from_numpy(UNIT).permute(0, 3, 1, 2)
    saved = y.mul(255).add_(0.5).clamp_(0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    assert (adm != saved).any()
    np.testing.assert_array_equal(taken(x, value_range="-1..1"), adm)
    np.testing.assert_array_equal(taken(x.numpy(), value_range=(-1, 1)), adm)
    np.testing.assert_array_equal(taken(y, value_range="0..1", to_bytes="round"), saved)
    half = x.to(torch.bfloat16)
    np.testing.assert_array_equal(
        taken(half.requires_grad_(), value_range="-1..1"), taken(half.detach().float(), value_range="-1..1")
    )


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        (UNIT, {}, "float32, and their range was not declared"),
        (UNIT.astype(np.float16), {}, "float16, and their range was not declared"),
        (UNIT, {"value_range": "0..1", "to_bytes": "keep"}, "expected 0 to 1, as declared"),
        (UNIT * np.float32(np.nan), {"value_range": "0..1"}, "NaN or infinity"),
        (np.full((1, 2, 2, 3), np.inf), {"value_range": "0..1"}, "NaN or infinity"),
        (UNIT, {"value_range": "0..2"}, "expected one of 0..1"),
        (UNIT, {"layout": "CHW"}, "layout='CHW': expected one of 'NCHW'"),
        (UNIT, {"to_bytes": "floor"}, "to_bytes='floor': expected one of 'truncate'"),
        (BYTES, {"layout": "NCHW"}, "are not NCHW with 3 channels"),
        (BYTES[:, :3], {}, "either axis may be the channels"),
        (BYTES[..., :1], {}, "Repeat a grey channel"),
        (BYTES[0], {}, "expected four axes"),
        (BYTES[:, :0], {}, "not NHWC with 3 channels"),
        (BYTES.astype(int) - BYTES.max() - 1, {}, "; expected 0 to 255"),
        (torch.full((1, 2, 2, 3), 65535, dtype=torch.uint16), {}, "from 65535 to 65535; expected 0 to 255"),
        (BYTES > 3, {}, "bool; expected uint8"),
        (torch.from_numpy(BYTES) > 3, {}, "bool; expected uint8"),
        ([BYTES], {}, "not a list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_images(images: Any, arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        taken(images, **arguments)


def test_declared_layout_decides() -> None:
    square = RNG.integers(0, 256, (2, 3, 4, 3), np.uint8)
    np.testing.assert_array_equal(taken(square, layout="NHWC"), square)
    np.testing.assert_array_equal(taken(square, layout="NCHW"), square.transpose(0, 2, 3, 1))


def test_what_is_said_of_floats(sides: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    arguments: Mapping[str, Any] = {"metrics": "fid", "extractor": InceptionPixels(), "run": NO_STORE}
    wrong = Evaluator(sides[0], value_range="-1..1", **arguments)
    wrong.update(sides[1] / np.float32(255))
    said = " ".join(wrong.compute().warnings)
    assert "declared as [-1, 1]: (x + 1) * 127.5, truncated to whole numbers" in said
    assert "No value of the images is below 0" in said
    assert "ends" not in said
    wrong.update(sides[1] / np.float32(50))
    assert "Values from 0 to 5.1 were declared as [-1, 1]" in " ".join(wrong.compute().warnings)
    right = Evaluator(sides[0], value_range="0..255", **arguments)
    right.update(sides[1] / np.float32(255))
    warnings = " ".join(right.compute().warnings)
    assert "No value of the images is above 1, although their declared range is 0..255." in warnings
    right.reset()
    right.update(sides[1].astype(np.float32))
    assert "No value of the images" not in " ".join(right.compute().warnings)
    assert right.compute().scores == compare(*sides, **arguments).scores


def test_floats_that_were_cut(sides: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    evaluator = Evaluator(sides[0], metrics="fid", extractor=InceptionPixels(), run=NO_STORE)
    cut = (sides[1] / 255 + 0.5).astype(np.uint8)
    with pytest.raises(InputError, match="holds only the values 0, 1"):
        given(evaluator, cut, (10,)).compute()
    evaluator.update(sides[1])  # so they are pictures that are dark
    assert evaluator.compute()["fid"] > 0


def test_what_does_not_fit(images: NDArray[np.uint8]) -> None:
    evaluator = Evaluator(
        images, extractor=InceptionPixels(), run=NO_STORE, value_range="0..1", to_bytes="keep"
    )
    with pytest.raises(UndefinedMetricError, match="No images were given"):
        evaluator.compute()
    evaluator.update(images[:0])
    evaluator.update(images[:1])
    with pytest.raises(UndefinedMetricError, match="one image"):
        evaluator.compute()
    with pytest.raises(InputError, match="8x10x3 uint8, but earlier images were 12x10x3 uint8"):
        evaluator.update(images[:, :8])
    state = evaluator.state_dict()
    with pytest.raises(InputError, match="12x10x3 float32, but earlier images were 12x10x3 uint8"):
        evaluator.update(images / np.float32(255))
    assert evaluator.state_dict()["range"] == state["range"] == [np.inf, -np.inf]
    evaluator.update(images[1:30])
    assert evaluator.compute().samples.images == 30
    with pytest.raises(InputError, match="no such file"):
        Evaluator("imagenet_256")


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("metrics", ["kid", "fid"])
def test_after_an_update_that_failed(
    sides: tuple[NDArray[np.uint8], NDArray[np.uint8]], metrics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of the images that are left would be of others than those that were given."""
    evaluator = Evaluator(sides[0], metrics=metrics, extractor=ByPass(), run=NO_STORE)
    with monkeypatch.context() as patch:

        def fail(self: ByPass, images: NDArray[Any]) -> None:
            raise KeyboardInterrupt

        given(evaluator, sides[1][:18], (6,))
        patch.setattr(ByPass, "__call__", fail)
        with pytest.raises(KeyboardInterrupt):
            evaluator.update(sides[1][18:])
    with pytest.raises(FeatureError, match="Of 57 images only the features of 1"):
        evaluator.compute()
    evaluator.reset()
    same(
        given(evaluator, sides[1], (9,)).compute(),
        compare(*sides, metrics=metrics, extractor=ByPass(), run=NO_STORE),
    )


# ------------------------------------------------------------------------------------------------- state


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("metrics", [None, ["fid"]])
@pytest.mark.parametrize("network", [ByPass, OnDevice])
def test_state(
    sides: tuple[NDArray[np.uint8], NDArray[np.uint8]], metrics: list[str] | None, network: type[ByPass]
) -> None:
    arguments: Mapping[str, Any] = {"metrics": metrics, "extractor": network(), "run": NO_STORE}
    evaluator = given(Evaluator(sides[0], **arguments), sides[1][:43], (9,))
    file = io.BytesIO()
    torch.save(evaluator.state_dict(), file)
    evaluator.update(sides[1][:5])  # what was saved does not change with it
    file.seek(0)
    again = Evaluator(sides[0], **arguments)
    again.update(sides[0][:3])
    again.load_state_dict(torch.load(file, weights_only=True))
    again.update(sides[1][43:])
    same(again.compute(), compare(*sides, **arguments))
    empty = Evaluator(sides[0], **arguments)
    again.load_state_dict(empty.state_dict())
    same(given(again, sides[1], (20,)).compute(), compare(*sides, **arguments))
    other = Evaluator(sides[0], metrics="kid", extractor=ByPass(), run=NO_STORE)
    with pytest.raises(InputError, match="different settings"):
        other.load_state_dict(again.state_dict())
    # Whether sums are enough for FID depends on the size of the reference.
    other = Evaluator(sides[0][:20], **arguments)
    with pytest.raises(InputError, match="a different reference"):
        other.load_state_dict(again.state_dict())
    smaller = ByPass(batch_size=2)
    other = Evaluator(sides[0], metrics=metrics, extractor=smaller, run=NO_STORE)
    with pytest.raises(InputError, match="batch size"):
        other.load_state_dict(again.state_dict())
    with pytest.raises(InputError, match="not of the format"):
        other.load_state_dict({})


@pytest.mark.parametrize("network", [ByPass, OnDevice])
def test_inference_mode_around_some_of_it(
    sides: tuple[NDArray[np.uint8], NDArray[np.uint8]], network: type[ByPass]
) -> None:
    """Tensors created in inference mode cannot be modified in place outside of it."""
    arguments: Mapping[str, Any] = {"extractor": network(), "run": NO_STORE}
    evaluator = Evaluator(sides[0], **arguments)
    with torch.inference_mode():
        evaluator.update(torch.from_numpy(sides[1][:6]).clone())
    evaluator.update(sides[1][6:13])
    again = Evaluator(sides[0], **arguments)
    with torch.inference_mode():
        again.load_state_dict(evaluator.state_dict())
    for each in (evaluator, again):
        each.update(sides[1][13:])
        same(each.compute(), compare(*sides, **arguments))


# ------------------------------------------------------------------------------------------------- ranks


def test_two_ranks(tmp_path: Path) -> None:
    """A toy training loop: uneven shares, ranks without images; the same on both ranks."""
    from evaluator_ranks import SHARES

    rng = np.random.default_rng(9)
    np.savez(tmp_path / "ref.npz", rng.integers(0, 256, (70, 8, 8, 3), np.uint8))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}"}
    # With as many threads as this process has: the last bits of products depend on that.
    command = [sys.executable, str(SUPPORT / "evaluator_ranks.py"), "2", str(tmp_path)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    for epoch, shares in enumerate(SHARES):
        saved = np.concatenate([np.load(tmp_path / f"{epoch}-{rank}.npy") for rank in range(2)])
        assert len(saved) == sum(shares)
        labels = np.concatenate([np.arange(min(7, n - at)) % 3 for n in shares for at in range(0, n, 7)])
        np.savez(tmp_path / "samples.npz", arr_0=saved, arr_1=labels)
        whole, sums = (
            [
                Comparison.from_json((tmp_path / f"{epoch}-{rank}-{name}.json").read_text())
                for rank in range(2)
            ]
            for name in ("whole", "sums")
        )
        assert whole[0] == whole[1]
        assert sums[0] == sums[1]
        arguments: Mapping[str, Any] = {"extractor": InceptionPixels(), "run": NO_STORE}
        expected = compare(tmp_path / "ref.npz", tmp_path / "samples.npz", **arguments)
        assert whole[0].scores == expected.scores
        assert whole[0].samples.images == len(saved)
        summed = compare(tmp_path / "ref.npz", tmp_path / "samples.npz", metrics="fid,sfid", **arguments)
        for name in ("fid", "sfid"):
            assert sums[0][name] == pytest.approx(summed[name], rel=1e-11)
        assert not any("same first batch" in text for text in (*whole[0].warnings, *sums[0].warnings))
    for rank in range(2):
        alike = Comparison.from_json((tmp_path / f"alike-{rank}.json").read_text())
        (said,) = (text for text in alike.warnings if "same first batch" in text)
        assert said.startswith("Ranks 0 and 1 gave the same first batch of images (2 of 2 ranks")
    errors = [json.loads((tmp_path / f"errors-{rank}.json").read_text()) for rank in range(2)]
    assert errors[0] == errors[1]
    assert [text.partition(":")[0] for text in errors[0]] == [
        "InputError",
        "UndefinedMetricError",
        "InputError",
        "InputError",
    ]
    assert "The evaluator of rank 1 has a different reference or different settings" in errors[0][0]
    assert "8x8x3 uint8" in errors[0][2]
    assert errors[0][3] == errors[0][0]
    memory = [json.loads((tmp_path / f"memory-{rank}.json").read_text()) for rank in range(2)]
    assert memory[0] == ["WorkerError: Rank 1 failed: MemoryError: so many GiB"] * 2 + [55, 55]
    assert memory[1] == ["MemoryError: so many GiB"] * 2 + [55, 55]
    # If a rank fails before compute(), the other does not wait.
    failures = [json.loads((tmp_path / f"failures-{rank}.json").read_text()) for rank in range(2)]
    assert failures[0][:3] == [
        "WorkerError: Rank 1 failed: OSError: no disk on 1",
        *["OSError: no disk on 0"] * 2,
    ]
    assert failures[1][:3] == [
        "OSError: no disk on 1",
        "WorkerError: Rank 0 failed: OSError: no disk on 0",
        "OSError: no disk on 1",
    ]
    assert failures[0][3] == failures[1][3]
    assert failures[0][3].startswith("UndefinedMetricError: No images were given.")
    assert failures[1][4].startswith("InputError: ")
    assert failures[0][4] == f"WorkerError: Rank 1 failed: {failures[1][4]}"
    if find_spec("lightning") is not None:
        assert failures[0].pop(5) == "WorkerError: Rank 1 failed: OSError: no disk"
        assert failures[1].pop(5) == "OSError: no disk"
    assert failures[0][5:] == failures[1][5:] == [80]
    assert "Rank 1 failed, and waits until the others call compute(): OSError: no disk on 1" in done.stderr
