"""Stages of acceptance.py: sampling and training of the ADM networks, and their kernels one by one."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from results import CUDA, guarded, is_reduced, reduced, report


def sampling() -> None:
    """Guided images per second at 256x256."""
    _sampling(256, ("fast", "plain", "published", "fast-without-graphs", "reference"), 16)
    _sampling(256, ("fast", "plain"), 32)


def sampling512() -> None:
    """The same at 512x512."""
    _sampling(512, ("fast", "plain"), 8)


def sizes() -> None:
    """Guided images per second at the other published sizes."""
    _sampling(64, ("fast", "plain"), 128)
    _sampling(128, ("fast", "plain"), 64)


def _sampling(size: int, loops: tuple[str, ...], batch: int) -> None:
    from sampling import measure

    batch = reduced(batch, 2)
    for loop in loops:
        with guarded(f"{size}, {loop}, batch {batch}"):
            row = measure(size, loop, device=CUDA, batch_size=batch, steps=2, rounds=2, small=is_reduced())
            row = {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in row.items()}
            report(
                f"{size}x{size}, {loop}, batch {batch}, images/s", row.pop("images_per_second", None), **row
            )


def kernels() -> None:
    """Each kernel of a sampling step, compared with the limits of the machine."""
    import kernels as benchmark

    benchmark.main(["--batch", str(reduced(16, 2))], standalone_mode=False)


def training() -> None:
    """Images per second of a training step."""
    from evalkit.images import open_images
    from generation.process_group import ProcessGroup
    from generation.recipe import load_recipe
    from generation.trainer import Trainer
    from generation.training_data import Batch

    for precision in ("bfloat16", "float32"):
        for size in map(reduced, (512, 128)):
            with guarded(f"training, {precision}, {size}"):
                recipe = load_recipe("cifar10_diffusion", precision=precision, batch_size=size)
                images: Any = open_images(np.zeros((size, 32, 32, 3), np.uint8))
                trainer = Trainer(recipe, images, device=CUDA, microbatch=None, group=ProcessGroup(0, 1))
                batch = Batch(
                    positions=torch.arange(size),
                    x_0=torch.rand(size, 3, 32, 32).mul_(2).sub_(1).to(CUDA),
                    y=(torch.arange(size) % 10).to(CUDA),
                )
                for step in range(13):
                    if step == 3:
                        torch.cuda.synchronize()
                        begin = time.perf_counter()
                    trainer.learn(batch)
                torch.cuda.synchronize()
                rate = 10 * size / (time.perf_counter() - begin)
                report(f"training cifar10_diffusion, {precision}, batch {size}, images/s", rate)
