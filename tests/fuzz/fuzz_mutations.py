"""Ways to damage a file: blind ones, and ones that know its text or repair its checksums afterwards.

Each takes the bytes and a random generator, and returns the damaged bytes and what was done to them. A seed
gives the same damage everywhere.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from random import Random
from typing import Any, NamedTuple

Damage = tuple[bytes, str]
Mutation = Callable[[bytes, Random], Damage]

REPAIRED = "checksum repaired"

LONG = "x" * 100_000
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        1.5,
        -0.0,
        2**31,
        2**32,
        2**53 + 1,
        2**63,
        2**64,
        -(2**63),
        10**30,
        10**400,
    ),
    *(1e308, 5e-324, float("nan"), float("inf"), float("-inf")),
    *("", "x", "0", "1", "\0", "\ud800", "ä\n\x1b[31m", "../../x", "/etc/passwd", LONG),
    *([], [[]], [None], [1, 2, 3], ["x"], {}, {"a": 1}, {"format": 1}, DEEP),
)
"""What stands where a record or recipe has something else."""

# Texts that no library writes, in the place of a value.
RAW_JSON = ("[" * 100_000, '{"a":' * 100_000, "9" * 5000, "1e999999", "-", '"', "NaN", "\x00", '"\\ud800"')
RAW_TOML = (
    *(
        "[" * 100_000,
        "{a=" * 2000,
        "9" * 5000,
        "nan",
        "inf",
        "-inf",
        "1e400",
        "1979-05-27",
        "'",
        '"""',
        "0x",
        "",
    ),
    *("9223372036854775808", "true", "[1, 'a']", "{a = 1}", '"\\ud800"'),
)


class Damaged(NamedTuple):
    """Damaged bytes.

    Attributes:
        data: They.
        how: What was done.
        repaired: Checksums were made to fit, so that no reader can see the damage by them.
        spliced: Pieces of a second sound file are in it.
    """

    data: bytes
    how: str
    repaired: bool = False
    spliced: bool = False


def damage(
    data: bytes, random: Random, donor: bytes | None = None, special: tuple[Mutation, ...] = ()
) -> Damaged:
    """One mutation at random, rarely two; `special` ones half of the time."""
    repaired = spliced = False
    done = []
    for _ in range(2 if random.random() < 0.15 else 1):
        if special and random.random() < 0.5:
            mutation = random.choice(special)
            data, how = mutation(data, random)
            repaired = repaired or REPAIRED in how
        elif donor is not None and random.random() < 0.12:
            data, how = splice(data, donor, random)
            spliced = True
        else:
            data, how = random.choice(BLIND)(data, random)
        done.append(how)
    return Damaged(data, ", then ".join(done), repaired, spliced)


# ------------------------------------------------------------------------------------------------ blind


def place(data: bytes, random: Random) -> int:
    """Anywhere, half of the time near the beginning or the end, where formats keep their structure."""
    n = max(1, len(data))
    return random.choice(
        (
            random.randrange(n),
            random.randrange(n),
            random.randrange(min(n, 400)),
            n - 1 - random.randrange(min(n, 600)),
        )
    )


def flip(data: bytes, random: Random) -> Damage:
    at, bit = place(data, random), random.randrange(8)
    return _put(data, at, bytes([data[at] ^ 1 << bit]) if data else b"?"), f"bit {bit} of byte {at} flipped"


def burst(data: bytes, random: Random) -> Damage:
    at, length = place(data, random), random.randint(2, 40)
    return _put(data, at, random.randbytes(length)), f"{length} random bytes at {at}"


def set_byte(data: bytes, random: Random) -> Damage:
    at, value = place(data, random), random.choice((0, 1, 0x7F, 0x80, 0xFF, 0x20, 0x0A))
    return _put(data, at, bytes([value])), f"byte {at} set to {value}"


def truncate(data: bytes, random: Random) -> Damage:
    end = random.choice((random.randrange(max(1, len(data))), max(0, len(data) - random.randint(1, 64))))
    return data[:end], f"cut after {end} of {len(data)} bytes"


def zero(data: bytes, random: Random) -> Damage:
    at, length = place(data, random), random.choice((4, 8, 64, 512, 4096))
    return _put(data, at, bytes(min(length, len(data) - at))), f"{length} zeroes at {at}"


def insert(data: bytes, random: Random) -> Damage:
    at, length = place(data, random), random.choice((1, 2, 8, 100, 512))
    return data[:at] + random.randbytes(length) + data[at:], f"{length} random bytes inserted at {at}"


def duplicate(data: bytes, random: Random) -> Damage:
    at, length = place(data, random), random.choice((1, 8, 64, 512))
    return data[: at + length] + data[at:], f"{length} bytes at {at} doubled"


def remove(data: bytes, random: Random) -> Damage:
    at, length = place(data, random), random.choice((1, 2, 8, 64, 512))
    return data[:at] + data[at + length :], f"{length} bytes at {at} removed"


def swap(data: bytes, random: Random) -> Damage:
    length = random.choice((2, 8, 64, 512))
    a, b = sorted((place(data, random), place(data, random)))
    if b - a < length:
        return flip(data, random)
    swapped = (
        data[:a] + data[b : b + length] + data[a + length : b] + data[a : a + length] + data[b + length :]
    )
    return swapped, f"{length} bytes at {a} and {b} swapped"


def huge(data: bytes, random: Random) -> Damage:
    at = place(data, random) & random.choice((~0, ~1, ~3, ~7))
    form = random.choice(("<I", ">I", "<Q", ">Q", "<H", ">H"))
    bits = 8 * struct.calcsize(form)
    value = random.choice(
        (2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1, 2 ** (bits - 4), 2 ** (bits // 2))
    )
    return _put(data, at, struct.pack(form, value)), f"{form} {value} at {at}"


BLIND: tuple[Mutation, ...] = (
    *(flip, flip, burst, set_byte, truncate, truncate, zero, insert, duplicate, remove, swap, huge, huge),
)


def splice(data: bytes, donor: bytes, random: Random) -> Damage:
    if random.random() < 0.5:
        at = place(data, random)
        return data[:at] + donor[at:], f"the other file's bytes from {at} on"
    at, length = place(data, random), random.choice((8, 64, 512))
    other = place(donor, random)
    return _put(
        data, at, donor[other : other + length]
    ), f"{length} bytes of the other file's at {other}, put at {at}"


def _put(data: bytes, at: int, piece: bytes) -> bytes:
    return data[:at] + piece + data[at + len(piece) :]


# -------------------------------------------------------------------------------------------- npy headers

SHAPES = (
    *(
        "()",
        "(0,)",
        "(24,)",
        "(-1, 8, 8, 3)",
        "(24, 8, 8)",
        "(24, 8, 8, 4)",
        "(0, 8, 8, 3)",
        "(12, 16, 8, 3)",
    ),
    *("(24, 8, 8, 3, 1)", "(4611686018427387904, 8, 8, 3)", f"({10**30}, 8, 8, 3)", "(24.0, 8, 8, 3)"),
    *("(True, 8, 8, 3)", "'x'", "None", "(24, 4, 16, 3)", "(1, 32, 48, 3)", f"({'1,' * 100}4608)", "(2**9,)"),
    *(f"(0, {2**62}, 8, 3)", f"({2**32}, {2**32}, 0, 3)", f"{'(' * 90}1{',)' * 90}", "(4608, 1, 1, 3)"),
)
TYPES = (
    *(
        "'|O'",
        "'<f4'",
        "'<f2'",
        "'<i8'",
        "'>u4'",
        "'|b1'",
        "'<c8'",
        "'|S1'",
        "'<U1'",
        "'|V1'",
        "'<M8[s]'",
        "'|i1'",
    ),
    *(
        "''",
        "'x'",
        "None",
        "[('a', '|u1')]",
        "[('a', '|O')]",
        "'<f16'",
        "'|S0'",
        "[]",
        "('|u1', (3,))",
        "'|u1,|u1'",
    ),
    *(f"'|V{2**31 - 1}'", "'<u9'", "'|T'", f"'{'|u1,' * 2000}|u1'", "{'names': [], 'formats': []}", "True"),
)


def npy_header(data: bytes, random: Random) -> Damage:
    """Another shape, type or order in the first npy header, its length kept where it can be."""
    match = re.search(rb"\x93NUMPY[\x01-\x03]\x00(..)(\{[^\n]*\n)", data, re.DOTALL)
    if match is None:
        return flip(data, random)
    text = match[2].decode("latin1").rstrip()
    key, new = random.choice(
        (
            ("shape", random.choice(SHAPES)),
            ("descr", random.choice(TYPES)),
            ("fortran_order", random.choice(("True", "1", "None", "'x'", "[]"))),
        )
    )
    changed = re.sub(rf"('{key}': )(\(.*?\)|'[^']*'|\w+)", lambda found: found[1] + new, text, count=1)
    body = changed.encode("latin1").ljust(len(match[2]) - 1)[: 2**16 - 2] + b"\n"
    header = data[: match.start(1)] + struct.pack("<H", len(body)) + body
    return header + data[match.end() :], f"npy header: {key} {new[:60]}"


# ------------------------------------------------------------------------------------- repaired checksums


def zip_repaired(data: bytes, random: Random) -> Damage:
    """A member damaged, and the zip written anew around it, its checksums right."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info, archive.read(info)) for info in archive.infolist()]
    except Exception:  # an earlier mutation was enough
        return flip(data, random)
    chosen = random.randrange(len(members))
    info, content = members[chosen]
    mutation = (
        random.choice((npy_header, *BLIND)) if content.startswith(b"\x93NUMPY") else random.choice(BLIND)
    )
    content, how = mutation(content, random)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number, (member, sound) in enumerate(members):
            archive.writestr(member, content if number == chosen else sound)
    return buffer.getvalue(), f"in {info.filename}, {REPAIRED}: {how}"


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of each chunk of a PNG."""
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += 12 + length


def png_repaired(data: bytes, random: Random) -> Damage:
    """A chunk damaged, or what is deflated in it, and its checksums made right."""
    found = list(chunks(data))
    if not found:
        return flip(data, random)
    chosen = random.randrange(len(found))
    kind, content = found[chosen]
    if kind == b"IDAT" and random.random() < 0.6:
        try:
            content, how = random.choice(BLIND)(zlib.decompress(content), random)
            content = zlib.compress(content)
        except zlib.error:
            content, how = random.choice(BLIND)(content, random)
    elif kind == b"IHDR" and random.random() < 0.6:
        fields = list(struct.unpack(">2I5B", content.ljust(13, b"\0")[:13]))
        field = random.randrange(7)
        fields[field] = random.choice(
            (0, 1, 2, 3, 4, 6, 7, 9, 16, 255) if field > 1 else (0, 1, 7, 9, 2**16, 2**31 - 1)
        )
        content, how = struct.pack(">2I5B", *fields), f"field {field} is {fields[field]}"
    else:
        content, how = random.choice(BLIND)(content or b"\0", random)
    found[chosen] = (kind, content)
    out = data[:8] + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in found
    )
    return out, f"in {kind!r}, {REPAIRED}: {how}"


# -------------------------------------------------------------------------------------------------- texts


def json_value(data: bytes, random: Random) -> Damage:
    """Another value at some place of the record, a key removed or added, or a text that is no JSON there."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):  # it was damaged before
        return flip(data, random)
    found = list(places(record))
    if not found:
        return json.dumps(random.choice(VALUES)).encode(), "another record altogether"
    container, key = random.choice(found)
    what = random.random()
    where = f"at {key!r}"
    if what < 0.15 and isinstance(container, dict):
        del container[key]
        return json.dumps(record).encode(), f"no {key!r}"
    if what < 0.35:
        container[key] = "@here@"
        raw = random.choice(RAW_JSON)
        return json.dumps(record).replace('"@here@"', raw).encode(), f"{where}: {raw[:20]}"
    if what < 0.45 and isinstance(container, dict):
        container[random.choice(("x", "", LONG, "format"))] = random.choice(VALUES)
        return json.dumps(record).encode(), f"another key beside {key!r}"
    container[key] = deepcopy(random.choice(VALUES))
    return json.dumps(record).encode(), f"{where}: {container[key]!r}"[:80]


def places(record: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a record, at any depth."""
    if isinstance(record, dict | list):
        for key in list(record) if isinstance(record, dict) else range(len(record)):
            yield record, key
            yield from places(record[key])


def toml_value(data: bytes, random: Random) -> Damage:
    """Another value, key or table on some line."""
    lines = data.decode(errors="replace").splitlines()
    at = random.choice([number for number, line in enumerate(lines) if line.strip()] or [0])
    key, equals, _ = lines[at].partition("=") if lines else ("", "", "")
    if not equals:
        lines[at : at + 1] = [
            random.choice(("", "[x]", "[" * 1000, "[[model]]", "[model.network.x]", "= 1", LONG))
        ]
        return "\n".join(lines).encode(), f"another table in line {at + 1}"
    new = random.choice(
        (
            *RAW_TOML,
            *(
                "-1",
                "0",
                "1",
                "2",
                "3",
                "7",
                "2147483648",
                "4294967296",
                "1e308",
                "1e-320",
                "9007199254740993",
            ),
            *(
                "''",
                "'x'",
                f"'{LONG}'",
                "[]",
                "[[]]",
                "[0]",
                "[-1]",
                "[1, 1]",
                f"[{'1, ' * 30}]",
                "0.5",
                "1.0",
            ),
        )
    )
    lines[at] = random.choice((f"{key}= {new}", f"{key}= {new}", f"{key}.a = {new}", f"x{key}= {new}", ""))
    return "\n".join(lines).encode(), f"line {at + 1}: {lines[at][:60]}"


def safetensors_header(data: bytes, random: Random) -> Damage:
    """A value of the header, its length made right."""
    (length,) = struct.unpack("<Q", data[:8])
    header, how = json_value(data[8 : 8 + length], random)
    return struct.pack("<Q", len(header)) + header + data[8 + length :], f"header {how}"
