"""One model at many guidance scales: the same noise and classes at each, shared networks, one table.

::

    runs/s/scale-0.0/samples_5000x32x32x3.npz   the samples of each scale, a run as of `evalkit sample`
    runs/s/scale-0.0/comparison.json            and how good they are
    runs/s/results.json, results.csv            all of them, written anew after each scale
    runs/s/samples.png                          a row a scale, the same noise along a column

Sampling goes on where it was interrupted, features come from the store, and a comparison that was made of the
same samples, reference, protocol and network is not made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from evalkit.comparison import Source, compare, open_source
from evalkit.errors import InputError, OutputError
from evalkit.features import Extractor
from evalkit.features import Progress as FeaturesProgress
from evalkit.images import open_images
from evalkit.metrics import PROTOCOLS
from evalkit.report.image_grid import write_sheet
from evalkit.results import Comparison, Sweep
from evalkit.system.differences import differences
from evalkit.system.files import replace_atomically
from generation.batch import Networks
from generation.sample import Progress, Say, rank_of_worker, run
from generation.settings import Settings

__all__ = ["sweep"]

COLUMNS = 16


def sweep(
    settings: Settings,
    scales: Sequence[float],
    networks: Networks,
    reference: Source,
    out: Path,
    *,
    extractor: Extractor,
    name: str | None = None,
    protocol: str = "adm",
    batch_size: int | None = None,
    sampling: Callable[[float], Progress | None] = lambda _: None,
    comparing: FeaturesProgress | None = None,
    say: Say = print,
) -> Sweep | None:
    """Sample at every scale and compare each with the reference.

    Args:
        settings: What to sample; its own scale is not used.
        scales: Guidance scales, in any order.
        networks: With a classifier, unless 0 is the only scale.
        reference: As :func:`evalkit.comparison.compare` takes it.
        out: The sweep's folder; its parent must be there.
        extractor: The Inception network.
        name: What a plot calls it; the model's by default.
        protocol: See :func:`evalkit.comparison.compare`.
        batch_size: Samples at a time; None: found.
        sampling: Makes, for a scale, what is told the progress of its samples.
        comparing: Told the progress of features and metrics.
        say: Told what the user should know.

    Returns:
        All scales; None on a worker of torchrun other than the first, which helps with the samples alone.

    Raises:
        EvalkitError: As :func:`generation.sample.run` and :func:`evalkit.comparison.compare`.
        InputError: No scales, or one twice.
    """
    if not scales or len(set(scales)) != len(scales):
        raise InputError(
            f"Scales {', '.join(map(repr, scales)) or '(none)'}: expected each once, at least one."
        )
    if settings.count < 2:
        raise InputError(f"{settings.count} sample a scale: metrics are of at least 2, better 5,000.")
    if protocol not in PROTOCOLS:
        raise InputError(f"Unknown protocol {protocol!r}. Give one of {', '.join(PROTOCOLS)}.")
    steps = [replace(settings, scale=scale) for scale in sorted(scales)]  # every value is checked now
    if settings.classes is not None and networks.num_classes(guided=False) is None:
        # Without guidance an unconditional model has no classes; the other scales have the classifier's.
        steps = [step if step.scale else replace(step, classes=None) for step in steps]
        if 0 in scales and rank_of_worker() == 0:
            say(
                f"At scale 0, {networks.diffusion.preset.name} has no classes: --classes {settings.classes} "
                "is for the other scales."
            )
    reference = open_source(reference)
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot make the folder {out}: {error.strerror}.") from error

    common = {key: value for key, value in asdict(settings).items() if key != "scale"}
    left_out = _check_before(out / "results.json", common) - set(scales)
    if left_out and rank_of_worker() == 0:
        others = ", ".join(f"{scale:g}" for scale in sorted(left_out))
        say(
            f"{out} also has results of scale {others}. They stay in their folders, and are in results.json "
            "again when those scales are asked for as well."
        )

    points: list[tuple[float, Comparison]] = []
    files: list[Path] = []
    for step in steps:
        folder = out / f"scale-{step.scale!r}"
        file = run(step, networks, folder, batch_size=batch_size, progress=sampling(step.scale), say=say)
        if rank_of_worker() != 0:
            continue
        comparison = _compared(
            folder / "comparison.json", reference, file, protocol, extractor, comparing, say
        )
        files.append(file)
        points.append((step.scale, comparison))
        say(f"scale {step.scale:g}: {', '.join(f'{s.name} {s.value:.4f}' for s in comparison.scores)}")
        result = Sweep(
            name=name or networks.diffusion.preset.name,
            points=tuple(points),
            settings=common,
        )
        for path, text in (("results.json", result.to_json()), ("results.csv", result.to_csv())):
            with replace_atomically(out / path) as partial:
                partial.write_bytes(text.encode("utf-8", "surrogateescape"))
    if not points:
        return None
    _draw_samples(out / "samples.png", [scale for scale, _ in points], files)
    return result


def _check_before(results: Path, settings: dict[str, Any]) -> set[float]:
    """The scales of the results that are there; a folder holds samples of one kind, whatever the scales."""
    if not results.is_file():
        return set()
    try:
        before = Sweep.from_json(results.read_bytes())
    except InputError as error:
        raise InputError(f"{results}: {error} Remove it, or give another folder.") from error
    if changed := differences(before.settings, json.loads(json.dumps(settings))):
        raise InputError(
            f"{results.parent} holds a sweep with other settings: {'; '.join(changed)}. "
            "Give the same settings to go on with it, or another folder."
        )
    return {scale for scale, _ in before.points}


def _compared(
    record: Path,
    reference: Source,
    samples: Path,
    protocol: str,
    extractor: Extractor,
    progress: FeaturesProgress | None,
    say: Say,
) -> Comparison:
    """The comparison that was recorded, if it is of these very things, or a new one."""
    if record.is_file():
        try:
            found = Comparison.from_json(record.read_bytes())
        except InputError:
            found = None
        if found and (
            found.protocol,
            found.extractor["fingerprint"],
            found.reference.digest,
            found.reference.statistics_digest,
            found.samples.digest,
        ) == (protocol, extractor.fingerprint, *_digests(reference), _digests(samples)[0]):
            return found
        if found and (found.reference.digest, found.reference.statistics_digest) != _digests(reference):
            say(f"{record.parent} was compared with {found.reference.name}; this takes the place of it.")
    comparison = compare(reference, samples, protocol=protocol, extractor=extractor, progress=progress)
    with replace_atomically(record) as partial:
        partial.write_text(comparison.to_json())
    return comparison


def _digests(source: Source) -> tuple[str, str | None]:
    """Of the images, and of the statistics that stand in for theirs."""
    opened = open_source(source)
    return opened.digest, opened.statistics_digest


def _draw_samples(path: Path, scales: Sequence[float], files: Sequence[Path]) -> None:
    rows = []
    for file in files:
        with closing(open_images(file).batches(COLUMNS)) as batches:
            rows.append(next(batches))
    write_sheet(path, np.concatenate(rows), len(rows[0]), [f"{scale:g}" for scale in scales])
