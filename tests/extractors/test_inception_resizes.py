"""What other tools' networks see of images, against the same steps with their own libraries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from evalkit.extractors.inception import Inception
from evalkit.extractors.inception_resizes import CleanFid, CleanFidLegacyPytorch, PytorchFid
from evalkit.extractors.preprocess import resize_bicubic, resize_half_pixel
from evalkit.extractors.weights import InceptionWeights
from evalkit.verify import pictures

SIZES = [(32, 32), (64, 64), (256, 256), (299, 299), (512, 512), (48, 320), (320, 48), (299, 400), (512, 33)]
every_size = pytest.mark.parametrize(("height", "width"), SIZES)


def images(height: int, width: int) -> NDArray[np.uint8]:
    """(2, height, width, 3): a picture, and noise of black and white, which a bicubic resize overshoots."""
    random = np.random.default_rng(0).integers(0, 2, (1, height, width, 3), dtype=np.uint8) * 255
    return np.concatenate([pictures(height, width, 1), random])


def seen(network: type[Inception], batch: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.float32]:
    """What a network sees, (n, 299, 299, 3)."""
    return network.prepared(torch.from_numpy(batch)).permute(0, 2, 3, 1).numpy()


def resized_by_pytorch(image: NDArray[np.float32]) -> NDArray[np.float32]:
    planes = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    found = F.interpolate(planes, size=(299, 299), mode="bilinear", align_corners=False)
    return found[0].numpy().transpose(1, 2, 0)


def resized_by_pillow(image: NDArray[np.uint8], *shapes: tuple[int, int]) -> NDArray[np.float32]:
    """Each channel as a Pillow image of floats; ``shapes`` are (width, height), one for each resize."""
    planes = []
    for channel in range(3):
        plane = Image.fromarray(image[:, :, channel].astype(np.float32))
        assert plane.mode == "F"
        for shape in shapes:
            plane = plane.resize(shape, Image.Resampling.BICUBIC)
        planes.append(np.asarray(plane))
    return np.stack(planes, axis=2)


@every_size
def test_pytorch_fids(height: int, width: int) -> None:
    """Steps of pytorch-fid 0.3.0."""
    batch = images(height, width)
    expected = [2 * resized_by_pytorch(image.astype(np.float32) / np.float32(255)) - 1 for image in batch]
    np.testing.assert_array_max_ulp(seen(PytorchFid, batch), np.stack(expected), maxulp=1)


@every_size
def test_clean_fids_legacy_pytorch(height: int, width: int) -> None:
    """Steps of clean-fid 0.1.35, mode legacy_pytorch."""
    batch = images(height, width)
    resized = [resized_by_pytorch(image.astype(np.float32)).clip(0, 255) for image in batch]
    expected = [2 * (image / np.float32(255)) - 1 for image in resized]
    np.testing.assert_array_max_ulp(seen(CleanFidLegacyPytorch, batch), np.stack(expected), maxulp=1)


@every_size
def test_clean_fids(height: int, width: int) -> None:
    """Steps of clean-fid 0.1.35, mode clean; Pillow's passes in the order that they had before Pillow 13."""
    batch = images(height, width)
    resized = np.stack([resized_by_pillow(image, (299, height), (299, 299)) for image in batch])
    assert resized.max() > 255 or (height, width) == (299, 299)  # which clipping is for
    ours = resize_bicubic(torch.from_numpy(batch), 299).permute(0, 2, 3, 1).numpy()
    # Sums in float64 differ in their last place, which tips the rounding of one value in 10^5. Where a sum
    # cancels, a step of what it is a sum of counts.
    assert (np.abs(ours - resized) <= np.spacing(np.maximum(np.abs(resized), np.float32(1)))).all()
    assert (ours == resized).mean() > 0.9999
    found = seen(CleanFid, batch)
    expected = (resized.clip(0, 255) - np.float32(128)) / np.float32(128)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-23)  # a unit in the last place of a pixel
    # In whichever order this Pillow has its passes.
    at_once = np.stack([resized_by_pillow(image, (299, 299)) for image in batch])
    np.testing.assert_allclose(found, (at_once.clip(0, 255) - 128) / 128, rtol=0, atol=2 * 2**-23)


def test_resizes_by_hand() -> None:
    image = torch.tensor([0.0, 100.0]).reshape(1, 1, 2, 1)
    # Source positions -0.25, 0.25, 0.75 and 1.25: half-pixel centres, clamped.
    assert resize_half_pixel(image, 4)[0, 0, 0].tolist() == [0, 25, 75, 100]
    # Of 4 pixels 2: antialiasing looks beyond the nearest two.
    wide = torch.tensor([0.0, 0.0, 0.0, 100.0]).reshape(1, 1, 4, 1)
    assert resize_half_pixel(wide, 2)[0, 0, 0].tolist() == [0, 50]
    assert resize_bicubic(wide, 2)[0, 0, 0, 0] < 0
    # Keys' kernel with a = -0.5, at 0.25 and 0.75 from the centres; what is beyond the edge has no weight.
    near, far = 0.8671875, 0.2265625
    assert resize_bicubic(image, 4)[0, 0, 0, 1] == pytest.approx(100 * far / (near + far), rel=1e-6)


def test_floats_are_not_rounded() -> None:
    batch = images(40, 30).astype(np.float32) * np.float32(0.97)
    for network in (PytorchFid, CleanFid, CleanFidLegacyPytorch):
        assert np.abs(seen(network, batch) - seen(network, batch.astype(np.uint8))).max() > 1e-3
        assert network.prepared(torch.from_numpy(batch), torch.bfloat16).dtype == torch.bfloat16


def test_one_network_serves_all_resizes(inception_weights: InceptionWeights) -> None:
    rows = (Inception, PytorchFid, CleanFid, CleanFidLegacyPytorch)
    networks = [row(inception_weights, device="cpu", batch_size=2) for row in rows]
    batch = pictures(20, 33, 2)
    found = [network(batch)["pool"] for network in networks]
    assert len({id(network._layers) for network in networks}) == 1
    for names in ("fingerprint", "network", "name", "preprocess"):
        assert len({getattr(network, names) for network in networks}) == len(rows)
    for index, rows_of in enumerate(found):
        for other in found[:index]:
            # The last differs from pytorch-fid's by rounding alone.
            assert (np.abs(rows_of - other).max() > 1e-2) == (index < 3 or other is not found[1])
    half = networks[2].at_precision("bfloat16")
    assert isinstance(half, CleanFid)
    assert half._layers is not networks[2]._layers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("row", [PytorchFid, CleanFid, CleanFidLegacyPytorch])
def test_cuda_sees_what_the_cpu_sees(inception_weights: InceptionWeights, row: type[Inception]) -> None:
    for height, width in SIZES:
        batch = torch.from_numpy(images(height, width))
        expected = row.prepared(batch)
        found = row.prepared(batch.cuda()).cpu()
        np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=0, atol=2**-21)
    batch = images(64, 64)
    found, expected = (row(inception_weights, device=device)(batch)["pool"] for device in ("cuda", "cpu"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
