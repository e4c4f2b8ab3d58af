"""Whatever stands in a header, record, recipe or option: Hypothesis makes it up, evalkit copes with it.

The rules are those of ``fuzz_harness``. Examples derive from the tests themselves, the same in every run.
With EVALKIT_FUZZ_SEED they are others, and EVALKIT_FUZZ_EXAMPLES says how many. EVALKIT_FUZZ_SHRINK=1 makes
a failing example small, which takes some hundred runs of it.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from fuzz_inputs import RECIPE, SAMPLE, TRAIN, encoded, labels, npz, pixels_of, read_npy, read_npz
from fuzz_inputs import archive as write_archive
from fuzz_inputs import results as write_results
from fuzz_mutations import SHAPES, TYPES, VALUES, places
from fuzz_setup import EXAMPLES, SEED, Setup, ready
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

CORE, SLOW = 6, 40

# Hypothesis may keep what it learned of the code elsewhere than in the folder where the tests are run.
hypothesis.configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "evalkit-fuzz")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    with ready(tmp_path_factory.mktemp("fuzz") / "all") as made:
        yield made


def examples(count: int) -> Callable[[Any], Any]:
    """Runs a test on that many examples."""
    chosen = settings(
        max_examples=int(EXAMPLES) if EXAMPLES else count,
        deadline=None,
        database=None,
        derandomize=SEED is None,
        phases=(Phase.generate, *((Phase.shrink,) if os.environ.get("EVALKIT_FUZZ_SHRINK") else ())),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )

    def decorate(test: Any) -> Any:
        return chosen(hypothesis.seed(int(SEED))(test) if SEED else test)

    return decorate


def judged(setup: Setup, command: str, given: Path, name: str | None = None, *, goes_on: bool = False) -> Any:
    """Run a command on a file, and fail if it breaks a rule."""
    outcome, outputs = setup.run(command, given, keep=goes_on)
    found = setup.problems(outcome, outputs, (name or given.name, given.name), goes_on=goes_on)
    assert not found, f"{command}: {'; '.join(found)}"
    return outcome


def new_case(setup: Setup) -> Path:
    shutil.rmtree(setup.case, ignore_errors=True)
    setup.case.mkdir()
    return setup.case


# ------------------------------------------------------------------------------------------- npy headers

numbers = st.one_of(
    st.sampled_from([0, 1, 2, 3, 8, 24, 192, 4608, 2**31, 2**32, 2**62, 2**63, 2**64]), st.integers(-5, 5000)
)
shapes = st.one_of(
    st.sampled_from(SHAPES),
    st.lists(numbers, max_size=6).map(lambda items: repr(tuple(items))),
    st.permutations([24, 8, 8, 3]).map(lambda items: repr(tuple(items))),
)
types = st.one_of(
    st.sampled_from(TYPES),
    st.builds(
        lambda order, kind, size: f"'{order}{kind}{size}'",
        st.sampled_from("<>|="),
        st.sampled_from("biufcSUVMmOa?"),
        st.sampled_from(["", "1", "2", "4", "8", "16", "0", "-1", "99999999999"]),
    ),
)
headers = st.one_of(
    st.builds(
        lambda descr, order, shape: f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}",
        types,
        st.sampled_from(["False", "True", "0", "None"]),
        shapes,
    ),
    st.builds(lambda shape: f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}", shapes),
    st.builds(lambda descr: f"{{'descr': {descr}, 'fortran_order': False, 'shape': (24, 8, 8, 3), }}", types),
    st.text(max_size=60),
    st.sampled_from(["(" * 2000, "[" * 9000, "{" * 300, "-" * 60_000, "1" * 5000, "'" + "x" * 65_000 + "'"]),
)


def header_case(setup: Setup, header: str, version: int, container: str) -> None:
    """An npy with this header, alone or in an npz."""
    body = header.encode("latin1", errors="replace")
    length = (
        struct.pack("<H", min(len(body) + 1, 2**16 - 1)) if version == 1 else struct.pack("<I", len(body) + 1)
    )
    data = b"\x93NUMPY" + bytes([version, 0]) + length + body + b"\n" + pixels_of(0).tobytes()
    path = new_case(setup) / f"damaged.{container}"
    if container == "npy":
        path.write_bytes(data)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", data)
            if container == "npz with labels":
                archive.writestr("arr_1.npy", data)
    try:
        right = [(read_npy if container == "npy" else read_npz)(path)]
    except Exception:
        right = []
    outcome = judged(setup, "compare {ref} {in} --metrics fid --format json", path)
    found = setup.wrong_number(outcome, right)
    assert not found, found
    judged(setup, "reference show {in} --check", path)
    judged(setup, "reference build {in} -o {out}/x.npz --size 8 --statistics none", path)


header_cases = {
    "header": headers,
    "version": st.sampled_from([1, 1, 2, 3, 9]),
    "container": st.sampled_from(["npy", "npz", "npz with labels"]),
}


@examples(CORE)
@hypothesis.given(**header_cases)
def test_npy_headers(setup: Setup, header: str, version: int, container: str) -> None:
    header_case(setup, header, version, container)


@pytest.mark.slow
@examples(SLOW)
@hypothesis.given(**header_cases)
def test_many_npy_headers(setup: Setup, header: str, version: int, container: str) -> None:
    header_case(setup, header, version, container)


# ------------------------------------------------------------------------------------------------- JSON

json_values = st.one_of(
    st.sampled_from(VALUES),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=8,
    ),
)
changes = st.lists(st.tuples(st.integers(0, 10_000), json_values), min_size=1, max_size=2)
Changes = list[tuple[int, Any]]


def with_changes(record: Any, changes: Changes) -> bytes:
    """The record with other values at some of its places."""
    for number, value in changes:
        if found := list(places(record)):
            container, key = found[number % len(found)]
            container[key] = deepcopy(value)
    return json.dumps(record).encode()


def record_case(setup: Setup, which: str, changes: Changes) -> None:
    """A record of one of the kinds that commands read."""
    case = new_case(setup)
    if which == "results.json":
        folder, path = write_results(case, 0)
        path.write_bytes(with_changes(json.loads(path.read_text()), changes))
        judged(setup, "curves {in} -o {out}/x.svg", folder, path.name)
    elif which == "dataset.json":
        _, path = write_archive(case, 0, "png")
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        members[which] = with_changes(json.loads(members[which]), changes)
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        judged(setup, "reference build {in} -o {out}/x.npz --size 8 --statistics none", path)
        judged(setup, "reference convert {in} {out}/x.zip", path)
        outcome = judged(setup, "compare {ref} {in} --metrics fid --format json", path)
        assert outcome.code == 0, outcome.err
        assert not setup.wrong_number(outcome, [np.concatenate([pixels_of(0)[::2], pixels_of(0)[1::2]])])
    elif which == "provenance":
        record = {
            "format": "evalkit reference 1",
            "statistics": {"images": 5},
            "classes": ["a"],
            "left_out": [],
        }
        text = with_changes(record, changes).decode()
        path, _ = npz(case, 0, provenance=np.array(text))
        judged(setup, "reference show {in}", path)
        judged(setup, "reference convert {in} {out}/x.npz", path)
    else:
        begin = (
            SAMPLE
            if which == "manifest.json"
            else "reference build {bad} -o {out}/x.npz --size 8 --statistics none"
        )
        setup.run(begin)
        name = "run/manifest.json" if which == "manifest.json" else "x.npz.building/settings.json"
        path = setup.out / name
        path.write_bytes(with_changes(json.loads(path.read_text()), changes))
        judged(
            setup,
            begin if which == "manifest.json" else f"{begin} --skip-bad",
            path,
            path.parent.name,
            goes_on=True,
        )


record_cases = {
    "which": st.sampled_from(
        ["results.json", "dataset.json", "provenance", "manifest.json", "settings.json"]
    ),
    "changes": changes,
}


@examples(CORE + 4)
@hypothesis.given(**record_cases)
def test_records(setup: Setup, which: str, changes: Changes) -> None:
    record_case(setup, which, changes)


@pytest.mark.slow
@examples(2 * SLOW)
@hypothesis.given(**record_cases)
def test_many_records(setup: Setup, which: str, changes: Changes) -> None:
    record_case(setup, which, changes)


# ------------------------------------------------------------------------------------------------- TOML

KEYS = [line.split(" = ")[0] for line in RECIPE.splitlines() if " = " in line]
toml_values = st.one_of(
    st.integers(-3, 70).map(str),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["true", "[]", "[1]", "[1, 2]", "[0]", "[-1]", "[[1]]", "[1e9]", "{}", "{a = 1}", "''", "'x'"]
    ),
    st.sampled_from(
        ["1979-05-27", "07:32:00", "'classifier'", "'upsampler'", "'64x64_classifier'", '"\\u0000"']
    ),
    st.lists(st.floats(0, 4).map(str) | st.integers(-1, 8).map(str), max_size=5).map(
        lambda x: f"[{', '.join(x)}]"
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="'\n\r\0"), max_size=20).map(
        lambda text: f"'{text}'"
    ),
)


def recipe_case(setup: Setup, changed: dict[str, str]) -> None:
    """The recipe with other values."""
    lines = []
    for line in RECIPE.splitlines():
        key = line.split(" = ")[0]
        lines.append(f"{key} = {changed[key]}" if key in changed else line)
    path = new_case(setup) / "damaged.toml"
    path.write_text("\n".join(lines))
    judged(setup, TRAIN, path)


changed_values = st.dictionaries(st.sampled_from(KEYS), toml_values, min_size=1, max_size=2)


@examples(CORE + 2)
@hypothesis.given(changed=changed_values)
def test_recipes(setup: Setup, changed: dict[str, str]) -> None:
    recipe_case(setup, changed)


@pytest.mark.slow
@examples(2 * SLOW)
@hypothesis.given(changed=changed_values)
def test_many_recipes(setup: Setup, changed: dict[str, str]) -> None:
    recipe_case(setup, changed)


# ---------------------------------------------------------------------------------------------- classes

class_lines = st.one_of(
    st.integers(-2, 4).map(str),
    st.sampled_from(
        ["", "#", "1 2", "1,2", "0x1", "1e0", "1.0", "nan", "1_0", "9" * 5000, str(2**63), "\0", "٣", "-0"]
    ),
    st.text(max_size=10),
)
class_files = st.one_of(
    st.builds(
        lambda lines, end: (end.join(lines)).encode(errors="replace"),
        st.lists(class_lines, max_size=4),
        st.sampled_from(["\n", "\r\n", "\r", " "]),
    ),
    st.binary(max_size=60),
    st.just(b"1\n" * 100_000),
)


def classes_case(setup: Setup, content: bytes) -> None:
    """A file of classes."""
    path = new_case(setup) / "classes.txt"
    path.write_bytes(content)
    judged(setup, f"{SAMPLE} --classes {{in}}", path)


@examples(CORE)
@hypothesis.given(content=class_files)
def test_class_files(setup: Setup, content: bytes) -> None:
    classes_case(setup, content)


@pytest.mark.slow
@examples(SLOW)
@hypothesis.given(content=class_files)
def test_many_class_files(setup: Setup, content: bytes) -> None:
    classes_case(setup, content)


# ---------------------------------------------------------------------------------------------- options

# Numbers that are refused or done at once; one between would ask for hours of honest work.
whole = st.sampled_from(
    ["-1", "0", "1", "2", "3", str(2**31), str(2**32), str(2**63), str(2**64), str(10**30), "x", ""]
)
reals = st.sampled_from(
    ["-1", "0", "0.5", "1", "2", "1e308", "-1e308", "nan", "inf", "-inf", "1e-320", "x", ""]
)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
OPTIONS: dict[str, dict[str, Any]] = {
    "sample --model {weights} --device cpu --out {run} --count 2 --respacing 2": {
        "--count": whole,
        "--seed": whole,
        "--sampler-option": st.sampled_from(["eta=", "thresholding="]).flatmap(
            lambda name: (reals | texts).map(lambda value: f"{name}{value}")
        )
        | texts,
        "--scale": reals,
        "--respacing": st.sampled_from(
            ["", "0", "-1", "1", "2", "ddim2", "ddim0", "ddim", "1,1", "1,,1", "ddim1001", "x"]
        )
        | texts,
        "--sampler": st.sampled_from(["ddim", "dpm-solver++", "ddpm", ""]) | texts,
        "--classes": whole | texts | st.sampled_from([".", "/", "--5", "1-", "²", "٣"]),
        "--guidance-steps": st.sampled_from(["0:1", "1:0", ":", "0:99999", "²:٣", f"0:{'9' * 5000}"]) | texts,
        "--batch-size": whole | texts,
        "--shard-size": whole,
        "--precision": texts,
        "--preset": texts,
    },
    "reference build {ref} -o {out}/x.npz --size 8 --statistics none": {
        "--size": st.sampled_from(
            ["-1", "0", "1", "2", "8", "9", str(2**20), str(2**31), str(2**63), str(10**30), "x"]
        ),
        "--images": whole,
        "--seed": whole,
        "--labels": texts,
        "--workers": st.sampled_from(["-1", "0", "1", "x"]),
    },
    "compare {ref} {ref}": {
        "--subset": whole,
        "--seed": whole,
        "--metrics": texts | st.sampled_from(["fid", "fid,fid", "fid,", ",", " fid", "FID"]),
        "--protocol": texts,
        "--batch-size": whole | texts,
    },
    "train diffusion {ref} --recipe {recipe} --steps 1 --out {run} --device cpu": {
        "--steps": st.sampled_from(["-1", "0", "1", str(2**32), str(10**30), "x"]),
        "--batch-size": st.sampled_from(["-1", "0", "1", "3", str(2**32), str(10**30)]),
        "--learning-rate": reals,
        "--microbatch": whole,
        "--seed": whole,
        "--save-every": whole,
        "--precision": texts,
    },
    "reference show {ref}": {"--images": whole},
    "curves {sweep} -o {out}/x.svg": {"--published": texts},
    "published imagenet64": {"--evaluator": texts, "--model": texts, "--sort": texts},
}


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, dict[str, str]]:
    """A command and options of it."""
    command = draw(st.sampled_from(list(OPTIONS)))
    names = draw(st.lists(st.sampled_from(list(OPTIONS[command])), min_size=1, max_size=2, unique=True))
    return command, {name: draw(OPTIONS[command][name]) for name in names}


def options_case(setup: Setup, line: tuple[str, dict[str, str]]) -> None:
    """A command with other values of its options. What is wrong is the option: no file is to be named."""
    command, options = line
    setup.clear()
    given = [text for pair in options.items() for text in pair]
    outcome = setup.worker.run(*setup.filled(command), *given)
    found = setup.problems(outcome, (), ("",))
    assert not found, f"{command} {options}: {'; '.join(found)}"


@examples(2 * CORE)
@hypothesis.given(line=command_lines())
def test_options(setup: Setup, line: tuple[str, dict[str, str]]) -> None:
    options_case(setup, line)


@pytest.mark.slow
@examples(3 * SLOW)
@hypothesis.given(line=command_lines())
def test_many_options(setup: Setup, line: tuple[str, dict[str, str]]) -> None:
    options_case(setup, line)


# ---------------------------------------------------------------------------- what was found once stays here


def zip_with_a_name_cut_short(path: Path) -> None:
    """A zip with a zero in a member's name, where zipfile ends it: ``c0/`` then looks like a folder."""
    _, sound = write_archive(path.parent, 0, "png")
    data = sound.read_bytes()
    at = data.rindex(b"c0/00.png")
    path.write_bytes(data[: at + 3] + b"\0" + data[at + 4 :])


def npz_with_a_name_of_no_encoding(path: Path) -> None:
    """An npz whose directory says that a name is UTF-8, which it is not."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ä.npy", b"x" * 40)
    path.write_bytes(path.read_bytes().replace("ä".encode(), b"\xa5\xff"))


def npz_labelled(label: int) -> Callable[[Path], None]:
    """Images of which one has this label."""

    def write(path: Path) -> None:
        values = labels(0)
        values[3] = label
        np.savez(path, arr_0=pixels_of(0), arr_1=values)

    return write


def gzip_with_other_pixels(path: Path) -> None:
    """A gzip stream whose checksum is not that of its content: another pixel than was written."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for index, pixels in enumerate(pixels_of(0)):
            data = encoded(pixels, "BMP")
            info = tarfile.TarInfo(f"{index:02d}.bmp")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    sound = buffer.getvalue()
    damaged = sound[:600] + bytes([sound[600] ^ 128]) + sound[601:]
    packed = gzip.compress(damaged)
    path.write_bytes(packed[:-8] + struct.pack("<2I", zlib.crc32(sound), len(sound)))


def content(data: bytes) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(data), None)[1]


COMPARE = "compare {ref} {in} --metrics fid --format json"
DEEP = b"[" * 100_000
FOUND: dict[str, tuple[str, Callable[[Path], None], str, int | None]] = {
    # Name: file, what writes it, command, exit code; None: 0 or 2.
    "tar.gz with a wrong checksum": ("x.tar.gz", gzip_with_other_pixels, COMPARE, 2),
    "zip with a name cut short": ("x.zip", zip_with_a_name_cut_short, COMPARE, 2),
    "npz with a name of no encoding": ("x.npz", npz_with_a_name_of_no_encoding, COMPARE, 2),
    "negative label": ("x.npz", npz_labelled(-1), COMPARE, None),
    "huge label": ("x.npz", npz_labelled(2**50), COMPARE, None),
    "huge label, shown": ("x.npz", npz_labelled(2**50), "reference show {in} --check", None),
    "classes beyond the first plane": (
        "classes.txt",
        content("\U000dc33d\n1\n".encode()),
        f"{SAMPLE} --classes {{in}}",
        2,
    ),
    "classes in another script": (
        "classes.txt",
        content("\u8888\n1\n".encode()),
        f"{SAMPLE} --classes {{in}}",
        2,
    ),
    "classes of half a header": (
        "classes.npy",
        content(b"\x93NUMPY\x01\x00\x10\x00{'descr': '<i8', \n"),
        f"{SAMPLE} --classes {{in}}",
        2,
    ),
    "npy header of digits": ("x.npy", content(b"\x93NUMPY\x01\x00\x88\x13" + b"1" * 5000), COMPARE, 2),
    "recipe of brackets": ("x.toml", content(b"a = " + DEEP), TRAIN, 2),
    "recipe for other images": (
        "x.toml",
        content(RECIPE.replace("in_channels = 3", "in_channels = 2").encode()),
        TRAIN,
        2,
    ),
    "sweep of brackets": ("results.json", content(DEEP), "curves {in} -o {out}/x.svg", 2),
    "sweep of binary data": (
        "results.json",
        content(b"{" + bytes(range(256)) * 8),
        "curves {in} -o {out}/x.svg",
        2,
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_found_before(setup: Setup, name: str) -> None:
    file, write, command, code = FOUND[name]
    path = new_case(setup) / file
    write(path)
    outcome = judged(setup, command, path)
    assert code in (None, outcome.code), outcome.out[:300]


def test_labels_are_those_of_the_container(setup: Setup) -> None:
    """The records above are of sound files."""
    _, path = write_archive(new_case(setup), 0, "png")
    judged(setup, "reference convert {in} {out}/x.npz", path)
    with np.load(setup.out / "x.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_1"], np.concatenate([labels(0)[::2], labels(0)[1::2]]))
