"""Time the metrics against the reference evaluator's arithmetic, side by side in one run.

    python benchmarks/metrics.py                          # 10,000 x 10,000 random features
    python benchmarks/metrics.py --reference a.h5 --samples b.h5    # files of `evalkit features`
    python benchmarks/metrics.py --growth                 # time and memory, 1,000 to 100,000
    python benchmarks/metrics.py -n 50000 --ours --repeats 1        # error bars at 50,000

The Inception Score uses a random head, for timing only. The reference side is `np.cov` and
`scipy.linalg.sqrtm` for the Fréchet distances, and TensorFlow's float16 distances in blocks of 10,000 for
precision and recall (NumPy float32 if TensorFlow is not installed). Our side is the protocol "adm". The time
of error bars is beside it, and comes on top.

On a machine that others use, wall time says little: `--clock cpu` measures the processor time of one thread
for both sides.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
from measure import peak_bytes
from numpy.typing import NDArray

from evalkit.features.record import BatchFeatures, Features
from evalkit.metrics.base import influence_of
from evalkit.metrics.frechet import frechet_distance
from evalkit.metrics.precision_recall import precision_recall
from evalkit.protocols import protocol_named
from evalkit.system.devices import resolve_device
from evalkit.system.run import Run

Array = NDArray[np.float32]
BLOCK = 10_000
GROWTH = (1_000, 5_000, 10_000, 20_000, 50_000, 100_000)
REFERENCE_GROWTH = 20_000  # beyond this the reference is extrapolated with the square
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"), "1"
)


def synthetic(n: int, width: int, seed: int) -> Array:
    """Rotated Gaussian features; variances fall with the power 1.2 of their rank, much as Inception's do."""
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)
    spectrum = (16 * np.arange(1, width + 1.0) ** -1.2).astype(np.float32) ** 0.5
    rotation = np.linalg.qr(shared.standard_normal((width, width), np.float32))[0]
    features: Array = own.standard_normal((n, width), np.float32) * spectrum @ rotation
    return features + np.float32(0.01 * seed)


def load(path: Path | None, n: int, seed: int) -> Features:
    """Features of a file, or random ones; the class scores come from a random head, for timing only."""
    if path is None:
        pool, spatial = (synthetic(n, width, seed) for width in (2048, 2023))
        made = Features(
            name="made",
            digest="",
            network="inception",
            extractor="made",
            fingerprint="",
            arrays={"pool": pool, "spatial": spatial},
        )
    else:
        made = Features.load(path)
    head = np.random.RandomState(0).randn(2048, 1008).astype(np.float32) * 0.15
    return replace(made, arrays={**made.arrays, "logits": made.arrays["pool"] @ head})


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


def timed(clock: Callable[[], float], function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = clock()
    result = function(*arguments)
    return result, clock() - start


def one_size(folder: Path, n: int, clock: Callable[[], float]) -> None:
    """A row of the table of growth; in a separate process, to measure its own peak memory."""
    r, s = (np.array(np.load(folder / f"{side}.npy", mmap_mode="r")[:n]) for side in ("r", "s"))
    precision_recall(r[:512], s[:512], arithmetic="float16")  # load what is loaded on first use
    before = peak_bytes()
    values, ours = timed(clock, lambda: precision_recall(r, s, arithmetic="float16"))
    memory = peak_bytes() - before
    _, fid = timed(clock, frechet_distance, r, s)
    known = min(n, REFERENCE_GROWTH)
    reference = reference_precision_recall(tensorflow_distances() or numpy_distances)
    expected, seconds = timed(clock, reference, r[:known], s[:known])
    theirs = seconds * (n / known) ** 2
    note = "" if n == known else " (extrapolated)"
    difference = "" if note else f"{max(abs(a - b) for a, b in zip(values, expected, strict=True)):.4f}"
    cells = f"{theirs:.2f}{note} | {ours:.2f} | {theirs / ours:.1f}"
    print(f"| {n:,} | {cells} | {memory / 1e9:.2f} | {difference} | {fid:.2f} |", flush=True)


def growth(clock: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for seed, side in enumerate(("r", "s"), start=1):
            np.save(Path(folder) / f"{side}.npy", synthetic(max(GROWTH), 2048, seed))
        heads = "precision and recall: reference, s | ours, s | ratio | GB beyond the features"
        print(f"| N each | {heads} | largest difference | FID, ours, s |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for n in GROWTH:
            command = [sys.executable, __file__, "--clock", clock, "--one-size", folder, "-n", str(n)]
            subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, help="file of `evalkit features`")
    parser.add_argument("--samples", type=Path, help="another one")
    parser.add_argument("-n", type=int, default=10_000, help="rows of random features")
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs; the median of each counts")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time of one thread")
    parser.add_argument("--only", help="one metric: fid, sfid, precision or inception_score")
    parser.add_argument("--ours", action="store_true", help="without the reference, which takes long")
    parser.add_argument("--growth", action="store_true", help="precision, recall and FID for growing N")
    parser.add_argument("--one-size", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and any(os.environ.get(key) != value for key, value in ONE_THREAD.items()):
        os.environ.update(ONE_THREAD)  # the libraries read these when they are loaded
        os.execv(sys.executable, [sys.executable, *sys.argv])
    clock = CLOCKS[arguments.clock]
    if arguments.one_size:
        one_size(arguments.one_size, arguments.n, clock)
    elif arguments.growth:
        growth(arguments.clock)
    else:
        side_by_side(arguments, clock)


def side_by_side(arguments: argparse.Namespace, clock: Callable[[], float]) -> None:
    reference, samples = load(arguments.reference, arguments.n, 1), load(arguments.samples, arguments.n, 2)
    distances = tensorflow_distances()
    print(
        "precision and recall of the reference: " + ("TensorFlow float16" if distances else "NumPy float32")
    )
    reference_neighbours = reference_precision_recall(distances or numpy_distances)
    theirs: dict[tuple[str, ...], Callable[[Features, Features], tuple[float, ...]]] = {
        ("inception_score",): lambda _, s: reference_inception_score(s.arrays["logits"]),
        ("fid",): lambda r, s: reference_frechet(r.arrays["pool"], s.arrays["pool"]),
        ("sfid",): lambda r, s: reference_frechet(r.arrays["spatial"], s.arrays["spatial"]),
        ("precision", "recall"): lambda r, s: reference_neighbours(r.arrays["pool"], s.arrays["pool"]),
    }
    print(
        "\n| metric | reference, s | ours, s | ratio | error bars, s | reference's value | ours | standard "
        "error |\n|---|---|---|---|---|---|---|---|"
    )
    totals = [0.0, 0.0, 0.0]
    run = Run(device=str(resolve_device()))
    for metric in protocol_named("adm").metrics:
        names = tuple(spec.name for spec in metric.scores)
        if arguments.only and arguments.only not in names:
            continue
        ours_seconds, their_seconds, bars_seconds = [], [], []
        for _ in range(arguments.repeats):
            # New batches, so that nothing is kept from the last time.
            sides = BatchFeatures.of(reference), BatchFeatures.of(samples)
            values, seconds = (), math.nan
            if not arguments.ours:
                values, seconds = timed(clock, theirs[names], reference, samples)
            their_seconds.append(seconds)
            scores, seconds = timed(clock, metric, *sides, run)
            ours_seconds.append(seconds)
            found, seconds = timed(clock, influence_of, metric, *sides, run)
            bars_seconds.append(seconds)
        slow, fast, bars = map(statistics.median, (their_seconds, ours_seconds, bars_seconds))
        totals = [total + each for total, each in zip(totals, (slow, fast, bars), strict=True)]
        cells = [
            ", ".join(f"{value:.10g}" for value in side)
            for side in (values, [score.value for score in scores])
        ]
        errors = ", ".join(each if isinstance(each, str) else f"{each.stderr:.3g}" for each in found.values())
        print(
            f"| {' and '.join(names)} | {slow:.2f} | {fast:.2f} | {slow / fast:.1f} | {bars:.2f} | "
            f"{' | '.join(cells)} | {errors} |",
            flush=True,
        )
    slow, fast, bars = totals
    print(f"| all | {slow:.2f} | {fast:.2f} | {slow / fast:.1f} | {bars:.2f} | | | |")


if __name__ == "__main__":
    main()
