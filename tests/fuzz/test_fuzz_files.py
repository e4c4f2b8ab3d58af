"""Whatever happens to a file, evalkit reads it right or refuses it: mutations of sound files of every kind.

``fuzz_harness`` says which rules hold, ``fuzz_inputs`` which numbers are right. Seeds are fixed. For more::

    EVALKIT_FUZZ_SEED=5000 EVALKIT_FUZZ_EXAMPLES=200 python -m pytest tests/fuzz -m "not slow"

A failure names kind, seed and damage, and where the file is kept. One again: its seed, and one example.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fuzz_harness import Outcome, broken_rules
from fuzz_inputs import KINDS, LEFT, Kind, Left, malicious_files
from fuzz_mutations import damage
from fuzz_setup import Setup, ready, right_pixels, seeds

CORE, SLOW = 2, 34
FIRST_SLOW = 1000


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    with ready(tmp_path_factory.mktemp("fuzz") / "all") as made:
        yield made


def check(setup: Setup, kind: Kind, seed: int) -> list[str]:
    """What is wrong with one damaged file of a kind."""
    random = Random(f"{kind.name} {seed}")
    (folder, place, damaged_place), (other, *_) = setup.sound(kind, 0), setup.sound(kind, 1)
    shutil.rmtree(setup.case, ignore_errors=True)
    shutil.copytree(folder, setup.case)
    given, target = setup.case / place, setup.case / damaged_place
    damaged = damage(target.read_bytes(), random, (other / damaged_place).read_bytes(), kind.special)
    target.write_bytes(damaged.data)
    found = []
    for command in (*kind.always, *([random.choice(kind.sometimes)] if kind.sometimes else [])):
        outcome, outputs = setup.run(command, given)
        wrong = setup.problems(outcome, outputs, (given.name, target.name))
        if kind.read and not wrong:
            right = right_pixels(kind, given, damaged, outcome, (folder / place, other / place))
            wrong += setup.wrong_number(outcome, right) + setup.wrong_pixels(outcome, outputs, right)
        found += [f"{command}: {problem}" for problem in wrong]
    return report(setup, kind.name, seed, damaged.how, found)


def check_left(setup: Setup, left: Left, seed: int) -> list[str]:
    """What is wrong where a command resumes from a damaged file."""
    random = Random(f"{left.name} {seed}")
    sound = setup.left(left)
    setup.clear()
    shutil.copytree(sound, setup.out, dirs_exist_ok=True)
    target = setup.out / left.file
    damaged = damage(target.read_bytes(), random, None, left.special)
    target.write_bytes(damaged.data)
    shutil.rmtree(setup.case, ignore_errors=True)
    shutil.copytree(setup.out, setup.case)
    outcome, outputs = setup.run(left.go_on, keep=True)
    wrong = setup.problems(outcome, outputs, (target.name, target.parent.name), goes_on=True)
    if not wrong and left.result and outcome.code == 0 and not damaged.repaired:
        result = setup.out / left.result
        if not result.is_file() or result.read_bytes() != setup.result(left):
            wrong.append(f"{left.result} is not what the undamaged run makes")
    return report(setup, left.name, seed, damaged.how, [f"{left.go_on}: {problem}" for problem in wrong])


def report(setup: Setup, name: str, seed: int, how: str, found: list[str]) -> list[str]:
    """The findings with what is needed to see them again."""
    if not found:
        return []
    kept = setup.folder.parent / f"{name.replace(' ', '-').replace(':', '')}-{seed}"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(setup.case, kept)
    lines = "\n  ".join(found)
    return [f"{name}, seed {seed} ({how}), kept as {kept}:\n  {lines}"]


def names(kind: Kind | Left) -> str:
    return kind.name


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_damaged_files(kind: Kind, setup: Setup) -> None:
    found = [line for seed in seeds(0, CORE) for line in check(setup, kind, seed)]
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_many_damaged_files(kind: Kind, setup: Setup) -> None:
    found = [line for seed in seeds(FIRST_SLOW, SLOW) for line in check(setup, kind, seed)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("left", LEFT, ids=names)
def test_damaged_files_of_a_run_that_goes_on(left: Left, setup: Setup) -> None:
    found = [line for seed in seeds(0, CORE - 1) for line in check_left(setup, left, seed)]
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("left", LEFT, ids=names)
def test_many_damaged_files_of_a_run_that_goes_on(left: Left, setup: Setup) -> None:
    found = [line for seed in seeds(FIRST_SLOW, SLOW // 2) for line in check_left(setup, left, seed)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("all_commands", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sound_files_are_read(all_commands: bool, setup: Setup) -> None:
    """Else the tests above would show nothing."""
    for kind in KINDS:
        sound, given, _ = setup.sound(kind, 0)
        for command in (*kind.always, *(kind.sometimes if all_commands else ())):
            outcome, outputs = setup.run(command, sound / given)
            assert not outcome.problem, (kind.name, command, outcome)
            found = setup.problems(outcome, outputs, (given.name,))
            assert not found, (kind.name, command, found)
            if command in kind.always:
                assert outcome.code == 0, (kind.name, outcome)


def test_a_hang_is_ended_and_reported(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next command has a new worker."""
    sample = "sample --model {weights} -n 64 --device cpu --out {run} --respacing"
    assert setup.run(f"{sample} 2")[0].code == 0
    monkeypatch.setattr("fuzz_harness.MOST_SECONDS", 0.5)
    outcome, _ = setup.run(f"{sample} 1000")
    assert outcome.code is None
    assert outcome.problem.startswith("hangs")
    assert "sample.py" in outcome.problem
    monkeypatch.undo()
    assert setup.run("reference show {ref}")[0].code == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ""),
        ({"code": 0}, "x.npz is not there"),
        ({"code": 1}, "exit code 1"),
        ({"code": None, "problem": "Traceback (most recent call last)\nKeyError: 3"}, "KeyError: 3"),
        ({"err": "Error: no"}, "does not name the file"),
        ({"err": "Error: a.npy" + 1000 * "x"}, "a message of 1,012 characters"),
        ({"err": " "}, "no message"),
        ({"memory": 5 * 2**30}, "5.0 GiB of memory"),
    ],
)
def test_broken_rules_are_seen(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    outcome = Outcome(**{"arguments": (), "code": 2, "err": "Error: a.npy is damaged", **changes})
    found = broken_rules(outcome, ("a.npy",), (tmp_path / "x.npz",), tmp_path / "marker")
    assert expected in "".join(found)
    assert bool(found) == bool(expected)


def test_what_is_left_behind_is_seen(tmp_path: Path) -> None:
    outcome = Outcome(arguments=(), code=2, err="Error: a.npy is damaged")
    (tmp_path / "x.npz").touch()
    (tmp_path / ".x.npz.1.partial").touch()
    (tmp_path / "marker").mkdir()
    found = broken_rules(outcome, ("a.npy",), (tmp_path / "x.npz",), tmp_path / "marker")
    expected = [
        "code in the file was run",
        "left behind: .x.npz.1.partial",
        "exit code 2, and x.npz is there",
    ]
    assert found == expected


def test_no_code_of_a_file_is_run(setup: Setup) -> None:
    folder = setup.folder / "malicious"
    folder.mkdir(exist_ok=True)
    commands = (
        "compare {ref} {in} --metrics fid",
        "reference show {in} --check",
        "reference build {in} -o {out}/x.npz --size 8 --statistics none",
        "checkpoint inspect {in}",
        "sample --model {weights} --respacing 2 -n 2 --device cpu --out {run} --classes {in}",
        "sample --model {in} --respacing 2 -n 2 --device cpu --out {run}",
        "train diffusion {ref} --recipe {in} --steps 1 --device cpu --out {run}",
        "curves {in} -o {out}/x.svg",
    )
    found = []
    files = malicious_files(folder, setup.marker)
    pickle.loads(files["plain.pt"].read_bytes())
    assert setup.marker.is_dir(), "the attack does nothing"
    setup.marker.rmdir()
    for name, file in files.items():
        for command in commands:
            outcome, outputs = setup.run(command, file)
            problems = setup.problems(outcome, outputs, (name,))
            found += [f"{name}: {command}: {problem}" for problem in problems]
    assert not setup.marker.exists()
    assert not found, "\n".join(found)
