"""``--engine`` and ``--progress``: what they open, and what is not understood."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from invoked import Result
from numpy.typing import NDArray
from stand_ins import InceptionPixels

from evalkit.cli.engine import open_engine
from evalkit.cli.messages import show_messages
from evalkit.cli.progress import Texts
from evalkit.errors import InputError, MissingDependencyError
from evalkit.system.engine import Engine, Inline, WorkerState

WORKER = WorkerState(host="node1", pid=7, device="cuda:3", state="working", item=5, done=64.0, rate=12.5)


class Watched(Inline):
    """This process, seen as a worker each time something is reported."""

    def __init__(self, watch: Callable[[Sequence[WorkerState]], object]):
        self._watch = watch

    def map(self, work: Any, items: Any, report: Any = None) -> Generator[tuple[int, Any], None, None]:
        for result in super().map(work, items, report):
            self._watch([WORKER])
            yield result


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """With what the engine of Ray was opened; it is this process instead."""
    found: list[str | None] = []

    @contextmanager
    def ray_engine(address: str | None = None, *, watch: Any = None) -> Iterator[Engine]:
        found.append(address)
        yield Watched(watch)
        found.append("closed")

    module = ModuleType("evalkit.system.ray_engine")
    module.ray_engine = ray_engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "evalkit.system.ray_engine", module)
    return found


def test_this_process_is_the_default() -> None:
    with open_engine("inline") as (engine, progress):
        assert type(engine) is Inline
        assert isinstance(progress, Texts)


@pytest.mark.parametrize(
    ("engine", "address"), [("ray", None), ("ray=node0:6379", "node0:6379"), ("ray=[::1]:63", "[::1]:63")]
)
def test_ray(engine: str, address: str | None, addresses: list[str | None]) -> None:
    with open_engine(engine) as (opened, _):
        assert isinstance(opened, Watched)
        assert addresses == [address]
    assert addresses == [address, "closed"]


@pytest.mark.parametrize("engine", ["", "Ray", "ray=", "ray= ", "ray:host", "inline=", "dask", "=", "ray =a"])
def test_what_is_no_engine(engine: str, addresses: list[str | None]) -> None:
    with (
        pytest.raises(InputError, match=r"expected inline, ray .* or ray=HOST:PORT"),
        open_engine(engine),
    ):
        pass
    assert addresses == []


def test_ray_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(MissingDependencyError, match=r"pip install 'evalkit\[cluster\]'"),
        open_engine("ray"),
    ):
        pass


@pytest.fixture
def files(images: NDArray[np.uint8], tmp_path: Path) -> list[Path]:
    """Two npz files of 30 images."""
    paths = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for path, part in zip(paths, (images[:30], images[30:]), strict=True):
        np.savez(path, part)
    return paths


COMMANDS = {
    "compare": ("compare", "{0}", "{1}", "--metrics", "fid,recall"),
    "features": ("features", "{0}", "-o", "out.h5"),
    "plan": ("plan", "{0}", "{1}", "--detect", "0.1", "--metrics", "kid"),
    "stats": ("stats", "{0}", "-o", "out.npz"),
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_verbs_take_the_options(
    verb: str,
    run: Callable[..., Result],
    files: list[Path],
    pixels: InceptionPixels,
    addresses: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(*files) for argument in COMMANDS[verb]]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "ray", None)  # importing it is an error
        expected = run(*arguments, "--no-store")
    assert (expected.code, expected.err) == (0, "")
    found = run(*arguments, "--no-store", "--engine", "ray=node0:1", "--progress", "json")
    assert (found.code, found.out) == (0, expected.out)
    assert addresses == ["node0:1", "closed"]
    lines = [json.loads(line) for line in found.err.splitlines()]
    assert all(
        {"stage", "done", "total", "images_per_second", "seconds_left", "workers"} == set(line)
        for line in lines
    )
    ends = [line for line in lines if line["done"] == line["total"]]
    assert any("a.npz" in line["stage"] and line["total"] == 30 for line in ends)


def test_the_next_command_prints_text_again(run: Callable[..., Result]) -> None:
    assert json.loads(run("compare", "none.npz", "none.npz", "--progress", "json").err)
    assert run("compare", "none.npz", "none.npz").err.startswith("Error: ")
    show_messages()
