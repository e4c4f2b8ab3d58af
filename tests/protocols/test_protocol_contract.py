"""What every protocol promises: each test runs over every row of PROTOCOLS."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from stand_ins import NO_STORE, stand_in

from evalkit.comparison import compare
from evalkit.comparison.plan import choose_metrics, make_plan
from evalkit.comparison.scores import NOT_KEPT
from evalkit.errors import InputError
from evalkit.extractors import EXTRACTORS
from evalkit.images import ImageSource
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


# The first digits of the sha256 of each text. Records store these texts and are compared by them, so
# rewording a rule would make records of two versions of evalkit incomparable.
BYTE_RULES = {
    **dict.fromkeys(("adm", "exact", "torch-fidelity"), "963493d0a0f9"),
    **dict.fromkeys(("pytorch-fid", "clean-fid-legacy-pytorch"), "c669dd2331e1"),
    "clean-fid": "256b0c221903",
    "edm2": "935f647c21d3",
    "dgm-eval": "416f188219c4",
    "cmmd": "b751f5fbde0b",
    "fdr6": "39a663acd908",
}


@every_row
def test_its_byte_rule_has_the_words_that_records_have(row: str) -> None:
    assert hashlib.sha256(protocol_named(row).byte_rule.encode()).hexdigest()[:12] == BYTE_RULES[row]


@every_row
@pytest.mark.parametrize("other", ["precision_recall", "inception_score"])
def test_what_is_advised_where_sums_alone_are_kept_keeps_the_features(row: str, other: str) -> None:
    assert other in NOT_KEPT
    names = [spec.name for metric in protocol_named(row).metrics for spec in metric.scores]
    choice = choose_metrics(row, [*names, other])
    plan = make_plan(choice.metrics, subset=None, is_streaming_better=lambda outputs: True)
    assert plan.moments == frozenset()
    assert plan.rows == {output for metric in choice.metrics for output in metric.needs}


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


def test_several_are_measured_in_one_pass(images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each score is what its protocol gives alone; the images are read once."""
    together = ",".join(PROTOCOLS)
    choice = choose_metrics(together)
    networks = {network: stand_in(network) for network in choice.networks}
    sides = images[::2], images[1::2]
    read = []
    batches = ImageSource.batches

    def counted(self: ImageSource, *arguments: Any) -> Any:
        read.append(self.name)
        return batches(self, *arguments)

    monkeypatch.setattr(ImageSource, "batches", counted)
    found = compare(*sides, protocol=together, extractor=[*networks.values()], run=NO_STORE)
    assert len(read) == 2  # the reference and the samples
    assert found.protocol == together
    assert found.missing == {}
    assert [score.name for score in found.scores] == [spec.name for spec in choice.specs]
    for row in PROTOCOLS:
        needed = [networks[network] for network in choose_metrics(row).networks]
        alone = compare(*sides, protocol=row, extractor=needed, run=NO_STORE)
        suffix = "" if row == next(iter(PROTOCOLS)) else f"@{row}"
        for score in alone.scores:
            again = found.score(f"{score.name}{suffix}")
            assert again is not None
            # A Fréchet distance alone is of sums, which round in another order.
            assert again.value == pytest.approx(score.value, rel=1e-9)
            assert (again.parameters, again.std) == (score.parameters, score.std)
            assert score.stderr in (again.stderr, None)
    assert Comparison.from_json(found.to_json()) == found
    assert "FID (clean-fid)" in FORMATS["table"](found)


def test_a_score_of_several_protocols_is_that_of_each() -> None:
    choice = choose_metrics("adm,clean-fid,pytorch-fid", "fid")
    assert [metric.scores[0].name for metric in choice.metrics] == ["fid", "fid@clean-fid", "fid@pytorch-fid"]
    assert [metric.scores[0].name for metric in choose_metrics("adm,clean-fid", "kid").metrics] == [
        "kid@clean-fid"
    ]
    (one,) = choose_metrics("adm, clean-fid", "fid@clean-fid").metrics
    assert one.needs == {"inception_clean_fid:pool": "gaussian"}


def test_a_protocol_named_twice_is_refused() -> None:
    with pytest.raises(InputError, match="adm is named twice"):
        protocol_named("adm,exact,adm")
    with pytest.raises(InputError, match="Unknown protocol ''"):
        protocol_named("adm,")


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(InputError, match=f"Unknown protocol 'x'.*{'.*'.join(PROTOCOLS)}"):
        protocol_named("x")
