"""Counts of a batch's GPU operations, with a fake GPU whose kernels do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_transformers import shrink

from evalkit import Evaluator
from evalkit.extractors import EXTRACTORS, extractor_class
from evalkit.extractors.published import PublishedNetwork
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
