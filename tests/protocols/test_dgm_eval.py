"""dgm-eval's formulas written out, on the same features."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from clouds import exact_distances
from numpy.typing import NDArray
from scipy import linalg
from stand_ins import NO_STORE, stand_in

from evalkit.comparison import compare
from evalkit.metrics.data_copying import data_copying
from evalkit.protocols.dgm_eval import DGM_EVAL

NETWORK = "dinov2_vitl14_dgm_eval"


def kd(x: NDArray[Any], y: NDArray[Any]) -> list[float]:
    """``compute_mmd`` of dgm-eval: of 100 subsets, here with a seed and the samples first."""
    random, size = np.random.RandomState(2020), min(1000, len(x), len(y))
    values = []
    for _ in range(100):
        b, a = (side[random.choice(len(side), size, replace=False)] for side in (y, x))
        aa, bb, ab = ((u @ v.T / u.shape[1] + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        within = (aa.sum() - np.trace(aa) + bb.sum() - np.trace(bb)) / (size * (size - 1))
        values.append(within - 2 * ab.sum() / size**2)
    return values


def prdc(x: NDArray[Any], y: NDArray[Any], k: int = 5) -> dict[str, float]:
    """``compute_prdc``."""
    of_x, of_y = (np.sort(exact_distances(side, side), axis=1)[:, k] for side in (x, y))
    between = exact_distances(x, y)
    return {
        "precision": (between < of_x[:, None]).any(axis=0).mean(),
        "recall": (between < of_y).any(axis=1).mean(),
        "density": (between < of_x[:, None]).sum(axis=0).mean() / k,
        "coverage": (between.min(axis=1) < of_x).mean(),
    }


def authpct(x: NDArray[Any], y: NDArray[Any]) -> float:
    """``compute_authpct``."""
    within, between = exact_distances(x, x), exact_distances(x, y)
    np.fill_diagonal(within, np.inf)
    return 100 * (within.min(axis=0)[between.argmin(axis=0)] < between.min(axis=0)).mean()


def vendi(y: NDArray[Any]) -> float:
    """``compute_vendi_score``."""
    z = y / np.linalg.norm(y, axis=1, keepdims=True)
    values = linalg.eigvalsh(z @ z.T / len(z))
    values = values[values > 0]
    return float(np.exp(-(values @ np.log(values))))


def test_its_scores() -> None:
    images = np.random.default_rng(0).integers(0, 256, (150, 20, 20, 3), dtype=np.uint8)
    samples, reference = images[:60] // 2 + 70, images[60:]
    extractor = stand_in(NETWORK)
    found = compare(reference, samples, protocol="dgm-eval", extractor=extractor, run=NO_STORE)
    assert found.missing == {}
    x, y = (extractor(side)["class_token"].astype(np.float64) for side in (reference, samples))
    root = linalg.sqrtm(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False))
    fd = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    subsets = kd(x, y)
    expected = {
        "fd_dinov2": float(np.real(fd)),
        "kd": float(np.mean(subsets)),
        "authpct": authpct(x, y),
        "vendi": vendi(y),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    kd_score = found.score("kd")
    assert kd_score is not None
    assert kd_score.std == pytest.approx(np.std(subsets), rel=1e-6)
    equal = compare(reference[:60], samples, protocol="dgm-eval", extractor=extractor, run=NO_STORE)
    for name, value in prdc(x[:60], y).items():
        assert equal[name] == pytest.approx(value, abs=1e-12), name
    assert found["density"] != equal["density"]  # of 60 others of the reference


def test_its_parameters() -> None:
    by_name = {spec.name: metric for metric in DGM_EVAL.metrics for spec in metric.scores}
    assert {metric.output for metric in DGM_EVAL.metrics} == {f"{NETWORK}:class_token"}  # type: ignore[attr-defined]
    for name in ("precision", "recall", "density", "coverage"):
        metric: Any = by_name[name]
        assert (metric.k, metric.images) == (5, 10_000)
    assert (by_name["kd"].subsets, by_name["kd"].subset_size) == (100, 1000)  # type: ignore[attr-defined]
    # As dgm-eval calls C_T's authors' code.
    assert data_copying.__kwdefaults__["cells"] == by_name["c_t"].cells == 3  # type: ignore[attr-defined]
    assert by_name["c_t"].components == 64  # type: ignore[attr-defined]
