"""What a metric is given, and what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import FeatureError, UndefinedMetricError
from evalkit.results import Score

if TYPE_CHECKING:
    from evalkit.metrics.frechet import Statistics

__all__ = ["FeatureSet", "Layer", "Metric", "Progress", "Spread", "check_features", "required_features"]

# Rows that are looked at in one go, so that temporaries stay small.
_ROWS = 4096

Layer: TypeAlias = Literal["pool", "spatial", "logits"]

# Called with the work done so far and the whole of it, in the same arbitrary unit.
Progress: TypeAlias = Callable[[int, int], None]


# Called with a name, a number of pieces of work and the function that does one of them, given its index;
# yields the results in order. Processes that do the same work share it so.
Spread: TypeAlias = Callable[[str, int, Callable[[int], NDArray[Any]]], Iterable[NDArray[Any]]]


class FeatureSet(Protocol):
    """What a metric may ask of one batch of images.

    Attributes:
        name: How the batch is called in messages, for example its file name.
        pool: (n, 2048) float32 ``pool_3`` features, or None where the images are not at hand.
        spatial: (n, 2023) float32 features of ``mixed_6/conv``, flattened H, W, C, or None.
        logits: (n, 1008) float32 class scores before the softmax, or None.
        statistics: Mean and covariance that the file itself carried, by layer (``"pool"``, ``"spatial"``).
            Where present they replace the statistics of the arrays.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - described above
    @property
    def pool(self) -> NDArray[np.float32] | None: ...  # noqa: D102
    @property
    def spatial(self) -> NDArray[np.float32] | None: ...  # noqa: D102
    @property
    def logits(self) -> NDArray[np.float32] | None: ...  # noqa: D102
    @property
    def statistics(self) -> Mapping[str, Statistics]: ...  # noqa: D102


class Metric(Protocol):
    """A frozen dataclass whose fields are its parameters; calling it yields one score for each of `names`.

    It reads the features of `layers` alone, so that others need not stay in memory. Where it is `shared`, it
    gives its work in pieces to `spread`, for several processes to do together.

    Raises :class:`~evalkit.errors.UndefinedMetricError` where the input gives the metric no value.
    """

    @property
    def names(self) -> tuple[str, ...]: ...  # noqa: D102 - described above
    @property
    def layers(self) -> tuple[Layer, ...]: ...  # noqa: D102
    @property
    def shared(self) -> bool: ...  # noqa: D102

    def __call__(  # noqa: D102 - described above
        self,
        reference: FeatureSet,
        samples: FeatureSet,
        *,
        device: str = "cpu",
        progress: Progress | None = None,
        spread: Spread | None = None,
    ) -> tuple[Score, ...]: ...


def check_features(features: NDArray[np.floating], name: str) -> None:
    """Raise FeatureError, with `name` in the message, unless `features` are (n, d), floating and finite."""
    if features.ndim != 2 or features.shape[1] == 0 or features.dtype.kind != "f":
        raise FeatureError(
            f"{name}: features have shape {features.shape} and dtype {features.dtype}; "
            "expected (n, d) of a floating-point dtype; extract them again"
        )
    for start in range(0, len(features), _ROWS):
        finite = np.isfinite(features[start : start + _ROWS]).all(axis=1)
        if not finite.all():
            raise FeatureError(
                f"{name}: the features of image {start + int(finite.argmin())} contain NaN or infinity; "
                "expected finite numbers; check that image and extract the features again"
            )


def required_features(batch: FeatureSet, layer: Layer) -> NDArray[np.float32]:
    """The (n, d) features of `layer`, checked.

    Raises:
        UndefinedMetricError: The batch has none.
        FeatureError: They are not a two-dimensional array of finite floating-point numbers.
    """
    features: NDArray[np.float32] | None = getattr(batch, layer)
    if features is None:
        remedy = (
            "use Inception weights that include the classifier head"
            if layer == "logits"
            else "give the images (arr_0), not only their statistics"
        )
        raise UndefinedMetricError(f"{batch.name} has no {layer} features, which this metric needs; {remedy}")
    check_features(features, f"{batch.name}, {layer}")
    return features
