"""Completion in the shell, asked as the shells' scripts ask."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
from invoked import Result

from evalkit.cli.completion import VARIABLE
from evalkit.cli.root import VERBS, root
from evalkit.extractors import EXTRACTORS
from evalkit.metrics import METRICS
from evalkit.protocols import PROTOCOLS
from generation.samplers import SAMPLERS
from reference_batches.catalog import published_files

Run = Callable[..., Result]
Ask = Callable[[str], list[str]]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """What the Tab key offers at the end of a line: ``type,value`` as bash gets them."""

    def asked(line: str) -> list[str]:
        monkeypatch.setenv(VARIABLE, "bash_complete")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            root.main([], prog_name="evalkit", standalone_mode=False)
        out, err = capsys.readouterr()
        assert (exit_.value.code, err) == (0, "")
        return out.splitlines()

    return asked


def plain(*names: str) -> list[str]:
    return [f"plain,{name}" for name in names]


def test_commands_and_options(ask: Ask) -> None:
    assert set(ask("evalkit ")) == set(plain(*VERBS))
    assert ask("evalkit precis") == plain("precision-check")
    assert ask("evalkit reference f") == plain("fetch")
    assert ask("evalkit compare ref.npz --form") == plain("--format")
    assert ask("evalkit compare ref.npz --format ") == plain("table", "adm", "markdown", "json")
    assert ask("evalkit compare ref.npz --no-such") == [""]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("compare a b --protocol ", [*PROTOCOLS]),
        ("compare a b --protocol adm,clean", ["adm,clean-fid", "adm,clean-fid-legacy-pytorch"]),
        ("sweep --protocol adm,a", []),  # it is there already
        ("compare a b --metrics ", [*METRICS]),
        ("compare a b --metrics fid,k", ["fid,kid", "fid,kid_subsets"]),
        ("plan a b --metrics kid@pix", ["kid@pixels"]),
        ("sweep --metrics fid,fd@pix", ["fid,fd@pixels"]),
        ("compare a b --metrics fd@", [f"fd@{network}" for network in EXTRACTORS]),
        ("features a --network ", [*EXTRACTORS]),
        ("sample --sampler ", [*SAMPLERS]),
        ("compare imagenet25", ["imagenet256"]),
        ("compare a b imagenet25", ["imagenet256"]),
        ("sweep --reference imagenet25", ["imagenet256"]),
        ("reference fetch ", [*published_files()]),
        ("published cif", ["cifar10"]),
        ("reference list --dataset lsun_b", ["lsun_bedroom"]),
        ("curves runs/s --published cif", ["cifar10"]),
    ],
)
def test_names(line: str, expected: list[str], ask: Ask) -> None:
    files = [f"file,{line.rpartition(' ')[2]}"]
    assert ask(f"evalkit {line}") == (plain(*expected) or files)


@pytest.mark.parametrize(
    "line", ["compare ", "compare ref", "compare a b --json ", "compare a --runs b x", "checkpoint inspect x"]
)
def test_files_where_nothing_else_is_known(line: str, ask: Ask) -> None:
    assert ask(f"evalkit {line}") == [f"file,{line.rpartition(' ')[2]}"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str, run: Run) -> None:
    code, script, _ = run("completion", shell)
    assert code == 0
    assert f"_EVALKIT_COMPLETE={shell}_complete" in script
    assert ('string split --max 1 ","' in script) == (shell == "fish")  # for lists with commas
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"needs {shell} to check the syntax of its script")
    done = subprocess.run([program, "-n"], input=script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_bash_keeps_a_metric_and_its_network_together(run: Run) -> None:
    """As bash itself splits the line; it takes @ for the end of a word otherwise."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    script = run("completion", "bash").out + 'echo "$COMP_WORDBREAKS"'
    done = subprocess.run([bash, "-i"], input=script, capture_output=True, text=True)
    if "=" not in done.stdout:
        pytest.skip("this bash has no completion")
    assert "@" not in done.stdout


def test_completion_loads_no_torch() -> None:
    code = (
        "import os, sys\nfrom evalkit.cli.root import main\nsys.argv = ['evalkit']\n"
        "os.environ |= {'_EVALKIT_COMPLETE': 'bash_complete', 'COMP_CWORD': '2',\n"
        "               'COMP_WORDS': 'evalkit compare imagenet25'}\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'tensorflow', 'scipy', 'h5py', 'PIL', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["plain,imagenet256", "[]"]
