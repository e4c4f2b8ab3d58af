"""Photographs of all sizes and colour modes, and what is expected of them."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optional import optional
from PIL import Image
from stand_ins import InceptionPixels as Pixels

MODES = ("RGB", "L", "CMYK", "P", "RGBA", "LA", "1")


class Wide(Pixels):
    """Pixels as features, of the widths that statistics in a file must have."""

    outputs = {"pool": 2048, "spatial": 2023}  # noqa: RUF012 - as the class it stands for
    batch_size = 8

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        features = super().__call__(images)
        return {layer: np.resize(features[layer].T, (d, len(images))).T for layer, d in self.outputs.items()}


def photographs(count: int, seed: int = 0) -> list[Image.Image]:
    """Cut-outs of scikit-learn's two photographs, of odd sizes and all colour modes."""
    photographs = optional("sklearn.datasets", "demo").load_sample_images().images
    photos = [Image.fromarray(photo) for photo in photographs]
    random = np.random.default_rng(seed)
    images = []
    for index in range(count):
        photo = photos[index % 2]
        width, height = random.integers(20, 420, 2).tolist()
        left, top = (
            random.integers(0, photo.width - width),
            random.integers(0, photo.height - min(height, 400)),
        )
        images.append(photo.crop((left, top, left + width, top + height)).convert(MODES[index % len(MODES)]))
    return images


def file_of(image: Image.Image) -> tuple[str, bytes]:
    """Suffix and bytes, as JPEG where the mode allows."""
    buffer = io.BytesIO()
    kind = "JPEG" if image.mode in ("RGB", "L", "CMYK") else "PNG"
    image.save(buffer, kind)
    return {"JPEG": "JPEG", "PNG": "png"}[kind], buffer.getvalue()


def by_hand(data: bytes, size: int) -> NDArray[np.uint8]:
    """ADM's crop, written down plainly a second time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image: Image.Image = Image.open(io.BytesIO(data)).convert("RGB")
    halvings = 0
    while min(image.width >> (halvings + 1), image.height >> (halvings + 1)) >= size:
        halvings += 1
    for _ in range(halvings):
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    short = min(image.width, image.height)
    image = image.resize(
        (round(image.width * (size / short)), round(image.height * (size / short))), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def contents(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
