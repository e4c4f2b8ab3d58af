"""Devices by name, float32 arithmetic, and smaller batches where memory is short."""

from __future__ import annotations

import pytest
import torch

from evalkit.errors import InputError
from evalkit.system.devices import float32_arithmetic, resolve_device, with_smaller_batches


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


def test_float32_arithmetic_is_restored_after_an_error() -> None:
    before = settings()
    with pytest.raises(ZeroDivisionError), float32_arithmetic(tf32=True, deterministic=True):
        raise ZeroDivisionError
    assert settings() == before


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


def test_not_even_one_fits() -> None:
    def run(batch_size: int) -> None:
        raise torch.OutOfMemoryError("simulated")

    with pytest.raises(torch.OutOfMemoryError):
        with_smaller_batches(run, 2, lambda size: None)


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
