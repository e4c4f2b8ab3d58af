"""Sampling by workers elsewhere: the same bytes as in one process; and one process at a time that writes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_networks
import torch
from fake_engine import FakeEngine
from sampling_runs import SETTINGS, interrupting, load, sampled
from stand_ins import InceptionPixels

from evalkit.errors import InputError
from evalkit.images import open_images
from evalkit.system.engine import Engine, WorkerState
from generation import work as module
from generation.batch import Networks
from generation.published import cached
from generation.sample import STAGE, run_all
from generation.shards import Piece, ShardFolder
from generation.sweep import sweep
from generation.work import Item, Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

FINAL = "samples_7x8x8x3.npz"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Item]:
    """What is made in this process."""
    items: list[Item] = []
    original = module._Maker.__call__
    monkeypatch.setattr(
        module._Maker, "__call__", lambda self, item, pulse: items.append(item) or original(self, item, pulse)
    )
    return items


# ----------------------------------------------------------------------------------------------- same bytes


def test_workers_give_the_same_bytes(expected: Path, networks: Networks, tmp_path: Path) -> None:
    engine = FakeEngine(dies_at=(1, 3))
    path = sampled(SETTINGS, networks, tmp_path / "run", batch_size=2, engine=engine)
    assert engine.items != sorted(engine.items)
    assert len(engine.items) == 5 + 2
    assert path.read_bytes() == expected.read_bytes()


def test_progress_is_that_of_all_workers(networks: Networks, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    run = (SETTINGS, tmp_path / "a"), (replace(SETTINGS, scale=0.0), tmp_path / "b")
    done = dict(run_all(run, networks, engine=FakeEngine(), progress=lambda *state: seen.append(state)))
    assert sorted(done) == [0, 1]
    assert {(stage, total) for stage, _, total in seen} == {(STAGE, 14)}
    counts = [count for _, count, _ in seen]
    assert counts == sorted(counts)
    assert counts[-1] == 14


def test_upsampling_by_workers(files: dict[str, Path], base: Path, tmp_path: Path) -> None:
    upsampler, settings = load(files, "upsampler", None), replace(SETTINGS, count=5, scale=0.0)
    paths = [
        sampled(settings, upsampler, tmp_path / name, base=open_images(base), engine=engine, batch_size=2)
        for name, engine in (("here", None), ("elsewhere", FakeEngine()))
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("precision", ["reference", "fast"])
def test_networks_without_a_file_go_as_they_are(
    precision: str, files: dict[str, Path], tmp_path: Path
) -> None:
    copies = {name: Path(shutil.copy(files[name], tmp_path)) for name in ("unet", "classifier")}
    here = Networks.prepare(
        load(files).diffusion, load(files).classifier, precision=precision, device=torch.device("cpu")
    )
    gone = Networks.prepare(
        load(copies).diffusion, load(copies).classifier, precision=precision, device=torch.device("cpu")
    )
    for path in copies.values():
        path.unlink()
    one = sampled(SETTINGS, here, tmp_path / "here", batch_size=2)
    other = sampled(SETTINGS, gone, tmp_path / "elsewhere", batch_size=2, engine=FakeEngine())
    assert one.read_bytes() == other.read_bytes()


# --------------------------------------------------------------------------------------- networks by recipe


def test_a_worker_uses_the_same_kind_of_device(networks: Networks) -> None:
    recipe = Recipe.of(replace(networks, device=torch.device("cuda:3")))
    assert recipe.device == torch.device("cuda")


def test_a_recipe_holds_no_weights(networks: Networks) -> None:
    assert len(pickle.dumps(Recipe.of(networks))) < 5000


def test_a_worker_that_sees_another_checkpoint(files: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copy(files["unet"], tmp_path / "unet.safetensors"))
    recipe = Recipe.of(load({**files, "unet": copy}))
    small_networks.write(tmp_path, "unet", "diffusion", seed=5)
    with pytest.raises(InputError, match=r"unet\.safetensors: .* sees other weights .* the same checkpoint"):
        recipe.load()
    copy.unlink()
    with pytest.raises(InputError, match=r"unet\.safetensors: .* sees no such file"):
        recipe.load()


def test_a_worker_may_have_a_published_checkpoint_in_its_own_cache(
    files: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copy(files["unet"], tmp_path / "unet.safetensors"))
    recipe = Recipe.of(load({**files, "unet": copy}))
    there = cached(load(files).diffusion.preset)
    there.parent.mkdir()
    copy.rename(there)
    assert recipe.load().diffusion.path == there


# ------------------------------------------------------------------------------------- what a folder keeps


def begun(networks: Networks, out: Path, at: float) -> None:
    with pytest.raises(KeyboardInterrupt):
        sampled(SETTINGS, networks, out, batch_size=2, progress=interrupting(1, at))


def pieces(made: list[Item]) -> list[tuple[int, int]]:
    return sorted(tuple(item.piece) for item in made)


def test_a_kill_costs_a_batch_and_nothing_is_made_twice(
    networks: Networks, tmp_path: Path, made: list[Item]
) -> None:
    begun(networks, tmp_path / "run", 3.5)
    sampled(SETTINGS, networks, tmp_path / "run", batch_size=2, engine=FakeEngine())
    assert pieces(made) == [(0, 2), (2, 3), (3, 5), (5, 6), (6, 7)]


def test_another_batch_size_makes_only_what_is_missing(
    networks: Networks, tmp_path: Path, made: list[Item]
) -> None:
    begun(networks, tmp_path / "run", 3.5)
    made.clear()
    path = sampled(SETTINGS, networks, tmp_path / "run", batch_size=3)
    assert pieces(made) == [(5, 6), (6, 7)]
    with np.load(path) as file:
        made_with = json.loads(str(file["provenance"]))["made_with"]
    assert [each["batch_size"] for each in made_with] == [2, 3]


def test_shards_that_were_made_in_several_batches_are_kept(
    expected: Path, networks: Networks, tmp_path: Path, made: list[Item]
) -> None:
    """As earlier versions wrote them: a file a shard, whatever the batch size."""
    out = tmp_path / "run"
    begun(networks, out, 0)
    (out / "shards" / "000000_0-2.npz").unlink()
    with np.load(expected) as file:
        images, (how,) = file["arr_0"], json.loads(str(file["provenance"]))["made_with"]
    (out / "claims.lock").touch()
    note = json.dumps(how, sort_keys=True)
    digest = digest_of(images[:3], note)
    np.savez(out / "shards" / "000000.npz", images=images[:3], made_with=note, sha256=digest)
    made.clear()
    assert sampled(SETTINGS, networks, out, batch_size=2).read_bytes() == expected.read_bytes()
    assert pieces(made) == [(3, 5), (5, 6), (6, 7)]


def digest_of(images: np.ndarray[Any, Any], note: str) -> str:
    digest = hashlib.sha256(f"{images.dtype.str} {images.shape} {note}\n".encode())
    digest.update(images.tobytes())
    return digest.hexdigest()


def test_only_one_process_samples_into_a_folder(
    files: dict[str, Path], networks: Networks, run: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ("sample", "--model", files["unet"], "-n", 3, "--respacing", "3", "--out", out)
    identity: dict[str, Any] = {"identity": {}, "made_with": {}}
    with ShardFolder.open(out, shape=(3, 8, 8, 3), shard_size=2, **identity):
        result = run(*command)
    assert result.code == 2
    assert f"Another process is sampling into {out}" in result.err
    assert "--engine ray" in result.err
    assert [path.name for path in out.rglob("*.npz")] == []


def test_files_of_other_names_are_no_samples(tmp_path: Path) -> None:
    options: dict[str, Any] = {"identity": {}, "made_with": {}, "shape": (7, 2, 2, 3), "shard_size": 3}
    with ShardFolder.open(tmp_path / "run", **options) as folder:
        everything = folder.missing(2)
        for name in ("000000_0-4", "000000_2-1", "000009", "notes", "000001_0-2.npz"):
            (tmp_path / "run" / "shards" / f"{name}.npz").touch()
    with ShardFolder.open(tmp_path / "run", **options) as folder:
        assert folder.missing(2) == everything == [(0, 2), (2, 3), (3, 5), (5, 6), (6, 7)]
        folder.save(Piece(3, 5), np.zeros((2, 2, 2, 3), np.uint8), {})
        assert folder.missing(3) == [(0, 3), (5, 6), (6, 7)]


# ---------------------------------------------------------------------------------------------------- Ray

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'evalkit[cluster]'"
)


@pytest.fixture(scope="module")
def ray(one_thread: None) -> Iterator[tuple[Engine, dict[int, str]]]:
    """Workers of Ray, and what each is at, by its process."""
    from evalkit.system.ray_engine import ray_engine

    states: dict[int, str] = {}

    def watch(found: Sequence[WorkerState]) -> None:
        states.clear()
        states.update({worker.pid: worker.state for worker in found})

    with ray_engine(watch=watch) as engine:
        yield engine, states


@needs_ray
def test_ray_gives_the_same_bytes_though_a_worker_is_killed(
    ray: tuple[Engine, dict[int, str]], networks: Networks, tmp_path: Path
) -> None:
    engine, states = ray
    killed: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        busy = [pid for pid, state in states.items() if state == "working"]
        if not killed and busy:
            killed.append(busy[0])
            os.kill(busy[0], signal.SIGKILL)

    settings = replace(SETTINGS, count=24, respacing="20")  # so that there is work when one is seen at it
    alone = sampled(settings, networks, tmp_path / "alone", batch_size=2)
    path = sampled(settings, networks, tmp_path / "run", batch_size=2, engine=engine, progress=progress)
    assert killed
    assert path.read_bytes() == alone.read_bytes()


@needs_ray
def test_a_sweep_by_ray_gives_the_same_bytes(
    ray: tuple[Engine, dict[int, str]], networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "ref.npz", np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8))
    for name, engine in (("ray", ray[0]), ("here", None)):
        monkeypatch.setenv("EVALKIT_CACHE", str(tmp_path / f"cache-{name}"))
        (tmp_path / name).mkdir()
        sweep(
            *(SETTINGS, (0.0, 30.0), networks, tmp_path / "ref.npz", tmp_path / name / "sweep"),
            extractor=InceptionPixels(),
            engine=engine,
        )
    for file in ("results.csv", "samples.png", f"scale-0.0/{FINAL}", f"scale-30.0/{FINAL}"):
        one, other = ((tmp_path / name / "sweep" / file).read_bytes() for name in ("ray", "here"))
        assert one == other, file


@needs_ray
def test_the_driver_of_ray_killed_and_run_again(
    files: dict[str, Path], expected: Path, networks: Networks, tmp_path: Path
) -> None:
    code = """
import os, signal, sys
from evalkit.cli.root import main
renamed = []
def kill(event, arguments):
    if event == "os.rename" and "shards" in str(arguments[1]):
        renamed.append(arguments)
        if len(renamed) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
main()
"""
    out = tmp_path / "run"
    command = [
        *("sample", "--engine", "ray", "--model", files["unet"], "--classifier", files["classifier"]),
        *("-n", "7", "--scale", "30", "--respacing", "4", "--shard-size", "3", "--batch-size", "2"),
        *("--out", out),
    ]
    killed = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(list((out / "shards").glob("*.npz"))) == 2
    assert sampled(SETTINGS, networks, out, batch_size=2).read_bytes() == expected.read_bytes()
