"""How many images a reduced precision is checked on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from stand_ins import NO_STORE, InceptionPixels

from evalkit.comparison.precision_check import check_scores
from evalkit.extractors.base import ReducedPrecision
from evalkit.images import open_images


class Rounded(InceptionPixels):
    """Pixels in another precision, which counts the images that go through it in float32."""

    backend, device, batch_size = "numpy", "cpu", 8

    def __init__(self, precision: str = "bfloat16", seen: dict[str, int] | None = None) -> None:
        super().__init__()
        self.precision, self.seen = precision, {} if seen is None else seen

    def at_precision(self, precision: str) -> Rounded:
        return Rounded(precision, self.seen)

    def __call__(self, images: Any) -> Any:
        self.seen[self.precision] = self.seen.get(self.precision, 0) + len(images)
        return super().__call__(images)


@pytest.mark.parametrize(("counts", "checked"), [((5, 7), 4), ((480, 2000), 10), ((40, 50_000), 128)])
def test_it_is_one_image_in_120(counts: tuple[int, int], checked: int) -> None:
    extractor = Rounded()
    assert isinstance(extractor, ReducedPrecision)
    sides = [open_images(np.zeros((n, 4, 4, 3), np.uint8)) for n in counts]
    found = check_scores(sides, {"inception": extractor}, [], NO_STORE)
    assert found["images"] == [min(n, checked) for n in counts]
    assert extractor.seen == {name: sum(found["images"]) for name in ("float32", "bfloat16")}
