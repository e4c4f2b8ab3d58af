"""Features by workers of Ray: the same bytes as of this process, whatever dies."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optional import optional
from patience import SECONDS
from stand_ins import stored
from troubled import Troubled

from evalkit.comparison import compare, features_of
from evalkit.extractors.inception import Inception
from evalkit.extractors.weights import InceptionWeights
from evalkit.features.adm_npz import statistics_of
from evalkit.features.extraction import extract
from evalkit.images import open_images
from evalkit.system.run import Run

IMAGES = 3000


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So that two cores are two workers; another number of threads adds in another order."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs Ray: pip install 'evalkit[cluster]'")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with optional("threadpoolctl", "demo").threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine(one_thread: None) -> Iterator[Any]:
    from evalkit.system.ray_engine import ray_engine

    with ray_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, generator = tmp_path_factory.mktemp("sides"), np.random.default_rng(0)
    paths = [folder / "ref.npz", folder / "samples.npz"]
    for path in paths:
        np.savez(path, generator.integers(0, 256, (IMAGES, 12, 10, 3), np.uint8))
    return paths


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").mkdir()
    return tmp_path / "log"


def test_a_comparison_and_its_store(engine: Any, sides: list[Path], log: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    alone = Run(store=tmp_path / "one")
    expected = compare(*sides, extractor=Troubled(tmp_path / "alone"), run=alone)
    has_affinity = hasattr(os, "sched_getaffinity")
    workers = min(2, len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)
    extractor = Troubled(log, together=workers)
    found = compare(*sides, extractor=extractor, run=Run(store=tmp_path / "many", engine=engine))
    assert found.scores == expected.scores
    assert stored(tmp_path / "many") == stored(tmp_path / "one")
    seen = extractor.seen()
    assert sum(seen.values()) == 2 * IMAGES
    assert os.getpid() not in seen
    assert len(seen) >= workers


def test_statistics_without_a_store(engine: Any, sides: list[Path], log: Path) -> None:
    expected, found = (
        statistics_of(
            features_of(sides[0], outputs=(), moments=("pool", "spatial"), extractor=Troubled(log), run=run)
        )
        for run in (Run(store=None), Run(store=None, engine=engine))
    )
    for key, array in expected.items():
        assert array.tobytes() == found[key].tobytes()


def test_a_killed_worker(engine: Any, sides: list[Path], log: Path, tmp_path: Path) -> None:
    expected = extract(open_images(sides[0]), Troubled(tmp_path), run=Run(store=None))
    store = tmp_path / "store"
    extractor = Troubled(log, victim=0, store=store)
    found = extract(open_images(sides[0]), extractor, run=Run(store=store, engine=engine))
    assert (log / "trouble").exists()
    for output in ("pool", "spatial"):
        assert found.arrays[output].tobytes() == expected.arrays[output].tobytes()
    # What was in hand is done again: at most two pieces.
    assert IMAGES <= sum(extractor.seen().values()) <= IMAGES + 1024
    assert len(extractor.seen()) >= 2


DRIVER = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from troubled import Troubled
from evalkit.features.extraction import extract
from evalkit.images import open_images
from evalkit.system.ray_engine import ray_engine
from evalkit.system.run import Run

file, store, log = map(Path, sys.argv[2:])
with ray_engine() as engine:
    run = Run(store=store, engine=engine)
    extract(open_images(file), Troubled(log, victim=os.getpid(), store=store), run=run)
"""


def test_the_killed_driver_goes_on(engine: Any, sides: list[Path], log: Path, tmp_path: Path) -> None:
    store, support = tmp_path / "store", Path(__file__).parents[1] / "support"
    killed = subprocess.run(
        [sys.executable, "-c", DRIVER, *map(str, (support, sides[0], store, log))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=SECONDS,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    files = [path.stem.split("-") for path in store.glob("*/*.h5")]
    there = sum(int(end) - int(begin) for begin, end in files)
    assert 0 < there < IMAGES
    (tmp_path / "again").mkdir()
    extractor = Troubled(tmp_path / "again")
    found = extract(open_images(sides[0]), extractor, run=Run(store=store, engine=engine))
    assert sum(extractor.seen().values()) == IMAGES - there
    expected = extract(open_images(sides[0]), Troubled(tmp_path), run=Run(store=None))
    for output in ("pool", "spatial"):
        assert found.arrays[output].tobytes() == expected.arrays[output].tobytes()


@pytest.mark.slow
def test_the_real_network(
    engine: Any, sides: list[Path], tmp_path: Path, inception_weights: InceptionWeights
) -> None:
    with np.load(sides[0]) as arrays:
        images = arrays["arr_0"][:100]
    np.savez(tmp_path / "x.npz", images)
    expected, found = (
        extract(open_images(tmp_path / "x.npz"), Inception(inception_weights, device="cpu"), run=run)
        for run in (Run(store=None), Run(store=tmp_path / "store", engine=engine))
    )
    for output in ("pool", "spatial"):
        assert found.arrays[output].tobytes() == expected.arrays[output].tobytes()
