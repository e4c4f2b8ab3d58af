"""Records of every kind, made up, for reports to show; with hostile names where these are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from evalkit.batches import Batch, LabelBalance
from evalkit.pairs import Difference, Pair, Runs
from evalkit.report.tables import Record
from evalkit.results import Comparison, Point, PublishedRow, Score, ScoreSpec, Sweep
from evalkit.several import Comparisons, Setting

FID = ScoreSpec(name="fid", title="FID", higher_is_better=False)
RECALL = ScoreSpec(name="recall", title="Recall", higher_is_better=True)
IS = ScoreSpec(name="inception_score", title="Inception Score", higher_is_better=True)
HEADLESS = "the weights have no classifier head"
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)> & $\\frac{ \ud800\0'


def batch(name: str, digest: str = "d1", images: int = 2500) -> Batch:
    return Batch(
        name=name,
        images=images,
        image_shape=(32, 32, 3),
        digest=digest,
        statistics="images",
        features="extracted",
        statistics_images=images,
        labels=LabelBalance(kind="none"),
    )


def one(
    name: str = "runs/a/samples.npz",
    fid: float = 12.3456,
    recall: float = 0.625,
    *,
    unbiased: float | None = None,
    specs: Sequence[ScoreSpec] = (FID, IS, RECALL),
) -> Comparison:
    parts: dict[str, Any] = {"stderr_sampling": 0.2, "stderr_reference": 0.15, "n": 2500}
    parts |= {"outputs": ("inception:pool",), "reference": "images"}
    return Comparison(
        specs=tuple(specs),
        scores=(
            Score(
                name="fid", value=fid, stderr=0.25, unbiased=unbiased, parameters={"mean": "float32"}, **parts
            ),
            Score(name="recall", value=recall, stderr=0.0125, parameters={"k": 3}, **parts),
        ),
        missing={"inception_score": HEADLESS},
        protocol="adm",
        reference=batch("train.npz", "reference-digest"),
        samples=batch(name, f"digest of {name}"),
        extractors={"inception": {"name": "inception-2015", "fingerprint": "f1", "device": "cpu"}},
        byte_rules={"adm": "8-bit RGB", "exact": "8-bit RGB"},
        warnings=(f"{name} holds 2,500 images",),
        versions={"evalkit": "0.1.0", "torch": "2.13.0"},
        seconds={"features": 12.34, "fid": 0.5},
    )


def pairs(values: Mapping[str, Sequence[float]], unbiased: Sequence[str] = ()) -> tuple[Pair, ...]:
    """Differences of all; those of more than 1 % of the value stand."""
    found = []
    for score, known in values.items():
        for second, b in enumerate(known):
            for first, a in enumerate(known[:second]):
                p = 0.001 if abs(a - b) > abs(a) / 100 else 0.5
                stderr = abs(a - b) / 3 or 1.0
                difference = Difference(value=a - b, stderr=stderr, z=(a - b) / stderr, p=p)
                pair = Pair(score=score, first=first, second=second, difference=difference, corrected=p)
                found.append(replace(pair, unbiased=score in unbiased))
    return tuple(found)


def several(names: Sequence[str] = ("runs/a/samples.npz", "runs/b/samples.npz", "c.npz")) -> Comparisons:
    fid = [12.5, 12.55, 14.25, 13.125, 15.0625][: len(names)]
    recall = [0.625, 0.6875, 0.6896, 0.5, 0.4375][: len(names)]
    return Comparisons(
        comparisons=tuple(
            one(name, value, other, unbiased=value - 1)
            for name, value, other in zip(names, fid, recall, strict=True)
        ),
        pairs=pairs({"fid": [value - 1 for value in fid], "recall": recall}, unbiased=["fid"]),
    )


def settings() -> Comparisons:
    found = several(["a1.npz", "a2.npz", "b1.npz", "b2.npz"])
    means = [12.5125, 13.6875]

    def setting(first: int, mean: float) -> Setting:
        runs = Runs(mean=mean, stderr=0.05, between=0.07, sampling=0.04, runs=2)
        return Setting(members=(first, first + 1), scores={"fid": runs})

    made = tuple(setting(2 * number, mean) for number, mean in enumerate(means))
    return replace(found, settings=made, pairs=pairs({"fid": means}))


def sweep(name: str = "adm") -> Sweep:
    fid, recall = [12.5, 8.25, 8.3, 20.0], [0.7, 0.65, 0.5, 0.25]
    points = [
        Point(scale=scale, comparison=one(f"scale-{scale:g}/samples.npz", *values))
        for scale, *values in zip((0.0, 0.5, 1.0, 4.0), fid, recall, strict=True)
    ]
    return Sweep(
        name=name,
        points=tuple(points),
        settings={"seed": 0, "sampler": {"name": "ddim", "eta": 0.0}},
        pairs=pairs({"fid": fid, "recall": recall}),
    )


def with_published(comparison: Comparison) -> Comparison:
    row = PublishedRow(
        dataset="imagenet256",
        model="ADM-G",
        scores={"fid": 4.59, "inception_score": 186.7},
        images=50_000,
        paper="Diffusion Models Beat GANs on Image Synthesis, arXiv:2105.05233v4",
        table=5,
        guidance="classifier",
        scale=1.0,
    )
    return replace(comparison, published=(row,), published_rows=7)


def with_classes(comparison: Comparison, count: int, begin: str = "class ") -> Comparison:
    """The same with values by class, distinct and in no order."""

    def values(score: Score) -> dict[str, float]:
        return {f"{begin}{i}": score.value * (1 + (i * 37 % count) / count) for i in range(count)}

    changed = [replace(score, by_class=values(score)) for score in comparison.scores]
    return replace(comparison, scores=tuple(changed))


def hostile() -> list[Record]:
    """Every text that a page shows is :data:`HOSTILE`, or holds it."""
    spec = ScoreSpec(name="fid", title=f"FID{HOSTILE}", higher_is_better=False)
    found = with_published(one(HOSTILE, specs=[spec, IS, RECALL]))
    (row,) = found.published
    found = replace(
        found,
        missing={"inception_score": HOSTILE},
        protocol=HOSTILE,
        reference=replace(batch(HOSTILE), digest=HOSTILE),
        extractors={HOSTILE: {"name": HOSTILE, "fingerprint": HOSTILE, HOSTILE: {HOSTILE: HOSTILE}}},
        warnings=(HOSTILE,),
        versions={HOSTILE: HOSTILE},
        seconds={HOSTILE: 1.0},
        published=(replace(row, model=HOSTILE, paper=HOSTILE, guidance=HOSTILE),),
    )
    second = replace(found, samples=batch(f"b/{HOSTILE}"))
    pair = Pair(score="recall", first=0, second=1, why=HOSTILE)
    both = Comparisons(comparisons=(found, second), pairs=(pair,))
    points = tuple(Point(scale=scale, comparison=found) for scale in (0.0, 1.0))
    return [
        with_classes(found, 3, HOSTILE),
        both,
        Sweep(name=HOSTILE, points=points, settings={HOSTILE: [HOSTILE]}),
    ]


KINDS: dict[str, Callable[[], Record]] = {
    "one": one,
    "several": several,
    "five": lambda: several([f"{letter}.npz" for letter in "abcde"]),
    "settings": settings,
    "sweep": sweep,
}
