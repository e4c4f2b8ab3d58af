"""The metrics: features in, numbers out.

To add one: write a file here with a frozen dataclass that is a :class:`~evalkit.metrics.base.Metric`, add its
row below, and a test. Tables, Markdown, CSV, plots, sweeps and the contract test read what it says of itself.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Collection
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from evalkit.errors import InputError, did_you_mean, listing
from evalkit.extractors import EXTRACTORS, extractor_class

if TYPE_CHECKING:
    from evalkit.metrics.base import Metric
    from evalkit.metrics.frechet import frechet_estimate

__all__ = ["METRICS", "frechet_estimate", "named", "on_network"]

# Name: "module:Name" of a metric, or of its class to be made with its defaults; loaded when first used.
METRICS: dict[str, str] = {
    "fid": "evalkit.metrics.frechet:FID",
    "sfid": "evalkit.metrics.frechet:SFID",
    "inception_score": "evalkit.metrics.inception_score:InceptionScore",
    "precision_recall": "evalkit.metrics.precision_recall:PrecisionRecall",
    "fd": "evalkit.metrics.frechet:FD",
    "kid": "evalkit.metrics.kernel:KernelDistance",
    "kid_subsets": "evalkit.metrics.kernel_subsets:SubsetKernelDistance",
    "mmd_rbf": "evalkit.metrics.mmd_rbf:RBFDistance",
    "density_coverage": "evalkit.metrics.density_coverage:DensityCoverage",
    "mind": "evalkit.metrics.mind:MIND",
    "vendi": "evalkit.metrics.vendi:Vendi",
    "authpct": "evalkit.metrics.authenticity:AuthPct",
    "c_t": "evalkit.metrics.data_copying:DataCopying",
    "class_fid": "evalkit.metrics.by_class:ClassFrechet",
    "class_precision_recall": "evalkit.metrics.by_class:ClassPrecisionRecall",
    "fdr6": "evalkit.metrics.fdr6:FDr6",
}


def __getattr__(name: str) -> Any:
    if name == "frechet_estimate":  # loaded when it is first used
        return pkgutil.resolve_name("evalkit.metrics.frechet:frechet_estimate")
    raise AttributeError(f"module 'evalkit.metrics' has no attribute {name!r}")


def named(name: str, known: Collection[Metric] = ()) -> Metric:
    """The metric of a name.

    Args:
        name: A score of one of ``known``, a row of :data:`METRICS`, or ``row@network`` for the same metric on
            another network.
        known: Metrics whose parameters are fixed, those of a protocol.

    Raises:
        InputError: There is no such metric or network.
    """
    for metric in known:
        if name in {spec.name for spec in metric.scores}:
            return metric
    row, at, network = name.partition("@")
    if row not in METRICS:
        scores = [spec.name for metric in known for spec in metric.scores]
        names = [*scores, *(other for other in METRICS if other not in scores)]
        raise InputError(
            f"Unknown metric {name!r}. Give one of {listing(names, 40)}, or METRIC@NETWORK, such as "
            f"fd@pixels.{did_you_mean(row, names)}"
        )
    if at and network not in EXTRACTORS:
        raise InputError(
            f"Unknown network {network!r} in {name!r}. Give one of {listing(EXTRACTORS, 40)}, such as "
            f"{row}@pixels.{did_you_mean(network, EXTRACTORS)}"
        )
    found = pkgutil.resolve_name(METRICS[row])
    made: Metric = found() if isinstance(found, type) else found
    if network:
        return on_network(made, network)
    # The protocol's parameters, under whichever name its scores are requested.
    return next((metric for metric in known if metric.scores == made.scores), made)


def on_network(metric: Any, network: str) -> Metric:
    """The same metric on the first output of another network, its scores called ``name@network``.

    Raises:
        InputError: The metric is defined for one network alone, or there is no such network.
    """
    if not {"output", "scores"} <= {field.name for field in fields(metric)}:
        names = " and ".join(spec.name for spec in metric.scores)
        raise InputError(f"{names} needs {', '.join(metric.needs)}, which {network} does not have.")
    output = next(iter(extractor_class(network).outputs))
    scores = pkgutil.resolve_name("evalkit.metrics.base:scores_at")(metric.scores, network)
    moved: Metric = replace(metric, output=f"{network}:{output}", scores=scores)
    return moved
