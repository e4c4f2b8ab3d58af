"""The catalog against the list it was written from, and `evalkit reference list`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from containers import npz_bytes
from invoked import Result

from evalkit.errors import InputError
from reference_batches.catalog import closest, entries, find
from reference_batches.fetch import cache_path
from reference_batches.published import published_rows
from reference_batches.statistics import statistics_files

Invoke = Callable[..., Result]

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden" / "adm_published.json").read_text(encoding="utf-8")
)
DATASETS = list(dict.fromkeys(row["dataset"] for row in GOLDEN["rows"]))


def test_batches_are_those_published() -> None:
    published = GOLDEN["published_batches"]
    expected = {
        f"{published['_url_prefix']}{folder}/{file}"
        for folder, files in published.items()
        if "/" in folder
        for file in (files["reference"], *files["samples"])
    }
    assert {url for entry in entries().values() for url in entry.urls} == expected
    assert len(entries()) == len(expected) == 34


def test_what_the_batches_hold() -> None:
    assert {entry.dataset for entry in entries().values()} == set(DATASETS)
    for dataset in DATASETS:
        reference, *samples = entries(dataset).values()
        assert (reference.name, reference.kind, reference.images) == (dataset, "reference", 10_000)
        assert {(entry.kind, entry.images) for entry in samples} == {("samples", 50_000)}
        assert {entry.size for entry in (reference, *samples)} == {
            int(dataset.removeprefix("imagenet")) if dataset.startswith("imagenet") else 256
        }
        # Published as labelled: what the file's name says so of, and the ImageNet samples.
        assert reference.labels == ("labeled" in reference.file)
        assert {entry.labels for entry in samples} == {dataset.startswith("imagenet")}


# Which row each batch is of is said nowhere in the table: by hand, one by one.
@pytest.mark.parametrize(
    ("batch", "fid"),
    [
        ("admnet_imagenet64", 2.61),
        ("admnet_guided_imagenet128", 2.97),
        ("admnet_guided_25step_imagenet128", 5.98),
        ("admnet_imagenet256", 10.94),
        ("admnet_guided_imagenet256", 4.59),
        ("admnet_guided_25step_imagenet256", 5.44),
        ("admnet_upsampled_imagenet256", 7.49),
        ("admnet_guided_upsampled_imagenet256", 3.94),
        ("admnet_guided_imagenet512", 7.72),
        ("admnet_guided_upsampled_imagenet512", 3.85),
        ("admnet_dropout_lsun_cat", 5.57),
        ("biggan_deep_trunc1_imagenet256", None),
        ("biggan_deep_imagenet64", None),
        ("admnet_lsun_horse", None),
        ("imagenet256", None),
    ],
)
def test_numbers_of_a_batch(batch: str, fid: float | None) -> None:
    published = find(batch).published
    assert (published and published.scores["fid"]) == fid
    assert published is None or published in published_rows(find(batch).dataset)


def test_exact_digits_round_to_the_published_ones() -> None:
    known = [entry for entry in entries().values() if entry.exact]
    assert len(known) == 3
    for entry in known:
        assert entry.published is not None
        for name, value in entry.exact.items():
            if name in entry.published.scores:
                assert entry.published.scores[name] == round(value, 2), (entry.name, name)


@pytest.mark.parametrize("kind", ["reference", "samples"])
def test_approximate_bytes(kind: Any) -> None:
    entry = dataclasses.replace(find("imagenet64"), kind=kind, images=7, size=16)
    arrays: dict[str, Any] = {"arr_0": np.zeros((7, 16, 16, 3), np.uint8), "arr_1": np.zeros(7, np.int64)}
    if kind == "reference":
        for suffix, d in (("", 2048), ("_s", 2023)):
            arrays |= {f"mu{suffix}": np.zeros(d), f"sigma{suffix}": np.zeros((d, d))}
    assert 0 < len(npz_bytes(**arrays)) - entry.approximate_bytes < 400 * len(arrays)


def test_unknown_names() -> None:
    with pytest.raises(InputError, match=r"no published batch 'imagnet256'.*such as imagenet256"):
        find("imagnet256")
    with pytest.raises(InputError, match="'cifar10'; expected imagenet64, imagenet128"):
        entries("cifar10")
    assert closest("VIRTUAL_imagenet256_labelled.npz")[0] == "imagenet256"
    assert closest("refs/admnet_imagenet64.np")[0] == "admnet_imagenet64"
    assert closest("samples_50000x256x256x3.npz") == []


def test_entries_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        find("imagenet64").images = 3  # type: ignore[misc]


def test_list(run: Invoke) -> None:
    batches, others = run("reference", "list").out.split("\n\n")
    title, *rows = others.splitlines()
    assert title == "Statistics of other tools:"
    assert [row.split()[0] for row in rows] == ["name", *statistics_files()]
    lines = {line.split()[0]: line for line in batches.splitlines()}
    assert list(lines) == ["name", *entries()]
    assert len({len(line) for line in lines.values()}) <= 3  # "here" and its yes or no: aligned
    assert "3.94   6.14  215.84   0.83   0.53 no" in lines["admnet_guided_upsampled_imagenet256"]
    path = cache_path(find("lsun_cat"))
    path.parent.mkdir(parents=True)
    path.touch()
    lines = {
        line.split()[0]: line for line in run("reference", "list", "--dataset", "lsun_cat").out.splitlines()
    }
    assert list(lines) == ["name", "lsun_cat", "admnet_dropout_lsun_cat", "stylegan2_lsun_cat"]
    assert [line.split()[-1] for line in lines.values()] == ["here", "yes", "no", "no"]
    assert run("reference", "list", "--dataset", "cifar100").code == 2
    of_cifar10 = run("reference", "list", "--dataset", "cifar10").out.splitlines()
    assert [line.split()[0] for line in of_cifar10[2:]] == [*statistics_files("cifar10")]


def test_list_as_json(run: Invoke) -> None:
    content = json.loads(run("reference", "list", "--json").out)
    assert [batch["name"] for batch in content] == [*entries(), *statistics_files()]
    batch = next(batch for batch in content if batch["name"] == "admnet_guided_imagenet128")
    assert batch.pop("here") is False
    assert batch == dataclasses.asdict(find("admnet_guided_imagenet128"))
    assert batch["exact"]["fid"] == 2.9732887
