"""The networks of FDr6: arithmetic against timm as FD-loss runs it, and layouts of weights.

The golden values come from timm 1.0.31 with the random weights of ``small_transformers`` (torch 2.13, CPU).
timm and transformers are asked where they can be imported.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from small_transformers import as_timm_names, random_weights, shrink, small
from timm_oracle import timm_without_torchvision
from torch import Tensor

from evalkit.errors import WeightsError
from evalkit.extractors import extractor_class
from evalkit.extractors.published import PublishedNetwork
from evalkit.extractors.vision_weights import read_weights
from evalkit.verify import pictures

Array = NDArray[Any]

# Row, timm's model, what makes it as small as those of small_transformers, side that FD-loss resizes to.
SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "convnextv2_base": ("convnextv2_base", {"dims": (6, 8, 10, 24), "depths": (1, 1, 2, 1)}, 224),
    "mae_vitl16": ("vit_large_patch16_224", SMALL, 224),
    "siglip2_so400m": ("vit_so400m_patch16_siglip_256", SMALL | {"mlp_ratio": 3.75}, 224),
    "dinov2_vitl14_fdr6": ("vit_large_patch14_dinov2", SMALL, 256),
    "clip_vitl14_fdr6": ("vit_large_patch14_clip_224", SMALL, 256),
}
STATISTICS = {
    "siglip2_so400m": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip_vitl14_fdr6": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

every_row = pytest.mark.parametrize("row", MODELS)


@pytest.fixture(scope="module")
def timm() -> Iterator[Any]:
    with timm_without_torchvision() as module:
        yield module


def photos() -> list[Array]:
    """Pictures and noise of several shapes."""
    noise = np.random.default_rng(0).integers(0, 256, (700, 520, 3), dtype=np.uint8)
    return [pictures(256, 256, 1)[0], noise[:256, :256], noise, noise[:100, :90], pictures(257, 300, 1)[0]]


def center_crop_arr(image: Image.Image, size: int) -> Array:
    """ADM's, as FD-loss has it in ``utils/data_util.py``."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)  # type: ignore[arg-type]
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)  # type: ignore[arg-type]
    array = np.array(image)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


def shown(row: str, image: Array) -> Tensor:
    """What FD-loss shows a network of an image: ``_preprocess`` in ``frechet_distance/repr_models.py``."""
    size = MODELS[row][2]
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in STATISTICS.get(row, IMAGENET))
    cropped = center_crop_arr(Image.fromarray(image), 256)
    x = torch.from_numpy(cropped.transpose(2, 0, 1).copy())[None].float().div(255)
    if size != 256:
        x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    return (x - mean) / std


@every_row
def test_it_sees_what_fd_loss_shows(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = extractor_class(row)
    shrink(cls, tmp_path, monkeypatch)
    extractor = cls(device="cpu")
    for image in photos():
        expected = shown(row, image).numpy()
        found = extractor.prepared(image[None]).numpy()
        np.testing.assert_array_max_ulp(found, expected, maxulp=1)
    floats = photos()[0][None].astype(np.float32) + np.float32(0.25)  # of 256 pixels: not rounded
    assert not np.array_equal(extractor.prepared(floats), extractor.prepared(np.rint(floats)))


def timm_model(timm: Any, row: str, *, full: bool = False) -> Any:
    """As FD-loss makes it, but random; and small, unless it is to be full."""
    name, sizes, _ = MODELS[row]
    more = {} if row == "convnextv2_base" else {"dynamic_img_size": True, "dynamic_img_pad": True}
    if not full:
        more |= sizes
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0, **more).eval()
    random = np.random.default_rng(0)
    for parameter in model.parameters():  # biases are zero and scales one, else
        if parameter.ndim == 1 or not full:
            moved = torch.from_numpy(random.standard_normal(parameter.shape).astype(np.float32))
            parameter.data.add_(moved, alpha=0.02 if full else 0.1)
    return model


@torch.inference_mode()
def features_of_timm(model: Any, x: Tensor) -> Array:
    """``TimmReprModel.forward`` of FD-loss: its first result, in float32."""
    features = model.forward_features(x)
    if features.ndim == 4:
        return features.mean(dim=[2, 3]).numpy()
    if model.num_prefix_tokens > 0:
        return features[:, 0].numpy()
    return model.pool(features).numpy()


@every_row
@pytest.mark.parametrize("size", ["small", pytest.param("full", marks=pytest.mark.slow)])
def test_features_are_those_of_timm(
    row: str, size: str, timm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file that it would publish, on the same images."""
    cls = extractor_class(row)
    if size == "small":
        shrink(cls, tmp_path, monkeypatch)
    model = timm_model(timm, row, full=size == "full")
    file = tmp_path / "model.safetensors"
    content = {key: value.contiguous() for key, value in model.state_dict().items()}
    if row == "clip_vitl14_fdr6":  # FD-loss leaves it out, timm's file has it
        content["head.weight"] = torch.ones(cls.architecture.shapes["head.weight"])
    save_file(content, file)
    extractor = cls(file, device="cpu")
    assert extractor.weights_record["layout"].endswith("timm")
    (output,) = cls.outputs
    for image in photos() if size == "small" else photos()[2:3]:
        expected = features_of_timm(model, shown(row, image))
        assert np.abs(expected).max() > 0.1
        found = extractor(image[None])[output]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@every_row
def test_architecture_is_that_of_timm(row: str, timm: Any) -> None:
    """Every tensor at full size, of which no memory is taken."""
    architecture = extractor_class(row).architecture
    classes = {"num_classes": 768} if row == "clip_vitl14_fdr6" else {}
    with torch.device("meta"):
        model = timm.create_model(MODELS[row][0], pretrained=False, **classes)
    theirs = {key: math.prod(value.shape) for key, value in model.state_dict().items()}
    for part in ("weight", "bias"):
        if f"attn_pool.q.{part}" in theirs:
            both = theirs.pop(f"attn_pool.q.{part}") + theirs.pop(f"attn_pool.kv.{part}")
            theirs[f"attn_pool.qkv.{part}"] = both
    ours = {key: math.prod(shape) for key, shape in architecture.shapes.items()}
    assert {key: theirs.get(key) for key in ours} == ours
    assert {key for key in theirs.keys() - ours.keys() if not key.startswith("head.")} == set()
    assert extractor_class(row).outputs == dict.fromkeys(extractor_class(row).outputs, architecture.features)


# The first six features of two images of noise, by timm.
GOLDEN = {
    "convnextv2_base": [
        [-0.08160114, -6.10804844, -9.36194038, 4.80482292, -3.43299890, 3.49932551],
        [-0.08163173, -6.10878849, -9.36222649, 4.80463505, -3.43434858, 3.49986148],
    ],
    "mae_vitl16": [
        [2.73089170, -1.20699024, 0.53454256, 4.15614653, -1.36907732, -1.21306574],
        [2.46669865, -1.02782881, 0.36739892, 3.79713750, -1.27418792, -1.16308618],
    ],
    "siglip2_so400m": [
        [1.79342902, -4.93623734, -0.36260319, 0.49913919, -0.88833368, 0.41167474],
        [1.77466989, -5.00521374, -0.44366300, 0.48344910, -0.98836541, 0.38056993],
    ],
    "dinov2_vitl14_fdr6": [
        [1.38000882, -0.14318137, -0.17983423, -0.54999250, -0.29576519, 0.63530952],
        [0.84298980, -0.23572181, -0.10117184, -0.57782078, -0.37152183, 0.72163916],
    ],
    "clip_vitl14_fdr6": [
        [1.10451722, 0.61492169, -0.20398058, 1.26233923, -0.55392498, -1.32319975],
        [1.07151866, 0.53982228, -0.15057442, 1.22497869, -0.50327879, -1.37045944],
    ],
}


@every_row
def test_features_are_those_that_timm_gave(row: str) -> None:
    architecture = small(extractor_class(row).architecture)
    size = MODELS[row][2]
    noise = np.random.default_rng(1).standard_normal((2, 3, size, size)).astype(np.float32)
    with torch.inference_mode():
        layers = architecture.layers(random_weights(architecture), size, torch.device("cpu"))
        found = layers(torch.from_numpy(noise)).numpy()
    assert found.shape == (2, 24)
    scale = np.abs(found).max()
    np.testing.assert_allclose(found[:, :6], GOLDEN[row], rtol=0, atol=1e-6 * scale)


# transformers' names, of everything and of a block's: ours, then theirs.
NAMES = {
    "mae_vitl16": {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "blocks.N.norm1": "vit.encoder.layer.N.layernorm_before",
        "blocks.N.norm2": "vit.encoder.layer.N.layernorm_after",
        "blocks.N.attn.qkv": "vit.encoder.layer.N.attention.attention.query/key/value",
        "blocks.N.attn.proj": "vit.encoder.layer.N.attention.output.dense",
        "blocks.N.mlp.fc1": "vit.encoder.layer.N.intermediate.dense",
        "blocks.N.mlp.fc2": "vit.encoder.layer.N.output.dense",
    },
    "siglip2_so400m": {
        "pos_embed": "vision_model.embeddings.position_embedding.weight",
        "patch_embed.proj": "vision_model.embeddings.patch_embedding",
        "norm": "vision_model.post_layernorm",
        "attn_pool.latent": "vision_model.head.probe",
        "attn_pool.qkv": "vision_model.head.attention.in_proj",
        "attn_pool.proj": "vision_model.head.attention.out_proj",
        "attn_pool.norm": "vision_model.head.layernorm",
        "attn_pool.mlp.fc1": "vision_model.head.mlp.fc1",
        "attn_pool.mlp.fc2": "vision_model.head.mlp.fc2",
        "blocks.N.norm1": "vision_model.encoder.layers.N.layer_norm1",
        "blocks.N.norm2": "vision_model.encoder.layers.N.layer_norm2",
        "blocks.N.attn.qkv": "vision_model.encoder.layers.N.self_attn.q_proj/k_proj/v_proj",
        "blocks.N.attn.proj": "vision_model.encoder.layers.N.self_attn.out_proj",
        "blocks.N.mlp.fc1": "vision_model.encoder.layers.N.mlp.fc1",
        "blocks.N.mlp.fc2": "vision_model.encoder.layers.N.mlp.fc2",
    },
    "convnextv2_base": {
        "stem.0": "convnextv2.embeddings.patch_embeddings",
        "stem.1": "convnextv2.embeddings.layernorm",
        "stages.N.downsample.N": "convnextv2.encoder.stages.N.downsampling_layer.N",
        "stages.N.blocks.N.conv_dw": "convnextv2.encoder.stages.N.layers.N.dwconv",
        "stages.N.blocks.N.norm": "convnextv2.encoder.stages.N.layers.N.layernorm",
        "stages.N.blocks.N.mlp.fc1": "convnextv2.encoder.stages.N.layers.N.pwconv1",
        "stages.N.blocks.N.mlp.grn": "convnextv2.encoder.stages.N.layers.N.grn",
        "stages.N.blocks.N.mlp.fc2": "convnextv2.encoder.stages.N.layers.N.pwconv2",
    },
}
# What else such a file holds.
BESIDE = {
    "mae_vitl16": {"decoder.mask_token": torch.ones(1, 1, 8)},
    "siglip2_so400m": {"logit_scale": torch.ones(1), "text_model.head.bias": torch.ones(8)},
    "convnextv2_base": {"convnextv2.layernorm.weight": torch.ones(24), "classifier.bias": torch.ones(9)},
}


def as_in_transformers(row: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = dict(BESIDE[row])
    for name, tensor in weights.items():
        stem, dot, part = (name, "", "") if name in NAMES[row] else name.rpartition(".")
        numbers = [] if stem in NAMES[row] else re.findall(r"\.(\d+)", stem)
        theirs = NAMES[row][re.sub(r"\.\d+", ".N", stem) if numbers else stem]
        for number in numbers:
            theirs = theirs.replace(".N", f".{number}", 1)
        folder, _, last = theirs.rpartition(".")
        keys = [f"{folder}.{each}" for each in last.split("/")]
        if "in_proj" in last:
            dot = "_"
        for key, piece in zip(keys, tensor.chunk(len(keys)), strict=True):
            found[f"{key}{dot}{part}"] = piece.contiguous()
    return found


@pytest.mark.parametrize("row", NAMES)
def test_weights_of_transformers_are_the_same(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = extractor_class(row)
    shrink(cls, tmp_path, monkeypatch)
    tensors = as_in_transformers(row, random_weights(cls.architecture))
    save_file(tensors, tmp_path / "theirs.safetensors")
    theirs, ours = cls(tmp_path / "theirs.safetensors", device="cpu"), cls(device="cpu")
    assert (theirs.weights_record["layout"], ours.weights_record["layout"]) == ("transformers", "timm")
    assert theirs.weights_record["digest"] == ours.weights_record["digest"]
    assert theirs.fingerprint == ours.fingerprint


@pytest.mark.parametrize("row", NAMES)
def test_features_are_those_of_transformers(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file that it has written, at the size of its positions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip(
            "transformers", reason="needs transformers: pip install transformers"
        )
        model, features = transformers_model(transformers, row)
        random = np.random.default_rng(0)
        for parameter in model.parameters():
            moved = torch.from_numpy(random.standard_normal(parameter.shape).astype(np.float32))
            parameter.data.add_(moved, alpha=0.1)
        model.save_pretrained(tmp_path)
    cls = extractor_class(row)
    shrink(cls, tmp_path, monkeypatch)
    size = 256 if row == "siglip2_so400m" else 224
    noise = np.random.default_rng(1).standard_normal((2, 3, size, size)).astype(np.float32)
    weights = read_weights(tmp_path / "model.safetensors", cls.published, cls.architecture.shapes)
    with torch.inference_mode():
        x = torch.from_numpy(noise)
        expected = features(model, x).numpy()
        found = cls.architecture.layers(weights.tensors, size, torch.device("cpu"))(x).numpy()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def transformers_model(transformers: Any, row: str) -> Any:
    """A small model, and what its features are of images."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 16}
    if row == "mae_vitl16":
        config = transformers.ViTMAEConfig(
            **sizes,
            intermediate_size=96,
            mask_ratio=0.0,
            layer_norm_eps=1e-6,  # as in timm and MAE's own code; transformers has 1e-12
            decoder_hidden_size=24,
            decoder_num_attention_heads=3,
        )
        model = transformers.ViTMAEForPreTraining(config).eval()
        return model, lambda model, x: model.vit(pixel_values=x).last_hidden_state[:, 0]
    if row == "siglip2_so400m":
        vision = sizes | {"image_size": 256, "intermediate_size": 90, "hidden_act": "gelu_pytorch_tanh"}
        text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        text |= {"vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1}
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        model = transformers.SiglipModel(config).eval()
        return model, lambda model, x: model.vision_model(pixel_values=x).pooler_output
    config = transformers.ConvNextV2Config(hidden_sizes=[6, 8, 10, 24], depths=[1, 1, 2, 1])
    model = transformers.ConvNextV2ForImageClassification(config).eval()
    return model, lambda model, x: model.convnextv2(pixel_values=x).last_hidden_state.mean((2, 3))


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ("siglip2_so400m", {"attn_pool.kv.weight": None}, r"lacks attn_pool\.q\.weight"),
        ("siglip2_so400m", {"attn_pool.kv.weight": (24, 24)}, r"attn_pool\.q\.weight is \(48, 24\)"),
        ("siglip2_so400m", {"reg_token": (1, 4, 24)}, "also holds reg_token"),
        ("convnextv2_base", {"stages.0.blocks.0.gamma": (6,)}, r"also holds stages\.0\.blocks\.0\.gamma"),
        (
            "convnextv2_base",
            {"stages.3.blocks.0.mlp.grn.bias": None},
            r"lacks stages\.3\.blocks\.0\.mlp\.grn",
        ),
        ("convnextv2_base", {"stem.0.weight": None}, "holds other tensors, or none"),
        ("mae_vitl16", {"head.weight": (10, 24)}, "also holds head.weight"),
        ("mae_vitl16", {"blocks.0.ls1.gamma": (24,)}, "also holds blocks.0.ls1.gamma"),
    ],
)
def test_other_weights_are_refused(
    row: str,
    changes: dict[str, tuple[int, ...] | None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cls: type[PublishedNetwork] = extractor_class(row)
    shrink(cls, tmp_path, monkeypatch)
    tensors = as_timm_names(random_weights(cls.architecture))
    for name, shape in changes.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.ones(shape)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=message):
        cls(tmp_path / "other.safetensors", device="cpu")


def test_networks_of_the_same_weights_share_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DINOv2's and CLIP's are read once, and their features are others."""
    image = photos()[0][None]
    for plain, ours in (("dinov2_vitl14", "dinov2_vitl14_fdr6"), ("clip_vitl14", "clip_vitl14_fdr6")):
        classes = [extractor_class(row) for row in (plain, ours)]
        for cls in classes:
            shrink(cls, tmp_path, monkeypatch)
        first, second = (cls(device="cpu") for cls in classes)
        assert first._weights is second._weights
        assert first.fingerprint != second.fingerprint
        found = [next(iter(each(image).values())) for each in (first, second)]
        assert found[0].shape[1] == (8 if plain == "clip_vitl14" else 24)
        assert found[1].shape[1] == 24
