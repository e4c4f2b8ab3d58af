"""Training: the reference's losses, runs that repeat bit for bit, several processes, bad input."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import patience
import pytest
import torch
from optional import optional
from PIL import Image
from torch import Tensor
from training_runs import CLASSIFIER, IMAGES, LABELS, RECIPE, recipe, with_network, write

from evalkit.errors import EvalkitError, InputError, MissingDependencyError, OutputError
from evalkit.images import open_images
from generation import train as training
from generation.batch import sample_batch
from generation.checkpoints import load_network
from generation.demo import digits_model, write_digits
from generation.losses import hybrid_loss
from generation.noise import normal
from generation.pixels import to_uint8
from generation.recipe import Recipe, Settings
from generation.samplers.ddim import DDIM
from generation.schedule import make_schedule
from generation.settings import Settings as SamplingSettings
from generation.train import Options, train
from generation.training_data import Use, order, uniform


def options(**changes: Any) -> Options:
    return Options(device=torch.device("cpu"), **changes)


def run(folder: Path, recipe: Recipe, name: str = "run", **changes: Any) -> dict[str, Any]:
    """Train on ``folder``'s images; what the last checkpoint holds."""
    train(recipe, open_images(str(folder / "images.npz")), folder / name, options(**changes))
    return checkpoint(folder / name)


@pytest.fixture(autouse=True)
def short_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "GRID_STEPS", 2)


def checkpoint(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return content


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


# ----------------------------------------------------------------------------------------------- one update


def test_the_first_update_by_hand(tmp_path: Path) -> None:
    write(tmp_path)
    recipe_ = recipe(tmp_path, steps=1, seed=5)
    found = run(tmp_path, recipe_)
    torch.manual_seed(5)
    network = recipe_.model.build("cpu")
    start = {name: value.clone() for name, value in network.state_dict().items()}
    chosen = order(5, 0, 20)[:8]
    x_0 = torch.from_numpy(IMAGES[chosen] / np.float32(127.5) - 1).permute(0, 3, 1, 2)
    positions = torch.arange(8)
    t = (uniform(5, positions, 0, Use.TIMESTEP)[:, 0] * 1000).long()
    noise = normal(5, positions, 0, Use.NOISE, 192).view(8, 3, 8, 8)
    schedule = make_schedule("cosine")
    x_t = schedule.diffuse(x_0, t, noise)
    output = network(x_t, t, torch.from_numpy(LABELS[chosen]))
    hybrid_loss(output, x_0, x_t, noise, t, schedule).total.mean().backward()
    # The first step of Adam moves every weight by the learning rate against its gradient's sign.
    for name, parameter in network.named_parameters():
        moved = found["network"][name] - start[name]
        expected = -1e-3 * parameter.grad / (parameter.grad.abs() + 1e-8)
        # Where the gradient is as small as its own rounding, the sign is chance.
        clear = parameter.grad.abs() > 1e-6
        torch.testing.assert_close(moved[clear], expected[clear], rtol=0, atol=2e-5)
        averaged = start[name] + 0.9 * moved  # the first update keeps a tenth of the start
        torch.testing.assert_close(found["ema"][name], averaged, rtol=0, atol=1e-7)
    assert (t > 500).any()
    assert (t < 500).any()


def test_the_learning_rate_falls_to_zero(tmp_path: Path) -> None:
    write(tmp_path)
    run(
        tmp_path,
        replace(recipe(tmp_path), settings=Settings(steps=4, batch_size=8, anneal=True)),
        save_every=1,
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.75e-4, 0.5e-4, 0.25e-4, 0])
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["loss"] == pytest.approx(lines[0]["mse"] + lines[0]["vb"])


def test_gradients_of_parts_add_up(tmp_path: Path) -> None:
    write(tmp_path)

    def gradients(name: str, **changes: Any) -> dict[str, Tensor]:
        """Of the first step: AdamW's first moment is a tenth of them; its updates have only signs."""
        state = run(tmp_path, recipe(tmp_path, steps=1, **changes.pop("recipe", {})), name, **changes)
        return {str(key): found["exp_avg"] * 10 for key, found in state["optimiser"]["state"].items()}

    whole, parts = gradients("whole"), gradients("parts", microbatch=3)
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    assert largest_difference(whole, parts) < 1e-5 * largest
    assert largest_difference(whole, gradients("other", recipe={"seed": 1})) > 0.1 * largest


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    write(tmp_path)
    exact = run(tmp_path, recipe(tmp_path))
    rounded = run(tmp_path, recipe(tmp_path, precision="bfloat16"), "bf16")
    assert all(value.dtype == torch.float32 for value in rounded["network"].values())
    difference = largest_difference(exact["network"], rounded["network"])
    assert 0 < difference < 8e-3  # four steps of at most 1e-3 apart each way


# ------------------------------------------------------------------------------ runs that repeat and resume

# Everything that draws random numbers, at once.
ALL = {"timesteps": "loss-second-moment", "flip": True, "crop": True, "anneal": True, "weight_decay": 0.05}


def everything(folder: Path) -> Recipe:
    all_of_it = with_network(recipe(folder, steps=24, **ALL), dropout=0.2)
    return replace(all_of_it, model=replace(all_of_it.model, diffusion_steps=30))  # ten losses for each, soon


def test_interrupted_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    uninterrupted = run(tmp_path, everything(tmp_path))
    again = run(tmp_path, everything(tmp_path), "again", save_every=7)
    assert (uninterrupted["timesteps"]["counts"] >= 1).all()

    def stop(stage: str, done: int, total: int) -> None:
        if done == 17:
            raise RuntimeError("stop")

    images = open_images(str(tmp_path / "images.npz"))
    with pytest.raises(RuntimeError, match="stop"):
        train(
            everything(tmp_path),
            images,
            tmp_path / "resumed",
            options(save_every=7),
            progress=stop,
        )
    assert checkpoint(tmp_path / "resumed")["step"] == 14
    torch.manual_seed(99)
    resumed = run(tmp_path, everything(tmp_path), "resumed", save_every=7)
    for other in (again, resumed):
        for part in ("network", "ema", "timesteps"):
            assert same(uninterrupted[part], other[part]), part
        for mine, theirs in zip(
            *(each["optimiser"]["state"].values() for each in (uninterrupted, other)), strict=True
        ):
            assert same(mine, theirs)


def command(folder: Path, *arguments: str) -> list[str]:
    shown = "train", "diffusion", str(folder / "images.npz"), "--recipe", str(folder / "recipe.toml")
    return [
        sys.executable,
        "-m",
        "evalkit",
        *shown,
        "--out",
        str(folder / "run"),
        "--device",
        "cpu",
        *arguments,
    ]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_by_a_signal_and_resumed(tmp_path: Path, how: signal.Signals) -> None:
    write(tmp_path)
    long = recipe(tmp_path, RECIPE.replace("steps = 4", "steps = 100000"), seed=1)
    process = subprocess.Popen(
        command(tmp_path, "--save-every", "10", "--seed", "1"), stderr=subprocess.PIPE, text=True
    )
    # A checkpoint has taken another's place: this is the middle of the work.
    seen: set[int] = set()

    def second_checkpoint() -> bool:
        with suppress(FileNotFoundError):
            seen.add((tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns)
        return len(seen) >= 2

    patience.until(second_checkpoint, process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=patience.SECONDS)
    stopped = checkpoint(tmp_path / "run")["step"]
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "finishing the current step" in errors
    else:
        assert process.returncode == -signal.SIGKILL
        assert stopped % 10 == 0
    steps = stopped + 5
    shorter = replace(long, settings=replace(long.settings, steps=steps))
    resumed = run(tmp_path, shorter)
    uninterrupted = run(tmp_path, shorter, "uninterrupted")
    assert resumed["step"] == uninterrupted["step"] == steps
    assert same(resumed["network"], uninterrupted["network"])
    assert same(resumed["ema"], uninterrupted["ema"])


def test_two_processes_share_the_batch(tmp_path: Path) -> None:
    write(tmp_path)
    text = RECIPE.replace("steps = 4", 'steps = 12\ntimesteps = "loss-second-moment"').replace(
        "[model.network]", "diffusion_steps = 8\n\n[model.network]"
    )
    alone = run(tmp_path, recipe(tmp_path, text), "alone")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
            *command(tmp_path, "--microbatch", "3")[1:],
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=patience.SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("averaged weights after 12 steps") == 1
    shared = checkpoint(tmp_path / "run")
    assert shared["step"] == 12
    # Not the weights: where a gradient is nothing but rounding, Adam makes whole steps of it.
    predictions = []
    for content in (alone, shared):
        network = recipe(tmp_path, text).model.build("cpu").eval()
        network.load_state_dict(content["ema"])
        with torch.no_grad():
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
            predictions.append(network(x, torch.tensor([0, 2, 4, 7]), torch.tensor([0, 1, 2, 0])))
    torch.testing.assert_close(predictions[0], predictions[1], rtol=0, atol=1e-3)
    assert predictions[0].std() > 0.1
    assert torch.equal(alone["timesteps"]["counts"], shared["timesteps"]["counts"])


def test_a_finished_run_can_be_lengthened_and_is_not_repeated(
    tmp_path: Path, messages: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path)
    run(tmp_path, recipe(tmp_path))
    before = (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns
    run(tmp_path, recipe(tmp_path))
    assert (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns == before
    images = open_images(str(tmp_path / "images.npz"))
    caplog.clear()
    train(recipe(tmp_path, steps=6), images, tmp_path / "run", options())
    assert "resuming at step 4" in messages()[0]
    assert "passes over 20" in messages()[0]
    assert same(
        checkpoint(tmp_path / "run")["network"], run(tmp_path, recipe(tmp_path, steps=6), "six")["network"]
    )


# ------------------------------------------------------------------------------------------ what is learned


def test_a_diffusion_model_learns(tmp_path: Path, messages: Callable[[], list[str]]) -> None:
    images = np.zeros((20, 8, 8, 3), np.uint8)
    images[1::2] = (240, 120, 30)
    write(tmp_path, images, arr_1=np.arange(20) % 2)
    text = RECIPE.replace("num_classes = 3", "num_classes = 2")
    source = open_images(str(tmp_path / "images.npz"))
    path = train(recipe(tmp_path, text, steps=100), source, tmp_path / "run", options())
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 50, 100]
    assert lines[0]["mse"] > 0.5  # it starts at 1, the variance of the noise
    assert lines[-1]["mse"] < 0.35
    assert load_network(path).preset.name == "small"
    with Image.open(tmp_path / "run" / "samples_0000100.png") as grid:
        assert grid.size == (8 * 42, 8 * 42)  # rows and columns of images enlarged to 40, with frames
        assert grid.text["Title"] == "Samples after 100 steps"
    assert any("samples_0000100.png" in line for line in messages())
    assert any("steps/s on cpu" in line for line in messages())


def test_a_classifier_learns_and_tells_its_accuracy_by_noise(
    tmp_path: Path, messages: Callable[[], list[str]]
) -> None:
    images = np.zeros((60, 8, 8, 3), np.uint8)
    images[np.arange(60), ..., np.arange(60) % 3] = 255
    write(tmp_path, images, arr_1=np.arange(60) % 3)
    source = open_images(str(tmp_path / "images.npz"))
    train(
        recipe(tmp_path, CLASSIFIER, steps=60, crop=True),
        source,
        tmp_path / "run",
        options(validation=source),
    )
    (line,) = (line for line in messages() if "accuracy on validation images" in line)
    accuracy = dict(part.split(": ") for part in line.split("by timestep: ")[1].split(", "))
    assert list(accuracy) == [str(t) for t in range(0, 1000, 100)]
    assert float(accuracy["0"]) == 1
    assert float(accuracy["900"]) < 1
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert 0.3 < last["accuracy"] <= 1


# ------------------------------------------------------------------------------------- the shipped models


def test_the_digits_model_draws_the_digits_it_is_asked_for(tmp_path: Path) -> None:
    optional("sklearn", "demo")
    _, reference = (open_images(str(path)) for path in write_digits(tmp_path))
    networks = digits_model()
    asked, right = np.arange(100) % 10, []
    for scale in (0.0, 4.0):
        settings = SamplingSettings(count=100, scale=scale, sampler=DDIM(), respacing="ddim25")
        x, finite = sample_batch(settings, networks, range(100), labels=asked)
        assert finite.all()
        samples = to_uint8(x)
        assert np.ptp(samples.astype(int), axis=3).mean() < 3  # grey
        unseen = np.concatenate(list(reference.batches(100)))
        flat = [torch.from_numpy(each).flatten(1).double() for each in (samples, unseen)]
        distances = torch.cdist(*flat) / flat[0].shape[1] ** 0.5
        assert 20 < float(distances.min(dim=1).values.median()) < 45  # of real digits of the other half: 35
        assert reference.labels is not None
        right.append((reference.labels[distances.argmin(dim=1).numpy()] == asked).mean())
    assert right[0] >= 0.85
    assert right[1] >= max(0.95, right[0])


def test_the_digits_model_has_not_seen_its_reference(tmp_path: Path) -> None:
    optional("sklearn", "demo")
    networks, schedule, losses = digits_model(), make_schedule("cosine"), []
    for path in write_digits(tmp_path):
        source = open_images(str(path))
        assert source.labels is not None
        images = torch.from_numpy(np.concatenate(list(source.batches(100)))).permute(0, 3, 1, 2)
        x_0, y = images[:800] / 127.5 - 1, torch.from_numpy(source.labels[:800])
        t, noise = torch.full_like(y, 100), torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            eps = networks.predict(schedule.diffuse(x_0, t, noise), t, y)[:, :3]
        losses.append(float((eps - noise).square().mean()))
    training, reference = losses
    assert training < 0.8 * reference


# ------------------------------------------------------------------------------------------------ bad input


def refused(
    message: str, folder: Path, recipe: Recipe, error: type[EvalkitError] = InputError, **more: Any
) -> None:
    with pytest.raises(error, match=message):
        run(folder, recipe, **more)


def test_images_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    good = recipe(tmp_path)
    write(tmp_path, IMAGES, arr_2=LABELS)
    refused("no labels, and the model has 3 classes", tmp_path, good)
    run(tmp_path, with_network(good, num_classes=None), "unconditional")
    write(tmp_path, arr_1=LABELS + 1)
    refused("label 3 is out of range.*0 to 2", tmp_path, good)
    write(tmp_path, IMAGES[:, :7])
    refused("8x7; the model takes 8x8", tmp_path, good)
    refused("8x7; the model takes 8x8", tmp_path, recipe(tmp_path, CLASSIFIER, crop=True))
    write(tmp_path, arr_1=LABELS)
    refused(
        "label 2 is out of range",
        tmp_path,
        recipe(tmp_path, CLASSIFIER.replace("out_channels = 3", "out_channels = 2")),
    )
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").write_text("")
    refused("Cannot make", tmp_path, good, OutputError)


def test_a_batch_larger_than_memory_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    refused("--batch-size 4294967295: its images alone", tmp_path, recipe(tmp_path, batch_size=2**32 - 1))
    assert not (tmp_path / "run").exists()


def test_options_out_of_range_are_named() -> None:
    with pytest.raises(InputError, match="--save-every 0"):
        options(save_every=0)
    with pytest.raises(InputError, match="--microbatch -1"):
        options(microbatch=-1)


def test_a_run_with_other_settings_is_not_resumed(tmp_path: Path) -> None:
    write(tmp_path)
    good = recipe(tmp_path)
    run(tmp_path, good)
    # What is of sampling alone does not belong to a run: those begun before it was known can be resumed.
    identity = json.loads(checkpoint(tmp_path / "run")["identity"])
    assert not {"model.published_precision", "model.prediction"} & identity.keys()
    refused("learning_rate was 0.001 and is now 0.01", tmp_path, recipe(tmp_path, learning_rate=0.01))
    refused("model.dropout was 0.0 and is now 0.5", tmp_path, with_network(good, dropout=0.5))
    refused(
        "anneal was false and is now true; steps was null and is now 9",
        tmp_path,
        recipe(tmp_path, steps=9, anneal=True),
    )
    refused("a run of 4 steps, more than 3", tmp_path, recipe(tmp_path, steps=3))
    write(tmp_path, IMAGES[::-1])
    refused("images was", tmp_path, good)
    write(tmp_path, arr_1=LABELS[::-1])
    refused("labels was", tmp_path, good)
    write(tmp_path)
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    refused("is damaged, or not a checkpoint of a training run. Remove it", tmp_path, good)
    torch.save({"step": 4}, path)
    refused("not a checkpoint of a training run", tmp_path, good)


def test_a_network_that_cannot_see_colours_is_warned_of(
    tmp_path: Path, messages: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path)
    for text, width in ((RECIPE, 32), (CLASSIFIER, 32), (RECIPE, 64)):
        caplog.clear()
        chosen = with_network(recipe(tmp_path, text, steps=1), model_channels=width)
        source = open_images(str(tmp_path / "images.npz"))
        train(chosen, source, tmp_path / f"{chosen.model.kind}-{width}", options())
        assert any("garish" in line for line in messages()) == (text == RECIPE and width == 32)


def test_two_runs_in_one_folder_at_once_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    refused = []

    def rival(stage: str, done: int, total: int) -> None:
        with pytest.raises(OutputError, match="Another process is training in"):
            run(tmp_path, recipe(tmp_path))
        refused.append(True)

    train(
        recipe(tmp_path),
        open_images(str(tmp_path / "images.npz")),
        tmp_path / "run",
        options(),
        progress=rival,
    )
    assert refused
    run(tmp_path, recipe(tmp_path))  # and is let in afterwards


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    write(tmp_path)
    wild = recipe(tmp_path, learning_rate=1e30, steps=60)
    refused("loss of step 1 is not finite.*learning-rate", tmp_path, wild, EvalkitError, save_every=1)
    before = checkpoint(tmp_path / "run")
    assert before["step"] == 1


def test_options_that_make_no_sense_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for change in ({"microbatch": 0}, {"save_every": 0}):
        with pytest.raises(InputError, match="from 1"):
            options(**change)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'evalkit\[train\]'"):
        options(tensorboard=True)


def test_tensorboard_is_told_what_the_log_is(tmp_path: Path) -> None:
    optional("tensorboard", "train")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path)
    run(tmp_path, recipe(tmp_path), tensorboard=True)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    for name in ("loss", "vb", "learning_rate"):
        (event,) = board.Scalars(name)
        assert event.step == 4
        assert event.value == pytest.approx(line[name], rel=1e-6)


def test_the_command_line_says_what_is_wrong(tmp_path: Path, run: Callable[..., Any]) -> None:
    data = write(tmp_path)
    recipe(tmp_path)
    arguments = data, "--recipe", tmp_path / "recipe.toml", "--out", tmp_path / "run"
    result = run("train", "classifier", *arguments)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "use `evalkit train diffusion`" in result.err
    result = run("train", "diffusion", *arguments, "--steps", 2, "--learning-rate", 1e-4)
    assert result.code == 0, result.err
    assert "small.safetensors: averaged weights after 2 steps" in result.out
    assert "2 steps of 8 images" in result.err


def test_floats_are_brought_to_their_range(tmp_path: Path, run: Callable[..., Any]) -> None:
    data = write(tmp_path)
    recipe(tmp_path)
    with np.load(data) as arrays:
        np.savez(
            tmp_path / "x.npz",
            arrays["arr_0"] / np.float32(255),
            *[arrays[k] for k in arrays if k == "arr_1"],
        )
    arguments = "train", "diffusion", tmp_path / "x.npz", "--recipe", tmp_path / "recipe.toml", "--steps", 1
    result = run(*arguments, "--out", tmp_path / "a")
    assert result.code == 2
    assert "--value-range 0..1" in result.err
    assert run(*arguments, "--out", tmp_path / "b", "--value-range", "0..1").code == 0
    assert run("train", "diffusion", data, *arguments[3:], "--out", tmp_path / "c").code == 0
    one, other = (tmp_path / name / "small.safetensors" for name in "bc")
    assert one.read_bytes() == other.read_bytes()
    result = run("train", "diffusion", data, *arguments[3:], "--out", tmp_path / "d", "--value-range", "0..1")
    assert "there are none in" in result.err
