"""The stage of acceptance.py that compares values: CUDA with the CPU, and both with golden values."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import numpy as np
import torch
from cifar10 import cifar10
from results import CUDA, guarded, relative, report, seconds_of
from test_golden import CASES
from test_networks import GOLDENS, golden
from torch import Tensor

from evalkit.comparison import compare
from evalkit.extractors.inception import PRECISIONS as INCEPTION_PRECISIONS
from evalkit.extractors.inception import Inception
from evalkit.extractors.weights import load_weights
from evalkit.verify import pictures
from generation.guidance import classifier_gradient
from generation.networks.precision import PRECISIONS, arithmetic, prepare
from generation.noise import Streams

GOLDEN_IMAGES = 2000


def main() -> None:
    """CUDA against the CPU, and both against golden values."""
    _noise()
    _golden_networks()
    _guided_gradient()
    _features()


def _noise() -> None:
    for seed, indices, size in ((0, range(3), 64), (2**64 - 1, range(2**32 - 5, 2**32 - 1), 31)):
        cpu, gpu = (
            Streams(seed, indices, (3, size, size), torch.device(device)) for device in ("cpu", "cuda")
        )
        same = all(torch.equal(cpu(step), gpu(step).cpu()) for step in (1, 5, 999))
        same &= torch.equal(cpu.start(), gpu.start().cpu())
        report(f"noise bits equal, seed {seed}", same)
    gpu = Streams(0, range(32), (3, 256, 256), CUDA)
    report("noise of 32 images of 256x256, ms", 1e3 * seconds_of(lambda: gpu(7), 5))


def _golden_networks() -> None:
    for name in GOLDENS:
        for precision in PRECISIONS:
            with guarded(f"{name}, {precision}"):
                network, arrays = golden(name)
                expected = arrays.pop("output")
                arrays = {key: value.to(CUDA) for key, value in arrays.items()}
                prepared = prepare(copy.deepcopy(network).requires_grad_(False), precision, CUDA)
                with torch.no_grad(), arithmetic(precision):
                    first = prepared(arrays["x"], arrays["t"], **_rest(arrays)).clone()
                    second = prepared(arrays["x"], arrays["t"], **_rest(arrays))
                report(
                    f"golden {name}, {precision}, relative difference",
                    relative(first, expected),
                    same_bytes_twice=torch.equal(first, second),
                )


def _rest(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in arrays.items() if key not in ("x", "t")}


def _guided_gradient() -> None:
    """The gradient of the golden classifier on CUDA against float32 on the CPU."""
    network, arrays = golden("classifier_attention_pool")
    x, t, y = arrays["x"], arrays["t"], torch.arange(len(arrays["x"])) % 10
    expected = classifier_gradient(network.requires_grad_(False), x, t, y, 2.0)
    for precision in PRECISIONS:
        with guarded(f"gradient, {precision}"), arithmetic(precision):
            prepared = prepare(golden("classifier_attention_pool")[0].requires_grad_(False), precision, CUDA)
            inputs = [v.to(CUDA) for v in (x, t, y)]
            gradients = [prepared.run(classifier_gradient, *inputs, 2.0) for _ in range(2)]
            report(
                f"guidance gradient, {precision}, relative difference",
                relative(gradients[0], expected),
                same_bytes_twice=torch.equal(*gradients),
            )


def _features() -> None:
    weights = load_weights()
    images = pictures(256, 256, 16)
    expected = Inception(weights, device="cpu")(images)
    for precision in INCEPTION_PRECISIONS:
        with guarded(f"features, {precision}"):
            network = Inception(weights, device="cuda", precision=precision)
            found, again = network(images), network(images)
            for output, rows in expected.items():
                report(
                    f"features {output}, {precision}, relative difference",
                    relative(torch.from_numpy(found[output]), torch.from_numpy(rows)),
                    largest=float(np.abs(found[output] - rows).max()),
                    same_bytes_twice=bool((found[output] == again[output]).all()),
                )
    if not (folder := os.environ.get("EVALKIT_TEST_DATA")):
        report("CIFAR-10", "skipped: EVALKIT_TEST_DATA is not set")
        return
    case = CASES[GOLDEN_IMAGES]["reference_evaluator"]
    batches = [cifar10(Path(folder), split, GOLDEN_IMAGES) for split in ("train", "test")]
    for precision in INCEPTION_PRECISIONS:
        with guarded(f"CIFAR-10, {precision}"):
            network = Inception(weights, device="cuda", precision=precision)
            found = compare(*batches, extractor=network, metrics=["fid", "sfid", "precision_recall"])
            for name in ("fid", "sfid", "precision", "recall"):
                what = f"CIFAR-10, {GOLDEN_IMAGES} images a side, {name}, {precision}"
                report(what, found[name], reference=case[name])
