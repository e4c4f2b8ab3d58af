"""A toy training job of several ranks, for tests/test_evaluator.py: ``evaluator_ranks.py SIZE FOLDER``."""

from __future__ import annotations

import json
import multiprocessing
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from stand_ins import NO_STORE, InceptionPixels

from evalkit import Evaluator
from evalkit.errors import EvalkitError
from evalkit.features import store
from evalkit.system.ranks import Ranks

SHARES = [(23, 37), (60, 0), (0, 55)]
"""How many images each rank makes in each epoch."""


def samples(epoch: int, count: int, rank: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What the toy model makes: darker in later epochs."""
    rng = np.random.default_rng([epoch, rank])
    return (rng.integers(0, 256, (count, 8, 8, 3)) // (epoch + 1)).astype(np.uint8)


SEND = dist.send


def send_no_features(tensor: torch.Tensor, *arguments: Any, **others: Any) -> None:
    assert not tensor.is_floating_point(), "features were sent, although sums are enough"
    SEND(tensor, *arguments, **others)


def train(rank: int, size: int, folder: Path) -> None:
    """One rank: each epoch saves its images, and what every evaluator says of them."""
    store.SHARD = 16
    dist.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=size)
    arguments = {"run": NO_STORE, "extractor": InceptionPixels(batch_size=4)}
    whole = Evaluator(str(folder / "ref.npz"), **arguments)
    sums = Evaluator(str(folder / "ref.npz"), metrics=["fid", "sfid"], **arguments)
    for epoch, shares in enumerate(SHARES):
        images = samples(epoch, shares[rank], rank)
        np.save(folder / f"{epoch}-{rank}.npy", images)
        for evaluator in (whole, sums):
            evaluator.reset()
            for begin in range(0, len(images), 7):
                batch = torch.from_numpy(images[begin : begin + 7]).permute(0, 3, 1, 2)
                evaluator.update(batch, labels=torch.arange(len(batch)) % 3)
        (folder / f"{epoch}-{rank}-whole.json").write_text(whole.compute().to_json())
        dist.send = send_no_features
        (folder / f"{epoch}-{rank}-sums.json").write_text(sums.compute().to_json())
        dist.send = SEND
    alike = Evaluator(str(folder / "ref.npz"), metrics=["fid"], **arguments)
    for part in (samples(0, 40, 0), samples(1, 40, rank)):
        alike.update(part)
    (folder / f"alike-{rank}.json").write_text(alike.compute().to_json())
    errors = []
    other = Evaluator(str(folder / "ref.npz"), metrics=["fid"] if rank else None, **arguments)
    lone = Evaluator(str(folder / "ref.npz"), **arguments)
    mixed = Evaluator(str(folder / "ref.npz"), **arguments)
    mixed.update(np.zeros((2, 8 + rank, 8, 3), np.uint8))
    if not rank:
        lone.update(np.zeros((1, 8, 8, 3), np.uint8))
    # Of so few images compare() keeps features, of more the sums alone.
    few, images = folder / f"few-{rank}.npz", samples(0, 5, rank)
    np.savez(few, images)
    against = Evaluator(str(few if rank else folder / "ref.npz"), metrics=["fid"], **arguments)
    against.update(images)
    for evaluator in (other, lone, mixed, against):
        try:
            evaluator.compute()
        except EvalkitError as error:
            errors.append(f"{type(error).__name__}: {error}")
    (folder / f"errors-{rank}.json").write_text(json.dumps(errors))
    without_memory(rank, folder, [whole, sums])
    with_failures(rank, folder, sums)
    dist.destroy_process_group()


def without_memory(rank: int, folder: Path, evaluators: list[Evaluator]) -> None:
    """The last rank cannot send its rows, then its sums; afterwards all goes on."""
    errors = []
    device = Ranks._device
    if rank:
        Ranks._device = out_of_memory
    for evaluator in evaluators:
        try:
            evaluator.compute()
        except (EvalkitError, MemoryError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    Ranks._device = device
    errors += [evaluator.compute().samples.images for evaluator in evaluators]
    (folder / f"memory-{rank}.json").write_text(json.dumps(errors))


def with_failures(rank: int, folder: Path, evaluator: Evaluator) -> None:
    """Sampling fails on one rank, then on both, then yields nothing; afterwards everything works."""
    errors: list[Any] = []
    for failing in ([1], [0], [0, 1], []):
        evaluator.reset()
        # As around training with the Lightning callback, which has its own block: the error is sent once.
        around = evaluator.propagate_errors() if failing == [1] else nullcontext()
        try:
            with around, evaluator.propagate_errors():
                if failing:
                    evaluator.update(samples(0, 40, rank))
                if rank in failing:
                    raise OSError(f"no disk on {rank}")
                evaluator.compute()
        except (EvalkitError, OSError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    try:
        with evaluator.propagate_errors():
            evaluator.update(samples(0, 40, rank)[..., : 3 - rank])
        evaluator.compute()
    except EvalkitError as error:
        errors.append(f"{type(error).__name__}: {error}")
    if find_spec("lightning") is not None:
        errors.append(in_lightning(rank, evaluator))
    evaluator.reset()
    evaluator.update(samples(0, 40, rank))
    errors.append(evaluator.compute().samples.images)
    (folder / f"failures-{rank}.json").write_text(json.dumps(errors))


def in_lightning(rank: int, evaluator: Evaluator) -> str:
    """The callback's error if its second batch fails on rank 1."""
    from evalkit.integrations.lightning import evaluator_callback

    batches = iter([0, rank])

    def sample(module: object, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if next(batches):
            raise OSError("no disk")
        return samples(0, count, rank)

    trainer = SimpleNamespace(current_epoch=0, global_rank=rank, world_size=2)
    try:
        callback = evaluator_callback(evaluator, sample, 80, batch_size=20)
        callback.on_train_epoch_end(trainer, torch.nn.Module())
    except (EvalkitError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def out_of_memory(ranks: Ranks) -> torch.device:
    raise MemoryError("so many GiB")


def main(size: int, folder: Path) -> int:
    """All ranks; forked, so that the libraries are loaded once."""
    if find_spec("lightning") is not None:
        import lightning.pytorch  # noqa: F401
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=train, args=(rank, size, folder)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return max(abs(rank.exitcode or 0) for rank in ranks)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
