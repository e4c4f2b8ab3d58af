"""Labels: one class for each image, or a note that says why not."""

import numpy as np
import pytest
from containers import (
    PIXELS,
    write_h5,
    write_npz,
)

from evalkit.images import are_ids, open_images


def test_labels(tmp_path):
    labels = np.arange(7, dtype=np.uint8)
    npz = write_npz(tmp_path / "x.npz", PIXELS, labels)
    hdf5 = write_h5(tmp_path / "x.h5", images=PIXELS, labels=labels)
    hdf5_arr_1 = write_h5(tmp_path / "y.h5", arr_0=PIXELS, arr_1=labels)
    for path in (npz, hdf5, hdf5_arr_1):
        found = open_images(path).labels
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, labels)
    assert open_images(PIXELS).labels is None


def test_labels_of_another_length_are_left_out_and_said_so(tmp_path):
    for path in (
        write_npz(tmp_path / "x.npz", PIXELS, np.arange(6)),
        write_h5(tmp_path / "x.h5", images=PIXELS, labels=np.zeros((7, 2))),
    ):
        source = open_images(path)
        assert source.labels is None
        assert "labels are left out: expected 7 integers" in source.notes[0]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (
            np.eye(7, dtype=np.int64),
            "(7, 7) in arr_1, one-hot it seems; turn it into classes with labels.argmax",
        ),
        (np.arange(7)[:, None], "(7, 1) in arr_1, a column; make it a row with labels.reshape(-1)"),
        (np.arange(7.0), "float64 (7,) in arr_1; turn it into classes with labels.astype(int)"),
        (np.array(["cat"] * 7), "<U3 (7,)"),
        (np.full(7, 2**64 - 1, np.uint64), "18446744073709551615 in arr_1 does not fit"),
    ],
)
def test_labels_that_are_left_out_and_why(tmp_path, labels, said):
    source = open_images(write_npz(tmp_path / "x.npz", PIXELS, labels))
    assert source.labels is None
    assert said in source.labels_problem
    assert source.labels_problem in source.notes


def test_seeds_and_ids_are_told_from_classes():
    assert not are_ids(np.arange(1000))
    assert not are_ids(np.repeat(np.arange(21_841), 2))
    assert not are_ids(np.array([5, 99_999]))
    assert not are_ids(np.array([], np.int64))
    assert are_ids(np.random.default_rng(0).integers(0, 2**32, 50_000))
    assert are_ids(np.array([-(2**63), 2**63 - 1]))
    assert are_ids(np.array([2**50, 2**50]))
