"""Arrays out of pickles: what Python's own unpickler finds, and nothing ever runs."""

from __future__ import annotations

import builtins
import contextlib
import datetime
import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evalkit.errors import InputError
from evalkit.images.pickles import MOST_OPCODES, read_pickle

RNG = np.random.default_rng(0)
CONTENT: dict[str, Any] = {
    "num_images": 50_000,
    "fid": {"mu": RNG.normal(size=5), "sigma": np.asfortranarray(RNG.normal(size=(5, 4)).astype(">f4"))},
    "others": {"scalar": np.int64(-7), "empty": np.zeros((0, 3), np.float16), "none": None, "yes": True},
    "text": "naïve",
    "numbers": (1, 2.5, 300, -70_000, 2**40),
}


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, np.ndarray):
        # NumPy swaps the bytes of another order, and read_pickle leaves them.
        types = {array.dtype.newbyteorder("=") for array in (found, expected)}
        return len(types) == 1 and np.array_equal(found, expected)
    return bool(found == expected)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_it_reads_what_the_unpickler_reads(protocol: int) -> None:
    data = pickle.dumps(CONTENT, protocol)
    assert same(pickle.loads(data), CONTENT)
    assert same(read_pickle("x", data), CONTENT)


@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_of_numpy_1_and_2(module: bytes) -> None:
    data = pickle.dumps({"a": np.arange(3.0)}, 3)
    data = data.replace(b"cnumpy._core", b"c" + module).replace(b"cnumpy.core", b"c" + module)
    assert same(read_pickle("x", data), {"a": np.arange(3.0)})


class Attack:
    """Unpickled, it makes a file."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def nested(levels: int) -> bytes:
    """A tuple of itself twice, and so on, as a key: to hash it, or to print it, would take for ever."""
    twice = b"".join(b"\x94" + b"h" + bytes([level + 1]) + b"\x86" for level in range(levels))
    return b"\x80\x04}\x94K\x01\x85" + twice + b"K\x02s."


def attacks(marker: Path) -> dict[str, bytes]:
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    plain = {
        "system": Attack(os.system, f"touch {marker}"),
        "exec": Attack(exec, code),
        "open": Attack(open, str(marker), "w"),
        "eval": Attack(eval, code),
        "popen": Attack(subprocess.Popen, ["touch", str(marker)]),
        "import": Attack(builtins.__import__, "antigravity"),
        "load": Attack(np.load, str(marker)),
        "fromfile": Attack(np.fromfile, str(marker)),
        "memmap": Attack(np.memmap, str(marker), "u1", "w+", 0, (8,)),
        "lambda in an array": np.array([Attack(os.system, f"touch {marker}")], dtype=object),
        "date": datetime.date(2026, 1, 1),
        "ordered": OrderedDict(a=1),
        "list": [1, 2],
        "set": {1, 2},
    }
    found = {
        f"{name}, protocol {protocol}": pickle.dumps({"fid": {"mu": attack}}, protocol)
        for name, attack in plain.items()
        for protocol in (2, 3, 4, 5)
    }
    return found | {
        "protocol 0 inside": b"\x80\x02" + pickle.dumps(Attack(os.system, f"touch {marker}"), 0),
        "by name in two parts": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
        "a name with dots": b"\x80\x04\x8c\x05numpy\x8c\x0fcore.os.system.x\x93.",
        "through numpy": b"\x80\x02cnumpy.core.multiarray\nsys.modules\n.",
        "instance": b"\x80\x02(X\x04\0\0\0trueiposix\nsystem\n.",
        "object": b"\x80\x02(cposix\nsystem\nX\x04\0\0\0trueo.",
        "new object": b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85\x81.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"\x80\x02X\x01\0\0\0xQ.",
        "called on a type": b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.",
        "state of a type": b"\x80\x02cnumpy\nndarray\n}X\x01\0\0\0aK\x01sb.",
        "state of a function": b"\x80\x02cnumpy\ndtype\n}X\x01\0\0\0aK\x01sb.",
        "state of a dictionary": b"\x80\x02}}b.",
        "call of a number": b"\x80\x02K\x01)R.",
        "a name out of nested tuples": nested(60)[:-4] + b"\x8c\x01a\x93.",
        "nested tuples as a key": nested(60),
        "a deep dictionary": b"\x80\x02" + b"}X\x01\0\0\0a" * 90 + b"}" + b"s" * 90 + b".",
        "a dictionary in itself": b"\x80\x02}q\0X\x01\0\0\0ah\0s.",
        "many instructions": b"\x80\x02" + b"K\x01" * MOST_OPCODES + b".",
    }


def test_nothing_ever_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for name, data in attacks(marker).items():
        with pytest.raises(InputError, match=r"x\.pkl: is a .*Python pickle") as caught:
            read_pickle("x.pkl", data)
        assert len(str(caught.value)) < 1000, name
        assert not marker.exists(), name
    assert "antigravity" not in sys.modules
    # The same attacks work on the unpickler: the test could fail.
    pickle.loads(attacks(marker)["exec, protocol 4"])
    assert marker.exists()


def test_an_attack_is_named() -> None:
    with pytest.raises(
        InputError, match=r"x: is a Python pickle with (posix|nt)\.system in it. Unpickling can"
    ):
        read_pickle("x", pickle.dumps(Attack(os.system, "true")))


LYING = {
    "8 GB of bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**33) + b"a.",
    "2 GB of bytes": b"\x80\x04B" + struct.pack("<I", 2**31) + b"a.",
    "8 GB of text": b"\x80\x04\x8d" + struct.pack("<Q", 2**33) + b"a.",
    "8 GB in a bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b"a.",
    "a frame of 8 GB": b"\x80\x04\x95" + struct.pack("<Q", 2**33) + b"N.",
    "a place far away": b"\x80\x04Nr\xff\xff\xff\xff0.",
}


@pytest.mark.parametrize("case", LYING)
def test_lengths_that_lie_cost_no_memory(case: str) -> None:
    tracemalloc.start()
    try:
        with contextlib.suppress(InputError):  # some are values all the same
            read_pickle("x", LYING[case])
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def array_pickle(shape: tuple[int, ...], data: bytes, code: str = "f8") -> bytes:
    """What an array of that shape and those bytes would be."""
    whole = pickle.dumps({"a": np.zeros(2)}, 2)
    state = pickle.dumps((1, shape, np.dtype(code), False, data), 3)
    begin = whole[: whole.index(b"(K\x01")]
    return begin + state[2:-1] + b"bs."


@pytest.mark.parametrize(
    ("shape", "data", "code"),
    [
        ((2**40,), bytes(16), "f8"),
        ((2**40, 2**40), b"", "f8"),
        ((-1,), bytes(8), "f8"),
        ((3,), bytes(16), "f8"),
        ((1,), bytes(16), "f8"),
        ((1,) * 9, bytes(8), "f8"),
        ((1,), bytes(8), "O"),
        ((1,), bytes(8), "V8"),
        ((1,), bytes(8), "M8[s]"),
    ],
)
def test_shapes_and_types_are_checked_before_anything_is_made(
    shape: tuple[int, ...], data: bytes, code: str
) -> None:
    assert same(read_pickle("x", array_pickle((2,), np.arange(2.0).tobytes())), {"a": np.arange(2.0)})
    with pytest.raises(InputError, match=r"x: is a .*Python pickle"):
        read_pickle("x", array_pickle(shape, data, code))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_damage_is_an_error_or_another_value(protocol: int) -> None:
    """Every truncation, and a few thousand wrong bytes: InputError or numbers, nothing else, and no hang."""
    data = pickle.dumps(CONTENT, protocol)
    for end in range(len(data)):
        with pytest.raises(InputError):
            read_pickle("x", data[:end])
    drawn = random.Random(protocol)
    refused = 0
    for _ in range(1500):
        damaged = bytearray(data)
        for _ in range(drawn.choice((1, 1, 2, 8))):
            damaged[drawn.randrange(2, len(data))] = drawn.choice(
                (drawn.randrange(256), ord("R"), ord("b"), 0)
            )
        try:
            read_pickle("x", bytes(damaged))
        except InputError:
            refused += 1
    assert refused > 100
