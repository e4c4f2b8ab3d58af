"""The published checkpoints' presets: each builds the network whose keys and shapes were published."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from evalkit.errors import InputError
from generation.networks.classifier import Classifier
from generation.networks.unet import UNet
from generation.networks.upsampler import Upsampler
from generation.presets import MODELS, SAMPLING, ModelPreset, find_model, find_sampling
from generation.schedule import make_schedule


@pytest.mark.parametrize("name", MODELS)
def test_layout_is_the_published_one(name: str) -> None:
    preset = MODELS[name]
    state = preset.build("meta").state_dict()
    assert all(tensor.is_meta for tensor in state.values())
    lines = "\n".join(f"{key} {tuple(tensor.shape)}" for key, tensor in state.items())
    assert hashlib.sha256(lines.encode()).hexdigest() == preset.layout_sha256
    assert sum(tensor.numel() for tensor in state.values()) == preset.parameters


def test_what_keys_do_not_show() -> None:
    assert {name for name, preset in MODELS.items() if preset.network.use_new_attention_order} == {
        "64x64_diffusion"
    }
    assert {name for name, preset in MODELS.items() if preset.noise_schedule == "cosine"} == {
        "64x64_diffusion",
        "64x64_classifier",
    }
    heads = {name: preset.network for name, preset in MODELS.items() if preset.network.num_heads != 1}
    assert set(heads) == {"128x128_diffusion", "64_256_upsampler"}
    assert {(network.num_heads, network.num_head_channels) for network in heads.values()} == {(4, None)}
    float32 = {name for name, preset in MODELS.items() if preset.published_precision == "float32"}
    assert float32 == {"512x512_diffusion"}
    dropout = {name for name, preset in MODELS.items() if preset.network.dropout}
    assert dropout == {"64x64_diffusion", "lsun_bedroom", "lsun_cat", "lsun_horse"}


@pytest.mark.parametrize("preset", MODELS.values(), ids=MODELS)
def test_properties(preset: ModelPreset) -> None:
    kinds = {"diffusion": UNet, "classifier": Classifier, "upsampler": Upsampler}
    assert type(preset.build()) is kinds[preset.kind]
    assert preset.learn_sigma == (preset.kind != "classifier")
    unconditional = "uncond" in preset.name or "lsun" in preset.name
    assert preset.num_classes == (None if unconditional else 1000)
    assert (preset.low_res_size is not None) == (preset.kind == "upsampler")
    assert preset.file == f"{preset.name}.pt"
    assert str(preset.image_size) in preset.name or preset.name.startswith("lsun")


@pytest.mark.parametrize("preset", MODELS.values(), ids=MODELS)
def test_json_both_ways(preset: ModelPreset) -> None:
    again = ModelPreset.from_json(preset.to_json())
    assert again == preset
    assert hash(again) == hash(preset)
    # As files that were converted earlier have it.
    fields = json.loads(preset.to_json())
    del fields["published_precision"]
    assert ModelPreset.from_json(json.dumps(fields)) == preset


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not the JSON of a model preset"),
        ("[]", r"The model preset is \[\]; expected a table"),
        ("{}", "name is missing; expected a text"),
        ('{"name": "x", "kind": "diffusion"}', "network is missing; expected a table"),
        ('{"name": "x", "kind": "diffusion", "network": 3}', "network is 3; expected a table"),
    ],
)
def test_other_json(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelPreset.from_json(text)


def test_json_with_other_fields() -> None:
    fields = json.loads(MODELS["64x64_classifier"].to_json())
    fields["network"]["colour"] = 3
    with pytest.raises(InputError, match="colour"):
        ModelPreset.from_json(json.dumps(fields))
    with pytest.raises(InputError, match="kind is 'detector'; expected diffusion or classifier or upsampler"):
        ModelPreset.from_json(json.dumps({**fields, "kind": "detector"}))


def test_build_on_a_device() -> None:
    network = MODELS["128x128_classifier"].build("cpu")
    assert {parameter.device for parameter in network.parameters()} == {torch.device("cpu")}


def test_sampling_presets_fit_together() -> None:
    for preset in SAMPLING.values():
        diffusion = MODELS[preset.diffusion]
        assert (preset.classifier is not None) == (preset.scale > 0)
        assert preset.sampler == ("ddim" if "ddim" in preset.respacing else "ddpm")
        if preset.classifier:
            classifier = MODELS[preset.classifier]
            assert classifier.kind == "classifier"
            assert classifier.image_size == diffusion.image_size
            assert classifier.noise_schedule == diffusion.noise_schedule
            assert diffusion.num_classes in (None, classifier.num_classes)
    used = {name for preset in SAMPLING.values() for name in (preset.diffusion, preset.classifier) if name}
    assert used == set(MODELS)


def test_published_scales() -> None:
    scales = {name: preset.scale for name, preset in SAMPLING.items() if preset.scale}
    assert scales == {
        "imagenet64-guided": 1.0,
        "imagenet128-guided": 0.5,
        "imagenet128-guided-ddim25": 1.25,
        "imagenet256-guided": 1.0,
        "imagenet256-guided-ddim25": 2.5,
        "imagenet256-uncond-guided": 10.0,
        "imagenet512-guided": 4.0,
        "imagenet512-guided-ddim25": 9.0,
    }


def test_names() -> None:
    assert find_model("lsun_cat.pt") is find_model("lsun_cat") is MODELS["lsun_cat"]
    assert find_sampling("imagenet64") is SAMPLING["imagenet64"]
    with pytest.raises(InputError, match=r"no checkpoint '65x65_diffusion'.*64x64_diffusion"):
        find_model("65x65_diffusion")
    with pytest.raises(InputError, match=r"no sampling preset 'imagenet'.*imagenet256-guided"):
        find_sampling("imagenet")


def test_presets_have_a_schedule() -> None:
    for preset in SAMPLING.values():
        model = MODELS[preset.diffusion]
        schedule = make_schedule(model.noise_schedule, model.diffusion_steps, preset.respacing)
        assert len(schedule) == int(preset.respacing.removeprefix("ddim"))
