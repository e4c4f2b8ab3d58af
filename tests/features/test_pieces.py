"""Pieces: cut so that a kill costs little on any device, and so that no forward pass changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from stand_ins import InceptionPixels as Pixels

from evalkit.features import pieces
from evalkit.features.extraction import extract
from evalkit.features.pieces import Cutter, Piece
from evalkit.features.store import StoredBatch
from evalkit.images import open_images
from evalkit.system.run import Run


class Clock:
    """Stands in for the time; the work lets it pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pieces, "monotonic", made)
    return made


def cut(cutter: Cutter, clock: Clock, seconds: Callable[[Piece], float]) -> list[Piece]:
    """All pieces, each of which takes so long, one after the other."""
    found = []
    for number, piece in enumerate(cutter.pieces()):
        clock.now += seconds(piece)
        assert cutter.end(number) == piece
        found.append(piece)
    return found


def sizes(found: list[Piece]) -> list[int]:
    return [piece.end - piece.begin for piece in found]


def check(found: list[Piece], unit: int, missing: dict[str, NDArray[np.bool_]]) -> None:
    """They are aligned to their sizes, cover what is missing once, and begin nothing that is there."""
    n = len(next(iter(missing.values())))
    due = {name: np.zeros(n, int) for name in missing}
    for piece in found:
        size = piece.end - piece.begin
        assert size <= 512
        if piece.end < n:
            assert size & (size - 1) == 0
            assert size >= unit
            assert piece.begin % size == 0
        assert piece.begin % unit == 0
        assert piece.begin // 512 == (piece.end - 1) // 512
        for name in piece.networks:
            due[name][piece.begin : piece.end] += 1
    for name, absent in missing.items():
        units = np.repeat(np.logical_or.reduceat(absent, np.arange(0, n, unit)), unit)[:n]
        np.testing.assert_array_equal(due[name], units)


@pytest.mark.parametrize("rate", [0.3, 2, 15, 40, 1000, 1e6])
@pytest.mark.parametrize("unit", [1, 8, 64, 256])
def test_they_grow_to_what_takes_some_seconds(clock: Clock, rate: float, unit: int) -> None:
    missing = {"a": np.ones(20_000, bool)}
    found = cut(Cutter(unit, missing), clock, lambda piece: (piece.end - piece.begin) / rate)
    check(found, unit, missing)
    assert found[0].end == unit
    seconds = max(sizes(found)) / rate
    assert seconds <= 15 or max(sizes(found)) == unit  # one forward pass cannot be cut
    assert seconds >= 5 or max(sizes(found)) == 512


def test_they_shrink_where_it_becomes_slow(clock: Clock) -> None:
    rates = iter([1000.0] * 30 + [15.0] * 10_000)
    taken: list[float] = []

    def seconds(piece: Piece) -> float:
        taken.append((piece.end - piece.begin) / next(rates))
        return taken[-1]

    missing = {"a": np.ones(20_000, bool)}
    found = cut(Cutter(8, missing), clock, seconds)
    check(found, 8, missing)
    assert sizes(found)[20] == 512
    slow = [time > 15 for time in taken]
    assert slow[30:32] == [True, True]  # the one in which it became slow, and half of it
    assert not any(slow[32:])
    assert sizes(found)[40] == 128


def test_of_those_in_hand_only_the_first_to_come_counts(clock: Clock) -> None:
    cutter = Cutter(8, {"a": np.ones(4096, bool)})
    cuts = cutter.pieces()
    assert [next(cuts).end for _ in range(4)] == [8, 16, 24, 32]
    for number in (3, 0, 2, 1):
        cutter.end(number)
    assert next(cuts) == Piece(32, 48, ("a",))
    cutter.end(4)  # the first of 16
    assert next(cuts) == Piece(48, 64, ("a",))
    assert next(cuts) == Piece(64, 96, ("a",))
    clock.now = 60.0
    for number in (5, 6):
        cutter.end(number)
    assert [next(cuts).end for _ in range(2)] == [104, 112]


def test_they_fill_any_holes(clock: Clock) -> None:
    chance = random.Random(0)
    for _ in range(200):
        n, unit = chance.randrange(1, 3000), 1 << chance.randrange(10)
        missing = {}
        for name in ("a", "b")[: chance.randrange(1, 3)]:
            missing[name] = np.ones(n, bool)
            for _ in range(chance.randrange(6)):
                begin = chance.randrange(n)
                missing[name][begin : begin + chance.choice([1, 8, 64, 512])] = False
        cutter = Cutter(unit, missing)
        images = cutter.images
        found = cut(cutter, clock, lambda _: chance.choice([0.0, 7.0, 20.0]))
        check(found, unit, missing)
        assert sum(sizes(found)) == images


# In an extraction -------------------------------------------------------------------------------------


class Slow(Pixels):
    """Extracts 15 images a second, by the clock; the process is killed at a moment."""

    batch_size: ClassVar[int] = 8

    def __init__(self, clock: Clock, killed: float) -> None:
        super().__init__()
        self._clock = clock
        self._killed = killed
        self.seen = 0

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        self._clock.now += len(images) / 15
        self.seen += len(images)
        if self._clock.now > self._killed:
            raise KeyboardInterrupt
        return super().__call__(images)


def test_killed_again_and_again_it_still_ends(
    clock: Clock, tmp_path: Path, images: NDArray[np.uint8]
) -> None:
    """At random within every 28 s: where a piece was 512 images, it never did."""
    batch, chance = np.concatenate([images] * 30), random.Random(0)
    done, tries, extra = 0, 0, 0
    while True:
        extractor = Slow(clock, clock.now + chance.uniform(0, 28))
        begun, tries = clock.now, tries + 1
        try:
            found = extract(open_images(batch), extractor, run=Run(store=tmp_path))
            break
        except KeyboardInterrupt:
            there = ~StoredBatch(tmp_path, open_images(batch), extractor).missing()
            lost = extractor.seen - (int(there.sum()) - done)
            assert lost / 15 < 15
            done, extra = int(there.sum()), extra + lost
            assert clock.now > begun
    assert done + extractor.seen == len(batch)
    assert 8 < tries < 40
    assert extra < len(batch) / 2
    np.testing.assert_array_equal(found.arrays["pool"], Pixels()(batch)["pool"])


def test_a_store_of_whole_shards_is_read_and_continued(
    clock: Clock, tmp_path: Path, images: NDArray[np.uint8]
) -> None:
    """As earlier versions wrote it; and pieces that overlap, as of two processes at the same time."""
    batch = np.concatenate([images] * 30)  # 1,800
    whole = Pixels()(batch)
    stored = StoredBatch(tmp_path, open_images(batch), Pixels())
    stored.prepare()
    for begin, end in [(0, 512), (512, 1024), (1088, 1152), (1024, 1280), (1264, 1272), (1536, 1800)]:
        stored.write((begin, end), {output: rows[begin:end] for output, rows in whole.items()})
    (stored.folder / "claims.lock").touch()
    (stored.folder / "00001280-00001408.h5.partial").touch()
    extractor = Slow(clock, np.inf)
    found = extract(open_images(batch), extractor, run=Run(store=tmp_path))
    assert extractor.seen == 256
    for output in ("pool", "spatial"):
        np.testing.assert_array_equal(found.arrays[output], whole[output])
