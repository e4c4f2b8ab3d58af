"""The images that cost most: planted ones come first, from any container, and the sheet shows them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from invoked import Result
from numpy.typing import NDArray
from photographs import photographs
from PIL import Image, ImageDraw, ImageFont
from stand_ins import NO_STORE, InceptionPixels

from evalkit.comparison import measure
from evalkit.comparison.pairs import Measured
from evalkit.comparison.plan import Subset, choose_metrics
from evalkit.comparison.sources import Opened, Source, open_sources
from evalkit.comparison.worst import check_worst, write_worst
from evalkit.errors import EvalkitError, InputError, OutputError, UndefinedMetricError
from evalkit.features.moments import Moments
from evalkit.features.record import Features
from evalkit.images import ImageSource, open_images
from evalkit.report.image_grid import CAPTION_HEIGHT, CAPTION_SIZE, FONT_SIZE, Block, write_sheet

FID = choose_metrics("adm", "fid")
Pictures = NDArray[np.uint8]


@pytest.fixture(scope="module")
def photos() -> Pictures:
    """(240, 16, 16, 3): small photographs."""
    small = [image.convert("RGB").resize((16, 16)) for image in photographs(240)]
    return np.stack([np.asarray(image) for image in small])


def planted(photos: Pictures, places: list[int], seed: int = 0) -> Pictures:
    """The photographs with noise in these places."""
    images = photos.copy()
    images[places] = np.random.default_rng(seed).integers(0, 256, (len(places), 16, 16, 3))
    return images


def measured(*sides: Source, **how: object) -> tuple[Opened, Opened, Measured]:
    reference, samples = open_sources(*sides)
    (found,) = measure(
        [reference, samples],
        FID,
        extractor=InceptionPixels(),
        keep_rows=True,
        run=NO_STORE,
        **how,  # type: ignore[arg-type]
    )
    return reference, samples, found


def drawn(path: Path, count: int) -> list[list[Pictures]]:
    """The images in a sheet of two blocks of ``count`` images of 16x16, four times as large, captioned."""
    sheet = np.asarray(Image.open(path))
    height, width = 64 + CAPTION_HEIGHT + 2, 64 + 2
    columns = min(count, round((count * (height - 2) / 64) ** 0.5))
    rows = -(-count // columns)
    assert len(sheet) == 2 * (2 * FONT_SIZE + rows * height)
    blocks = []
    for top in (2 * FONT_SIZE, 4 * FONT_SIZE + rows * height):
        places = [divmod(index, columns) for index in range(count)]
        cells = [sheet[top + r * height :, c * width :][1 : height - 1, 1 : width - 1] for r, c in places]
        for cell in cells:
            np.testing.assert_array_equal(cell[:64], cell[:64:4, ::4].repeat(4, axis=0).repeat(4, axis=1))
        blocks.append([cell[:64:4, ::4] for cell in cells])
    return blocks


def npz(folder: Path, images: Pictures) -> tuple[Path, NDArray[np.int64]]:
    np.savez(folder / "x.npz", images)
    return folder / "x.npz", np.arange(len(images))


def shuffled_names(count: int) -> tuple[list[str], NDArray[np.int64]]:
    """A name for each image; and the places of the images in the order of the names."""
    order = np.random.default_rng(1).permutation(count)
    return [f"{place:03d}.png" for place in order], order


def files(folder: Path, images: Pictures) -> tuple[Path, NDArray[np.int64]]:
    names, order = shuffled_names(len(images))
    (folder / "x").mkdir()
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(folder / "x" / name)
    return folder / "x", order


def zipped(folder: Path, images: Pictures) -> tuple[Path, NDArray[np.int64]]:
    path, order = files(folder, images)
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        for name in shuffled_names(len(images))[0]:
            archive.write(path / name, name)
    return folder / "x.zip", order


@pytest.mark.parametrize("container", [npz, files, zipped])
def test_planted_noise_comes_first(
    container: Callable[[Path, Pictures], tuple[Path, NDArray[np.int64]]], photos: Pictures, tmp_path: Path
) -> None:
    """In both blocks, at the indices that it has in its container."""
    bad, lost = [7, 100, 4], [50, 119]
    path, places = container(tmp_path, planted(photos[120:], bad, seed=1))
    sides = measured(planted(photos[:120], lost, seed=2), path)
    assert write_worst(tmp_path / "worst.png", 6, *sides) == []
    samples, reference = drawn(tmp_path / "worst.png", 6)
    influence = sides[2].deviations["fid"]
    for images, source, values, expected in (
        (samples, sides[1], influence.samples, places[bad].tolist()),
        (reference, sides[0], influence.reference, lost),
    ):
        assert values is not None
        order = np.argsort(-values)[:6]
        assert sorted(order[: len(expected)].tolist()) == sorted(expected)
        assert isinstance(source, ImageSource)
        whole = np.concatenate([*source.batches(50)])
        np.testing.assert_array_equal(np.stack(images), whole[order])


def test_each_image_has_its_caption_and_each_block_its_heading(photos: Pictures, tmp_path: Path) -> None:
    blocks = [
        Block(heading="those above", images=photos[:2], captions=["12", "345"]),
        Block(heading="those below", images=np.zeros((1, 300, 200, 3), np.uint8), captions=["6"]),
    ]
    write_sheet(tmp_path / "x.png", blocks, title="Two kinds", description="Pictures, ä and 中")
    assert Image.open(tmp_path / "x.png").text == {"Title": "Two kinds", "Description": "Pictures, ä and 中"}
    sheet = np.asarray(Image.open(tmp_path / "x.png"))
    cell = 2 + 64 + CAPTION_HEIGHT
    assert sheet.shape == (2 * 2 * FONT_SIZE + cell + 2 + 300 + CAPTION_HEIGHT, 202, 3)

    def text(
        words: str, size: int, canvas: tuple[int, int], at: tuple[float, float], anchor: str
    ) -> Pictures:
        picture = Image.new("RGB", canvas, "white")
        font = ImageFont.load_default(size)
        ImageDraw.Draw(picture).text(at, words, fill="black", font=font, anchor=anchor)
        return np.asarray(picture)

    line = 2 * FONT_SIZE
    for top, heading in ((0, "those above"), (line + cell, "those below")):
        expected = text(heading, FONT_SIZE, (202, line), (FONT_SIZE, FONT_SIZE), "lm")
        assert expected.min() < 128
        np.testing.assert_array_equal(sheet[top : top + line], expected)
    middle = CAPTION_HEIGHT / 2
    for left, caption in ((1, "12"), (67, "345")):
        expected = text(caption, CAPTION_SIZE, (64, CAPTION_HEIGHT), (32, middle), "mm")
        assert expected.min() < 128
        np.testing.assert_array_equal(
            sheet[line + 65 : line + 65 + CAPTION_HEIGHT, left : left + 64], expected
        )
    np.testing.assert_array_equal(sheet[-1 - CAPTION_HEIGHT - 300 : -1 - CAPTION_HEIGHT, 1:201], 0)


def test_no_more_than_those_that_raise_fid(photos: Pictures, tmp_path: Path) -> None:
    sides = measured(photos[:120], photos[120:])
    influence = sides[2].deviations["fid"]
    assert influence.reference is not None
    counts = [int((values > 0).sum()) for values in (influence.samples, influence.reference)]
    assert max(counts) < 120
    write_worst(tmp_path / "worst.png", 1000, *sides)
    rows = [-(-count // round((count * 80 / 64) ** 0.5)) for count in counts]
    sheet = np.asarray(Image.open(tmp_path / "worst.png"))
    assert len(sheet) == 4 * FONT_SIZE + sum(rows) * (64 + CAPTION_HEIGHT + 2)


def features_of_photos(images: Pictures, *, statistics: bool = False) -> Features:
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


@pytest.mark.parametrize(
    ("statistics", "why"), [(True, "mean and covariance are used"), (False, "holds features and no images")]
)
def test_a_reference_without_images_is_left_out(
    statistics: bool, why: str, photos: Pictures, tmp_path: Path
) -> None:
    sides = measured(features_of_photos(photos[:120], statistics=statistics), photos[120:])
    (note,) = write_worst(tmp_path / "one.png", 6, *sides)
    assert note.startswith("The images of the reference that are covered least are not shown: ")
    assert why in note
    write_worst(tmp_path / "both.png", 6, *measured(photos[:120], photos[120:]))
    one, both = (np.asarray(Image.open(tmp_path / name)) for name in ("one.png", "both.png"))
    assert len(both) == 2 * len(one)


def test_what_has_no_answer_is_refused_and_writes_nothing(photos: Pictures, tmp_path: Path) -> None:
    path, (reference, samples, found) = tmp_path / "worst.png", measured(photos[:120], photos[120:])
    features = features_of_photos(photos[120:])
    cases: list[tuple[type[EvalkitError], str, Opened, Measured]] = [
        (InputError, "photos.h5 holds features and no images. Give the images", features, found),
        (InputError, "FID is of 120 images, and <array> holds 119", open_images(photos[121:]), found),
        (
            UndefinedMetricError,
            "error bars were not",
            samples,
            measured(photos[:120], photos[120:], error_bars=False)[2],
        ),
        (UndefinedMetricError, "no error bar: .*singular", samples, measured(photos[:40], photos[120:])[2]),
        (
            UndefinedMetricError,
            "summed up|only sums",
            samples,
            measured(photos[:120], photos[120:], subset=Subset(images=60))[2],
        ),
        (
            UndefinedMetricError,
            "FID was not computed: not requested",
            samples,
            replace(found, comparison=replace(found.comparison, scores=(), missing={"fid": "not requested"})),
        ),
    ]
    for kind, said, given, of in cases:
        with pytest.raises(kind, match=said):
            write_worst(path, 6, reference, given, of)
    with pytest.raises(OutputError):
        write_worst(tmp_path / "nowhere" / "worst.png", 6, reference, samples, found)
    assert [*tmp_path.iterdir()] == []


def test_images_that_changed_are_not_shown(photos: Pictures, tmp_path: Path) -> None:
    path, _ = files(tmp_path, photos[120:])
    sides = measured(photos[:120], path)
    Image.fromarray(photos[0]).save(path / "000.png", compress_level=0)
    with pytest.raises(InputError, match="changed"):
        write_worst(tmp_path / "worst.png", 6, *sides)
    assert not (tmp_path / "worst.png").exists()


def test_cheap_checks(photos: Pictures) -> None:
    samples, networks = open_images(photos), [InceptionPixels()]
    statistics = features_of_photos(photos, statistics=True)
    check_worst(64, samples, FID)
    check_worst(64, samples, FID, reference=statistics, extractors=networks)
    check_worst(64, open_images(photos[:49]), FID, reference=open_images(photos[:49]), extractors=networks)
    for said, arguments, how in (
        ("The 0 images", (0, samples, FID), {}),
        ("holds features and no images", (64, features_of_photos(photos), FID), {}),
        ("add fid", (64, samples, choose_metrics("adm", "kid")), {}),
        ("leave out the subset", (64, samples, FID), {"subset": Subset(images=5)}),
        ("error bars", (64, samples, FID), {"error_bars": False}),
        ("holds 48 images, and each has 48", (64, open_images(photos[:48]), FID), {"extractors": networks}),
        (
            "holds 40 images, and each has 48",
            (64, samples, FID),
            {"reference": open_images(photos[:40]), "extractors": networks},
        ),
    ):
        with pytest.raises(InputError, match=said):
            check_worst(*arguments, **how)  # type: ignore[arg-type]


def test_samples_of_which_fid_uses_mean_and_covariance_are_refused(photos: Pictures, tmp_path: Path) -> None:
    """Those of another output than FID's do not matter."""
    for suffix, width in (("", 2048), ("_s", 2023)):
        statistics = {f"mu{suffix}": np.zeros(width), f"sigma{suffix}": np.eye(width)}
        np.savez(tmp_path / f"x{suffix}.npz", arr_0=photos, **statistics)
    check_worst(64, open_images(tmp_path / "x_s.npz"), FID)
    with pytest.raises(InputError, match=r"x\.npz carries mean and covariance, which FID uses instead"):
        check_worst(64, open_images(tmp_path / "x.npz"), FID)


@pytest.mark.usefixtures("pixels")
def test_command(run: Callable[..., Result], photos: Pictures, tmp_path: Path) -> None:
    """The scores are those without the sheet; a note says where there is no reference to show."""
    samples = tmp_path / "samples.npz"
    np.savez(tmp_path / "ref.npz", photos[:120])
    np.savez(samples, planted(photos[120:], [7, 100]))
    how = ("compare", tmp_path / "ref.npz", samples, "--no-store")
    shown = run(*how, "--worst", "6", tmp_path / "worst.png")
    assert shown.code == 0
    assert shown.out == run(*how).out
    assert len(drawn(tmp_path / "worst.png", 6)) == 2
    record = tmp_path / "record.json"
    adm = run(*how, "--format", "adm", "--json", record, "--worst", "6", tmp_path / "again.png")
    assert adm.code == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "worst.png").read_bytes()


@pytest.mark.usefixtures("pixels")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--worst", "6", "worst.jpg"), "ends in .png"),
        (("--worst", "0", "worst.png"), "The 0 images"),
        (("--worst", "6", "worst.png", "--no-error-bars"), "error bars"),
        (("--worst", "6", "worst.png", "--subset", "50"), "leave out the subset"),
        (("--worst", "6", "worst.png", "--metrics", "recall"), "add fid"),
        (("samples.npz", "--worst", "6", "worst.png"), "shows one set of samples, and 2 were given"),
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
    assert not Path("worst.png").exists()


@pytest.mark.usefixtures("pixels")
def test_too_few_images_are_refused_before_the_work(
    run: Callable[..., Result], photos: Pictures, tmp_path: Path
) -> None:
    sides = tmp_path / "ref.npz", tmp_path / "few.npz"
    for side, images in zip(sides, (photos[:60], photos[60:70]), strict=True):
        np.savez(side, images)
    failed = run("compare", *sides, "--worst", "6", tmp_path / "worst.png")
    assert failed.code == 2
    assert failed.out == ""
    assert "holds 10 images, and each has 48" in failed.err


@pytest.mark.usefixtures("pixels")
def test_scores_are_printed_although_the_sheet_has_none_to_show(
    run: Callable[..., Result], photos: Pictures, tmp_path: Path
) -> None:
    np.savez(tmp_path / "ref.npz", photos[:60])
    np.savez(tmp_path / "alike.npz", np.tile(photos[60:70], (6, 1, 1, 1)))
    failed = run(
        "compare", tmp_path / "ref.npz", tmp_path / "alike.npz", "--worst", "6", tmp_path / "worst.png"
    )
    assert failed.code == 2
    assert "FID has no error bar" in failed.err
    assert failed.out.startswith("reference")
