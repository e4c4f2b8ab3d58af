"""Fidelity and diversity metrics of image generators, as the ADM reference evaluator computes them.

The main job, from Python::

    import evalkit

    comparison = evalkit.compare("ref.npz", "samples.npz")
    print(comparison["fid"])

Names are loaded when they are first used: ``import evalkit`` alone imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evalkit.comparison import Subset, compare, features_of
    from evalkit.errors import EvalkitError
    from evalkit.evaluator import Evaluator
    from evalkit.extractors.inception import Inception
    from evalkit.extractors.weights import load_weights
    from evalkit.features.extraction import extract
    from evalkit.features.record import Features
    from evalkit.images import ImageSource, open_images
    from evalkit.results import Comparison, Score, ScoreSpec
    from evalkit.several import Comparisons
    from evalkit.system.run import Run

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "Comparisons",
    "EvalkitError",
    "Evaluator",
    "Features",
    "ImageSource",
    "Inception",
    "Run",
    "Score",
    "ScoreSpec",
    "Subset",
    "compare",
    "extract",
    "features_of",
    "load_weights",
    "open_images",
]

_HOMES = {
    "Comparison": "results",
    "Comparisons": "several",
    "EvalkitError": "errors",
    "Evaluator": "evaluator",
    "Features": "features.record",
    "ImageSource": "images",
    "Inception": "extractors.inception",
    "Run": "system.run",
    "Score": "results",
    "ScoreSpec": "results",
    "Subset": "comparison",
    "compare": "comparison",
    "extract": "features.extraction",
    "features_of": "comparison",
    "load_weights": "extractors.weights",
    "open_images": "images",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"evalkit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'evalkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
