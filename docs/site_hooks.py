"""What `make docs` adds to the pages of this folder: commands from their code, and the texts beside `docs/`.

mkdocs calls the functions ``on_...``; griffe, which reads the docstrings for mkdocstrings, the class.
"""

from __future__ import annotations

import inspect
import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

from evalkit.cli.root import VERBS, root

ROOT = Path(__file__).parent.parent
# Texts that stand beside docs/ because that is where people and GitHub look, and the pages they become.
BESIDE = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
_LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")
# What a browser loads by itself, unlike a link that is followed.
_LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc=["']?((?:https?:)?//[^"'\s>]+)|"""
    r"""<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|icon|preconnect))[^>]*\bhref=["']?((?:https?:)?//[^"'\s>]+)"""
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name anchors as GitHub does, and put the pages of commands into the navigation."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    (commands,) = (section["Commands"] for section in config.nav if "Commands" in section)
    commands += [{name: f"commands/{name}.md"} for name in sorted(VERBS)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each command, and the texts beside docs/."""
    with click.Context(root, info_name="evalkit") as context:
        pages = {"commands/index.md": _index(context)}
        for name in sorted(VERBS):
            command = root.get_command(context, name)
            assert command is not None
            pages[f"commands/{name}.md"] = "\n\n".join(_described(command, name, context))
    for text, page in BESIDE.items():
        if text != "README.md":  # index.md takes its place
            pages[page] = _LINK.sub(_from_root, (ROOT / text).read_text())
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links to the texts beside docs/ to their pages."""
    here = posixpath.dirname(page.file.src_uri)

    def led(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", here, match[1]))
        if target not in BESIDE:
            return match[0]
        return f"]({posixpath.relpath(BESIDE[target], here or '.')}{match[2] or ''})"

    return _LINK.sub(led, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that loads something from another host.

    Raises:
        PluginError: A page does.
    """
    for page in sorted(Path(config.site_dir).rglob("*.html")):
        for found in _LOADED.finditer(page.read_text()):
            raise PluginError(f"{page.relative_to(config.site_dir)} loads {found[1] or found[2]}")


class Docstrings(griffe.Extension):
    """Turns what docstrings have of reStructuredText into Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            text = re.sub(r":[a-z]+:`~?(?:[\w.]+\.)?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.M)


def _from_root(match: re.Match[str]) -> str:
    """A link of a text beside docs/, as its page has it; files that the site has not are only named."""
    target, anchor = match[1], match[2] or ""
    if target in BESIDE:
        return f"]({BESIDE[target]}{anchor})"
    return f"]({target.removeprefix('docs/')}{anchor})" if target.startswith("docs/") else "]"


def _index(context: click.Context) -> str:
    lines = ["# Commands", "", inspect.cleandoc(root.help or ""), "", "| command | does |", "|---|---|"]
    for name in sorted(VERBS):
        command = root.get_command(context, name)
        assert command is not None
        lines.append(f"| [`evalkit {name}`]({name}.md) | {command.get_short_help_str(limit=300)} |")
    return "\n".join([*lines, "", "`evalkit COMMAND --help` prints the same as these pages."])


def _described(command: click.Command, name: str, parent: click.Context, level: int = 1) -> Iterator[str]:
    """Title, usage, help and options of a command, then those of its subcommands."""
    context = click.Context(command, info_name=name, parent=parent)
    yield f"{'#' * level} evalkit {name if level == 1 else f'{parent.info_name} {name}'}"
    yield f"```\n{' '.join([context.command_path, *command.collect_usage_pieces(context)])}\n```"
    yield from _paragraphs(command.help or "")
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None and isinstance(parameter, click.Option):
            names, text = record
            text, _, notes = text.partition("  [")
            notes = f" ({notes.removesuffix(']')})" if notes else ""
            yield f"`{names}`\n:   {_with_links(text)}{notes}"
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            found = command.get_command(context, each)
            assert found is not None
            yield from _described(found, each, context, level + 1)


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a help text; what follows click's mark for "do not wrap" becomes a block of code."""
    for paragraph in re.split(r"\n[ \t]*\n", inspect.cleandoc(text)):
        if paragraph.startswith("\b"):
            title, *lines = paragraph.removeprefix("\b").strip("\n").splitlines()
            block = textwrap.dedent("\n".join(lines))
            yield f"{title}\n\n```\n{block}\n```"
        else:
            yield _with_links(paragraph)


def _with_links(text: str) -> str:
    """A text of the command line, where pages are named as files, with links to them."""
    return re.sub(r"\bdocs/([\w/-]+)\.md", r"[\1](../\1.md)", text)
