"""What a build has done, saved in the folder ``<out>.building`` so that repeating the command resumes it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import InputError
from evalkit.features.moments import Moments
from evalkit.system.differences import differences
from evalkit.system.files import replace_atomically, working_path
from evalkit.system.locks import exclusive_lock
from evalkit.system.space import check_free_space
from evalkit.system.storage import Place
from reference_batches.crop import Pixels

__all__ = ["FORMAT", "Journal"]

FORMAT = "evalkit reference 1"
SAVE_SECONDS = 30.0


class Journal:
    """What a build has done so far, in memory and on disk.

    The folder holds ``settings.json``, what an unfinished build must share with the one that resumes it;
    ``pixels``, the images to keep; ``state.npz``, the rest; and a lock.

    Attributes:
        folder: Removed when the build is finished.
        position: How many of the wanted images are done.
        digest: sha256 chained over the digests of all images that were read, 32 bytes.
        bad: Why images were left out, by their place in the source.
        moments: Running mean and covariance by layer.
    """

    def __init__(
        self,
        out: Place,
        settings: Mapping[str, Any],
        wanted: NDArray[np.int64],
        shape: tuple[int, int, int, int],
        moments: Mapping[str, Moments],
    ) -> None:
        """Open the folder of a build, or make it.

        Args:
            out: The file that is built. The folder is beside it; of a URL, in the cache folder.
            settings: What decides the content, as JSON.
            wanted: Indices of the images to read, in this order.
            shape: ``(n, size, size, 3)`` of the images to keep.
            moments: Empty, one for each layer; filled from what was done before.

        Raises:
            InputError: The folder holds a build with other settings, or is damaged.
            OutputError: There is too little space, or another process is at work there.
        """
        local = working_path(out)
        self.folder = local.with_name(f"{local.name}.building")
        self.position = 0
        self.digest = hashlib.sha256(FORMAT.encode()).digest()
        self.bad: dict[int, str] = {}
        self.moments = moments
        self._wanted = wanted
        # Checksums of the pixels by slot: days may pass before they are read again.
        self._checksums = np.zeros(shape[0], np.uint32)
        self._saved = time.monotonic()
        self._check_settings(settings)
        if not self._state.exists():
            check_free_space(
                local.parent,
                2 * math.prod(shape) + 2**28,
                f"Building {out}",
                "Free some space, keep fewer images or name an output elsewhere.",
            )
        self.folder.mkdir(exist_ok=True)
        self._lock = ExitStack()
        self._lock.enter_context(exclusive_lock(self.folder / "lock", f"building {out}"))
        try:
            with replace_atomically(self._settings) as partial:
                partial.write_text(json.dumps(settings, indent=1))
            self._pixels = self._restore(shape)
        except BaseException:
            self.close()
            raise

    @property
    def _settings(self) -> Path:
        return self.folder / "settings.json"

    @property
    def _state(self) -> Path:
        return self.folder / "state.npz"

    def close(self) -> None:
        """Free the lock, so that another process can resume the build."""
        self._lock.close()

    def remove(self) -> None:
        """Remove the folder, because the build is finished."""
        shutil.rmtree(self.folder)

    def put(self, slot: int, pixels: Pixels) -> None:
        """Keep an image, (size, size, 3), under its number in the result."""
        self._pixels[slot] = pixels
        self._checksums[slot] = zlib.crc32(self._pixels[slot])

    def take(self, slots: Sequence[int]) -> Pixels:
        """The images that were kept under these numbers, (n, size, size, 3).

        Raises:
            InputError: They are not as they were.
        """
        pixels = self._pixels[list(slots)]
        if any(zlib.crc32(image) != self._checksums[slot] for image, slot in zip(pixels, slots, strict=True)):
            raise self._damaged(self.folder / "pixels", "they are not as they were written")
        return pixels

    def save_if_due(self) -> None:
        """Save what has been done, if half a minute has passed since that was done."""
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Save what has been done, pixels first."""
        self._pixels.flush()
        arrays: dict[str, Any] = {
            "position": np.array(self.position),
            "digest": np.frombuffer(self.digest, np.uint8),
            "bad": np.array(json.dumps(sorted(self.bad.items()))),
            "checksums": self._checksums,
        }
        for layer, moments in self.moments.items():
            arrays |= {f"{layer}_{key}": value for key, value in moments.state().items()}
        with replace_atomically(self._state) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)
        self._saved = time.monotonic()

    def _restore(self, shape: tuple[int, int, int, int]) -> np.memmap[Any, np.dtype[np.uint8]]:
        """Read what was done before, if anything was; the result is the pixels, mapped."""
        pixels = self.folder / "pixels"
        if self._state.exists():
            try:
                self._load()
            except Exception as error:  # NumPy parses headers as Python source, and lets any error out
                raise self._damaged(self._state, f"{type(error).__name__}: {error}") from error
            if not pixels.exists() or pixels.stat().st_size != math.prod(shape):
                raise self._damaged(pixels, "it has another size")
        return np.memmap(pixels, np.uint8, "r+" if pixels.exists() else "w+", shape=shape)

    def _load(self) -> None:
        with self._state.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            self.position = int(arrays["position"])
            self.digest = arrays["digest"].tobytes()
            self.bad = dict(json.loads(str(arrays["bad"])))
            checksums = arrays["checksums"]
            done = self._wanted[: self.position].tolist()
            fits = [
                0 <= self.position <= len(self._wanted),
                len(self.digest) == len(hashlib.sha256().digest()),
                self.bad.keys() <= set(done) and all(isinstance(why, str) for why in self.bad.values()),
                (checksums.shape, checksums.dtype) == (self._checksums.shape, self._checksums.dtype),
            ]
            self._checksums = checksums
            for layer, moments in self.moments.items():
                saved = {key: arrays[f"{layer}_{key}"] for key in moments.state()}
                fits += [
                    all(saved[key].shape == value.shape for key, value in moments.state().items()),
                    all(np.isfinite(value).all() for value in saved.values()),
                ]
                moments.restore(saved)
                fits.append(moments.n == len(done) - len(self.bad))
            if not all(fits):
                raise ValueError("its values contradict each other")

    def _check_settings(self, now: Mapping[str, Any]) -> None:
        if not self._settings.exists():
            return
        try:
            before = dict(json.loads(self._settings.read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise self._damaged(self._settings, f"{type(error).__name__}: {error}") from error
        if changed := differences(before, json.loads(json.dumps(now))):
            raise InputError(
                f"{self.folder} holds an unfinished build with other settings: {'; '.join(changed)}. "
                "Delete that folder to start again, repeat that build to finish it, or name another output."
            )

    def _damaged(self, file: Path, why: str) -> InputError:
        return InputError(f"{file} is damaged ({why[:200]}). Delete the folder {self.folder} to start again.")
