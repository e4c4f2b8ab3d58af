"""One model at many guidance scales: the same noise and classes at each, shared networks, one table.

::

    runs/s/scale-0.0/samples_5000x32x32x3.npz   the samples of each scale, a run as of `evalkit sample`
    runs/s/scale-0.0/comparison.json            how good they are
    runs/s/scale-0.0/deviations.npz             and how each score deviates with each image
    runs/s/results.json, results.csv            all of them, written anew after each scale
    runs/s/samples.png                          an image grid: one row per scale, same noise in each column

Sampling resumes where it was interrupted, features come from the store, and a comparison of the same samples,
reference, protocol and network is not made again. The deviations tell which scales differ, also those of an
earlier run. A comparison without them, as earlier versions left it, is made again.

One list holds the batches of all scales, so that no worker waits between two scales. A scale is compared as
soon as no worker is busy with samples. In this process that is before the next scale begins, so the first
results come early; on a cluster it is after the last one, so that workers neither wait for a comparison nor
change their work for it and back.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from evalkit.comparison import Measured, Source, measure, open_source
from evalkit.comparison.pairs import pairs_of_sets
from evalkit.comparison.plan import Choice, choose_metrics
from evalkit.comparison.saved import load_deviations, save_deviations
from evalkit.comparison.sources import Opened
from evalkit.errors import InputError, OutputError
from evalkit.extractors.base import Extractor
from evalkit.images import ImageSource, open_images
from evalkit.metrics.base import Metric
from evalkit.report.image_grid import write_grid
from evalkit.results import Comparison, Point, Sweep
from evalkit.system.devices import prepare_forked_process
from evalkit.system.differences import differences
from evalkit.system.engine import Engine, Inline
from evalkit.system.files import replace_atomically
from evalkit.system.locks import exclusive_lock
from evalkit.system.progress import Progress
from evalkit.system.run import Run
from generation.batch import Networks
from generation.sample import run_all
from generation.settings import Settings
from generation.shards import FORMAT

__all__ = ["sweep"]

COLUMNS = 16

logger = logging.getLogger(__name__)


def sweep(
    settings: Settings,
    scales: Sequence[float],
    networks: Networks,
    reference: Source,
    out: Path,
    *,
    extractor: Extractor | Sequence[Extractor],
    name: str | None = None,
    protocol: str = "adm",
    metrics: Collection[str | Metric] | str | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> Sweep:
    """Sample at every scale and compare each with the reference.

    Args:
        settings: What to sample; its scale is not used.
        scales: Guidance scales, in any order.
        networks: With a classifier, unless 0 is the only scale.
        reference: As :func:`evalkit.comparison.compare` takes it.
        out: The sweep's folder; its parent must exist.
        extractor: The network, or one for each that the metrics need.
        name: Name of the curve in plots; by default the model's.
        protocol: See :func:`evalkit.comparison.compare`.
        metrics: Likewise.
        batch_size: Samples at a time; None: as many as the device's memory takes.
        progress: Called with (stage, done, total) while sampling, the samples of all scales, and comparing.
        engine: Who makes samples and features; None: this process.

    Returns:
        All scales, and which of them differ.

    Raises:
        EvalkitError: As :func:`generation.sample.run` and :func:`evalkit.comparison.compare`.
        InputError: No scales, or one twice.
    """
    if not scales or len(set(scales)) != len(scales):
        raise InputError(
            f"Scales {', '.join(map(repr, scales)) or '(none)'}: expected each once, at least one."
        )
    if settings.count < 2:
        raise InputError(
            f"{settings.count} sample a scale; metrics need at least 2. Give 5,000 or more for good ones."
        )
    prepare_forked_process()
    choice = choose_metrics(protocol, metrics)
    extractors = list(extractor) if isinstance(extractor, Sequence) else [extractor]
    steps = [replace(settings, scale=scale) for scale in sorted(scales)]  # every value is checked now
    if settings.classes is not None and networks.num_classes(guided=False) is None:
        # Without guidance an unconditional model has no classes; the other scales have the classifier's.
        steps = [step if step.scale else replace(step, classes=None) for step in steps]
        if 0 in scales:
            logger.info(
                "At scale 0, %s has no classes: --classes %s is for the other scales.",
                networks.diffusion.preset.name,
                settings.classes,
            )
    reference = open_source(reference)
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot make the folder {out}: {error.strerror}.") from error

    common = {"format": FORMAT} | settings.record()
    del common["scale"]
    left_out = _check_before(out / "results.json", common) - set(scales)
    if left_out:
        others = ", ".join(f"{scale:g}" for scale in sorted(left_out))
        logger.info(
            "%s also has results of scale %s. They stay in their folders; to have them in results.json as "
            "well, give those scales too.",
            out,
            others,
        )

    runs = [(step, out / f"scale-{step.scale!r}") for step in steps]
    measured: dict[float, Measured] = {}
    images: dict[float, ImageSource] = {}
    with ExitStack() as stack:
        stack.enter_context(exclusive_lock(out / "lock", f"sweeping into {out}"))
        how = Run(progress=progress, engine=engine or Inline())
        sampled = run_all(runs, networks, batch_size=batch_size, progress=progress, engine=how.engine)
        for number, file in stack.enter_context(closing(sampled)):
            folder, scale = runs[number][1], steps[number].scale
            images[scale] = open_images(file)
            measured[scale] = _measured(folder, reference, images[scale], choice, extractors, how)
            scores = measured[scale].comparison.scores
            logger.info("scale %g: %s", scale, ", ".join(f"{each.name} {each.value:.4f}" for each in scores))
            order = sorted(measured)
            result = Sweep(
                name=name or networks.diffusion.preset.name,
                points=tuple(Point(scale=each, comparison=measured[each].comparison) for each in order),
                settings=common,
                pairs=pairs_of_sets([measured[each] for each in order], [images[each] for each in order]),
            )
            for path, text in (("results.json", result.to_json()), ("results.csv", result.to_csv())):
                with replace_atomically(out / path) as partial:
                    partial.write_bytes(text.encode("utf-8", "surrogateescape"))
        _draw_samples(out / "samples.png", images)
    return result


def _check_before(results: Path, settings: dict[str, Any]) -> set[float]:
    """The scales of existing results; raises an InputError if they were made with other settings."""
    if not results.is_file():
        return set()
    try:
        before = Sweep.from_json(results.read_bytes())
    except InputError as error:
        raise InputError(f"{results}: {error} Remove it, or give another folder.") from error
    if before.settings.get("format") != FORMAT:
        raise InputError(
            f"{results.parent} holds a sweep that another version of evalkit began. Finish it with that "
            "version, or give another folder."
        )
    if changed := differences(before.settings, json.loads(json.dumps(settings))):
        raise InputError(
            f"{results.parent} holds a sweep with other settings: {'; '.join(changed)}. "
            "Give the same settings to resume it, or another folder."
        )
    return {point.scale for point in before.points}


def _measured(
    folder: Path,
    reference: Opened,
    samples: ImageSource,
    choice: Choice,
    extractors: Sequence[Extractor],
    how: Run,
) -> Measured:
    """The recorded comparison, if reference, samples, metrics and networks are the same, or a new one."""
    record, deviations = folder / "comparison.json", folder / "deviations.npz"
    if record.is_file():
        text = record.read_bytes()
        of_reference = reference.digest, reference.statistics_digest
        try:
            found = Comparison.from_json(text)
        except InputError:
            found = None
        if found and (
            found.protocol,
            found.specs,
            {network: record["fingerprint"] for network, record in found.extractors.items()},
            found.reference.digest,
            found.reference.statistics_digest,
            found.samples.digest,
            found.byte_rules,  # records of earlier formats have none
        ) == (
            choice.protocol.name,
            choice.specs,
            {extractor.network: extractor.fingerprint for extractor in extractors},
            *of_reference,
            samples.digest,
            choice.byte_rules,
        ):
            loaded = load_deviations(deviations, text)
            if loaded is not None:
                return Measured(comparison=found, deviations=loaded)
            logger.info("%s has no deviations of this comparison, so that it is made again.", folder)
        elif found and (found.reference.digest, found.reference.statistics_digest) != of_reference:
            logger.info("%s was compared with %s before; this replaces it.", folder, found.reference.name)
    (measured,) = measure([reference, samples], choice, extractor=extractors, run=how)
    text = measured.comparison.to_json().encode()
    # The record comes last: once it is there, all of the comparison is.
    save_deviations(deviations, measured.deviations, text)
    with replace_atomically(record) as partial:
        partial.write_bytes(text)
    return measured


def _draw_samples(path: Path, images: Mapping[float, ImageSource]) -> None:
    rows = []
    for _, each in sorted(images.items()):
        with closing(each.batches(COLUMNS)) as batches:
            rows.append(next(batches))
    scales = [f"{scale:g}" for scale in sorted(images)]
    write_grid(
        path,
        np.concatenate(rows),
        len(rows[0]),
        scales,
        title="Samples at each guidance scale",
        description=f"The first {len(rows[0]):,} samples of the sweep {path.resolve().parent.name}; "
        f"a row for each of the guidance scales {', '.join(scales)}.",
    )
