"""Error bars against what really happens: disjoint sets of CIFAR-10, genuine Inception features.

    python benchmarks/error_bars.py DATA FEATURES            # DATA/cifar10_jpeg.npz; features go to FEATURES
    python benchmarks/error_bars.py DATA FEATURES --plan     # what it would do, and for how long
    python benchmarks/error_bars.py DATA FEATURES --quick    # a minute, few images, numbers of no use
    python benchmarks/error_bars.py DATA FEATURES --only kid    # one part, to run several at once
    python benchmarks/error_bars.py DATA FEATURES --figure error-bars.png    # that of docs/error-bars.md

The 50,000 training images are divided at random into disjoint sets, so each score has as many values as there
are sets. Their standard deviation is the true error, which the error bars must meet. It is averaged over
several divisions of the same images. The reference is one of

- given: the 10,000 test images (nearly equal), or those of the six kinds of animals (clearly different), as
  they are: then the error is that of sampling alone;
- drawn: for every set another one of the same size, also of training images: then it is that of both.

A 95 % interval is around the unbiased value. With a given reference, it is to cover the unbiased value of all
training images, and is made shorter for that: these contain the set. With one drawn, it is to cover 0.

Features are extracted once, 512 images at a time, and an interrupted run goes on.
"""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from inception_graphdef import standin_head
from stand_ins import batch

from evalkit.comparison import features_of
from evalkit.extractors.inception import Inception
from evalkit.features.moments import Moments
from evalkit.features.record import Features
from evalkit.metrics import frechet_estimate
from evalkit.metrics.frechet import FID
from evalkit.metrics.halves import halves_of_precision_recall
from evalkit.metrics.inception_score import inception_influence, inception_score
from evalkit.metrics.kernel import kernel_means
from evalkit.metrics.precision_recall import precision_recall
from evalkit.pairs import Difference
from evalkit.system.run import Run
from evalkit.uncertainty import difference

Rows = NDArray[np.float32]

ANIMALS = (2, 3, 4, 5, 6, 7)
BLURRED = 0.01
IMAGES_PER_SECOND = 30
FULL = 2048
FIGURE = (2_500, 5_000, 10_000, 25_000)
"""Images in the sets of the figure."""
WIDTHS = 2048 + 2023


class Slow(NamedTuple):
    """A case of a score that takes long.

    Attributes:
        reference: Which.
        sets: Images in a set.
        divisions: Times that the training images are divided.
        images: The first so many of a given reference; None for all of it.
    """

    reference: str
    sets: tuple[int, ...]
    divisions: int
    images: int | None = None


class Sizes(NamedTuple):
    """How much is measured.

    Attributes:
        train: Training images.
        test: Test images.
        sets: Images in a set.
        widths: Principal components; 2048 stands for all features as they are.
        divisions: Times that the images are divided, by width.
        kid: Cases of KID.
        neighbours: Cases of precision and recall.
    """

    train: int = 50_000
    test: int = 10_000
    sets: tuple[int, ...] = (2_500, 5_000, 10_000)
    widths: tuple[int, ...] = (64, 256, FULL)
    divisions: Mapping[int, int] = {64: 20, 256: 8, FULL: 1}
    kid: tuple[Slow, ...] = (
        Slow("given, clearly different", (2_500,), 1, 2_500),
        Slow("drawn", (2_500,), 2),
        Slow("given, nearly equal", (2_500,), 1, 2_500),
    )
    neighbours: tuple[Slow, ...] = (
        Slow("given, clearly different", (2_500, 5_000), 2),
        Slow("drawn", (2_500,), 4),
    )


QUICK = Sizes(
    train=480,
    test=160,
    sets=(60, 120),
    widths=(8, 16),
    divisions={8: 6, 16: 3},
    kid=(Slow("given, clearly different", (60,), 1, 60), Slow("drawn", (60,), 2)),
    neighbours=(Slow("given, clearly different", (60, 120), 2), Slow("drawn", (60,), 4)),
)


class Estimate(NamedTuple):
    """A score of one set, with the error that is compared with the truth."""

    value: float
    stderr: float
    unbiased: float | None = None


Score = Callable[[Rows, Rows], Mapping[str, Estimate]]
"""Called on (reference, samples): the scores by name."""


# Images and features ---------------------------------------------------------------------------------------


def images_of(data: Path, sizes: Sizes) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """(n, 32, 32, 3) images and classes: ``train``, ``test``, and ``blurred``, some of ``train``."""
    with np.load(data / "cifar10_jpeg.npz", allow_pickle=False) as file:
        jpeg, offsets = file["jpeg"], file["offsets"]
        labels, is_test = file["labels"].astype(np.int64), file["is_test"]

    def decode(i: int) -> NDArray[np.uint8]:
        return np.asarray(Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes())))

    found = {}
    for name, split, count in (("train", ~is_test, sizes.train), ("test", is_test, sizes.test)):
        indices = np.flatnonzero(split)
        chosen = indices[np.random.RandomState(0).permutation(len(indices))[:count]]
        found[name] = np.stack([decode(i) for i in chosen]), labels[chosen]
    train, classes = found["train"]
    count = max(2, round(BLURRED * len(train)))
    blurred = [
        np.asarray(Image.fromarray(each).filter(ImageFilter.GaussianBlur(1.0))) for each in train[:count]
    ]
    return found | {"blurred": (np.stack(blurred), classes[:count])}


def features_file(folder: Path, name: str, count: int, precision: str) -> Path:
    """Where the features of some images are kept."""
    return folder / f"{name}_{count}_{precision}.h5"


def extract(
    data: Path, folder: Path, sizes: Sizes, precision: str
) -> tuple[dict[str, Rows], dict[str, NDArray[np.int64]]]:
    """Features and classes by name, from the folder or from the network: ``train``, ``train spatial``, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, classes = {}, {}
    for name, (images, labels) in images_of(data, sizes).items():
        path = features_file(folder, name, len(images), precision)
        if not path.exists():
            begin = time.perf_counter()
            network = Inception(precision=precision)
            found = features_of(
                images, outputs=("pool", "spatial"), extractor=network, store=folder / "store"
            )
            found.save(path)
            print(f"{name}: {len(images):,} images in {time.perf_counter() - begin:.0f} s", flush=True)
        arrays = Features.load(path).arrays
        rows[name], rows[f"{name} spatial"], classes[name] = arrays["pool"], arrays["spatial"], labels
    return rows, classes


# Scores ----------------------------------------------------------------------------------------------------


def frechet(reference: Rows, samples: Rows, *, drawn: bool) -> Mapping[str, Estimate]:
    given = reference if drawn else Moments.of(reference).gaussian()
    found = frechet_estimate(given, samples)
    return {"FD": Estimate(found.value, found.stderr or math.nan, found.unbiased)}


def inception(reference: Rows, samples: Rows) -> Mapping[str, Estimate]:
    del reference
    logits = samples @ standin_head()
    value = inception_score(logits, dtype="float64").mean
    found = inception_influence(logits)
    return {
        "IS, stand-in head": Estimate(value, found.stderr, None if found.bias is None else value - found.bias)
    }


def kernel(reference: Rows, samples: Rows, *, drawn: bool) -> Mapping[str, Estimate]:
    found = kernel_means(reference, samples)
    influence = found.influence()
    stderr = influence.stderr if drawn else influence.stderr_sampling
    return {"KID": Estimate(found.value, stderr, found.value)}


def neighbours(reference: Rows, samples: Rows, *, drawn: bool) -> Mapping[str, Estimate]:
    values = precision_recall(reference, samples)
    halves = halves_of_precision_recall(reference, samples)
    return {
        name: Estimate(value, each.stderr if drawn else each.stderr_sampling)
        for name, value, each in zip(("precision", "recall"), values, halves, strict=True)
    }


# Disjoint sets ---------------------------------------------------------------------------------------------


def divided(count: int, size: int, divisions: int) -> Iterator[list[NDArray[np.int64]]]:
    """Indices of disjoint sets, for each division."""
    rng = np.random.default_rng(size)
    for _ in range(divisions):
        order = rng.permutation(count)
        yield [order[first : first + size] for first in range(0, count - size + 1, size)]


@dataclass(frozen=True)
class Case:
    """A score on sets of several sizes.

    Attributes:
        title: What the reference is.
        score: On (reference, samples).
        train: Features of the training images.
        reference: Its features; None where it is drawn.
        divisions: Times that the training images are divided.
        sets: Images in a set.
        least: Sets have more images than this.
        has_truth: Whether, for a given reference, the score of all training images is computed, which the
            intervals are to cover.
    """

    title: str
    score: Score
    train: Rows
    reference: Rows | None
    divisions: int
    sets: tuple[int, ...]
    least: int = 0
    has_truth: bool = True

    def measure(self) -> None:
        """Print a line for each size and score."""
        sizes = [size for size in self.sets if size > self.least]
        if not sizes:
            return
        whole: Mapping[str, Estimate] = {}
        if self.reference is not None and self.has_truth:
            whole = self.score(self.reference, self.train)
        for size in sizes:
            divisions = [self._division(sets) for sets in divided(len(self.train), size, self.divisions)]
            for name in divisions[0][0]:
                found = [[each[name] for each in division] for division in divisions]
                truth = 0.0 if self.reference is None else whole[name].unbiased if whole else None
                print(self._line(name, size, found, truth), flush=True)

    def _division(self, sets: list[NDArray[np.int64]]) -> list[Mapping[str, Estimate]]:
        if self.reference is not None:
            return [self.score(self.reference, self.train[chosen]) for chosen in sets]
        pairs = zip(sets[::2], sets[1::2], strict=False)
        return [self.score(self.train[a], self.train[b]) for a, b in pairs]

    def _line(self, name: str, size: int, divisions: list[list[Estimate]], truth: float | None) -> str:
        every = [each for division in divisions for each in division]
        spread = math.sqrt(np.mean([np.var([each.value for each in d], ddof=1) for d in divisions]))
        stderrs = np.array([each.stderr for each in every])
        mean = float(np.mean([each.value for each in every]))
        cells = [
            name,
            self.title,
            f"{size:,}",
            f"{len(divisions[0])} x {len(divisions)}",
            f"{mean:.4g}",
            f"{spread:.3g}",
            f"{math.sqrt(np.mean(stderrs**2)) / spread:.2f}",
        ]
        if truth is None or any(each.unbiased is None for each in every):
            return "| " + " | ".join([*cells, "", "", ""]) + " |"
        # All training images contain the set, which is nearer to them than to new ones.
        shorter = 1.0 if self.reference is None else math.sqrt(1 - size / len(self.train))
        unbiased = np.array([each.unbiased for each in every], float)
        covered = np.abs(unbiased - truth) <= 1.96 * shorter * stderrs
        cells += [f"{covered.mean():.2f}", f"{mean - truth:.3g}", f"{unbiased.mean() - truth:.2g}"]
        return "| " + " | ".join(cells) + " |"


HEADER = """
| score | reference | set | sets x divisions | mean | true error | SE / true | coverage | bias | left |
|---|---|---|---|---|---|---|---|---|---|"""


class Measured(NamedTuple):
    """What cases are made of.

    Attributes:
        rows: Features by name.
        references: Those of each kind of reference; None where it is drawn.
        sizes: How much is measured.
    """

    rows: Mapping[str, Rows]
    references: Mapping[str, Rows | None]
    sizes: Sizes


def frechet_cases(given: Measured) -> Iterator[Case]:
    rows, sizes = given.rows, given.sizes
    for width in sizes.widths:
        narrow = Projection.of(rows["test"], width)
        for title, reference in given.references.items():
            yield Case(
                f"{title}, {width} wide",
                partial(frechet, drawn=reference is None),
                narrow(rows["train"]),
                None if reference is None else narrow(reference),
                sizes.divisions[width],
                sizes.sets,
                least=width,
            )


def spatial_cases(given: Measured) -> Iterator[Case]:
    rows, sizes = given.rows, given.sizes
    yield Case(
        "given, nearly equal, spatial",
        partial(frechet, drawn=False),
        rows["train spatial"],
        rows["test spatial"],
        min(sizes.divisions.values()),
        sizes.sets,
        least=rows["test spatial"].shape[1],
    )


def inception_cases(given: Measured) -> Iterator[Case]:
    rows, sizes = given.rows, given.sizes
    yield Case("none", inception, rows["train"], rows["test"][:1], max(sizes.divisions.values()), sizes.sets)


def kernel_cases(given: Measured) -> Iterator[Case]:
    return slow_cases(given, kernel, given.sizes.kid)


def neighbour_cases(given: Measured) -> Iterator[Case]:
    return slow_cases(given, neighbours, given.sizes.neighbours)


def slow_cases(
    given: Measured, score: Callable[..., Mapping[str, Estimate]], slow: tuple[Slow, ...]
) -> Iterator[Case]:
    for each in slow:
        reference = given.references[each.reference]
        drawn, title = reference is None, each.reference
        if reference is not None and each.images is not None:
            reference, title = reference[: each.images], f"{title}, {each.images:,} images"
        of = partial(score, drawn=drawn)
        yield Case(title, of, given.rows["train"], reference, each.divisions, each.sets, has_truth=False)


PARTS: Mapping[str, Callable[[Measured], Iterator[Case]]] = {
    "fd": frechet_cases,
    "sfid": spatial_cases,
    "inception_score": inception_cases,
    "kid": kernel_cases,
    "precision_recall": neighbour_cases,
}
"""What is measured, in order; after it, the blurred images."""

BLUR = "blur"


@dataclass(frozen=True)
class Projection:
    """Onto the first principal components of some features; where there are no more, as they are."""

    mean: NDArray[np.float64]
    axes: NDArray[np.float64] | None

    @classmethod
    def of(cls, rows: Rows, width: int) -> Projection:
        """Of the components of these rows."""
        mean = rows.mean(axis=0, dtype=np.float64)
        if width >= rows.shape[1]:
            return cls(mean, None)
        return cls(mean, np.linalg.eigh(np.cov(rows, rowvar=False))[1][:, -width:])

    def __call__(self, rows: Rows) -> Rows:
        """(n, width)."""
        return rows if self.axes is None else ((rows - self.mean) @ self.axes).astype(np.float32)


# Blur ------------------------------------------------------------------------------------------------------


def blur(rows: Mapping[str, Rows], width: int) -> dict[str, Difference]:
    """Whether 1 % of blurred images show: paired with the clean ones, and taken for other ones."""
    narrow = Projection.of(rows["test"], width)
    clean = narrow(rows["train"])
    blurred = clean.copy()
    blurred[: len(rows["blurred"])] = narrow(rows["blurred"])
    reference, run = batch(pool=narrow(rows["test"])), Run(device="cpu")
    sides = [batch(pool=each) for each in (blurred, clean)]
    values = [FID(reference, side, run)[0].value for side in sides]
    found = [FID.influence(reference, side, run)["fid"] for side in sides]
    print(f"\n{len(rows['blurred']):,} of {len(clean):,} images blurred, FID against the test images:\n")
    print("| | difference | SE | z | p |\n|---|---|---|---|---|")
    tested = {
        title: difference(values[0], values[1], *found, paired=title == "paired")
        for title in ("paired", "unpaired")
    }
    for title, d in tested.items():
        print(f"| {title} | {d.value:.4f} | {d.stderr:.4f} | {d.z:.1f} | {d.p:.2g} |")
    worst = found[0].costliest(len(rows["blurred"]), higher_is_better=False)
    share = np.mean(worst < len(rows["blurred"]))
    print(f"\nOf the {len(worst):,} costliest images, {share:.1%} are blurred ones.")
    return tested


# Figure ----------------------------------------------------------------------------------------------------


def draw(path: Path, rows: Mapping[str, Rows], sizes: Sizes) -> None:
    """FID of sets of several sizes with bars, and what pairs of images make of a difference."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train, reference = rows["train"], rows["test"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    by_size, by_pair = figure.subplots(1, 2, width_ratios=(2, 1))
    truth = frechet(reference, train, drawn=False)["FD"].unbiased
    assert truth is not None
    by_size.axhline(truth, color="0.6", label=f"without bias, of all {len(train):,}")
    for size in FIGURE:
        (sets,) = divided(len(train), min(size, len(train)), 1)
        found = [frechet(reference, train[chosen], drawn=False)["FD"] for chosen in sets[:4]]
        for shift, name, colour in ((-0.06, "value", "#D55E00"), (0.06, "unbiased", "#0072B2")):
            known = [(i, each) for i, each in enumerate(found) if getattr(each, name) is not None]
            by_size.errorbar(
                [size * (1 + shift + 0.02 * i) for i, _ in known],
                [getattr(each, name) for _, each in known],
                yerr=[2 * each.stderr for _, each in known],
                fmt="o",
                color=colour,
                capsize=2,
                markersize=3,
                label={"value": "FID", "unbiased": "without bias"}[name] if size == FIGURE[-1] else None,
            )
    by_size.set_xscale("log")
    by_size.set_xticks(FIGURE, [f"{size:,}" for size in FIGURE])
    by_size.minorticks_off()
    by_size.set_xlabel("images")
    by_size.set_ylabel(f"FID against {len(reference):,} test images")
    by_size.legend(frameon=False, fontsize=8)
    by_pair.axhline(0, color="0.6")
    for i, (title, each) in enumerate(blur(rows, min(FULL, sizes.widths[-1])).items()):
        by_pair.errorbar([i], [each.value], yerr=[2 * each.stderr], fmt="o", color="#009E73", capsize=4)
        by_pair.annotate(f"{title}\nz = {each.z:.1f}", (i, each.value), (10, 0), textcoords="offset points")
    by_pair.set_xlim(-0.5, 2)
    by_pair.set_xticks([])
    by_pair.set_ylabel(f"FID with {BLURRED:.0%} of the images blurred,\nminus FID without")
    figure.savefig(path, dpi=130)


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("folder", metavar="FEATURES", type=click.Path(file_okay=False, path_type=Path))
@click.option("--quick", is_flag=True, help="Few images, a minute; shows that it runs.")
@click.option("--plan", is_flag=True, help="Say what there is to do, and stop.")
@click.option(
    "--precision", default="float32", show_default=True, help="Of Inception, as in `evalkit compare`."
)
@click.option("--only", type=click.Choice([*PARTS, BLUR]), help="One part of what is measured.")
@click.option("--figure", type=click.Path(dir_okay=False, path_type=Path), help="Draw this and stop.")
def main(
    data: Path,
    folder: Path,
    quick: bool,
    plan: bool,
    precision: str,
    only: str | None,
    figure: Path | None,
) -> None:
    """Measure the error bars; DATA is the folder of cifar10_jpeg.npz."""
    if figure is not None and (quick or only):
        raise click.UsageError("--figure is of all images; leave out --quick and --only.")
    sizes = QUICK if quick else Sizes()
    counts = {"train": sizes.train, "test": sizes.test, "blurred": max(2, round(BLURRED * sizes.train))}
    files = {name: features_file(folder, name, count, precision) for name, count in counts.items()}
    missing = [count for name, count in counts.items() if not files[name].exists()]
    minutes = sum(missing) / IMAGES_PER_SECOND / 60
    total, gigabytes = sum(counts.values()), sum(counts.values()) * WIDTHS * 4 / 1e9
    print(
        f"{total:,} images, of which {sum(missing):,} are not extracted: {minutes:.0f} minutes at "
        f"{IMAGES_PER_SECOND} images/s. Features take {gigabytes:.1f} GB, and as much again in the store, "
        "which may be deleted at the end."
    )
    if plan:
        return
    rows, classes = extract(data, folder, sizes, precision)
    if figure is not None:
        draw(figure, rows, sizes)
        return
    references: dict[str, Rows | None] = {
        "given, nearly equal": rows["test"],
        "given, clearly different": rows["test"][np.isin(classes["test"], ANIMALS)],
        "drawn": None,
    }
    if only != BLUR:
        print(HEADER, flush=True)
    for part, cases in PARTS.items():
        if only in (None, part):
            for case in cases(Measured(rows, references, sizes)):
                case.measure()
    if only in (None, BLUR):
        blur(rows, sizes.widths[-1])


if __name__ == "__main__":
    main()
