"""The published reference and sample batches.

The content is ``catalog.toml``; here it becomes frozen objects::

    entry = find("imagenet256")  # a reference: 10,000 images, and the statistics of the training set
    entry.urls, entry.images, entry.size
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from evalkit.errors import InputError, did_you_mean, nearest
from evalkit.layouts import LAYOUTS, SHAPES
from evalkit.results import PublishedRow
from evalkit.system.download import published_urls
from reference_batches.published import SCORES, all_rows
from reference_batches.statistics import StatisticsFile, statistics_files

__all__ = ["Entry", "closest", "entries", "find", "published_files", "rows_against", "table"]

FILE = Path(__file__).with_name("catalog.toml")
# Of a batch that was published with the ADM paper, its evaluator's scores.
ADM_SCORES = tuple(spec for spec in SCORES if spec.name != "fd_dinov2")
# In float64.
STATISTICS_BYTES = 8 * sum(math.prod(SHAPES[key]) for key in LAYOUTS["adm"].keys)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One published batch.

    Attributes:
        name: Its name in evalkit: that of the dataset for its reference, that of the file for samples.
        dataset: For example ``imagenet256``.
        kind: ``reference``, which also holds the statistics of the full training set, or ``samples``.
        images: How many images the file holds.
        size: Height and width of each in pixels.
        labels: Whether the file holds each image's class.
        path: The file's path within the published folder.
        published: The paper's numbers for these samples, if they certainly belong to this file.
        exact: The scores that the reference evaluator prints for the file, by name, if known.
        users: The repositories that measure against it, or publish it.
    """

    name: str
    dataset: str
    kind: Literal["reference", "samples"]
    images: int
    size: int
    labels: bool
    path: str
    published: PublishedRow | None = None
    exact: Mapping[str, float] = field(default_factory=dict)
    users: str = "openai/guided-diffusion"

    @property
    def file(self) -> str:
        """The file's name."""
        return PurePosixPath(self.path).name

    @property
    def urls(self) -> tuple[str, ...]:
        """Addresses of the file, best first; ``EVALKIT_MIRROR`` comes before the published place."""
        return published_urls(self.path)

    @property
    def approximate_bytes(self) -> int:
        """Size of the file's arrays, which are published uncompressed."""
        statistics = STATISTICS_BYTES if self.kind == "reference" else 0
        return self.images * (3 * self.size**2 + 8 * self.labels) + statistics

    @property
    def max_bytes(self) -> int:
        """A larger file is refused."""
        return 2 * self.approximate_bytes


def entries(dataset: str | None = None) -> dict[str, Entry]:
    """Published batches, all or those of one dataset, by name: each dataset's reference, then its samples.

    Raises:
        InputError: There is no such dataset.
    """
    catalog = _read()
    known = catalog["datasets"]
    if dataset is not None and dataset not in known:
        raise InputError(
            f"No batch was published of a dataset {dataset!r}; expected {', '.join(known)}."
            f"{did_you_mean(dataset, known)}"
        )
    return {entry.name: entry for entry in _entries(catalog) if dataset in (None, entry.dataset)}


def published_files(dataset: str | None = None) -> dict[str, Entry | StatisticsFile]:
    """Batches, then the files of other tools, all or those of one dataset, by name.

    Raises:
        InputError: There is neither of that dataset.
    """
    others = statistics_files(dataset)
    try:
        return {**entries(dataset), **others}
    except InputError:
        if not others:
            raise
        return {**others}


def rows_against(batch: Entry | StatisticsFile) -> tuple[PublishedRow, ...]:
    """Published rows to show next to a comparison whose reference is a published file.

    For an ADM reference batch, these are the rows on its dataset. For another tool's statistics, they are the
    rows measured against the same file, which have its evalkit name as their reference.
    """
    of_dataset = [row for row in all_rows() if row.dataset == batch.dataset]
    if isinstance(batch, StatisticsFile):
        same = [row for row in of_dataset if PurePosixPath(row.reference or "").name == batch.file]
        return tuple(replace(row, reference=batch.name) for row in same)
    return tuple(of_dataset) if batch.kind == "reference" else ()


def find(name: str) -> Entry:
    """The published batch of that name.

    Raises:
        InputError: There is none; the message names the closest.
    """
    known = entries()
    if name not in known:
        close = ", ".join(closest(name)) or ", ".join(known)
        raise InputError(
            f"There is no published batch {name!r}; expected one of those that `evalkit reference list` "
            f"shows, such as {close}."
        )
    return known[name]


def closest(text: str) -> list[str]:
    """Names of published batches that someone who wrote ``text`` may have meant, by name or by file."""
    by_spelling: dict[str, str] = {}
    for entry in published_files().values():
        by_spelling |= {entry.name: entry.name, entry.file: entry.name}
    found = nearest(PurePosixPath(text).name, by_spelling, cutoff=0.75)
    return list(dict.fromkeys(by_spelling[spelling] for spelling in found))


def table(batches: Iterable[Entry], here: Container[str]) -> str:
    """A table for the terminal, one line a batch; ``here`` has the names of those already downloaded."""
    head = f"{'name':<36} {'dataset':<12} {'kind':<9} {'images':>6} {'size':>7} labels {'GB':>5}"
    lines = [f"{head} {'FID':>6} {'sFID':>6} {'IS':>7} {'prec.':>6} {'recall':>6} here"]
    for entry in batches:
        scores = {} if entry.published is None else entry.published.scores
        fid, sfid, inception_score, precision, recall = (
            spec.format(scores[spec.name]) if spec.name in scores else "-" for spec in ADM_SCORES
        )
        lines.append(
            f"{entry.name:<36} {entry.dataset:<12} {entry.kind:<9} {entry.images:>6,} "
            f"{f'{entry.size}x{entry.size}':>7} {'yes' if entry.labels else 'no':<6} "
            f"{entry.approximate_bytes / 1e9:>5.2f} {fid:>6} {sfid:>6} {inception_score:>7} {precision:>6} "
            f"{recall:>6} {'yes' if entry.name in here else 'no'}"
        )
    return "\n".join(lines)


def _read() -> dict[str, Any]:
    return tomllib.loads(FILE.read_text())


def _entries(catalog: dict[str, Any]) -> Iterator[Entry]:
    row_of = {row.batch: row for row in all_rows()}
    for dataset, content in catalog["datasets"].items():
        common = {"dataset": dataset, "size": content["size"]}
        folder = f"{catalog['folder']}/{content['folder']}"
        yield Entry(
            name=dataset,
            kind="reference",
            images=catalog["reference_images"],
            labels=content.get("reference_labels", content["labels"]),
            path=f"{folder}/{content['reference']}",
            users=", ".join(["openai/guided-diffusion", *content.get("users", [])]),
            **common,
        )
        for file in content["samples"]:
            name = PurePosixPath(file).stem
            yield Entry(
                name=name,
                kind="samples",
                images=catalog["sample_images"],
                labels=content["labels"],
                path=f"{folder}/{file}",
                published=row_of.get(name),
                exact=catalog["exact"].get(name, {}),
                **common,
            )
