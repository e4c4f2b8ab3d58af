"""Completion in the shell: what may follow on a command line, and the script that asks for it.

A key press waits for these functions, so they load names alone: no torch, no metric, no network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
)

from evalkit.extractors import EXTRACTORS
from evalkit.metrics import METRICS

__all__ = ["Completer", "batches", "completion", "datasets", "metrics", "names_of", "one_of", "several_of"]

Completer: TypeAlias = Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]
"""What click calls with what is written so far; it gives the words that may be meant."""

VARIABLE = "_EVALKIT_COMPLETE"
"""What the script sets to ask; its name is click's choice."""

# Otherwise bash takes `fd@pixels` for two words, and asks for the second alone. npm's script does the same.
_BASH = "COMP_WORDBREAKS=${COMP_WORDBREAKS//@/}\n"


def one_of(names: Iterable[str]) -> Completer:
    """Offers these names."""
    known = list(names)
    return lambda _context, _parameter, written: _items(known, written)


def several_of(names: Iterable[str]) -> Completer:
    """Offers these names for the last part of a list with commas."""
    known = list(names)
    return lambda _context, _parameter, written: _in_list(known, written)


def metrics(context: click.Context, parameter: click.Parameter, written: str) -> list[CompletionItem[str]]:
    """Offers metrics in a list with commas, and networks after ``@``."""
    del context, parameter
    name, at, _ = written.rpartition(",")[2].partition("@")
    return _in_list([f"{name}@{each}" for each in EXTRACTORS] if at else METRICS, written)


def batches(context: click.Context, parameter: click.Parameter, written: str) -> list[CompletionItem[str]]:
    """Offers published batches and statistics once something is written: sixty names would hide the files."""
    return names_of(context, parameter, written) if written else []


def names_of(context: click.Context, parameter: click.Parameter, written: str) -> list[CompletionItem[str]]:
    """Offers published batches and statistics."""
    del context, parameter
    from reference_batches.catalog import published_files

    return _items(published_files(), written)


def datasets(context: click.Context, parameter: click.Parameter, written: str) -> list[CompletionItem[str]]:
    """Offers datasets on which something was published."""
    del context, parameter
    from reference_batches.published import all_rows

    return _items(dict.fromkeys(row.dataset for row in all_rows()), written)


def _in_list(names: Iterable[str], written: str) -> list[CompletionItem[str]]:
    before, comma, _ = written.rpartition(",")
    there = before.split(",")
    return _items([f"{before}{comma}{name}" for name in names if name not in there], written)


def _items(names: Iterable[str], written: str) -> list[CompletionItem[str]]:
    return [CompletionItem(name) for name in names if name.startswith(written)]


class _OrFiles(ShellComplete):
    """Where nothing else is known, files: most arguments are paths, which click cannot tell."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        files = [] if incomplete.startswith("-") else [CompletionItem(incomplete, type="file")]
        return super().get_completions(args, incomplete) or files


class _Bash(_OrFiles, BashComplete):
    def source(self) -> str:
        return f"{_BASH}{super().source()}"


class _Zsh(_OrFiles, ZshComplete):
    pass


class _Fish(_OrFiles, FishComplete):
    def source(self) -> str:
        # The type ends at the first comma, and a list has more of them.
        return super().source().replace('string split ","', 'string split --max 1 ","')


SHELLS = {"bash": _Bash, "zsh": _Zsh, "fish": _Fish}
for _shell in SHELLS.values():
    add_completion_class(_shell)


@click.command(short_help="Print the completion script for your shell.")
@click.argument("shell", type=click.Choice(list(SHELLS)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that lets the Tab key complete commands, options and names in SHELL.

    It also completes the names of metrics, protocols, networks, samplers and published batches.

    \b
    Example:
      evalkit completion bash >> ~/.bashrc
      evalkit completion zsh >> ~/.zshrc    # below the line with compinit
      evalkit completion fish > ~/.config/fish/completions/evalkit.fish
    """
    click.echo(SHELLS[shell](context.find_root().command, {}, "evalkit", VARIABLE).source(), nl=False)
