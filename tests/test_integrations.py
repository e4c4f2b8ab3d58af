"""Hooks for training loops, each with the real package; and the examples of docs/during_training.md."""

from __future__ import annotations

import io
import pickle
import random
import re
import struct
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from optional import optional
from patience import SECONDS, until
from stand_ins import NO_STORE, InceptionPixels
from torch import Tensor, nn
from torch.utils.data import DataLoader

from evalkit import Comparison, Evaluator, Score, compare
from evalkit.errors import InputError, MissingDependencyError
from evalkit.extractors import EXTRACTORS
from evalkit.integrations import scalars
from evalkit.integrations.lightning import evaluator_callback
from evalkit.integrations.model_card import model_index
from evalkit.integrations.tensorboard import log_to_tensorboard
from evalkit.integrations.torchmetrics import evaluator_metric
from evalkit.integrations.wandb import log_to_wandb

PAGE = (Path(__file__).parent.parent / "docs" / "during_training.md").read_text()
ARGUMENTS: Mapping[str, Any] = {"extractor": InceptionPixels(), "run": NO_STORE}

# What these packages say of themselves.
theirs = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.fixture(autouse=True)
def settings_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes nowhere else, whatever folder the tests were started in, and waits on a busy machine."""
    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))
    for name in ("INIT_TIMEOUT", "_SERVICE_WAIT"):
        monkeypatch.setenv(f"WANDB_{name}", str(SECONDS))
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture
def comparison(images: NDArray[np.uint8]) -> Comparison:
    return compare(images, images[:57, ::-1].copy(), **ARGUMENTS)


@pytest.fixture
def evaluator(images: NDArray[np.uint8]) -> Evaluator:
    return Evaluator(images, value_range="-1..1", **ARGUMENTS)


def noise(count: int, seed: int = 0) -> Tensor:
    """Pictures in [-1, 1] of the size of the others."""
    return torch.rand((count, 3, 12, 10), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def as_bytes(pictures: Tensor) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = ((pictures + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return found


def test_scalars(comparison: Comparison) -> None:
    fid = Score(name="fid", value=2.5, stderr=0.1, unbiased=2.25)
    found = scalars(replace(comparison, scores=(fid, Score(name="recall", value=0.5))), "x/")
    assert found == {"x/fid": 2.5, "x/fid_stderr": 0.1, "x/fid_unbiased": 2.25, "x/recall": 0.5}


def toy_module(**fields: Any) -> Any:
    """A Lightning module whose samples are :func:`noise`."""
    lightning = optional("lightning.pytorch", "lightning")

    class Toy(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)
            self.frozen = nn.Dropout().eval()
            self.modes: list[tuple[bool, bool]] = []

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

        def sample(self, count: int) -> Tensor:
            self.modes.append((self.training, torch.is_grad_enabled()))
            return noise(count)

    return Toy()


def toy_sample(module: Any, count: int) -> Tensor:
    return noise(count)


class Trainer:
    """What the callback looks at."""

    def __init__(self, rank: int, epoch: int = 0, world_size: int = 1) -> None:
        self.global_rank, self.current_epoch, self.world_size = rank, epoch, world_size


@theirs
def test_lightning(evaluator: Evaluator, images: NDArray[np.uint8], tmp_path: Path) -> None:
    module = toy_module()
    lightning = optional("lightning.pytorch", "lightning")
    callback = evaluator_callback(
        evaluator, lambda module, count: module.sample(count), 55, batch_size=20, every=2
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **quiet
    )
    trainer.fit(module, DataLoader(torch.zeros(2, 1)))  # type: ignore[arg-type]
    assert module.modes == [(False, False)] * 6  # after epochs 2 and 4
    assert [module.training, module.frozen.training] == [True, False]
    samples = np.concatenate([as_bytes(noise(count)) for count in (20, 20, 15)])
    expected = compare(images, samples, **ARGUMENTS)
    assert callback.comparison.scores == expected.scores
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged == pytest.approx(scalars(expected), rel=1e-6)
    with pytest.raises(InputError, match="images=0"):
        evaluator_callback(evaluator, noise, 0)


@theirs
@pytest.mark.parametrize(
    ("settings", "is_fine"),
    [
        ({"every_n_epochs": 2}, True),
        ({"every_n_epochs": 2, "monitor": "loss"}, True),
        ({"every_n_epochs": 1, "monitor": "loss"}, True),
        ({}, False),
        ({"every_n_epochs": 3}, False),
        ({"every_n_train_steps": 1}, False),
        ({"every_n_epochs": 2, "save_on_train_epoch_end": False}, False),
    ],
)
def test_checkpoints_of_scores(
    settings: dict[str, Any],
    is_fine: bool,
    evaluator: Evaluator,
    images: NDArray[np.uint8],
    tmp_path: Path,
) -> None:
    """Between measurements Lightning still has the last score, which is not that of the weights."""
    lightning = optional("lightning.pytorch", "lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    module = toy_module()
    checkpoint = ModelCheckpoint(
        **{"dirpath": tmp_path, "monitor": "evalkit/fid", "save_top_k": -1} | settings
    )
    made = iter(range(10))
    callback = evaluator_callback(evaluator, lambda module, count: noise(count, next(made)), 5, every=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=4, accelerator="cpu", callbacks=[checkpoint, callback], **quiet)
    loader = DataLoader(torch.zeros(2, 1))  # type: ignore[arg-type]
    if not is_fine:
        with pytest.raises(InputError, match="every_n_epochs=2 and save_on_train_epoch_end=True"):
            trainer.fit(module, loader)
        return
    trainer.fit(module, loader)
    if checkpoint.monitor == "evalkit/fid":
        scores = [compare(images, as_bytes(noise(5, seed)), **ARGUMENTS)["fid"] for seed in range(2)]
        assert sorted(map(float, checkpoint.best_k_models.values())) == pytest.approx(
            sorted(scores), rel=1e-6
        )
        assert [Path(path).name[:7] for path in checkpoint.best_k_models] == ["epoch=1", "epoch=3"]


def stopping_after(
    evaluator: Evaluator, settings: Mapping[str, Any], seeds: list[int], epochs: int = 9, module: Any = None
) -> tuple[Any, Any]:
    """Train with early stopping, measured after every second epoch; returns (trainer, callback)."""
    lightning = optional("lightning.pytorch", "lightning")
    from lightning.pytorch.callbacks import EarlyStopping

    made = iter(seeds)
    callback = evaluator_callback(evaluator, lambda module, count: noise(count, next(made)), 5, every=2)
    stopping = EarlyStopping(**{"monitor": "evalkit/fid", "patience": 2} | settings)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[stopping, callback],
        enable_model_summary=False,
        **quiet,
    )
    trainer.fit(module or toy_module(), DataLoader(torch.zeros(2, 1)))  # type: ignore[arg-type]
    return trainer, callback


@theirs
def test_patience_counts_measurements(evaluator: Evaluator, images: NDArray[np.uint8]) -> None:
    """Otherwise, Lightning would count the last score again as an epoch without improvement."""
    scores = {seed: compare(images, as_bytes(noise(5, seed)), **ARGUMENTS)["fid"] for seed in range(6)}
    worse = sorted(scores, key=lambda seed: scores[seed])
    best, second = worse[:2]
    # The score improves at the second measurement, and not at the next two.
    module = toy_module()
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    settings = {"scheduler": scheduler, "monitor": "evalkit/fid", "frequency": 2}
    module.configure_optimizers = lambda: {"optimizer": optimizer, "lr_scheduler": settings}
    made = [second, best, second, best]
    trainer, callback = stopping_after(evaluator, {"strict": False}, made, module=module)
    assert trainer.current_epoch == 8
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.1**2)
    assert callback.comparison["fid"] == scores[best]
    # An epoch without a measurement has no score.
    trainer, _ = stopping_after(evaluator, {"strict": False}, [best, second], epochs=5)
    assert trainer.current_epoch == 5
    assert not [name for name in trainer.callback_metrics if name.startswith("evalkit/")]


@theirs
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one after every 2. Give it strict=False"),
        ({"strict": False, "check_on_train_epoch_end": False}, "Give it check_on_train_epoch_end=True"),
    ],
)
def test_stopping_without_scores(settings: dict[str, Any], message: str, evaluator: Evaluator) -> None:
    with pytest.raises(InputError, match=message):
        stopping_after(evaluator, settings, [])


@theirs
def test_each_rank_samples_its_own_images(evaluator: Evaluator) -> None:
    """Under seed_everything all ranks have the same random state."""
    lightning = optional("lightning.pytorch", "lightning")
    drawn: list[tuple[float, float, float]] = []
    module = toy_module()

    def sample(module: Any, count: int) -> Tensor:
        drawn.append((torch.rand(()).item(), np.random.random(), random.random()))  # noqa: NPY002
        return noise(count)

    callback = evaluator_callback(evaluator, sample, 3)
    module.log_dict = lambda scores: None
    for seed, rank, epoch in ((1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0), (1, 0, 0)):
        lightning.seed_everything(seed, verbose=False)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index,union-attr] # noqa: NPY002
        callback.on_train_epoch_end(Trainer(rank, epoch), module)
        assert torch.equal(torch.get_rng_state(), before[0])
        np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # type: ignore[index] # noqa: NPY002
        assert random.getstate() == before[2]
    assert drawn[0] == drawn[4]  # a training that goes on measures the same
    for numbers in zip(*drawn[:4], strict=True):
        assert len({*numbers}) == 4


@theirs
def test_callback_in_another_process(evaluator: Evaluator) -> None:
    """Lightning pickles it for processes that it spawns."""
    optional("lightning.pytorch", "lightning")
    module = toy_module()
    module.log_dict = lambda scores: None
    callback = evaluator_callback(evaluator, toy_sample, 55, batch_size=20)
    callback.on_train_epoch_end(Trainer(0), module)
    sent = pickle.loads(pickle.dumps(callback))
    assert type(sent) is type(callback)
    assert sent.comparison == callback.comparison
    sent.on_train_epoch_end(Trainer(0), module)
    assert sent.comparison.scores == callback.comparison.scores


@theirs
def test_ranks_sample_equally_often(evaluator: Evaluator) -> None:
    """A model in shards waits at each call until all ranks are there."""
    optional("lightning.pytorch", "lightning")
    module = toy_module()
    module.log_dict = lambda scores: None
    asked: list[int] = []

    def sample(module: Any, count: int) -> tuple[Tensor, Tensor]:
        asked.append(count)
        return noise(count), torch.arange(count)

    callback = evaluator_callback(evaluator, sample, 13, batch_size=2)
    given, labels = [], []
    for rank in range(3):  # of 5, 4 and 4 images
        asked.clear()
        callback.on_train_epoch_end(Trainer(rank, world_size=3), module)
        assert asked == [2, 2, 1]
        given.append(callback.comparison.samples.images)
        labels.append(evaluator.state_dict()["labels"].tolist())
    assert given == [5, 4, 4]
    assert labels == [[0, 1, 0, 1, 0], [0, 1, 0, 1], [0, 1, 0, 1]]


@theirs
@pytest.mark.usefixtures("torchvision_stand_in")
def test_torchmetrics(evaluator: Evaluator, images: NDArray[np.uint8]) -> None:
    torchmetrics = optional("torchmetrics", "torchmetrics")
    metric = evaluator_metric(evaluator)
    assert metric(noise(30)) == {}
    both = torchmetrics.MetricCollection({"of_samples": metric, "other": torchmetrics.MeanMetric()})
    again = both["of_samples"].clone()
    metric.update(noise(25, seed=1))
    samples = np.concatenate([as_bytes(noise(30)), as_bytes(noise(25, seed=1))])
    expected = compare(images, samples, **ARGUMENTS)
    found = metric.compute()
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        scalars(expected, ""), rel=1e-6
    )
    assert metric.comparison.scores == expected.scores
    # No score is kept: a rank that has one would not take part when another computes.
    metric.evaluator.update(noise(9, seed=3))
    assert metric.compute()["fid"] != found["fid"]
    # So do those that torch.save(module) keeps.
    file = io.BytesIO()
    torch.save(metric, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    assert type(saved) is type(metric)
    assert saved.compute() == metric.compute()
    saved.reset()
    saved.update(noise(25, seed=1))
    assert saved.compute()["fid"] == compare(images, samples[30:], **ARGUMENTS)["fid"]
    # A clone goes on by itself.
    again.update(noise(9, seed=2))
    assert again.compute()["fid"] != found["fid"]
    metric.reset()
    metric.update(noise(30))
    assert metric.compute()["fid"] == compare(images, samples[:30], **ARGUMENTS)["fid"]


def test_tensorboard(comparison: Comparison, tmp_path: Path) -> None:
    optional("tensorboard", "train")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:  # type: ignore[no-untyped-call]
        log_to_tensorboard(writer, comparison, 7)
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    assert {name: event[0].value for name, event in found.items()} == pytest.approx(
        scalars(comparison), rel=1e-6
    )
    assert {event[0].step for event in found.values()} == {7}
    (text,) = events.Tensors("evalkit/notes/text_summary")
    assert "published numbers use 50,000" in text.tensor_proto.string_val[0].decode()


@theirs
def test_wandb(comparison: Comparison, tmp_path: Path) -> None:
    wandb = optional("wandb", "wandb")
    with wandb.init(project="x", mode="offline") as run:
        log_to_wandb(run, comparison, 7)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    # On a busy machine its own process writes for a while after the run has ended.
    until(lambda: bool(wandb_history(file)))
    history = wandb_history(file)
    assert history.pop("_step") == 7
    assert {name: value for name, value in history.items() if name[0] != "_"} == scalars(comparison)


def wandb_history(file: Path) -> dict[str, float]:
    """The only step in the log of a run, if it is there: protocol buffers in the log format of LevelDB."""
    from wandb.proto import wandb_internal_pb2

    data, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(data):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                return {item.key or ".".join(item.nested_key): float(item.value_json) for item in items}
    return {}


@theirs
def test_model_card(comparison: Comparison) -> None:
    hub = optional("huggingface_hub", "hub")
    text = model_index(comparison, model="m", dataset="cifar10", dataset_name="CIFAR-10")
    assert text.startswith("model-index:\n- name: m\n")
    card = hub.ModelCard(f"---\n{text}---\n# m\n")
    found = {each.metric_type: each for each in card.data.eval_results}
    assert {name: each.metric_value for name, each in found.items()} == {
        score.name: score.value for score in comparison.scores
    }
    fid = found["fid"]
    assert (fid.metric_name, fid.dataset_type, fid.dataset_name) == ("FID", "cifar10", "CIFAR-10")
    assert fid.metric_args["protocol"] == "adm"
    assert fid.metric_args["images"] == 57
    assert fid.metric_args["reference"] == comparison.reference.digest
    assert fid.metric_args["stderr"] == comparison.score("fid").stderr  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("lightning", lambda comparison: evaluator_callback(None, noise, 5)),  # type: ignore[arg-type]
        ("torchmetrics", lambda comparison: evaluator_metric(None)),  # type: ignore[arg-type]
        (
            "huggingface_hub",
            lambda comparison: model_index(comparison, model="", dataset="", dataset_name=""),
        ),
    ],
)
def test_without_the_package(
    package: str, call: Any, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evalkit.integrations import lightning, torchmetrics

    for module in (lightning, torchmetrics):
        monkeypatch.setattr(module, "_kind", module._kind.__wrapped__)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.pytorch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'evalkit\["):
        call(comparison)


EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S)
PACKAGES = {
    "accelerate": "dev",
    "lightning": "lightning",
    "torchmetrics": "torchmetrics",
    "tensorboard": "train",
    "wandb": "wandb",
    "model_card": "hub",
}


@theirs
@pytest.mark.usefixtures("torchvision_stand_in")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: re.findall(r"import (\w+)$", text, re.M)[-1])
def test_examples(
    example: str,
    images: NDArray[np.uint8],
    comparison: Comparison,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for word, extra in PACKAGES.items():
        if re.search(rf"import {word}\b|integrations\.{word}\b|from {word}\b", example):
            optional("huggingface_hub" if word == "model_card" else word, extra)
    monkeypatch.setitem(EXTRACTORS, "inception", "stand_ins:InceptionPixels")
    monkeypatch.chdir(tmp_path)
    np.savez("ref.npz", images)
    Path("record.json").write_text(comparison.to_json())
    model = toy_module() if "lightning" in example else type("Model", (), {"sample": staticmethod(noise)})
    known = {
        "comparison": comparison,
        "loader": DataLoader(torch.zeros(2, 1)),  # type: ignore[arg-type]
        "model": model,
        "train_one_epoch": lambda model: None,
    }
    exec(compile(example, "during_training.md", "exec"), known)
    assert bool(capsys.readouterr().out) == ("print(" in example)
