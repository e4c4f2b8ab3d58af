"""What a sampling step asks of a GPU, counted by a fake one whose kernels do nothing."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_networks
import torch
from torch import Tensor

from generation import noise, noise_kernel
from generation.batch import Networks, sample_batch
from generation.checkpoints import load_network
from generation.networks import graphs
from generation.networks.graphs import Replay
from generation.networks.precision import arithmetic
from generation.samplers.base import Sampler
from generation.samplers.ddim import DDIM
from generation.samplers.ddpm import DDPM
from generation.samplers.dpm_solver_pp_2m import DPMSolverPP2M
from generation.settings import Settings

REASON = "counts need the fake GPU: its folder on PYTHONPATH, and PyTorch for CUDA"
pytest.importorskip("fakeconv", reason=REASON)  # replaces the operators of cuDNN
Delta = pytest.importorskip("counting", reason=REASON).Delta

CUDA = torch.device("cuda")
SETTINGS = Settings(count=4, scale=3.0, shard_size=4)


class Once:
    """Records nothing: the fake GPU has no graphs. What is counted is all that is outside of them."""

    def record(self, run: Callable[[], Tensor], device: torch.device) -> tuple[Replay, Tensor]:
        return (lambda: None), run()

    def release(self) -> None:
        """Nothing was recorded."""


def networks(folder: Path, precision: str) -> Networks:
    diffusion = load_network(small_networks.write(folder, "unet", "diffusion"))
    classifier = load_network(small_networks.write(folder, "classifier", "classifier"))
    return Networks.prepare(diffusion, classifier, precision=precision, device=CUDA)


@pytest.mark.parametrize(
    ("precision", "sampler", "launches"),
    [
        ("published", DDPM(), None),
        ("fast", DDPM(), 40),
        ("fast", DDIM(eta=0.5), 40),
        ("fast", DPMSolverPP2M(), 40),
        ("fast", DPMSolverPP2M(thresholding="dynamic"), None),
    ],
    ids=str,
)
def test_a_guided_step_neither_waits_nor_copies_from_the_host(
    precision: str,
    sampler: Sampler,
    launches: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "CudaRecorder", Once)
    name = "generation.networks.kernels"
    if importlib.util.find_spec(name) is None:
        kernels = types.ModuleType(name)
        kernels.use_kernels = lambda network: None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, kernels)
    ours, counted = networks(tmp_path, precision), []
    for steps in (2, 4, 8):  # the first also compiles
        settings = replace(SETTINGS, respacing=str(steps), sampler=sampler)
        with arithmetic(precision), Delta() as delta:
            sample_batch(settings, ours, range(4), labels=np.arange(4))
        counted.append(delta)
    _, few, many = counted
    step = {kind: (many[kind] - few.get(kind, 0)) / 4 for kind in many}
    assert not {kind for kind in ("sync", "evsync", "h2d", "d2h", "recompiles") if step.get(kind)}, step
    assert few["sync"] <= 2  # the indices and the classes of a batch
    if launches:
        assert step["launch"] <= launches
        assert "gemm" not in step


def test_the_noise_is_one_kernel_that_rounds_every_operation() -> None:
    indices = torch.tensor([1, 2, 2**32 - 1], device=CUDA)
    for seed, step, count in ((0, 0, 16), (2**64 - 1, 999, 17), (2**31, 1, 4096), (16, 16, 1)):
        with Delta() as delta:
            noise.normal(seed, indices, step, 1 | 64 << 8, count)
        assert {kind: n for kind, n in delta.items() if kind != "malloc"} == {"launch": 1}
    compiled = [
        kernel for cache in noise_kernel._normal.device_caches.values() for kernel in cache[0].values()
    ]
    assert len(compiled) == 1  # for all seeds, steps and counts
    operations = set(re.findall(r"\b\w+(?:\.\w+)*\.f64\b", compiled[0].asm["ptx"]))
    assert {"add.rn.f64", "mul.rn.f64", "div.rn.f64", "sqrt.rn.f64", "cvt.rn.f32.f64"} <= operations
    assert not [operation for operation in operations if operation.startswith(("fma", "mad"))]
