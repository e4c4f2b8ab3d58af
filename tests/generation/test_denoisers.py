"""Denoisers: each type of prediction is the noise that was added, read another way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from evalkit.errors import InputError
from generation.batch import Networks, sample_batch
from generation.checkpoints import Loaded
from generation.denoisers import DENOISERS, EpsDenoiser, PredictionType
from generation.presets import MODELS, ModelPreset
from generation.samplers.ddim import DDIM
from generation.schedule import make_schedule
from generation.settings import Settings

SCHEDULE = make_schedule("cosine", 1000, "20")
GENERATOR = torch.Generator().manual_seed(0)
X_0, EPS = (torch.randn(2, 3, 4, 4, generator=GENERATOR, dtype=torch.float64) for _ in range(2))


def target(kind: PredictionType, step: int) -> Tensor:
    """What a perfect network of that kind says, from the definitions."""
    abar = float(SCHEDULE.alphas_cumprod[step])
    return {"eps": EPS, "x_0": X_0, "v": abar**0.5 * EPS - (1 - abar) ** 0.5 * X_0}[kind]


@pytest.mark.parametrize("step", [0, 7, 19])
@pytest.mark.parametrize("kind", DENOISERS)
def test_a_perfect_prediction_gives_image_and_noise(kind: PredictionType, step: int) -> None:
    told: list[int] = []

    def network(x: Tensor, t: int) -> Tensor:
        told.append(t)
        return target(kind, step)

    found = DENOISERS[kind](network, SCHEDULE)(SCHEDULE.diffuse(X_0, step, EPS), step)
    torch.testing.assert_close(found.x_0, X_0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.eps, EPS, rtol=1e-9, atol=1e-9)
    assert found.log_variance is None
    assert told == [SCHEDULE.timesteps[step]]


@pytest.mark.parametrize("kind", DENOISERS)
def test_a_learned_variance_is_the_second_half(kind: PredictionType) -> None:
    v = torch.rand(X_0.shape, generator=GENERATOR, dtype=torch.float64) * 2 - 1
    denoiser = DENOISERS[kind](lambda x, t: torch.cat([target(kind, 5), v], dim=1), SCHEDULE)
    found = denoiser(SCHEDULE.diffuse(X_0, 5, EPS), 5)
    assert found.log_variance is not None
    assert torch.equal(found.log_variance, SCHEDULE.log_variance(v, 5))
    torch.testing.assert_close(found.x_0, X_0, rtol=1e-9, atol=1e-9)


def test_the_noise_is_passed_on_as_it_is() -> None:
    output = torch.randn(2, 3, 4, 4, generator=GENERATOR)
    x = torch.randn(2, 3, 4, 4, generator=GENERATOR)
    found = EpsDenoiser(lambda x, t: output, SCHEDULE)(x, 3)
    assert torch.equal(found.eps, output)
    assert torch.equal(found.x_0, SCHEDULE.x_0(x, 3, output))


def test_sampling_reads_a_network_as_its_preset_says() -> None:
    """The same output means another image to a model that is said to predict another thing."""
    preset, fields = (
        MODELS["64x64_diffusion"],
        {"image_size": 8, "model_channels": 32, "num_head_channels": 16},
    )
    levels = {"channel_mult": (1, 2), "attention_resolutions": (2,), "num_res_blocks": 1}
    small = replace(preset, network=replace(preset.network, **fields, **levels))  # type: ignore[arg-type]
    network = small.build("cpu").eval().requires_grad_(False)
    labels, images = np.array([3, 5]), {}
    for kind in DENOISERS:
        loaded = Loaded(network=network, preset=replace(small, prediction=kind), digest="", path=None)  # type: ignore[arg-type]
        networks = Networks.prepare(loaded, precision="reference", device=torch.device("cpu"))
        settings = Settings(count=2, sampler=DDIM(), respacing="2")
        images[kind], finite = sample_batch(settings, networks, range(2), labels=labels)
        assert finite.all()
    # Before training the output is zero, and the image that a network of x_0 predicts is grey.
    assert not images["x_0"].any()
    assert not torch.equal(images["eps"], images["v"])


def test_presets_hold_what_is_predicted() -> None:
    preset = replace(MODELS["64x64_diffusion"], prediction="v")
    assert ModelPreset.from_json(preset.to_json()) == preset
    with pytest.raises(InputError, match="prediction is 'score'; expected eps or x_0 or v"):
        ModelPreset.from_json(preset.to_json().replace('"prediction": "v"', '"prediction": "score"'))
    assert {preset.prediction for preset in MODELS.values()} == {"eps"}
