"""EDM2's arithmetic written out, and its statistics file as the reference."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import linalg
from stand_ins import NO_STORE, stand_in

from evalkit.comparison import compare

NETWORKS = {"fid": ("inception", "pool"), "fd_dinov2": ("dinov2_vitl14", "class_token")}


def moments(rows: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
    """As EDM2 sums features up: in float64, and over n - 1."""
    x = rows.astype(np.float64)
    mu = x.sum(axis=0) / len(x)
    return {"mu": mu, "sigma": (x.T @ x - np.outer(mu, mu) * len(x)) / (len(x) - 1)}


def distance(a: dict[str, NDArray[np.float64]], b: dict[str, NDArray[np.float64]]) -> float:
    root = linalg.sqrtm(a["sigma"] @ b["sigma"])
    terms = np.square(a["mu"] - b["mu"]).sum() + np.trace(a["sigma"] + b["sigma"] - 2 * root)
    return float(np.real(terms))


def test_its_numbers_from_images_and_from_its_statistics(
    images: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractors = [stand_in(network) for network, _ in NETWORKS.values()]
    sides = images[::2], images[1::2]
    rows = {
        name: [extractor(side)[output] for side in sides]
        for (name, (_, output)), extractor in zip(NETWORKS.items(), extractors, strict=True)
    }
    # So that the networks differ, as they would.
    shapes = {"mu": (12,), "sigma": (12, 12), "mu_dinov2": (12,), "sigma_dinov2": (12, 12)}
    monkeypatch.setattr("evalkit.images.pkl.SHAPES", shapes)
    file = tmp_path / "img64.pkl"
    content = {name: moments(found[0]) for name, found in rows.items()}
    content["fd_dinov2"]["mu"] = content["fd_dinov2"]["mu"] + 3
    file.write_bytes(pickle.dumps({"num_images": 30, **content}))

    found = compare(sides[0], sides[1], protocol="edm2", extractor=extractors, run=NO_STORE)
    of_file = compare(file, sides[1], protocol="edm2", extractor=extractors, run=NO_STORE)
    assert [score.name for score in found.scores] == [score.name for score in of_file.scores] == [*NETWORKS]
    for name, (reference, samples) in rows.items():
        expected = distance(moments(reference), moments(samples))
        assert found[name] == pytest.approx(expected, rel=1e-6)
        assert of_file[name] == pytest.approx(distance(content[name], moments(samples)), rel=1e-6)
    assert of_file["fd_dinov2"] > found["fd_dinov2"] + 100
    assert of_file.missing == {}
    # One of its two files: the other score says what it lacks.
    file.write_bytes(pickle.dumps({"fid": content["fid"]}))
    part = compare(file, sides[1], protocol="edm2", extractor=extractors, run=NO_STORE)
    assert part["fid"] == of_file["fid"]
    assert part.missing.keys() == {"fd_dinov2"}
