"""A network that has trouble once: its process, or the one that gives the work, is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from patience import until
from stand_ins import InceptionPixels

__all__ = ["Troubled"]


class Troubled(InceptionPixels):
    """Notes in a folder how many images each process was given.

    Args:
        log: The folder.
        victim: What is killed once, as soon as the store holds something: a process id, or 0 for the one
            that extracts; None for nothing.
        store: Of the features.
        together: None extracts before so many processes are about to.
    """

    batch_size: ClassVar[int] = 16

    def __init__(
        self, log: Path, victim: int | None = None, store: Path | None = None, together: int = 1
    ) -> None:
        super().__init__()
        self.log = log
        self.victim = victim
        self.store = store
        self.together = together

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        own, trouble = self.log / str(os.getpid()), self.log / "trouble"
        if not own.exists():
            own.touch()
            until(lambda: len([*self.log.glob("[0-9]*")]) >= self.together)
        if self.victim is not None and self.store is not None and any(self.store.glob("*/*.h5")):
            try:
                trouble.touch(exist_ok=False)
            except FileExistsError:  # it was
                pass
            else:
                os.kill(self.victim or os.getpid(), signal.SIGKILL)
                until(lambda: False)  # this process ends with the other
        with own.open("a") as file:
            file.write(f"{len(images)}\n")
        return super().__call__(images)

    def seen(self) -> dict[int, int]:
        """Images by process."""
        return {int(path.name): sum(map(int, path.read_text().split())) for path in self.log.glob("[0-9]*")}
