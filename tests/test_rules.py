"""Rules of the house: who may import whom, what is public, what the command line may load."""

from __future__ import annotations

import ast
import graphlib
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evalkit
from evalkit.cli.root import VERBS
from evalkit.extractors import EXTRACTORS
from evalkit.images import FORMATS
from evalkit.metrics import METRICS
from evalkit.protocols import PROTOCOLS
from generation.samplers import SAMPLERS

ROOT = Path(__file__).parent.parent
PACKAGES = ("evalkit", "reference_batches", "generation")
MODULES = sorted(
    module.name
    for package in PACKAGES
    for module in pkgutil.walk_packages([str(ROOT / package)], prefix=f"{package}.")
    if not module.name.endswith("__main__")
)

# What each room may import of ours, by prefix; evalkit.errors is open to all.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "evalkit.errors": (),
    "evalkit.system": ("evalkit.system", "evalkit.__version__"),
    "evalkit.pairs": (),
    "evalkit.batches": (),
    "evalkit.results": ("evalkit.batches", "evalkit.pairs", "evalkit.system.records"),
    "evalkit.several": ("evalkit.pairs", "evalkit.results", "evalkit.system.records"),
    "evalkit.comparability": ("evalkit.batches", "evalkit.results"),
    "evalkit.deviations": (),
    "evalkit.layouts": (),
    "evalkit.uncertainty": ("evalkit.deviations", "evalkit.pairs"),
    "evalkit.images": ("evalkit.images", "evalkit.layouts", "evalkit.system"),
    "evalkit.extractors": ("evalkit.extractors", "evalkit.system"),
    "evalkit.features": (
        "evalkit.features",
        "evalkit.extractors",
        "evalkit.images",
        "evalkit.layouts",
        "evalkit.system",
    ),
    "evalkit.metrics": (
        "evalkit.metrics",
        "evalkit.deviations",
        "evalkit.extractors",
        "evalkit.features",
        "evalkit.results",
        "evalkit.system",
    ),
    "evalkit.protocols": ("evalkit.protocols", "evalkit.metrics"),
    "evalkit.comparison": (
        "evalkit.comparison",
        "evalkit.batches",
        "evalkit.deviations",
        "evalkit.extractors",
        "evalkit.features",
        "evalkit.images",
        "evalkit.metrics",
        "evalkit.pairs",
        "evalkit.protocols",
        "evalkit.report.image_grid",
        "evalkit.results",
        "evalkit.several",
        "evalkit.system",
        "evalkit.uncertainty",
    ),
    # As the command lines, it knows what the name of a published batch stands for.
    "evalkit.evaluator": (
        "evalkit.evaluator",
        "evalkit.batches",
        "evalkit.comparison",
        "evalkit.extractors",
        "evalkit.features",
        "evalkit.images",
        "evalkit.metrics",
        "evalkit.results",
        "evalkit.system",
        "reference_batches.fetch",
    ),
    "evalkit.integrations": ("evalkit.integrations", "evalkit.evaluator", "evalkit.results"),
    "evalkit.report": (
        "evalkit.report",
        "evalkit.batches",
        "evalkit.comparability",
        "evalkit.pairs",
        "evalkit.results",
        "evalkit.several",
        "evalkit.system.files",
        "evalkit.system.storage",
    ),
    "evalkit.verify": ("evalkit.extractors", "evalkit.metrics"),
    # The command lines know what the name of a published batch stands for, and what was published on it.
    "evalkit.cli": (
        "evalkit",
        "reference_batches.catalog",
        "reference_batches.fetch",
        "reference_batches.published",
    ),
    "evalkit": ("evalkit",),
    "reference_batches": (
        "reference_batches",
        "evalkit.extractors.base",
        "evalkit.features",
        "evalkit.images",
        "evalkit.layouts",
        "evalkit.report.image_grid",
        "evalkit.results",
        "evalkit.system",
    ),
    "reference_batches.cli": (
        "reference_batches",
        "evalkit.cli",
        "evalkit.layouts",
        "evalkit.report.image_grid",
        "evalkit.system",
    ),
    "generation": ("generation", "evalkit.images", "evalkit.report.image_grid", "evalkit.system"),
    "generation.networks": ("generation.networks", "evalkit.system.devices"),
    # A sampler knows what it is called with, and nothing of settings, networks or runs.
    "generation.samplers": (
        "generation.samplers",
        "generation.denoisers",
        "generation.guidance",
        "generation.noise",
        "evalkit.system.records",
    ),
    "generation.cli": (
        "generation",
        "evalkit.cli",
        "evalkit.comparison.plan",
        "evalkit.images",
        "evalkit.protocols",
        "evalkit.report",
        "evalkit.system",
    ),
    "generation.sweep": ("generation", "evalkit"),
    "generation.demo": ("generation", "evalkit"),
}


def imports_of(module: str, *, for_types: bool = True) -> set[str]:
    path = ROOT / Path(*module.split("."))
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    names = set()
    tree = ast.parse(source)
    if not for_types:
        tree.body = [node for node in tree.body if not _is_for_types(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; the house writes absolute imports"
            package = node.module or ""
            # What is a package's own is named with it.
            names |= {f"{package}.{alias.name}" for alias in node.names} if package in PACKAGES else {package}
    return {name for name in names if name.split(".")[0] in PACKAGES}


def _is_for_types(node: ast.stmt) -> bool:
    test = node.test if isinstance(node, ast.If) else None
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


@pytest.mark.parametrize("module", MODULES)
def test_import_directions(module: str) -> None:
    home = max((prefix for prefix in MAY_IMPORT if within(module, prefix)), key=len)
    allowed = ("evalkit.errors", *MAY_IMPORT[home])
    wrong = {name for name in imports_of(module) if not any(within(name, prefix) for prefix in allowed)}
    assert not wrong, f"{module} (rules of {home}) may not import {sorted(wrong)}"


def test_no_import_circle() -> None:
    """Those of functions count, too: only what is for the type checker alone does not."""
    by_length = sorted(MODULES, key=len, reverse=True)
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        known = imports_of(module, for_types=False)
        found = {next((each for each in by_length if within(name, each)), name) for name in known}
        graph[module] = found - {module, *PACKAGES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"these import each other in a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", MODULES)
def test_nobody_imports_a_command_line(module: str) -> None:
    command_lines = {"evalkit.cli.root", "reference_batches.cli", "generation.cli"}
    outside = {line for line in command_lines if not within(module, line)}
    assert not {name for name in imports_of(module) if any(within(name, line) for line in outside)}


TABLES = {
    "EXTRACTORS": EXTRACTORS,
    "FORMATS": FORMATS,
    "METRICS": METRICS,
    "PROTOCOLS": PROTOCOLS,
    "SAMPLERS": SAMPLERS,
    "VERBS": VERBS,
}


@pytest.mark.parametrize("table", TABLES)
def test_rows_are_lazy_and_exist(table: str) -> None:
    for name, row in TABLES[table].items():
        module, _, attribute = row.partition(":")
        assert hasattr(importlib.import_module(module), attribute), f"{table}[{name!r}] = {row!r}"


MOST_LINES = 400
LONG = re.compile(r"\bone (long )?(file|piece)\b", re.IGNORECASE)


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_long_without_a_reason(module: str) -> None:
    path = ROOT / Path(*module.split("."))
    lines = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text().splitlines()
    assert len(lines) <= MOST_LINES or LONG.search(lines[0]), f"{module}: {len(lines)} lines"


@pytest.mark.parametrize("module", [*PACKAGES, *MODULES])
def test_exports_are_sorted_and_exist(module: str) -> None:
    loaded = importlib.import_module(module)
    exported = getattr(loaded, "__all__", [])
    assert [name for name in exported if not hasattr(loaded, name)] == []
    classes_last = sorted(exported, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert list(exported) in (sorted(exported), classes_last)


def test_public_names_are_documented() -> None:
    for name in evalkit.__all__:
        assert getattr(evalkit, name).__doc__, name
    assert set(evalkit.__all__) <= set(dir(evalkit))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = evalkit.nonsense


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_waiting_threads_sleep_soon(given: dict[str, str], expected: str | None) -> None:
    """As OpenMP itself says that it understood it."""
    code = (
        "import sys\nfrom evalkit.cli.root import main\nsys.argv = ['evalkit', '--version']\n"
        "try:\n    main()\nexcept SystemExit:\n    import os, torch\n"
        "print(os.environ.get('OPENBLAS_THREAD_TIMEOUT'))\n"
    )
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OPENBLAS_THREAD_TIMEOUT")
    environment = {key: value for key, value in os.environ.items() if key not in names} | given
    environment["OMP_DISPLAY_ENV"] = "verbose"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ("None" if "OMP_WAIT_POLICY" in given else "10")
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if found is None:
        pytest.skip("torch was built with another OpenMP than GNU's")
    assert found[1] == expected if expected else int(found[1]) > 1000


# Before anything of ours is imported.
NOT_INSTALLED = """
import importlib.metadata as metadata
found = metadata.version
def version(name):
    if name == "evalkit":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
"""
WINDOWS = """
import os, signal, sys
sys.modules["fcntl"] = sys.modules["resource"] = sys.modules["pwd"] = None
import torch, numpy, h5py
for module, names in (
    (os, "sysconf sysconf_names pread pwrite fork getuid geteuid sched_getaffinity posix_fallocate"),
    (signal, "SIGKILL SIGHUP SIGUSR1 SIGALRM"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
"""


@pytest.mark.parametrize("system", [NOT_INSTALLED, WINDOWS], ids=["not installed", "Windows"])
def test_commands_on_other_systems(system: str, tmp_path: Path) -> None:
    """Without the package's metadata, as with PYTHONPATH alone; without what only POSIX has."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "t.npz", rng.integers(0, 256, (10, 8, 8, 3), np.uint8), np.arange(10))
    model = str(ROOT / "generation" / "models" / "digits_diffusion.safetensors")
    commands = [
        ["--version"],
        ["sample", "--model", model, "-n", "2", "--respacing", "3", "--out", "run"],
        [
            "train",
            "diffusion",
            "t.npz",
            "--recipe",
            "digits_diffusion",
            "--steps",
            "1",
            "--batch-size",
            "2",
            "--out",
            "trained",
        ],
        ["reference", "build", "t.npz", "-o", "ref.npz", "--size", "8", "--statistics", "none"],
    ]
    code = f"""{system}
import importlib
for name in {MODULES}:
    importlib.import_module(name)
sys = importlib.import_module("sys")
from evalkit.cli.root import main
for command in {commands}:
    sys.argv = ["evalkit", *command]
    try:
        main()
    except SystemExit as end:
        assert not end.code, command
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert f"evalkit, version {evalkit.__version__}" in done.stdout
    assert (tmp_path / "run" / "samples_2x8x8x3.npz").exists()
    assert (tmp_path / "trained" / "digits_diffusion.safetensors").exists()
    assert (tmp_path / "ref.npz").exists()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom evalkit.cli.root import main\nsys.argv = ['evalkit', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'tensorflow', 'numpy', 'scipy', 'h5py', 'PIL', 'cattrs', 'fsspec', 'ray'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "compare" in done.stdout
