"""Files of weights: recognised, loaded strictly, converted, refused with what to do."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from file_server import serving
from invoked import Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from evalkit.errors import DownloadError, InputError, OutputError
from evalkit.system.download import published_urls
from generation import published
from generation.checkpoints import (
    convert,
    identify,
    inspect,
    load_network,
    save_network,
    weights_digest,
)
from generation.networks.unet import UNetSettings
from generation.presets import MODELS, ModelPreset
from generation.published import cached, fetch

TINY = ModelPreset(
    name="tiny",
    kind="diffusion",
    network=UNetSettings(
        image_size=8,
        model_channels=32,
        out_channels=6,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
        num_classes=4,
    ),
    noise_schedule="cosine",
)
SMALL = ("128x128_classifier", "64x64_classifier")


def random_state(preset: ModelPreset) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = preset.build("meta").state_dict()
    return {name: torch.randn(shape.shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.pt"
    torch.save(random_state(TINY), path)
    return path


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in SMALL else pytest.mark.slow) for name in MODELS],
)
def test_published_layout_loads(name: str, tmp_path: Path) -> None:
    state = random_state(MODELS[name])
    path = tmp_path / MODELS[name].file
    torch.save(state, path)
    loaded = load_network(path, MODELS[name])
    assert loaded.preset is MODELS[name]
    assert list(loaded.network.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in loaded.network.state_dict().items())
    assert not loaded.network.training
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    assert MODELS[name] in inspect(path).fits


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_loading_maps_the_file(tiny: Path) -> None:
    """Nothing is copied, and writing to a parameter leaves the file alone."""
    before = tiny.read_bytes()
    network = load_network(tiny, TINY).network
    (mapping,) = (line for line in Path("/proc/self/maps").read_text().splitlines() if str(tiny) in line)
    start, end = (int(address, 16) for address in mapping.split()[0].split("-"))
    assert all(start <= parameter.data_ptr() < end for parameter in network.parameters())
    with torch.no_grad():
        next(network.parameters()).zero_()
    assert tiny.read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all names are Unicode")
def test_names_that_are_no_utf8(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    shutil.copy(tiny, folder / "tiny.pt")
    digest = load_network(tiny, TINY).digest
    assert load_network(folder / "tiny.pt", TINY).digest == digest
    assert convert(folder / "tiny.pt", folder / "tiny.safetensors", TINY).digest == digest
    assert load_network(folder / "tiny.safetensors").digest == digest
    with pytest.raises(InputError, match="cannot be read: No such file"):
        inspect(folder / "absent.pt")


def test_every_container_gives_the_same(tiny: Path, tmp_path: Path) -> None:
    state = torch.load(tiny, weights_only=True)
    legacy, tensors = tmp_path / "legacy.pt", tmp_path / "plain.safetensors"
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    save_file(state, tensors)
    loaded = [load_network(path, TINY) for path in (tiny, legacy, tensors)]
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs = [entry.network(x, torch.tensor([7]), torch.tensor([2])) for entry in loaded]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert len({entry.digest for entry in loaded}) == 1


def test_weights_digest() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    expected = hashlib.sha256(
        b"a(3, 2)" + np.arange(6, dtype="<f4").reshape(2, 3).T.tobytes() + b"b(1,)" + b"\0\0\0\0"
    ).hexdigest()
    assert weights_digest({"b": torch.zeros(1), "a": values.T}) == expected
    assert weights_digest({"a": values.T.half(), "b": torch.zeros(1)}) == expected
    assert weights_digest({"a": values.reshape(3, 2), "b": torch.zeros(1)}) != expected
    assert weights_digest({"c": values.T, "b": torch.zeros(1)}) != expected


def test_half_precision_files_load_as_float32(tiny: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.pt"
    torch.save({name: value.half() for name, value in torch.load(tiny, weights_only=True).items()}, half)
    loaded = load_network(half, TINY)
    assert {parameter.dtype for parameter in loaded.network.parameters()} == {torch.float32}
    assert inspect(half).dtypes == ("float16",)
    assert inspect(half).digest == loaded.digest


def test_convert(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.safetensors"
    written = convert(tiny, out, TINY)
    again = load_network(out)
    assert again.preset == TINY
    assert again.digest == written.digest == load_network(tiny, TINY).digest
    for name, value in load_file(out).items():
        assert torch.equal(value, written.network.state_dict()[name])
    assert inspect(out).preset == TINY
    assert [file.name for file in tmp_path.iterdir() if "partial" in file.name] == []


def test_convert_to_half(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.safetensors"
    written = convert(tiny, out, TINY, half=True)
    state = torch.load(tiny, weights_only=True)
    for name, value in load_file(out).items():
        assert value.dtype == torch.float16
        assert torch.equal(value, state[name].half())
    assert written.digest == load_network(out).digest == inspect(out).digest
    next(iter(state.values()))[0] = 1e6
    torch.save(state, tiny)
    with pytest.raises(InputError, match=r"is not finite in torch.float16; .*is not written"):
        convert(tiny, out, TINY, half=True)
    assert load_network(out).digest == written.digest


def test_what_a_file_says_of_itself_is_not_overruled(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.safetensors"
    convert(tiny, out, TINY)
    with pytest.raises(InputError, match="says that it is tiny, but 64x64_diffusion was requested"):
        load_network(out, MODELS["64x64_diffusion"])
    with pytest.raises(InputError, match=r"does not say what it is.*no published checkpoint"):
        load_network(tiny)
    save_file(torch.load(tiny, weights_only=True), out, metadata={"evalkit_preset": '{"kind": 3}'})
    with pytest.raises(InputError, match="model preset"):
        load_network(out)


def test_one_layout_of_five_checkpoints() -> None:
    shapes = {name: tuple(value.shape) for name, value in MODELS["lsun_cat"].build().state_dict().items()}
    assert [preset.name for preset in identify(shapes)] == [
        "256x256_diffusion_uncond",
        "lsun_bedroom",
        "lsun_cat",
        "lsun_horse",
        "lsun_horse_nodropout",
    ]


def test_wrong_preset_says_which_fits(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save(random_state(MODELS["128x128_classifier"]), path)
    with pytest.raises(
        InputError, match=r"is no 256x256_classifier: of its tensors, .* missing .*128x128_class"
    ):
        load_network(path, MODELS["256x256_classifier"])
    with pytest.raises(
        InputError, match=r"does not say what it is\. Its layout is that of 128x128_classifier"
    ):
        load_network(path)


def test_strict(tiny: Path, tmp_path: Path) -> None:
    state = torch.load(tiny, weights_only=True)
    cases = {
        r"1 missing \(the first is out\.2\.bias\)": {k: v for k, v in state.items() if k != "out.2.bias"},
        r"1 unexpected \(the first is extra\)": {**state, "extra": torch.zeros(1)},
        r"1 of another shape \(the first is label_emb\.weight\)": {
            **state,
            "label_emb.weight": torch.zeros(5, 128),
        },
        "out.2.bias is of type torch.int64": {**state, "out.2.bias": torch.zeros(6, dtype=torch.int64)},
    }
    for message, changed in cases.items():
        path = tmp_path / "changed.pt"
        torch.save(changed, path)
        with pytest.raises(InputError, match=message):
            load_network(path, TINY)


def test_inspect_tells_files_of_a_training_run_apart(tiny: Path, tmp_path: Path) -> None:
    state = torch.load(tiny, weights_only=True)
    classifier = random_state(MODELS["128x128_classifier"])
    first = "input_blocks.0.0.weight"
    network = TINY.build("cpu")
    optimiser = torch.optim.AdamW(network.parameters())
    network(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.tensor([0])).sum().backward()
    optimiser.step()
    contents = {
        "model010000.pt": (state, "network", "diffusion"),
        "ema_0.9999_010000.pt": (state, "averaged network (EMA)", "diffusion"),
        "opt010000.pt": (optimiser.state_dict(), "optimiser state", None),
        "classifier.pt": (classifier, "network", "classifier"),
        "upsampler.pt": ({**state, first: torch.zeros(32, 6, 3, 3)}, "network", "upsampler"),
        "nested.pt": ({"ema": state, "step": 3}, "no named tensors", None),
        "list.pt": ([1, 2], "no named tensors", None),
    }
    for name, (content, *expected) in contents.items():
        torch.save(content, tmp_path / name)
        found = inspect(tmp_path / name)
        assert [found.content, found.kind] == expected, name
    found = inspect(tmp_path / "model010000.pt")
    assert found.tensors == len(state)
    assert found.parameters == sum(value.numel() for value in state.values())
    assert found.fits == ()
    for name, what in (("opt010000.pt", "an optimiser's state"), ("nested.pt", "keys ema, step")):
        with pytest.raises(InputError, match=rf"{what}.*ema_\*\.pt holds averaged weights"):
            load_network(tmp_path / name, TINY)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.diffusion_model."])
def test_a_prefix_before_every_name_is_left_out(tiny: Path, tmp_path: Path, prefix: str) -> None:
    state = torch.load(tiny, weights_only=True)
    path = tmp_path / "prefixed.pt"
    torch.save({f"{prefix}{name}": tensor for name, tensor in state.items()}, path)
    loaded = load_network(path, TINY)
    assert loaded.prefix == inspect(path).prefix == prefix
    assert loaded.digest == load_network(tiny, TINY).digest
    convert(path, tmp_path / "clean.safetensors", TINY)
    assert inspect(tmp_path / "clean.safetensors").fits == (TINY,)
    # Of every name, or the file is of something else.
    torch.save({f"{prefix}{name}": tensor for name, tensor in state.items()} | {"a": torch.ones(1)}, path)
    with pytest.raises(InputError, match="missing"):
        load_network(path, TINY)


def test_tensors_with_other_things(tiny: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    state = torch.load(tiny, weights_only=True)
    path = tmp_path / "other.pt"
    for content, message in (
        ({**state, "step": 7}, rf"beside {len(state)} named tensors, step \(int\)"),
        ({**state, 0: torch.ones(1)}, r"beside .* 0 \(Tensor\)"),
        (
            {"state_dict": state, "epoch": 3},
            rf"Tensors are under the keys state_dict \({len(state)} tensors\)",
        ),
        ({"model": state, "ema": state}, r"under the keys model \(.*\), ema \(.*torch\.load\(FILE\)\[KEY\]"),
    ):
        torch.save(content, path)
        with pytest.raises(InputError, match=message):
            load_network(path, TINY)
        result = run("checkpoint", "inspect", path)
        assert result.code == 0
        assert re.search(rf"problem +.*{message}", result.out)
    assert inspect(path).tensors == 0
    torch.save({**state, "step": 7}, path)
    assert inspect(path).tensors == len(state)


def test_messages_are_short_whatever_the_names(
    tiny: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    state = torch.load(tiny, weights_only=True)
    long = {f"{'x' * 5000}\n{i}": torch.zeros(1) for i in range(2000)}
    path = tmp_path / "long.pt"
    contents = (
        long,
        {**state, **long},
        {**state, **dict.fromkeys(long, 3)},
        dict.fromkeys(long, 3),
        dict.fromkeys(list(long)[:40], state),
        {**state, next(iter(long)): torch.zeros(1, dtype=torch.int64)},
    )
    for content in contents:
        torch.save(content, path)
        with pytest.raises(InputError) as error:
            load_network(path, TINY)
        assert len(str(error.value)) < 1000
        assert "\n" not in str(error.value)
        result = run("checkpoint", "inspect", path)
        assert result.code == 0
        assert max(map(len, result.out.splitlines())) < 1000
    huge = replace(TINY, name="n" * 5000)
    convert(tiny, tmp_path / "huge.safetensors", huge)
    result = run("checkpoint", "inspect", tmp_path / "huge.safetensors")
    assert max(map(len, result.out.splitlines())) < 1000
    with pytest.raises(InputError) as error:
        load_network(tmp_path / "huge.safetensors", TINY)
    assert len(str(error.value)) < 1000


def test_inspect_names_the_nearest(tmp_path: Path) -> None:
    state = random_state(MODELS["128x128_classifier"])
    del state["out.2.c_proj.bias"]
    state["head.bias"] = torch.zeros(1)
    state["out.2.c_proj.weight"] = torch.zeros(10, 512, 1)
    torch.save(state, tmp_path / "c.pt")
    found = inspect(tmp_path / "c.pt")
    assert found.nearest is MODELS["128x128_classifier"]
    assert found.fits == ()
    assert found.difference is not None
    assert found.difference.missing == ("out.2.c_proj.bias",)
    assert found.difference.unexpected == ("head.bias",)
    assert found.difference.reshaped == ("out.2.c_proj.weight",)
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pt")
    assert inspect(tmp_path / "other.pt").nearest is None


def test_inspect_holds_a_network_of_ones_own_to_what_it_says_it_is(tiny: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    convert(tiny, own, TINY)
    found = inspect(own)
    assert found.fits == (TINY,)
    assert found.nearest == TINY
    assert not found.difference


def test_no_file_runs_code(tmp_path: Path) -> None:
    target = tmp_path / "touched"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (target,)

    for path, save in ((tmp_path / "zip.pt", torch.save), (tmp_path / "bare.pt", dump)):
        save({"a": Trap()}, path)
        with pytest.raises(InputError, match="never gets to run code"):
            load_network(path, TINY)
    assert not target.exists()


def dump(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def test_damaged_and_other_files(tiny: Path, tmp_path: Path) -> None:
    whole = tiny.read_bytes()
    convert(tiny, tmp_path / "tiny.safetensors", TINY)
    tensors = (tmp_path / "tiny.safetensors").read_bytes()
    cases = {
        "cut.pt": whole[: len(whole) // 2],
        "cut.safetensors": tensors[: len(tensors) // 2],
        "header.safetensors": tensors[:40],
        "empty.pt": b"",
        "page.pt": b"<!DOCTYPE html><title>403</title>",
        "lfs.pt": b"version https://git-lfs.github.com/spec/v1\n",
    }
    told = {
        "empty.pt": "it is empty",
        "page.pt": "a web page",
        "lfs.pt": "a Git LFS pointer.*git lfs pull",
        "json.pt": 'a text that begins with \'."error"',
        "npy.pt": "NumPy",
        "zipped.pt": r"a zip archive.*holds a/model\.pt\. Unpack it",
    }
    cases |= {"json.pt": b'{"error": 403}\n', "npy.pt": b"\x93NUMPY\1\0"}
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("a/model.pt", whole)
    cases["zipped.pt"] = (tmp_path / "zip").read_bytes()
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        for read in (inspect, lambda path: load_network(path, TINY)):
            with pytest.raises(InputError, match=rf"{name}.*{told.get(name, '')}"):
                read(tmp_path / name)
    for path in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            load_network(path, TINY)


def test_save_failure_leaves_what_was_there(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no folder"):
        save_network(torch.load(tiny, weights_only=True), TINY, tmp_path / "absent" / "x.safetensors")


def test_fetch(tiny: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVALKIT_OFFLINE", "0")
    preset = replace(TINY, parameters=sum(value.numel() for value in random_state(TINY).values()))
    told: list[tuple[str, int, int]] = []
    with serving(tiny.read_bytes()) as (server, address):
        monkeypatch.setattr(published, "published_urls", lambda file: (f"{address}/{file}",))
        path = fetch(preset, progress=lambda *state: told.append(state))
        assert path == cached(preset) == own_cache / "checkpoints" / "tiny.pt"
        assert load_network(path, preset).digest == load_network(tiny, TINY).digest
        assert told[-1] == ("tiny.pt", tiny.stat().st_size, tiny.stat().st_size)
        assert server.paths == ["/tiny.pt"]
        fetch(preset)
        assert len(server.paths) == 1
        path.unlink()
        server.content = b"<html>another file</html>"
        with pytest.raises(DownloadError, match="no file of weights"):
            fetch(preset)
        assert not path.exists()


def test_published_addresses() -> None:
    """The downloader is asked for the file where the paper's authors put it."""
    (address,) = published_urls(MODELS["64_256_upsampler"].file)
    assert address == "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/64_256_upsampler.pt"


def test_command_line(tmp_path: Path, own_cache: Path, run: Callable[..., Result]) -> None:
    state = random_state(MODELS["128x128_classifier"])
    path, out = tmp_path / "ema_c.pt", tmp_path / "c.safetensors"
    torch.save(state, path)
    result = run("checkpoint", "inspect", path)
    assert result.code == 0
    for expected in (
        "averaged network (EMA)",
        "42,568,040 parameters, float32",
        weights_digest(state),
        "layout of   128x128_classifier",
    ):
        assert expected in result.out
    assert run("checkpoint", "convert", path, out).code == 2
    assert not out.exists()
    assert run("checkpoint", "convert", path, out, "--preset", "128x128_classifier").code == 0
    assert "says it is  128x128_classifier" in run("checkpoint", "inspect", out).out
    result = run("checkpoint", "convert", path, out, "--preset", "lsun_cat")
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert load_network(out).preset is not None

    torch.save({**dict(list(state.items())[:-1]), "head": torch.zeros(1)}, path)
    lines = run("checkpoint", "inspect", path).out.splitlines()
    assert lines[-3].startswith("nearest     128x128_classifier")
    assert lines[-2:] == ["  missing:    out.2.c_proj.bias", "  unexpected: head"]

    cached(MODELS["lsun_cat"]).parent.mkdir()
    cached(MODELS["lsun_cat"]).touch()
    listed = run("checkpoint", "list").out.splitlines()
    assert [line.split()[0] for line in listed] == list(MODELS)
    assert [line for line in listed if str(own_cache) in line] == [listed[list(MODELS).index("lsun_cat")]]
    assert run("checkpoint", "fetch", "64x64_diffusion").code == 2  # offline
    assert run("checkpoint", "fetch", "nonsense").code == 2


def test_saved_files_have_the_rights_of_any_other(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    convert(tiny, tmp_path / "tiny.safetensors", TINY)
    assert (tmp_path / "tiny.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
