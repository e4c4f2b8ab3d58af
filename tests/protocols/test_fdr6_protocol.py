"""The whole way with the six networks, five of them small: from images to FDr6."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_transformers import shrink
from stand_ins import NO_STORE, stand_in

from evalkit.comparison import compare
from evalkit.comparison.plan import choose_metrics
from evalkit.extractors import extractor_class
from evalkit.report.text import FORMATS
from evalkit.verify import pictures


def test_from_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [network for network in choose_metrics("fdr6").networks if network != "inception"]
    assert len(others) == 5
    networks = [stand_in("inception")]
    for network in others:
        cls = extractor_class(network)
        shrink(cls, tmp_path, monkeypatch)
        networks.append(cls(device="cpu"))
    noise = np.random.default_rng(0).integers(0, 60, (12, 48, 40, 3), dtype=np.uint8)
    images = pictures(48, 40, 12) // 2 + noise
    sides = images[:6], images[6:] // 2
    found = compare(*sides, protocol="fdr6", extractor=networks, run=NO_STORE)
    assert found.missing == {}
    ratios = [score.value for score in found.scores[1:]]
    assert len(ratios) == 6
    assert found["fdr6"] == pytest.approx(np.mean(ratios))
    for score, network in zip(found.scores[1:], networks, strict=True):
        assert score.parameters["output"].startswith(f"{network.network}:")
        metric = "fd" if network.network == "inception" else f"fd@{network.network}"
        alone = compare(*sides, metrics=metric, extractor=network, run=NO_STORE)
        assert score.parameters["distance"] == pytest.approx(alone.scores[0].value, rel=1e-6)
    assert "FDr6" in FORMATS["table"](found)
    assert {record["precision"] for record in found.extractors.values()} == {"float32"}
