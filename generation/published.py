"""Published checkpoints on this machine: where they are kept, and their download."""

from __future__ import annotations

from pathlib import Path

from evalkit.system.download import download, published_urls
from evalkit.system.files import cache_directory
from evalkit.system.progress import Progress
from generation.checkpoints import check_layout
from generation.presets import ModelPreset
from generation.state_dicts import read_state_dict

__all__ = ["cached", "fetch"]


def cached(preset: ModelPreset) -> Path:
    """Where :func:`fetch` puts a published checkpoint; the file may not exist."""
    return cache_directory() / "checkpoints" / preset.file


def fetch(preset: ModelPreset, *, progress: Progress | None = None) -> Path:
    """Download a published checkpoint to :func:`cached`, unless it is there; resumes what was interrupted.

    No digest of these files was published: the download must have the published keys and shapes.

    Args:
        preset: One of ``MODELS``.
        progress: Called with (name of the file, bytes done, bytes in all).

    Raises:
        DownloadError: No address gave the file, or it is not the checkpoint.
        OutputError: The file cannot be written, or there is not enough disk space.
    """

    def check(path: Path) -> None:
        check_layout(read_state_dict(path), preset)

    # Four bytes a parameter, and little else.
    most = 5 * preset.parameters
    urls = published_urls(preset.file)
    return download(urls, cached(preset), max_bytes=most, check=check, progress=progress).path
