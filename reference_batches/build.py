"""A reference batch from your own images: ADM's preprocessing, a seeded choice, statistics of all of them.

The main path is :func:`build`. Images are decoded on all cores and stream past once: features go into
running moments, and the pixels of the chosen images into a file beside the result. Every half minute what has
been done is written down there, so that the same command goes on after an interruption and gives the same
bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evalkit.errors import ImageError, InputError, OutputError, UndefinedMetricError, listing
from evalkit.features import Extractor
from evalkit.images import (
    ImageSource,
    NpzWriter,
    SupportsArray,
    ValueRange,
    check_range_used,
    open_images,
    read_ahead,
)
from evalkit.images.files import MAX_IMAGE_BYTES, ImageFiles, first_folders, open_image_files, open_picture
from evalkit.metrics import Moments
from evalkit.system.files import check_writable, only_process, replace_atomically, versions
from evalkit.system.identity import stamp

__all__ = ["Classes", "Report", "Settings", "build", "center_crop", "decode_rgb", "labels_of"]

Pixels = NDArray[np.uint8]
Progress = Callable[[str, int, int], None]

FORMAT = "evalkit reference 1"
DECODED_AT_A_TIME = 64
SAVE_SECONDS = 30.0
LAYERS = {"pool": "", "spatial": "_s"}
"""Layers of the statistics, and what their keys end in."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the content of a reference batch, besides its source.

    Attributes:
        size: Side of the square images, pixels.
        images: How many images to keep, drawn without replacement in random order; None keeps all, in the
            order of their names.
        seed: Of the drawing.
        statistics: Whose mean and covariance go into the file: of ``all`` images of the source, as in the
            published references, of those ``kept``, or of ``none``.
        labels: Where classes come from: ``folders`` (the first folder that is not common to all; classes are
            numbered in the order of their sorted names), ``names`` (what stands before the first underscore
            of the file's name), ``none``, or ``auto``: the container's labels, else folders if there are any.
        class_order: How the names of classes are sorted: as ``text``, which has 10 before 2 and is what other
            tools do, or ``natural``, which has 2 before 10.
    """

    size: int
    images: int | None = None
    seed: int = 0
    statistics: Literal["all", "kept", "none"] = "all"
    labels: Literal["auto", "folders", "names", "none"] = "auto"
    class_order: Literal["text", "natural"] = "text"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"Size {self.size}: expected the side of the images in pixels, at least 1.")
        if self.images is not None and self.images < 1:
            raise InputError(f"{self.images} images to keep: expected at least 1.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"Seed {self.seed}: expected 0 to {2**32 - 1}.")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What :func:`build` did.

    Attributes:
        path: The npz.
        kept: Images in it.
        classes: Their classes, or None where there are no labels.
        counted: Images that the statistics are of; 0 where there are none.
        bad: Names of images that were left out because they cannot be decoded.
        notes: What the user should know and that is no error, a sentence each.
    """

    path: Path
    kept: int
    classes: int | None
    counted: int
    bad: tuple[str, ...]
    notes: tuple[str, ...]


def build(
    source: str | os.PathLike[str] | SupportsArray,
    out: Path,
    settings: Settings,
    *,
    extractor: Extractor | None = None,
    skip_bad: bool = False,
    value_range: ValueRange | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a reference batch that the ADM reference evaluator reads as it is.

    The npz has ``arr_0`` (n, size, size, 3) uint8, ``arr_1`` (n,) int64 labels where there are any, ``mu,
    sigma, mu_s, sigma_s`` unless asked otherwise, and two keys that the evaluator ignores: ``indices`` (n,)
    int64, the place of each image in the source, and ``provenance``, JSON. The same source and settings give
    the same bytes, whatever the number of workers and interruptions.

    Args:
        source: A folder, zip, tar or parquet file of images of any size, or equally large images as
            :func:`evalkit.images.open_images` takes them.
        out: The npz. What is there is replaced at the end; until then ``<out>.building`` holds the work.
        settings: See :class:`Settings`.
        extractor: The network of the statistics; not needed without statistics.
        skip_bad: Leave out images that cannot be decoded, drawing others in their place, and do not stop.
        value_range: What a source of floats holds; see :func:`evalkit.images.open_images`.
        workers: Decoding threads; None is one a core. Not part of the result.
        progress: Called with (stage, done, total).

    Raises:
        ImageError: An image cannot be decoded; the message names it.
        InputError: The source is none, has too few images, or another unfinished build is in the way, or one
            that is damaged.
        OutputError: The file cannot be written, or there is too little space.
        UndefinedMetricError: Statistics of fewer than two images.
    """
    check_writable(out, *([source] if isinstance(source, str | os.PathLike) else []))
    items = _open(source, value_range)
    if settings.statistics == "none":
        extractor = None
    elif extractor is None:
        raise ValueError("statistics need an extractor")
    with closing(_Builder(items, settings, extractor, out)) as builder:
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            builder.read(pool, skip_bad, progress)
            builder.replace_bad(pool)
        return builder.finish()


def decode_rgb(where: str, data: bytes) -> Image.Image:
    """An image file as 8-bit RGB, as the reference preprocessing has it: Pillow's ``convert("RGB")``.

    So EXIF orientation is not applied, transparency is dropped and not blended, CMYK is converted without a
    colour profile, and the first of several frames counts. Grey of 16 bits keeps its upper 8, as Pillow does
    with colours of 16 bits; ``convert`` alone would turn nearly all of it white.

    Args:
        where: What to call the image in a message.
        data: The file's content.

    Raises:
        ImageError: It cannot be decoded, is cut short, too large, or has 32 bits a channel.
    """
    try:
        with open_picture(data) as image:
            if image.width * image.height * 3 > MAX_IMAGE_BYTES:
                raise ImageError(
                    f"{where}: {image.width}x{image.height} pixels; limited to {MAX_IMAGE_BYTES // 3} pixels"
                )
            if image.mode.startswith("I;16"):
                upper = (np.asarray(image) >> 8).astype(np.uint8)
                return Image.fromarray(upper).convert("RGB")
            if image.mode in ("I", "F"):
                raise ImageError(
                    f"{where}: Pillow mode {image.mode}, 32 bits a channel; convert it to 8 or 16 bits"
                )
            # By way of RGBA, because Pillow warns of transparency in palettes; the colours are the same.
            return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # on damaged data Pillow's decoders raise almost anything
        raise ImageError(
            f"{where}: cannot be decoded ({type(error).__name__}: {error}); replace or remove it"
        ) from error


def center_crop(where: str, image: Image.Image, size: int) -> Pixels:
    """The crop of ADM's training and reference images.

    While the shorter side is at least twice ``size``, both sides are halved with a box filter; then the
    shorter side is brought to ``size`` with a bicubic filter, and the centre is cut out.

    Args:
        where: What to call the image in a message.
        image: RGB.
        size: Side of the square, pixels.

    Returns:
        (size, size, 3) uint8.

    Raises:
        ImageError: The image is so narrow that its longer side would need hundreds of megabytes.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height * 3 > MAX_IMAGE_BYTES:
        raise ImageError(f"{where}: {image.width}x{image.height} pixels, too narrow to be scaled to {size}")
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The class of each image.

    Attributes:
        labels: (n,) int64, or None where there are no classes.
        names: Of the classes, by label, where they were read from names.
        notes: What the user should know, a sentence each.
    """

    labels: NDArray[np.int64] | None = None
    names: list[str] | None = None
    notes: tuple[str, ...] = ()


def labels_of(items: ImageFiles | ImageSource, settings: Settings) -> Classes:
    """The class of each image; see :class:`Settings`.

    Raises:
        InputError: The names show no classes, and they were asked for.
    """
    how = settings.labels
    if how == "none" or (how == "auto" and items.labels is not None):
        return Classes(labels=None if how == "none" else items.labels)
    if isinstance(items, ImageSource):
        if how != "auto":
            raise InputError(f"{items.name}: a {items.kind} has no file names to take classes from.")
        return Classes()
    if how == "names":
        files = [name.rpartition("/")[2] for name in items.names]
        found = [file.split("_")[0] if "_" in file else "" for file in files]
        expected = "names such as n01440764_10026.JPEG, the class before the first underscore"
    else:
        found = first_folders(items.names)
        expected = "a folder for each class"
    if not all(found):
        if how == "auto":
            return Classes()
        outside = items.names[found.index("")]
        raise InputError(f"{items.name}: {outside} has no class; expected {expected}.")
    text = sorted(set(found))
    natural = sorted(text, key=_natural)
    names = natural if settings.class_order == "natural" else text
    notes: tuple[str, ...] = ()
    if text != natural:
        first = next(a for a, b in zip(text, natural, strict=True) if a != b)
        other = "natural" if settings.class_order == "text" else "text"
        notes = (
            f"Classes are numbered by name, in {settings.class_order} order: {listing(names)}. "
            f"So {first} is class {names.index(first)}; --class-order {other} would number them differently.",
        )
    places = {name: label for label, name in enumerate(names)}
    return Classes(labels=np.array([places[name] for name in found], np.int64), names=names, notes=notes)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key to sort by in which numbers count as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts if part]


def _open(
    source: str | os.PathLike[str] | SupportsArray, value_range: ValueRange | None
) -> ImageFiles | ImageSource:
    """Files of any size where there are files, else images of one size."""
    if isinstance(source, str | os.PathLike) and Path(source).exists():
        try:
            files = open_image_files(Path(source))
        except InputError:
            files = None  # for example an npz, which is a zip without images: what it is will be said there
        if files:
            check_range_used([files], value_range)
            return files
    images = open_images(source, value_range=value_range)
    check_range_used([images], value_range)
    if images.shape is None:
        raise InputError(f"{images.name}: holds statistics and no images; expected images.")
    return images


def _draw(n: int, settings: Settings) -> NDArray[np.int64]:
    """Every index, in the order in which images are kept."""
    if settings.images is None:
        return np.arange(n)
    if settings.images > n:
        raise InputError(f"{settings.images:,} images to keep of {n:,}: give at most the number there is.")
    # RandomState, because NumPy promises that its numbers never change.
    return np.random.RandomState(settings.seed).permutation(n).astype(np.int64)


class _Crop(NamedTuple):
    place: int
    digest: bytes  # of the file, or of the pixels
    pixels: Pixels | ImageError


class _Builder:
    """One build: what is known of the source, what has been done, and the folder where that is kept."""

    def __init__(
        self, items: ImageFiles | ImageSource, settings: Settings, extractor: Extractor | None, out: Path
    ) -> None:
        self.items, self.settings, self.extractor, self.out = items, settings, extractor, out
        found = labels_of(items, settings)
        self.labels, self.classes, self.notes = found.labels, found.names, items.notes + found.notes
        drawn = _draw(len(items), settings)
        self.order, self.spare = np.split(drawn, [settings.images or len(drawn)])
        self.slots = {int(index): slot for slot, index in enumerate(self.order)}
        everything = extractor is not None and settings.statistics == "all"
        self.wanted = np.arange(len(items)) if everything else np.sort(self.order)
        if extractor and len(self.wanted) < 2:
            raise UndefinedMetricError(
                f"{items.name}: statistics of one image; a covariance needs two, and thousands to mean "
                "something. Give more images, or ask for no statistics."
            )
        # What has been done, of `wanted`, in its order.
        self.position = 0
        self.digest = hashlib.sha256(FORMAT.encode()).digest()
        self.bad: dict[int, str] = {}
        self.moments = {layer: Moments(d) for layer, d in extractor.dimensions.items()} if extractor else {}
        # Checksum of each slot's pixels: they may lie in a file for days before they are read again.
        self.checksums = np.zeros(len(self.order), np.uint32)
        self._saved = time.monotonic()
        self._open_folder()

    # -------------------------------------------------------------------------------------- the work

    def read(self, pool: ThreadPoolExecutor, skip_bad: bool, progress: Progress | None) -> None:
        """Take every wanted image that is not done: features into the moments, pixels into their slots."""
        stage = f"images of {self.items.name}"
        if progress:
            progress(stage, self.position, len(self.wanted))
        with closing(read_ahead(self._crops(self.wanted[self.position :], pool))) as stream:
            for crops in stream:
                bad = next((crop.pixels for crop in crops if isinstance(crop.pixels, ImageError)), None)
                if bad and not skip_bad:
                    self.save()
                    raise ImageError(f"{bad}. Or leave such images out: --skip-bad goes on from here.")
                self._take(crops)
                self.position += len(crops)
                if time.monotonic() - self._saved > SAVE_SECONDS:
                    self.save()
                if progress:
                    progress(stage, self.position, len(self.wanted))

    def replace_bad(self, pool: ThreadPoolExecutor) -> None:
        """Put the next images drawn in the place of chosen ones that are bad; of all, leave them out."""
        if self.settings.images is None:
            self.order = np.array([index for index in self.order.tolist() if index not in self.bad])
        gaps = [slot for slot, index in enumerate(self.order.tolist()) if index in self.bad]
        free, spare, found = gaps.copy(), iter(self.spare.tolist()), list[int]()
        while free and (drawn := list(islice(spare, len(free)))):
            self.slots |= {index: free.pop() for index in drawn}
            fresh = np.sort([index for index in drawn if index not in self.bad]).astype(np.int64)
            for crops in self._crops(fresh, pool):
                self._take(crops, counted=self.settings.statistics == "all")
            free += [self.slots[index] for index in drawn if index in self.bad]
            found += [index for index in drawn if index not in self.bad]
        self.order[gaps[: len(found)]] = found
        left = len(self.order) - len(free)
        if free or not left:
            raise ImageError(
                f"{self.items.name}: {len(self.bad):,} of {len(self.items):,} images cannot be decoded and "
                f"{left:,} are left. Keep fewer, or repair them. The first: {self.bad[min(self.bad)]}"
            )

    def finish(self) -> Report:
        """Write the npz, and remove the folder."""
        labels = None if self.labels is None else self.labels[self.order]
        size = self.settings.size
        with NpzWriter.create(self.out, (len(self.order), size, size, 3)) as writer:
            slots = [self.slots[index] for index in self.order.tolist()]
            for first in range(0, len(slots), DECODED_AT_A_TIME):
                chosen = slots[first : first + DECODED_AT_A_TIME]
                pixels = self.pixels[chosen]
                if any(
                    zlib.crc32(image) != self.checksums[slot]
                    for image, slot in zip(pixels, chosen, strict=True)
                ):
                    raise self._damaged(self.folder / "pixels", "they are not those that were written")
                writer.append(pixels)
            if labels is not None:
                writer.add("arr_1", labels)
            for layer, suffix in LAYERS.items():
                if layer in self.moments:
                    writer.add(f"mu{suffix}", self.moments[layer].mean)
                    writer.add(f"sigma{suffix}", self.moments[layer].covariance)
            writer.add("indices", self.order)
            writer.add("provenance", np.array(json.dumps(self._provenance())))
        shutil.rmtree(self.folder)
        return Report(
            path=self.out,
            kept=len(self.order),
            classes=None if labels is None else len(np.unique(labels)),
            counted=self.moments["pool"].n if self.moments else 0,
            bad=tuple(self.bad[index] for index in sorted(self.bad)),
            notes=self.notes,
        )

    def _take(self, crops: list[_Crop], *, counted: bool = False) -> None:
        good = []
        for crop in crops:
            self.digest = hashlib.sha256(self.digest + crop.digest).digest()
            if isinstance(crop.pixels, ImageError):
                self.bad[crop.place] = str(crop.pixels)
                continue
            good.append(crop.pixels)
            if (slot := self.slots.get(crop.place)) is not None:
                self.pixels[slot] = crop.pixels
                self.checksums[slot] = zlib.crc32(self.pixels[slot])
        if good and self.extractor and not counted:
            for layer, features in self.extractor(np.stack(good)).items():
                self.moments[layer].update(features)

    def _crops(self, indices: NDArray[np.int64], pool: ThreadPoolExecutor) -> Iterator[list[_Crop]]:
        """The images with these ascending indices, cropped; as many at a time as the network likes."""
        count = self.extractor.batch_size if self.extractor else DECODED_AT_A_TIME
        with closing(_contents(self.items, indices)) as contents:
            while batch := list(islice(contents, count)):
                yield list(pool.map(self._crop, batch))

    def _crop(self, item: tuple[int, str, bytes | Image.Image | InputError]) -> _Crop:
        index, where, content = item
        if isinstance(content, InputError):
            return _Crop(index, b"", ImageError(str(content)))
        digest = hashlib.sha256(content if isinstance(content, bytes) else content.tobytes()).digest()
        try:
            image = decode_rgb(where, content) if isinstance(content, bytes) else content
            return _Crop(index, digest, center_crop(where, image, self.settings.size))
        except ImageError as error:
            return _Crop(index, digest, error)

    # ------------------------------------------------------------------------- what outlives the process

    def _open_folder(self) -> None:
        out, size = self.out, self.settings.size
        self.folder = self.out.with_name(f"{self.out.name}.building")
        identity = json.dumps(self._identity(), indent=1)
        settings, state = self.folder / "settings.json", self.folder / "state.npz"
        if settings.exists() and settings.read_bytes() != identity.encode():
            raise InputError(
                f"{self.folder} holds an unfinished build that differs in {_difference(settings, identity)}. "
                "Delete that folder to begin anew, repeat that build to finish it, or name another output."
            )
        need = 2 * len(self.order) * size * size * 3 + 2**28
        free = shutil.disk_usage(self.out.parent).free
        if need > free and not state.exists():
            raise OutputError(
                f"{self.out} takes {need / 1e9:.2f} GB while it is built, and {free / 1e9:.2f} GB are free. "
                "Free some space, keep fewer images or name an output elsewhere."
            )
        self.folder.mkdir(exist_ok=True)
        self._alone = ExitStack()
        self._alone.enter_context(only_process(self.folder / "lock", f"building {out}"))
        with replace_atomically(settings) as partial:
            partial.write_text(identity)
        shape = (len(self.order), size, size, 3)
        pixels = self.folder / "pixels"
        if state.exists():
            try:
                self._load(state)
            except Exception as error:  # NumPy parses headers as Python source, and lets any error out
                raise self._damaged(state, f"{type(error).__name__}: {error}") from error
            if not pixels.exists() or pixels.stat().st_size != math.prod(shape):
                raise self._damaged(pixels, "its size is another")
        self.pixels = np.memmap(pixels, np.uint8, "r+" if pixels.exists() else "w+", shape=shape)

    def close(self) -> None:
        """Let another process go on with the work, if any is left."""
        self._alone.close()

    def save(self) -> None:
        """Write down what has been done, pixels first."""
        self.pixels.flush()
        arrays: dict[str, Any] = {
            "position": np.array(self.position),
            "digest": np.frombuffer(self.digest, np.uint8),
            "bad": np.array(json.dumps(sorted(self.bad.items()))),
            "checksums": self.checksums,
        }
        for layer, moments in self.moments.items():
            arrays |= {f"{layer}_{key}": value for key, value in moments.state().items()}
        with replace_atomically(self.folder / "state.npz") as partial, partial.open("wb") as file:
            np.savez(file, **arrays)
        self._saved = time.monotonic()

    def _load(self, state: Path) -> None:
        with state.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            self.position = int(arrays["position"])
            self.digest = arrays["digest"].tobytes()
            self.bad = dict(json.loads(str(arrays["bad"])))
            checksums = arrays["checksums"]
            done = self.wanted[: self.position].tolist()
            fits = [
                0 <= self.position <= len(self.wanted),
                len(self.digest) == len(hashlib.sha256().digest()),
                self.bad.keys() <= set(done) and all(isinstance(why, str) for why in self.bad.values()),
                (checksums.shape, checksums.dtype) == (self.checksums.shape, self.checksums.dtype),
            ]
            self.checksums = checksums
            for layer, moments in self.moments.items():
                saved = {key: arrays[f"{layer}_{key}"] for key in moments.state()}
                fits += [
                    all(saved[key].shape == value.shape for key, value in moments.state().items()),
                    all(np.isfinite(value).all() for value in saved.values()),
                ]
                moments.restore(saved)
                fits.append(moments.n == len(done) - len(self.bad))
            if not all(fits):
                raise ValueError("its values do not go together")

    def _damaged(self, file: Path, why: str) -> InputError:
        return InputError(f"{file} is damaged ({why[:200]}). Delete the folder {self.folder} to begin anew.")

    def _identity(self) -> dict[str, Any]:
        """What an unfinished build must share with the one that goes on with it."""
        items = self.items
        if isinstance(items, ImageFiles):
            listing = hashlib.sha256(json.dumps([items.names, stamp(items.paths())[0]]).encode()).hexdigest()
        else:
            listing = items.digest
        return {
            "format": FORMAT,
            "source": listing,
            "settings": asdict(self.settings),
            "extractor": self.extractor.fingerprint if self.extractor else None,
            "versions": versions("evalkit", "numpy", "pillow"),
        }

    def _provenance(self) -> dict[str, Any]:
        items, extractor = self.items, self.extractor
        return {
            "format": FORMAT,
            "source": {
                "name": Path(items.name).name,
                "kind": items.kind,
                "images": len(items),
                "images_read": len(self.wanted),
                "digest_of_images_read": self.digest.hex(),
            },
            "settings": asdict(self.settings),
            "statistics": extractor
            and {
                "images": self.moments["pool"].n,
                "extractor": extractor.name,
                "fingerprint": extractor.fingerprint,
                "precision": getattr(extractor, "precision", "float32"),
            },
            "left_out": [self.bad[index] for index in sorted(self.bad)],
            "classes": self.classes,
            "versions": self._identity()["versions"],
        }


def _difference(settings: Path, identity: str) -> str:
    """What of an unfinished build is not as it is now, in words."""
    damaged = f"its record, {settings.name}, which is damaged"
    try:
        before, now = dict(json.loads(settings.read_bytes())), json.loads(identity)
        before, now = before | before.pop("settings", {}), now | now.pop("settings")
    except (OSError, ValueError, TypeError, RecursionError):
        return damaged
    changed = [key for key in now if before.get(key) != now[key]]
    words = {"source": "the source's files", "extractor": "the network", "size": "--size"}
    listed = (words.get(key, f"--{key}" if key in asdict(Settings(size=1)) else key) for key in changed)
    return ", ".join(listed) or damaged


def _contents(
    items: ImageFiles | ImageSource, indices: NDArray[np.int64]
) -> Generator[tuple[int, str, Any], None, None]:
    """Yields (index, name for messages, file content or image) of these ascending indices."""
    if isinstance(items, ImageFiles):
        with closing(items.read(indices.tolist())) as contents:
            for index, (name, content) in zip(indices.tolist(), contents, strict=True):
                yield index, f"{items.name}, {name}", content
        return
    wanted = set(indices.tolist())
    first = min(wanted, default=0)
    with closing(items.batches(DECODED_AT_A_TIME, start=first)) as batches:
        for batch in batches:
            for index, pixels in enumerate(np.rint(batch).astype(np.uint8), first):
                if index in wanted:
                    yield index, f"{items.name}, image {index}", Image.fromarray(pixels)
            first += len(batch)
