"""Time the metrics against the reference evaluator's arithmetic, side by side in one run.

    python benchmarks/metrics.py                          # 10,000 x 10,000 made features
    python benchmarks/metrics.py --reference a.h5 --samples b.h5    # files of `evalkit features`

The Inception Score uses a made head: it is here for its time. The reference side is `np.cov` and
`scipy.linalg.sqrtm` for the Fréchet distances, and TensorFlow's float16 distances in blocks of 10,000 for
precision and recall (NumPy float32, where TensorFlow is not installed). Ours is the protocol "adm".
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from evalkit.features import Features
from evalkit.metrics import PROTOCOLS

Array = NDArray[np.float32]
BLOCK = 10_000


def synthetic(n: int, width: int, seed: int) -> Array:
    """Gaussians whose variances fall with the power 1.2 of their rank, rotated, as Inception's about do."""
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)
    spectrum = (16 * np.arange(1, width + 1.0) ** -1.2).astype(np.float32) ** 0.5
    rotation = np.linalg.qr(shared.standard_normal((width, width), np.float32))[0]
    features: Array = own.standard_normal((n, width), np.float32) * spectrum @ rotation
    return features + np.float32(0.01 * seed)


def load(path: Path | None, n: int, seed: int) -> Features:
    """Features of a file, or made ones; class scores are made where there is no head, for timing alone."""
    if path is None:
        pool, spatial = (synthetic(n, width, seed) for width in (2048, 2023))
        made = Features(
            name="made", digest="", extractor="made", fingerprint="", pool=pool, spatial=spatial, logits=None
        )
    else:
        made = Features.load(path)
    head = np.random.RandomState(0).randn(2048, 1008).astype(np.float32) * 0.15
    return replace(made, logits=made.pool @ head)


def reference_frechet(r: Array, s: Array) -> tuple[float, ...]:
    (mu1, sigma1), (mu2, sigma2) = ((x.mean(axis=0), np.cov(x, rowvar=False)) for x in (r, s))
    difference = mu1 - mu2
    root = scipy.linalg.sqrtm(sigma1.dot(sigma2)).real
    return (float(difference.dot(difference) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root)),)


def reference_inception_score(logits: Array) -> tuple[float, ...]:
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    scores = []
    for i in range(0, len(p), 5000):
        part = p[i : i + 5000]
        kl = part * (np.log(part) - np.log(np.expand_dims(np.mean(part, 0), 0)))
        scores.append(np.exp(np.mean(np.sum(kl, 1))))
    return (float(np.mean(scores)),)


def tensorflow_distances() -> Callable[[Array, Array], Array] | None:
    try:
        import tensorflow as tf
    except ImportError:
        return None

    def distances(u: Array, v: Array) -> Array:
        u, v = tf.cast(u, tf.float16), tf.cast(v, tf.float16)
        u_norms = tf.reshape(tf.reduce_sum(tf.square(u), axis=1), [-1, 1])
        v_norms = tf.reshape(tf.reduce_sum(tf.square(v), axis=1), [1, -1])
        result = tf.maximum(u_norms - 2 * tf.matmul(u, v, transpose_b=True) + v_norms, 0.0)
        array: Array = tf.cast(result, tf.float32).numpy()
        return array

    return distances


def numpy_distances(u: Array, v: Array) -> Array:
    result = (u * u).sum(axis=1)[:, None] - 2 * (u @ v.T) + (v * v).sum(axis=1)
    clipped: Array = np.maximum(result, 0)
    return clipped


def reference_precision_recall(
    distances: Callable[[Array, Array], Array],
) -> Callable[..., tuple[float, ...]]:
    def radii(x: Array) -> Array:
        parts = []
        for i in range(0, len(x), BLOCK):
            rows = [distances(x[i : i + BLOCK], x[j : j + BLOCK]) for j in range(0, len(x), BLOCK)]
            parts.append(np.partition(np.concatenate(rows, axis=1), 3, axis=1)[:, 3])
        return np.concatenate(parts)

    def precision_recall(r: Array, s: Array) -> tuple[float, ...]:
        radii_r, radii_s = radii(r), radii(s)
        r_inside, s_inside = np.zeros(len(r), bool), np.zeros(len(s), bool)
        for i in range(0, len(r), BLOCK):
            for j in range(0, len(s), BLOCK):
                block = distances(r[i : i + BLOCK], s[j : j + BLOCK])
                s_inside[j : j + BLOCK] |= (block <= radii_r[i : i + BLOCK, None]).any(axis=0)
                r_inside[i : i + BLOCK] |= (block <= radii_s[j : j + BLOCK]).any(axis=1)
        return float(s_inside.mean()), float(r_inside.mean())

    return precision_recall


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, help="file of `evalkit features`")
    parser.add_argument("--samples", type=Path, help="another one")
    parser.add_argument("-n", type=int, default=10_000, help="rows, where features are made")
    parser.add_argument("--repeats", type=int, default=1, help="alternating runs; the fastest of each counts")
    arguments = parser.parse_args()

    reference, samples = load(arguments.reference, arguments.n, 1), load(arguments.samples, arguments.n, 2)
    distances = tensorflow_distances()
    print(
        "precision and recall of the reference: " + ("TensorFlow float16" if distances else "NumPy float32")
    )
    precision_recall = reference_precision_recall(distances or numpy_distances)
    theirs: dict[tuple[str, ...], Callable[[Features, Features], tuple[float, ...]]] = {
        ("inception_score",): lambda _, s: reference_inception_score(s.logits),
        ("fid",): lambda r, s: reference_frechet(r.pool, s.pool),
        ("sfid",): lambda r, s: reference_frechet(r.spatial, s.spatial),
        ("precision", "recall"): lambda r, s: precision_recall(r.pool, s.pool),
    }
    print(
        "\n| metric | reference, s | ours, s | ratio | reference's value | ours |\n|---|---|---|---|---|---|"
    )
    totals = [0.0, 0.0]
    for metric in PROTOCOLS["adm"]:
        ours_seconds, their_seconds = [], []
        for _ in range(arguments.repeats):
            values, seconds = timed(theirs[metric.names], reference, samples)
            their_seconds.append(seconds)
            scores, seconds = timed(metric, reference, samples)
            ours_seconds.append(seconds)
        slow, fast = min(their_seconds), min(ours_seconds)
        totals = [totals[0] + slow, totals[1] + fast]
        cells = (
            ", ".join(f"{value:.10g}" for value in side)
            for side in (values, [score.value for score in scores])
        )
        names = " and ".join(metric.names)
        print(f"| {names} | {slow:.2f} | {fast:.2f} | {slow / fast:.1f} | {' | '.join(cells)} |", flush=True)
    print(f"| all | {totals[0]:.2f} | {totals[1]:.2f} | {totals[0] / totals[1]:.1f} | | |")


if __name__ == "__main__":
    main()
