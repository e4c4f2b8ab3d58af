"""The demo: real digits, a model that is shipped, and a trade-off that shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from invoked import Result
from optional import optional
from PIL import Image
from stand_ins import NO_STORE
from stand_ins import InceptionPixels as Pixels

from evalkit.cli.options import ExtractorSetup
from evalkit.comparison import compare
from evalkit.images import open_images
from evalkit.results import Sweep
from generation import demo as module
from generation.demo import SETTINGS, demo, digits, digits_model, write_digits
from generation.recipe import SHIPPED

optional("sklearn", "demo")
Invoke = Callable[..., Result]


def test_the_two_halves_are_real_digits(tmp_path: Path) -> None:
    training, reference = (open_images(path) for path in write_digits(tmp_path / "demo"))
    assert (len(training), len(reference)) == (899, 898)
    a, b = (next(images.batches(900)) for images in (training, reference))
    assert a.shape[1:] == (8, 8, 3)
    assert a.max() == 255
    rows = {image.tobytes() for image in a}
    assert sum(image.tobytes() in rows for image in b) < 8
    images, labels = digits()
    assert np.bincount(labels).min() > 170
    # Zeros are closer to zeros than to ones, even to a network of coarse pixels.
    zeros, ones = images[labels == 0], images[labels == 1]
    near = compare(zeros[:80], zeros[80:160], extractor=Pixels(), run=NO_STORE)
    far = compare(zeros[:80], ones[:80], extractor=Pixels(), run=NO_STORE)
    assert near["fid"] < far["fid"] / 5


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sweep]:
    """The demo with few samples, and pixels for features."""
    out = tmp_path_factory.mktemp("demo") / "out"
    settings = replace(SETTINGS, count=60, respacing="ddim10")
    return out, demo(out, extractor=Pixels(), settings=settings)


def test_what_it_leaves(swept: tuple[Path, Sweep]) -> None:
    out, result = swept
    assert [point.scale for point in result.points] == list(module.SCALES)
    assert (out / "results.csv").read_text() == result.to_csv()
    for name in ("samples.png", "curves.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 500


def test_samples_are_digits(swept: tuple[Path, Sweep]) -> None:
    """Each sample lies closest to training images of its own class far more often than by chance."""
    out, _ = swept
    images, labels = digits()
    known = images[898:].reshape(899, -1).astype(float)
    right = {}
    for scale in module.SCALES:
        (file,) = (out / "sweep" / f"scale-{scale!r}").glob("samples_*.npz")
        samples = open_images(file)
        assert samples.labels is not None
        pixels = next(samples.batches(60)).reshape(60, -1).astype(float)
        distances = ((pixels[:, None] - known[None]) ** 2).sum(axis=-1)
        right[scale] = float((labels[898:][distances.argmin(axis=1)] == samples.labels).mean())
    assert min(right.values()) > 0.8


def test_samples_are_not_copies(swept: tuple[Path, Sweep]) -> None:
    out, _ = swept
    known = {image.tobytes() for image in digits()[0]}
    (file,) = (out / "sweep" / "scale-0.0").glob("samples_*.npz")
    assert sum(image.tobytes() in known for image in next(open_images(file).batches(60))) < 3


def test_the_shipped_model_says_what_it_is() -> None:
    networks = digits_model()
    assert networks.diffusion.preset.name == "digits_diffusion"
    assert networks.classifier is not None
    assert networks.classifier.preset.num_classes == 10
    size = sum(path.stat().st_size for path in SHIPPED.glob("digits_*.safetensors"))
    assert size < 8e6


def test_command(tmp_path: Path, run: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExtractorSetup, "extractor", lambda self, network="inception": Pixels())
    monkeypatch.setattr(module, "SETTINGS", replace(SETTINGS, count=20, respacing="ddim5"))
    monkeypatch.setattr(module, "SCALES", (0.0, 4.0))
    result = run("demo", "--out", tmp_path / "demo")
    assert result.code == 0
    lines = result.out.splitlines()
    assert any(line.startswith("FID ") for line in lines)  # of real digits
    head = next(number for number, line in enumerate(lines) if line.split()[:3] == ["scale", "FID", "sFID"])
    assert [line.split()[0] for line in lines[head + 1 : head + 3]] == ["0", "4"]
    assert "report.html" in result.out
    page = (tmp_path / "demo" / "report.html").read_text("utf-8")
    assert "real.npz" in page
    assert "digits" in page
    assert page.count("data:image/png") == 1
