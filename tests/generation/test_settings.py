"""Settings of a run and the classes of its samples: checked before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sampling_runs import SETTINGS
from small_networks import CLASSES

from evalkit.errors import InputError
from generation.noise import random_labels
from generation.samplers import make_sampler
from generation.settings import choose_labels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "0 samples"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**64}, "seed"),
        ({"scale": float("nan")}, "scale nan"),
        ({"scale": float("inf")}, "scale inf"),
        ({"sampler": "ddim"}, "sampler 'ddim'; expected make_sampler"),
        ({"guidance_timesteps": (500, 200)}, "from timestep 500 to 200"),
        ({"shard_size": 0}, "shard-size 0"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(SETTINGS, **changes)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("euler", {}, r"'euler'; expected ddpm, ddim, dpm-solver\+\+"),
        ("ddim", {"eta": 1.5}, r"eta 1\.5; expected 0 to 1"),
        ("ddim", {"eta": "much"}, "eta is 'much'; expected a finite number"),
        ("ddpm", {"eta": 0.5}, "ddpm has no parameters; 'eta' was given. eta is a parameter of ddim"),
        ("dpm-solver++", {"thresholding": "soft"}, "thresholding is 'soft'; expected static or dynamic"),
    ],
)
def test_samplers_out_of_range(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_sampler(name, parameters)


def test_labels(tmp_path: Path) -> None:
    def labels(classes: str | None, count: int = 12) -> list[int]:
        found = choose_labels(replace(SETTINGS, count=count, classes=classes), CLASSES)
        assert found is not None
        assert found.dtype == np.int64
        return found.tolist()

    assert labels(None) == labels("random") == random_labels(0, 12, CLASSES).tolist()
    assert labels("balanced") == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert labels("7") == [7] * 12
    np.save(tmp_path / "classes.npy", np.arange(5, dtype=np.int32))
    (tmp_path / "classes.txt").write_text("3\n1\n4\n1\n5\n")
    assert labels(str(tmp_path / "classes.npy"), 5) == [0, 1, 2, 3, 4]
    assert labels(str(tmp_path / "classes.txt"), 5) == [3, 1, 4, 1, 5]
    assert choose_labels(SETTINGS, None) is None
    for classes, message in (
        ("10", "class 10 is out of range: there are 0 to 9"),
        ("-1", "class -1 is out of range"),
        (str(tmp_path / "classes.npy"), "expected 12 integers"),
        ("mammals", "Give random, balanced"),
        ("9" * 22, r"--classes: class \d+ is out of range"),
        ("-" + "9" * 5000, r"--classes: class -\d+ is out of range"),
    ):
        with pytest.raises(InputError, match=message):
            labels(classes)
    np.save(tmp_path / "floats.npy", np.arange(12) / 2)
    np.save(tmp_path / "objects.npy", np.array([{}] * 12))
    np.save(tmp_path / "large.npy", np.full(12, 10**19, np.uint64))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "classes.npy").read_bytes()[:40])
    (tmp_path / "words.txt").write_text("dog\n" * 12)
    (tmp_path / "floats.txt").write_text("1.7\n" * 12)
    (tmp_path / "large.txt").write_text("10000000000000000000\n" * 12)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bytes.txt").write_bytes(bytes(range(256)))
    names = "floats.npy objects.npy large.npy cut.npy words.txt floats.txt large.txt empty.txt bytes.txt"
    for name in names.split():
        with pytest.raises(InputError, match=name):
            labels(str(tmp_path / name))
    with pytest.raises(InputError, match=r"line 1 has '1\.7'"):
        labels(str(tmp_path / "floats.txt"))
    with pytest.raises(InputError, match="no classes and is not guided"):
        choose_labels(replace(SETTINGS, classes="3"), None)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_class_files_of_any_editor(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes("# digits\r\n3\r\n1  # é\r\n\r\n4".encode(encoding))
    found = choose_labels(replace(SETTINGS, count=3, classes=str(path)), CLASSES)
    assert found is not None
    assert found.tolist() == [3, 1, 4]
