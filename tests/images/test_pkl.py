"""EDM2's statistics: a source without images, at a path or a URL, damaged or whole."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from containers import bad

from evalkit.errors import InputError
from evalkit.images import open_images, pkl

RNG = np.random.default_rng(0)


def pair(d: int) -> dict[str, Any]:
    return {"mu": RNG.normal(size=d), "sigma": np.eye(d) + np.diag(RNG.random(d - 1), 1)}


CONTENT = {"num_images": 1_281_167, "fid": pair(2048), "fd_dinov2": pair(1024)}


def write(path: Path, content: Any = CONTENT, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def test_what_it_holds(tmp_path: Path) -> None:
    source = open_images(write(tmp_path / "img512.pkl"))
    assert (source.kind, len(source), source.shape) == ("pkl", 0, None)
    assert source.statistics is not None
    for key, (group, member) in {
        "mu": ("fid", "mu"),
        "sigma": ("fid", "sigma"),
        "mu_dinov2": ("fd_dinov2", "mu"),
        "sigma_dinov2": ("fd_dinov2", "sigma"),
    }.items():
        np.testing.assert_array_equal(source.statistics[key], CONTENT[group][member])  # type: ignore[index]
    assert source.provenance == {"statistics": {"images": 1_281_167}}
    assert list(source.batches(4)) == []
    assert "FID and FD-DINOv2, and there is no mu_s for sFID" in source.notes[-1]


def test_the_digest_is_of_the_statistics(tmp_path: Path) -> None:
    fid = {"fid": CONTENT["fid"]}
    one = open_images(write(tmp_path / "a.pkl", fid))
    again = open_images(write(tmp_path / "b.pkl", fid, protocol=5))
    assert one.digest == again.digest == pickle.loads(pickle.dumps(one)).digest
    assert "has mean and covariance for FID, and" in one.notes[-1]
    other = open_images(write(tmp_path / "c.pkl", {"fid": pair(2048)}))
    assert other.digest != one.digest
    write(tmp_path / "a.pkl", {"fid": pair(2048)})
    with pytest.raises(InputError, match=r"a\.pkl changed while it was read"):
        one.check_unchanged()


def test_of_dinov2_alone(tmp_path: Path) -> None:
    source = open_images(write(tmp_path / "x.pkl", {"fd_dinov2": CONTENT["fd_dinov2"]}))
    assert source.notes[-1].endswith(
        "x.pkl has mean and covariance for FD-DINOv2, and there is no mu for FID and no mu_s for sFID."
    )


def test_at_a_url(tmp_path: Path) -> None:
    memory = pytest.importorskip("fsspec", reason="needs fsspec, which comes with torch").filesystem("memory")
    memory.put(str(write(tmp_path / "x.pkl")), "/statistics/x.pkl")
    try:
        source = open_images("memory://statistics/x.pkl")
        assert source.digest == open_images(tmp_path / "x.pkl").digest
    finally:
        memory.rm("/statistics", recursive=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"fid": pair(1024)}, ("fid, mu is float64 of shape (1024,)", "(2048,)", "another network")),
        ({"fid": {"mu": np.zeros(2048)}}, ("fid, sigma is no array", "EDM2")),
        ({"fid": {"mu": np.zeros(2048), "sigma": np.eye(2047)}}, ("fid, sigma is float64", "(2048, 2048)")),
        ({"fid": {"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}}, ("not finite",)),
        ({"fid": {"mu": np.zeros(2048, np.int64), "sigma": np.eye(2048)}}, ("int64", "expected floats")),
        ({"fid": 3}, ("fid, mu is no array",)),
        ({"weights": np.zeros(3)}, ("without the statistics of EDM2", "its keys are weights")),
        (7, ("without the statistics of EDM2", "its keys are none")),
        ({1: 2}, ("damaged or incomplete",)),
    ],
)
def test_what_is_refused(tmp_path: Path, content: Any, words: tuple[str, ...]) -> None:
    bad(write(tmp_path / "x.pkl", content), "x.pkl", *words)


def test_truncated_and_far_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.pkl")
    data = path.read_bytes()
    for share in (0.0001, 0.3, 0.9):
        path.write_bytes(data[: int(share * len(data))])
        bad(path, "x.pkl", "damaged or incomplete", "copy it again")
    monkeypatch.setattr(pkl, "MOST_BYTES", 1000)
    bad(path, "x.pkl", "at most 1,000")
