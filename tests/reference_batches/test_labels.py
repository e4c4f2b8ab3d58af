"""Classes from folders, file names and containers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from photographs import contents
from PIL import Image

from evalkit.errors import InputError
from reference_batches.build import Settings, build


@pytest.mark.parametrize(
    ("names", "how", "expected"),
    [
        (["b/1.png", "a/1.png", "b/2.png"], "auto", [0, 1, 1]),
        (["x/y/b/1.png", "x/y/a/deep/1.png"], "auto", [0, 1]),
        (["1.png", "a/1.png"], "auto", None),
        (["a/1.png", "a/2.png"], "auto", None),
        (["1.png", "2.png"], "auto", None),
        (["b/1.png", "a/1.png"], "none", None),
        (["dog_1.png", "cat_7.png", "cat_1_2.png"], "names", [0, 0, 1]),
    ],
)
def test_labels(tmp_path: Path, names: list[str], how: Any, expected: list[int] | None) -> None:
    for name in names:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "x" / name)
    build(tmp_path / "x", tmp_path / "ref.npz", Settings(size=4, labels=how, statistics="none"))
    found = contents(tmp_path / "ref.npz").get("arr_1")
    assert (None if found is None else found.tolist()) == expected


@pytest.mark.parametrize(
    ("how", "message"), [("folders", "1.png has no class"), ("names", "1.png has no class")]
)
def test_labels_that_are_not_there(tmp_path: Path, how: Any, message: str) -> None:
    (tmp_path / "x").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "x" / "1.png")
    with pytest.raises(InputError, match=message):
        build(tmp_path / "x", tmp_path / "ref.npz", Settings(size=4, labels=how, statistics="none"))
