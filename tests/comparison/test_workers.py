"""Comparisons whose features come from workers: the same scores and the same record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from stand_ins import InceptionPixels as Pixels

from evalkit.comparison import Subset, compare, features_of
from evalkit.errors import InputError
from evalkit.extractors.pixels import Pixels as PixelsRow
from evalkit.features import extraction, pieces
from evalkit.features import store as store_module
from evalkit.features.adm_npz import statistics_of
from evalkit.images import open_images
from evalkit.system.engine import Inline
from evalkit.system.run import Run


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SHARD", 64)
    monkeypatch.setattr(extraction, "GROUP", 3)
    monkeypatch.setattr(pieces, "monotonic", lambda: 0.0)
    monkeypatch.setattr(Pixels, "batch_size", 16)


@pytest.fixture
def sides(tmp_path: Path) -> list[Path]:
    generator = np.random.default_rng(0)
    paths = [tmp_path / "ref.npz", tmp_path / "samples.npz"]
    for path in paths:
        np.savez(path, generator.integers(0, 256, (500, 12, 10, 3), np.uint8))
    return paths


def record(sides: list[Path], run: Run, **settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(compare(*sides, run=run, **settings).to_json())
    del found["seconds"]
    return found


@pytest.mark.parametrize("is_stored", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"protocol": "exact"},
        {"metrics": "fid,sfid"},
        {"metrics": ["fid", "recall", "fd@pixels"], "extractor": [Pixels(), PixelsRow(batch_size=4)]},
        {"subset": Subset(images=300, seed=7)},
    ],
    ids=["adm", "exact", "streamed", "two networks", "subset"],
)
def test_scores_and_record_are_the_same(
    sides: list[Path], tmp_path: Path, is_stored: bool, settings: dict[str, Any]
) -> None:
    settings = {"extractor": Pixels(), **settings}
    expected = record(sides, Run(store=tmp_path / "one" if is_stored else None), **settings)
    engine = FakeEngine(4)
    found = record(sides, Run(store=tmp_path / "many" if is_stored else None, engine=engine), **settings)
    assert found == expected
    assert engine.items


def test_statistics_are_the_same_bits(sides: list[Path]) -> None:
    moments = ("pool", "spatial")
    expected, found = (
        statistics_of(
            features_of(
                sides[0], outputs=(), moments=moments, extractor=Pixels(), run=Run(store=None, engine=engine)
            )
        )
        for engine in (Inline(), FakeEngine(5))
    )
    assert expected.keys() == found.keys()
    for key, array in expected.items():
        assert array.tobytes() == found[key].tobytes()
    pool = Pixels()(np.concatenate(list(open_images(sides[0]).batches(500))))["pool"].astype(np.float64)
    np.testing.assert_allclose(expected["mu"], pool.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(expected["sigma"], np.cov(pool, rowvar=False), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("engine", ["ray", Inline, None])
def test_what_is_no_engine_is_refused(engine: Any) -> None:
    with pytest.raises(InputError, match="engine="):
        Run(engine=engine)
