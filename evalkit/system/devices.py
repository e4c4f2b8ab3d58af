"""Choose a torch device, set its float32 arithmetic, and handle out-of-memory errors."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import os
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from evalkit.errors import InputError, brief, first_line
from evalkit.system.processes import local_rank

__all__ = [
    "accelerator",
    "check_not_forked",
    "float32_arithmetic",
    "float64_device",
    "has_fast_bfloat16",
    "has_triton",
    "is_out_of_memory",
    "prepare_forked_process",
    "resolve_device",
    "with_smaller_batches",
]

T = TypeVar("T")

# The process that imported this module, and with it torch.
_HOME_PROCESS = os.getpid()


def prepare_forked_process() -> None:
    """Make torch usable in a forked process; does nothing in any other process.

    A fork does not copy OpenMP's threads, so the first parallel operation would hang. With a single thread,
    torch does not use them.
    """
    if os.getpid() == _HOME_PROCESS or torch.get_num_threads() == 1:
        return
    torch.set_num_threads(1)
    warnings.warn(
        "This process was forked, and computes with one thread. Processes that are started with "
        "multiprocessing.get_context('spawn') use all.",
        stacklevel=3,
    )


def check_not_forked(device: torch.device) -> None:
    """Raise an InputError for CUDA in a process whose parent used CUDA before the fork."""
    if device.type == "cuda" and torch.cuda._is_in_bad_fork():
        raise InputError(
            "This process was forked from one that uses CUDA, and cannot use it. Start processes with "
            "multiprocessing.get_context('spawn'), or give the device cpu."
        )


def resolve_device(name: str = "auto") -> torch.device:
    """The torch device for a name.

    Args:
        name: ``"auto"`` for a GPU if there is one (under torchrun, the GPU of the local rank), else the CPU.
            Or ``cpu``, ``cuda``, ``cuda:N`` or ``mps``, which must be usable.

    Raises:
        InputError: The device is unknown or not present on this machine, or CUDA after a fork.
    """
    device = _automatic() if name == "auto" else _named(name)
    check_not_forked(device)
    return device


def float64_device(name: str) -> torch.device:
    """As :func:`resolve_device`, but with the CPU in place of ``mps``, which does not support float64."""
    return resolve_device("cpu" if name.startswith("mps") else name)


def accelerator(name: str) -> torch.device | None:
    """The GPU with this name, for float64 products; None if the CPU has to compute them."""
    device = float64_device(name)
    return None if device.type == "cpu" else device


def _automatic() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = local_rank()
    # If there are more processes than GPUs, they share GPUs.
    return torch.device("cuda") if local is None else torch.device("cuda", local % torch.cuda.device_count())


def _named(name: str) -> torch.device:
    choices = "Give auto, cpu, cuda, cuda:N or mps."
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"Unknown device {name[:80]!r}. {choices}") from None
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if device.type not in present:
        raise InputError(f"Device {name[:80]!r} is not supported. {choices}")
    if not present[device.type]:
        raise InputError(f"Device {name[:80]!r} is not present on this machine. Use --device auto or cpu.")
    return device


def has_fast_bfloat16(name: str) -> bool:
    """Whether a device is a CPU with bfloat16 instructions, which are several times as fast as float32."""
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch has no public API for this
    return resolve_device(name).type == "cpu" and known is not None and bool(known())


# These settings are global to the process, so a lock keeps threads from changing them concurrently.
_ARITHMETIC = threading.RLock()


@contextlib.contextmanager
def float32_arithmetic(*, tf32: bool = False, deterministic: bool | None = None) -> Iterator[None]:
    """Set the precision of float32 convolutions and matrix products within the block.

    Otherwise, torch allows TF32 in convolutions on CUDA, and the autocast of an enclosing training loop
    would compute in float16. cuDNN is enabled, and chooses algorithms by heuristics. Only one thread at a
    time can be in the block.

    Args:
        tf32: Whether TF32 is allowed on CUDA; False is full float32, on a CPU too.
        deterministic: Whether cuDNN must be deterministic; None leaves the setting unchanged.
    """
    cudnn: Any = torch.backends.cudnn
    with _ARITHMETIC, contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        restore = _remember_float32()
        flags = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
        try:
            # In benchmark mode, cuDNN may choose different algorithms in another process.
            cudnn.enabled, cudnn.benchmark = True, False
            # These also set most of torch's newer settings, so that reading either raises no error.
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            cudnn.allow_tf32 = tf32
            # Settings still at "none" follow a global setting, which may be TF32.
            for place in () if tf32 else _newer_settings():
                place.fp32_precision = "ieee"
            if deterministic is not None:
                cudnn.deterministic = deterministic
            yield
        finally:
            for name, value in flags.items():
                setattr(cudnn, name, value)
            restore()


def _newer_settings() -> tuple[Any, ...]:
    """The objects that have ``fp32_precision``, a setting per operator since torch 2.9."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        return ()
    return (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    )


def _remember_float32() -> Callable[[], None]:
    """A function that restores the current float32 settings.

    Since torch 2.9 there are two interfaces to them. Once a program has used one, reading the other may
    raise. Setting the older one also sets the newer one, so the newer one is read, and restored last.
    """
    matmul, tf32 = "highest", True
    with contextlib.suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        tf32 = torch.backends.cudnn.allow_tf32
    newer = [(place, place.fp32_precision) for place in _newer_settings()]

    def restore() -> None:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = tf32
        for place, precision in newer:
            place.fp32_precision = precision

    return restore


OLDEST_TRITON = (3, 3)


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton can compile kernels for a device; warns if it is installed but cannot.

    It needs a GPU of compute capability 8.0 or higher, and a C compiler.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    release = importlib.metadata.version("triton").split(".")[:2]
    if torch.cuda.get_device_capability(device) < (8, 0) or tuple(map(int, release)) < OLDEST_TRITON:
        return False
    try:
        from evalkit.system.triton_probe import probe

        probe(device)
    except Exception as error:  # many types: no compiler, no headers, an incompatible driver
        reason = brief(first_line(error), 200)
        warnings.warn(
            f"Triton is installed and cannot compile for {device}, so slower kernels are used: {reason}",
            stacklevel=2,
        )
        return False
    return True


# Messages of libraries that run out of memory, besides torch's own error.
_MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DEVICE_ALLOCATION_FAILED",
    # cuDNN's only message if no algorithm's workspace fits.
    "unable to find an engine",
    "Unable to find a valid cuDNN algorithm",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, cuBLAS or cuDNN means that a device is out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY_WORDS)


def with_smaller_batches(run: Callable[[int], T], batch_size: int, on_change: Callable[[int], object]) -> T:
    """Call ``run(batch_size)``; if the device runs out of memory, retry with half the batch size.

    Args:
        run: Does all of the work. It starts from the beginning each time, so that the whole result is
            computed with one batch size.
        batch_size: The first batch size to try.
        on_change: Called with each smaller batch size before it is tried.

    Raises:
        torch.OutOfMemoryError: Even batch size 1 does not fit.
    """
    while True:
        try:
            return run(batch_size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise torch.OutOfMemoryError(str(error)) from error
            # The traceback's frames keep the tensors of the failed attempt alive.
            traceback.clear_frames(error.__traceback__)
        gc.collect()
        torch.cuda.empty_cache()
        batch_size = (batch_size + 1) // 2
        on_change(batch_size)
