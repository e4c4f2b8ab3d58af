"""What every protocol promises: each test runs over every row of PROTOCOLS."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from stand_ins import NO_STORE, stand_in

from evalkit.comparison import compare
from evalkit.comparison.plan import choose_metrics
from evalkit.errors import InputError
from evalkit.extractors import EXTRACTORS
from evalkit.metrics import METRICS
from evalkit.metrics.base import Metric
from evalkit.protocols import PROTOCOLS, protocol_named
from evalkit.report.text import FORMATS
from evalkit.results import Comparison

every_row = pytest.mark.parametrize("row", PROTOCOLS)


@every_row
def test_it_says_what_it_is(row: str) -> None:
    protocol = protocol_named(row)
    assert protocol.name == row
    for text in (protocol.title, protocol.citation, protocol.byte_rule, protocol.reference):
        assert text
    assert protocol.published_images > 1
    assert all(isinstance(metric, Metric) for metric in protocol.metrics)
    names = [spec.name for metric in protocol.metrics for spec in metric.scores]
    assert names == list(dict.fromkeys(names)) != []
    assert set(choose_metrics(row).networks) <= set(EXTRACTORS)


@every_row
def test_it_computes_all_its_scores_and_names_itself(row: str, images: NDArray[np.uint8]) -> None:
    choice = choose_metrics(row)
    comparison = compare(
        images[::2],
        images[1::2],
        protocol=row,
        extractor=[stand_in(network) for network in choice.networks],
        run=NO_STORE,
    )
    assert [score.name for score in comparison.scores] == [spec.name for spec in choice.specs]
    assert comparison.missing == {}
    assert Comparison.from_json(comparison.to_json()) == comparison
    assert f"protocol   {row}" in FORMATS["table"](comparison)


@every_row
def test_a_part_of_it_and_other_metrics_beside_it(row: str) -> None:
    names = [spec.name for metric in protocol_named(row).metrics for spec in metric.scores]
    part = choose_metrics(row, names[0])
    assert set(names) - set(part.missing) == {spec.name for spec in part.metrics[0].scores}
    more = choose_metrics(row, [*names, *METRICS, "fd@pixels"])
    assert more.metrics[: len(protocol_named(row).metrics)] == protocol_named(row).metrics
    assert {spec.name for spec in more.specs} >= {*names, "fd", "fd@pixels"}
    assert more.missing == {}


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(InputError, match=f"Unknown protocol 'x'.*{'.*'.join(PROTOCOLS)}"):
        protocol_named("x")
