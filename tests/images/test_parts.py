"""Several files as one source."""

import pickle

import numpy as np
import pytest
from containers import (
    PIXELS,
    STATISTICS,
    bad,
    write_npz,
)

from evalkit.errors import ImageError, InputError
from evalkit.images import open_images


def test_parts_have_labels_where_all_have(tmp_path):
    for name, part in (("a", slice(0, 4)), ("b", slice(4, 7))):
        write_npz(tmp_path / f"{name}.npz", PIXELS[part], np.arange(7)[part])
    np.testing.assert_array_equal(open_images(f"{tmp_path}/?.npz").labels, np.arange(7))
    write_npz(tmp_path / "c.npz", PIXELS)
    source = open_images(f"{tmp_path}/?.npz")
    assert source.labels is None
    assert "The labels are left out: 2 of 3 parts have them." in source.notes


def test_parts_digest_follows_their_content_and_limits(tmp_path):
    digests = set()
    for cuts in ((3, 5), (3, 4), (2, 5)):
        for name, part in zip("abc", np.split(PIXELS, cuts), strict=True):
            write_npz(tmp_path / f"{name}.npz", part)
        digests.add(open_images(tmp_path / "*.npz").digest)
    write_npz(tmp_path / "c.npz", PIXELS[5:] ^ 1)
    digests.add(open_images(tmp_path / "*.npz").digest)
    assert len(digests) == 4


def test_a_file_of_a_patterns_name_is_that_file(tmp_path):
    write_npz(tmp_path / "a.npz", PIXELS)
    assert open_images(write_npz(tmp_path / "[a].npz", PIXELS[:2])).kind == "npz"
    assert len(open_images(tmp_path / "**" / "a.*")) == 7


def test_parts_that_do_not_go_together(tmp_path):
    write_npz(tmp_path / "a.npz", PIXELS)
    write_npz(tmp_path / "b.npz", PIXELS[:, :5])
    bad(tmp_path / "*.npz", "b.npz", "(5, 5, 3)", "a.npz", "(6, 5, 3)", "one size")
    write_npz(tmp_path / "b.npz", PIXELS.astype(np.float32))
    bad(tmp_path / "*.npz", "b.npz", "float32", "uint8")
    write_npz(tmp_path / "b.npz", PIXELS, **STATISTICS)
    bad(tmp_path / "*.npz", "b.npz", "has mu and sigma", "only images")
    values = np.full((7, 6, 5, 3), 300)
    write_npz(tmp_path / "b.npz", values)
    bad(tmp_path / "*.npz", "b.npz: image 0", "300", error=ImageError)
    bad(tmp_path / "*.tar", "*.tar", "no file or folder matches")


def test_brackets_in_names_are_no_pattern(tmp_path):
    folder = tmp_path / "runs [v2]"
    folder.mkdir()
    for i, part in enumerate((PIXELS[:3], PIXELS[3:])):
        write_npz(folder / f"part{i}.npz", part)
    assert len(open_images(folder / "part*.npz")) == 7
    assert len(open_images(folder / "part1.npz")) == 4
    bad(folder / "none.npz", "no file or folder matches", "Brackets were tried")
    bad(tmp_path / "x*.npz", "no file or folder matches this pattern.")


def test_copies_in_a_pattern_are_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # long paths are cut
    for name in ("s_1.npz", "s_1 (copy).npz", "s_2.npz"):
        write_npz(tmp_path / name, PIXELS[::-1] if "2" in name else PIXELS)
    source = open_images("s_*.npz")
    source.identify()
    assert "hold the same images: s_1 (copy).npz, s_1.npz." in source.notes[-1]


def test_a_bracket_that_may_be_either(tmp_path):
    for name in ("run1", "run[1]"):
        (tmp_path / name).mkdir()
        write_npz(tmp_path / name / "x.npz", PIXELS)
    bad(tmp_path / "run[1]" / "*.npz", "can be read in two ways", "[[] for a bracket")
    assert len(open_images(tmp_path / "run[[]1]" / "*.npz")) == 7


def test_parts_in_another_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, part in zip("abc", np.split(np.float32(PIXELS) / 255, (3, 5)), strict=True):
        write_npz(tmp_path / f"{name}.npz", part, np.arange(len(part)))
    source = open_images("*.npz", value_range="0..1")
    digest, pickled = source.digest, pickle.dumps(source)
    write_npz(tmp_path / "d.npz", PIXELS)  # another file that the pattern matches by now
    monkeypatch.chdir("/")
    copy = pickle.loads(pickled)
    np.testing.assert_allclose(np.concatenate(list(copy.batches(4))), PIXELS, rtol=1e-6)
    np.testing.assert_array_equal(copy.labels, source.labels)
    assert copy.digest == digest
    write_npz(tmp_path / "b.npz", PIXELS[3:5])
    with pytest.raises(InputError, match=r"b\.npz holds other images here"):
        pickle.loads(pickled)
