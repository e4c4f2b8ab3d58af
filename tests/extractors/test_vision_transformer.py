"""DINOv2 and CLIP: arithmetic against the original code, layouts of weights, where these are looked for.

The golden values come from facebookresearch/dinov2 at b8931f7 and openai/CLIP at d05afc4, with the random
weights of ``small_transformers`` (torch 2.13, CPU). transformers is asked where it can be imported.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from file_server import serving
from invoked import Result
from safetensors.torch import save_file
from small_transformers import random_weights, shrink, small
from torch import Tensor

import evalkit
from evalkit.errors import InputError, WeightsError
from evalkit.extractors import extractor_class, make_extractor
from evalkit.extractors.clip import CLIPViTB32, CLIPViTL14At336
from evalkit.extractors.dinov2 import DINOv2ViTB14, DINOv2ViTL14
from evalkit.extractors.vision_transformer import Architecture, TransformerLayers, VisionTransformer
from evalkit.extractors.vision_weights import Published, read_weights
from evalkit.system.files import cache_directory
from evalkit.verify import pictures

CPU = torch.device("cpu")
ROWS = [
    "dinov2_vitb14",
    "dinov2_vitl14",
    "dinov2_vitl14_dgm_eval",
    "clip_vitb32",
    "clip_vitl14",
    "clip_vitl14_336",
    "convnextv2_base",
    "mae_vitl16",
    "siglip2_so400m",
    "dinov2_vitl14_fdr6",
    "clip_vitl14_fdr6",
]

# Network, side of the images in pixels, the first six features of two images.
GOLDEN: list[tuple[type[VisionTransformer], int, list[list[float]]]] = [
    (
        DINOv2ViTL14,
        224,
        [
            [0.85675871, -0.21436824, -0.12533590, -0.50973141, -0.51575983, 0.78277457],
            [1.08195817, -0.13690519, -0.15357693, -0.58568394, -0.57102156, 0.78005755],
        ],
    ),
    (
        DINOv2ViTL14,
        518,
        [
            [1.04589581, -0.12576936, -0.14543252, -0.54696494, -0.39129952, 0.71418393],
            [1.04387045, -0.15068728, -0.14256205, -0.53304338, -0.44400045, 0.75161481],
        ],
    ),
    (
        CLIPViTB32,
        224,
        [
            [1.67337108, 1.88792086, 0.18397117, -1.06384671, 1.18824422, -0.93827480],
            [1.65888286, 1.93243456, 0.12443464, -0.94768047, 1.17396712, -0.87752789],
        ],
    ),
    (
        CLIPViTL14At336,
        336,
        [
            [1.09975171, 2.12398052, 0.46742094, -0.80217677, 0.84719193, -0.53481501],
            [1.09399128, 2.18688846, 0.39760563, -0.84487140, 0.83778405, -0.48533368],
        ],
    ),
]


def noise(size: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_normal((2, 3, size, size)).astype(np.float32))


@torch.inference_mode()
def features_of(architecture: Architecture, weights: dict[str, Tensor], x: Tensor) -> np.ndarray[Any, Any]:
    return TransformerLayers(architecture, weights, x.shape[-1], CPU)(x).numpy()


@pytest.mark.parametrize(("cls", "size", "expected"), GOLDEN, ids=lambda each: getattr(each, "network", ""))
def test_features_are_those_of_the_authors_code(
    cls: type[VisionTransformer], size: int, expected: list[list[float]]
) -> None:
    architecture = small(cls.architecture)
    found = features_of(architecture, random_weights(architecture), noise(size))
    assert found.shape == (2, architecture.projection or architecture.width)
    np.testing.assert_allclose(found[:, :6], expected, rtol=0, atol=1e-5)


# The libraries' names, one by one: of everything, and of a block's.
NAMES = {
    "dinov2 transformers": {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "norm.": "layernorm.",
        "blocks.0.norm1.": "encoder.layer.0.norm1.",
        "blocks.0.norm2.": "encoder.layer.0.norm2.",
        "blocks.0.attn.qkv.": (
            "encoder.layer.0.attention.attention.query.",
            "encoder.layer.0.attention.attention.key.",
            "encoder.layer.0.attention.attention.value.",
        ),
        "blocks.0.attn.proj.": "encoder.layer.0.attention.output.dense.",
        "blocks.0.ls1.gamma": "encoder.layer.0.layer_scale1.lambda1",
        "blocks.0.ls2.gamma": "encoder.layer.0.layer_scale2.lambda1",
        "blocks.0.mlp.": "encoder.layer.0.mlp.",
    },
    "clip transformers": {
        "cls_token": "vision_model.embeddings.class_embedding",
        "pos_embed": "vision_model.embeddings.position_embedding.weight",
        "patch_embed.proj.": "vision_model.embeddings.patch_embedding.",
        "norm_pre.": "vision_model.pre_layrnorm.",
        "norm.": "vision_model.post_layernorm.",
        "head.weight": "visual_projection.weight",
        "blocks.0.norm1.": "vision_model.encoder.layers.0.layer_norm1.",
        "blocks.0.norm2.": "vision_model.encoder.layers.0.layer_norm2.",
        "blocks.0.attn.qkv.": (
            "vision_model.encoder.layers.0.self_attn.q_proj.",
            "vision_model.encoder.layers.0.self_attn.k_proj.",
            "vision_model.encoder.layers.0.self_attn.v_proj.",
        ),
        "blocks.0.attn.proj.": "vision_model.encoder.layers.0.self_attn.out_proj.",
        "blocks.0.mlp.": "vision_model.encoder.layers.0.mlp.",
    },
    "clip OpenAI": {
        "cls_token": "visual.class_embedding",
        "pos_embed": "visual.positional_embedding",
        "patch_embed.proj.": "visual.conv1.",
        "norm_pre.": "visual.ln_pre.",
        "norm.": "visual.ln_post.",
        "head.weight": "visual.proj",
        "blocks.0.norm1.": "visual.transformer.resblocks.0.ln_1.",
        "blocks.0.norm2.": "visual.transformer.resblocks.0.ln_2.",
        "blocks.0.attn.qkv.": "visual.transformer.resblocks.0.attn.in_proj_",
        "blocks.0.attn.proj.": "visual.transformer.resblocks.0.attn.out_proj.",
        "blocks.0.mlp.fc1.": "visual.transformer.resblocks.0.mlp.c_fc.",
        "blocks.0.mlp.fc2.": "visual.transformer.resblocks.0.mlp.c_proj.",
    },
}
# What else such a file holds.
BESIDE = {
    "dinov2 torch.hub": {"mask_token": torch.ones(1, 24)},
    "dinov2 timm": {},
    "dinov2 transformers": {"embeddings.mask_token": torch.ones(1, 24)},
    "clip timm": {"head.bias": torch.zeros(8)},
    "clip transformers": {
        "logit_scale": torch.tensor(4.6),
        "text_projection.weight": torch.ones(8, 8),
        "vision_model.embeddings.position_ids": torch.arange(50)[None],
    },
    "clip OpenAI": {"token_embedding.weight": torch.ones(9, 8), "ln_final.bias": torch.ones(8)},
}


def as_named_by(layout: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file of this library has them."""
    names = NAMES.get(layout, {})
    found = dict(BESIDE[layout])
    for name, tensor in weights.items():
        first = name.replace("blocks.1.", "blocks.0.")
        stem = max((each for each in names if first.startswith(each)), key=len, default="")
        new = names.get(stem, "")
        number = name[:9] if name.startswith("blocks.1.") else ""
        olds = new if isinstance(new, tuple) else (new,)
        parts = tensor.chunk(len(olds)) if len(olds) > 1 else (tensor,)
        for old, part in zip(olds, parts, strict=True):
            key = old + first.removeprefix(stem)
            if number:
                key = key.replace(".0.", ".1.", 1)
            found[key] = part.contiguous()
    if layout == "clip OpenAI":
        found["visual.proj"] = found["visual.proj"].T.contiguous()
    elif layout != "clip transformers":  # which has a vector and a matrix
        for key in ("cls_token", "embeddings.cls_token", "pos_embed", "embeddings.position_embeddings"):
            if key in found:
                found[key] = found[key].reshape(1, -1, found[key].shape[-1])
    return found


def class_of(layout: str) -> type[VisionTransformer]:
    return DINOv2ViTB14 if layout.startswith("dinov2") else CLIPViTB32


@pytest.mark.parametrize("layout", BESIDE)
@pytest.mark.parametrize("container", ["safetensors", "torch", "old torch"])
def test_weights_of_every_library_are_the_same(
    layout: str, container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = class_of(layout)
    shrink(cls, tmp_path, monkeypatch)
    expected = cls(device="cpu")
    file = tmp_path / "weights"
    tensors = as_named_by(layout, random_weights(cls.architecture))
    if container == "safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=container == "torch")
    extractor = cls(file, device="cpu")
    library = layout.split()[1]
    assert library in extractor.weights_record["layout"]
    assert extractor.weights_record["source"] == str(file)
    assert extractor.weights_record["digest"] == expected.weights_record["digest"]
    assert extractor.fingerprint == expected.fingerprint
    images = pictures(30, 20, 2)
    (output,) = cls.outputs
    np.testing.assert_array_equal(extractor(images)[output], expected(images)[output])


def test_another_layout_is_no_other_fingerprint_but_other_weights_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(DINOv2ViTL14, tmp_path, monkeypatch)
    weights = random_weights(DINOv2ViTL14.architecture)
    weights["blocks.1.ls2.gamma"] = weights["blocks.1.ls2.gamma"].clone()
    weights["blocks.1.ls2.gamma"][3] += 1e-6
    save_file(weights, tmp_path / "other.safetensors")
    first, other = DINOv2ViTL14(device="cpu"), DINOv2ViTL14(tmp_path / "other.safetensors", device="cpu")
    assert first.fingerprint != other.fingerprint
    cls = extractor_class("dinov2_vitl14_dgm_eval")
    shrink(cls, tmp_path, monkeypatch)
    assert cls(device="cpu").weights_record == first.weights_record
    assert cls(device="cpu").fingerprint != first.fingerprint  # another resize


def test_only_the_weights_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the whole file: of CLIP's, more than a quarter is a text encoder."""
    shrink(CLIPViTB32, tmp_path, monkeypatch)
    tensors = as_named_by("clip OpenAI", random_weights(CLIPViTB32.architecture))
    tensors["token_embedding.weight"] = torch.zeros(1_000_000)
    needed = sum(4 * np.prod(shape) for shape in CLIPViTB32.architecture.shapes.values())
    for file in (tmp_path / "a.safetensors", tmp_path / "a.pth"):
        save_file(tensors, file) if file.suffix == ".safetensors" else torch.save(tensors, file)
        assert needed < len(pickle.dumps(CLIPViTB32(file, device="cpu"))) < needed + 100_000


# Against transformers -------------------------------------------------------------------------------


def library() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers", reason="needs transformers: pip install transformers")


def models(cls: type[VisionTransformer], architecture: Architecture) -> Any:
    """transformers' model of this architecture, random."""
    a = architecture
    sizes = {
        "hidden_size": a.width,
        "num_hidden_layers": a.depth,
        "num_attention_heads": a.heads,
        "patch_size": a.patch,
        "image_size": a.patch * a.grid,
    }
    transformers = library()
    torch.manual_seed(0)
    if a.projection is None:
        return transformers.Dinov2Model(transformers.Dinov2Config(**sizes, mlp_ratio=4)).eval()
    config = transformers.CLIPVisionConfig(
        **sizes, intermediate_size=4 * a.width, projection_dim=a.projection, hidden_act="quick_gelu"
    )
    return transformers.CLIPVisionModelWithProjection(config).eval()


@pytest.mark.parametrize("size", ["small", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "row", ["dinov2_vitb14", "dinov2_vitl14", "clip_vitb32", "clip_vitl14", "clip_vitl14_336"]
)
def test_features_are_those_of_transformers(row: str, size: str, tmp_path: Path) -> None:
    """From a file that it has written; at the size of its positions, as it interpolates them otherwise."""
    cls: type[VisionTransformer] = extractor_class(row)
    architecture = small(cls.architecture) if size == "small" else cls.architecture
    model = models(cls, architecture)
    random = np.random.default_rng(0)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for parameter in model.parameters():  # biases are zero and scales one, else
            if parameter.ndim == 1:
                moved = torch.from_numpy(random.standard_normal(parameter.shape).astype(np.float32))
                parameter.add_(moved, alpha=0.1 if size == "small" else 0.01)
        model.save_pretrained(tmp_path)
        x = noise(architecture.patch * architecture.grid)[: 2 if size == "small" else 1]
        found = model(pixel_values=x)
        expected = found.image_embeds if architecture.projection else found.last_hidden_state[:, 0]
    weights = read_weights(tmp_path / "model.safetensors", cls.published, architecture.shapes)
    assert weights.layout == "transformers"
    assert expected.abs().max() > 0.1
    np.testing.assert_allclose(
        features_of(architecture, weights.tensors, x), expected.numpy(), rtol=0, atol=1e-5
    )


# Where weights are looked for -----------------------------------------------------------------------


def test_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = shrink(DINOv2ViTB14, tmp_path, monkeypatch)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    hub = tmp_path / "hf" / "hub"
    in_order = [
        chosen,
        cache_directory() / "weights" / "dinov2_vitb14_pretrain.pth",
        tmp_path / "torch" / "hub" / "checkpoints" / "dinov2_vitb14_pretrain.pth",
        hub / "models--facebook--dinov2-base" / "snapshots" / "f9e44c" / "model.safetensors",
        hub / "models--facebook--dinov2-base" / "snapshots" / "f9e44c" / "pytorch_model.bin",
        hub / "models--timm--vit_base_patch14_dinov2.lvd142m" / "snapshots" / "0" / "model.safetensors",
    ]
    weights = random_weights(DINOv2ViTB14.architecture)
    for path in in_order[1:]:
        path.parent.mkdir(parents=True, exist_ok=True)
        layout = "dinov2 transformers" if "facebook" in str(path) else "dinov2 timm"
        tensors = as_named_by(layout, weights)
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    for path in in_order:
        assert make_extractor("dinov2_vitb14", device="cpu").weights_record["source"] == str(path)
        monkeypatch.delenv(DINOv2ViTB14.published.variable, raising=False)
        if path != chosen:
            path.unlink()
    with pytest.raises(WeightsError, match="No weights of dinov2_vitb14"):
        make_extractor("dinov2_vitb14", device="cpu")


@pytest.mark.parametrize("row", ROWS)
def test_without_weights_it_says_what_to_download_and_where_to_put_it(
    row: str, run: Callable[..., Result], tmp_path: Path
) -> None:
    for name in ("reference", "samples"):
        np.savez(tmp_path / f"{name}.npz", pictures(20, 20, 4))
    done = run("compare", tmp_path / "reference.npz", tmp_path / "samples.npz", "--metrics", f"fd@{row}")
    assert done.code == 2
    published: Published = extractor_class(row).published
    for part in (
        f"No weights of {published.name} found",
        "EVALKIT_OFFLINE",
        f"Download {published.url} and save it as {cache_directory() / 'weights' / published.file}",
        f"set {published.variable} to the path",
        *published.repositories,
    ):
        assert part in done.err
    assert "[...]" not in done.err


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    content = shrink(DINOv2ViTB14, tmp_path, monkeypatch).read_bytes()
    monkeypatch.delenv(DINOv2ViTB14.published.variable)
    monkeypatch.delenv("EVALKIT_OFFLINE")
    with serving(content) as (server, url):
        moved = Published(**(vars(DINOv2ViTB14.published) | {"url": url}))
        monkeypatch.setattr(DINOv2ViTB14, "published", moved)
        server.statuses = [404]
        with pytest.raises(WeightsError, match=r"the server answered 404.*Download http"):
            DINOv2ViTB14(device="cpu")
        for _ in range(2):
            extractor = DINOv2ViTB14(device="cpu")
    file = cache_directory() / "weights" / "dinov2_vitb14_pretrain.pth"
    assert extractor.weights_record["source"] == str(file)
    assert file.read_bytes() == content
    assert len(server.ranges) == 2  # the second time it was there


def test_download_of_something_else_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("EVALKIT_OFFLINE")
    with serving(b"<html>sign in</html>") as (_, url):
        moved = Published(**(vars(DINOv2ViTB14.published) | {"url": url}))
        monkeypatch.setattr(DINOv2ViTB14, "published", moved)
        with pytest.raises(WeightsError, match="a web page"):
            DINOv2ViTB14(device="cpu")
    assert not (cache_directory() / "weights" / "dinov2_vitb14_pretrain.pth").exists()


# What is refused ------------------------------------------------------------------------------------


def changed(weights: dict[str, Tensor], what: str) -> dict[str, Any]:
    if what == "lacks":
        del weights["blocks.1.mlp.fc2.bias"]
    elif what == "shape":
        weights["pos_embed"] = weights["pos_embed"][:-1]
    elif what == "integers":
        weights["norm.bias"] = torch.ones(24, dtype=torch.int64)
    elif what == "registers":
        weights["register_tokens"] = torch.ones(1, 4, 24)
    elif what == "deeper":
        weights["blocks.2.norm1.weight"] = torch.ones(24)
    elif what == "nested":
        return {"teacher": weights}
    return weights


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("lacks", r"lacks blocks\.1\.mlp\.fc2\.bias"),
        ("shape", r"the shape of pos_embed is \(1369, 24\), expected \(1370, 24\)"),
        ("integers", r"lacks norm\.bias"),
        ("registers", r"of another network: it also holds register_tokens"),
        ("deeper", r"of another network: it also holds blocks\.2\.norm1\.weight"),
        ("nested", "holds other tensors, or none"),
    ],
)
def test_other_weights_are_refused(
    what: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(DINOv2ViTB14, tmp_path, monkeypatch)
    file = tmp_path / "other.pth"
    torch.save(changed(random_weights(DINOv2ViTB14.architecture), what), file)
    with pytest.raises(WeightsError, match=message) as caught:
        DINOv2ViTB14(file, device="cpu")
    assert str(file) in str(caught.value)
    assert DINOv2ViTB14.published.url in str(caught.value)


class Code:
    """What runs code when a pickle of it is read."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_files_that_are_no_tensors(tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({"cls_token": Code(made)}, tmp_path / "code.pth")
    with pytest.raises(WeightsError, match="never gets to run code"):
        CLIPViTB32(tmp_path / "code.pth", device="cpu")
    assert not made.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))  # as OpenAI publishes CLIP
        torch.jit.save(scripted, tmp_path / "ViT-B-32.pt")
        with pytest.raises(WeightsError, match="TorchScript"):
            CLIPViTB32(tmp_path / "ViT-B-32.pt", device="cpu")
    with pytest.raises(WeightsError, match=r"Weights of clip_vitb32: .*nowhere cannot be read"):
        CLIPViTB32(tmp_path / "nowhere", device="cpu")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(WeightsError, match=r"a text that begins with 'hello'.*clip-vit-base-patch32"):
        CLIPViTB32(tmp_path / "text", device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 0}, "Batch size 0"), ({"device": "warp"}, "Unknown device 'warp'")],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DINOv2ViTB14(**{"device": "cpu"} | options)


# The whole way --------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["dinov2_vitl14", "clip_vitl14_336"])
def test_metrics_on_it(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = extractor_class(row)
    shrink(cls, tmp_path, monkeypatch)
    (output,) = cls.outputs
    sides = pictures(24, 30, 12), pictures(24, 30, 24)[12:]
    extractor = cls(device="cpu")
    metrics = [f"fd@{row}", f"kid@{row}"]
    comparison = evalkit.compare(*sides, metrics=metrics, run=evalkit.Run(device="cpu", store=None))
    a, b = (extractor(side)[output].astype(np.float64) for side in sides)
    cubes = [(x @ y.T / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b))]
    (own, other), between = ((each.sum() - np.trace(each)) / (12 * 11) for each in cubes[:2]), cubes[2].mean()
    assert comparison[metrics[1]] == pytest.approx(own + other - 2 * between, rel=1e-6)
    assert comparison[metrics[0]] >= ((a.mean(0) - b.mean(0)) ** 2).sum() > 0
    record = comparison.extractors[row]
    assert record["preprocess"] == cls.preprocess
    assert record["weights"] == extractor.weights_record


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("row", ROWS)
def test_cuda_features_are_the_cpus(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = extractor_class(row)
    shrink(cls, tmp_path, monkeypatch)
    images = pictures(64, 50, 3)
    (output,) = cls.outputs
    expected = cls(device="cpu")(images)[output]
    np.testing.assert_allclose(cls(device="cuda")(images)[output], expected, rtol=0, atol=1e-4)
