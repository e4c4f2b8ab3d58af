"""MIND, the Monge Inception Distance: a sliced Wasserstein distance between features.

arXiv:2605.06797. In random directions the features are numbers, and the optimal transport of numbers joins
them in their order. Unlike the Fréchet distance it takes no distribution to be Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.deviations import Influence
from evalkit.errors import InputError
from evalkit.metrics.base import check_sides
from evalkit.metrics.on_rows import Computed, ComputedOnce
from evalkit.results import ScoreSpec
from evalkit.system.devices import float64_device
from evalkit.system.run import Run

__all__ = ["MIND", "SlicedDistance", "monge_inception_distance"]

# Projections of a side that are in memory at a time: 32 MiB.
_PROJECTIONS = 2**22

# Rows of features that are converted to float64 at a time.
_ROWS = 4096


class SlicedDistance(NamedTuple):
    """The distance, and how it deviates."""

    value: float
    influence: Influence


def monge_inception_distance(
    reference: NDArray[np.floating],
    samples: NDArray[np.floating],
    *,
    directions: int = 1000,
    seed: int = 2020,
    device: str = "cpu",
    progress: Callable[[int, int], object] | None = None,
) -> SlicedDistance:
    """``3 d mean_u mean_i (x_(i) - y_(i))^2`` over unit directions u and sorted projections on u.

    arXiv:2605.06797; 3 d makes it as large as FID. Everything random is drawn as in torch-fidelity's
    ``metric_mind.py`` (in its repository since May 2026): by one CPU generator of this seed, first a
    permutation of the larger side, of which as many images are taken as the other has, then the directions in
    float32. Projections are in float64 here and in float32 there.

    The influence of an image is its Kantorovich potential, the derivative of the distance in its weight:
    along the sorted projections on u it grows from image i to the next by
    ``(x_(i+1) - x_(i)) (x_(i+1) + x_(i) - y_(i+1) - y_(i))``.

    Args:
        reference: (m, d) float features.
        samples: (n, d) float features.
        directions: How many are drawn.
        seed: Of the draw.
        device: torch device with float64; ``mps`` is replaced by the CPU.
        progress: Called with the directions done and their number.

    Raises:
        UndefinedMetricError: A side has fewer than two rows.
        FeatureError: Dimensions differ, or features are not (n, d) finite floats.
        InputError: There are no directions.
    """
    if directions < 1:
        raise InputError(f"directions is {directions}; expected at least 1, such as 1000")
    check_sides(reference, samples, "MIND")
    target = float64_device(device)
    generator = torch.Generator("cpu").manual_seed(seed)
    n, d = min(len(reference), len(samples)), samples.shape[1]
    drawn = [
        torch.randperm(len(side), generator=generator, device="cpu")[:n].numpy()
        if len(side) > n
        else np.arange(n)
        for side in (samples, reference)
    ]
    units = torch.randn(directions, d, generator=generator, dtype=torch.float32, device="cpu")
    units = (units / units.norm(dim=1, keepdim=True).clamp_min(1e-12)).to(target)
    with torch.inference_mode():
        y, x = (
            torch.from_numpy(np.ascontiguousarray(side[chosen] if len(side) > n else side)).to(target)
            for side, chosen in zip((samples, reference), drawn, strict=True)
        )
        added = 0.0
        potentials = [torch.zeros(n, dtype=torch.float64, device=target) for _ in drawn]
        size = max(1, _PROJECTIONS // n)
        for start in range(0, directions, size):
            block = units[start : start + size].double()
            (b, order_b), (a, order_a) = (_projections(side, block).sort(dim=1) for side in (y, x))
            added += float((a - b).square().sum())
            for potential, own, other, order in zip(
                potentials, (b, a), (a, b), (order_b, order_a), strict=True
            ):
                potential += torch.zeros_like(own).scatter_(1, order, _potential(own, other)).sum(dim=0)
            if progress is not None:
                progress(min(start + size, directions), directions)
    scale = 3 * d / directions
    of_samples, of_reference = (
        _spread(scale * potential.cpu().numpy(), chosen, len(side))
        for potential, chosen, side in zip(potentials, drawn, (samples, reference), strict=True)
    )
    return SlicedDistance(
        scale * added / n,
        Influence(
            images=len(samples),
            samples=of_samples,
            reference=of_reference,
            no_bias="the bias of MIND is not known",
        ),
    )


def _projections(x: Tensor, units: Tensor) -> Tensor:
    """(directions, n) float64 projections of the rows."""
    return torch.cat([units @ rows.double().T for rows in torch.split(x, _ROWS)], dim=1)


def _potential(own: Tensor, other: Tensor) -> Tensor:
    """(directions, n) potentials along the sorted projections ``own``, up to a constant."""
    steps = own.diff(dim=1) * (own[:, 1:] + own[:, :-1] - other[:, 1:] - other[:, :-1])
    return torch.nn.functional.pad(steps.cumsum(dim=1), (1, 0))


def _spread(values: NDArray[np.float64], drawn: NDArray[np.int64], n: int) -> NDArray[np.float64]:
    """Values of n images, of which only those drawn count, and so much the more."""
    found: NDArray[np.float64] = np.zeros(n)
    found[drawn] = (values - values.mean()) * (n / len(drawn))
    found -= found.mean()
    return found


@dataclass(frozen=True)
class MIND(ComputedOnce):
    """MIND of the samples to the reference; see :func:`monge_inception_distance`. Lower is better.

    Attributes:
        output: Of which network and output.
        directions: How many are drawn.
        seed: Of the draw.
        scores: Its name.
    """

    # Of a side with more images than the other, those that are drawn are copied.
    working_bytes: ClassVar[float] = 2

    output: str = "inception:pool"
    directions: int = 1000
    seed: int = 2020
    scores: tuple[ScoreSpec, ...] = (ScoreSpec(name="mind", title="MIND", higher_is_better=False),)

    def compute(self, reference: NDArray[np.float32], samples: NDArray[np.float32], run: Run) -> Computed:
        """See :func:`monge_inception_distance`."""
        found = monge_inception_distance(
            reference,
            samples,
            directions=self.directions,
            seed=self.seed,
            device=run.device,
            progress=self.report(run),
        )
        return Computed(found.value, found.influence)
