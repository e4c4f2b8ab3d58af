"""Execution settings in one argument: device, store, progress and engine."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

from evalkit.errors import InputError
from evalkit.system.engine import Engine, Inline
from evalkit.system.files import cache_directory, expand_user, versions
from evalkit.system.progress import Progress

__all__ = ["Run", "library_versions"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """Execution settings. They do not change scores, except by rounding on a GPU.

    Attributes:
        device: Device of default networks and of distance computations: ``auto``, ``cpu``, ``cuda``,
            ``cuda:N`` or ``mps``.
        store: Folder in which features are cached between runs; ``"default"`` for the one in the user's cache
            (``EVALKIT_CACHE`` changes its location), None for no caching.
        progress: Called with (stage, done, total).
        engine: Runs the work, in this process or in workers.

    Raises:
        InputError: A field has the wrong type.
    """

    device: str = "auto"
    store: str | PathLike[str] | None = "default"
    progress: Progress | None = None
    engine: Engine = field(default_factory=Inline)

    def __post_init__(self) -> None:
        if self.progress is not None and not callable(self.progress):
            raise InputError(f"progress={self.progress!r}: expected a function, or None.")
        if self.store is not None and not (isinstance(self.store, str | PathLike) and os.fspath(self.store)):
            raise InputError(f"store={self.store!r}: expected a folder, or None to keep no features.")
        if isinstance(self.engine, type) or not hasattr(self.engine, "map"):
            raise InputError(f"engine={self.engine!r}: expected an engine, such as ray_engine() gives.")

    @classmethod
    def of(cls, run: Run | None, how: Mapping[str, Any]) -> Run:
        """``run`` itself, or a new one with these fields, for functions that take ``run=`` or ``store=`` etc.

        Raises:
            InputError: Both are given, or a field does not exist.
        """
        if unknown := sorted(how.keys() - {field.name for field in fields(cls)}):
            raise InputError(
                f"Unknown arguments {', '.join(unknown)}. This also takes those of evalkit.Run: "
                f"{', '.join(field.name for field in fields(cls))}."
            )
        if run is not None and not isinstance(run, Run):
            raise InputError(f"run={run!r}: expected evalkit.Run(...), or None.")
        if run is not None and how:
            raise InputError(f"Give run=, or {', '.join(sorted(how))}=, not both.")
        return cls(**how) if run is None else run

    @property
    def store_folder(self) -> Path | None:
        """The folder of the store; None if features are not cached."""
        if self.store is None:
            return None
        return cache_directory() / "features" if self.store == "default" else expand_user(self.store)

    def report(self, stage: str) -> Callable[[int, int], None]:
        """A function that reports (done, total) of a stage."""

        def report(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(stage, done, total)

        return report


def library_versions() -> dict[str, str]:
    """Versions of evalkit, Python and the numerical libraries."""
    return {
        "python": platform.python_version(),
        **versions("evalkit", "torch", "numpy", "scipy", "tensorflow"),
    }
