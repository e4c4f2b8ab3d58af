"""The noise: Philox against published vectors and TensorFlow, normal numbers against NumPy and SciPy.

The Triton kernel is compared with the torch code by Triton's interpreter; its compiled form is checked in
test_gpu_counts.py.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from optional import optional
from scipy import stats

from generation.noise import Purpose, Streams, _box_muller, normal, philox, random_labels

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def words(counter: tuple[int, ...], key: tuple[int, ...], device: str = "cpu") -> list[int]:
    tensors = [torch.tensor([word], device=device) for word in counter]
    return [int(word) for word in philox(tensors, key[0] | key[1] << 32)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known-answer vectors of Random123
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI[:4], PI[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...], device: str
) -> None:
    assert words(counter, key, device) == list(expected)


def test_philox_equals_tensorflow() -> None:
    tf = optional("tensorflow", "tensorflow")
    key, low, high = 0x0123456789ABCDEF, 0xFFFFFFFFFFFFFFF0, 0xFEDCBA9876543210
    theirs = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[4 * 40], key=[key], counter=[low, high], alg=1, dtype=tf.uint32
    ).numpy()
    # TensorFlow counts blocks on from the counter that it is given, with a carry into the upper words.
    counters = [(low | high << 64) + block for block in range(40)]
    tensors = [torch.tensor([c >> shift & 0xFFFFFFFF for c in counters]) for shift in (0, 32, 64, 96)]
    ours = torch.stack(philox(tensors, key), dim=-1).flatten().numpy()
    assert (ours == theirs).all()


def many(count: int = 400_000) -> np.ndarray:
    return normal(7, torch.tensor([3]), 11, Purpose.STEP, count)[0].numpy()


def test_normal_numbers_are_those_of_numpy_and_exactly_rounded_almost_everywhere() -> None:
    count, index, step, use, seed = 200_000, 5, 17, 1, 123456789012345
    ours = normal(seed, torch.tensor([index]), step, use, count)[0].numpy()
    blocks = torch.arange(count // 4)
    fixed = (torch.tensor([word]) for word in (step, index, use))
    u = [(word.numpy() + 0.5) / 2**32 for word in philox([blocks, *fixed], seed)]
    expected = np.empty((count // 4, 4))
    for column, (radius, angle) in enumerate([(u[0], u[1]), (u[2], u[3])]):
        # The quarters of the circle begin 45 degrees before the axis.
        turn = 2 * np.pi * angle - np.pi / 4
        length = np.sqrt(-2 * np.log(radius))
        expected[:, 2 * column], expected[:, 2 * column + 1] = length * np.cos(turn), length * np.sin(turn)
    wrong = ours != expected.flatten().astype(np.float32)
    assert wrong.mean() < 1e-5
    np.testing.assert_allclose(ours, expected.flatten(), rtol=2e-7, atol=1e-12)


def test_extreme_words_give_the_extreme_numbers() -> None:
    radius = torch.tensor([0, 0xFFFFFFFF, 0xB504F333, 0xB504F334])  # around sqrt(1/2) of the range as well
    x, y = _box_muller(radius, torch.zeros_like(radius))
    expected = [math.sqrt(-2 * math.log((int(word) + 0.5) / 2**32)) for word in radius]
    np.testing.assert_allclose(torch.hypot(x, y).numpy(), expected, rtol=2e-7)
    assert float(torch.hypot(x, y)[0]) == pytest.approx(math.sqrt(66 * math.log(2)))


def test_distribution() -> None:
    x = many().astype(np.float64)
    n = len(x)
    assert stats.kstest(x, "norm").pvalue > 1e-3
    assert stats.kstest(x[::4], "norm").pvalue > 1e-3
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(stats.skew(x)) < 4 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(x)) < 4 * math.sqrt(24 / n)
    for bound in (2.0, 3.0, 4.0):
        expected = n * stats.norm.sf(bound)
        for count in ((x > bound).sum(), (x < -bound).sum()):
            assert abs(count - expected) < 4 * math.sqrt(expected)


def test_streams_are_independent() -> None:
    n = 40_000
    base = normal(1, torch.tensor([0]), 0, Purpose.START, n)[0].numpy()
    others = {
        "seed": normal(2, torch.tensor([0]), 0, Purpose.START, n),
        "seed, upper word": normal(1 | 1 << 32, torch.tensor([0]), 0, Purpose.START, n),
        "index": normal(1, torch.tensor([1]), 0, Purpose.START, n),
        "step": normal(1, torch.tensor([0]), 1, Purpose.START, n),
        "purpose": normal(1, torch.tensor([0]), 0, Purpose.STEP, n),
    }
    for name, other in others.items():
        assert abs(np.corrcoef(base, other[0].numpy())[0, 1]) < 4 / math.sqrt(n), name
    for lag in range(1, 9):
        assert abs(np.corrcoef(base[:-lag], base[lag:])[0, 1]) < 4 / math.sqrt(n), lag
    # Squares too: the numbers of a Box-Muller pair share their length.
    for lag in range(1, 5):
        assert abs(np.corrcoef(base[:-lag] ** 2, base[lag:] ** 2)[0, 1]) < 4 / math.sqrt(n), lag


@pytest.mark.parametrize("device", DEVICES)
def test_bits_depend_on_the_sample_alone(device: str) -> None:
    shape, where = (3, 5, 7), torch.device(device)
    together = Streams(9, [0, 4, 70_000, 2**32 - 1], shape, where)
    for row, index in enumerate((0, 4, 70_000, 2**32 - 1)):
        alone = Streams(9, [index], shape, torch.device("cpu"))
        assert torch.equal(together.start()[row].cpu(), alone.start()[0])
        assert torch.equal(together(12)[row].cpu(), alone(12)[0])
    start = together.start()
    assert start.shape == (4, *shape)
    assert start.dtype == torch.float32
    assert len({bytes(x.cpu().numpy()) for x in (start, together(0), together(1))}) == 3


def test_bits_do_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(many())
    finally:
        torch.set_num_threads(threads)
    assert (results[0] == results[1]).all()
    assert (results[0] == results[2]).all()


def test_another_width_is_another_stream() -> None:
    cpu = torch.device("cpu")
    small, large = (Streams(0, [0], (3, size, size), cpu).start().flatten()[:12] for size in (8, 32))
    assert not torch.equal(small, large)


def test_random_labels() -> None:
    labels = random_labels(3, 200_000, 10)
    assert labels.dtype == np.int64
    assert (random_labels(3, 7, 10) == labels[:7]).all()
    assert (random_labels(3, 2**16 + 1, 10) == labels[: 2**16 + 1]).all()
    assert stats.chisquare(np.bincount(labels, minlength=10)).pvalue > 1e-3
    assert (random_labels(4, 1000, 10) != labels[:1000]).any()
    assert set(random_labels(0, 100, 1)) == {0}


INTERPRETED = """
import random
import torch
from generation import noise, noise_kernel

random.seed(0)
last, longest = 2**32 - 1, 4 * noise_kernel.BLOCKS + 3
cases = [
    (0, [0], 0, 0, 1),
    (2**64 - 1, [last, 5, 70_000], 999, 1 | 256 << 8, longest),
    (2**63, [2**31], 2**31, last, 64),
    *(
        (random.getrandbits(64), random.sample(range(last), 3), random.randrange(1000), 1, count)
        for count in (*range(2, 12), longest - 3, longest - 2, 2 * longest)
    ),
]
for seed, indices, step, use, count in cases:
    rows = torch.tensor(indices)
    expected = noise.normal(seed, rows, step, use, count)
    series = noise._LOG, noise._SINE, noise._COSINE
    found = noise_kernel.normal(seed, rows, step, use, count, series=series)
    assert found.shape == expected.shape
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32)), (seed, indices, step, use, count)
print("equal")
"""


def test_the_kernel_gives_the_same_bits() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton, which comes with PyTorch for CUDA")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "equal\n", done.stderr
