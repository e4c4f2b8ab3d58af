"""Comparisons in protocols of several networks: statistics of files, subsets, the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invoked import Result
from numpy.typing import NDArray
from stand_ins import NO_STORE, stand_in

from evalkit.cli.options import ExtractorSetup
from evalkit.comparison import Source, Subset, compare, open_source
from evalkit.comparison.plan import choose_metrics
from evalkit.comparison.sources import as_published
from evalkit.errors import InputError
from evalkit.extractors import extractor_class
from evalkit.extractors.inception import Inception
from evalkit.extractors.inception_resizes import CleanFid
from evalkit.extractors.pixels import Pixels
from evalkit.features.moments import Gaussian
from evalkit.metrics.frechet import frechet_distance
from evalkit.report.text import table
from evalkit.results import Comparison, PublishedRow

Invoke = Callable[..., Result]


def test_statistics_of_another_network_are_not_used(images: NDArray[np.uint8], tmp_path: Path) -> None:
    """They are of Inception as ADM resizes for it; pytorch-fid's FID would be of two networks."""
    statistics = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    spatial = {"mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "ref.npz", arr_0=images[:30], **statistics)
    np.savez(tmp_path / "alone.npz", **statistics, **spatial)
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


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, NDArray[np.float64]]:
    """Plain statistics, as wide as the outputs of stand-ins."""
    monkeypatch.setattr("evalkit.images.npz.STATISTICS", {"mu": (12,), "sigma": (12, 12)})
    return {"mu": np.full(12, 100.0), "sigma": np.eye(12)}


def measured(reference: Source, images: NDArray[np.uint8], protocol: str) -> Comparison:
    networks = [stand_in(network) for network in choose_metrics(protocol).networks]
    return compare(reference, images, protocol=protocol, metrics="fid", extractor=networks, run=NO_STORE)


@pytest.mark.parametrize("protocol", ["adm", "pytorch-fid", "clean-fid", "clean-fid-legacy-pytorch"])
def test_plain_statistics_are_of_the_protocol_that_is_named(
    protocol: str, images: NDArray[np.uint8], tmp_path: Path, small: dict[str, Any]
) -> None:
    """Many tools write mu and sigma alone. The file does not say which did, which a warning says, once."""
    np.savez(tmp_path / "ref.npz", **small)
    found = measured(tmp_path / "ref.npz", images, protocol)
    (network,) = choose_metrics(protocol, "fid").networks
    rows = stand_in(network)(images)["pool"]
    expected = frechet_distance(Gaussian(mean=small["mu"], covariance=small["sigma"], n=None), rows)
    assert found["fid"] == pytest.approx(expected, rel=1e-6)
    (warning,) = [text for text in found.warnings if "does not say how the images behind" in text]
    assert (
        f"resized like the other side: {stand_in(network).preprocess}. If they were not, FID is wr" in warning
    )
    assert found.reference.statistics_preprocess == "not said"
    assert found.score("fid").reference == "statistics"  # type: ignore[union-attr]
    assert measured(images[:30], images, protocol).reference.statistics_preprocess is None


def test_plain_statistics_among_several_protocols(
    images: NDArray[np.uint8], tmp_path: Path, small: dict[str, Any]
) -> None:
    """They can be of one resize alone: ADM's, where it is asked for; of no other, if there are two others."""
    np.savez(tmp_path / "ref.npz", **small)
    both = measured(tmp_path / "ref.npz", images, "adm,clean-fid")
    assert both["fid"] == measured(tmp_path / "ref.npz", images, "adm")["fid"]
    assert "is statistics alone" in both.missing["fid@clean-fid"]
    (warning,) = [text for text in both.warnings if "does not say how" in text]
    assert "only ADM's resize is assumed; for another, name it alone" in warning
    others = measured(tmp_path / "ref.npz", images, "clean-fid,pytorch-fid")
    assert others.scores == ()


def test_plain_statistics_of_a_known_resize(
    images: NDArray[np.uint8], tmp_path: Path, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a published file the tool is known: other protocols leave it aside, and ADM warns."""
    np.savez(tmp_path / "ref.npz", **small)

    def known(resize: str) -> Source:
        return as_published(open_source(tmp_path / "ref.npz"), "theirs", resize)

    for resize in ("TF1 bilinear", "Pillow bicubic 299x299 on floats"):
        monkeypatch.setattr(Pixels, "preprocess", extractor_class("inception_clean_fid").preprocess)
        found = measured(known(resize), images, "clean-fid")
        assert ("fid" in found.missing) == (resize == "TF1 bilinear")
        assert not any("does not say" in text for text in found.warnings)
        monkeypatch.setattr(Pixels, "preprocess", extractor_class("inception").preprocess)
        found = measured(known(resize), images, "adm")
        assert found["fid"] == measured(tmp_path / "ref.npz", images, "adm")["fid"]
        wrong = [text for text in found.warnings if "FID is WRONG" in text]
        assert len(wrong) == (resize != "TF1 bilinear")
        assert found.reference.statistics_preprocess == resize
        assert found.reference.source == "published theirs"


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
