"""What torchrun says in the environment."""

from __future__ import annotations

import pytest

from evalkit.errors import InputError
from evalkit.system.devices import resolve_device
from evalkit.system.processes import is_main_process, rank, world_size


@pytest.mark.parametrize(("number", "size"), [("2", "2"), ("x", "2"), ("-1", "2"), ("0", "0"), ("0", "")])
def test_a_bad_environment(monkeypatch: pytest.MonkeyPatch, number: str, size: str) -> None:
    monkeypatch.setenv("RANK", number)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(InputError, match="RANK="):
        world_size()


def test_rank_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (rank(), world_size(), is_main_process()) == (0, 1, True)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (rank(), world_size(), is_main_process()) == (3, 4, False)


def test_each_process_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert str(resolve_device("auto")) == "cuda"
    for local_rank, device in (("3", "cuda:3"), ("5", "cuda:1")):  # more processes than GPUs
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert str(resolve_device("auto")) == device
        assert str(resolve_device("cuda:2")) == "cuda:2"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert str(resolve_device("auto")) == "cpu"
