"""Whatever happens to a file, evalkit reads it right or refuses it: mutations of sound files of every kind.

``fuzz_harness`` says which rules hold, ``fuzz_inputs`` which numbers are right. Seeds are fixed. To go on::

    EVALKIT_FUZZ_SEED=5000 EVALKIT_FUZZ_EXAMPLES=200 python -m pytest tests/fuzz -m "not slow"

A failure names kind, seed and damage, and where the file is kept. One again: its seed, and one example.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from random import Random

import pytest
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
    """What is wrong where a command goes on from a damaged file."""
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
    for name, file in malicious_files(folder, setup.marker).items():
        for command in commands:
            outcome, outputs = setup.run(command, file)
            problems = setup.problems(outcome, outputs, (name,))
            found += [f"{name}: {command}: {problem}" for problem in problems]
    assert not setup.marker.exists()
    assert not found, "\n".join(found)
