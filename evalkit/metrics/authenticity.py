"""AuthPct: which samples are copies of the images that a model was trained on.

Alaa et al. 2022, "How Faithful is your Synthetic Data? Sample-level Metrics for Evaluating and Auditing
Generative Models", section 5. The reference has to be the training images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.deviations import HalfSplit
from evalkit.features.record import BatchFeatures
from evalkit.metrics.base import Need, check_sides, classes_of, parameters
from evalkit.metrics.halves import halves_bytes, halves_of_authenticity
from evalkit.metrics.points import exact_sides
from evalkit.metrics.screening import Screening
from evalkit.metrics.search import Nearest, counted, each_stripe, radii
from evalkit.results import Score, ScoreSpec
from evalkit.system.devices import float32_arithmetic, resolve_device
from evalkit.system.run import Run

__all__ = ["AuthPct", "authenticity"]


def authenticity(
    reference: NDArray[np.float32],
    samples: NDArray[np.float32],
    *,
    device: str = "cpu",
    progress: Callable[[int, int], object] | None = None,
) -> float:
    """AuthPct: the percentage of samples that are no copies of training images.

    A sample is a copy if its nearest training image has no other training image that is nearer to it than the
    sample is (Alaa et al. 2022, section 5). Of training images that are equally near, the first counts.
    Squared distances are compared in float64, and memory does not grow with the number of pairs. Of good
    samples that are no copies, about half have another training image nearer by; so this number is to be
    compared with that of another set, such as of test images.

    Args:
        reference: (m, d) float32 features of the training images.
        samples: (n, d) float32 features.
        device: torch device of the computation; mps, which has no float64, is replaced by the CPU.
        progress: Called with the rows done and the rows in total.

    Returns:
        0 to 100.

    Raises:
        UndefinedMetricError: A side has fewer than two rows.
        FeatureError: Dimensions differ, or features are not (n, d) finite floats.
    """
    check_sides(reference, samples, "AuthPct")
    target = torch.device("cpu" if device.startswith("mps") else device)
    # TF32 or bfloat16 products would break the margins of the screens.
    with torch.inference_mode(), float32_arithmetic():
        r, s = exact_sides(
            *(torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(target) for x in (reference, samples))
        )
        screening = Screening(r)
        advance = counted(len(r.x) + len(s.x), progress)
        to_another = radii(r, 1, screening, advance)
        authentic = 0
        for nearest, distance in each_stripe(s, screening, Nearest(s, r, screening).look, advance):
            authentic += int((to_another[nearest] < distance).sum())
        return 100 * authentic / len(s.x)


@dataclass(frozen=True)
class AuthPct:
    """AuthPct of the samples; see :func:`authenticity`. Higher is better.

    Attributes:
        output: Of which network and output.
        scores: Its name.
    """

    uses_reference: ClassVar[bool] = True
    finds_copies: ClassVar[bool] = True
    # As precision and recall, which use the same search.
    working_bytes: ClassVar[float] = 8

    output: str = "inception:pool"
    scores: tuple[ScoreSpec, ...] = (
        ScoreSpec(name="authpct", title="AuthPct", higher_is_better=True, decimals=2),
    )

    @property
    def needs(self) -> Mapping[str, Need]:
        """Rows of the output."""
        return {self.output: "rows"}

    def __call__(self, reference: BatchFeatures, samples: BatchFeatures, run: Run) -> tuple[Score, ...]:
        """One score, in percent.

        Raises:
            UndefinedMetricError: A side has no such features, or fewer than two images.
            FeatureError: The sides do not fit together.
        """
        value = authenticity(
            reference.rows(self.output),
            samples.rows(self.output),
            device=run.device,
            progress=run.report(self.scores[0].name),
        )
        return (Score(name=self.scores[0].name, value=value, parameters=parameters(self)),)

    def influence(
        self, reference: BatchFeatures, samples: BatchFeatures, run: Run
    ) -> Mapping[str, HalfSplit]:
        """The score of halves; see :func:`~evalkit.metrics.halves.halves_of_authenticity`.

        Raises:
            UndefinedMetricError: A side has no such features, or fewer than four images.
            FeatureError: The sides do not fit together.
        """
        r, s = reference.rows(self.output), samples.rows(self.output)
        check_sides(r, s, "AuthPct")
        found = halves_of_authenticity(
            r,
            s,
            classes=classes_of(samples, self.output, len(s)),
            reference_classes=classes_of(reference, self.output, len(r)),
            device=resolve_device("cpu" if run.device.startswith("mps") else run.device),
        )
        return {self.scores[0].name: found}

    def influence_bytes(self, images: Sequence[int], width: int) -> int:
        """Memory of :meth:`influence` beyond the rows."""
        return halves_bytes(images, width)
