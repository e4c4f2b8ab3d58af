"""Counts of a batch's GPU operations, with a fake GPU whose kernels do nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_transformers import shrink
from stand_ins import NO_STORE, InceptionPixels

from evalkit import Evaluator
from evalkit.errors import InputError
from evalkit.extractors import EXTRACTORS, extractor_class
from evalkit.extractors.base import Rows
from evalkit.extractors.inception import Inception
from evalkit.extractors.published import PublishedNetwork
from evalkit.extractors.staging import Copies, upload
from evalkit.features.accumulation import Accumulation
from evalkit.features.moments import Moments
from evalkit.system.engine import Done, Pending
from evalkit.verify import pictures

REASON = "counts need the fake GPU: its folder on PYTHONPATH, and PyTorch for CUDA"
pytest.importorskip("fakeconv", reason=REASON)  # replaces the operators of cuDNN
Delta = pytest.importorskip("counting", reason=REASON).Delta

PUBLISHED = [row for row in EXTRACTORS if issubclass(extractor_class(row), PublishedNetwork)]


@pytest.mark.parametrize("row", PUBLISHED)
def test_the_host_prepares_the_next_batch_while_the_gpu_computes(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = extractor_class(row)
    shrink(cls, tmp_path, monkeypatch)
    extractor: Any = cls(device="cuda", batch_size=4)
    images = pictures(40, 50, 8)
    extractor(images)  # loads weights, statistics and compiled kernels
    with Delta() as delta:
        pending = extractor.submit(images)
    assert "sync" not in delta
    assert "evsync" not in delta
    assert delta["h2d"] == 2  # the two batches
    with Delta() as delta:
        found = pending.result()
    assert delta.get("evsync", 0) + delta.get("sync", 0) == 1
    assert found.keys() == cls.outputs.keys()
    assert {rows.shape for rows in found.values()} == {(8, width) for width in cls.outputs.values()}


def test_an_evaluator_asks_the_gpu_for_the_range_of_floats_at_once() -> None:
    evaluator = Evaluator(
        np.zeros((4, 8, 8, 3), np.uint8),
        metrics=["fd@pixels"],
        value_range="0..1",
        device="cuda",
        store=None,
    )
    images = torch.zeros((4, 3, 8, 8), device="cuda")
    evaluator.update(images)
    with Delta() as delta:
        evaluator.update(images)
    assert delta["sync"] == 2  # the range, and the pixels


def test_pinned_memory_of_the_caller_is_free_when_it_was_uploaded(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros((4, 8, 8, 3), dtype=torch.uint8)
    device = torch.device("cuda", 0)
    for is_pinned in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _, is_pinned=is_pinned: is_pinned)
        with Delta() as delta:
            upload(images, device)
        assert delta["h2d"] == 1
        assert delta.get("sync", 0) == is_pinned


def test_features_arrive_whatever_the_default_device_is() -> None:
    with torch.device("cuda"):
        assert Copies({"pool": torch.zeros(3, 4)}).result()["pool"].shape == (3, 4)


class Anywhere(InceptionPixels):
    """Records the device of the images of each forward pass."""

    tensor_device = torch.device("cuda", 0)

    def __init__(self) -> None:
        super().__init__(batch_size=4)
        self.seen: list[str] = []

    def submit(self, images: NDArray[Any]) -> Pending[Mapping[str, Rows]]:
        self.seen.append("cpu")
        return Done(self(images))

    def submit_tensor(self, images: torch.Tensor) -> Pending[Mapping[str, Rows]]:
        self.seen.append(images.device.type)
        return Done(self(images.cpu().numpy()))


@pytest.mark.parametrize(("first", "then"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_only_a_pass_of_images_from_both_places_moves_any(first: str, then: str) -> None:
    network = Anywhere()
    images = Accumulation("x", [network], {}, {network.network: network.outputs})
    for device, count in ((first, 2), (then, 10)):
        images.add(torch.zeros((count, 8, 8, 3), dtype=torch.uint8, device=device))
    assert network.seen == [first, then, then]


class SummedOnGpu(InceptionPixels):
    """Takes arrays alone."""

    device = "cuda"


@pytest.mark.parametrize("network", [Anywhere, SummedOnGpu])
def test_a_stream_waits_for_the_one_that_was_used_before(
    network: type[InceptionPixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = Evaluator(np.zeros((9, 8, 8, 3), np.uint8), extractor=network(), metrics="fid", run=NO_STORE)
    waits: list[tuple[torch.cuda.Stream, torch.cuda.Stream]] = []
    monkeypatch.setattr(torch.cuda.Stream, "wait_stream", lambda *streams: waits.append(streams))
    first, then = torch.cuda.Stream(), torch.cuda.Stream()
    for stream in (first, first, then):
        with torch.cuda.stream(stream):
            evaluator.update(np.zeros((5, 8, 8, 3), np.uint8))
    assert waits == [(then, first)]


def test_sums_stay_on_their_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent of the current device."""
    moments = Moments(3, torch.device("cuda"))
    assert moments._scatter.device == copy.deepcopy(moments)._scatter.device == torch.device("cuda", 0)
    network = Inception.__new__(Inception)  # without weights
    network._device = torch.device("cuda")
    assert network.tensor_device == torch.device("cuda", 0)
    monkeypatch.setattr("torch.cuda._is_in_bad_fork", lambda: True)
    with pytest.raises(InputError, match="This process was forked from one that uses CUDA"):
        assert network.tensor_device


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_an_evaluator_that_was_given_images_is_copied(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    """Lightning pickles it for processes that it spawns."""
    np.savez(tmp_path / "ref.npz", np.zeros((9, 8, 8, 3), np.uint8))
    evaluator = Evaluator(tmp_path / "ref.npz", extractor=SummedOnGpu(), metrics="fid", run=NO_STORE)
    for _ in range(2):
        evaluator.update(np.zeros((5, 8, 8, 3), np.uint8))
        evaluator = copied(evaluator)
    assert evaluator.state_dict()["features"]["count"] == 10
