"""Stages of acceptance.py: scores with their error bars, on CUDA against the CPU; precision and recall."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from results import CUDA, features, guarded, largest_relative, reduced, report
from stand_ins import batch

from evalkit.deviations import Deviations
from evalkit.features.record import BatchFeatures
from evalkit.metrics import named
from evalkit.metrics.precision_recall import precision_recall
from evalkit.system.run import Run

METRICS = ("fid", "sfid", "inception_score", "kid", "precision_recall")

ROWS, WIDE = 2500, 2048
CLASSES = 1008


def main() -> None:
    """Values, standard errors and influence values on both devices; seconds for 50,000 against 50,000."""
    of_both(reduced(ROWS, 400), METRICS)
    seconds(reduced(50_000, 400), METRICS)


def sides(n: int) -> list[dict[str, NDArray[np.float32]]]:
    """Synthetic features as of Inception, for n images of the reference and n samples.

    For few images they are narrower: FID's bias needs more images than features in half of a side.
    """
    width = min(WIDE, 2 * n // 5)
    return [
        {
            "pool": features(n, 2 + side, width),
            "spatial": features(n, 4 + side, width - width // 80),
            # Clear class predictions, as far as random features allow.
            "logits": 3 * features(n, 6 + side, CLASSES),
        }
        for side in range(2)
    ]


def of_both(n: int, metrics: tuple[str, ...]) -> None:
    """Compare the devices."""
    arrays = sides(n)
    for name in metrics:
        with guarded(f"{name} and its bars"):
            cpu, gpu = (measured(name, arrays, device) for device in ("cpu", str(CUDA)))
            for score, (value, found) in gpu.items():
                expected, bars = cpu[score]
                report(
                    f"{score} of {n} rows, CUDA against CPU, relative difference",
                    largest_relative(value, expected),
                    equal=value == expected,
                    stderr=largest_relative(found.stderr, bars.stderr),
                    **differences(found, bars),
                    cpu=(expected, bars.stderr),
                )


def measured(
    name: str, arrays: list[dict[str, NDArray[np.float32]]], device: str
) -> dict[str, tuple[float, Deviations]]:
    """Value and deviations of each score; nothing is cached between calls."""
    metric: Any = named(name)
    reference, samples = (batch(**each) for each in arrays)
    run = Run(device=device, store=None)
    values = {score.name: score.value for score in metric(reference, samples, run)}
    found = metric.influence(reference, samples, run)
    return {score: (value, found[score]) for score, value in values.items()}


def differences(found: Deviations, expected: Deviations) -> dict[str, float | str]:
    """Differences of the influence values, or of their equivalent, and of the bias."""
    shown: dict[str, float | str] = {}
    for name in (field.name for field in fields(found)):
        if name not in ("samples", "reference", "both", "bias"):
            continue
        pair = getattr(found, name), getattr(expected, name)
        missing = [each is None for each in pair]
        if not any(missing):
            shown[name] = float(f"{largest_relative(*pair):.3g}")
        elif not all(missing):
            shown[name] = "only on one device"
    return shown


def seconds(n: int, metrics: tuple[str, ...]) -> None:
    """Times of values and error bars at full size."""
    arrays = sides(n)
    for name in metrics:
        with guarded(f"{name} of {n} rows"):
            metric: Any = named(name)
            reference, samples = (batch(**each) for each in arrays)
            run = Run(device=str(CUDA), store=None)
            report(
                f"{name} of {n} x {n}, s",
                timed(metric, reference, samples, run),
                bars=round(timed(metric.influence, reference, samples, run), 2),
            )


def timed(call: Callable[..., object], *arguments: BatchFeatures | Run) -> float:
    begin = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - begin


def neighbours() -> None:
    """Precision and recall of 50,000 against 50,000, and whether CUDA and CPU agree exactly."""
    small = [features(reduced(3000, 8), seed) for seed in (2, 3)]
    large = [features(reduced(50_000, 8), seed) for seed in (2, 3)]
    for arithmetic in ("exact", "float16"):
        with guarded(f"precision and recall, {arithmetic}"):
            cpu, gpu = (precision_recall(*small, arithmetic=arithmetic, device=d) for d in ("cpu", str(CUDA)))
            report(f"precision and recall equal on CPU and CUDA, {arithmetic}", cpu == gpu, cpu=cpu, gpu=gpu)
            begin = time.perf_counter()
            found = precision_recall(*large, arithmetic=arithmetic, device=str(CUDA))
            took = time.perf_counter() - begin
            report(f"precision and recall of {len(large[0])}, {arithmetic}, s", took, found=found)
