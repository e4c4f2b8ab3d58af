"""A sweep: paired samples at every scale, nothing made twice, one table."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_networks
from fake_engine import FakeEngine
from invoked import Result
from optional import optional
from PIL import Image
from stand_ins import InceptionPixels as Pixels

from evalkit.cli.options import ExtractorSetup
from evalkit.comparison import Measured, compare
from evalkit.comparison.pairs import pairs_of_sets
from evalkit.comparison.saved import load_deviations
from evalkit.errors import InputError, OutputError
from evalkit.images import open_images
from evalkit.results import Sweep
from evalkit.several import Comparisons
from evalkit.system.locks import exclusive_lock
from generation import sweep as sweep_module
from generation import work
from generation.batch import Networks
from generation.sample import STAGE
from generation.settings import Settings
from generation.sweep import sweep
from generation.work import Item, MakeSamples

pytestmark = pytest.mark.usefixtures("one_thread")

Invoke = Callable[..., Result]
SETTINGS = Settings(count=20, respacing="3", shard_size=8)
SCALES = (4.0, 0.0, 30.0)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    folder = tmp_path_factory.mktemp("networks")
    return small_networks.load(
        small_networks.write(folder, "unet", "diffusion"),
        small_networks.write(folder, "classifier", "classifier", seed=1),
    )


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model without classes, and a classifier that guides it."""
    folder = tmp_path_factory.mktemp("unconditional")
    return {
        "--model": small_networks.write(folder, "plain", "diffusion", num_classes=None),
        "--classifier": small_networks.write(folder, "classifier", "classifier", seed=1),
    }


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "ref.npz", pixels)
    return tmp_path / "ref.npz"


def swept(networks: Networks, reference: Path, out: Path, **options: Any) -> Sweep:
    defaults: dict[str, Any] = {"extractor": Pixels()}
    settings, scales = options.pop("settings", SETTINGS), options.pop("scales", SCALES)
    return sweep(settings, scales, networks, reference, out, **(defaults | options))


def samples(out: Path, scale: float) -> Path:
    return out / f"scale-{scale!r}" / "samples_20x8x8x3.npz"


def test_every_scale_is_sampled_and_compared(networks: Networks, reference: Path, tmp_path: Path) -> None:
    result = swept(networks, reference, tmp_path / "s", protocol="exact")
    assert [point.scale for point in result.points] == [0, 4, 30]
    assert result.name == "unet"
    for point in result.points:
        scale, found = point.scale, point.comparison
        alone = compare(reference, samples(tmp_path / "s", scale), protocol="exact", extractor=Pixels())
        assert found.scores == alone.scores
    assert Sweep.from_json((tmp_path / "s" / "results.json").read_text()) == result
    assert (tmp_path / "s" / "results.csv").read_text() == result.to_csv()


def test_scales_are_compared_with_each_other(networks: Networks, reference: Path, tmp_path: Path) -> None:
    result = swept(networks, reference, tmp_path / "s", protocol="exact")
    files = [samples(tmp_path / "s", scale) for scale in sorted(SCALES)]
    several = compare(reference, *files, protocol="exact", extractor=Pixels())
    assert isinstance(several, Comparisons)
    assert result.pairs == several.pairs
    found = {(pair.score, pair.first, pair.second): pair for pair in result.pairs}
    assert found.keys() == {
        (score.name, *pair) for score in several.comparisons[0].scores for pair in ((0, 1), (0, 2), (1, 2))
    }
    for (score, _, _), pair in found.items():
        if score in ("fid", "sfid"):  # of 48 features, and 20 images a scale
            assert pair.why == several.comparisons[0].score(score).no_stderr  # type: ignore[union-attr]
        else:
            assert pair.difference is not None, pair.why
            assert pair.difference.paired


def test_the_same_noise_gives_smaller_errors(networks: Networks, reference: Path, tmp_path: Path) -> None:
    settings = Settings(count=60, respacing="3", shard_size=60)
    scales = (0.0, 0.5)
    np.savez(reference, np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8))
    result = swept(networks, reference, tmp_path / "s", settings=settings, scales=scales)
    folders = [tmp_path / "s" / f"scale-{scale!r}" for scale in scales]
    measured = []
    for folder, point in zip(folders, result.points, strict=True):
        deviations = load_deviations(folder / "deviations.npz", (folder / "comparison.json").read_bytes())
        assert deviations is not None
        measured.append(Measured(comparison=point.comparison, deviations=deviations))
    images = [open_images(folder / "samples_60x8x8x3.npz") for folder in folders]
    assert pairs_of_sets(measured, images) == result.pairs
    apart = pairs_of_sets(measured, images, paired=False)
    compared = 0
    for pair, other in zip(result.pairs, apart, strict=True):
        if pair.score in ("fid", "sfid", "inception_score"):
            assert pair.difference is not None, pair.why
            assert other.difference is not None
            assert pair.difference.value == other.difference.value
            assert pair.difference.stderr < other.difference.stderr / 2
            compared += 1
    assert compared == 3


def test_noise_and_classes_are_paired(networks: Networks, reference: Path, tmp_path: Path) -> None:
    swept(networks, reference, tmp_path / "s", scales=(0.0, 1e-6, 4.0))
    plain, barely, much = (open_images(samples(tmp_path / "s", scale)) for scale in (0.0, 1e-6, 4.0))
    assert plain.labels is not None
    np.testing.assert_array_equal(plain.labels, barely.labels)
    np.testing.assert_array_equal(plain.labels, much.labels)
    a, b, c = (next(images.batches(20)).astype(int) for images in (plain, barely, much))
    assert np.abs(a - b).max() <= 1  # the same noise, and next to no guidance
    assert np.abs(a - c).max() > 1


def test_the_grid_has_a_row_a_scale(networks: Networks, reference: Path, tmp_path: Path) -> None:
    swept(networks, reference, tmp_path / "s")
    with Image.open(tmp_path / "s" / "samples.png") as picture:
        pixels = np.asarray(picture)
        assert picture.text["Description"] == (
            "The first 16 samples of the sweep s; a row for each of the guidance scales 0, 4, 30."
        )
    cell = 8 * 5 + 2
    assert pixels.shape[0] == 3 * cell
    grid = pixels[:, pixels.shape[1] - 16 * cell :]
    for row, scale in enumerate((0.0, 4.0, 30.0)):
        first = next(open_images(samples(tmp_path / "s", scale)).batches(1))[0]
        found = grid[row * cell + 1 : row * cell + 41 : 5, 1:41:5]
        np.testing.assert_array_equal(found, first)
    assert (pixels[:, : pixels.shape[1] - 16 * cell] < 128).any()  # the scales, written beside


def test_nothing_is_made_twice(
    networks: Networks, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seen = [], []
    original, extract = work._Maker.__call__, Pixels.__call__
    monkeypatch.setattr(
        work._Maker, "__call__", lambda self, item, pulse: made.append(item) or original(self, item, pulse)
    )
    monkeypatch.setattr(
        Pixels, "__call__", lambda self, images: seen.append(len(images)) or extract(self, images)
    )
    first = swept(networks, reference, tmp_path / "s")
    assert (len(made), sum(seen)) == (9, 30 + 3 * 20)
    assert swept(networks, reference, tmp_path / "s") == first
    assert (len(made), sum(seen)) == (9, 30 + 3 * 20)
    # Another scale needs its own samples only, another protocol not even features.
    swept(networks, reference, tmp_path / "s", scales=(*SCALES, 1.0))
    assert (len(made), sum(seen)) == (12, 30 + 4 * 20)
    exact = swept(networks, reference, tmp_path / "s", protocol="exact")
    assert (len(made), sum(seen)) == (12, 30 + 4 * 20)
    assert exact.points[0].comparison.protocol == "exact"


def test_another_reference_is_compared_anew(networks: Networks, reference: Path, tmp_path: Path) -> None:
    before = swept(networks, reference, tmp_path / "s")
    np.savez(reference, np.random.default_rng(1).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8))
    after = swept(networks, reference, tmp_path / "s")
    assert before.values("fid") != after.values("fid")


def test_a_damaged_record_is_made_again(networks: Networks, reference: Path, tmp_path: Path) -> None:
    first = swept(networks, reference, tmp_path / "s")
    (tmp_path / "s" / "scale-4.0" / "comparison.json").write_text("{")
    assert swept(networks, reference, tmp_path / "s").to_csv() == first.to_csv()


@pytest.mark.parametrize("damage", ["removed", "cut", "of another scale", "earlier version"])
def test_without_its_deviations_a_scale_is_compared_again(
    networks: Networks, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    first = swept(networks, reference, tmp_path / "s")
    assert any(pair.difference for pair in first.pairs)
    compared, made = [], []
    measure = sweep_module.measure
    monkeypatch.setattr(
        sweep_module,
        "measure",
        lambda sources, *a, **k: compared.append(sources[1]) or measure(sources, *a, **k),
    )
    monkeypatch.setattr(work._Maker, "__call__", lambda *_: made.append(None))
    monkeypatch.setattr(Pixels, "__call__", lambda *_: made.append(None))
    assert swept(networks, reference, tmp_path / "s") == first
    assert not compared
    file = tmp_path / "s" / "scale-4.0" / "deviations.npz"
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[:-100])
    elif damage == "of another scale":
        file.write_bytes((tmp_path / "s" / "scale-0.0" / "deviations.npz").read_bytes())
    else:
        file.unlink()
    if damage == "earlier version":
        results = tmp_path / "s" / "results.json"
        record = json.loads(results.read_text()) | {"format": "evalkit sweep 3"}
        del record["pairs"]
        results.write_text(json.dumps(record))
    again = swept(networks, reference, tmp_path / "s")
    assert [each.name for each in compared] == [str(samples(tmp_path / "s", 4.0))]
    assert not made  # neither samples nor features
    assert (again.to_csv(), again.pairs) == (first.to_csv(), first.pairs)
    assert Sweep.from_json((tmp_path / "s" / "results.json").read_text()) == again
    assert swept(networks, reference, tmp_path / "s") == again
    assert len(compared) == 1


def test_killed_between_deviations_and_record(
    networks: Networks, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deviations against one reference are never taken for those against another."""
    other = tmp_path / "other.npz"
    np.savez(other, np.random.default_rng(1).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8))
    first = swept(networks, reference, tmp_path / "s")
    expected = swept(networks, other, tmp_path / "t")
    assert first.to_csv() != expected.to_csv()
    record = tmp_path / "s" / "scale-0.0" / "comparison.json"
    before = record.read_bytes(), record.with_name("deviations.npz").read_bytes()

    def killed(path: Path) -> None:
        assert path == record
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "replace_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            swept(networks, other, tmp_path / "s")
    assert record.read_bytes() == before[0]
    assert record.with_name("deviations.npz").read_bytes() != before[1]
    again = swept(networks, reference, tmp_path / "s")
    assert (again.to_csv(), again.pairs) == (first.to_csv(), first.pairs)
    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "replace_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            swept(networks, other, tmp_path / "s")
    found = swept(networks, other, tmp_path / "s")
    assert (found.to_csv(), found.pairs) == (expected.to_csv(), expected.pairs)


def test_an_unconditional_scale_0_is_not_paired(
    unconditional: dict[str, Path], reference: Path, tmp_path: Path
) -> None:
    networks = small_networks.load(*unconditional.values())
    settings = Settings(count=20, respacing="3", shard_size=8, classes="balanced")
    result = swept(networks, reference, tmp_path / "s", settings=settings)
    paired = {
        (pair.first, pair.second): pair.difference.paired
        for pair in result.pairs
        if pair.score == "inception_score" and pair.difference is not None
    }
    assert paired == {(0, 1): False, (0, 2): False, (1, 2): True}


def test_what_is_replaced_or_left_out_is_told(
    networks: Networks, reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="generation")
    first = swept(networks, reference, tmp_path / "s")
    swept(networks, reference, tmp_path / "s")
    assert not [line for line in caplog.messages if "replaces it" in line or "also has results" in line]
    other = tmp_path / "other.npz"
    np.savez(other, np.random.default_rng(1).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8))
    swept(networks, other, tmp_path / "s", scales=SCALES[:1])
    kept = " ".join(f"{scale:g}" for scale in sorted(SCALES[1:])).replace(" ", ", ")
    assert any(f"also has results of scale {kept}. They stay" in line for line in caplog.messages)
    folder = tmp_path / "s" / f"scale-{SCALES[0]!r}"
    assert f"{folder} was compared with {reference} before; this replaces it." in caplog.messages
    assert swept(networks, reference, tmp_path / "s").to_csv() == first.to_csv()


def test_other_settings_are_refused(networks: Networks, reference: Path, tmp_path: Path) -> None:
    swept(networks, reference, tmp_path / "s")
    other = Settings(count=20, respacing="4", shard_size=8)
    with pytest.raises(InputError, match='respacing was "3" and is now "4"'):
        swept(networks, reference, tmp_path / "s", settings=other)
    with pytest.raises(InputError, match='respacing was "3" and is now "4"'):
        swept(networks, reference, tmp_path / "s", settings=other, scales=(7.0,))


def test_a_sweep_of_another_version_is_refused(networks: Networks, reference: Path, tmp_path: Path) -> None:
    swept(networks, reference, tmp_path / "s")
    record = json.loads((tmp_path / "s" / "results.json").read_text())
    assert record["settings"]["sampler"] == {"name": "ddpm"}
    record["settings"] = {"sampler": "ddpm", "eta": 0.0}
    (tmp_path / "s" / "results.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="another version of evalkit began"):
        swept(networks, reference, tmp_path / "s")


@pytest.mark.parametrize(
    ("scales", "classes", "labels"),
    [("0,30", "balanced", True), ("0,30", None, True), ("0", "balanced", False), ("0", None, False)],
)
def test_an_unconditional_model_has_no_classes_at_scale_0(
    unconditional: dict[str, Path],
    reference: Path,
    tmp_path: Path,
    run: Invoke,
    monkeypatch: pytest.MonkeyPatch,
    scales: str,
    classes: str | None,
    labels: bool,
) -> None:
    monkeypatch.setattr(ExtractorSetup, "extractor", lambda self, network="inception": Pixels())
    options: dict[str, Any] = {"--scales": scales, "-n": 20, "--respacing": 3, "--reference": reference}
    options |= unconditional if labels else {"--model": unconditional["--model"]}
    options |= {"--classes": classes} if classes else {}
    out = tmp_path / "my sweep"
    result = run("sweep", "--out", out, *[part for option in options.items() for part in option])
    assert result.code == 0, result.err
    assert result.err.count("has no classes: --classes balanced is for the other scales") == bool(classes)
    assert open_images(samples(out, 0.0)).labels is None
    if labels:
        assert open_images(samples(out, 30.0)).labels is not None
    # The command at its end can be pasted.
    (line,) = [line for line in result.out.splitlines() if line.startswith("next: ")]
    assert shlex.split(line) == ["next:", "evalkit", "curves", str(out), "-o", "curves.png"]


@pytest.mark.parametrize("scales", [(), (1.0, 1.0), (float("nan"),), (float("inf"), 1.0)])
def test_bad_scales(networks: Networks, reference: Path, tmp_path: Path, scales: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"[Ss]cale"):
        swept(networks, reference, tmp_path / "s", scales=scales)
    assert not (tmp_path / "s").exists()


def test_workers_give_the_same_and_never_wait_between_scales(
    networks: Networks, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine(4, dies_at=(0, 8))
    elsewhere = swept(networks, reference, tmp_path / "elsewhere", engine=engine)
    monkeypatch.setenv("EVALKIT_CACHE", str(tmp_path / "cache"))
    here = swept(networks, reference, tmp_path / "here")
    assert elsewhere.to_csv() == here.to_csv()
    for scale in SCALES:
        one, other = (samples(tmp_path / name, scale).read_bytes() for name in ("here", "elsewhere"))
        assert one == other
    assert [isinstance(each, MakeSamples) for each in engine.works[:2]] == [True, False]
    assert sum(isinstance(each, MakeSamples) for each in engine.works) == 1
    batches = [item.run for item in engine.items if isinstance(item, Item)]
    assert len(batches) == 3 * 3 + 2
    assert batches != sorted(batches)  # the second scale was begun before the first was over


def test_in_this_process_results_come_early(networks: Networks, reference: Path, tmp_path: Path) -> None:
    there: dict[int, list[float]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage == STAGE:
            assert total == 60
            file = tmp_path / "s" / "results.json"
            points = Sweep.from_json(file.read_text()).points if file.exists() else ()
            there[done] = [point.scale for point in points]

    swept(networks, reference, tmp_path / "s", progress=progress)
    assert [there[done] for done in (20, 22, 40, 42)] == [[], [0], [0], [0, 4]]


def test_only_one_process_sweeps_into_a_folder(networks: Networks, reference: Path, tmp_path: Path) -> None:
    (tmp_path / "s" / "scale-4.0").mkdir(parents=True)
    for lock, match in (("lock", "sweeping into"), ("scale-4.0/lock", "sampling into .*scale-4.0")):
        with exclusive_lock(tmp_path / "s" / lock, "testing"), pytest.raises(OutputError, match=match):
            swept(networks, reference, tmp_path / "s")
    assert not list((tmp_path / "s").rglob("*.npz"))


def test_command_killed_and_repeated(
    reference: Path, tmp_path: Path, run: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExtractorSetup, "extractor", lambda self, network="inception": Pixels())
    model = small_networks.write(tmp_path, "unet", "diffusion")
    classifier = small_networks.write(tmp_path, "classifier", "classifier", seed=1)
    arguments = [
        *("sweep", "--model", model, "--classifier", classifier, "--scales", "0,30", "-n", 24),
        *("--respacing", "20", "--shard-size", 2, "--reference", reference, "--name", "small"),
    ]
    code = (
        "import sys, torch\ntorch.set_num_threads(1)\n"
        # Killed in the second scale, while its second shard gets its name.
        "import os, signal\nrenamed = []\n"
        "def kill(event, arguments):\n"
        "    if event == 'os.rename' and 'scale-30.0/shards' in str(arguments[1]):\n"
        "        renamed.append(arguments)\n"
        "        if len(renamed) == 2:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.addaudithook(kill)\n"
        "from evalkit.cli.options import ExtractorSetup\nfrom evalkit.extractors.pixels import Pixels\n"
        "Pixels.network = 'inception'\nExtractorSetup.extractor = lambda self, network=None: Pixels()\n"
        "from evalkit.cli.root import main\nmain()"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments), "--out", str(tmp_path / "s")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("s/scale-30.0/shards/*.npz")] == ["000000.npz"]
    assert (tmp_path / "s" / "scale-0.0" / "comparison.json").exists()
    result = run(*arguments, "--out", tmp_path / "s")
    once = run(*arguments, "--out", tmp_path / "once")
    assert result.code == once.code == 0
    for scale in ("0.0", "30.0"):
        name = f"scale-{scale}/samples_24x8x8x3.npz"
        a, b = (np.load(tmp_path / folder / name)["arr_0"] for folder in ("s", "once"))
        np.testing.assert_array_equal(a, b)
    tables = [
        [line.split() for line in text.splitlines() if not line.startswith(("warning", "next"))]
        for text in (result.out, once.out)
    ]
    assert tables[0][0] == ["scale", "FID", "sFID", "Inception", "Score", "Precision", "Recall"]
    # FID has no error bars, because 24 images have a singular covariance.
    assert [row[0] for row in tables[0][1:]] == ["0", "30", "±:", "FID:"]
    assert tables[0] == tables[1]
    assert "warning: " in result.out  # 24 images are few
    assert json.loads((tmp_path / "s" / "results.json").read_text())["name"] == "small"
    optional("matplotlib", "plot")
    drawn = run("curves", tmp_path / "s", "-o", tmp_path / "curves.png")
    assert drawn.code == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({option: ""}, option) for option in ("--scales", "--reference", "--name", "--protocol")),
        *(
            ({option: ""}, option)
            for option in ("--precision", "--extractor-precision", "--weights", "--classes", "--out")
        ),
        ({"--scales": "0,high"}, "--scales '0,high' are not numbers"),
        ({"--reference": "nowhere.npz"}, "nowhere.npz: there is no such file"),
        ({"--classifier": None}, "Guidance needs a classifier"),
        ({"-n": "0"}, "0 samples"),
        ({"--protocol": "other"}, "Unknown protocol 'other'"),
    ],
)
def test_bad_input(
    reference: Path,
    tmp_path: Path,
    run: Invoke,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str | None],
    message: str,
) -> None:
    monkeypatch.setattr(ExtractorSetup, "extractor", lambda self, network="inception": Pixels())
    options: dict[str, Any] = {
        "--model": small_networks.write(tmp_path, "unet", "diffusion"),
        "--classifier": small_networks.write(tmp_path, "classifier", "classifier", seed=1),
        "--scales": "0,2",
        "-n": "8",
        "--respacing": "2",
        "--reference": reference,
        "--out": tmp_path / "s",
    }
    given = [part for option in (options | changes).items() if option[1] is not None for part in option]
    result = run("sweep", *given)
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "s").exists()
