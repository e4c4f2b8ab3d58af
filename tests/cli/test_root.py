"""The command line as a whole: which verbs may run as several processes, errors as JSON, and suggestions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from invoked import Result

from evalkit.cli.root import VERBS
from evalkit.errors import did_you_mean, nearest

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


@pytest.mark.parametrize(
    ("line", "suggested"),
    [
        ("comprae", "Did you mean compare?"),
        ("compare a b --protocol adn", "Did you mean adm?"),
        ("compare a b --metrics FIDD", "Did you mean fid or sfid or fd?"),
        ("compare a b --metrics preciscion", "Did you mean precision"),
        ("compare a b --metrics clip", "or METRIC@NETWORK, such as fd@pixels."),
        ("compare a b --metrics fd@clip", "Did you mean clip_vitb32 or clip_vitl14 or clip_vitl14_336?"),
        ("published imagenet26", "Did you mean imagenet256"),
        ("published imagenet256 --sort FIF", "Did you mean fid"),
        ("reference list --dataset imagnet512", "Did you mean imagenet512"),
        ("checkpoint fetch 64x64_difusion", "Did you mean 64x64_diffusion"),
        ("train diffusion x --recipe digit_diffusion --out y", "Did you mean digits_diffusion"),
    ],
)
def test_errors_suggest_what_was_meant(line: str, suggested: str, run: Run) -> None:
    code, out, err = run(*line.split())
    assert (code, out) == (2, "")
    assert suggested in err
    assert len(err) <= 1000


def test_nearest_names() -> None:
    known = ["fid", "sfid", "kid_subsets", "Vendi"]
    assert nearest("FID", known) == ["fid", "sfid"]
    assert nearest("kid", known)[-1] != "Vendi"
    assert nearest("kid_", known) == ["kid_subsets"]
    assert nearest(" vendi ", known) == ["Vendi"]
    assert [nearest(given, known) for given in ("", "k", None, "x" * 10**6)] == [[]] * 4
    assert did_you_mean("recall", known) == ""
    assert did_you_mean("vend", known) == " Did you mean Vendi?"


def test_lists_of_commands_fit_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise click truncates the sentence that describes a command."""
    monkeypatch.setenv("COLUMNS", "80")
    for group in ([], ["reference"], ["train"], ["checkpoint"]):
        lines = run(*group, "--help").out.partition("Commands:\n")[2].splitlines()
        assert len(lines) > 1
        assert [line for line in lines if line.endswith("...") or not re.match(r"  \S+  +\S", line)] == []
