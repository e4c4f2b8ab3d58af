"""The closest pairs: planted copies come first, beside what they are copies of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from invoked import Result
from numpy.typing import NDArray
from photographs import photographs
from PIL import Image
from stand_ins import NO_STORE, InceptionPixels

from evalkit.comparison import measure
from evalkit.comparison.nearest import check_nearest, write_nearest
from evalkit.comparison.pairs import Measured
from evalkit.comparison.plan import Subset, choose_metrics
from evalkit.comparison.sources import Opened, Source, open_sources
from evalkit.errors import EvalkitError, InputError, OutputError, UndefinedMetricError
from evalkit.features.moments import Moments
from evalkit.features.record import Features
from evalkit.images import open_images
from evalkit.report.image_grid import CAPTION_HEIGHT, FONT_SIZE
from evalkit.results import Comparison

Pictures = NDArray[np.uint8]
COPIES = {7: 30, 20: 3, 4: 59}
"""Indices of planted samples, each with that of the reference's image that it is a copy of."""


@pytest.fixture(scope="module")
def photos() -> Pictures:
    """(120, 16, 16, 3): small photographs."""
    small = [image.convert("RGB").resize((16, 16)) for image in photographs(120)]
    return np.stack([np.asarray(image) for image in small])


@pytest.fixture(scope="module")
def copied(photos: Pictures) -> Pictures:
    """(60, 16, 16, 3): the other photographs, some of them copies, all but the first slightly changed."""
    images = photos[60:].copy()
    for changed, (place, original) in enumerate(COPIES.items()):
        images[place] = photos[original]
        images[place, :changed, 0] ^= 1
    return images


def measured(*sides: Source, metrics: str = "fid", **how: object) -> tuple[Opened, Opened, Measured]:
    reference, samples = open_sources(*sides)
    (found,) = measure(
        [reference, samples],
        choose_metrics("adm", metrics),
        extractor=InceptionPixels(),
        keep_rows=True,
        nearest=6,
        run=NO_STORE,
        **how,  # type: ignore[arg-type]
    )
    return reference, samples, found


def drawn(path: Path, count: int) -> list[Pictures]:
    """The pairs of images in a sheet, (16, 32, 3) each, which are shown four times as large."""
    sheet = np.asarray(Image.open(path))
    height, width = 64 + 2 * CAPTION_HEIGHT + 2, 128 + 2
    columns = round((count * (height - 2) / 128) ** 0.5)
    assert len(sheet) == 6 * FONT_SIZE + -(-count // columns) * height
    cells = []
    for row, column in (divmod(index, columns) for index in range(count)):
        cell = sheet[6 * FONT_SIZE + row * height :, column * width :][1 : height - 1, 1 : width - 1]
        np.testing.assert_array_equal(cell[:64], cell[:64:4, ::4].repeat(4, axis=0).repeat(4, axis=1))
        for line in (cell[64 : 64 + CAPTION_HEIGHT], cell[64 + CAPTION_HEIGHT :]):
            assert line.min() < 128 < line.max()
        cells.append(cell[:64:4, ::4])
    return cells


def test_copies_come_first_beside_their_originals(photos: Pictures, copied: Pictures, tmp_path: Path) -> None:
    reference = tmp_path / "training.npz"
    np.savez(reference, photos[:60])
    sides = measured(reference, copied)
    write_nearest(tmp_path / "nearest.png", *sides)
    found = sides[2].comparison
    (pairs,) = found.closest.values()
    assert [*found.closest] == ["inception:pool"]
    assert {pair.sample: pair.reference for pair in pairs[:3]} == COPIES
    assert pairs[0].distance == 0
    assert [pair.distance for pair in pairs] == sorted(pair.distance for pair in pairs)
    ratios = [pair.ratio or 0 for pair in pairs]
    assert max(ratios[:3]) < 0.1 < min(ratios[3:])
    assert Comparison.from_json(found.to_json()) == found
    for cell, pair in zip(drawn(tmp_path / "nearest.png", 6), pairs, strict=True):
        both = [copied[pair.sample], photos[pair.reference]]
        np.testing.assert_array_equal(cell, np.concatenate(both, axis=1))
    text = Image.open(tmp_path / "nearest.png").text
    assert text["Title"] == "The closest pairs of samples and reference"
    assert text["Description"].startswith(
        "The 6 of 60 samples in <array> that are nearest to an image of training.npz; each with that image "
        "on its right. Below: their indices, distance in inception:pool, and its ratio"
    )


def test_images_of_another_size_stand_beside_each_other(photos: Pictures, tmp_path: Path) -> None:
    larger = photos[:60].repeat(2, axis=1).repeat(2, axis=2)
    sides = measured(larger, photos[:60])
    write_nearest(tmp_path / "nearest.png", *sides)
    for cell in drawn(tmp_path / "nearest.png", 6):
        assert np.abs(cell[:, :16].astype(int) - cell[:, 16:]).max() < 60


def features_of(images: Pictures, *, statistics: bool = False) -> Features:
    rows = InceptionPixels()(images)["pool"]
    return Features(
        name="photos.h5",
        digest="1",
        network="inception",
        extractor="pixels",
        fingerprint=InceptionPixels().fingerprint,
        arrays={} if statistics else {"pool": rows},
        gaussians={"pool": Moments.of(rows).gaussian()} if statistics else {},
        count=len(images),
    )


def test_features_without_images_have_pairs_and_no_sheet(photos: Pictures, tmp_path: Path) -> None:
    """The record has the pairs of features, and of statistics none."""
    sides = measured(features_of(photos[:60]), photos[60:])
    assert sides[2].comparison.closest == measured(photos[:60], photos[60:])[2].comparison.closest
    with pytest.raises(InputError, match=r"cannot be shown: photos\.h5 holds features and no images"):
        write_nearest(tmp_path / "nearest.png", *sides)
    assert measured(features_of(photos[:60], statistics=True), photos[60:])[2].comparison.closest == {}


def test_what_has_no_answer_is_refused_and_writes_nothing(photos: Pictures, tmp_path: Path) -> None:
    reference, samples, found = measured(photos[:60], photos[60:])
    without = replace(found, comparison=replace(found.comparison, closest={}))
    cases: list[tuple[type[EvalkitError], str, Opened, Measured]] = [
        (InputError, "photos.h5 holds features and no images", features_of(photos), found),
        (UndefinedMetricError, "no metric has features of both sides", samples, without),
    ]
    for kind, said, given, of in cases:
        with pytest.raises(kind, match=said):
            write_nearest(tmp_path / "nearest.png", reference, given, of)
    with pytest.raises(OutputError):
        write_nearest(tmp_path / "nowhere" / "nearest.png", reference, samples, found)
    assert [*tmp_path.iterdir()] == []


def test_images_that_changed_are_not_shown(photos: Pictures, tmp_path: Path) -> None:
    for number, image in enumerate(photos[:60]):
        Image.fromarray(image).save(tmp_path / f"{number:02}.png")
    sides = measured(tmp_path, photos[60:])
    Image.fromarray(photos[99]).save(tmp_path / "00.png", compress_level=0)
    with pytest.raises(InputError, match="changed"):
        write_nearest(tmp_path / "nearest.png", *sides)
    assert not (tmp_path / "nearest.png").exists()


def test_cheap_checks(photos: Pictures, tmp_path: Path) -> None:
    images, features = open_images(photos), features_of(photos)
    np.savez(tmp_path / "x.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    check_nearest(64, images, images)
    for said, arguments, subset in (
        ("The 0 closest pairs", (0, images, images), None),
        ("photos.h5 holds features and no images. Give the images of both", (64, features, images), None),
        ("photos.h5 holds features and no images. Give the images of both", (64, images, features), None),
        ("holds statistics and no images", (64, open_images(tmp_path / "x.npz"), images), None),
        ("holds 1 image", (64, images, open_images(photos[:1])), None),
        ("leave out the subset", (64, images, images), Subset(images=5)),
    ):
        with pytest.raises(InputError, match=said):
            check_nearest(*arguments, subset=subset)


@pytest.mark.usefixtures("pixels")
def test_command(run: Callable[..., Result], photos: Pictures, copied: Pictures, tmp_path: Path) -> None:
    """The scores are those without the sheets; both sheets are written, and the record has the pairs."""
    sides = tmp_path / "ref.npz", tmp_path / "samples.npz"
    for side, images in zip(sides, (photos[:60], copied), strict=True):
        np.savez(side, images)
    how = ("compare", *sides, "--no-store", "--format", "markdown")
    sheets = ("--nearest", 6, tmp_path / "nearest.png", "--worst", 2, tmp_path / "worst.png")
    shown = run(*how, *sheets, "--json", tmp_path / "record.json")
    assert (shown.code, shown.out) == (0, run(*how).out)
    (pairs,) = Comparison.from_json((tmp_path / "record.json").read_bytes()).closest.values()
    assert {pair.sample: pair.reference for pair in pairs[:3]} == COPIES
    assert len(drawn(tmp_path / "nearest.png", 6)) == 6
    description = Image.open(tmp_path / "worst.png").text["Description"]
    assert description.startswith(
        "2 of 60 samples in samples.npz that raise FID most, the worst first; 2 of 60"
    )
    assert description.endswith("FID of samples.npz against ref.npz; each image is above its index.")
    alone = run(*how, "--metrics", "recall", "--no-error-bars", "--nearest", 6, tmp_path / "again.png")
    assert alone.code == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "nearest.png").read_bytes()


@pytest.mark.usefixtures("pixels")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--nearest", "6", "nearest.jpg"), "ends in .png"),
        (("--nearest", "0", "nearest.png"), "The 0 closest pairs"),
        (("--nearest", "6", "nearest.png", "--subset", "50"), "leave out the subset"),
        (
            ("samples.npz", "--nearest", "6", "nearest.png"),
            "--nearest shows one set of samples, and 2 were given",
        ),
        (("--nearest", "6", "nearest.png", "--worst", "6", "nearest.png"), "would both write nearest.png"),
    ],
)
def test_command_refuses_before_the_work(
    run: Callable[..., Result],
    photos: Pictures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ref.npz", "samples.npz"):
        np.savez(name, photos[:60])
    failed = run("compare", "ref.npz", "samples.npz", *arguments)
    assert failed.code == 2
    assert said in failed.err
    assert failed.out == ""
    assert not Path("nearest.png").exists()
