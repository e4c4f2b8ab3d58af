"""The stages of acceptance.py: ``python benchmarks/gpu/stages.py NAME`` runs one of them.

A stage prints its results as lines of JSON with ``what``, ``value`` and what else belongs to them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from results import CUDA, guarded, report, seconds_of
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / place) for place in ("tests/support", "tests/generation", "tests", "benchmarks")]


def machine() -> None:
    """What this machine is, and its rates."""
    import triton

    properties = torch.cuda.get_device_properties(CUDA)
    report("device", properties.name, multiprocessors=properties.multi_processor_count)
    report("memory, GiB", properties.total_memory / 2**30)
    report("versions", f"Python {sys.version.split()[0]}", numpy=np.__version__, triton=triton.__version__)
    with guarded("cuDNN"):
        report("cuDNN", torch.backends.cudnn.version())
    report("torch", torch.__version__, cuda=torch.version.cuda)
    from evalkit.system.devices import float32_arithmetic

    for name, dtype, n in (
        ("bfloat16", torch.bfloat16, 8192),
        ("float16", torch.float16, 8192),
        ("tf32", torch.float32, 8192),
        ("float32", torch.float32, 8192),
        ("float64", torch.float64, 4096),
    ):
        a = torch.randn(n, n, device=CUDA, dtype=dtype)
        with float32_arithmetic(tf32=name == "tf32"):
            seconds = seconds_of(lambda a=a: a @ a, 5)
        report(f"matrix product, {name}, TFLOP/s", 2 * n**3 / seconds / 1e12)
    one, two = (torch.empty(2**31, dtype=torch.uint8, device=CUDA) for _ in range(2))
    report("copy on the device, TB/s", 2 * 2**31 / seconds_of(lambda: one.copy_(two), 5) / 1e12)
    host = torch.empty(2**28, dtype=torch.uint8).pin_memory()
    small = one[: 2**28]
    report("pinned to device, GB/s", 2**28 / seconds_of(lambda: small.copy_(host, non_blocking=True)) / 1e9)
    report("device to pinned, GB/s", 2**28 / seconds_of(lambda: host.copy_(small, non_blocking=True)) / 1e9)
    _convolutions()
    _attention()


def _convolutions() -> None:
    """Rates of the convolutions of the 256x256 networks, and of what surrounds them."""
    for batch, channels, side in ((16, 256, 256), (16, 256, 128), (16, 512, 64), (16, 1024, 32)):
        for dtype in (torch.float16, torch.bfloat16):
            x = torch.randn(batch, channels, side, side, device=CUDA, dtype=dtype)
            w = torch.randn(channels, channels, 3, 3, device=CUDA, dtype=dtype) * 0.02
            x, w = (tensor.to(memory_format=torch.channels_last) for tensor in (x, w))
            flop = 2 * batch * side**2 * channels**2 * 9
            rates = {}
            for deterministic, benchmark in ((True, False), (True, True)):
                with (
                    torch.backends.cudnn.flags(
                        enabled=True, benchmark=benchmark, deterministic=deterministic, allow_tf32=True
                    ),
                    torch.no_grad(),
                ):
                    forward = seconds_of(lambda x=x, w=w: F.conv2d(x, w, padding=1), 5)
                    backward = seconds_of(
                        lambda x=x, w=w: torch.ops.aten.convolution_backward(
                            x, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
                        ),
                        5,
                    )
                name = "benchmark" if benchmark else "heuristics"
                rates |= {name: round(flop / forward / 1e12), f"{name}_dgrad": round(flop / backward / 1e12)}
            report(
                f"3x3 convolution {batch}x{channels}x{side}x{side}, {str(dtype)[6:]}, TFLOP/s",
                rates.pop("heuristics"),
                **rates,
            )
    x = torch.randn(16, 256, 256, 256, device=CUDA, dtype=torch.float16).to(memory_format=torch.channels_last)
    report("torch's group norm 16x256x256x256, ms", 1e3 * seconds_of(lambda: F.group_norm(x, 32), 5))
    report("SiLU of it, ms", 1e3 * seconds_of(lambda: F.silu(x), 5))
    w = torch.randn(6, 256, 3, 3, device=CUDA).to(memory_format=torch.channels_last)
    wide = x.float()
    for layout in (torch.channels_last, torch.contiguous_format):
        a, b = wide.contiguous(memory_format=layout), w.contiguous(memory_format=layout)
        report(
            f"output convolution, float32, {str(layout)[6:]}, ms",
            1e3 * seconds_of(lambda a=a, b=b: F.conv2d(a, b, padding=1), 3),
        )
    half = w.half()
    report("output convolution, float16, ms", 1e3 * seconds_of(lambda: F.conv2d(x, half, padding=1), 3))


def _attention() -> None:
    """Fused attention by backend and head size, forward and backward, and whether it repeats its bytes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for dtype, heads, width, tokens in (
        (torch.float16, 8, 64, 1024),
        (torch.bfloat16, 8, 64, 1024),
        (torch.bfloat16, 4, 128, 1024),
        (torch.bfloat16, 4, 192, 1024),
        (torch.bfloat16, 4, 256, 256),
        (torch.bfloat16, 8, 96, 257),
    ):
        packed = torch.randn(16, tokens, 3 * heads * width, device=CUDA, dtype=dtype)
        q, k, v = (
            part.detach().requires_grad_()
            for part in packed.view(16, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
        )
        for backend in (
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
        ):
            for deterministic in (False, True):
                name = f"{backend.name}, {heads} heads of {width}, {tokens} tokens, {str(dtype)[6:]}"
                with guarded(name), sdpa_kernel(backend):
                    torch.use_deterministic_algorithms(deterministic)
                    try:
                        with torch.no_grad():
                            forward = seconds_of(
                                lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)
                            )

                        def both(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> tuple[Tensor, ...]:
                            out = F.scaled_dot_product_attention(q, k, v)
                            return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

                        first, second = both(), both()
                        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
                        report(
                            f"{name}, deterministic {deterministic}, us",
                            1e6 * forward,
                            forward_and_backward=round(1e6 * seconds_of(both)),
                            same_bytes=same,
                        )
                    finally:
                        torch.use_deterministic_algorithms(False)


def values() -> None:
    """CUDA against the CPU, and both against golden values."""
    import values as checks

    checks.main()


def extraction() -> None:
    """Images per second of Inception, by stage from a file to the store."""
    from extraction import stages

    from evalkit.extractors.inception import PRECISIONS

    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.exists() else None) as folder:
        for precision, rates in stages(Path(folder), 16_384, PRECISIONS).items():
            for stage, rate in rates.items():
                report(f"{precision}, {stage}, images/s", rate)


def sampling() -> None:
    """Guided images per second at 256x256."""
    _sampling(256, ("plain", "reference", "published", "fast", "fast-without-graphs"), 16)
    _sampling(256, ("plain", "fast"), 32)


def sizes() -> None:
    """Guided images per second at the other published sizes."""
    _sampling(64, ("plain", "fast"), 128)
    _sampling(128, ("plain", "fast"), 64)
    _sampling(512, ("plain", "fast"), 8)


def _sampling(size: int, loops: tuple[str, ...], batch: int) -> None:
    from sampling import measure

    for loop in loops:
        with guarded(f"{size}, {loop}, batch {batch}"):
            row = measure(size, loop, device=CUDA, batch_size=batch, steps=2, rounds=2)
            row = {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in row.items()}
            report(
                f"{size}x{size}, {loop}, batch {batch}, images/s", row.pop("images_per_second", None), **row
            )


def kernels() -> None:
    """The kernels of a sampling step one by one, against what the machine allows."""
    import kernels as benchmark

    benchmark.main(["--batch", "16"])


def neighbours() -> None:
    """Precision and recall of 50,000 against 50,000, and whether CUDA and CPU agree exactly."""
    from evalkit.metrics.precision_recall import precision_recall

    generator = torch.Generator(CUDA).manual_seed(0)

    def features(n: int) -> np.ndarray[Any, Any]:
        basis = torch.randn(256, 2048, device=CUDA, generator=torch.Generator(CUDA).manual_seed(1))
        scales = torch.linspace(3, 0.05, 256, device=CUDA)
        z = torch.randn(n, 256, device=CUDA, generator=generator) * scales
        rows = (z @ basis / 16 + 0.1 * torch.randn(n, 2048, device=CUDA, generator=generator)).relu_()
        return rows.cpu().numpy()

    small = features(3000), features(3000)
    for arithmetic in ("exact", "float16"):
        with guarded(f"precision and recall, {arithmetic}"):
            cpu, gpu = (precision_recall(*small, arithmetic=arithmetic, device=d) for d in ("cpu", "cuda"))
            report(f"precision and recall equal on CPU and CUDA, {arithmetic}", cpu == gpu, cpu=cpu, gpu=gpu)
    large = features(50_000), features(50_000)
    for arithmetic in ("exact", "float16"):
        with guarded(f"precision and recall of 50,000, {arithmetic}"):
            begin = time.perf_counter()
            found = precision_recall(*large, arithmetic=arithmetic, device="cuda")
            report(
                f"precision and recall of 50,000, {arithmetic}, s", time.perf_counter() - begin, found=found
            )


class Stages:
    """A progress callback that notes how long each stage of a job took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """As progress: the time since the last call belongs to the stage that is reported."""
        del done, total
        now = time.perf_counter()
        stage = stage.split(" of /")[0]
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._since, 2)
        self._since = now


def _write_images(path: Path, n: int, seed: int) -> None:
    """An npz of images of 256x256, stored: 512 of smooth noise, shifted so that all differ."""
    from evalkit.images import NpzWriter

    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.random((512, 3, 32, 32), np.float32)).to(CUDA)
    smooth = F.interpolate(coarse, (256, 256), mode="bicubic").clamp(0, 1).mul(255).byte()
    with NpzWriter.create(path, (n, 256, 256, 3)) as writer:
        for first in range(0, n, 512):
            shifted = smooth[: n - first].roll((first % 251, first % 239), (2, 3)).permute(0, 2, 3, 1)
            writer.append(shifted.contiguous().cpu().numpy())


def compare() -> None:
    """A whole comparison of two npz files of 50,000 images of 256x256."""
    import os
    import shutil

    from evalkit.comparison import compare as compare_batches
    from evalkit.extractors.inception import Inception
    from evalkit.extractors.weights import load_weights

    weights = load_weights()
    n = int(os.environ.get("EVALKIT_ACCEPTANCE_IMAGES", "50000"))
    memory = Path("/dev/shm")
    fits = memory.exists() and shutil.disk_usage(memory).free > 6e5 * n
    with tempfile.TemporaryDirectory(dir=memory if fits else None) as name:
        folder = Path(name)
        begin = time.perf_counter()
        for seed, side in enumerate(("ref", "samples")):
            _write_images(folder / f"{side}.npz", n, seed)
        where = "in memory" if fits else "on disk"
        report("two npz written", time.perf_counter() - begin, images=n, where=where)
        for precision in ("float32", "bfloat16"):
            for state in ("cold", "features stored"):
                with guarded(f"compare, {precision}, {state}"):
                    stages, begin = Stages(), time.perf_counter()
                    result = compare_batches(
                        str(folder / "ref.npz"),
                        str(folder / "samples.npz"),
                        metrics=["fid", "sfid", "precision_recall"],
                        extractor=Inception(weights, device="cuda", precision=precision),
                        device="cuda",
                        store=folder / "store",
                        progress=stages,
                    )
                    took = time.perf_counter() - begin
                    scores = {
                        score: round(result[score], 4) for score in ("fid", "sfid", "precision", "recall")
                    }
                    report(
                        f"compare {n} x {n}, {precision}, {state}, s", took, **scores, stages=stages.seconds
                    )


def training() -> None:
    """Images per second of a training step."""
    from evalkit.images import open_images
    from generation.process_group import ProcessGroup
    from generation.recipe import load_recipe
    from generation.trainer import Trainer
    from generation.training_data import Batch

    for precision in ("float32", "bfloat16"):
        for size in (128, 512):
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


STAGES: dict[str, Callable[[], None]] = {
    stage.__name__: stage
    for stage in (machine, values, extraction, sampling, kernels, neighbours, compare, sizes, training)
}

if __name__ == "__main__":
    STAGES[sys.argv[1]]()
