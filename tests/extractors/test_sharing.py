"""What several extractors have in common is read and built once."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path

import pytest
from small_transformers import shrink

from evalkit.extractors.dinov2 import DINOv2ViTL14, DINOv2ViTL14DgmEval
from evalkit.extractors.inception import Inception
from evalkit.extractors.inception_resizes import CleanFid, CleanFidLegacyPytorch, PytorchFid
from evalkit.extractors.sharing import _KEPT, kept, read_once
from evalkit.extractors.weights import InceptionWeights


class Content(list[str]):
    """One to which there can be weak references."""


@pytest.mark.usefixtures("inception_weights")
def test_rows_of_one_network_read_its_weights_once() -> None:
    first, second = Inception(device="cpu"), CleanFid(device="cpu")
    assert first.weights is second.weights


def test_rows_of_one_transformer_have_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for row in (DINOv2ViTL14, DINOv2ViTL14DgmEval):
        shrink(row, tmp_path, monkeypatch)
    first, second = DINOv2ViTL14(device="cpu"), DINOv2ViTL14DgmEval(device="cpu")
    assert first._weights is second._weights
    assert first._layers is second._layers


def test_in_another_process_they_take_one_place(inception_weights: InceptionWeights) -> None:
    _KEPT.clear()
    for row in (Inception, PytorchFid, CleanFid, CleanFidLegacyPytorch):
        copy = pickle.loads(pickle.dumps(row(inception_weights, device="cpu")))
        assert copy._layers is next(iter(_KEPT.values()))
    assert len(_KEPT) == 1
    _KEPT.clear()


def test_the_last_few_are_kept() -> None:
    _KEPT.clear()
    for number in range(5):
        kept(number, Content)
    gc.collect()
    again = [kept(number, lambda: Content(["again"])) for number in (4, 1, 0)]
    assert again == [[], [], ["again"]]
    _KEPT.clear()


def test_a_file_that_changed_or_is_no_longer_used_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "weights"

    def read() -> Content:
        return Content([file.read_text()])

    with pytest.raises(FileNotFoundError):
        read_once(file, "text", read)
    file.write_text("a")
    first = read_once(file, "text", read)
    assert read_once(file, "text", read) is first
    assert read_once(file, "other", read) is not first
    file.write_text("other")
    assert read_once(file, "text", read) == ["other"]
    second = read_once(file, "text", lambda: Content(["read again"]))
    assert second == ["read again"]  # nobody had kept the last
