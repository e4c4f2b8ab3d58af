"""What every fuzz test has at hand: the worker, sound files beside damaged ones, the judging of a command."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_harness import Outcome, Worker, broken_rules, fid, same_number, working
from fuzz_inputs import (
    RECIPE,
    Kind,
    Left,
    Pixels,
    image_folder,
    pixels_of,
    results,
    safetensors,
    write_features,
)
from fuzz_mutations import Damaged

SEED, EXAMPLES = os.environ.get("EVALKIT_FUZZ_SEED"), os.environ.get("EVALKIT_FUZZ_EXAMPLES")


def seeds(first: int, count: int) -> range:
    """Of a test, unless EVALKIT_FUZZ_SEED (the first) or EVALKIT_FUZZ_EXAMPLES (how many) say otherwise."""
    begin = int(SEED) if SEED else first
    return range(begin, begin + (int(EXAMPLES) if EXAMPLES else count))


@dataclass(repr=False)
class Setup:
    """Files and the worker.

    Attributes:
        folder: Of all that follows.
        worker: Runs the commands.
        ref: Images to compare with.
        recipe: Of a tiny network.
        weights: Of one, as safetensors.
        bad: A folder of images, one of them cut short.
        sweep: A folder with results.json.
    """

    folder: Path
    worker: Worker
    ref: Path = field(init=False)
    recipe: Path = field(init=False)
    weights: Path = field(init=False)
    bad: Path = field(init=False)
    sweep: Path = field(init=False)
    _made: dict[tuple[str, int], tuple[Path, Path, Path]] = field(default_factory=dict)
    _fids: dict[tuple[Any, ...], float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sound = self.folder / "sound"
        sound.mkdir(parents=True)
        self.ref = sound / "ref.npz"
        np.savez(self.ref, arr_0=pixels_of(2), arr_1=np.arange(24) % 3)
        self.recipe = sound / "recipe.toml"
        self.recipe.write_text(RECIPE)
        safetensors(sound, 0)
        self.weights = sound / "damaged.safetensors"
        self.sweep, _ = results(sound, 0)
        self.bad, cut = image_folder(sound, 0, "png")
        cut.write_bytes(cut.read_bytes()[:-40])
        self.case, self.out, self.marker = (self.folder / name for name in ("case", "out", "marker"))

    def run(
        self, command: str, given: Path | None = None, *, keep: bool = False
    ) -> tuple[Outcome, list[Path]]:
        """Run a command on a file, in an empty output folder unless the last one's is kept.

        Returns:
            What it did, and the files that it should have written.
        """
        if not keep:
            self.clear()
        # A run's folder may stay with what is done in it; a single file may not.
        outputs = [Path(*self.filled(token)) for token in command.split() if token.startswith("{out}")]
        return self.worker.run(*self.filled(command, given)), outputs

    def filled(self, command: str, given: Path | None = None) -> list[str]:
        """The command's words, with paths in their places."""
        places = {"in": given, "run": self.out / "run", **vars(self)}
        return [token.format(**places) for token in command.split()]

    def clear(self) -> None:
        """Empty the outputs and the cache: what is stored would hide what is damaged."""
        for folder in (self.out, self.worker.cache):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def problems(
        self, outcome: Outcome, outputs: Sequence[Path], names: Sequence[str], *, goes_on: bool = False
    ) -> list[str]:
        """What of the rules was broken, partial files in the cache and the output included."""
        found = broken_rules(outcome, names, () if goes_on else outputs, self.marker)
        for folder in (self.out, self.worker.cache):
            found += [f"left behind: {path.name}" for path in folder.rglob("*.partial")]
        return list(dict.fromkeys(found))

    # ------------------------------------------------------------------------------------ sound files

    def sound(self, kind: Kind, variant: int) -> tuple[Path, Path, Path]:
        """A folder with a sound file, what of it commands are given, and what is damaged; made once."""
        key = (kind.name, variant)
        if key not in self._made:
            folder = self.folder / f"sound-{len(self._made)}"
            folder.mkdir()
            given, target = kind.make(folder, variant)
            self._made[key] = (folder, given.relative_to(folder), target.relative_to(folder))
        return self._made[key]

    def left(self, left: Left) -> Path:
        """The output folder of a command that was ended, as it was left."""
        key = (left.name, 0)
        if key not in self._made:
            self.run(left.begin)
            result = None
            folder = self.folder / f"sound-{len(self._made)}"
            shutil.copytree(self.out, folder)
            for name in left.remove:
                (folder / name).unlink()
            assert (folder / left.file).is_file(), (left.name, (self.worker.folder / "err").read_text())
            if left.result:
                shutil.rmtree(self.out)
                shutil.copytree(folder, self.out)
                outcome, _ = self.run(left.go_on, keep=True)
                assert outcome.code == 0, outcome
                result = self.folder / f"result-{len(self._made)}"
                shutil.copy(self.out / left.result, result)
            self._made[key] = (folder, result or folder, folder)
        return self._made[key][0]

    def result(self, left: Left) -> bytes:
        """What the command makes of what was left, undamaged."""
        return self._made[left.name, 0][1].read_bytes()

    # ---------------------------------------------------------------------------------------- numbers

    def fid_of(self, pixels: Pixels) -> float | None:
        """FID of sound images, or features, against the reference; None where they are refused."""
        key = (pixels.dtype.str, pixels.shape, pixels.tobytes())
        if key not in self._fids:
            file = self.folder / ("clean.npz" if pixels.ndim != 2 else "clean.h5")
            if pixels.ndim == 2:
                write_features(file, pixels)
            else:
                np.savez(file, arr_0=pixels)
            outcome = self.worker.run(
                "compare", self.ref, file, "--metrics", "fid", "--format", "json", "--no-store"
            )
            self._fids[key] = fid(outcome) if outcome.code == 0 else None
        return self._fids[key]

    def wrong_number(self, outcome: Outcome, right: Sequence[Pixels]) -> list[str]:
        """A printed FID that is of none of these images."""
        if outcome.code != 0 or "fid" not in outcome.arguments:
            return []
        found = fid(outcome)
        expected = [self.fid_of(pixels) for pixels in right]
        if any(value is not None and same_number(found, value) for value in expected):
            return []
        return [f"FID {found}, expected {expected or 'a refusal, as the independent reader refuses it'}"]

    def wrong_pixels(self, outcome: Outcome, outputs: Sequence[Path], right: Sequence[Pixels]) -> list[str]:
        """A converted npz that holds none of these images."""
        if (
            outcome.code != 0
            or outcome.arguments[:2] != ("reference", "convert")
            or outputs[0].suffix != ".npz"
        ):
            return []
        with np.load(outputs[0]) as arrays:
            found = arrays["arr_0"]
        if any(np.array_equal(found, pixels) for pixels in right):
            return []
        differing = [
            f"{int((found != pixels).sum())} values differ"
            if found.shape == pixels.shape
            else f"{pixels.shape}"
            for pixels in right
        ]
        return [
            f"converted pixels {found.shape} are not those of the file: {differing or 'expected a refusal'}"
        ]


def right_pixels(
    kind: Kind, given: Path, damaged: Damaged, outcome: Outcome, sound: Sequence[Path]
) -> list[Pixels]:
    """What images the damaged file may be read as; see ``fuzz_inputs``.

    Args:
        kind: Of the file.
        given: What the command was given.
        damaged: What was done to it.
        outcome: Of the command.
        sound: The file before, and the one of which pieces may have been put in.
    """
    assert kind.read is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            really = [kind.read(given)]
        except Exception:
            really = []
    if damaged.repaired or not kind.checked:
        return really
    undamaged = [kind.read(path) for path in (sound if damaged.spliced else sound[:1])]
    if really and (kind.name.startswith("zip") or damaged.spliced):
        # Sound images all of them, in another order or some of them the other file's.
        known = {image.tobytes() for pixels in undamaged for image in pixels}
        whole = len(really[0]) == len(undamaged[0]) or "left out" in outcome.out + outcome.err
        if whole and all(image.tobytes() in known for image in really[0]):
            undamaged.append(really[0])
    return undamaged


@contextmanager
def ready(folder: Path) -> Iterator[Setup]:
    """Everything, for as long as the block runs."""
    with working(folder / "worker") as worker:
        yield Setup(folder, worker)
