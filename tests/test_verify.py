"""`evalkit verify` shows what it claims, and fails when it should."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from inception_graphdef import build_graph, standin_head
from invoked import Result
from optional import optional

from evalkit import verify as verify_module
from evalkit.extractors.inception import Inception
from evalkit.extractors.inception_graph import InceptionGraph
from evalkit.extractors.weights import InceptionWeights
from evalkit.verify import SIZES, pictures, verify

Invoke = Callable[..., Result]


@pytest.fixture(scope="module")
def graph_file(inception_weights: InceptionWeights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    optional("tensorflow", "tensorflow")
    path = tmp_path_factory.mktemp("graph") / "graph.pb"
    return build_graph(path, inception_weights.convolutions, standin_head())


def test_recorded_features_are_tensorflows(graph_file: Path) -> None:
    """To record them anew, write ``computed`` with ``np.savez_compressed``."""
    with InceptionGraph(graph_file) as graph:
        computed = {
            f"{layer}_{height}x{width}": values
            for height, width in SIZES
            for layer, values in graph(pictures(height, width, 1)).items()
        }
    with np.load(str(files("evalkit") / "verify_features.npz"), allow_pickle=False) as recorded:
        assert set(recorded) == set(computed)
        for name, values in computed.items():
            np.testing.assert_allclose(recorded[name], values, rtol=0, atol=5e-5)


@pytest.mark.usefixtures("torchvision_stand_in")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_everything_agrees(run: Invoke, graph_file: Path) -> None:
    pytest.importorskip("torch_fidelity", exc_type=ImportError)
    result = run("verify", "--graph", graph_file)
    assert result.code == 0, result
    lines = result.out.splitlines()
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert len(lines) == 9
    assert lines[-1] == "All checks that could run passed."


def test_a_wrong_network_is_noticed(
    run: Invoke, inception_weights: InceptionWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Inception.__call__
    monkeypatch.setattr(
        Inception, "__call__", lambda self, images: {k: v + 0.001 for k, v in forward(self, images).items()}
    )
    monkeypatch.setattr(verify_module, "SIZES", SIZES[:2])
    result = run("verify")
    assert result.code == 2
    assert "FAILED   features against TensorFlow's, recorded" in result.out
    assert "does not reproduce" in result.err


def test_a_wrong_metric_is_noticed(
    inception_weights: InceptionWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "SIZES", SIZES[:1])
    monkeypatch.setattr(verify_module, "frechet_distance", lambda a, b: 3.0)
    failed = [check.name for check in verify() if check.passed is False]
    assert failed == ["Fréchet distance against SciPy's sqrtm"]


def test_pictures_are_the_same_everywhere() -> None:
    images = pictures(20, 30)
    assert images.shape == (2, 20, 30, 3)
    assert images.dtype == np.uint8
    assert images.std() > 40
    assert int(images.astype(np.int64).sum()) == PICTURES_SUM


PICTURES_SUM = 455_588
