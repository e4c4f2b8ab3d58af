"""Improved precision and recall."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.errors import FeatureError, InputError, UndefinedMetricError
from evalkit.metrics.base import FeatureSet, Progress, check_features, required_features
from evalkit.results import Score

__all__ = ["Arithmetic", "PrecisionRecall", "precision_recall"]

Arithmetic: TypeAlias = Literal["float16", "exact"]


def precision_recall(
    reference: NDArray[np.float32],
    samples: NDArray[np.float32],
    *,
    k: int = 3,
    arithmetic: Arithmetic = "exact",
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[float, float]:
    """First version: full products."""
    for name, features in (("reference", reference), ("samples", samples)):
        check_features(features, name)
        if len(features) <= k:
            raise UndefinedMetricError(
                f"precision and recall with k = {k} need more than {k} images; {name} has {len(features)}"
            )
    if k < 1:
        raise InputError(f"k is {k}; expected at least 1")
    if reference.shape[1] != samples.shape[1]:
        raise FeatureError(
            f"features of {reference.shape[1]} and of {samples.shape[1]} dimensions cannot be compared"
        )
    r, s = (torch.from_numpy(np.ascontiguousarray(x, np.float32)) for x in (reference, samples))
    radii_r, radii_s = (
        torch.cat([_block(b, x, arithmetic).kthvalue(k + 1).values for b in x.split(1000)]) for x in (r, s)
    )
    in_r, in_s = torch.zeros(len(s), dtype=torch.bool), []
    for b, rad in zip(r.split(1000), radii_r.split(1000)):
        d = _block(b, s, arithmetic)
        in_r |= (d <= rad[:, None]).any(0)
        in_s.append((d <= radii_s).any(1))
    return float(in_r.double().mean()), float(torch.cat(in_s).double().mean())


def _block(u: torch.Tensor, v: torch.Tensor, arithmetic: str) -> torch.Tensor:
    if arithmetic == "float16":
        u, v = u.half(), v.half()
        product = (u.float() @ v.float().T).half()
        nu, nv = ((x * x).float().sum(1).half() for x in (u, v))
        return (nu[:, None] - 2 * product + nv).clamp(min=0)
    u, v = u.double(), v.double()
    return ((u * u).sum(1)[:, None] - 2 * (u @ v.T) + (v * v).sum(1)).clamp(min=0)


@dataclass(frozen=True)
class PrecisionRecall:
    """Improved precision and recall of the samples on pool features."""

    names: ClassVar[tuple[str, ...]] = ("precision", "recall")

    k: int = 3
    arithmetic: Arithmetic = "exact"

    def __call__(
        self,
        reference: FeatureSet,
        samples: FeatureSet,
        *,
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> tuple[Score, ...]:
        """Two scores, ``"precision"`` and ``"recall"``, shares in [0, 1]; higher is better.

        Raises:
            UndefinedMetricError: A side has no pool features, or no more than k images.
            FeatureError: The sides do not fit together.
        """
        values = precision_recall(
            required_features(reference, "pool"),
            required_features(samples, "pool"),
            k=self.k,
            arithmetic=self.arithmetic,
            device=device,
            progress=progress,
        )
        return tuple(
            Score(name=name, value=value, better="higher", parameters=asdict(self))
            for name, value in zip(self.names, values, strict=True)
        )
