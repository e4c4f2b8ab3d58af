"""Pictures are decoded as Pillow decodes them, or refused by name."""

import io
import tracemalloc

import numpy as np
import pytest
from containers import (
    PIXELS,
    bad,
    encoded,
    image_containers,
    image_files,
    limit_images_to,
    write_folder,
    write_parquet,
    write_zip,
)
from optional import optional
from photographs import photographs
from PIL import Image, PngImagePlugin

from evalkit.errors import ImageError
from evalkit.images import open_images
from evalkit.images.decode import decode_rgb


def test_photographs_decode_as_pillow_decodes_them(tmp_path):
    photos = optional("sklearn.datasets", "demo").load_sample_images().images
    files = {f"{i}.jpg": encoded(photo, "JPEG", quality=90) for i, photo in enumerate(photos)}
    source = open_images(write_zip(tmp_path / "photos.zip", files))
    expected = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files.values()]
    np.testing.assert_array_equal(next(source.batches(2)), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGBA", "LA"])
def test_pillow_modes_become_rgb(tmp_path, mode):
    image = Image.fromarray(PIXELS[0]).convert(mode)
    path = write_folder(tmp_path / "x", {"a.tif" if mode == "CMYK" else "a.png": b""})
    file = next(path.iterdir())
    image.save(file)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(next(open_images(path).batches(1))[0], expected)


def test_image_files_are_streamed(tmp_path):
    one = encoded(np.zeros((256, 256, 3), np.uint8))
    source = open_images(write_zip(tmp_path / "x.zip", {f"{i:04}.png": one for i in range(640)}))
    tracemalloc.start()
    try:
        batches = source.batches(8)
        for _ in range(10):
            next(batches)
        batches.close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 15 * 8 * 256 * 256 * 3  # the whole is 80 batches


def test_mixed_sizes_name_both_files(tmp_path):
    files = image_files() | {"a/c/10.png": encoded(PIXELS[0, :4])}
    for path in image_containers(tmp_path, files):
        bad(path, path.name, "a/c/10.png: 5x4 pixels", "a.png, has 5x6", error=ImageError)


def test_headers_are_looked_at_before_any_work(tmp_path):
    folder, archive, tar = image_containers(tmp_path, image_files() | {"a/c/10.png": encoded(PIXELS[0, :4])})
    parquet = write_parquet(tmp_path / "x.parquet", [encoded(PIXELS[0]), encoded(PIXELS[0, :4])])
    for path in (folder, archive, tar, parquet):
        with pytest.raises(ImageError, match="5x4 pixels"):
            _ = open_images(path).digest


@pytest.mark.parametrize("damage", [lambda data: data[:60], lambda data: b"no image", lambda data: b""])
def test_a_corrupt_image_in_the_middle_is_named(tmp_path, damage):
    files = image_files()
    files["a/c/2.png"] = damage(files["a/c/2.png"])
    for path in image_containers(tmp_path, files):
        bad(path, path.name, "a/c/2.png", "cannot be decoded", error=ImageError)


def test_a_truncated_photograph_is_not_filled_with_grey(tmp_path):
    data = encoded(np.kron(PIXELS[0], np.ones((32, 32, 1), np.uint8)), "JPEG")
    for path in image_containers(tmp_path, {"a.jpg": data, "b.jpg": data[: len(data) // 2]}):
        bad(path, "b.jpg", "truncated", error=ImageError)


def test_transparency(tmp_path):
    rgba = np.dstack([PIXELS[0], np.full((6, 5), 255, np.uint8)])
    rgba[2, 2, 3] = 254
    palette = Image.fromarray(PIXELS[0]).convert("P")
    for name, image, options in (
        ("rgba", rgba, {}),
        ("palette", palette, {"transparency": palette.getpixel((1, 1))}),
    ):
        folder = write_folder(tmp_path / name, {"a.png": encoded(image, **options)})
        bad(folder, "a.png", "transparent", "flatten", error=ImageError)


def test_more_than_8_bits(tmp_path):
    grey = Image.fromarray(np.full((6, 5), 40_000, np.uint16))
    bad(write_folder(tmp_path / "x", {"a.png": encoded(grey)}), "a.png", "I;16", "8 bits", error=ImageError)
    floats = Image.fromarray(np.zeros((6, 5), np.float32))
    bad(write_folder(tmp_path / "y", {"a.tif": encoded(floats, "TIFF")}), "a.tif", "mode F", error=ImageError)


def test_decompression_bomb(tmp_path, monkeypatch):
    path = write_folder(tmp_path / "x", image_files())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    bad(path, "a.png", "DecompressionBombError", error=ImageError)
    monkeypatch.undo()
    limit_images_to(1000, monkeypatch)
    bomb = write_folder(tmp_path / "y", {"a.png": encoded(np.zeros((20, 20, 3), np.uint8))})
    bad(bomb, "a.png", "20x20 pixels", error=ImageError)


def test_only_the_expected_decoders_are_reached(tmp_path):
    """Pillow tells formats from the content, and some of its decoders start external programs."""
    folder = write_folder(tmp_path / "x", {"a.png": encoded(PIXELS[0], "GIF")})
    bad(folder, "a.png", "cannot be decoded", error=ImageError)


def test_png_with_a_megabyte_of_text_or_profile(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_itxt("workflow", "{'node': 1}, " * 110_000, zip=True)
    text.add_text("prompt", "x" * 2_000_000, zip=True)
    profile = b"\0" * 3_000_000
    files = image_files() | {
        "a.png": encoded(PIXELS[0], pnginfo=text),
        "b.png": encoded(PIXELS[5], icc_profile=profile),
    }
    source = open_images(write_folder(tmp_path / "x", files))
    np.testing.assert_array_equal(next(source.batches(7)), PIXELS)


@pytest.mark.parametrize("cut", [10, 30, 45, 60])
def test_a_png_that_is_cut_in_its_text_is_damaged(tmp_path, cut):
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "x" * 100)
    data = encoded(PIXELS[0], pnginfo=text)
    bad(write_folder(tmp_path / "x", {"a.png": data[:cut]}), "a.png: cannot be decoded", error=ImageError)


def test_pointers_in_the_place_of_files_are_named(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    bad(write_folder(tmp_path / "x", {"a.png": pointer}), "a.png", "Git LFS pointer", error=ImageError)
    optional("pyarrow", "parquet")
    write_folder(tmp_path / "y", {"a.parquet": pointer})
    bad(tmp_path / "y", "a.parquet", "Git LFS pointer")


@pytest.mark.parametrize("form", ["webp", "tif", "png"])
def test_frames_after_the_first_are_said(tmp_path, form):
    frames = [Image.fromarray(x) for x in PIXELS]
    (tmp_path / "x").mkdir()
    for i in range(2):
        frames[0].save(tmp_path / "x" / f"{i}.{form}", save_all=True, append_images=frames[1:], lossless=True)
    for _ in range(2):
        source = open_images(tmp_path / "x")
        np.testing.assert_array_equal(next(source.batches(2))[1], PIXELS[0])
        source.identify()
        assert source.notes == (f"2 images of {tmp_path}/x have several frames; only the first is used.",)


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
