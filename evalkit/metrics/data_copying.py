"""C_T: whether samples are nearer to the training images than other images of the same kind are.

Meehan, Chaudhuri and Dasgupta 2020, "A Non-Parametric Test to Detect Data-Copying in Generative Models".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg, stats
from scipy.cluster import vq

from evalkit.deviations import Deviations
from evalkit.errors import InputError, UndefinedMetricError
from evalkit.features.moments import Moments
from evalkit.features.record import BatchFeatures
from evalkit.metrics.base import check_sides, parameters
from evalkit.metrics.on_rows import OnRows
from evalkit.metrics.points import by_lot, exact_sides, on_device
from evalkit.metrics.screening import Screening
from evalkit.metrics.search import Nearest, counted, each_stripe
from evalkit.results import Score, ScoreSpec
from evalkit.system.devices import float32_arithmetic
from evalkit.system.run import Run

__all__ = ["DataCopying", "DataCopyingTest", "data_copying"]

Rows = NDArray[np.float32]

# A set with fewer images for each cell is divided into fewer cells.
_IMAGES_A_CELL = 100

# A cell with fewer samples does not count, as in the authors' code.
_LEAST_SAMPLES = 20

# Rows of features that are converted to float64 at a time.
_ROWS = 4096

# How often k-means is started; the best result is taken.
_STARTS = 10


class DataCopyingTest(NamedTuple):
    """The statistic, and in how many cells it was computed."""

    value: float
    cells: int


def data_copying(
    training: Rows,
    held_out: Rows,
    samples: Rows,
    *,
    cells: int = 3,
    components: int = 64,
    seed: int = 0,
    device: str = "cpu",
) -> DataCopyingTest:
    """C_T (Meehan et al. 2020, section 4.1), computed as by the authors and dgm-eval.

    In each cell, distances of samples to their nearest training image are compared with those of held-out
    images: ``Z = (U - n m / 2 + 0.5) / sqrt(n m (n + m + 1) / 12)``, where U counts the pairs in which that
    of the sample is larger (Mann and Whitney 1947). C_T is the mean of Z over cells, by their share of the
    held-out images. It is about 0, give or take 1, if samples and held-out images are of one distribution;
    below -3 samples are copies; above 3 they are farther away than genuine images.

    Cells are those of k-means on the training images. Features are their first principal components on the
    training images first. Sides with fewer than 100 images a cell have fewer cells.

    Args:
        training: (l, d) float32 features.
        held_out: (n, d) float32 features of images that the model was not trained on.
        samples: (m, d) float32 features.
        cells: How many.
        components: How many principal components.
        seed: Of k-means.
        device: torch device of the distances; mps, which has no float64, is replaced by the CPU.

    Raises:
        UndefinedMetricError: A side has fewer than two rows, or no cell has 20 samples and held-out images.
        FeatureError: Dimensions differ, or features are not (n, d) finite floats.
        InputError: ``cells`` or ``components`` is below 1.
    """
    if cells < 1 or components < 1:
        raise InputError(f"{cells} cells and {components} components; expected at least 1 of each")
    check_sides(training, samples, "C_T")
    check_sides(training, held_out, "C_T")
    t, p, q = _principal((training, held_out, samples), components)
    count = max(1, min(cells, min(map(len, (t, p, q))) // _IMAGES_A_CELL))
    centres = _centres(t, count, seed)
    count = len(centres)
    of_t, of_p, of_q = (vq.vq(side, centres)[0] for side in (t, p, q))
    scores, weights = [], []
    for cell in range(count):
        own, others, drawn = t[of_t == cell], p[of_p == cell], q[of_q == cell]
        if len(own) and len(others) and (count == 1 or len(drawn) > _LEAST_SAMPLES):
            scores.append(_z(*(_distances(side, own, device) for side in (drawn, others))))
            weights.append(len(others))
    if not scores:
        raise UndefinedMetricError(
            f"C_T is undefined: no cell has more than {_LEAST_SAMPLES} samples and held-out images; give "
            "fewer cells, or more images"
        )
    return DataCopyingTest(float(np.average(scores, weights=weights)), count)


def _halves(rows: Rows) -> tuple[Rows, Rows]:
    """Two halves at random, whatever the order of the images."""
    first, second = np.array_split(by_lot(rows), 2)
    return rows[first], rows[second]


def _principal(sides: tuple[Rows, ...], components: int) -> list[Rows]:
    """All sides on the first principal components of the first, in float32."""
    d = sides[0].shape[1]
    if d <= components:
        return [np.ascontiguousarray(side, np.float32) for side in sides]
    moments = Moments.of(sides[0])
    _, vectors = linalg.eigh(moments.covariance, subset_by_index=(d - components, d - 1))
    return [
        np.concatenate(
            [
                ((side[start : start + _ROWS] - moments.mean) @ vectors).astype(np.float32)
                for start in range(0, len(side), _ROWS)
            ]
        )
        for side in sides
    ]


def _centres(x: Rows, count: int, seed: int) -> NDArray[np.float64]:
    """(count, d) centres by k-means, the best of several starts; one centre if there are too many copies."""
    wide = x.astype(np.float64)
    random = np.random.RandomState(seed)
    best: NDArray[np.float64] = wide.mean(axis=0, keepdims=True)
    least = np.inf
    for _ in range(_STARTS if count > 1 else 0):
        try:
            centres, cells = vq.kmeans2(wide, count, iter=50, minit="points", missing="raise", seed=random)
        except vq.ClusterError:  # a cell without images
            continue
        error = float(np.square(wide - centres[cells]).sum())
        if error < least:
            best, least = centres, error
    return best


def _distances(points: Rows, others: Rows, device: str) -> NDArray[np.float64]:
    """(points,) squared distance of each to the nearest of the others."""
    # TF32 or bfloat16 products would break the margins of the screens.
    with torch.inference_mode(), float32_arithmetic():
        y, x = exact_sides(*on_device(device, others, points))
        screening = Screening(y)
        look, advance = Nearest(x, y, screening).look, counted(len(points), None)
        found = [distance for _, distance in each_stripe(x, screening, look, advance)]
        return torch.cat(found).cpu().numpy()


def _z(samples: NDArray[np.float64], held_out: NDArray[np.float64]) -> float:
    """The statistic of Mann and Whitney, by its mean and standard deviation without a difference."""
    m, n = len(samples), len(held_out)
    u = stats.rankdata(np.concatenate([samples, held_out]))[:m].sum() - m * (m + 1) / 2
    return float((u - n * m / 2 + 0.5) / np.sqrt(n * m * (n + m + 1) / 12))


@dataclass(frozen=True)
class DataCopying(OnRows):
    """C_T of the samples; see :func:`data_copying`. Low values are copies, high ones are far from all images.

    The reference is to be the training images. A random half of them is compared with; the other half stands
    for the held-out images. So copies of the whole training set show, though less than with held-out images
    of their own: half of them are copies of the second half.

    Attributes:
        output: Of which network and output.
        cells: How many; fewer where there are fewer images.
        components: How many principal components of the features.
        seed: Of k-means.
        scores: Its name.
    """

    finds_copies: ClassVar[bool] = True
    # The halves of the reference are copies.
    working_bytes: ClassVar[float] = 4

    output: str = "inception:pool"
    cells: int = 3
    components: int = 64
    seed: int = 0
    scores: tuple[ScoreSpec, ...] = (ScoreSpec(name="c_t", title="C_T", higher_is_better=True, decimals=2),)

    def __call__(self, reference: BatchFeatures, samples: BatchFeatures, run: Run) -> tuple[Score, ...]:
        """One score, in standard deviations of what is expected without copies.

        Raises:
            UndefinedMetricError: A side has no such features, or too few images.
            FeatureError: The sides do not fit together.
        """
        r, s = reference.rows(self.output), samples.rows(self.output)
        check_sides(r, s, "C_T", least=4)
        found = data_copying(
            *_halves(r),
            s,
            cells=self.cells,
            components=self.components,
            seed=self.seed,
            device=run.device,
        )
        recorded = parameters(self) | {"cells": found.cells}
        return (Score(name=self.scores[0].name, value=found.value, parameters=recorded),)

    def influence(
        self, reference: BatchFeatures, samples: BatchFeatures, run: Run
    ) -> Mapping[str, Deviations]:
        """There is none.

        Raises:
            UndefinedMetricError: Always.
        """
        del reference, samples, run
        raise UndefinedMetricError(
            "C_T is itself a z-statistic, the mean of Mann-Whitney Z scores over cells: without copies, its "
            "own standard error is at most 1"
        )
