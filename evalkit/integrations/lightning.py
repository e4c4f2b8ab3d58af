"""A Lightning callback that samples from the model while it trains, and logs the scores."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch

from evalkit.errors import InputError, MissingDependencyError
from evalkit.evaluator import Evaluator
from evalkit.integrations import scalars
from evalkit.results import Comparison

__all__ = ["evaluator_callback"]


def evaluator_callback(
    evaluator: Evaluator,
    sample: Callable[[Any, int], Any],
    images: int,
    *,
    batch_size: int = 64,
    every: int = 1,
    prefix: str = "evalkit/",
) -> Any:
    """A ``lightning.pytorch.Callback`` that evaluates the model at the end of epochs.

    The images are divided among the ranks. The model is evaluated in eval mode, without gradients; its mode
    is restored afterwards. Each rank and epoch has its own random numbers, derived from torch's seed, even
    after ``seed_everything``. The random state of the CPU and of CUDA is restored. If sampling fails on one
    rank, all ranks fail.

    The module logs scores in the epochs that are measured. In other epochs they are removed from
    ``trainer.callback_metrics``, so that an old score is never mistaken for a new one:
    ``EarlyStopping(monitor="evalkit/fid", strict=False)`` counts its patience in measurements, and
    ``ModelCheckpoint(monitor="evalkit/fid", every_n_epochs=every)`` saves the best weights. The last
    comparison is the attribute ``comparison``.

    Args:
        evaluator: The evaluator, which is reset before each measurement.
        sample: Called with the module and a number of images; returns images, or images and labels, as for
            ``Evaluator.update``. It is called equally often on every rank, with the same numbers.
        images: Number of images, over all ranks.
        batch_size: Number of images per call of ``sample``.
        every: Epochs between measurements; the first is at the end of epoch ``every``, counted from 1.
        prefix: See :func:`evalkit.integrations.scalars`.

    Raises:
        InputError: A number is below 1. Or, when training starts: a ``ModelCheckpoint`` or ``EarlyStopping``
            monitors a score at times when the current weights have none.
        MissingDependencyError: Lightning is not installed.
    """
    for name, value in (("images", images), ("batch_size", batch_size), ("every", every)):
        if value < 1:
            raise InputError(f"{name}={value!r}: expected a whole number from 1.")
    return _kind()(evaluator, sample, images, batch_size, every, prefix)


@cache
def _kind() -> Any:
    """The class; it is made when it is needed, because its base is Lightning's."""
    try:
        from lightning.pytorch import Callback
        from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
    except ImportError as error:
        raise MissingDependencyError(
            f"This callback needs Lightning, which cannot be imported ({error}): "
            "pip install 'evalkit[lightning]'"
        ) from None

    class EvaluatorCallback(Callback):  # type: ignore[misc]
        """See :func:`evaluator_callback`."""

        def __init__(
            self,
            evaluator: Evaluator,
            sample: Callable[[Any, int], Any],
            images: int,
            batch_size: int,
            every: int,
            prefix: str,
        ) -> None:
            self.evaluator = evaluator
            self.comparison: Comparison | None = None
            self._sample = sample
            self._images = images
            self._batch_size = batch_size
            self._every = every
            self._prefix = prefix
            self._logged: set[str] = set()

        def __reduce__(self) -> tuple[Any, ...]:
            return _blank, (), vars(self)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            del pl_module
            for each in trainer.callbacks:
                monitor = each.monitor if isinstance(each, (ModelCheckpoint, EarlyStopping)) else None
                # Without a prefix, a score looks like anything else that is logged.
                if not self._prefix or not monitor or not monitor.startswith(self._prefix):
                    continue
                if isinstance(each, ModelCheckpoint):
                    self._check_checkpoint(each, trainer)
                else:
                    self._check_stopping(each)

        def _check_checkpoint(self, checkpoint: ModelCheckpoint, trainer: Any) -> None:
            epochs = checkpoint.every_n_epochs
            is_after_validation = not checkpoint._should_save_on_train_epoch_end(trainer)
            if not epochs or epochs % self._every or is_after_validation:
                raise InputError(
                    f"ModelCheckpoint(monitor={checkpoint.monitor!r}) does not save at the end of measured "
                    "epochs only, so it would save weights with the score of other weights. Give it "
                    f"every_n_epochs={self._every} and save_on_train_epoch_end=True."
                )

        def _check_stopping(self, stopping: EarlyStopping) -> None:
            if not stopping._check_on_train_epoch_end:
                raise InputError(
                    f"EarlyStopping(monitor={stopping.monitor!r}) checks after validation, before the score "
                    "of the epoch is available. Give it check_on_train_epoch_end=True."
                )
            if stopping.strict and self._every > 1:
                raise InputError(
                    f"EarlyStopping(monitor={stopping.monitor!r}) expects a score after each epoch; there is "
                    f"one after every {self._every}. Give it strict=False: then it skips epochs without a "
                    "score, and patience counts measurements."
                )

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if (trainer.current_epoch + 1) % self._every:
                for name in [name for name in trainer.callback_metrics if name in self._logged]:
                    del trainer.callback_metrics[name]
                return
            share, more = divmod(self._images, trainer.world_size)
            # Every rank samples equally often and equally many images, because with a sharded model (FSDP)
            # each call involves all ranks. Images beyond a rank's share are dropped.
            largest = share + (more > 0)
            share += trainer.global_rank < more
            modes = {module: module.training for module in pl_module.modules()}
            pl_module.eval()
            self.evaluator.reset()
            try:
                with (
                    self.evaluator.propagate_errors(),
                    torch.no_grad(),
                    _own_random_numbers(trainer.current_epoch, trainer.global_rank),
                ):
                    for begin in range(0, largest, self._batch_size):
                        count = min(self._batch_size, largest - begin)
                        found = self._sample(pl_module, count)
                        given = found if isinstance(found, tuple) else (found,)
                        if share - begin < count:
                            given = tuple(each[: max(share - begin, 0)] for each in given)
                        self.evaluator.update(*given)
            finally:
                for module, mode in modes.items():
                    module.training = mode
            self.comparison = self.evaluator.compute()
            found = scalars(self.comparison, self._prefix)
            self._logged |= {*found}
            pl_module.log_dict(found)

    return EvaluatorCallback


def _blank() -> Any:
    """An instance without attributes, for pickle, which cannot find a class that a function made."""
    return _kind().__new__(_kind())


@contextmanager
def _own_random_numbers(epoch: int, rank: int) -> Iterator[None]:
    """Random numbers that no other rank and epoch has; afterwards all generators are as they were."""
    from lightning.pytorch.utilities.seed import isolate_rng

    with isolate_rng():
        seeds = np.random.SeedSequence([torch.initial_seed() % 2**64, epoch, rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        # What a sampler may use besides torch; the legacy global generator is what seed_everything seeds.
        np.random.seed(seeds.generate_state(4))  # noqa: NPY002
        random.seed(seeds.generate_state(1, np.uint64).tobytes())
        yield
