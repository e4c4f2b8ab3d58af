"""The sampling run: bytes that depend on settings alone, whatever happens to the workers; and bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_networks
import torch
from numpy.typing import NDArray
from PIL import Image
from small_networks import CLASSES, SIZE

from evalkit.errors import EvalkitError, InputError, OutputError
from evalkit.images import open_images
from generation import sample as sampling
from generation import shards
from generation.batch import Networks, pick_device
from generation.checkpoints import load_network
from generation.cost import describe_cost, flop, gradient_flop, prediction_flop
from generation.drift import measure
from generation.networks.upsampler import Upsampler
from generation.noise import Streams, random_labels
from generation.presets import MODELS, SAMPLING
from generation.samplers import ddim, to_uint8
from generation.schedule import make_schedule
from generation.settings import Settings, choose_labels
from generation.shards import ShardFolder

SETTINGS = Settings(count=7, scale=30.0, respacing="4", shard_size=3)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """As torchrun has it, so that all give the same bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("networks")
    write = small_networks.write
    return {
        "unet": write(folder, "unet", "diffusion"),
        "classifier": write(folder, "classifier", "classifier", seed=1),
        "unconditional": write(folder, "unconditional", "diffusion", num_classes=None, seed=2),
        "upsampler": write(folder, "upsampler", "upsampler", image_size=16, low_res_size=SIZE, seed=3),
    }


def load(files: dict[str, Path], model: str = "unet", classifier: str | None = "classifier") -> Networks:
    return Networks.prepare(
        load_network(files[model]),
        load_network(files[classifier]) if classifier else None,
        mode="reference",
        device=torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def networks(files: dict[str, Path]) -> Networks:
    return load(files)


@pytest.fixture(scope="module")
def expected(networks: Networks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of SETTINGS, sampled without any trouble, two at a time."""
    return silent(SETTINGS, networks, tmp_path_factory.mktemp("expected") / "run", batch_size=2)


def silent(settings: Settings, networks: Networks, out: Path, **options: Any) -> Path:
    return sampling.run(settings, networks, out, **{"say": lambda text: None, **options})


def images_of(path: Path) -> NDArray[np.int16]:
    with np.load(path) as file:
        return file["arr_0"].astype(np.int16)


# ------------------------------------------------------------------------------------------ the final file


def test_the_final_file(expected: Path, networks: Networks) -> None:
    assert expected.name == f"samples_7x{SIZE}x{SIZE}x3.npz"
    assert sorted(path.name for path in expected.parent.iterdir()) == [
        "claims.lock",
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
    assert silent(SETTINGS, networks, expected.parent, batch_size=2) == expected
    assert (expected.read_bytes(), expected.stat().st_mtime_ns) == before


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_moves_samples_by_rounding_only(
    batch_size: int, expected: Path, networks: Networks, tmp_path: Path
) -> None:
    other = silent(SETTINGS, networks, tmp_path / "run", batch_size=batch_size)
    assert np.abs(images_of(other) - images_of(expected)).max() <= 1


def test_shard_size_moves_samples_by_rounding_only(
    expected: Path, networks: Networks, tmp_path: Path
) -> None:
    other = silent(replace(SETTINGS, shard_size=5), networks, tmp_path / "run")
    assert np.abs(images_of(other) - images_of(expected)).max() <= 1


def test_seed_and_scale_change_samples(expected: Path, networks: Networks, tmp_path: Path) -> None:
    for name, changed in (("seed", replace(SETTINGS, seed=1)), ("scale", replace(SETTINGS, scale=0.0))):
        other = silent(replace(changed, classes="random"), networks, tmp_path / name, batch_size=2)
        assert np.abs(images_of(other) - images_of(expected)).max() > 5


def test_it_opens_in_compare(
    expected: Path, pixels: object, run: Callable[..., Any], networks: Networks, tmp_path: Path
) -> None:
    other = silent(replace(SETTINGS, seed=5), networks, tmp_path / "run")
    result = run("compare", expected, other)
    assert result.code == 0
    assert "FID" in result.out


def test_unconditional_models_have_no_labels_unless_guided(files: dict[str, Path], tmp_path: Path) -> None:
    unconditional = load(files, "unconditional", "classifier")
    plain = silent(replace(SETTINGS, scale=0.0), unconditional, tmp_path / "plain")
    guided = silent(SETTINGS, unconditional, tmp_path / "guided")
    assert open_images(plain).labels is None
    assert (open_images(guided).labels == random_labels(0, 7, CLASSES)).all()
    assert np.abs(images_of(plain) - images_of(guided)).max() > 5
    # At scale 0 the classifier is left aside, also in what is recorded.
    assert "classifier" not in json.loads((tmp_path / "plain" / "manifest.json").read_text())["networks"]


# ---------------------------------------------------------------------------------- many workers, and death


@pytest.fixture(scope="module")
def scenario(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    folder = tmp_path_factory.mktemp("workers")
    for name in ("unet", "classifier"):
        (folder / f"{name}.safetensors").symlink_to(files[name])

    def play(name: str) -> Any:
        script = Path(__file__).parents[1] / "support" / "sampling_workers.py"
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
    found = scenario("killed_at_random")
    assert found["kills"] >= 3
    assert found["code"] == found["alone"] == 0
    assert found["sha256"]["killed"] == found["sha256"]["alone"]


def test_killed_at_the_worst_moments_gives_the_same_bytes(scenario: Callable[[str], Any]) -> None:
    found = scenario("killed_at_the_worst")
    assert found["codes"] == [-signal.SIGKILL] * 9
    assert found["code"] == found["alone"] == 0
    assert found["sha256"]["worst"] == found["sha256"]["alone"]
    assert found["files"] == ["claims.lock", "manifest.json", f"samples_16x{SIZE}x{SIZE}x3.npz"]


def test_two_workers_give_the_same_bytes_and_take_over(scenario: Callable[[str], Any]) -> None:
    found = scenario("two")
    assert found["codes"] == [0, 0]
    assert found["made"] == list(range(6))  # every shard once
    assert found["waited"]  # for the shard that a halted worker still held
    assert found["left"] == [0, 1]  # the one that was made before, and that one
    assert found["bereft"] == [-signal.SIGKILL, 0]
    assert found["sha256"]["two"] == found["sha256"]["bereft"] == found["sha256"]["alone"]


def test_torchrun(files: dict[str, Path], expected: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"),
        *("-m", "evalkit", "sample", "--model", files["unet"], "--classifier", files["classifier"]),
        *("-n", "7", "--scale", "30", "--respacing", "4", "--shard-size", "3", "--batch-size", "2"),
        *("--out", tmp_path / "run", "--grid", tmp_path / "grid.png"),
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("samples") == 2  # of the first worker alone: the file's name, and the count
    assert (tmp_path / "run" / expected.name).read_bytes() == expected.read_bytes()
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.mode == "RGB"


def interrupting(times: int, at: float) -> Callable[[float, int], None]:
    """Progress that presses Ctrl-C, once ``at`` samples are done."""
    pressed: list[bool] = []

    def progress(done: float, total: int) -> None:
        if done >= at and not pressed:
            pressed.append(True)
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    return progress


def test_interrupt_finishes_the_shard(expected: Path, networks: Networks, tmp_path: Path) -> None:
    told: list[str] = []
    out, before = tmp_path / "run", signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        sampling.run(SETTINGS, networks, out, batch_size=2, progress=interrupting(1, 3.5), say=told.append)
    assert sorted(path.name for path in (out / "shards").iterdir()) == ["000000.npz", "000001.npz"]
    assert "finishing the shard" in told[-1]
    assert signal.getsignal(signal.SIGINT) is before
    assert silent(SETTINGS, networks, out, batch_size=2).read_bytes() == expected.read_bytes()


def test_second_interrupt_stops_at_once(expected: Path, networks: Networks, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        silent(SETTINGS, networks, out, batch_size=2, progress=interrupting(2, 3.5))
    assert [path.name for path in (out / "shards").iterdir()] == ["000000.npz"]
    assert silent(SETTINGS, networks, out, batch_size=2).read_bytes() == expected.read_bytes()


def broken(*_: object) -> None:
    raise OutputError("broken")


@pytest.mark.parametrize("damage", ["flipped", "truncated", "swapped"])
def test_damaged_shards_are_found_and_made_again(
    damage: str, expected: Path, networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told = tmp_path / "run", list[str]()
    monkeypatch.setattr(ShardFolder, "_write_final", broken)
    with pytest.raises(OutputError, match="broken"):
        silent(SETTINGS, networks, out, batch_size=2)
    monkeypatch.undo()
    first, second = out / "shards" / "000000.npz", out / "shards" / "000001.npz"
    content = bytearray(first.read_bytes())
    if damage == "flipped":
        content[len(content) // 3] ^= 1
    first.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    if damage == "swapped":  # whole in itself, of another run
        with np.load(second) as file:
            arrays = dict(file)
        arrays["images"] = arrays["images"] ^ 1
        np.savez(first, **arrays)
    path = sampling.run(SETTINGS, networks, out, batch_size=2, say=told.append)
    assert path.read_bytes() == expected.read_bytes()
    assert "Damaged shards were found; they are made again." in told


def test_merging_takes_the_memory_of_a_shard(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from generation.shards import ShardFolder
random, shape = np.random.default_rng(0), (1200, 256, 256, 3)
with ShardFolder.open(Path(sys.argv[1]), identity={}, made_with={}, shape=shape, shard_size=64) as folder:
    for shard in folder.claims():
        folder.save(shard, random.integers(0, 256, (shard.end - shard.begin, *shape[1:]), np.uint8), {})
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
            silent(changed, load(files), expected.parent)
    with pytest.raises(InputError, match=r"networks.model was \"unet\" and is now \"unconditional\""):
        silent(SETTINGS, load(files, "unconditional"), expected.parent)


def test_other_versions_are_noted(expected: Path, networks: Networks, tmp_path: Path) -> None:
    out, told = tmp_path / "run", list[str]()
    with pytest.raises(KeyboardInterrupt):
        silent(SETTINGS, networks, out, batch_size=3, progress=interrupting(1, 1))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["begun_with"]["torch"] = "1.0"
    (out / "manifest.json").write_text(json.dumps(manifest))
    path = sampling.run(SETTINGS, networks, out, batch_size=2, say=told.append)
    notes = " ".join(told)
    assert "batch_size was 3 and is now 2" in notes
    assert 'torch was "1.0" and is now' in notes
    with np.load(path) as file:  # and what was so is told
        made_with = json.loads(str(file["provenance"]))["made_with"]
    assert [made["batch_size"] for made in made_with] == [2, 3]


def test_a_folder_that_is_none_of_ours(networks: Networks, tmp_path: Path) -> None:
    (tmp_path / "run" / "shards").mkdir(parents=True)
    (tmp_path / "run" / "shards" / "000000.npz").touch()
    with pytest.raises(InputError, match=r"no manifest\.json"):
        silent(SETTINGS, networks, tmp_path / "run")
    (tmp_path / "run" / "manifest.json").write_text("{ half")
    with pytest.raises(InputError, match="cannot be read"):
        silent(SETTINGS, networks, tmp_path / "run")
    with pytest.raises(OutputError, match="parent"):
        silent(SETTINGS, networks, tmp_path / "not" / "there")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        silent(SETTINGS, networks, tmp_path / "file")


def test_no_space_is_said_before_the_work(
    networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shards.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    out = tmp_path / "run"
    with pytest.raises(OutputError, match=r"needs .* GB more.* has 0\.00 GB free"):
        silent(SETTINGS, networks, out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(OutputError, match=r"needs .* GB more.* has 0\.00 GB free"):
        silent(SETTINGS, networks, out)
    # What a killed worker left of the final file will be removed.
    (out / f".samples_7x{SIZE}x{SIZE}x3.npz.123.partial").write_bytes(bytes(10_000))
    assert silent(SETTINGS, networks, out).exists()
    assert not list(out.glob(".*"))


def test_more_than_the_disk_holds_is_refused_before_memory_is_taken(
    networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shards.shutil.disk_usage(tmp_path)._replace(total=10**11, free=10**9)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(sampling, "choose_labels", lambda *_: pytest.fail("classes were chosen"))
    with pytest.raises(OutputError, match=r"run needs 3\.84 GB more, .* has 1\.00 GB free"):
        silent(replace(SETTINGS, count=10**7), networks, tmp_path / "run")
    with pytest.raises(OutputError, match=r"needs 824\.63 GB more, .* has 100\.00 GB free"):
        silent(replace(SETTINGS, count=2**32 - 1), networks, tmp_path)
    with pytest.raises(InputError, match=r"4,294,967,295 samples \(-n\) in one batch"):
        measure(replace(SETTINGS, count=2**32 - 1), networks, networks)
    assert not (tmp_path / "run").exists()


def test_no_locks(networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(shards.fcntl, "lockf", lockf)
    with pytest.raises(OutputError, match="no file locks"):
        silent(SETTINGS, networks, tmp_path / "run")


def with_prediction(networks: Networks, change: Callable[[torch.Tensor], torch.Tensor]) -> Networks:
    """Networks whose predictions are changed on their way."""
    return replace(networks, predict=Changed(networks.predict, change))


class Changed:
    def __init__(self, original: Any, change: Callable[[torch.Tensor], torch.Tensor]):
        self.original, self.change, self.description = original, change, original.description

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.change(self.original(x, *args, **kwargs))


def test_out_of_memory_halves_the_batch(expected: Path, networks: Networks, tmp_path: Path) -> None:
    def small_device(output: torch.Tensor) -> torch.Tensor:
        if len(output) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return output

    told: list[str] = []
    device = with_prediction(networks, small_device)
    path = sampling.run(SETTINGS, device, tmp_path / "run", say=told.append)
    assert sum("out of memory: going on with 2 at a time" in text for text in told) == 1
    assert np.array_equal(images_of(path), images_of(expected))


def test_too_little_memory_for_one(networks: Networks, tmp_path: Path) -> None:
    def no_device(output: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(EvalkitError, match="too little memory for a single sample"):
        silent(SETTINGS, with_prediction(networks, no_device), tmp_path / "run")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_are_an_error(value: float, networks: Networks, tmp_path: Path) -> None:
    def overflow(output: torch.Tensor) -> torch.Tensor:
        output[1, 0, 2, 2] = value  # the second of every batch
        return output

    with pytest.raises(EvalkitError, match=r"Sample 1 \(counted from 0\) is not finite.*--mode reference"):
        silent(SETTINGS, with_prediction(networks, overflow), tmp_path / "run")
    assert not list((tmp_path / "run" / "shards").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "0 samples"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**64}, "seed"),
        ({"scale": float("nan")}, "scale nan"),
        ({"scale": float("inf")}, "scale inf"),
        ({"sampler": "euler"}, "'euler'; expected ddpm, ddim, dpm-solver"),
        ({"sampler": "ddim", "eta": 1.5}, "eta 1.5"),
        ({"eta": 0.5}, "eta is for ddim"),
        ({"thresholding": "soft"}, "'soft'"),
        ({"thresholding": "dynamic"}, "dynamic thresholding is for dpm-solver"),
        ({"guidance_timesteps": (500, 200)}, "from timestep 500 to 200"),
        ({"shard_size": 0}, "shard-size 0"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(SETTINGS, **changes)


def test_labels(tmp_path: Path) -> None:
    def labels(classes: str | None, count: int = 12) -> list[int]:
        found = choose_labels(replace(SETTINGS, count=count, classes=classes), CLASSES)
        assert found is not None
        assert found.dtype == np.int64
        return found.tolist()

    assert labels(None) == labels("random") == random_labels(0, 12, CLASSES).tolist()
    assert labels("balanced") == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert labels("7") == [7] * 12
    np.save(tmp_path / "classes.npy", np.arange(5, dtype=np.int32))
    (tmp_path / "classes.txt").write_text("3\n1\n4\n1\n5\n")
    assert labels(str(tmp_path / "classes.npy"), 5) == [0, 1, 2, 3, 4]
    assert labels(str(tmp_path / "classes.txt"), 5) == [3, 1, 4, 1, 5]
    assert choose_labels(SETTINGS, None) is None
    for classes, message in (
        ("10", "class 10 is out of range: there are 0 to 9"),
        ("-1", "class -1 is out of range"),
        (str(tmp_path / "classes.npy"), "expected 12 integers"),
        ("mammals", "Give random, balanced"),
        ("9" * 22, r"--classes: class \d+ is out of range"),
        ("-" + "9" * 5000, r"--classes: class -\d+ is out of range"),
    ):
        with pytest.raises(InputError, match=message):
            labels(classes)
    np.save(tmp_path / "floats.npy", np.arange(12) / 2)
    np.save(tmp_path / "objects.npy", np.array([{}] * 12))
    np.save(tmp_path / "large.npy", np.full(12, 10**19, np.uint64))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "classes.npy").read_bytes()[:40])
    (tmp_path / "words.txt").write_text("dog\n" * 12)
    (tmp_path / "floats.txt").write_text("1.7\n" * 12)
    (tmp_path / "large.txt").write_text("10000000000000000000\n" * 12)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bytes.txt").write_bytes(bytes(range(256)))
    names = "floats.npy objects.npy large.npy cut.npy words.txt floats.txt large.txt empty.txt bytes.txt"
    for name in names.split():
        with pytest.raises(InputError, match=name):
            labels(str(tmp_path / name))
    with pytest.raises(InputError, match=r"line 1 has '1\.7'"):
        labels(str(tmp_path / "floats.txt"))
    with pytest.raises(InputError, match="none and is not guided"):
        choose_labels(replace(SETTINGS, classes="3"), None)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_class_files_of_any_editor(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes("# digits\r\n3\r\n1  # é\r\n\r\n4".encode(encoding))
    found = choose_labels(replace(SETTINGS, count=3, classes=str(path)), CLASSES)
    assert found is not None
    assert found.tolist() == [3, 1, 4]


def test_networks_that_do_not_go_together(files: dict[str, Path], tmp_path: Path) -> None:
    for name, changes, message in (
        ("large", {"image_size": 16}, "image size is 16, the model's 8"),
        ("many", {"out_channels": 12}, "number of classes is 12, the model's 10"),
        ("cosine", {"noise_schedule": "cosine"}, "noise schedule is cosine, the model's linear"),
    ):
        other = small_networks.write(tmp_path, name, "classifier", **changes)
        with pytest.raises(InputError, match=message):
            load({**files, name: other}, "unet", name)
    with pytest.raises(InputError, match="no classifier"):
        load(files, "unet", "unconditional")
    with pytest.raises(InputError, match="is a classifier"):
        load(files, "classifier", None)
    with pytest.raises(InputError, match="without a classifier"):
        silent(SETTINGS, load(files, "unet", None), tmp_path / "run")
    with pytest.raises(InputError, match="evalkit upsample"):
        silent(replace(SETTINGS, scale=0.0), load(files, "upsampler", None), tmp_path / "run")
    with pytest.raises(InputError, match="A batch of 0"):
        silent(SETTINGS, load(files), tmp_path / "run", batch_size=0)
    assert not (tmp_path / "run").exists()


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tpu", "cuda:99", "meta", "privateuseone"):
        with pytest.raises(InputError, match=name):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device() == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_RANK", "5")  # more workers than GPUs
    assert pick_device() == torch.device("cuda", 1)


# ------------------------------------------------------------------------------------------------ upsampling


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("base") / "base.npz"
    images = random.integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    np.savez(path, arr_0=images, arr_1=np.array([3, 1, 4, 1, 5]))
    return path


UPSAMPLING = Settings(count=5, sampler="ddim", respacing="ddim4", shard_size=2)


def test_upsampling_is_ddim_by_hand(files: dict[str, Path], base: Path, tmp_path: Path) -> None:
    path = silent(UPSAMPLING, load(files, "upsampler", None), tmp_path / "run", base=open_images(base))
    assert path.name == "samples_5x16x16x3.npz"
    source = open_images(path)
    assert source.labels is not None
    assert source.labels.tolist() == [3, 1, 4, 1, 5]
    network = load_network(files["upsampler"]).network
    assert isinstance(network, Upsampler)
    with np.load(base) as file:
        low_res = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1
        y = torch.from_numpy(file["arr_1"])
    noise = Streams(0, range(5), (3, 16, 16), torch.device("cpu"))
    x = ddim(
        lambda x, t: network(x, torch.full((5,), t), y, low_res=low_res),
        noise.start(),
        make_schedule("linear", 1000, "ddim4"),
        noise,
    )
    assert np.abs(to_uint8(x).astype(np.int16) - images_of(path)).max() <= 1


def test_upsampling_bad_input(files: dict[str, Path], base: Path, tmp_path: Path) -> None:
    upsampler = load(files, "upsampler", None)

    def fails(match: str, source: Any, networks: Networks = upsampler) -> None:
        with pytest.raises(InputError, match=match):
            silent(UPSAMPLING, networks, tmp_path / "run", base=open_images(source))

    images = np.zeros((5, SIZE, SIZE, 3), np.uint8)
    fails("no labels", images)
    fails(r"takes \(8, 8, 3\)", np.zeros((5, 9, 9, 3), np.uint8))
    fails("5 samples were asked for", images[:4])
    fails("no upsampler", base, load(files, "unet", None))
    np.savez(tmp_path / "labels.npz", arr_0=images, arr_1=np.full(5, 10))
    fails("class 10 is out of range", tmp_path / "labels.npz")


def test_upsampling_another_base_is_another_run(files: dict[str, Path], base: Path, tmp_path: Path) -> None:
    upsampler = load(files, "upsampler", None)
    silent(UPSAMPLING, upsampler, tmp_path / "run", base=open_images(base))
    with np.load(base) as file:
        np.savez(tmp_path / "other.npz", arr_0=file["arr_0"][::-1], arr_1=file["arr_1"])
    with pytest.raises(InputError, match=r"base\.sha256 was"):
        silent(UPSAMPLING, upsampler, tmp_path / "run", base=open_images(tmp_path / "other.npz"))


# -------------------------------------------------------------------------------------------- cost and drift


def test_cost_is_the_published_one() -> None:
    """Multiply-adds and totals as counted for the published models, to the digits given."""
    for name, giga in (("64x64_diffusion", 110), ("256x256_diffusion", 1120), ("128_512_upsampler", 2505)):
        assert round(prediction_flop(MODELS[name]) / 2e9) == giga
    # The gradient at the image is a forward pass and, without parameters, about another.
    assert gradient_flop(MODELS["64x64_classifier"]) / 2e9 == pytest.approx(2 * 19, rel=0.1)


def test_cost_of_a_run(networks: Networks) -> None:
    prediction, gradient = (
        prediction_flop(networks.diffusion.preset),
        gradient_flop(networks.classifier.preset),
    )  # type: ignore[union-attr]
    assert flop(SETTINGS, networks) == 7 * 4 * (prediction + gradient)
    assert flop(replace(SETTINGS, scale=0.0), networks) == 7 * 4 * prediction
    part = replace(SETTINGS, guidance_timesteps=(300, 700))  # of 0, 333, 666, 999
    assert flop(part, networks) == 7 * (4 * prediction + 2 * gradient)
    assert describe_cost(SETTINGS, networks).startswith("7 samples of 8x8, 4 steps each: ")


def test_drift_of_a_mode_from_itself_is_none(networks: Networks) -> None:
    drift = measure(SETTINGS, networks, networks)
    assert (drift.mean, drift.largest, drift.changed) == (0, 0, 0)
    assert [step.timestep for step in drift.steps] == [666, 333, 0]
    assert all(step.prediction == step.gradient == step.mean == step.largest == 0 for step in drift.steps)


def test_drift_is_the_difference_of_the_runs(networks: Networks, tmp_path: Path) -> None:
    other = with_prediction(networks, lambda output: output * 1.01)
    drift = measure(SETTINGS, networks, other)
    paths = [
        silent(SETTINGS, net, tmp_path / str(i), batch_size=7) for i, net in enumerate((networks, other))
    ]
    levels = np.abs(images_of(paths[0]) - images_of(paths[1]))
    assert drift.mean == pytest.approx(levels.mean(), abs=0.05)
    assert drift.largest == pytest.approx(levels.max(), abs=1)
    assert all(step.prediction == pytest.approx(0.01, rel=1e-3) for step in drift.steps)
    assert all(step.gradient == 0 for step in drift.steps)


# ------------------------------------------------------------------------------------------ the command line


def test_command_line(
    files: dict[str, Path], expected: Path, base: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    model = ("--model", files["unet"], "--classifier", files["classifier"], "--respacing", "4")
    result = run("sample", *model, "-n", 7, "--scale", 30, "--shard-size", 3, "--out", tmp_path / "run")
    assert result.code == 0
    assert result.out == f"{tmp_path / 'run' / expected.name}: 7 samples\n"
    assert "7 samples of 8x8, 4 steps each" in result.err
    assert re.search(r"images/s on cpu: \d:\d\d:\d\d for the rest", result.err)
    assert np.abs(images_of(tmp_path / "run" / expected.name) - images_of(expected)).max() <= 1

    result = run(
        "upsample", base, "--model", files["upsampler"], "--respacing", "ddim4", "--out", tmp_path / "up"
    )
    assert result.code == 0
    provenance = json.loads((tmp_path / "up" / "manifest.json").read_text())
    assert provenance["settings"]["sampler"] == "ddim"

    result = run("drift", *model, "-n", 2, "--mode", "fast")
    assert result.code == 0
    assert "2 images: mean difference" in result.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "imagenet9"), "no sampling preset 'imagenet9'"),
        (("--preset", "imagenet64"), "evalkit checkpoint fetch 64x64_diffusion"),
        (("--preset", "upsample-64-256"), "use `evalkit upsample`"),
        ((), "Give --preset NAME or --model FILE"),
        (("--model", "UNET", "--scale", "1"), "needs a classifier"),
        (("--model", "UNET", "--guidance-steps", "5"), "'5' is not understood"),
        (("--model", "UNET", "--batch-size", "many"), "'many'"),
        (("--model", "UNET", "--respacing", "2000"), "asks for 2000 steps"),
        (("--model", "UNET", "--mode", "quick"), "'quick'"),
        (("--model", "UNET", "--preset", "imagenet64"), "unet"),
        (("--model", "UNET", "--grid", "no/grid.png"), "no folder"),
        (("--model", "UNET", "-n", "0"), "0 samples"),
        (("--model", "UNET", "--scale", "much"), "much"),
        (("--model", "UNET", "--shard-size", "0"), "shard-size 0"),
        (("--model", "UNET", "--seed", "-1"), "seed -1"),
        (("--model", "UNET", "--classes", "9" * 22), "--classes"),
        (("--model", "UNET", "--batch-size", "9" * 5000), "--batch-size"),
        (("--model", "UNET", "--guidance-steps", f"0:{'9' * 5000}"), "--guidance-steps"),
        *(
            (("--model", "UNET", option, ""), option)
            for option in (
                *("--preset", "--model", "--classifier", "--device", "--sampler", "--eta", "--seed"),
                *("--thresholding", "--scale", "--guidance-steps", "--classes", "--out", "--mode", "--grid"),
                *("--batch-size", "--shard-size"),
            )
        ),
    ],
)
def test_command_line_bad_input(
    options: tuple[str, ...], message: str, files: dict[str, Path], run: Callable[..., Any], tmp_path: Path
) -> None:
    options = tuple(str(files["unet"]) if option == "UNET" else option for option in options)
    result = run("sample", "-n", 3, "--out", tmp_path / "run", *options)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err
    assert len(result.err) < 1000
    assert not (tmp_path / "run").exists()


def test_empty_respacing_is_all_steps(
    files: dict[str, Path], run: Callable[..., Any], tmp_path: Path
) -> None:
    options = ("--model", files["unet"], "-n", 1, "--respacing", "", "--out", tmp_path / "run")
    result = run("sample", *options)
    assert result.code == 0
    assert "1000 steps each" in result.err


def test_upsampling_with_a_preset_that_does_not(run: Callable[..., Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "small.npz", np.zeros((2, 64, 64, 3), np.uint8))
    result = run("upsample", tmp_path / "small.npz", "--preset", "imagenet64", "--out", tmp_path / "run")
    assert result.code == 2
    assert "use `evalkit sample`" in result.err


def test_command_line_interrupted(
    files: dict[str, Path], run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("generation.cli._samples_bar", lambda: interrupting(1, 0.1))
    options = ("--model", files["unet"], "--respacing", "4", "--shard-size", 2)
    result = run("sample", "-n", 5, "--out", tmp_path / "run", *options)
    assert result.code == 130
    assert "run the same command again" in result.err


def test_presets_have_a_schedule() -> None:
    for preset in SAMPLING.values():
        model = MODELS[preset.diffusion]
        schedule = make_schedule(model.noise_schedule, model.diffusion_steps, preset.respacing)
        assert len(schedule) == int(preset.respacing.removeprefix("ddim"))
