"""Comparisons in protocols of several networks: statistics of files, subsets, the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from invoked import Result
from numpy.typing import NDArray
from stand_ins import NO_STORE, stand_in

from evalkit.cli.options import ExtractorSetup
from evalkit.comparison import Subset, compare
from evalkit.comparison.plan import choose_metrics
from evalkit.errors import InputError
from evalkit.extractors.inception import Inception
from evalkit.extractors.inception_resizes import CleanFid
from evalkit.report.text import table
from evalkit.results import PublishedRow

Invoke = Callable[..., Result]


def test_statistics_of_another_network_are_not_used(images: NDArray[np.uint8], tmp_path: Path) -> None:
    """They are of Inception as ADM resizes for it; pytorch-fid's FID would be of two networks."""
    statistics = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(tmp_path / "ref.npz", arr_0=images[:30], **statistics)
    np.savez(tmp_path / "alone.npz", **statistics)
    network = stand_in("inception_pytorch_fid")
    found, expected, none = (
        compare(reference, images[30:], protocol="pytorch-fid", extractor=network, run=NO_STORE)
        for reference in (tmp_path / "ref.npz", images[:30], tmp_path / "alone.npz")
    )
    assert found["fid"] == expected["fid"]
    assert (found.reference.statistics, found.reference.images) == ("images", 30)
    assert "from the file" not in table(found)
    (warning,) = [text for text in found.warnings if "not used" in text]
    assert "ref.npz are of the network inception, which no metric here looks at" in warning
    assert not any("not used" in text for text in expected.warnings)
    assert none.scores == ()
    assert "alone.npz" in none.missing["fid"]
    assert "statistics alone" in none.missing["fid"]


def test_the_seed_of_a_subset_is_not_that_of_a_metric(images: NDArray[np.uint8]) -> None:
    found = compare(
        images[:30],
        images[30:],
        protocol="adm,torch-fidelity",
        subset=Subset(images=25, seed=5),
        extractor=stand_in("inception"),
        run=NO_STORE,
    )
    recorded = {score.name: dict(score.parameters) for score in found.scores}
    assert recorded["inception_score@torch-fidelity"] == {
        "splits": 10,
        "seed": 2020,
        "subset": 25,
        "subset_seed": 5,
    }
    assert recorded["kid@torch-fidelity"]["seed"] == 2020
    assert recorded["precision"]["seed"] == 5
    lines = {line.split("  ")[0]: line for line in table(found).splitlines()}
    for title in ("Precision", "KID (torch-fidelity)", "Inception Score (torch-fidelity)"):
        assert lines[title].endswith("(of 25 images a side, seed 5)")


@pytest.mark.usefixtures("pixels")
def test_the_command_line_takes_several(run: Invoke, images: NDArray[np.uint8], tmp_path: Path) -> None:
    for name, part in (("ref", images[:30]), ("samples", images[30:])):
        np.savez(tmp_path / f"{name}.npz", arr_0=part)
    sides = tmp_path / "ref.npz", tmp_path / "samples.npz"
    result = run("compare", *sides, "--protocol", "adm,exact", "--no-store")
    assert result.code == 0
    assert "Recall (exact)" in result.out
    assert "protocol   adm,exact;" in result.out
    refused = run("compare", *sides, "--protocol", "adm,other")
    assert (refused.code, refused.out) == (2, "")
    assert "Unknown protocol 'other'. Give one of adm, exact, " in refused.err


def test_published_rows_are_beside_the_first(images: NDArray[np.uint8]) -> None:
    row = PublishedRow(
        dataset="digits", model="a model", scores={"fid": 1.0}, images=30, paper="A paper", table=1
    )
    network = stand_in("inception")
    for protocol, said in (("adm,exact", False), ("exact,adm", True)):
        found = compare(images[:30], images[30:], protocol=protocol, extractor=network, run=NO_STORE)
        assert ("Not like for like" in table(replace(found, published=(row,)))) == said


def setup(**options: object) -> ExtractorSetup:
    chosen = {"device": "cpu", "batch_size": "auto", "precision": "float32", "backend": "torch"}
    return ExtractorSetup(**chosen | {"weights": None, "graph": None} | options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("inception_weights")
def test_options_reach_every_inception_and_weights_are_read_once() -> None:
    options = setup(precision="bfloat16", batch_size="3")
    adm, clean = (options.extractor(network) for network in ("inception", "inception_clean_fid"))
    assert type(adm) is Inception
    assert type(clean) is CleanFid
    assert clean.weights is adm.weights
    assert (clean.precision, clean.batch_size, clean.device) == ("bfloat16", 3, "cpu")


def test_the_graph_has_its_own_resize() -> None:
    options = setup(backend="tensorflow", graph="x.pb")
    with pytest.raises(InputError, match="inception_clean_fid: the graph resizes images itself"):
        options.extractor("inception_clean_fid")


def test_precision_is_checked_on_each_network(images: NDArray[np.uint8]) -> None:
    networks = [stand_in(network, "bfloat16") for network in choose_metrics("adm,clean-fid").networks]
    found = compare(
        images[:30], images[30:], protocol="adm,clean-fid", extractor=networks, run=NO_STORE
    ).precision_check
    assert found["float32"].keys() == found["bfloat16"].keys() >= {"fid", "fid@clean-fid"}
    assert all(found["float32"][name] != found["bfloat16"][name] for name in ("fid", "fid@clean-fid"))
