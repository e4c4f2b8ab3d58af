"""The README says what is there: its commands, options, Python and make targets exist."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

import evalkit
from evalkit import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_command_is_described() -> None:
    mentioned = set(re.findall(r"evalkit ([a-z]+)\b", README))
    described = set(cli.root.commands)
    assert described <= mentioned
    assert mentioned & described == described


def test_every_option_exists() -> None:
    options = {
        name
        for command in cli.root.commands.values()
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("-")
    }
    mentioned = set(re.findall(r"(?<=[ `])(--[a-z][a-z-]+)", README))
    benchmarks = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    assert {option for option in mentioned - options if f'"{option}"' not in benchmarks} == set()


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", README, flags=re.M)) <= targets


def test_every_python_name_exists() -> None:
    for name in re.findall(r"evalkit\.([a-zA-Z_]+)\(", README):
        assert hasattr(evalkit, name), name


@pytest.mark.parametrize("command", cli.root.commands)
def test_help_has_an_example(command: str) -> None:
    text = cli.root.commands[command].help or ""
    assert f"evalkit {command}" in text or command == "demo"
    assert "\\b" not in text  # the two characters, which click would print
    for parameter in cli.root.commands[command].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{command} {parameter.name} has no help"
