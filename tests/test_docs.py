"""The texts are true: their commands, options, files, links and names exist, and their examples run."""

from __future__ import annotations

import importlib
import pkgutil
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from numpy.typing import NDArray
from stand_ins import NO_STORE, InceptionPixels

import evalkit
from evalkit.cli import root as cli
from evalkit.comparison import compare, features_of
from evalkit.errors import UndefinedMetricError
from evalkit.extractors import EXTRACTORS
from evalkit.extractors.pixels import Pixels
from evalkit.features.record import BatchFeatures
from evalkit.layouts import LAYOUTS
from evalkit.metrics import METRICS
from evalkit.protocols import PROTOCOLS
from evalkit.report.text import markdown, sweep_table, table
from evalkit.results import Comparison, Point, Sweep
from generation.samplers import SAMPLERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
# The CHANGELOG names what is gone.
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [
        ROOT / "README.md",
        ROOT / "ARCHITECTURE.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/**/*.md"),
    ]
}
PAGES = {name.removeprefix("docs/"): text for name, text in TEXTS.items() if name.startswith("docs/")}
EXTRAS = {*tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]}
SITE = (ROOT / "mkdocs.yml").read_text()
TORCHRUN = {"--no-python", "--nproc-per-node"}
SLURM = {f"--{each}" for each in ("cpus-per-task", "exclude", "exclusive", "gpus-per-node", "nodelist")}
SLURM |= {
    f"--{each}" for each in ("nodes", "ntasks", "ntasks-per-node", "all-ip-addresses")
}  # and hostname's
RAY = {
    "--address",
    "--block",
    "--generate",
    "--head",
    "--min-nodes",
    "--node-ip-address",
    "--num-cpus",
    "--port",
}
# pip's, click's, and one of the published scripts'.
OTHER_OPTIONS = TORCHRUN | SLURM | RAY | {"--no-deps", "--help", "--use_fp16"}


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


def options_of(*commands: click.Command) -> set[str]:
    return {
        name
        for command in commands
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("-")
    }


def blocks(text: str, language: str = "") -> list[str]:
    """Fenced blocks of code."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


def command_lines(text: str) -> Iterator[list[str]]:
    """What follows ``evalkit`` in every line of code, in a block or within a sentence."""
    lines = [line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    for line in lines + re.findall(r"`([^`\n]+)`", prose):
        found = re.search(r"(?:^|[ /])evalkit ([a-z].*)", line)
        if found and not re.fullmatch(r"evalkit [a-z]+ [0-9]+", line):  # the name of a file format
            yield shlex.split(found[1], comments=True)


def test_every_command_is_described() -> None:
    mentioned = set(re.findall(r"evalkit ([a-z]+(?:-[a-z]+)*)\b", README))
    described = {name.split()[0] for name in COMMANDS}
    assert described <= mentioned
    assert mentioned & described == described


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_line_is_understood(name: str) -> None:
    for words in command_lines(TEXTS[name]):
        full = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in COMMANDS), None)
        assert full, f"evalkit {' '.join(words)}"
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= options_of(COMMANDS[full]), f"evalkit {' '.join(words)}"


@pytest.mark.parametrize("name", TEXTS)
def test_every_option_exists(name: str) -> None:
    mentioned = set(re.findall(r"(?<=[ `])(--[a-z][a-z0-9_-]+)", TEXTS[name]))
    benchmarks = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    unknown = mentioned - options_of(*COMMANDS.values()) - OTHER_OPTIONS
    assert {option for option in unknown if f'"{option}"' not in benchmarks} == set()


@pytest.mark.parametrize("name", TEXTS)
def test_every_make_target_exists(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", TEXTS[name], flags=re.M)) <= targets


@pytest.mark.parametrize("name", TEXTS)
def test_every_python_name_exists(name: str) -> None:
    for public in re.findall(r"evalkit\.([a-zA-Z_]+)\(", TEXTS[name]):
        assert hasattr(evalkit, public), public


@pytest.mark.parametrize("name", TEXTS)
def test_every_file_exists(name: str) -> None:
    named = re.findall(
        r"`((?:evalkit|generation|reference_batches|tests|benchmarks|docs)/[\w./-]*)`", TEXTS[name]
    )
    missing = [path for path in named if not re.search("NAME|ROW", path) and not (ROOT / path).exists()]
    assert missing == []


@pytest.mark.parametrize("name", [*TEXTS, "CHANGELOG.md"])
def test_every_link_leads_somewhere(name: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", (ROOT / name).read_text()):
        file = (ROOT / name).parent / target if target else ROOT / name
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.M)
            slugs = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{target}#{anchor}"


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"([\w/-]+\.md)$", SITE.partition("\nnav:\n")[2], flags=re.M)
    # docs/site_hooks.py makes these.
    made = {"commands/index.md", "architecture.md", "changelog.md", "contributing.md"}
    assert sorted({*listed} - made) == sorted(PAGES)
    assert made <= {*listed}
    assert len(listed) == len({*listed})


ROWS = [
    *(("every-metric.md", f"## `{name}`\n") for name in METRICS),
    *(("networks.md", f"`{name}`") for name in EXTRACTORS),
    *(("protocols.md", f"`{name}`") for name in PROTOCOLS),
    *(("generation.md", f"{name}`") for name in SAMPLERS),
    *(("reference_batches.md", f"`{name}`") for name in LAYOUTS),
    *(("installation.md", f"| `{name}` |") for name in sorted(EXTRAS - {"dev", "docs"})),
]


@pytest.mark.parametrize(("page", "row"), ROWS)
def test_every_row_is_described(page: str, row: str) -> None:
    assert row in PAGES[page]


def test_every_file_format_is_described() -> None:
    formats: dict[str, int] = {}
    for package in ("evalkit", "generation", "reference_batches"):
        for file in (ROOT / package).rglob("*.py"):
            for name, number in re.findall(r'"(evalkit [a-z]+) ([0-9]+)"', file.read_text()):
                formats[name] = max(int(number), formats.get(name, 0))
    assert len(formats) > 10
    for name, number in formats.items():
        assert f"`{name} {number}`" in PAGES["file-formats.md"]


def test_every_public_name_is_in_the_python_api() -> None:
    api = "".join(text for name, text in PAGES.items() if name.startswith("api/"))
    assert {name for name in evalkit.__all__ if not re.search(rf"\bevalkit\.{name}\b", api)} == set()
    for described in re.findall(r"^::: (.*)$", api, flags=re.M):
        assert pkgutil.resolve_name(described).__doc__


def test_the_site_asks_no_other_host() -> None:
    """`make docs` looks at every page that it has made."""
    assert re.search(r"^  font: false$", SITE, flags=re.M)
    assert not re.search("analytics|https?://", SITE)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    text = COMMANDS[command].help or ""
    assert f"evalkit {command}" in text or command == "demo" or isinstance(COMMANDS[command], click.Group)
    assert "\\b" not in text  # the two characters, which click would print
    for parameter in COMMANDS[command].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{command} {parameter.name} has no help"


def test_the_python_of_the_readme_runs(
    images: NDArray[np.uint8],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(EXTRACTORS, "inception", "stand_ins:InceptionPixels")
    monkeypatch.chdir(tmp_path)
    np.savez("ref.npz", images[:30])
    for name in ("samples", "a", "b"):
        np.savez(f"{name}.npz", images[30:])
    (snippet,) = blocks(README, "python")
    exec(compile(snippet, "README.md", "exec"), {})
    expected = compare(images[:30], images[30:], run=NO_STORE)
    assert capsys.readouterr().out.startswith(f"{expected['fid']} {expected['precision']}\n")
    assert list(tmp_path.glob("features/*/*.h5"))


@pytest.fixture
def mean_distance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The metric of CONTRIBUTING in a file of its own, with its row in the table."""
    (source,) = blocks(CONTRIBUTING, "python")
    (tmp_path / "mean_distance_of_contributing.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METRICS, "mean_distance", "mean_distance_of_contributing:MeanDistance")
    yield importlib.import_module("mean_distance_of_contributing").MeanDistance
    del sys.modules["mean_distance_of_contributing"]


def test_the_metric_of_contributing_works(mean_distance: Any, images: NDArray[np.uint8]) -> None:
    sides = images[:30], images[30:]
    extractors = [InceptionPixels(), Pixels()]
    names = ["mean_distance", "mean_distance@pixels"]
    comparison = compare(*sides, metrics=["fid", *names], extractor=extractors, run=NO_STORE)
    a, b = (Pixels()(side)["pool"].astype(np.float64).mean(axis=0) for side in sides)
    expected = float(np.sqrt(((a - b) ** 2).sum()))
    assert expected > 0
    assert [comparison[name] for name in names] == pytest.approx([expected, expected], rel=1e-12)
    by_object = compare(*sides, metrics=mean_distance(), extractor=extractors, run=NO_STORE)
    assert by_object["mean_distance"] == comparison["mean_distance"]


@pytest.mark.usefixtures("mean_distance")
def test_the_metric_of_contributing_is_in_every_report(images: NDArray[np.uint8]) -> None:
    comparison = compare(
        images[:30], images[30:], metrics="mean_distance", extractor=InceptionPixels(), run=NO_STORE
    )
    shown = f"{comparison['mean_distance']:.4f}"
    sweep = Sweep(name="x", points=(Point(scale=0.0, comparison=comparison),))
    for report in (table(comparison), markdown(comparison), sweep_table(sweep)):
        assert "Mean distance" in report
        assert shown in report
    assert (
        sweep.to_csv().splitlines()[0]
        == "scale,fid,sfid,inception_score,precision,recall,mean_distance,samples"
    )
    assert Comparison.from_json(comparison.to_json()) == comparison


def test_the_metric_of_contributing_refuses_statistics(mean_distance: Any, images: NDArray[np.uint8]) -> None:
    features = features_of(images, extractor=InceptionPixels(), run=NO_STORE)
    with pytest.raises(UndefinedMetricError, match="no pool features"):
        mean_distance()(*[BatchFeatures.of(features.select(["spatial"]))] * 2, NO_STORE)
