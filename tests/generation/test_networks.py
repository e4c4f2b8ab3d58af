"""The ADM networks against the reference implementation's outputs and against the formulas."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evalkit.errors import InputError
from generation.batch import Networks
from generation.checkpoints import Loaded
from generation.networks import precision as precisions
from generation.networks.classifier import Classifier, ClassifierSettings
from generation.networks.layers import AttentionBlock, AttentionPool, GroupNorm, attend, timestep_embedding
from generation.networks.precision import PRECISIONS, arithmetic, default_precision, prepare
from generation.networks.unet import Trunk, UNet, UNetSettings
from generation.networks.upsampler import Upsampler
from generation.presets import MODELS

GOLDEN = Path(__file__).parents[1] / "golden" / "generation"
GOLDENS: dict[str, Any] = {
    "unet_class_cond_legacy_attention": (UNet, UNetSettings),
    "unet_uncond_new_attention_no_updown": (UNet, UNetSettings),
    "classifier_attention_pool": (Classifier, ClassifierSettings),
    "super_resolution_unet": (Upsampler, UNetSettings),
}
SMALL = {
    "image_size": 8,
    "model_channels": 32,
    "out_channels": 10,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_head_channels": 16,
}


def golden(name: str) -> tuple[Trunk, dict[str, Tensor]]:
    """The network of a golden file, in eval mode, and its other arrays."""
    network, settings = GOLDENS[name]
    with np.load(GOLDEN / f"{name}.npz") as file:
        built = network(settings(**json.loads(str(file["config_json"]))))
        state = {
            key.removeprefix("param/"): torch.from_numpy(file[key]) for key in file.files if "param/" in key
        }
        others = [key for key in file.files if "param/" not in key and key != "config_json"]
        arrays = {key: torch.from_numpy(file[key]) for key in others}
    assert list(built.state_dict()) == list(state)
    built.load_state_dict(state)
    return built.eval(), arrays


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def randomised(network: nn.Module) -> nn.Module:
    """No parameter is left at zero, so that every path shows in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return network


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name: str, layout: torch.memory_format) -> None:
    network, arrays = golden(name)
    network.to(memory_format=layout)
    expected = arrays.pop("output")
    with torch.inference_mode():
        output = network(arrays.pop("x").contiguous(memory_format=layout), arrays.pop("t"), **arrays)
    assert output.dtype == torch.float32
    assert output.shape == expected.shape
    assert relative_error(output, expected) < 1e-5


def test_gradient_of_the_classifier() -> None:
    """In eval mode it takes a repeatable way through the attention: same logits, and their true slope."""
    network, arrays = golden("classifier_attention_pool")
    x, t = arrays["x"].requires_grad_(), arrays["t"]
    logits = network(x, t)
    assert relative_error(logits, arrays["output"]) < 1e-5
    (gradient,) = torch.autograd.grad(logits.log_softmax(1)[:, 3].sum(), x)
    (fused,) = torch.autograd.grad(network.train()(x, t).log_softmax(1)[:, 3].sum(), x)
    assert relative_error(gradient, fused) < 1e-5
    step = 0.05 * gradient / gradient.norm()
    with torch.inference_mode():
        ahead, behind = (network(x + sign * step, t).log_softmax(1)[:, 3].sum() for sign in (1, -1))
    assert float(ahead - behind) == pytest.approx(0.1 * float(gradient.norm()), rel=1e-3)


@pytest.mark.parametrize("repeatable", [False, True])
@pytest.mark.parametrize("new_order", [False, True])
def test_attention_is_the_plain_formula(new_order: bool, repeatable: bool) -> None:
    heads, channels, side = 2, 64, 3
    block = randomised(AttentionBlock(channels, heads, new_order=new_order)).eval()
    x = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))
    output = block(x.requires_grad_(repeatable)).detach().numpy()
    state = {key: value.double().numpy() for key, value in block.state_dict().items()}

    flat = x.detach().double().numpy().reshape(2, channels, -1)
    grouped = flat.reshape(2, 32, -1)
    normal = (grouped - grouped.mean(2, keepdims=True)) / np.sqrt(grouped.var(2, keepdims=True) + 1e-5)
    normal = normal.reshape(flat.shape) * state["norm.weight"][:, None] + state["norm.bias"][:, None]
    qkv = np.einsum("oc,bcn->bon", state["qkv.weight"][:, :, 0], normal) + state["qkv.bias"][:, None]
    attended = np.empty_like(flat)
    width = channels // heads
    for head in range(heads):
        starts = [(part * heads + head if new_order else head * 3 + part) * width for part in range(3)]
        q, k, v = (qkv[:, start : start + width] for start in starts)
        scores = np.exp(np.einsum("bcm,bcn->bmn", q, k) / math.sqrt(width))
        weights = scores / scores.sum(2, keepdims=True)
        attended[:, head * width : (head + 1) * width] = np.einsum("bmn,bcn->bcm", weights, v)
    projected = np.einsum("oc,bcn->bon", state["proj_out.weight"][:, :, 0], attended)
    expected = flat + projected + state["proj_out.bias"][:, None]
    np.testing.assert_allclose(output.reshape(flat.shape), expected, rtol=1e-5, atol=1e-5)


def test_attention_pool_asks_for_the_mean_token() -> None:
    pool = randomised(AttentionPool(3, 64, 16, 5)).eval()
    x = torch.randn(2, 64, 3, 3, generator=torch.Generator().manual_seed(1))
    tokens = torch.cat([x.mean((2, 3))[:, :, None], x.flatten(2)], dim=2) + pool.positional_embedding
    qkv = nn.functional.conv1d(tokens, pool.qkv_proj.weight, pool.qkv_proj.bias)
    q, k, v = (part.reshape(2, 4, 16, 10) for part in qkv.chunk(3, dim=1))
    weights = torch.einsum("bhcm,bhcn->bhmn", q, k).div(4).softmax(-1)
    attended = torch.einsum("bhmn,bhcn->bhcm", weights, v).reshape(2, 64, 10)
    every_token = nn.functional.conv1d(attended, pool.c_proj.weight, pool.c_proj.bias)
    assert relative_error(pool(x), every_token[:, :, 0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_repeatable_attention_keeps_to_the_range_of_half_precision(dtype: torch.dtype) -> None:
    q = torch.full((1, 1, 4, 64), 60.0, dtype=dtype)  # q k^T is 230,400 and overflows float16
    v = torch.arange(4.0).to(dtype).reshape(1, 1, 4, 1).expand(-1, -1, -1, 64)
    for repeatable in (False, True):
        assert torch.equal(attend(q, q, v, repeatable=repeatable), torch.full_like(q, 1.5))


def test_timestep_embedding() -> None:
    t = torch.tensor([0.0, 1.0, 999.0])
    angles = np.outer([0.0, 1.0, 999.0], 10_000.0 ** (-np.arange(8) / 8))
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(timestep_embedding(t, 16).numpy(), expected, atol=2e-4)
    assert torch.equal(timestep_embedding(t.long(), 16), timestep_embedding(t, 16))


def test_group_norm_of_half_precision_is_float32_inside() -> None:
    # Sums of squares of 300 leave the range of float16, and the spread is below bfloat16's resolution there.
    x = (300 + torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0))).half()
    normal = GroupNorm(64)(x).detach()
    assert normal.dtype == torch.float16
    expected = nn.functional.group_norm(x.double(), 32, eps=1e-5)
    assert float((normal.double() - expected).abs().max()) < 3e-3


def test_pooling_by_means() -> None:
    """The poolings without a golden value, from the feature maps that the published layout names."""
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 700])
    for pool, keys in (("adaptive", [0, 3]), ("spatial", [0, 2]), ("spatial_v2", [0, 1, 3])):
        network = randomised(Classifier(ClassifierSettings(**SMALL, pool=pool))).eval()
        assert sorted({int(key.split(".")[1]) for key in network.state_dict() if key[:4] == "out."}) == keys
        with torch.inference_mode():
            logits = network(x, t)
            maps = network.descend(x, network.embed(t, None))
            weights = {key: value for key, value in network.state_dict().items() if key[:4] == "out."}
            if pool == "adaptive":
                normal = nn.functional.group_norm(
                    maps[-1], 32, weights["out.0.weight"], weights["out.0.bias"]
                )
                pooled = nn.functional.silu(normal).mean((2, 3))
                expected = pooled @ weights["out.3.weight"][:, :, 0, 0].T + weights["out.3.bias"]
            else:
                means = torch.cat([output.mean((2, 3)) for output in maps], dim=1)
                hidden = means @ weights["out.0.weight"].T + weights["out.0.bias"]
                if pool == "spatial":
                    hidden = hidden.relu()
                else:
                    normal = nn.functional.group_norm(
                        hidden, 32, weights["out.1.weight"], weights["out.1.bias"]
                    )
                    hidden = nn.functional.silu(normal)
                last = "out.2" if pool == "spatial" else "out.3"
                expected = hidden @ weights[f"{last}.weight"].T + weights[f"{last}.bias"]
        assert logits.shape == (2, 10)
        assert relative_error(logits, expected) < 1e-5


def test_training_reaches_every_parameter_and_drops() -> None:
    settings = UNetSettings(**{**SMALL, "out_channels": 6}, num_classes=4, dropout=0.5)
    network = randomised(UNet(settings))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([3, 700]), torch.tensor([0, 3])
    network(x, t, y).square().sum().backward()
    silent = [name for name, value in network.named_parameters() if not value.grad.abs().sum() > 0]
    assert silent == []
    with torch.no_grad():
        assert not torch.equal(network(x, t, y), network(x, t, y))
        network.eval()
        assert torch.equal(network(x, t, y), network(x, t, y))


def test_before_training_the_network_predicts_zero() -> None:
    network = UNet(UNetSettings(**SMALL))
    assert not network(torch.randn(1, 3, 8, 8), torch.tensor([5])).any()


def test_bad_input() -> None:
    x, t = torch.zeros(1, 3, 8, 8), torch.zeros(1)
    unconditional, conditional = UNet(UNetSettings(**SMALL)), UNet(UNetSettings(**SMALL, num_classes=4))
    with pytest.raises(InputError, match="unconditional"):
        unconditional(x, t, torch.tensor([1]))
    with pytest.raises(InputError, match="conditioned on 4"):
        conditional(x, t)
    with pytest.raises(InputError, match="Unknown pooling 'mean'"):
        Classifier(ClassifierSettings(**SMALL, pool="mean"))
    with pytest.raises(InputError, match="num_head_channels"):
        Classifier(ClassifierSettings(**{**SMALL, "num_head_channels": None}))


@pytest.mark.parametrize("name", GOLDENS)
def test_precisions_on_the_cpu(name: str) -> None:
    """Each against the golden output: float32 to its rounding, the others to theirs."""
    bounds = {"reference": (0.0, 1e-5), "published": (3e-4, 5e-3), "fast": (2e-3, 3e-2)}
    if name == "classifier_attention_pool":
        bounds["published"] = bounds["reference"]
    if not torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported():
        bounds["fast"] = bounds["reference"]
    for precision, (least, most) in bounds.items():
        network, arrays = golden(name)
        expected = arrays.pop("output")
        prepared = prepare(network, precision, "cpu")
        with arithmetic(precision), torch.no_grad():
            output = prepared(**arrays)
            assert torch.equal(prepared(**arrays), output)
        assert output.dtype == torch.float32
        assert least <= relative_error(output, expected) < most, (precision, prepared.description)


def test_only_the_convolutions_of_the_blocks_are_rounded() -> None:
    unet, classifier = golden("unet_class_cond_legacy_attention")[0], golden("classifier_attention_pool")[0]
    types = {
        ("reference", unet): torch.float32,
        ("published", unet): torch.float16,
        ("published", classifier): torch.float32,
        ("fast", unet): torch.float16,
        ("fast", classifier): torch.bfloat16,
    }
    for (precision, network), dtype in types.items():
        parameters = dict(prepare(copy.deepcopy(network), precision, "meta").network.named_parameters())
        convolutions = {name.rpartition(".")[0] for name, value in parameters.items() if value.ndim > 2}
        for name, value in parameters.items():
            inside = name.startswith(("input_blocks.", "middle_block.", "output_blocks."))
            rounded = inside and name.rpartition(".")[0] in convolutions
            assert value.dtype == (dtype if rounded else torch.float32), (precision, name)


def test_a_model_published_in_float32_never_runs_in_float16() -> None:
    for precision, dtype in (("published", torch.float32), ("fast", torch.bfloat16)):
        prepared = prepare(golden("unet_class_cond_legacy_attention")[0], precision, "meta", "float32")
        assert prepared.network.dtype == dtype
        preset = replace(MODELS["512x512_diffusion"], network=UNetSettings(**SMALL))
        loaded = Loaded(network=preset.build(), preset=preset, digest="", path=Path("x"))
        networks = Networks.prepare(loaded, precision=precision, device=torch.device("meta"))
        assert networks.predict.network.dtype == dtype


def test_networks_and_their_gradients_compile_in_one_graph() -> None:
    unet, arrays = golden("unet_class_cond_legacy_attention")
    inputs = arrays["x"], arrays["t"], arrays["y"]
    compiled = torch.compile(unet, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        assert relative_error(compiled(*inputs), arrays["output"]) < 1e-5
    upsampler, arrays = golden("super_resolution_unet")
    expected = arrays.pop("output")
    compiled = torch.compile(upsampler, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        assert relative_error(compiled(**arrays), expected) < 1e-5
    classifier, arrays = golden("classifier_attention_pool")
    classifier.requires_grad_(False)
    x = arrays["x"].requires_grad_()
    gradients = [
        torch.autograd.grad(network(x, arrays["t"]).logsumexp(1).sum(), x)[0]
        for network in (
            classifier,
            torch.compile(classifier, fullgraph=True, dynamic=False, backend="aot_eager"),
        )
    ]
    assert relative_error(gradients[1], gradients[0]) < 1e-5


def test_arithmetic_is_put_back() -> None:
    def flags() -> tuple[bool, ...]:
        cudnn = torch.backends.cudnn
        return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic

    before = flags()
    for precision in PRECISIONS:
        with contextlib.suppress(KeyError), arithmetic(precision):
            assert flags() == (precision == "fast", precision == "fast", True)
            raise KeyError
        assert flags() == before


def test_the_default_on_a_gpu_is_not_the_slowest() -> None:
    defaults = {
        device: default_precision(torch.device(device)) for device in ("cpu", "cuda", "cuda:1", "mps")
    }
    assert defaults == {"cpu": "reference", "cuda": "published", "cuda:1": "published", "mps": "reference"}


def test_unknown_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    network = UNet(UNetSettings(**SMALL))
    with pytest.raises(InputError, match=r"'turbo'.*published"):
        prepare(network, "turbo", "cpu")
    with pytest.raises(InputError, match="'turbo'"), arithmetic("turbo"):
        pass
    monkeypatch.setattr(precisions, "has_triton", lambda device: False)
    with pytest.raises(InputError, match=r"Triton.*--precision published"):
        prepare(network, "fast", "cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_channels": 48}, "level 0 has 48 channels"),
        ({"channel_mult": (1, 1.25)}, "level 1 has 40 channels"),
        ({"num_head_channels": 48}, "64 channels.*heads of 48"),
        ({"num_head_channels": None, "num_heads": 5}, "64 channels.*5 heads"),
        ({"image_size": 9}, "images of 9 pixels cannot be halved 1 times"),
        ({"channel_mult": ()}, "no levels"),
    ],
)
def test_settings_that_no_network_has(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        UNetSettings(**{**SMALL, **change})


def test_prepare_forgets_the_kernels_of_a_precision_before() -> None:
    network = UNet(UNetSettings(**SMALL)).eval().requires_grad_(False)
    network.kernels = object()
    prepare(network, "reference", "cpu")
    assert network.kernels is None


def test_a_gradient_through_a_unet_takes_the_modules() -> None:
    """Its kernels have no backward pass."""
    network = randomised(UNet(UNetSettings(**SMALL)).eval().requires_grad_(False))
    x, t = torch.randn(2, 3, 8, 8, requires_grad=True), torch.tensor([3, 700])
    expected = network(x, t)
    network.kernels = object()
    found = network(x, t)
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.any()
