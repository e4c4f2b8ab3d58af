"""WebDataset shards: labels, order and samples; a plain tar is none."""

from __future__ import annotations

import gzip
import json
import pickle
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from containers import PIXELS, bad, encoded, image_files, limit_images_to, write_folder, write_tar
from invoked import Result
from numpy.typing import NDArray

from evalkit.errors import ImageError, InputError
from evalkit.images import ImageSource, open_image_files, open_images
from evalkit.results import Comparison

LABELS = [3, 1, 4, 1, 5, 9, 2]


def samples(**fields: Callable[[int], bytes]) -> dict[str, bytes]:
    """The members of a shard: for each of PIXELS a png and these fields."""
    return {
        f"{index:06}.{field}": content(index)
        for index in range(len(PIXELS))
        for field, content in {"png": lambda index: encoded(PIXELS[index]), **fields}.items()
    }


def cls(index: int) -> bytes:
    return f"{LABELS[index]}\n".encode()


def as_json(**values: Any) -> bytes:
    return json.dumps(values).encode()


def read(source: ImageSource) -> NDArray[Any]:
    return np.concatenate(list(source.batches(3)))


def notes_of(path: Path) -> str:
    return " ".join(open_images(path).notes)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("folder", ["", "./", "a.b/"])
def test_images_and_labels_come_back(tmp_path: Path, folder: str, mode: str) -> None:
    files = {f"{folder}{name}": data for name, data in samples(cls=cls).items()}
    source = open_images(write_tar(tmp_path / "x", files, mode))
    assert (source.kind, source.notes, source.labels_problem) == ("webdataset", (), None)
    np.testing.assert_array_equal(read(source), PIXELS)
    assert source.labels is not None
    assert source.labels.tolist() == LABELS
    assert source.labels.dtype == np.int64


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_the_order_is_that_of_the_keys_in_the_tar(tmp_path: Path, mode: str) -> None:
    files = samples(cls=cls)
    turned = dict(sorted(files.items(), key=lambda item: item[0].partition(".")[0], reverse=True))
    source = open_images(write_tar(tmp_path / "x.tar", turned, mode))
    np.testing.assert_array_equal(read(source), PIXELS[::-1])
    np.testing.assert_array_equal(read(pickle.loads(pickle.dumps(source))), PIXELS[::-1])
    assert source.labels is not None
    assert source.labels.tolist() == LABELS[::-1]
    assert source.notes == ()  # a compressed one is read as it stands, not unpacked
    files_of = open_image_files(tmp_path / "x.tar")
    assert files_of is not None
    assert files_of.names == [f"{index:06}.png" for index in range(6, -1, -1)]


def test_a_shard_has_the_digest_of_a_folder_with_the_same_images(tmp_path: Path) -> None:
    source = open_images(write_tar(tmp_path / "x.tar", samples(cls=cls)))
    assert source.digest == open_images(write_folder(tmp_path / "x", samples())).digest


@pytest.mark.parametrize("name", ["label", "class", "cls", "label_id"])
def test_labels_in_json(tmp_path: Path, name: str) -> None:
    files = samples(json=lambda index: as_json(caption="a cat", **{name: LABELS[index]}))
    source = open_images(write_tar(tmp_path / "x.tar", files))
    assert source.labels is not None
    assert source.labels.tolist() == LABELS
    assert source.notes == ()


def test_labels_in_either_place_and_in_both(tmp_path: Path) -> None:
    files = samples(cls=cls, json=lambda index: as_json(label="a name", label_id=LABELS[index]))
    for number, left_out in enumerate(["json", "cls"]):
        del files[f"00000{number}.{left_out}"]
    source = open_images(write_tar(tmp_path / "x.tar", files))
    assert source.labels is not None
    assert source.labels.tolist() == LABELS


def test_labels_that_differ_are_refused(tmp_path: Path) -> None:
    files = samples(cls=cls, json=lambda index: as_json(label=LABELS[index]))
    files["000004.json"] = as_json(label=7)
    path = write_tar(tmp_path / "x.tar", files)
    bad(path, "x.tar: the sample 000004 has different labels: 5 in 000004.cls, 7 in label of 000004.json")


def test_missing_labels_are_noted(tmp_path: Path) -> None:
    files = samples(cls=cls)
    for index in range(1, 6):
        del files[f"00000{index}.cls"]
    source = open_images(write_tar(tmp_path / "x.tar", files))
    assert source.labels is None
    assert source.labels_problem == (
        "The labels are left out: none for 5 of 7 samples (000001, 000002, 000003 and 2 more)."
    )
    assert source.notes == (source.labels_problem,)
    np.testing.assert_array_equal(read(source), PIXELS)


@pytest.mark.parametrize(
    ("field", "content"),
    [
        ("cls", b"dog"),
        ("cls", b""),
        ("cls", b"1.0"),
        ("cls", b"1_0"),
        ("cls", b"9223372036854775808"),
        ("cls", b"1" * 5000),
        ("cls", b"1" + b" " * 2**20),
        ("json", b'{"label": true}'),
        ("json", b'{"label": 1.0}'),
        ("json", b'{"label": 9223372036854775808}'),
        ("json", b'{"label": ' + b"1" * 5000 + b"}"),
        ("json", b'{"label": 1'),
        ("json", b"\xff"),
        ("json", b"[" * 100_000),
        ("json", b'{"label": 1, "caption": "' + b"x" * 2**20 + b'"}'),
    ],
)
def test_labels_that_are_no_integers_are_noted(tmp_path: Path, field: str, content: bytes) -> None:
    files = samples(**{field: cls if field == "cls" else lambda index: as_json(label=index)})
    files[f"000002.{field}"] = content
    source = open_images(write_tar(tmp_path / "x.tar", files))
    assert source.labels is None
    assert "not a 64-bit integer, or in more than 1 MiB, for 1 of 7 samples (000002)." in source.notes[0]


def test_the_reasons_for_missing_labels_are_told_apart(tmp_path: Path) -> None:
    files = samples(json=lambda index: [b"{}", b"[1]", as_json(label="dog"), as_json(label=2)][index % 4])
    assert notes_of(write_tar(tmp_path / "x.tar", files)) == (
        "The labels are left out: none for 4 of 7 samples (000000, 000001, 000004 and 1 more); "
        "not a 64-bit integer, or in more than 1 MiB, for 2 of 7 samples (000002, 000006)."
    )


def test_other_members_are_counted_and_pickles_never_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = samples(
        cls=cls, txt=lambda _: b"a cat", pyd=lambda _: b"\x80", pickle=lambda _: b"\x80", pth=lambda _: b"PK"
    )
    files["000000.seg.cls"] = b"8"  # the field seg.cls, which is no label
    path = write_tar(tmp_path / "x.tar", files)
    opened: list[str] = []
    extract = tarfile.TarFile.extractfile

    def watched(tar: tarfile.TarFile, member: Any) -> Any:
        opened.append(member.name)
        return extract(tar, member)

    monkeypatch.setattr(tarfile.TarFile, "extractfile", watched)
    source = open_images(path)
    np.testing.assert_array_equal(read(source), PIXELS)
    assert source.notes == (
        "Files that are not images are left out: 1 .cls, 7 .pickle, 7 .pth, 7 .pyd, 7 .txt.",
    )
    assert source.labels is not None
    assert source.labels.tolist() == LABELS
    assert {name.partition(".")[2] for name in opened} == {"png", "cls"}


def test_samples_without_an_image_are_counted(tmp_path: Path) -> None:
    files = samples(cls=cls)
    for index in (1, 4):
        del files[f"00000{index}.png"]
    files |= {"__MACOSX/._000001.cls": b"", "README": b""}  # hidden, and without a key
    source = open_images(write_tar(tmp_path / "x.tar", files))
    np.testing.assert_array_equal(read(source), PIXELS[[0, 2, 3, 5, 6]])
    assert source.labels is not None
    assert source.labels.tolist() == [3, 4, 1, 9, 2]
    assert source.notes == (
        "Samples without an image are left out: 2 (000001, 000004).",
        "Files that are not images are left out: 2 .cls, 1 hidden, 1 without suffix.",
    )


@pytest.mark.parametrize("second", ["000003.seg.png", "000003.jpg"])
def test_two_images_of_one_key_are_refused(tmp_path: Path, second: str) -> None:
    path = write_tar(tmp_path / "x.tar", samples(cls=cls) | {second: encoded(PIXELS[0])})
    bad(path, "x.tar: the sample 000003 has 2 images", "000003.png", second, "Write the shard again")


@pytest.mark.parametrize("name", ["000003.png", "000003.cls", "./000003.cls"])
def test_members_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    files = samples(cls=cls)
    path = write_tar(tmp_path / "x.tar", files)
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(files[name.removeprefix("./")])
        archive.addfile(info, BytesIO(files[name.removeprefix("./")]))
    bad(path, f"x.tar: has several members of the same name: {name};", "new key")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"a.txt": b"a cat", "z.cls": b"3"},
        {"dataset.json": b"{}", "a/b.csv": b"", ".b.cls": b"3"},
        {"b/b.cls": b"3", "b.seg.cls": b"3"},
    ],
    ids=["alone", "captions", "edm", "other keys"],
)
def test_a_plain_tar_is_not_claimed(tmp_path: Path, more: dict[str, bytes]) -> None:
    files = image_files()
    files["y.bmp"] = files.pop("z.bmp")
    source = open_images(write_tar(tmp_path / "x.tar", more | files))
    assert source.kind == "tar"
    np.testing.assert_array_equal(read(source), PIXELS)
    np.testing.assert_array_equal(
        read(open_images(write_tar(tmp_path / "y.tar", dict(reversed(files.items()))))), PIXELS
    )


def test_a_plain_tar_is_told_by_its_first_members(tmp_path: Path) -> None:
    files = {f"{index:03}.png": encoded(PIXELS[index % 7]) for index in range(64)}
    assert open_images(write_tar(tmp_path / "x.tar", files | {"000.cls": b"3"})).kind == "tar"


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.6, 0.9])
def test_a_truncated_shard_is_an_input_error(tmp_path: Path, share: float, mode: str) -> None:
    path = write_tar(tmp_path / f"{'long' * 40}.tar", samples(cls=cls), mode)
    # Without the zeros at its end, which are no loss.
    data = path.read_bytes()
    data = data.rstrip(b"\0") if mode == "w" else data
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError) as caught:
        read(open_images(path))
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) <= 1000


def test_hostile_names_give_short_messages(tmp_path: Path) -> None:
    long = "x\n" * 3000
    for more in (
        {f"{long}.png": b"", f"{long}.jpg": b""},
        {f"{long}.cls": b"1", f"{long}.json": b'{"cls": 2}'},
    ):
        files = samples(cls=cls) | {f"{long}.png": encoded(PIXELS[0])} | more
        with pytest.raises(InputError) as caught:
            open_images(write_tar(tmp_path / "x.tar", files))
        assert len(str(caught.value)) <= 1000
        assert "\n" not in str(caught.value)
    bad(write_tar(tmp_path / "x.tar", samples(cls=cls) | {"../000009.cls": b"1"}), "refused", "../000009.cls")


def test_a_label_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    files = samples(cls=cls)
    del files["000006.cls"]
    path = write_tar(tmp_path / "x.tar", files)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("000006.cls")
        link.type, link.linkname = tarfile.SYMTYPE, "000005.cls"
        archive.addfile(link)
    source = open_images(path)
    assert source.labels is None
    assert "are not followed: 000006.cls." in source.notes[0]
    assert "none for 1 of 7 samples (000006)" in source.notes[1]


def test_a_large_image_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = samples(cls=cls)
    path = write_tar(tmp_path / "x.tar", files)
    limit_images_to(max(map(len, files.values())), monkeypatch)
    read(open_images(path))
    limit_images_to(len(files["000000.png"]) - 1, monkeypatch)
    bad(path, "x.tar, 000000.png", "one image is limited to", error=ImageError)


def test_a_shard_in_gzip_of_another_name(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "x.tar", samples(cls=cls))
    (tmp_path / "shard").write_bytes(gzip.compress(plain.read_bytes()))
    assert open_images(tmp_path / "shard").digest == open_images(plain).digest


def test_shards_in_a_pattern(tmp_path: Path) -> None:
    for shard, indices in enumerate([range(3), range(3, 7)]):
        files = {
            f"{index}.{field}": data
            for index in indices
            for field, data in (("cls", cls(index)), ("png", encoded(PIXELS[index])))
        }
        write_tar(tmp_path / f"{shard:05}.tar", files)
    source = open_images(tmp_path / "*.tar")
    np.testing.assert_array_equal(read(source), PIXELS)
    assert source.labels is not None
    assert source.labels.tolist() == LABELS


@pytest.mark.usefixtures("pixels")
def test_compare_two_shards(run: Callable[..., Result], images: NDArray[np.uint8], tmp_path: Path) -> None:
    halves = images[::2], images[1::2]
    paths = [tmp_path / "reference.tar", tmp_path / "samples.tar"]
    for path, half in zip(paths, halves, strict=True):
        make_webdataset(path, half, np.arange(len(half)) % 3)
    result = run("compare", *paths, "--json", tmp_path / "shards.json")
    assert (result.code, result.err) == (0, "")
    assert "30 images 10x12" in result.out
    arrays = [tmp_path / "reference.npz", tmp_path / "samples.npz"]
    for path, half in zip(arrays, halves, strict=True):
        np.savez(path, half)
    assert run("compare", *arrays, "--json", tmp_path / "arrays.json").code == 0
    found, expected = (
        Comparison.from_json((tmp_path / name).read_text()) for name in ("shards.json", "arrays.json")
    )
    assert found["fid"] > 0
    for name in ("inception_score", "fid", "sfid", "precision", "recall"):
        assert found[name] == expected[name]


def make_webdataset(
    path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], unused: str | None = None
) -> None:
    """For the contract of formats."""
    files = {}
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        files |= {f"{index:06}.png": encoded(image), f"{index:06}.cls": str(label).encode()}
    write_tar(path, files | ({f"000000.{unused}": b"text"} if unused else {}))
