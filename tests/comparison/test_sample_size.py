"""evalkit plan: sample sizes against closed forms and replicated draws, and what cannot be answered."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from invoked import Result
from numpy.typing import NDArray
from stand_ins import NO_STORE, InceptionPixels

from evalkit.comparison.sample_size import SamplePlan, SampleSize, plan_samples
from evalkit.errors import InputError, UndefinedMetricError
from evalkit.features.moments import Moments
from evalkit.features.record import Features

Invoke = Callable[..., Result]
Rows = NDArray[np.floating]

# Twice the square of the standard errors that a difference must measure, (1.960 + 0.842)^2.
SQUARE = 7.849


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny products: waking threads for each would take longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def features(rows: Rows, name: str = "made up") -> Features:
    """As if the stand-in for Inception had made them."""
    return Features(
        name=name,
        digest=hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest(),
        network="inception",
        extractor="pixels",
        fingerprint=InceptionPixels().fingerprint,
        arrays={"pool": rows.astype(np.float32)},
    )


def normal(n: int, *mean: float, seed: object = 0, like: Rows | None = None) -> Rows:
    """(n, d) of variance 1; correlated by 0.8 with the deviations ``like``."""
    drawn = np.random.default_rng(seed).normal(size=(n, len(mean)))  # type: ignore[arg-type]
    return np.array(mean) + (drawn if like is None else 0.8 * like + 0.6 * drawn)


def planned(reference: Rows, *samples: Rows, detect: float, **options: object) -> SampleSize:
    sides = [features(rows) for rows in (reference, *samples)]
    found = plan_samples(*sides, detect=detect, run=NO_STORE, **options)  # type: ignore[arg-type]
    (size,) = found.sizes
    return size


# FID of normal features of variance 1 whose means are a apart is |a|^2, and its influence values are
# 2 a.(x - mu): the variance is 4 |a|^2 / n. Here |a|^2 and |b|^2 are 1.15 and 0.85.
A, B, DIFFERENCE = math.sqrt(1.15), math.sqrt(0.85), 0.3


def test_two_independent_sets_of_normal_features() -> None:
    size = planned(normal(20_000, 0, 0, seed=1), normal(20_000, 1, 0, seed=2), detect=DIFFERENCE)
    assert size.images == (20_000,)
    assert size.stderrs == pytest.approx((2 / math.sqrt(20_000),), rel=0.02)
    assert size.detectable == pytest.approx(math.sqrt(2 * SQUARE * 4 / 20_000), rel=0.02)
    (required,) = size.required
    assert required.images == pytest.approx(2 * 4 * SQUARE / DIFFERENCE**2, rel=0.04)
    assert (required.difference, required.why, size.difference) == (DIFFERENCE, "", None)


@pytest.mark.parametrize("counts", [(20_000, 20_000), (30_000, 10_000)])
def test_what_the_reference_causes_stays(counts: tuple[int, int]) -> None:
    """The difference of sets apart in two directions varies with the reference: by 4 |a - b|^2 / m."""
    m = 2000
    size = planned(
        normal(m, 0, 0, seed=1),
        normal(counts[0], A, 0, seed=2),
        normal(counts[1], 0, B, seed=3),
        detect=DIFFERENCE,
    )
    assert size.images == counts
    assert size.difference is not None
    fixed = 4 * 2 / m
    variance = 4 * A**2 / counts[0] + 4 * B**2 / counts[1] + fixed
    assert size.difference.stderr == pytest.approx(math.sqrt(variance), rel=0.04)
    assert size.detectable == pytest.approx(math.sqrt(SQUARE * variance), rel=0.04)
    # With detect = 0.3 a third of the variance that may be is the reference's.
    assert size.required[0].images == pytest.approx(8 / (DIFFERENCE**2 / SQUARE - fixed), rel=0.08)
    assert size.required[1].difference == abs(size.difference.value)
    assert size.required[1].images == pytest.approx(8 / (size.difference.value**2 / SQUARE - fixed), rel=0.08)


def test_pairs_need_fewer() -> None:
    n = 20_000
    first = normal(n, 0, 0, seed=2)
    sets = normal(n, 0, 0, seed=1), first + np.array([A, 0]), normal(n, B, 0, seed=3, like=first)
    paired, independent = (planned(*sets, detect=DIFFERENCE, paired=each) for each in (True, None))
    fixed = 4 * (A - B) ** 2 / n
    allowed = DIFFERENCE**2 / SQUARE - fixed
    assert paired.required[0].images == pytest.approx(4 * (A**2 + B**2 - 2 * 0.8 * A * B) / allowed, rel=0.04)
    assert independent.required[0].images == pytest.approx(8 / allowed, rel=0.04)
    assert [each.difference and each.difference.paired for each in (paired, independent)] == [True, False]


def share_found(n: int, m: int, second: float, correlation: float, replicates: int = 1000) -> float:
    """How often FID of one feature, all of it written out here, differs at 5 % between n images and n others.

    Of F = (mu - m)^2 + (sigma - s)^2, with influence values from its derivatives in mean and variance.
    """
    rng = np.random.default_rng(n)
    y, x, own = (rng.normal(size=(replicates, count)) for count in (m, n, n))
    sides = A + x, second + correlation * x + math.sqrt(1 - correlation**2) * own
    m1, s1 = y.mean(axis=1, keepdims=True), y.std(axis=1, keepdims=True)
    values, of_samples, of_reference = [], [], []
    for x in sides:
        mu, sigma = x.mean(axis=1, keepdims=True), x.std(axis=1, keepdims=True)
        values.append(((mu - m1) ** 2 + (sigma - s1) ** 2)[:, 0])
        of_samples.append(2 * (mu - m1) * (x - mu) + (sigma - s1) / sigma * (x - mu) ** 2)
        of_reference.append(-2 * (mu - m1) * (y - m1) - (sigma - s1) / s1 * (y - m1) ** 2)
    variance = (of_reference[0] - of_reference[1]).var(axis=1) / m
    if correlation:
        variance += (of_samples[0] - of_samples[1]).var(axis=1) / n
    else:
        variance += sum(each.var(axis=1) / n for each in of_samples)
    return float(np.mean(np.abs(values[0] - values[1]) > 1.959964 * np.sqrt(variance)))


@pytest.mark.parametrize("kind", ["one set", "two sets", "pairs"])
def test_the_planned_number_has_the_power(kind: str) -> None:
    """Four of five draws of that size show the difference; with 20 % fewer or more it is not 80 %."""
    m, many = 4000, 20_000
    # On opposite sides of the reference, a third of the variance that may be is the reference's.
    second = -B if kind == "two sets" else B
    reference, first = normal(m, 0, seed=1), normal(many, 0, seed=2)
    if kind == "one set":
        size = planned(reference, first + 1, detect=DIFFERENCE)
    else:
        other = normal(many, second, seed=3, like=first if kind == "pairs" else None)
        size = planned(reference, first + A, other, detect=DIFFERENCE, paired=kind == "pairs")
    n = size.required[0].images
    assert n is not None
    fewer, exactly, more = (
        share_found(round(n * part), m, second, 0.8 * (kind == "pairs")) for part in (0.8, 1, 1.2)
    )
    assert exactly == pytest.approx(0.8, abs=0.035)
    assert fewer < 0.765
    assert more > 0.835


def test_precision_is_binomial() -> None:
    """For scores that have no influence values, too; halves give up to 14 % more than the standard error."""
    sides = normal(1500, 0, 0, 0, 0, 0, seed=1), normal(1500, 2.2, 0, 0, 0, 0, seed=2)
    found = plan_samples(*map(features, sides), detect=0.02, metrics="precision", run=NO_STORE)
    size = next(each for each in found.sizes if each.spec.name == "precision")
    precision = found.comparisons[0]["precision"]
    assert size.required[0].images == pytest.approx(
        2 * precision * (1 - precision) * SQUARE / 0.02**2, rel=0.3
    )


def test_a_reference_that_is_too_small_is_named() -> None:
    size = planned(
        normal(500, 0, 0, seed=1), normal(5000, A, 0, seed=2), normal(5000, 0, B, seed=3), detect=0.2
    )
    assert size.required[0].images is None
    assert "does not show with this reference" in size.required[0].why
    assert size.required[1].images is None or size.required[1].difference > 0.2


def test_no_more_images_than_features() -> None:
    size = planned(normal(300, *[0] * 20, seed=1), normal(300, *[1] * 20, seed=2), detect=40)
    (required,) = size.required
    assert required.images is not None
    assert required.images <= 20
    assert "no more than the 20 features" in required.why
    kid = planned(normal(300, *[0] * 20, seed=1), normal(300, *[1] * 20, seed=2), detect=400, metrics="kid")
    assert kid.required[0].why == ""


def test_sets_that_do_not_differ() -> None:
    same = normal(200, 1, 0, seed=2)
    size = planned(normal(200, 0, 0, seed=1), same, same, detect=0.1)
    assert size.difference is not None
    assert size.difference.value == 0
    assert size.required[0].images is not None
    assert (size.required[1].images, size.required[1].why) == (None, "the two sets do not differ")


def test_a_standard_error_of_zero_has_no_answer() -> None:
    """No draw has a sample that the reference covers: that does not make two images enough."""
    sides = normal(200, 0, 0, seed=1), normal(200, 100, 0, seed=2)
    found = plan_samples(*map(features, sides), detect=0.02, metrics="precision", run=NO_STORE)
    assert {size.spec.name: size.stderrs for size in found.sizes} == {"precision": (0,), "recall": (0,)}
    for size in found.sizes:
        assert size.required[0].images is None
        assert "standard error of 0" in size.required[0].why


def test_what_has_no_error_bar_has_no_answer() -> None:
    reference, samples = features(normal(50, *[0] * 8, seed=1)), normal(50, *[1] * 8, seed=2)
    some = plan_samples(reference, features(samples[:8]), detect=0.1, metrics="fid,kid", run=NO_STORE)
    assert [size.spec.name for size in some.sizes] == ["kid"]
    assert "singular covariance" in some.missing["fid"]
    with pytest.raises(UndefinedMetricError, match=r"No sample size can be planned\. FID: .* singular"):
        plan_samples(reference, features(samples[:8]), detect=0.1, run=NO_STORE)
    alone = Features(
        name="alone",
        digest="",
        network="inception",
        extractor="pixels",
        fingerprint=InceptionPixels().fingerprint,
        gaussians={"pool": Moments.of(samples).gaussian()},
        count=50,
    )
    with pytest.raises(UndefinedMetricError, match="of alone, mean and covariance are used"):
        plan_samples(reference, features(samples), alone, detect=0.1, run=NO_STORE)
    exact = plan_samples(alone, features(samples + 1), detect=0.1, run=NO_STORE)
    assert exact.sizes[0].required[0].images


@pytest.mark.parametrize("detect", [0.0, -0.1, math.nan, math.inf])
def test_a_difference_is_positive(detect: float) -> None:
    with pytest.raises(InputError, match="give a positive number"):
        plan_samples(np.zeros(3), np.zeros(3), detect=detect)


def test_one_set_or_two() -> None:
    sides = [features(normal(20, 0, 0, seed=seed)) for seed in range(4)]
    for count in (1, 4):
        with pytest.raises(InputError, match=f"{count - 1} sets of samples"):
            plan_samples(*sides[:count], detect=0.1)
    with pytest.raises(InputError, match="give a second one"):
        plan_samples(*sides[:2], detect=0.1, paired=True)
    with pytest.raises(InputError, match="same number of images"):
        plan_samples(*sides[:2], features(normal(30, 0, 0)), detect=0.1, paired=True, run=NO_STORE)


# The command -----------------------------------------------------------------------------------------------


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """A reference and two sets of 120 images; the sets say that they are of the same noise."""
    rng = np.random.default_rng(0)
    found = [tmp_path / f"{name}.npz" for name in ("ref", "a", "b")]
    made = json.dumps({"format": "evalkit samples 2", "settings": {"seed": 5}})
    noise = rng.integers(0, 200, (120, 8, 8, 3))
    for path, low in zip(found, (None, 20, 24), strict=True):
        if low is None:
            np.savez(path, rng.integers(0, 256, (120, 8, 8, 3), dtype=np.uint8))
        else:
            own = rng.integers(0, 20, noise.shape)
            np.savez(path, arr_0=(noise + own + low).astype(np.uint8), provenance=np.array(made))
    return found


@pytest.mark.usefixtures("pixels")
def test_command_for_one_set(run: Invoke, paths: list[Path]) -> None:
    done = run("plan", *paths[:2], "--detect", "0.1", "--no-store")
    assert done.code == 0
    size = plan_samples(*paths[:2], detect=0.1, extractor=InceptionPixels(), run=NO_STORE).sizes[0]
    lines = done.out.splitlines()
    assert lines[:2] == [f"reference  {paths[0]}, 120 images", f"samples    {paths[1]}, 120 images"]
    assert lines[3].split("  ")[-1].strip() == "n for 0.1"
    assert lines[4].split() == [
        "FID",
        "120",
        f"{size.stderrs[0]:.4f}",
        f"{size.detectable:.4f}",
        f"{size.required[0].images:,}",
    ]
    assert "two independent sets that vary like this one" in done.out
    assert "5%" not in done.out
    assert done.err == ""


@pytest.mark.usefixtures("pixels")
def test_command_warns_of_numbers_but_not_of_publishing(run: Invoke, paths: list[Path]) -> None:
    """What keeps a number from being published is beside the point here; what makes it wrong is not."""
    with np.load(paths[1]) as file:
        images = file["arr_0"]
    np.savez(paths[0], images, np.repeat([0, 1], [110, 10]))
    np.savez(paths[1], images, np.repeat([0, 1], [110, 10]))
    (known,) = plan_samples(*paths[:2], detect=0.1, extractor=InceptionPixels(), run=NO_STORE).comparisons
    for text in ("published numbers use 50,000", "Published numbers use labels drawn uniformly"):
        assert any(text in warning for warning in known.warnings)
    done = run("plan", *paths[:2], "--detect", "0.1", "--no-store")
    assert done.code == 0
    assert "warning: Reference and samples are the same images" in done.out
    assert "ublished" not in done.out


@pytest.mark.usefixtures("pixels")
def test_command_for_two_sets(run: Invoke, paths: list[Path]) -> None:
    done = run("plan", *paths, "--detect", "0.01", "--no-store", "--metrics", "fid,kid")
    assert done.code == 0
    found = plan_samples(*paths, detect=0.01, metrics="fid,kid", extractor=InceptionPixels(), run=NO_STORE)
    fid, kid = (line.split() for line in done.out.splitlines()[5:7])
    size = found.sizes[0]
    assert size.difference is not None
    assert size.difference.paired
    assert [fid[0], kid[0]] == ["FID", "KID"]
    assert fid[1:5] == ["120", f"{size.difference.value:+.4f}", "±", f"{size.difference.stderr:.4f}"]
    assert fid[-2:] == [f"{each.images:,}" if each.images else "-" for each in size.required]
    assert "The sets are paired" in done.out
    independent = run("plan", *paths, "--detect", "0.01", "--no-store", "--unpaired").out
    assert "taken to be independent" in independent
    assert float(independent.splitlines()[5].split()[4]) > size.difference.stderr


@pytest.mark.usefixtures("pixels")
def test_command_for_a_set_and_itself(run: Invoke, paths: list[Path]) -> None:
    """Paired, nothing is left that varies: there is no smallest difference either."""
    done = run("plan", paths[0], paths[1], paths[1], "--detect", "0.1", "--no-store")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[5].split() == ["FID", "120", "+0.0000", "±", "0.0000", "1", "-", "-", "-"]
    assert lines[7].startswith("FID: the draw of the samples gives a standard error of 0")
    assert lines[8] == "FID: the two sets do not differ."


@pytest.mark.usefixtures("pixels")
def test_command_as_json(run: Invoke, paths: list[Path]) -> None:
    done = run("plan", *paths, "--detect", "0.1", "--no-store", "--format", "json")
    found = json.loads(done.out)
    (size,) = found["sizes"]
    assert found["format"] == "evalkit plan 1"
    assert (found["detect"], size["images"], size["spec"]["name"]) == (0.1, [120, 120], "fid")
    assert size["difference"]["paired"] is True
    assert len(found["comparisons"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--detect", "0"], "give a positive number"),
        (["--detect", "nan"], "give a positive number"),
        (["--detect", "much"], "not a valid float"),
        ([], "Missing option '--detect'"),
        (["--detect", "0.1", "--metrics", "nonsense"], "nonsense"),
        (["--detect", "0.1", "--paired"], "give a second one"),
        (["third.npz", "fourth.npz", "--detect", "0.1"], "unexpected extra argument"),
        (["nowhere.npz", "--detect", "0.1"], "nowhere.npz"),
        (["--detect", "1e-300"], "more images than can be counted"),
    ],
)
@pytest.mark.usefixtures("pixels")
def test_bad_input_ends_the_command(run: Invoke, paths: list[Path], arguments: list[str], said: str) -> None:
    done = run("plan", *paths[:2], *arguments, "--no-store")
    if "1e-300" in arguments:  # the standard error is there all the same
        assert (done.code, said in done.out) == (0, True)
    else:
        assert (done.code, done.out) == (2, "")
        assert said in done.err
        assert len(done.err) < 1000


def test_pairing_is_checked_before_anything_is_opened(run: Invoke) -> None:
    done = run("plan", "nowhere.npz", "neither.npz", "--detect", "0.1", "--paired")
    assert (done.code, done.out) == (2, "")
    assert "give a second one" in done.err


def test_json_of_a_plan_is_json() -> None:
    sides = [features(normal(100, mean, 0, seed=mean)) for mean in (0, 1)]
    found = plan_samples(*sides, detect=0.1, run=NO_STORE)
    assert isinstance(found, SamplePlan)
    assert json.loads(found.to_json())["sizes"][0]["images"] == [100]
