"""Building a reference batch: the pixels are ADM's, its evaluator reads the file, and no work is lost."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invoked import Result
from numpy.typing import NDArray
from optional import optional
from PIL import Image

import reference_batches.build as module
from evalkit.cli.options import ExtractorSetup
from evalkit.comparison import compare
from evalkit.errors import ImageError, InputError, OutputError, UndefinedMetricError
from evalkit.extractors.pixels import Pixels
from evalkit.images import open_images
from evalkit.report.text import table
from reference_batches.build import Settings, build, center_crop, decode_rgb

Run = Callable[..., Result]
MODES = ("RGB", "L", "CMYK", "P", "RGBA", "LA", "1")


class Wide(Pixels):
    """Pixels as features, of the widths that statistics in a file must have."""

    dimensions = {"pool": 2048, "spatial": 2023}  # noqa: RUF012 - as the class it stands for
    batch_size = 8

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        features = super().__call__(images)
        return {
            layer: np.resize(features[layer].T, (d, len(images))).T for layer, d in self.dimensions.items()
        }


def photographs(count: int, seed: int = 0) -> list[Image.Image]:
    """Cut-outs of scikit-learn's two photographs, of odd sizes and all colour modes."""
    photographs = optional("sklearn.datasets", "demo").load_sample_images().images
    photos = [Image.fromarray(photo) for photo in photographs]
    random = np.random.default_rng(seed)
    images = []
    for index in range(count):
        photo = photos[index % 2]
        width, height = random.integers(20, 420, 2).tolist()
        left, top = (
            random.integers(0, photo.width - width),
            random.integers(0, photo.height - min(height, 400)),
        )
        images.append(photo.crop((left, top, left + width, top + height)).convert(MODES[index % len(MODES)]))
    return images


def file_of(image: Image.Image) -> tuple[str, bytes]:
    """Suffix and bytes, as JPEG where the mode allows."""
    buffer = io.BytesIO()
    kind = "JPEG" if image.mode in ("RGB", "L", "CMYK") else "PNG"
    image.save(buffer, kind)
    return {"JPEG": "JPEG", "PNG": "png"}[kind], buffer.getvalue()


def by_hand(data: bytes, size: int) -> NDArray[np.uint8]:
    """ADM's crop, written down plainly a second time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image: Image.Image = Image.open(io.BytesIO(data)).convert("RGB")
    halvings = 0
    while min(image.width >> (halvings + 1), image.height >> (halvings + 1)) >= size:
        halvings += 1
    for _ in range(halvings):
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    short = min(image.width, image.height)
    image = image.resize(
        (round(image.width * (size / short)), round(image.height * (size / short))), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 photographs in class folders, as ImageNet's training images lie."""
    root = tmp_path_factory.mktemp("imagenet") / "train"
    for index, image in enumerate(photographs(300)):
        suffix, data = file_of(image)
        path = root / f"n{index % 7:08d}" / f"n{index % 7:08d}_{index}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def contents(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


# ------------------------------------------------------------------------------------------ the crop


@pytest.mark.parametrize("size", [64, 200])
def test_photographs_are_cropped_as_by_hand(tree: Path, tmp_path: Path, size: int) -> None:
    build(tree, tmp_path / "ref.npz", Settings(size=size, statistics="none"))
    built = contents(tmp_path / "ref.npz")["arr_0"]
    paths = sorted(tree.rglob("n*_*"), key=lambda path: path.relative_to(tree).as_posix())
    assert len(built) == len(paths) == 300
    for path, pixels in zip(paths, built, strict=True):
        np.testing.assert_array_equal(pixels, by_hand(path.read_bytes(), size), err_msg=str(path))


def crop(pixels: Any, size: int) -> NDArray[np.uint8]:
    return center_crop("image", Image.fromarray(np.asarray(pixels, np.uint8)), size)


def grey(rows: Any) -> NDArray[np.uint8]:
    return np.repeat(np.asarray(rows, np.uint8)[:, :, None], 3, axis=2)


def test_exactly_twice_the_size_is_a_mean_of_four() -> None:
    rows = np.array([[0, 4, 10, 10], [8, 12, 10, 30], [1, 1, 200, 100], [1, 1, 100, 0]])
    np.testing.assert_array_equal(crop(grey(rows), 2)[..., 0], [[6, 15], [1, 100]])


def test_one_pixel_less_than_twice_is_not_halved() -> None:
    ramp = grey(np.tile(np.arange(7) * 30, (7, 1)))
    by_bicubic = Image.fromarray(ramp).resize((4, 4), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(crop(ramp, 4), np.asarray(by_bicubic))
    assert not np.array_equal(
        crop(ramp, 4), np.asarray(Image.fromarray(ramp).resize((4, 4), Image.Resampling.BOX))
    )


def test_the_shorter_side_decides_and_the_offset_is_rounded_down() -> None:
    columns = grey(np.tile(np.arange(9) * 10, (4, 1)))  # landscape: 9 wide, 4 high
    np.testing.assert_array_equal(crop(columns, 4), columns[:, 2:6])
    np.testing.assert_array_equal(crop(columns.swapaxes(0, 1), 4), columns.swapaxes(0, 1)[2:6])  # portrait


def test_odd_sides_lose_a_pixel_when_halved() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8))
    halved = image.resize((6, 4), Image.Resampling.BOX)
    np.testing.assert_array_equal(center_crop("image", image, 4), np.asarray(halved)[:, 1:5])


def test_smaller_than_the_size_is_enlarged() -> None:
    assert (crop(grey(np.full((3, 5), 77)), 8) == 77).all()
    assert crop(grey(np.full((3, 5), 77)), 8).shape == (8, 8, 3)


def test_of_the_size_is_left_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(crop(pixels, 16), pixels)


def test_too_narrow() -> None:
    with pytest.raises(ImageError, match="image: 30000x1 pixels, too narrow"):
        crop(np.zeros((1, 30000, 3)), 256)


# ---------------------------------------------------------------------------------------- decoding


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_exif_orientation_is_not_applied() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_rgb("x", encoded(image, "JPEG", exif=exif))
    assert decoded.size == (16, 8)
    np.testing.assert_array_equal(decoded, decode_rgb("x", encoded(image, "JPEG")))


def test_transparency_is_dropped_and_not_blended() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    np.testing.assert_array_equal(decode_rgb("x", encoded(Image.fromarray(pixels), "PNG")), pixels[..., :3])


def test_palette_with_transparency_gives_its_colours() -> None:
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4), "P")
    image.putpalette(list(range(48)))
    data = encoded(image, "PNG", transparency=bytes([0, 128]))
    np.testing.assert_array_equal(np.asarray(decode_rgb("x", data)).reshape(-1), np.arange(48))


def test_sixteen_bits_keep_the_upper_eight() -> None:
    values = np.array([[0, 255, 256], [32768, 40000, 65535]], np.uint16)
    decoded = np.asarray(decode_rgb("x", encoded(Image.fromarray(values), "PNG")))
    np.testing.assert_array_equal(decoded[..., 0], [[0, 0, 1], [128, 156, 255]])
    assert (decoded == decoded[..., :1]).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_thirty_two_bits_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match=f"photo: Pillow mode {mode}, 32 bits"):
        decode_rgb("photo", encoded(Image.new(mode, (4, 4)), "TIFF"))


def test_truncated_and_other_files_are_refused() -> None:
    data = encoded(photographs(1)[0], "JPEG")
    with pytest.raises(ImageError, match=r"photo: cannot be decoded .*truncated"):
        decode_rgb("photo", data[: len(data) // 2])
    with pytest.raises(ImageError, match="photo: cannot be decoded"):
        decode_rgb("photo", b"<html>")


# ------------------------------------------------------------------------------------ what is written


def test_the_file_is_what_the_reference_evaluator_reads(tree: Path, tmp_path: Path) -> None:
    report = build(tree, tmp_path / "ref.npz", Settings(size=16, images=50), extractor=Wide())
    assert (report.kept, report.classes, report.counted, report.bad) == (50, 7, 300, ())
    with zipfile.ZipFile(tmp_path / "ref.npz") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.namelist()[0] == "arr_0.npy"
    file = contents(tmp_path / "ref.npz")
    assert file["arr_0"].shape == (50, 16, 16, 3)
    assert file["arr_0"].dtype == np.uint8
    assert file["arr_1"].dtype == np.int64
    everything = build(tree, tmp_path / "all.npz", Settings(size=16, statistics="none"))
    assert everything.kept == 300
    whole = contents(tmp_path / "all.npz")
    np.testing.assert_array_equal(file["indices"], np.random.RandomState(0).permutation(300)[:50])
    np.testing.assert_array_equal(file["arr_0"], whole["arr_0"][file["indices"]])
    np.testing.assert_array_equal(file["arr_1"], whole["arr_1"][file["indices"]])
    # Statistics of all 300, not of the 50.
    features = Wide()(whole["arr_0"])
    for layer, suffix in (("pool", ""), ("spatial", "_s")):
        np.testing.assert_allclose(
            file[f"mu{suffix}"], features[layer].mean(axis=0, dtype=np.float64), atol=1e-12
        )
        np.testing.assert_allclose(file[f"sigma{suffix}"], np.cov(features[layer], rowvar=False), atol=1e-12)
    source = open_images(tmp_path / "ref.npz")
    assert source.provenance is not None
    assert source.provenance["statistics"]["images"] == 300
    assert source.provenance["classes"] == [f"n{index:08d}" for index in range(7)]
    assert source.provenance == json.loads(str(file["provenance"]))


def test_another_seed_draws_others(tree: Path, tmp_path: Path) -> None:
    build(tree, tmp_path / "ref.npz", Settings(size=16, images=50, seed=3, statistics="none"))
    np.testing.assert_array_equal(
        contents(tmp_path / "ref.npz")["indices"], np.random.RandomState(3).permutation(300)[:50]
    )


def test_statistics_of_those_kept_or_none(tree: Path, tmp_path: Path) -> None:
    report = build(tree, tmp_path / "a.npz", Settings(size=8, images=20, statistics="kept"), extractor=Wide())
    file = contents(tmp_path / "a.npz")
    assert report.counted == 20
    pool = Wide()(file["arr_0"])["pool"]
    np.testing.assert_allclose(file["mu"], pool.mean(axis=0, dtype=np.float64), atol=1e-12)
    build(tree, tmp_path / "b.npz", Settings(size=8, images=20, statistics="none"))
    assert set(contents(tmp_path / "b.npz")) == {"arr_0", "arr_1", "indices", "provenance"}


def test_compare_uses_the_statistics_and_says_so(tree: Path, tmp_path: Path) -> None:
    build(tree, tmp_path / "ref.npz", Settings(size=16), extractor=Wide())
    images = contents(tmp_path / "ref.npz")["arr_0"]
    comparison = compare(tmp_path / "ref.npz", images, extractor=Wide(), store=None)
    assert comparison.reference.statistics == "file"
    assert comparison.samples.statistics == "images"
    assert comparison.reference.statistics_images == 300
    assert "mean and covariance of 300 images from the file" in table(comparison)
    assert not any("another extractor" in warning for warning in comparison.warnings)
    assert comparison["fid"] < 1e-3
    assert comparison["sfid"] < 1e-3


def test_statistics_of_another_extractor_are_noticed(tree: Path, tmp_path: Path) -> None:
    build(tree, tmp_path / "ref.npz", Settings(size=16, images=20), extractor=Wide("other"))
    images = contents(tmp_path / "ref.npz")["arr_0"]
    comparison = compare(tmp_path / "ref.npz", images, extractor=Wide(), store=None)
    assert any("ref.npz are of another extractor" in warning for warning in comparison.warnings)


def test_the_number_of_workers_changes_nothing(tree: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 5):
        settings = Settings(size=24, images=40)
        build(tree, tmp_path / f"{workers}.npz", settings, extractor=Wide(), workers=workers)
    one, two, five = ((tmp_path / f"{workers}.npz").read_bytes() for workers in (1, 2, 5))
    assert one == two == five


def test_every_container_gives_the_same(tree: Path, tmp_path: Path) -> None:
    files = {path.relative_to(tree.parent).as_posix(): path.read_bytes() for path in tree.rglob("n*_*")}
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    names = sorted(files)
    pyarrow, parquet = optional("pyarrow", "parquet"), optional("pyarrow.parquet", "parquet")
    table = pyarrow.table(
        {
            "image": [{"bytes": files[name], "path": name} for name in names],
            "label": [int(name.split("/")[1][1:]) for name in names],
        }
    )
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=50)
    expected = None
    for source in (tree, tmp_path / "x.zip", tmp_path / "x.tar", tmp_path / "x.parquet"):
        build(source, tmp_path / "ref.npz", Settings(size=16, images=60, statistics="none"))
        file = contents(tmp_path / "ref.npz")
        found = {key: file[key].tobytes() for key in ("arr_0", "arr_1", "indices")}
        assert expected in (None, found), source
        expected = found


@pytest.mark.parametrize("kind", ["npz", "npy", "array", "hdf5"])
def test_arrays_are_cropped_too(tmp_path: Path, kind: str) -> None:
    import h5py

    pixels = np.random.default_rng(0).integers(0, 256, (70, 20, 30, 3), dtype=np.uint8)
    source: Any = {"array": pixels}.get(kind, tmp_path / f"x.{kind}")
    if kind == "npz":
        np.savez(source, arr_0=pixels, arr_1=np.arange(70) % 3)
    elif kind == "npy":
        np.save(source, pixels)
    elif kind == "hdf5":
        with h5py.File(source, "w") as file:
            file["images"] = pixels
    build(source, tmp_path / "ref.npz", Settings(size=8, images=30, statistics="none"))
    built = contents(tmp_path / "ref.npz")
    for index, found in zip(built["indices"], built["arr_0"], strict=True):
        np.testing.assert_array_equal(found, center_crop("", Image.fromarray(pixels[index]), 8))
    if kind == "npz":
        np.testing.assert_array_equal(built["arr_1"], built["indices"] % 3)


# ------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("names", "how", "expected"),
    [
        (["b/1.png", "a/1.png", "b/2.png"], "auto", [0, 1, 1]),
        (["x/y/b/1.png", "x/y/a/deep/1.png"], "auto", [0, 1]),
        (["1.png", "a/1.png"], "auto", None),
        (["a/1.png", "a/2.png"], "auto", None),
        (["1.png", "2.png"], "auto", None),
        (["b/1.png", "a/1.png"], "none", None),
        (["dog_1.png", "cat_7.png", "cat_1_2.png"], "names", [0, 0, 1]),
    ],
)
def test_labels(tmp_path: Path, names: list[str], how: Any, expected: list[int] | None) -> None:
    for name in names:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "x" / name)
    build(tmp_path / "x", tmp_path / "ref.npz", Settings(size=4, labels=how, statistics="none"))
    found = contents(tmp_path / "ref.npz").get("arr_1")
    assert (None if found is None else found.tolist()) == expected


@pytest.mark.parametrize(
    ("how", "message"), [("folders", "1.png has no class"), ("names", "1.png has no class")]
)
def test_labels_that_are_not_there(tmp_path: Path, how: Any, message: str) -> None:
    (tmp_path / "x").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "x" / "1.png")
    with pytest.raises(InputError, match=message):
        build(tmp_path / "x", tmp_path / "ref.npz", Settings(size=4, labels=how, statistics="none"))


# ------------------------------------------------------------------------------------------ bad images


@pytest.fixture
def with_bad(tmp_path: Path) -> tuple[Path, list[int]]:
    """60 photographs, those with the returned indices damaged."""
    folder = tmp_path / "photos"
    folder.mkdir()
    bad = [0, 7, 8, 31, 59]
    for index, image in enumerate(photographs(60, seed=1)):
        data = encoded(image.convert("RGB"), "JPEG")
        (folder / f"{index:03d}.jpg").write_bytes(data[: len(data) // 2] if index in bad else data)
    return folder, bad


def test_a_bad_image_stops_the_build_and_is_named(with_bad: tuple[Path, list[int]], tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"000\.jpg: cannot be decoded.*--skip-bad"):
        build(with_bad[0], tmp_path / "ref.npz", Settings(size=16, statistics="none"))
    assert not (tmp_path / "ref.npz").exists()


@pytest.mark.parametrize("images", [None, 20, 55])
@pytest.mark.parametrize("statistics", ["all", "kept", "none"])
def test_bad_images_are_left_out(
    with_bad: tuple[Path, list[int]], tmp_path: Path, images: int | None, statistics: Any
) -> None:
    folder, bad = with_bad
    out = tmp_path / "ref.npz"
    settings = Settings(size=16, images=images, statistics=statistics)
    report = build(folder, out, settings, extractor=Wide(), skip_bad=True)
    file = contents(out)
    order = np.arange(60) if images is None else np.random.RandomState(0).permutation(60)
    chosen = order[:images]
    spare = [index for index in order[len(chosen) :] if index not in bad]
    expected = [index if index not in bad else None for index in chosen.tolist()]
    if images is None:
        expected = [index for index in expected if index is not None]
    else:
        expected = [spare.pop(0) if index is None else index for index in expected]
    assert file["indices"].tolist() == expected
    for index, pixels in zip(file["indices"], file["arr_0"], strict=True):
        np.testing.assert_array_equal(pixels, by_hand((folder / f"{index:03d}.jpg").read_bytes(), 16))
    if statistics != "none":
        counted = np.setdiff1d(np.arange(60), bad) if statistics == "all" else file["indices"]
        assert report.counted == len(counted)
        pixels = np.stack([by_hand((folder / f"{index:03d}.jpg").read_bytes(), 16) for index in counted])
        np.testing.assert_allclose(
            file["mu"], Wide()(pixels)["pool"].mean(axis=0, dtype=np.float64), atol=1e-9
        )
    named = json.loads(str(file["provenance"]))["left_out"]
    assert tuple(named) == report.bad
    if statistics == "all" or images is None:
        assert [int(text.split("/")[-1].split(".jpg")[0].split(", ")[-1]) for text in named] == bad


def test_too_few_are_left(with_bad: tuple[Path, list[int]], tmp_path: Path) -> None:
    settings = Settings(size=16, images=56, statistics="none")
    with pytest.raises(ImageError, match="5 of 60 images cannot be decoded and 55 are left"):
        build(with_bad[0], tmp_path / "ref.npz", settings, skip_bad=True)


def test_skipping_goes_on_where_the_stop_was(with_bad: tuple[Path, list[int]], tmp_path: Path) -> None:
    out, settings = tmp_path / "ref.npz", Settings(size=16)
    with pytest.raises(ImageError):
        build(with_bad[0], out, settings, extractor=Wide())
    build(with_bad[0], out, settings, extractor=Wide(), skip_bad=True)
    build(with_bad[0], tmp_path / "once.npz", settings, extractor=Wide(), skip_bad=True)
    assert out.read_bytes() == (tmp_path / "once.npz").read_bytes()


# ----------------------------------------------------------------------------------------- interruption


def test_killed_again_and_again_gives_the_same_file(tree: Path, tmp_path: Path) -> None:
    code = f"""
import signal, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1] / "support")!r}]
import torch
import deaths
import reference_batches.build as module
from test_build import Path, Settings, Wide
torch.set_num_threads(1)  # a process with a pool of threads cannot be forked
module.SAVE_SECONDS, Wide.batch_size = 0, 20
starts = []
def progress(stage, done, total):
    if not starts:
        starts.append(done)
        print(done, flush=True)
def build(out, **options):
    settings = Settings(size=16, images=50)
    return lambda: module.build({str(tree)!r}, Path(sys.argv[1]) / out, settings, extractor=Wide(), **options)
calls = deaths.calls_of(build("once.npz"))
killed = build("ref.npz", progress=progress)
for number in (1, 2, 5):  # the settings, and what is done
    for after in (False, True):
        dying = deaths.dying_at_rename(number, killed, after=after)
        assert deaths.wait(deaths.start(dying)) == -signal.SIGKILL
kills, code = deaths.again_and_again(killed, calls)
assert kills >= 3, kills
assert code == 0, code
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    starts = [int(line) for line in done.stdout.split()]
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert len(set(starts)) >= 4  # it went on, again and again
    assert (tmp_path / "ref.npz").read_bytes() == (tmp_path / "once.npz").read_bytes()
    assert not (tmp_path / "ref.npz.building").exists()


def test_an_unfinished_build_of_another_kind_is_not_touched(tree: Path, tmp_path: Path) -> None:
    class Broken(Wide):
        def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
            raise OSError("broken")

    out = tmp_path / "ref.npz"
    with pytest.raises(OSError, match="broken"):
        build(tree, out, Settings(size=16), extractor=Broken())
    with pytest.raises(
        InputError, match=r"ref\.npz\.building holds an unfinished build that differs in --size\. "
    ):
        build(tree, out, Settings(size=24), extractor=Wide())
    build(tree, out, Settings(size=16), extractor=Wide())
    assert out.exists()


@pytest.fixture
def unfinished(with_bad: tuple[Path, list[int]], tmp_path: Path) -> Callable[[], Any]:
    """A build that stopped at a bad image, the first being good; returns what goes on with it."""

    class OneByOne(Pixels):
        batch_size = 1

    out, settings = tmp_path / "ref.npz", Settings(size=16)
    shutil.copy(with_bad[0] / "001.jpg", with_bad[0] / "000.jpg")
    with pytest.raises(ImageError, match=r"007\.jpg"):
        build(with_bad[0], out, settings, extractor=OneByOne())
    return lambda: build(with_bad[0], out, settings, extractor=OneByOne(), skip_bad=True)


def rewritten(state: Path, **changes: Any) -> None:
    with np.load(state) as arrays:
        values: dict[str, Any] = dict(arrays)
    np.savez(state, **{**values, **changes})


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.write_bytes(state.read_bytes()[:-50]),
        lambda state: state.write_bytes(b"PK" + bytes(50)),
        lambda state: np.savez(state, position=np.array(3)),
        lambda state: rewritten(state, position=np.array("x")),
        lambda state: rewritten(state, position=np.array(10**6)),
        lambda state: rewritten(state, bad=np.array("[" * 100_000)),
        lambda state: rewritten(state, bad=np.array('[["a", 1]]')),
        lambda state: rewritten(state, digest=np.zeros(3, np.uint8)),
        lambda state: rewritten(state, checksums=np.zeros(3)),
        lambda state: rewritten(state, pool_scatter=np.zeros(3)),
        lambda state: rewritten(state, pool_mean=np.full(48, np.nan)),
        lambda state: rewritten(state, spatial_n=np.array(-4)),
    ],
)
def test_a_damaged_state_is_refused(
    damage: Callable[[Path], Any], unfinished: Callable[[], Any], tmp_path: Path
) -> None:
    damage(tmp_path / "ref.npz.building" / "state.npz")
    with pytest.raises(InputError, match=r"state\.npz is damaged .*Delete the folder .*ref\.npz\.building"):
        unfinished()


@pytest.mark.parametrize("content", [b"\xff", b"{}", b"[" * 100_000, b'{"settings": 3}', b"null", b" "])
def test_a_damaged_record_of_the_settings_is_refused(
    content: bytes, unfinished: Callable[[], Any], tmp_path: Path
) -> None:
    (tmp_path / "ref.npz.building" / "settings.json").write_bytes(content)
    with pytest.raises(InputError, match=r"ref\.npz\.building holds an unfinished build that differs in \S"):
        unfinished()


def test_pixels_that_are_not_those_written_are_refused(unfinished: Callable[[], Any], tmp_path: Path) -> None:
    pixels = tmp_path / "ref.npz.building" / "pixels"
    whole = pixels.read_bytes()
    pixels.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(InputError, match=r"pixels is damaged \(they are not those that were written\)"):
        unfinished()
    assert not (tmp_path / "ref.npz").exists()
    pixels.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"pixels is damaged \(its size is another\)"):
        unfinished()
    pixels.write_bytes(whole)
    unfinished()


def test_two_builds_of_one_file_at_once(tree: Path, tmp_path: Path) -> None:
    class Rival(Wide):
        def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
            with pytest.raises(OutputError, match="Another process is building"):
                build(tree, tmp_path / "ref.npz", Settings(size=16), extractor=Wide())
            return super().__call__(images)

    build(tree, tmp_path / "ref.npz", Settings(size=16), extractor=Rival())


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    peaks = []
    for count in (1000, 4000):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
        np.savez(tmp_path / "big.npz", pixels)
        del pixels
        tracemalloc.start()
        build(tmp_path / "big.npz", tmp_path / "ref.npz", Settings(size=64, images=count, statistics="none"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 3,000 images more are 37 MB of pixels; what may grow is their indices.
    assert peaks[1] - peaks[0] < 4e6, f"{peaks} bytes"


# -------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "Size 0"),
        ({"size": 8, "images": 0}, "0 images to keep"),
        ({"size": 8, "seed": -1}, "Seed -1"),
        ({"size": 8, "images": 301}, "301 images to keep of 300"),
    ],
)
def test_bad_settings(tree: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(tree, tmp_path / "ref.npz", Settings(**settings, statistics="none"))
    assert list(tmp_path.iterdir()) == []


def test_statistics_of_one_image(tmp_path: Path) -> None:
    with pytest.raises(UndefinedMetricError, match="statistics of one image"):
        build(np.zeros((1, 8, 8, 3), np.uint8), tmp_path / "ref.npz", Settings(size=8), extractor=Wide())


def test_no_space(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(module.shutil.disk_usage(tmp_path))(10**9, 10**9, 10**6)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"takes 0\.\d+ GB while it is built, and 0\.00 GB are free"):
        build(tree, tmp_path / "ref.npz", Settings(size=16, statistics="none"))
    assert list(tmp_path.iterdir()) == []


def test_statistics_alone_are_no_source(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "x.npz", mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(2023), sigma_s=np.eye(2023)
    )
    with pytest.raises(InputError, match="statistics and no images"):
        build(tmp_path / "x.npz", tmp_path / "ref.npz", Settings(size=8, statistics="none"))


# ------------------------------------------------------------------------------------------ command line


def test_command(tree: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExtractorSetup, "extractor", lambda self: Wide())
    out = tmp_path / "ref.npz"
    result = run("reference", "build", tree, "-o", out, "--size", 16, "--images", 20)
    assert result.code == 0
    assert result.out == f"{out}: 20 images of 16x16, 7 classes, statistics of 300 images\n"
    shown = run("reference", "show", out)
    assert "statistics of 300 images" in shown.out


def test_command_names_what_it_left_out(with_bad: tuple[Path, list[int]], tmp_path: Path, run: Run) -> None:
    arguments = [
        "reference",
        "build",
        with_bad[0],
        "-o",
        tmp_path / "r.npz",
        "--size",
        16,
        "--statistics",
        "none",
    ]
    stopped = run(*arguments)
    assert (stopped.code, stopped.out) == (2, "")
    assert stopped.err.startswith("Error: ")
    assert "000.jpg" in stopped.err
    result = run(*arguments, "--skip-bad")
    assert result.code == 0
    assert "5 images were left out:" in result.out
    assert result.out.count("cannot be decoded") == 5


@pytest.mark.parametrize("arguments", [["nowhere"], [__file__]])
def test_command_with_a_bad_source(tmp_path: Path, run: Run, arguments: list[str]) -> None:
    result = run(
        "reference", "build", *arguments, "-o", tmp_path / "r.npz", "--size", 8, "--statistics", "none"
    )
    assert result.code == 2
    assert result.err.startswith("Error: ")
    assert list(tmp_path.iterdir()) == []
