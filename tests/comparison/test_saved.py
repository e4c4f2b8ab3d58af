"""Deviations in a file: the same to the bit, or none."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_ins import NO_STORE
from stand_ins import InceptionPixels as Pixels

from evalkit.comparison import measure, open_source
from evalkit.comparison.plan import choose_metrics
from evalkit.comparison.saved import load_deviations, save_deviations
from evalkit.deviations import Deviations, Excess, HalfSplit, Influence

RECORD = b'{"format": "evalkit comparison 4"}'


def made_up() -> dict[str, Deviations]:
    """One of each kind, with all that it can have and with as little as possible."""
    rng = np.random.default_rng(0)
    return {
        "fid": Influence(
            images=20,
            samples=rng.normal(size=20),
            reference=1e-300 * rng.normal(size=30),
            bias=0.1 + 0.2,
            classes=np.arange(20) % 4,
            reference_classes=np.arange(30) % 3 - 1,
            excess=Excess(1 / 3, 1e-17, 5e-324),
        ),
        "inception_score": Influence(images=2, samples=np.array([-0.5, 0.5]), no_bias="too few"),
        "fd@pixels": Influence(images=5, samples=rng.normal(size=5), no_reference="statistics alone"),
        "recall": HalfSplit(
            images=20,
            samples=rng.normal(size=8),
            reference=rng.normal(size=8),
            both=rng.normal(size=8),
            halves="20 of 20, é",
            no_bias="not known",
        ),
        "precision": HalfSplit(images=9, samples=np.zeros(4), both=np.ones(4), halves=""),
    }


def assert_same(found: dict[str, Deviations] | None, expected: dict[str, Deviations]) -> None:
    assert found is not None
    assert list(found) == list(expected)
    for name, one in expected.items():
        other = found[name]
        assert type(other) is type(one)
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            if isinstance(a, np.ndarray):
                assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), field.name
            else:
                assert (type(a), a) == (type(b), b), field.name


def test_every_kind_comes_back_to_the_bit(tmp_path: Path) -> None:
    save_deviations(tmp_path / "d.npz", made_up(), RECORD)
    assert_same(load_deviations(tmp_path / "d.npz", RECORD), made_up())
    save_deviations(tmp_path / "d.npz", {}, RECORD)  # a comparison without error bars
    assert load_deviations(tmp_path / "d.npz", RECORD) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["d.npz"]


def test_those_of_every_metric_come_back_to_the_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sides = [open_source(rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)) for _ in range(2)]
    metrics = "fid,sfid,inception_score,precision,recall,kid"
    (found,) = measure(sides, choose_metrics("exact", metrics), extractor=Pixels(), run=NO_STORE)
    deviations = dict(found.deviations)
    assert list(deviations) == metrics.split(",")
    save_deviations(tmp_path / "d.npz", deviations, RECORD)
    assert_same(load_deviations(tmp_path / "d.npz", RECORD), deviations)


def test_those_of_another_comparison_are_none(tmp_path: Path) -> None:
    save_deviations(tmp_path / "d.npz", made_up(), RECORD)
    assert load_deviations(tmp_path / "d.npz", RECORD + b" ") is None
    assert load_deviations(tmp_path / "e.npz", RECORD) is None


def test_a_file_that_is_cut_or_changed_anywhere_is_none_or_the_same(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    save_deviations(path, made_up(), RECORD)
    whole = path.read_bytes()
    for end in range(0, len(whole), 97):
        path.write_bytes(whole[:end])
        assert load_deviations(path, RECORD) is None
    missed = 0
    for place in range(0, len(whole), 53):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        found = load_deviations(path, RECORD)
        if found is not None:  # a byte of a zip's bookkeeping, such as a date
            assert_same(found, made_up())
            missed += 1
    assert missed < len(range(0, len(whole), 53)) / 2


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path("was_run").touch, ()


def changed(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    """Write the file anew with another header or other arrays."""
    save_deviations(path, made_up(), RECORD)
    with np.load(path) as found:
        arrays = dict(found)
    header = json.loads(str(arrays.pop("header")))
    change(header, arrays)
    np.savez(path, header=json.dumps(header), **arrays)


@pytest.mark.parametrize(
    "change",
    [
        lambda header, _: header.update(format="evalkit deviations 2"),
        lambda header, _: header.pop("comparison"),
        lambda header, _: header["scores"][0].update(kind="Other"),
        lambda header, _: header["scores"][0].update(kind="HalfSplit"),
        lambda header, _: header["scores"][3].update(kind="Influence"),
        lambda header, _: header["scores"][0].update(images=21),
        lambda header, _: header["scores"][0].update(images="20"),
        lambda header, _: header["scores"][0].update(excess=[0, 0, 0, 0]),
        lambda header, _: header["scores"].append(header["scores"][0]),
        lambda _, arrays: arrays.pop("0_samples"),
        lambda _, arrays: arrays.pop("3_both"),
        lambda _, arrays: arrays.update({"0_samples": arrays["0_samples"][:, None]}),
        lambda _, arrays: arrays.update({"0_samples": np.arange(20)}),
        lambda _, arrays: arrays.update({"0_reference": np.full(30, np.nan)}),
        lambda _, arrays: arrays.update({"0_reference": np.zeros(0)}),
        lambda _, arrays: arrays.update({"0_classes": np.arange(19)}),
        lambda _, arrays: arrays.update({"0_classes": np.zeros(20)}),
        lambda _, arrays: arrays.update({"0_reference_classes": np.arange(20)}),
        lambda _, arrays: arrays.pop("0_classes"),
        lambda header, _: header["scores"][0]["arrays"].remove("reference"),
        lambda header, _: header["scores"][0]["arrays"].append("images"),
        lambda header, _: header["scores"][4]["arrays"].remove("both"),
    ],
)
def test_what_does_not_fit_is_none(tmp_path: Path, change: Callable[..., Any]) -> None:
    changed(tmp_path / "d.npz", lambda header, arrays: None)
    assert_same(load_deviations(tmp_path / "d.npz", RECORD), made_up())
    changed(tmp_path / "d.npz", change)
    assert load_deviations(tmp_path / "d.npz", RECORD) is None


def test_nothing_in_the_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changed(tmp_path / "d.npz", lambda _, arrays: arrays.update({"0_samples": np.array([Harmful()] * 20)}))
    assert load_deviations(tmp_path / "d.npz", RECORD) is None
    member = io.BytesIO()
    with zipfile.ZipFile(member, "w") as archive:
        archive.writestr("header.npy", pickle.dumps(Harmful()))
    (tmp_path / "d.npz").write_bytes(member.getvalue())
    assert load_deviations(tmp_path / "d.npz", RECORD) is None
    (tmp_path / "d.npz").write_bytes(pickle.dumps(Harmful()))
    assert load_deviations(tmp_path / "d.npz", RECORD) is None
    assert not (tmp_path / "was_run").exists()
