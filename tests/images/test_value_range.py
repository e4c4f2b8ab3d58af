"""The range of pixel values: scaled and cut floats are refused, a given range is believed."""

import numpy as np
import pytest
from containers import (
    ARRAY_FORMS,
    PIXELS,
    bad,
    encoded,
    write_folder,
    write_h5,
    write_npz,
)

from evalkit.errors import ImageError, InputError
from evalkit.images import open_images


def test_floats_are_not_rounded(tmp_path):
    values = PIXELS.astype(np.float64) * 0.99 + 0.3
    for path in (write_npz(tmp_path / "x.npz", values), write_h5(tmp_path / "x.h5", images=values)):
        source = open_images(path)
        assert source.dtype == np.float32
        assert "floats" in source.notes[0]
        batch = next(source.batches(7))
        assert batch.dtype == np.float32
        np.testing.assert_array_equal(batch, values.astype(np.float32))


def test_black_floats_are_not_taken_for_scaled_ones():
    assert open_images(np.zeros((2, 4, 4, 3), np.float32)).dtype == np.float32


@pytest.mark.parametrize("form", ARRAY_FORMS)
@pytest.mark.parametrize(
    ("dtype", "value", "shown"),
    [
        (np.float32, np.nan, "nan"),
        (np.float32, np.inf, "inf"),
        (np.float32, -np.inf, "-inf"),
        (np.float16, -3.5, "-3.5"),
        (np.float64, 255.5, "255.5"),
        (np.int64, -1, "-1"),
        (np.int16, 256, "256"),
        (np.uint64, 2**63, str(2**63)),
    ],
)
def test_values_out_of_range_name_the_image(tmp_path, form, dtype, value, shown):
    array = PIXELS.astype(dtype)
    array[5, 1, 2, 0] = value
    write, _ = ARRAY_FORMS[form]
    path = write(tmp_path, array)
    bad(path, "image 5 ", f"the value {shown};", "from 0 to 255", error=ImageError)
    with pytest.raises(ImageError, match="image 5 "):
        list(open_images(path).batches(3, start=4))


@pytest.mark.parametrize("form", ARRAY_FORMS)
def test_scaled_floats_are_refused_at_once(tmp_path, form):
    write, _ = ARRAY_FORMS[form]
    unit = PIXELS.astype(np.float32) / 255
    with pytest.raises(InputError, match=r"\[0, 1\].*expected \[0, 255\].*\(x \* 255\)"):
        open_images(write(tmp_path, unit))
    with pytest.raises(InputError, match=r"\[-1, 1\].*expected \[0, 255\].*\(\(x \+ 1\) \* 127\.5\)"):
        open_images(write(tmp_path, unit * 2 - 1))


def test_the_advice_for_scaled_floats_gives_the_pixels_back():
    x = PIXELS.astype(np.float32) / 255
    np.testing.assert_array_equal((x * 255).round().clip(0, 255).astype(np.uint8), PIXELS)
    x = x * 2 - 1
    np.testing.assert_array_equal(((x + 1) * 127.5).round().clip(0, 255).astype(np.uint8), PIXELS)


FLOATS = PIXELS.astype(np.float32)


SCALED = {
    "0..1": FLOATS / 255,
    "0..1 overshooting": FLOATS / 255 * 1.2 - 0.1,
    "-1..1": FLOATS / 127.5 - 1,
    "-1..1 overshooting": FLOATS / 100 - 1.3,
    "normalised": (FLOATS / 255 - 0.45) / 0.22,
    "latents": (FLOATS - 128) / 20,
    "dark at first": np.concatenate([np.zeros((40, 6, 5, 3), np.float32), FLOATS / 255]),
}


@pytest.mark.parametrize("key", SCALED)
@pytest.mark.parametrize("form", ["npz", "npy", "hdf5", "array", "part"])
def test_scaled_floats_are_refused_whatever_they_overshoot(tmp_path, form, key):
    x = SCALED[key]
    write = {
        "npz": lambda: write_npz(tmp_path / "x.npz", x),
        "npy": lambda: np.save(tmp_path / "x.npy", x) or tmp_path / "x.npy",
        "hdf5": lambda: write_h5(tmp_path / "x.h5", images=x),
        "array": lambda: x,
        "part": lambda: (
            write_npz(tmp_path / "x.npz", FLOATS) and write_npz(tmp_path / "y.npz", x) and "*.npz"
        ),
    }[form]()
    source = str(tmp_path / write) if form == "part" else write
    bad(source, "holds floats from", "it seems; expected [0, 255]", "--value-range", ".round().clip(0, 255)")


@pytest.mark.parametrize("place", [0, 20, 63])
def test_one_scaled_image_among_others_is_found(tmp_path, place):
    x = np.tile(FLOATS, (10, 1, 1, 1))[:64]
    x[place] /= 255
    bad(
        write_npz(tmp_path / "x.npz", x),
        "1 of 64 images hold only floats between",
        f"image {place} (counted from 0)",
    )
    assert len(open_images(tmp_path / "x.npz", value_range="0..255")) == 64


@pytest.mark.parametrize(
    ("value_range", "scale"),
    [("0..1", lambda x: x / 255), ("-1..1", lambda x: x / 127.5 - 1), ((-1, 1), lambda x: x / 127.5 - 1)],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_range_that_is_said_is_believed(tmp_path, value_range, scale, dtype):
    x = scale(PIXELS.astype(np.float64)).astype(dtype)
    path = write_npz(tmp_path / "x.npz", x)
    for source in (path, x, f"{tmp_path}/?.npz"):
        found = open_images(source, value_range=value_range)
        batches = list(found.batches(3))
        assert {batch.dtype for batch in batches} == {np.dtype(np.float32)}
        step = 0.1 if dtype == np.float16 else 1e-4
        np.testing.assert_allclose(np.concatenate(batches), PIXELS, atol=step)
    assert open_images(path, value_range=value_range).digest != open_images(x, value_range="0..255").digest


def test_values_outside_a_range_that_is_said_are_named(tmp_path):
    x = FLOATS / 255
    x[4, 0, 0, 0] = 1.25
    with pytest.raises(ImageError, match=r"image 4 .* holds the value 1\.25; expected .* from 0 to 1.*clip"):
        list(open_images(x, value_range="0..1").batches(3))
    assert "No value of <array> is below 0" in open_images(FLOATS / 255, value_range="-1..1").notes[-1]
    for wrong in ("0..2", "", (0, 2), 1, ("0", "1"), None.__class__):
        with pytest.raises(InputError, match=r"Value range .* expected one of 0\.\.1, -1\.\.1, 0\.\.255"):
            open_images(x, value_range=wrong)


@pytest.mark.parametrize("largest", [1, 2])
def test_floats_cut_to_integers_are_refused(tmp_path, largest):
    x = np.minimum(PIXELS, largest)
    bad(write_npz(tmp_path / "x.npz", x), "holds only the values 0, 1", "--value-range 0..255")
    bad(
        write_folder(tmp_path / "x", {f"{i}.png": encoded(image) for i, image in enumerate(x)}),
        "holds only the values",
    )
    assert len(open_images(x, value_range="0..255")) == 7
    x[-1, 0, 0, 0] = 3
    assert len(open_images(x)) == 7
    assert len(open_images(np.zeros_like(x))) == 7


def test_wrapped_and_binary_integers(tmp_path):
    wrapped = np.array([0, 1, 255], np.uint8)[np.arange(7 * 90).reshape(7, 6, 5, 3) % 3]
    bad(write_npz(tmp_path / "x.npz", wrapped), "holds only the values 0, 1, 255")
    assert len(open_images(np.where(PIXELS > 100, 255, 0).astype(np.uint8))) == 7
