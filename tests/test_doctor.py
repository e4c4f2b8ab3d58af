"""`evalkit doctor` sees what is there, says what brings the rest, and never fails itself."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from invoked import Result
from numpy.typing import NDArray

from evalkit import doctor
from evalkit.doctor import Finding, examine
from evalkit.extractors import EXTRACTORS, extractor_class
from evalkit.extractors.base import HasWeights
from evalkit.extractors.inception import Inception
from evalkit.extractors.weights import InceptionWeights

Run = Callable[..., Result]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Inception: its weights are not read, and no picture goes through it."""
    monkeypatch.setattr(doctor, "_self_check", lambda: iter(()))
    monkeypatch.setitem(EXTRACTORS, "inception", "evalkit.extractors.pixels:Pixels")
    for network in EXTRACTORS:
        if network.startswith("inception_"):
            monkeypatch.setitem(EXTRACTORS, network, "evalkit.extractors.pixels:Pixels")


def findings(part: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine() if finding.part == part}


@pytest.mark.usefixtures("inception_weights")
def test_a_good_installation(run: Run) -> None:
    code, out, err = run("doctor", "--format", "json")
    assert (code, err) == (0, "")
    content = json.loads(out)
    assert content["format"] == "evalkit doctor 1"
    assert content["ok"] is True
    by_name = {finding["name"]: finding for finding in content["findings"]}
    assert by_name["torch"]["detail"] == importlib.metadata.version("torch")
    inception = next(finding for name, finding in by_name.items() if name.startswith("inception,"))
    assert inception["state"] == "ok"
    assert inception["remedy"] == "evalkit weights --fetch"  # the wheel has no head
    check = by_name["Inception's features"]
    assert check["state"] == "ok"
    assert "allowed 2e-04" in check["detail"]


def test_a_wrong_network_is_noticed(
    run: Run, inception_weights: InceptionWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Inception.__call__

    def wrong(self: Inception, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        found = forward(self, images)
        return {**found, "spatial": found["spatial"] + np.float32(1e-3)}

    monkeypatch.setattr(doctor, "SELF_CHECK", ((32, 32),))
    monkeypatch.setattr(Inception, "__call__", wrong)
    code, out, _ = run("doctor")
    assert code == 1
    assert "  WRONG   Inception's features: " in out
    assert out.splitlines()[-1] == "1 of these are WRONG: Inception's features"


def test_no_weights(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVALKIT_WEIGHTS", str(tmp_path / "none.pth"))
    code, out, err = run("doctor")
    assert (code, err) == (1, "")
    lines = out.splitlines()
    line = next(i for i, line in enumerate(lines) if line.startswith("  WRONG   inception,"))
    assert lines[line + 1].strip() == "evalkit weights --fetch"
    assert "  note    Inception's features: not checked, as there are no usable weights" in lines


@pytest.mark.usefixtures("quick")
def test_what_is_broken_does_not_hide_the_rest(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise RuntimeError("the driver is older than\nthe library")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    code, out, err = run("doctor")
    assert (code, err) == (1, "")
    assert "  WRONG   device: RuntimeError: the driver is older than\\nthe library" in out
    assert "\nweights\n" in out
    assert "\nstorage\n" in out


@pytest.mark.usefixtures("quick")
def test_weights_of_other_networks(own_cache: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    file = own_cache / "weights" / "dinov2_vitb14_pretrain.pth"
    absent = findings("weights")["dinov2_vitb14"]
    assert absent.state == "absent"
    assert absent.remedy.split() == [
        "curl",
        "--location",
        "--create-dirs",
        "--output",
        str(file),
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    ]
    file.parent.mkdir()
    file.write_bytes(b"version https://git-lfs")
    damaged = findings("weights")["dinov2_vitb14"]
    assert (damaged.state, damaged.remedy) == ("note", absent.remedy)
    assert "Git LFS pointer" in damaged.detail
    torch.save({"cls_token": torch.zeros(3)}, file)
    there = findings("weights")["dinov2_vitb14"]
    assert (there.state, there.remedy) == ("ok", "")
    assert str(file) in there.detail
    monkeypatch.setenv("EVALKIT_WEIGHTS_DINOV2_VITB14", str(own_cache / "none"))
    named = findings("weights")["dinov2_vitb14"]
    assert named.state == "note"
    assert "EVALKIT_WEIGHTS_DINOV2_VITB14" in named.detail
    code, out, _ = run("doctor")
    assert code == 0  # nothing of it is needed
    assert out.splitlines()[-1] == "Everything that evalkit needs is here."
    shared = next(name for name in findings("weights") if name.startswith("dinov2_vitl14, "))
    assert "dinov2_vitl14_dgm_eval" in shared.split(", ")


def test_every_network_with_weights_tells_where_they_are() -> None:
    for network in EXTRACTORS:
        row = extractor_class(network)
        assert hasattr(row, "weights_record") == isinstance(row, HasWeights), network


REQUIRES = [
    "numpy>=1.26",
    "no-such-package>=2,<3",
    'pyarrow>=15; extra == "parquet"',
    'no-such-reader>=1; extra == "reader"',
    'no-such-weights==0.1.3; extra == "weights"',
    'evalkit[plot]; extra == "demo"',
    'also-not; extra == "demo"',
    'no-such-linter; extra == "dev"',
    'no-such-marked; python_version < "3.15" and extra == "marked"',
]


@pytest.mark.usefixtures("quick")
def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRES)
    needed = findings("packages")
    assert needed["numpy"].state == "ok"
    assert needed["numpy"].detail == np.__version__
    assert needed["no-such-package"].state == "wrong"
    assert needed["no-such-package"].remedy == "pip install 'no-such-package>=2,<3'"
    assert not {"pyarrow", "no-such-reader"} & needed.keys()
    extras = findings("optional parts")
    assert extras.keys() == {"parquet", "reader", "weights", "demo", "marked"}
    assert extras["reader"].state == "absent"
    assert extras["reader"].remedy == "pip install 'evalkit[reader]'"
    assert extras["weights"].remedy == "pip install --no-deps no-such-weights==0.1.3"
    assert extras["demo"].detail == "also-not (not installed)"


@pytest.mark.usefixtures("quick")
def test_an_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy>=99.1", "torch>=2"])
    needed = findings("packages")
    assert needed["numpy"].state == "wrong"
    assert needed["numpy"].detail == f"{np.__version__}, not >=99.1"
    assert needed["numpy"].remedy == "pip install 'numpy>=99.1'"
    assert needed["torch"].state == "ok"


@pytest.mark.usefixtures("quick")
def test_a_checkout_that_is_not_installed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    code, out, _ = run("doctor")
    assert code == 0
    assert "pip install --editable " in out


@pytest.mark.usefixtures("quick")
def test_storage(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_cache / "features" / "a").mkdir(parents=True)
    (own_cache / "features" / "a" / "0-512.h5").write_bytes(bytes(30_000_000))
    found = findings("storage")
    assert found["cache"].state == "ok"
    assert found["cache/features"].detail == "0.03 GB in 1 files"
    monkeypatch.setenv("EVALKIT_CACHE", str(own_cache / "features" / "a" / "0-512.h5" / "cache"))
    assert findings("storage")["cache"].state == "wrong"
    monkeypatch.setenv("EVALKIT_CACHE", str(own_cache / "new" / "cache"))
    assert findings("storage")["cache"].state == "ok"
    assert not (own_cache / "new").exists()


@pytest.mark.usefixtures("quick")
def test_a_password_is_not_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVALKIT_MIRROR", "https://someone:secret@mirror.example/batches")
    out = run("doctor").out
    assert "mirror.example/batches" in out
    assert "secret" not in out
