"""What every extractor promises, whatever its network: each test runs over every row of EXTRACTORS."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_transformers import shrink

from evalkit.errors import UndefinedMetricError, WeightsError
from evalkit.extractors import EXTRACTORS, extractor_class, make_extractor
from evalkit.extractors.base import Extractor
from evalkit.extractors.bicubic import _on_device
from evalkit.extractors.published import PublishedNetwork
from evalkit.extractors.travel import Travels
from evalkit.verify import pictures


@pytest.fixture(scope="module", params=EXTRACTORS)
def row(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def extractor(row: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Extractor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVALKIT_OFFLINE", "1")
        cls = extractor_class(row)
        if issubclass(cls, PublishedNetwork):  # whose weights cannot be had everywhere
            shrink(cls, tmp_path_factory.mktemp(row), patch)
        try:
            made = make_extractor(row, device="cpu", batch_size=3)
        except WeightsError as error:
            if issubclass(cls, PublishedNetwork):
                raise
            pytest.skip(f"needs the weights of {row}: {error}")
        yield made


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return pictures(20, 33, 5)


@pytest.fixture(scope="module")
def features(extractor: Extractor, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    return dict(extractor(images))


def test_it_is_what_its_row_says(row: str, extractor: Extractor) -> None:
    assert isinstance(extractor, Extractor)
    cls = extractor_class(row)
    assert extractor.network == row == cls.network
    assert dict(extractor.outputs) == dict(cls.outputs)  # known without weights
    assert extractor.outputs
    assert set(extractor.derived.values()) <= set(extractor.outputs)
    assert not set(extractor.derived) & set(extractor.outputs)
    assert extractor.name
    assert extractor.preprocess
    assert extractor.batch_size == 3
    assert re.fullmatch("[0-9a-f]{64}", extractor.fingerprint)
    assert make_extractor(row, device="cpu").fingerprint == extractor.fingerprint


def test_outputs_have_the_shape_and_type_that_is_said(
    extractor: Extractor, features: dict[str, NDArray[np.float32]]
) -> None:
    assert set(features) == set(extractor.outputs)
    for output, width in extractor.outputs.items():
        assert features[output].shape == (5, width)
        assert features[output].dtype == np.float32
        assert np.isfinite(features[output]).all()
        assert len(np.unique(features[output], axis=0)) == 5  # different images, different features


def test_neither_batches_nor_types_matter(
    extractor: Extractor, features: dict[str, NDArray[np.float32]], images: NDArray[np.uint8]
) -> None:
    one_by_one = [extractor(images[index : index + 1]) for index in range(5)]
    floats = extractor(images.astype(np.float32))
    for output, expected in features.items():
        scale = np.abs(expected).max()
        again = np.concatenate([each[output] for each in one_by_one])
        np.testing.assert_allclose(again, expected, atol=1e-5 * scale)
        np.testing.assert_allclose(floats[output], expected, atol=1e-5 * scale)


def test_it_is_the_same_in_another_process(
    extractor: Extractor, features: dict[str, NDArray[np.float32]], images: NDArray[np.uint8]
) -> None:
    """Bit for bit; and what was built for one batch is there for the next."""
    pickled = pickle.dumps(extractor)
    for _ in range(2):
        again = pickle.loads(pickled)
        assert again is not extractor
        assert (again.fingerprint, again.batch_size, again.name) == (
            extractor.fingerprint,
            extractor.batch_size,
            extractor.name,
        )
        found = again(images)
        for output, expected in features.items():
            np.testing.assert_array_equal(found[output], expected)
        for output, base in extractor.derived.items():
            try:
                rows = extractor.derive(output, features[base])
            except UndefinedMetricError:
                continue
            np.testing.assert_array_equal(again.derive(output, features[base]), rows)
    assert len(pickle.dumps(extractor)) == len(pickled)  # nothing that was built travels
    if hasattr(again, "_layers"):
        assert again._layers is pickle.loads(pickled)._layers
        assert copy.deepcopy(extractor)._layers is extractor._layers  # type: ignore[attr-defined]


def test_a_copy_in_this_process_is_on_the_same_device() -> None:
    """Elsewhere GPUs have other numbers; here a clone of a metric stays on its rank's."""
    extractor = Travels("cpu", 3)
    extractor._device = torch.device("cuda", 1)  # this machine need not have it
    extractor.device = "cuda:1"
    first, second = copy.deepcopy([extractor, extractor])
    assert first is second
    assert first is not extractor
    assert (first._device, first.device) == (torch.device("cuda", 1), "cuda:1")
    assert not first._has_travelled


def test_the_default_type_of_torch_does_not_matter(
    extractor: Extractor,
    features: dict[str, NDArray[np.float32]],
    images: NDArray[np.uint8],
) -> None:
    """Training code may have set it, and the fingerprint does not know."""
    copy = pickle.loads(pickle.dumps(extractor))
    _on_device.cache_clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = copy(images)
    finally:
        torch.set_default_dtype(before)
        _on_device.cache_clear()
    for output, expected in features.items():
        np.testing.assert_array_equal(found[output], expected)


def test_derived_outputs_are_rows_or_refused_with_the_remedy(
    extractor: Extractor, features: dict[str, NDArray[np.float32]]
) -> None:
    for output, base in extractor.derived.items():
        try:
            found = extractor.derive(output, features[base])
        except UndefinedMetricError:  # such as weights without a classifier head
            continue
        assert found.dtype == np.float32
        assert found.ndim == 2
        assert len(found) == 5
