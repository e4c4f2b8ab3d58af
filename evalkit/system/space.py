"""Check before long work that there is enough disk space."""

from __future__ import annotations

import shutil
from pathlib import Path

from evalkit.errors import OutputError

__all__ = ["check_free_space"]


def check_free_space(folder: Path, need: float, what: str, remedy: str, *, reusable: float = 0) -> None:
    """Raise an OutputError if there is not enough disk space.

    Args:
        folder: An existing folder on the disk.
        need: Number of bytes to be written.
        what: What needs the space, for the message: ``"The feature store /a/b"``.
        remedy: What to do, as a sentence: ``"Free some space, or name another folder."``
        reusable: Bytes already on the disk that will be overwritten, or need not be written again.
    """
    free = shutil.disk_usage(folder).free + reusable
    if need > free:
        raise OutputError(
            f"{what} needs {need / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free. {remedy}"
        )
