"""Arrays in memory and in npy files."""

import os

import numpy as np
import pytest
import torch
from containers import (
    ARRAY_FORMS,
    PIXELS,
    bad,
    limit_images_to,
    npy,
    write_npz,
)

from evalkit.errors import InputError
from evalkit.images import open_images


@pytest.mark.parametrize("form", ARRAY_FORMS)
@pytest.mark.parametrize(
    ("array", "parts"),
    [
        (np.zeros((5, 8, 8), np.uint8), ("(5, 8, 8)", "four axes")),
        (np.zeros((5,), np.uint8), ("(5,)", "four axes")),
        (np.zeros((5, 8, 8, 1), np.uint8), ("(5, 8, 8, 1)", "np.repeat")),
        (np.zeros((5, 8, 8, 4), np.uint8), ("(5, 8, 8, 4)", "alpha")),
        (np.zeros((5, 8, 8, 2), np.uint8), ("(5, 8, 8, 2)", "expected 3 channels")),
        (np.zeros((5, 3, 8, 8), np.uint8), ("looks like NCHW", "transpose(0, 2, 3, 1)")),
        (np.zeros((0, 8, 8, 3), np.uint8), ("(0, 8, 8, 3)", "at least one image")),
        (np.zeros((2, 0, 8, 3), np.uint8), ("(2, 0, 8, 3)", "empty")),
        (np.zeros((2, 8, 8, 3), np.bool_), ("bool", "expected integers or floats")),
        (np.zeros((2, 8, 8, 3), np.complex64), ("complex64", "expected integers or floats")),
    ],
    ids=lambda value: f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else "",
)
def test_wrong_arrays(tmp_path, form, array, parts):
    write, name = ARRAY_FORMS[form]
    bad(write(tmp_path, array), name, *parts)


def test_one_gigantic_image_is_refused_before_allocation(tmp_path, monkeypatch):
    limit_images_to(89, monkeypatch)
    bad(write_npz(tmp_path / "x.npz", PIXELS), "(7, 6, 5, 3)", "89 bytes")
    limit_images_to(90, monkeypatch)
    assert len(open_images(tmp_path / "x.npz")) == 7


def test_truncated_npy(tmp_path):
    path = npy(tmp_path / "x.npy")
    path.write_bytes(path.read_bytes()[:-1])
    bad(path, "x.npy", "(7, 6, 5, 3)", "damaged")


def test_objects_that_are_no_arrays():
    bad([PIXELS], "list", "expected a path or an array")
    bad(torch.zeros(2, 4, 4, 3, requires_grad=True), "<array>", "Tensor", "requires grad")
    bad(np.float32(1), "<array>", "single number")


def test_an_npy_that_is_cut_while_it_is_read(tmp_path):
    source = open_images(npy(tmp_path / "x.npy"))
    os.truncate(tmp_path / "x.npy", 300)
    with pytest.raises(InputError, match=r"x\.npy: cannot be read \(EOFError"):
        list(source.batches(2))


def make_npy(path, images):
    """For the contract of formats."""
    with path.open("wb") as file:
        np.save(file, images)
