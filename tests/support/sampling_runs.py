"""Runs of small networks, whose bytes the tests compare."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import small_networks
import torch
from numpy.typing import NDArray

from generation import sample as sampling
from generation.batch import Networks
from generation.settings import Settings

Messages = Callable[[], list[str]]
"""Returns what was logged so far."""

SETTINGS = Settings(count=7, scale=30.0, respacing="4", shard_size=3)


def load(files: dict[str, Path], model: str = "unet", classifier: str | None = "classifier") -> Networks:
    """Networks of the files of these names; see :func:`small_networks.load`."""
    return small_networks.load(files[model], files[classifier] if classifier else None)


def sampled(settings: Settings, networks: Networks, out: Path, **options: Any) -> Path:
    """A run; its npz."""
    return sampling.run(settings, networks, out, **options)


def images_of(path: Path) -> NDArray[np.int16]:
    """The samples of a run, in a type whose differences have signs."""
    with np.load(path) as file:
        return file["arr_0"].astype(np.int16)


def interrupting(times: int, at: float) -> Callable[[str, int, int], None]:
    """Progress that presses Ctrl-C, once ``at`` samples are done."""
    pressed: list[bool] = []

    def progress(stage: str, done: int, total: int) -> None:
        if done >= at and not pressed:
            pressed.append(True)
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    return progress


def with_prediction(networks: Networks, change: Callable[[torch.Tensor], torch.Tensor]) -> Networks:
    """Networks whose predictions are changed on their way."""
    return replace(networks, predict=Changed(networks.predict, change))


class Changed:
    def __init__(self, original: Any, change: Callable[[torch.Tensor], torch.Tensor]):
        self.original, self.change, self.description = original, change, original.description

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.change(self.original(x, *args, **kwargs))
