"""The README says what is there: its commands, options, Python and make targets exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import evalkit
from evalkit.cli import root as cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def all_commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command under its full name, such as ``reference list``."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{prefix}{name}", command
        if isinstance(command, click.Group):
            yield from all_commands(command, f"{prefix}{name} ")


COMMANDS = dict(all_commands(cli.root))


def test_every_command_is_described() -> None:
    mentioned = set(re.findall(r"evalkit ([a-z]+)\b", README))
    described = {name.split()[0] for name in COMMANDS}
    assert described <= mentioned
    assert mentioned & described == described


def test_every_option_exists() -> None:
    options = {
        name
        for command in COMMANDS.values()
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


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    text = COMMANDS[command].help or ""
    assert f"evalkit {command}" in text or command == "demo" or isinstance(COMMANDS[command], click.Group)
    assert "\\b" not in text  # the two characters, which click would print
    for parameter in COMMANDS[command].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{command} {parameter.name} has no help"
