"""The files that other tools measure against, by name; the content is ``statistics.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from evalkit.layouts import LAYOUTS

__all__ = ["StatisticsFile", "statistics_files", "statistics_table"]

FILE = Path(__file__).with_name("statistics.toml")
# Of Inception's and DINOv2's mean and covariance in float64; features of 50,000 images.
MOST_BYTES = 2**29
MOST_USERS = 60

_MEANS = {"mu": "mu", "ref_mu": "mu", "fid": "mu", "fd_dinov2": "mu_dinov2"}


@dataclass(frozen=True, kw_only=True)
class StatisticsFile:
    """One file that a tool measures against.

    Attributes:
        name: Its name in evalkit.
        file: Its own name.
        kind: ``statistics``; ``network`` and ``archive`` are listed, and nothing can be compared with them.
        dataset: What it is of, such as ``imagenet256``; empty for networks.
        keys: Of its arrays, separated by spaces.
        users: The repositories that use it.
        at: Where people find it.
        url: A direct address; empty where there is none.
        git_blob: Hex sha1 by which git knows the content; empty where it is not known.
        tool: A row of :data:`evalkit.layouts.LAYOUTS`, which says how its images were resized; empty where
            that is not known.
    """

    name: str
    file: str
    kind: Literal["statistics", "network", "archive"] = "statistics"
    dataset: str = ""
    keys: str
    users: str
    at: str
    url: str = ""
    git_blob: str = ""
    tool: str = ""

    @property
    def urls(self) -> tuple[str, ...]:
        """Addresses to download it from; none where a person has to get it."""
        return (self.url,) if self.url else ()

    @property
    def resize(self) -> str | None:
        """How the images behind it were resized, in words; None where that is not known."""
        return LAYOUTS[self.tool].resize if self.tool else None

    @property
    def statistics(self) -> set[str]:
        """What is to be in it, by our names: the means; none where it holds rows of features."""
        return {_MEANS[key] for key in self.keys.split() if key in _MEANS}

    @property
    def max_bytes(self) -> int:
        """A larger file is refused."""
        return MOST_BYTES


@cache
def _read(file: Path) -> dict[str, StatisticsFile]:
    return {row["name"]: StatisticsFile(**row) for row in tomllib.loads(file.read_text())["files"]}


def statistics_files(dataset: str | None = None) -> dict[str, StatisticsFile]:
    """Files of other tools, all or those of one dataset, by name."""
    return {name: row for name, row in _read(FILE).items() if dataset in (None, row.dataset)}


def statistics_table(files: Iterable[StatisticsFile], here: Container[str]) -> str:
    """A table for the terminal, one line a file; ``here`` has the names of those on this machine."""
    lines = [f"{'name':<24} {'file':<42} {'keys':<25} {'get':<5} {'here':<4} used by"]
    for row in files:
        users = (
            row.users
            if len(row.users) <= MOST_USERS
            else f"{row.users[:MOST_USERS].rpartition(', ')[0]}, ..."
        )
        get = "fetch" if row.url else "hand"
        lines.append(
            f"{row.name:<24} {row.file:<42} {row.keys or f'({row.kind})':<25} {get:<5} "
            f"{'yes' if row.name in here else 'no':<4} {users}"
        )
    return "\n".join(lines)
