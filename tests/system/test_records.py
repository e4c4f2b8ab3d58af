"""Tables into dataclasses: what does not fit is named, and nothing is converted in silence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from evalkit.errors import InputError
from evalkit.system.records import read_record, structure


@dataclass(frozen=True)
class Inner:
    x: int

    def __post_init__(self) -> None:
        if self.x < 0:
            raise ValueError(f"x is {self.x}, below 0.")


@dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner
    share: float = 0.0
    mode: Literal["fast", "exact"] = "fast"
    sizes: tuple[int, ...] = ()
    parts: tuple[Inner, ...] | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    flip: bool = False
    place: int | str = 1


GOOD: dict[str, Any] = {"count": 1, "inner": {"x": 2}}


def test_values_that_fit() -> None:
    assert structure(GOOD, Outer, "table") == Outer(1, Inner(2))
    assert structure({**GOOD, "inner": Inner(2)}, Outer, "table") == Outer(1, Inner(2))
    found = structure({**GOOD, "share": 3, "sizes": [1, 2], "parts": [{"x": 4}]}, Outer, "table")
    assert found == Outer(1, Inner(2), 3.0, sizes=(1, 2), parts=(Inner(4),))
    assert isinstance(found.share, float)
    assert isinstance(found.sizes, tuple)
    for place in (3, "3"):
        assert structure({**GOOD, "place": place}, Outer, "table").place == place


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": True}, "table.count is True; expected a whole number."),
        ({"count": 1.0}, "table.count is 1.0; expected a whole number."),
        ({"count": "1"}, "table.count is '1'; expected a whole number."),
        ({"share": True}, "table.share is True; expected a finite number."),
        ({"share": math.inf}, "table.share is inf; expected a finite number."),
        ({"place": True}, "table.place is True; expected a whole number or a text."),
        ({"place": None}, "table.place is None; expected a whole number or a text."),
        ({"flip": 1}, "table.flip is 1; expected true or false."),
        ({"mode": ["fast"]}, "table.mode is ['fast']; expected fast or exact."),
        ({"sizes": "12"}, "table.sizes is '12'; expected a list, each item a whole number."),
        ({"sizes": {}}, "table.sizes is {}; expected a list, each item a whole number."),
        ({"sizes": [1, "2"]}, "table.sizes[1] is '2'; expected a whole number."),
        ({"parts": 3}, "table.parts is 3; expected a list, each item a table or null."),
        ({"parts": [{"x": None}]}, "table.parts[0].x is None; expected a whole number."),
        ({"scores": {"fid": "3"}}, "table.scores['fid'] is '3'; expected a finite number."),
        ({"inner": None}, "table.inner is None; expected a table."),
        ({"inner": {}}, "table.inner.x is missing; expected a whole number."),
        ({"inner": {"x": 2, "y": 3}}, "table.inner.y is unknown; expected some of x."),
        ({"inner": {"x": -1}}, "x is -1, below 0."),
        (
            {"count": None, "inner": 3},
            "table.count is None; expected a whole number. table.inner is 3; expected a table.",
        ),
    ],
)
def test_values_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        structure({**GOOD, **changes}, Outer, "table")
    assert str(caught.value) == message


def test_a_record_says_which_value_is_wrong() -> None:
    text = json.dumps({"format": "outer 1", **GOOD, "sizes": [True]})
    with pytest.raises(InputError, match=r"^Not a thing .*'outer 1'\): thing\.sizes\[0\] is True; expected"):
        read_record(text, Outer, formats=("outer 1",), what="thing")
