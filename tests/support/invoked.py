"""What a command run in this process left behind."""

from __future__ import annotations

from typing import NamedTuple


class Result(NamedTuple):
    code: int
    out: str
    err: str
