"""Devices by name, float32 arithmetic, and smaller batches where memory is short."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
import types
import weakref
from typing import Any

import pytest
import torch

from evalkit.errors import InputError
from evalkit.system.devices import float32_arithmetic, has_triton, resolve_device, with_smaller_batches


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_absent_device_is_said() -> None:
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(InputError, match=r"'cuda:1' is not present.*--device auto"):
        resolve_device("cuda:1")


@pytest.mark.parametrize(
    ("name", "message"),
    [("warp", "Unknown device 'warp'.*cuda:N"), ("xla", "'xla' is not supported.*cuda:N")],
)
def test_device_that_does_not_exist(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_device(name)


def settings() -> tuple[str, bool, bool, bool]:
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.deterministic,
    )


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("tf32", [False, True])
def test_float32_arithmetic_is_set_and_restored(precision: str, tf32: bool) -> None:
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        before = settings()
        with float32_arithmetic(tf32=tf32, deterministic=True):
            assert settings() == ("high" if tf32 else "highest", tf32, tf32, True)
            with float32_arithmetic(tf32=not tf32):
                assert settings() == ("highest" if tf32 else "high", not tf32, not tf32, True)
            assert settings() == ("high" if tf32 else "highest", tf32, tf32, True)
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision(kept)


def test_autocast_is_off_in_float32_arithmetic() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with float32_arithmetic():
            assert (x @ x).dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16):  # who wants it within, has it
                assert (x @ x).dtype == torch.bfloat16
        assert (x @ x).dtype == torch.bfloat16


def test_float32_arithmetic_is_restored_after_an_error() -> None:
    before = settings()
    with pytest.raises(ZeroDivisionError), float32_arithmetic(tf32=True, deterministic=True):
        raise ZeroDivisionError
    assert settings() == before


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has the older settings only"
)
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("everywhere", [False, True])
def test_the_newer_settings_of_a_program_are_kept(tf32: bool, everywhere: bool) -> None:
    backends: Any = torch.backends
    places = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    kept = [place.fp32_precision for place in places]
    try:
        if everywhere:
            backends.fp32_precision = "tf32"
        else:
            for place in places:
                place.fp32_precision = "tf32"
        before = [place.fp32_precision for place in places]
        with float32_arithmetic(tf32=tf32):
            assert settings()[:3] == ("high" if tf32 else "highest", tf32, tf32)  # reading is no error
            if not tf32:
                assert {place.fp32_precision for place in places} == {"ieee"}
        assert [place.fp32_precision for place in places] == before
    finally:
        backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        for place, precision in zip(places, kept, strict=True):
            place.fp32_precision = precision
    settings()


@pytest.mark.parametrize(("fits", "tried"), [(8, [8]), (3, [8, 4, 2]), (1, [8, 4, 2, 1])])
def test_smaller_batches_until_they_fit(fits: int, tried: list[int]) -> None:
    sizes: list[int] = []
    changes: list[int] = []

    def run(batch_size: int) -> int:
        sizes.append(batch_size)
        if batch_size > fits:
            raise torch.OutOfMemoryError("simulated")
        return batch_size

    assert with_smaller_batches(run, 8, changes.append) == tried[-1]
    assert sizes == tried
    assert changes == tried[1:]


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_not_even_one_fits_in_the_words_of_each_library(words: str) -> None:
    def run(batch_size: int) -> None:
        raise RuntimeError(words)

    changes: list[int] = []
    with pytest.raises(torch.OutOfMemoryError, match=re.escape(words)):
        with_smaller_batches(run, 2, changes.append)
    assert changes == [1]


def test_other_errors_are_not_taken_for_a_full_memory() -> None:
    def run(batch_size: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        with_smaller_batches(run, 2, lambda size: pytest.fail("tried again"))


def test_what_a_failed_attempt_held_is_freed_before_the_next() -> None:
    class Held:
        pass

    held: list[weakref.ref[Held]] = []

    def attempt(batch_size: int) -> None:
        mine = Held()
        held.append(weakref.ref(mine))
        raise torch.OutOfMemoryError("simulated")

    def run(batch_size: int) -> int:
        if batch_size > 1:
            try:
                attempt(batch_size)
            except torch.OutOfMemoryError as error:
                error.itself = error  # a circle, as callers make them
                raise
        return batch_size

    def freed(batch_size: int) -> None:
        assert held
        assert held[-1]() is None

    assert with_smaller_batches(run, 4, freed) == 1


def test_only_usable_devices_are_accepted_and_local_ranks_share_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tpu", "cuda:99", "meta", "privateuseone"):
        with pytest.raises(InputError, match=name):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device() == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_RANK", "5")  # more workers than GPUs
    assert resolve_device() == torch.device("cuda", 1)


def test_cudnn_is_on_and_does_not_choose_by_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn: Any = torch.backends.cudnn
    before = cudnn.enabled, cudnn.benchmark
    cudnn.enabled, cudnn.benchmark = False, True
    try:
        with float32_arithmetic():
            assert (cudnn.enabled, cudnn.benchmark) == (True, False)
        assert (cudnn.enabled, cudnn.benchmark) == (False, True)
    finally:
        cudnn.enabled, cudnn.benchmark = before


def test_triton_that_cannot_compile_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_triton(torch.device("cpu"))
    module = types.ModuleType("evalkit.system.triton_probe")

    def probe(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    module.probe = probe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "evalkit.system.triton_probe", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.6.0+git")
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.warns(UserWarning, match="slower kernels are used: Failed to find C compiler"):
        assert not has_triton.__wrapped__(torch.device("cuda"))
    module.probe = lambda device: None  # type: ignore[attr-defined]
    assert has_triton.__wrapped__(torch.device("cuda"))
    capability = (7, 5)
    assert not has_triton.__wrapped__(torch.device("cuda"))
    capability = (9, 0)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.2.0")
    assert not has_triton.__wrapped__(torch.device("cuda"))
