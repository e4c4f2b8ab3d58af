"""The command line as a whole: which verbs may run as several processes, and errors as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from invoked import Result

from evalkit.cli.root import VERBS

Run = Callable[..., Result]


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - {"train"}))
def test_several_processes_are_refused(verb: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    for rank in ("0", "7"):
        monkeypatch.setenv("RANK", rank)
        code, out, err = run(verb)
        assert (code, out) == (2, "")
        assert "WORLD_SIZE=8" in err
        assert "--engine ray" in err


def test_training_runs_as_several_processes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "1")
    assert run("train", "--help").code == 0
    code, _, err = run("train", "diffusion", "no-such-images", "--recipe", "digits_diffusion", "--out", "x")
    assert code == 2
    assert err.startswith("Error (rank 1): ")
    assert "WORLD_SIZE" not in err


def test_one_process_of_torchrun_is_one_process(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert run("reference", "list").code == 0


@pytest.mark.parametrize("size", ["x", "0", "", "-2"])
def test_a_world_size_that_is_none(size: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    code, _, err = run("reference", "list")
    assert code == 2
    assert f"WORLD_SIZE={size!r}" in err
    assert "expected 0 to size - 1" in err


@pytest.mark.parametrize(
    "arguments", [(), ("--batch-size", "many"), ("--engine", "none"), ("--engine", "ray="), ("--seed", "x")]
)
def test_errors_are_json_where_progress_is(arguments: tuple[str, ...], run: Run) -> None:
    code, out, err = run("compare", "no-such.npz", "none.npz", "--progress", "json", *arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert json.loads(line).keys() == {"error"}
    assert not json.loads(line)["error"].startswith("Error")
    code, _, err = run("compare", "no-such.npz", "none.npz", *arguments)
    assert "Error: " in err


@pytest.mark.parametrize(("arguments", "lines"), [((), 2), (("--progress", "json"), 1)])
def test_interrupted(
    arguments: tuple[str, ...], lines: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """click ends the line of the ^C on a terminal, and would break JSON."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("evalkit.cli.compare.open_batches", interrupted)
    code, out, err = run("compare", "a.npz", "b.npz", *arguments)
    assert (code, out) == (130, "")
    assert len(err.splitlines()) == lines
    assert "Interrupted." in err
