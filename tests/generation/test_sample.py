"""The sampling run: bytes that depend on settings alone, whatever happens to the workers; and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sampling_runs import SETTINGS, Messages, images_of, interrupting, load, sampled, with_prediction
from small_networks import CLASSES, SIZE

from evalkit.errors import EvalkitError, InputError, OutputError
from evalkit.images import open_images
from generation import sample as sampling
from generation import shards
from generation.batch import Networks
from generation.noise import random_labels
from generation.precision_check import check_precision
from generation.shards import ShardFolder

pytestmark = pytest.mark.usefixtures("one_thread")

# ------------------------------------------------------------------------------------------ the final file


def test_the_final_file(expected: Path, networks: Networks) -> None:
    assert expected.name == f"samples_7x{SIZE}x{SIZE}x3.npz"
    assert sorted(path.name for path in expected.parent.iterdir()) == [
        "lock",
        "manifest.json",
        expected.name,
    ]
    source = open_images(expected)
    assert source.shape == (SIZE, SIZE, 3)
    assert (source.labels == random_labels(0, 7, CLASSES)).all()
    with np.load(expected, allow_pickle=False) as file:  # as the reference evaluator opens it
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_1"].dtype == np.int64
        provenance = json.loads(str(file["provenance"]))
    assert provenance["settings"]["scale"] == 30
    assert provenance["networks"]["model_sha256"] == networks.diffusion.digest
    assert provenance["networks"]["classifier_sha256"] == networks.classifier.digest  # type: ignore[union-attr]
    assert provenance["made_with"][0]["torch"] == torch.__version__
    assert images_of(expected).std() > 10


def test_running_again_changes_nothing(expected: Path, networks: Networks) -> None:
    before = expected.read_bytes(), expected.stat().st_mtime_ns
    assert sampled(SETTINGS, networks, expected.parent, batch_size=2) == expected
    assert (expected.read_bytes(), expected.stat().st_mtime_ns) == before


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_moves_samples_by_rounding_only(
    batch_size: int, expected: Path, networks: Networks, tmp_path: Path
) -> None:
    other = sampled(SETTINGS, networks, tmp_path / "run", batch_size=batch_size)
    assert np.abs(images_of(other) - images_of(expected)).max() <= 1


def test_shard_size_moves_samples_by_rounding_only(
    expected: Path, networks: Networks, tmp_path: Path
) -> None:
    other = sampled(replace(SETTINGS, shard_size=5), networks, tmp_path / "run")
    assert np.abs(images_of(other) - images_of(expected)).max() <= 1


def test_seed_and_scale_change_samples(expected: Path, networks: Networks, tmp_path: Path) -> None:
    for name, changed in (("seed", replace(SETTINGS, seed=1)), ("scale", replace(SETTINGS, scale=0.0))):
        other = sampled(replace(changed, classes="random"), networks, tmp_path / name, batch_size=2)
        assert np.abs(images_of(other) - images_of(expected)).max() > 5


def test_it_opens_in_compare(
    expected: Path, pixels: object, run: Callable[..., Any], networks: Networks, tmp_path: Path
) -> None:
    other = sampled(replace(SETTINGS, seed=5), networks, tmp_path / "run")
    result = run("compare", expected, other)
    assert result.code == 0
    assert "FID" in result.out


def test_unconditional_models_have_no_labels_unless_guided(files: dict[str, Path], tmp_path: Path) -> None:
    unconditional = load(files, "unconditional", "classifier")
    plain = sampled(replace(SETTINGS, scale=0.0), unconditional, tmp_path / "plain")
    guided = sampled(SETTINGS, unconditional, tmp_path / "guided")
    assert open_images(plain).labels is None
    assert (open_images(guided).labels == random_labels(0, 7, CLASSES)).all()
    assert np.abs(images_of(plain) - images_of(guided)).max() > 5
    # At scale 0 the classifier is left aside, also in what is recorded.
    assert "classifier" not in json.loads((tmp_path / "plain" / "manifest.json").read_text())["networks"]


# ------------------------------------------------------------------------------------ death and interruption


@pytest.fixture(scope="module")
def scenario(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    folder = tmp_path_factory.mktemp("deaths")
    for name in ("unet", "classifier"):
        (folder / f"{name}.safetensors").symlink_to(files[name])

    def play(name: str) -> Any:
        script = Path(__file__).parents[1] / "support" / "sampling_deaths.py"
        done = subprocess.run(
            [sys.executable, script, name, folder],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return json.loads(done.stdout)

    return play


def test_killed_at_random_moments_gives_the_same_bytes(scenario: Callable[[str], Any]) -> None:
    found = scenario("at_random")
    assert found["kills"] >= 3
    assert found["code"] == found["alone"] == 0
    assert found["sha256"]["killed"] == found["sha256"]["alone"]


def test_killed_at_the_worst_moments_gives_the_same_bytes(scenario: Callable[[str], Any]) -> None:
    found = scenario("at_the_worst")
    assert found["codes"] == [-signal.SIGKILL] * 9
    assert found["code"] == found["alone"] == 0
    assert found["sha256"]["worst"] == found["sha256"]["alone"]
    assert found["files"] == ["lock", "manifest.json", f"samples_16x{SIZE}x{SIZE}x3.npz"]


def stored(out: Path) -> list[str]:
    return sorted(path.stem for path in (out / "shards").iterdir())


def test_interrupt_finishes_the_batch(
    expected: Path, networks: Networks, tmp_path: Path, messages: Messages
) -> None:
    out, before = tmp_path / "run", signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        sampling.run(SETTINGS, networks, out, batch_size=2, progress=interrupting(1, 3.5))
    assert stored(out) == ["000000_0-2", "000000_2-3", "000001_0-2"]
    assert "finishing the current batches" in messages()[-1]
    assert signal.getsignal(signal.SIGINT) is before
    assert sampled(SETTINGS, networks, out, batch_size=2).read_bytes() == expected.read_bytes()


def test_second_interrupt_stops_at_once(expected: Path, networks: Networks, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        sampled(SETTINGS, networks, out, batch_size=2, progress=interrupting(2, 3.5))
    assert stored(out) == ["000000_0-2", "000000_2-3"]
    assert sampled(SETTINGS, networks, out, batch_size=2).read_bytes() == expected.read_bytes()


def broken(*_: object) -> None:
    raise OutputError("broken")


@pytest.mark.parametrize("damage", ["flipped", "truncated", "swapped"])
def test_damaged_shards_are_found_and_made_again(
    damage: str,
    expected: Path,
    networks: Networks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    messages: Messages,
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(ShardFolder, "_write_final", broken)
    with pytest.raises(OutputError, match="broken"):
        sampled(SETTINGS, networks, out, batch_size=2)
    monkeypatch.undo()
    first, second = out / "shards" / "000000_0-2.npz", out / "shards" / "000001_0-2.npz"
    content = bytearray(first.read_bytes())
    if damage == "flipped":
        content[len(content) // 3] ^= 1
    first.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    if damage == "swapped":  # whole in itself, of another run
        with np.load(second) as file:
            arrays = dict(file)
        arrays["images"] = arrays["images"] ^ 1
        np.savez(first, **arrays)
    path = sampled(SETTINGS, networks, out, batch_size=2)
    assert path.read_bytes() == expected.read_bytes()
    assert "Damaged shards were found; they are made again." in messages()


def test_merging_takes_the_memory_of_a_shard(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from generation.shards import ShardFolder
random, shape = np.random.default_rng(0), (1200, 256, 256, 3)
with ShardFolder.open(Path(sys.argv[1]), identity={}, made_with={}, shape=shape, shard_size=64) as folder:
    for piece in folder.missing(64):
        folder.save(piece, random.integers(0, 256, (piece.end - piece.begin, *shape[1:]), np.uint8), {})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert folder.merge(np.arange(1200))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, folder.final.stat().st_size)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True, check=True
    )
    growth, size = map(int, done.stdout.split())
    assert size > 200e6
    assert growth * 1024 < 30e6


# ----------------------------------------------------------------------------------------- what goes wrong


def test_other_settings_are_refused_by_name(files: dict[str, Path], expected: Path) -> None:
    for changed, message in (
        (replace(SETTINGS, scale=2.0), "settings.scale was 30.0 and is now 2.0"),
        (replace(SETTINGS, seed=9), "settings.seed was 0 and is now 9; labels_sha256 was "),
        (replace(SETTINGS, guidance_timesteps=(0, 500)), "settings.guidance_timesteps was null"),
    ):
        with pytest.raises(InputError, match=message):
            sampled(changed, load(files), expected.parent)
    with pytest.raises(InputError, match=r"networks.model was \"unet\" and is now \"unconditional\""):
        sampled(SETTINGS, load(files, "unconditional"), expected.parent)


def test_folders_of_other_versions_are_refused(expected: Path, networks: Networks, tmp_path: Path) -> None:
    manifest = json.loads((expected.parent / "manifest.json").read_text())
    manifest["format"] = "evalkit samples 1"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="another version of evalkit: its format is 'evalkit samples 1'"):
        sampled(SETTINGS, networks, tmp_path / "run")


def test_other_versions_are_noted(networks: Networks, tmp_path: Path, messages: Messages) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        sampled(SETTINGS, networks, out, batch_size=3, progress=interrupting(1, 1))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["begun_with"]["torch"] = "1.0"
    (out / "manifest.json").write_text(json.dumps(manifest))
    path = sampled(SETTINGS, networks, out, batch_size=2)
    notes = " ".join(messages())
    assert "batch_size was 3 and is now 2" in notes
    assert 'torch was "1.0" and is now' in notes
    with np.load(path) as file:  # and what was so is told
        made_with = json.loads(str(file["provenance"]))["made_with"]
    assert [made["batch_size"] for made in made_with] == [2, 3]


def test_a_folder_that_is_none_of_ours(networks: Networks, tmp_path: Path) -> None:
    (tmp_path / "run" / "shards").mkdir(parents=True)
    (tmp_path / "run" / "shards" / "000000.npz").touch()
    with pytest.raises(InputError, match=r"no manifest\.json"):
        sampled(SETTINGS, networks, tmp_path / "run")
    (tmp_path / "run" / "manifest.json").write_text("{ half")
    with pytest.raises(InputError, match="cannot be read"):
        sampled(SETTINGS, networks, tmp_path / "run")
    with pytest.raises(OutputError, match="parent"):
        sampled(SETTINGS, networks, tmp_path / "not" / "there")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        sampled(SETTINGS, networks, tmp_path / "file")


def test_no_space_is_said_before_the_work(
    networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shards.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    out = tmp_path / "run"
    with pytest.raises(OutputError, match=r"needs .* GB, and .* has 0\.00 GB free"):
        sampled(SETTINGS, networks, out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(OutputError, match=r"needs .* GB, and .* has 0\.00 GB free"):
        sampled(SETTINGS, networks, out)
    # What a killed process left of the final file is removed first.
    partial = out / f".samples_7x{SIZE}x{SIZE}x3.npz.123.partial"
    partial.write_bytes(bytes(10_000))
    monkeypatch.setattr(
        shards.shutil, "disk_usage", lambda _: usage._replace(free=1000 if partial.exists() else 11_000)
    )
    assert sampled(SETTINGS, networks, out).exists()
    assert not list(out.glob(".*"))


def test_more_than_the_disk_holds_is_refused_before_memory_is_taken(
    networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shards.shutil.disk_usage(tmp_path)._replace(total=10**11, free=10**9)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(sampling, "choose_labels", lambda *_: pytest.fail("classes were chosen"))
    with pytest.raises(OutputError, match=r"run, .* needs 3\.84 GB, and .* has 1\.00 GB free"):
        sampled(replace(SETTINGS, count=10**7), networks, tmp_path / "run")
    with pytest.raises(OutputError, match=r"needs 824\.63 GB, and .* has 100\.00 GB free"):
        sampled(replace(SETTINGS, count=2**32 - 1), networks, tmp_path)
    with pytest.raises(InputError, match=r"4,294,967,295 samples \(-n\) in one batch"):
        check_precision(replace(SETTINGS, count=2**32 - 1), networks, networks)
    assert not (tmp_path / "run").exists()


def test_out_of_memory_halves_the_batch(
    expected: Path, networks: Networks, tmp_path: Path, messages: Messages
) -> None:
    def small_device(output: torch.Tensor) -> torch.Tensor:
        if len(output) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return output

    path = sampled(SETTINGS, with_prediction(networks, small_device), tmp_path / "run")
    assert sum("out of memory: continuing with 2 images per batch" in text for text in messages()) == 1
    assert np.array_equal(images_of(path), images_of(expected))


def test_too_little_memory_for_one(networks: Networks, tmp_path: Path) -> None:
    def no_device(output: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(EvalkitError, match="too little memory for a single sample"):
        sampled(SETTINGS, with_prediction(networks, no_device), tmp_path / "run")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_are_an_error(value: float, networks: Networks, tmp_path: Path) -> None:
    def overflow(output: torch.Tensor) -> torch.Tensor:
        output[1, 0, 2, 2] = value  # the second of every batch
        return output

    with pytest.raises(
        EvalkitError, match=r"Sample 1 \(counted from 0\) is not finite.*--precision reference"
    ):
        sampled(SETTINGS, with_prediction(networks, overflow), tmp_path / "run")
    assert not list((tmp_path / "run" / "shards").iterdir())
