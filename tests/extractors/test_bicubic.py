"""What DINOv2 and CLIP see of images: against the original tools' steps, and the formula written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from small_transformers import shrink

from evalkit.extractors import extractor_class
from evalkit.extractors.bicubic import Resize, crop_and_resize, resize_and_crop, squash, squash_as_floats
from evalkit.verify import pictures

Array = NDArray[Any]

CPU = torch.device("cpu")

# Height and width, from 32 to 512; those of odd differences are cropped halfway between pixels.
SHAPES = [
    (32, 32),
    (33, 47),
    (64, 48),
    (100, 225),
    (224, 224),
    (224, 300),
    (256, 256),
    (300, 200),
    (337, 336),
    (512, 384),
]

IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
CLIP = np.array([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]], np.float32)


def images_of(height: int, width: int) -> NDArray[np.uint8]:
    """A smooth picture, and noise, whose resize overshoots."""
    noise = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    return np.concatenate([pictures(height, width, 1), noise])


def edm2(image: NDArray[np.uint8]) -> Array:
    """``DINOv2Detector`` of EDM2's ``calculate_metrics.py``, on one image."""
    x = torch.tensor(image).permute(2, 0, 1)[None].to(torch.float32)
    x = torch.nn.functional.interpolate(x.contiguous(), size=(224, 224), mode="bicubic", antialias=True)
    return (x[0].numpy().transpose(1, 2, 0) / np.float32(255) - IMAGENET[0]) / IMAGENET[1]


def dgm_eval(image: NDArray[np.uint8]) -> Array:
    """torchvision's ``Resize((224, 224), BICUBIC)``, ``ToTensor`` and ``Normalize`` on one image."""
    picture = Image.fromarray(image)
    if image.shape[1] < 224 < image.shape[0]:  # Pillow 13 would begin with the rows
        picture = picture.resize((224, image.shape[0]), Image.Resampling.BICUBIC)
    found = np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC))
    return (found.astype(np.float32) / np.float32(255) - IMAGENET[0]) / IMAGENET[1]


def cmmd(image: NDArray[np.uint8]) -> Array:
    """``_center_crop_and_resize`` of CMMD's ``io_util.py`` and CLIP's scaling, on one image."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(image[top : top + side, left : left + side])
    found = np.asarray(square.resize((336, 336), Image.Resampling.BICUBIC))
    return (found.astype(np.float32) / np.float32(255) - CLIP[0]) / CLIP[1]


def clean_fid(image: NDArray[np.uint8]) -> Array:
    """``img_preprocess_clip`` of clean-fid, by torchvision's rules, then its tensor times 255 and by 255."""
    height, width = image.shape[:2]
    if height <= width:
        new_height, new_width = 224, int(224 * width / height)
    else:
        new_height, new_width = int(224 * height / width), 224
    fitted = Image.fromarray(image)
    if (height, width) != (new_height, new_width):
        fitted = fitted.resize((new_width, new_height), Image.Resampling.BICUBIC)
    top, left = round((new_height - 224) / 2.0), round((new_width - 224) / 2.0)
    found = np.asarray(fitted)[top : top + 224, left : left + 224].astype(np.float32)
    unit = found / np.float32(255) * np.float32(255) / np.float32(255)
    return (unit - CLIP[0]) / CLIP[1]


ORIGINALS: dict[str, Callable[[NDArray[np.uint8]], Array]] = {
    "dinov2_vitb14": edm2,
    "dinov2_vitl14": edm2,
    "dinov2_vitl14_dgm_eval": dgm_eval,
    "clip_vitb32": clean_fid,
    "clip_vitl14": clean_fid,
    "clip_vitl14_336": cmmd,
}


@pytest.mark.parametrize("row", ORIGINALS)
def test_networks_see_what_the_original_tool_shows_them(
    row: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = extractor_class(row)
    shrink(cls, tmp_path, monkeypatch)
    extractor = cls(device="cpu")
    for shape in SHAPES:
        images = images_of(*shape)
        found = extractor.prepared(images)
        assert found.dtype == torch.float32
        assert found.shape == (2, 3, cls.input_size, cls.input_size)
        for image, prepared in zip(images, found.numpy().transpose(0, 2, 3, 1), strict=True):
            np.testing.assert_array_max_ulp(prepared, ORIGINALS[row](image), maxulp=1)


def formula(image: Array, height: int, width: int) -> Array:
    """Bicubic with antialiasing in float64: Keys' cubic with a = -1/2, widened where the image shrinks."""
    image = image.astype(np.float64)
    for axis, size in enumerate((height, width)):
        extent = image.shape[axis]
        stretch = max(extent / size, 1.0)
        centres = (np.arange(size) + 0.5) * extent / size
        distance = np.abs((np.arange(extent) + 0.5)[None] - centres[:, None]) / stretch
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        weight = np.where(distance < 1, near, np.where(distance < 2, far, 0))
        weight /= weight.sum(axis=1, keepdims=True)
        image = np.moveaxis(np.tensordot(weight, image, (1, axis)), 0, axis)
    return image


@pytest.mark.parametrize("shape", SHAPES)
def test_resizes_follow_the_formula(shape: tuple[int, int]) -> None:
    image = pictures(*shape, 1) // 2 + 64  # so that nothing is clipped, which Pillow does after each pass
    expected = formula(image[0], 224, 224)
    floats = squash_as_floats(image, 224, CPU)[0].permute(1, 2, 0).numpy()
    # Positions are float32: 1.5e-5 pixels at 256, between pixels that may be 128 levels apart.
    np.testing.assert_allclose(floats, expected, rtol=0, atol=5e-3)
    # Rounded to bytes after each of two passes.
    resized = squash(image, 224, CPU)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(resized, expected, rtol=0, atol=1.5)


def test_crops_are_central() -> None:
    """One grey level for each column: what is left of a wide image shows where it was cut."""
    ramp = np.broadcast_to(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (60, 120, 3))[None]
    for change in (crop_and_resize, resize_and_crop):
        row = change(ramp, 60, CPU)[0, 0, 30]
        np.testing.assert_array_equal(row, np.arange(60, 180, 2))
        column = change(np.ascontiguousarray(ramp.transpose(0, 2, 1, 3)), 60, CPU)[0, 0, :, 30]
        np.testing.assert_array_equal(column, np.arange(60, 180, 2))


@pytest.mark.parametrize("change", [squash, crop_and_resize, resize_and_crop])
def test_floats_are_rounded_to_bytes(change: Resize) -> None:
    images = images_of(40, 50)
    moved = images.astype(np.float32) + np.float32(0.4) * np.where(images % 2, 1, -1)
    np.testing.assert_array_equal(change(moved, 32, CPU), change(images, 32, CPU))
