"""FDr6: six Fréchet distances as one number, each over that of the dataset's own validation images.

Yang et al. 2026, "Representation Fréchet Loss for Visual Generation" (arXiv 2604.28190).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from evalkit.deviations import Excess, Influence
from evalkit.errors import InputError
from evalkit.features.record import BatchFeatures
from evalkit.metrics.base import Need
from evalkit.metrics.frechet import FrechetDistance
from evalkit.results import Score, ScoreSpec
from evalkit.system.run import Run

__all__ = ["FDr6", "Term", "mean_influence"]

WIDEST = 2048
"""Width of the widest features, Inception's."""


@dataclass(frozen=True)
class Term:
    """One network's part of the mean.

    Attributes:
        name: Of its score.
        title: Of its score.
        output: Network and output.
        validation: Fréchet distance of the 50,000 validation images of ImageNet at 256 pixels to the training
            images, as published: ``FDR_VALIDATION_FD`` of FD-loss's ``eval_all_fds.py``.
    """

    name: str
    title: str
    output: str
    validation: float


# MAE's is rounded to one digit: it may be 0.035 to 0.045, which is 12 % of this term.
TERMS = (
    Term("fdr_inception", "FDr Inception", "inception:pool", 1.68),
    Term("fdr_convnextv2", "FDr ConvNeXtV2", "convnextv2_base:pool", 56.87),
    Term("fdr_dinov2", "FDr DINOv2", "dinov2_vitl14_fdr6:class_token", 14.19),
    Term("fdr_mae", "FDr MAE", "mae_vitl16:class_token", 0.04),
    Term("fdr_siglip2", "FDr SigLIP2", "siglip2_so400m:embedding", 0.60),
    Term("fdr_clip", "FDr CLIP", "clip_vitl14_fdr6:class_token", 5.60),
)


@dataclass(frozen=True)
class FDr6:
    """The mean of six ratios of Fréchet distances, and each of these; lower is better.

    About 1 is as near to the training images of ImageNet as its validation images are. For another dataset
    the ratios mean nothing.

    Attributes:
        terms: The networks, each with its distance of the validation images.
        scores: Names of the mean and of the ratios, in the order of ``terms``.
    """

    uses_reference: ClassVar[bool] = True

    terms: tuple[Term, ...] = TERMS
    scores: tuple[ScoreSpec, ...] = (
        ScoreSpec(name="fdr6", title="FDr6", higher_is_better=False),
        *(ScoreSpec(name=term.name, title=term.title, higher_is_better=False) for term in TERMS),
    )

    def __post_init__(self) -> None:
        if len(self.scores) != 1 + len(self.terms) or not all(term.validation > 0 for term in self.terms):
            raise InputError(
                f"FDr6 of {len(self.terms)} terms and {len(self.scores)} scores: expected a score for the "
                "mean and one for each term, and distances of the validation images above 0"
            )

    @property
    def needs(self) -> Mapping[str, Need]:
        """A Gaussian of each network."""
        return {term.output: "gaussian" for term in self.terms}

    def __call__(self, reference: BatchFeatures, samples: BatchFeatures, run: Run) -> tuple[Score, ...]:
        """The mean, then the ratios.

        Raises:
            UndefinedMetricError: A side lacks the features or the Gaussian of a network, or has one image.
            FeatureError: The sides do not fit together.
        """
        distances = [metric(reference, samples, run)[0].value for metric in self._distances()]
        ratios = [value / term.validation for value, term in zip(distances, self.terms, strict=True)]
        constants = {term.output: term.validation for term in self.terms}
        mean, *others = self.scores
        return (
            Score(
                name=mean.name, value=float(np.mean(ratios)), parameters={"validation_distances": constants}
            ),
            *(
                Score(
                    name=spec.name,
                    value=ratio,
                    parameters={
                        "output": term.output,
                        "distance": distance,
                        "validation_distance": term.validation,
                    },
                )
                for spec, ratio, distance, term in zip(others, ratios, distances, self.terms, strict=True)
            ),
        )

    def influence(
        self, reference: BatchFeatures, samples: BatchFeatures, run: Run
    ) -> Mapping[str, Influence]:
        """Influence values of the ratios, and their mean; errors as those of a Fréchet distance."""
        found = [
            _times(1 / term.validation, *metric.influence(reference, samples, run).values())
            for term, metric in zip(self.terms, self._distances(), strict=True)
        ]
        every = [mean_influence(found), *found]
        return {spec.name: each for spec, each in zip(self.scores, every, strict=True)}

    def influence_bytes(self, images: Sequence[int], width: int) -> int:
        """Memory of :meth:`influence` beyond the rows; the networks come one after another."""
        return FrechetDistance().influence_bytes(images, min(width, WIDEST))

    def _distances(self) -> list[FrechetDistance]:
        return [FrechetDistance(output=term.output) for term in self.terms]


def mean_influence(terms: Sequence[Influence]) -> Influence:
    """Influence values of the mean of scores of the same images.

    What the second order of the terms adds up to is not known; it counts as if they had nothing to do with
    each other, so that the error is not too small.
    """
    first, count = terms[0], len(terms)
    references = [term.reference for term in terms if term.reference is not None]
    biases = [term.bias for term in terms if term.bias is not None]
    excess = np.sum([term.excess for term in terms], axis=0) / count**2
    return replace(
        first,
        samples=np.mean([term.samples for term in terms], axis=0),
        reference=np.mean(references, axis=0) if len(references) == count else None,
        no_reference=next((term.no_reference for term in terms if term.no_reference), ""),
        bias=sum(biases) / count if len(biases) == count else None,
        no_bias=next((term.no_bias for term in terms if term.no_bias), ""),
        excess=Excess(*excess.tolist()),
    )


def _times(factor: float, found: Influence) -> Influence:
    """Influence values of a multiple of a score."""
    return replace(
        found,
        samples=factor * found.samples,
        reference=None if found.reference is None else factor * found.reference,
        bias=None if found.bias is None else factor * found.bias,
        excess=Excess(*(factor**2 * each for each in found.excess)),
    )
