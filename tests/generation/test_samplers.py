"""Samplers and guidance: every step of the reference's loops, and data whose exact denoiser is known."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from goldens import GOLDEN, load
from torch import Tensor, nn

from generation.denoisers import BoundNetwork, EpsDenoiser
from generation.guidance import ClassifierGuidance, classifier_gradient
from generation.networks.classifier import Classifier, ClassifierSettings
from generation.networks.unet import UNet, UNetSettings
from generation.pixels import to_uint8
from generation.samplers.base import Sampler
from generation.samplers.ddim import DDIM
from generation.samplers.ddpm import DDPM
from generation.samplers.dpm_solver_pp_2m import DPMSolverPP2M, dynamic_threshold
from generation.schedule import Schedule, make_schedule

LOOPS = sorted(path.stem for path in GOLDEN.glob("loop_*.npz"))


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return load(UNet, UNetSettings, "unet_class_cond_legacy_attention")


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    return load(Classifier, ClassifierSettings, "classifier_attention_pool")


def bound(network: nn.Module, y: Tensor | None) -> Any:
    return lambda x, t: network(x, torch.full((len(x),), t), y)


@pytest.mark.parametrize("loop", LOOPS)
def test_every_step_equals_the_reference(loop: str, unet: nn.Module, classifier: nn.Module) -> None:
    with np.load(GOLDEN / f"{loop}.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file.files if key != "config_json"}
        config = json.loads(str(file["config_json"]))
    schedule = make_schedule(config["noise_schedule"], 1000, config["respacing"])
    guide = ClassifierGuidance(classifier=classifier, y=golden["y"], scale=config["scale"])
    sampler: Sampler = DDPM() if config["kind"] == "ddpm" else DDIM(eta=config["eta"])
    last = len(schedule) - 1
    errors, seen = [], []

    def callback(step: int, x: Tensor, x_0: Tensor) -> None:
        seen.append(x)
        for ours, theirs in ((x, golden["xs"][last - step]), (x_0, golden["pred_xstart"][last - step])):
            errors.append(float((ours - theirs).norm() / theirs.norm()))

    result = sampler(
        EpsDenoiser(bound(unet, golden["y"]), schedule),
        golden["x_T"],
        lambda step: golden["noises"][last - step],
        guide=guide,
        callback=callback,
    )
    assert len(errors) == 2 * len(schedule)
    assert max(errors) < 1e-5
    assert torch.equal(result, seen[-1])


# Data N(MEAN, DEVIATION^2), each number by itself: the best prediction of the noise is linear in x_t, and so
# is the solution of the probability flow. Predictions of x_0 stay within [-1, 1], so nothing is clipped.
MEAN, DEVIATION = 0.1, 0.15


def gaussian_eps(schedule: Schedule, mean: float = MEAN) -> BoundNetwork:
    table = {
        int(t): (a, 1 - a) for t, a in zip(schedule.timesteps, schedule.alphas_cumprod, strict=True)
    }  # abar and sigma^2

    def network(x: Tensor, t: int) -> Tensor:
        abar, variance = table[t]
        return math.sqrt(variance) * (x - math.sqrt(abar) * mean) / (abar * DEVIATION**2 + variance)

    return network


def flow(schedule: Schedule, x: Tensor, step: int, mean: float = MEAN) -> Tensor:
    """Where the probability flow takes x from the first step to ``step``."""
    (a, b), (c, d) = (
        (math.sqrt(abar), math.sqrt(abar * DEVIATION**2 + 1 - abar))
        for abar in (schedule.alphas_cumprod[-1], schedule.alphas_cumprod[step])
    )
    return c * mean + d / b * (x - a * mean)


def error_against_flow(sampler: Any, steps: int) -> float:
    """At the last timestep, from steps that are even in the log signal-to-noise ratio, as theory wants."""
    abar = 1 / (1 + np.exp(-2 * np.linspace(4, -4, steps + 1)))
    schedule = Schedule(betas=1 - abar / np.append(1, abar[:-1]), timesteps=np.arange(steps + 1))
    start = torch.linspace(-3, 3, 64, dtype=torch.float64).view(1, 1, 8, 8)
    seen: dict[int, Tensor] = {}
    sampler(
        EpsDenoiser(gaussian_eps(schedule), schedule),
        start,
        None,
        callback=lambda step, x, _: seen.setdefault(step, x),
    )
    # After step 1 and not 0: the final jump to x_0 has the same error whatever the steps.
    return float((seen[1] - flow(schedule, start, 0)).abs().max())


@pytest.mark.parametrize(("sampler", "order"), [(DDIM(), 1), (DPMSolverPP2M(), 2)])
def test_order_of_convergence(sampler: Any, order: int) -> None:
    errors = [error_against_flow(sampler, steps) for steps in (40, 80, 160, 320)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders == pytest.approx([order] * 3, abs=0.2)


@pytest.mark.parametrize("sampler", [DDIM(), DPMSolverPP2M()])
def test_guidance_by_the_exact_gradient_leads_to_the_class(sampler: Any) -> None:
    """log p(y | x_t) of two Gaussian classes: guided by its gradient, sampling ends in the class."""
    schedule, other = make_schedule("linear", 1000, "200"), -0.2
    start = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 1, 8, 8)
    predict, predict_class = gaussian_eps(schedule), gaussian_eps(schedule, other)
    sigma = dict(zip(map(int, schedule.timesteps), schedule.sqrt_one_minus_alphas_cumprod, strict=True))

    def guide(x: Tensor, t: int) -> Tensor:  # the score of the class less the score of all
        return (predict(x, t) - predict_class(x, t)) / float(sigma[t])

    seen: dict[int, Tensor] = {}
    sampler(
        EpsDenoiser(predict, schedule),
        start,
        None,
        guide=guide,
        callback=lambda step, x, _: seen.setdefault(step, x),
    )
    expected = flow(schedule, start, 0, mean=other)
    torch.testing.assert_close(seen[1], expected, rtol=0, atol=2e-2)
    assert (flow(schedule, start, 0) - expected).abs().min() > 0.2


@pytest.mark.parametrize("learned", [True, False])
def test_ancestral_sampling_has_the_variance_that_it_should(learned: bool) -> None:
    """Mean and variance of linear steps follow in closed form; half a million numbers have them."""
    schedule = make_schedule("linear", 1000, "40")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 1, 500, 500, generator=generator, dtype=torch.float64)
    predict = gaussian_eps(schedule)

    def network(x: Tensor, t: int) -> Tensor:
        eps = predict(x, t)
        return torch.cat([eps, torch.full_like(eps, 0.5)], dim=1) if learned else eps

    result = DDPM()(
        EpsDenoiser(network, schedule),
        start,
        lambda step: torch.randn(start.shape, generator=generator, dtype=start.dtype),
    )
    mean, variance = 0.0, 1.0
    for step in reversed(range(40)):
        abar, beta = schedule.alphas_cumprod[step], schedule.betas[step]
        before = schedule.alphas_cumprod_prev[step]
        gain = math.sqrt(abar) * DEVIATION**2 / (abar * DEVIATION**2 + 1 - abar)  # of x_0 in x
        to_x_0 = math.sqrt(before) * beta / (1 - abar)
        slope = to_x_0 * gain + math.sqrt(abar / before) * (1 - before) / (1 - abar)
        mean = slope * mean + to_x_0 * (1 - gain * math.sqrt(abar)) * MEAN
        posterior = beta * (1 - before) / (1 - abar)
        added = beta**0.75 * posterior**0.25 if learned else beta
        variance = slope**2 * variance + (added if step else 0)
    n = start.numel()
    assert float(result.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / n))
    assert float(result.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n))


def test_static_threshold_clips_and_dynamic_rescales() -> None:
    schedule = make_schedule("linear", 1000, "5")
    start = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    wild = EpsDenoiser(lambda x, t: -3 * torch.ones_like(x), schedule)  # predictions of x_0 far out of range
    assert DPMSolverPP2M()(wild, start, None).abs().max() <= 1
    seen: list[Tensor] = []
    DPMSolverPP2M(thresholding="dynamic")(
        wild,
        start,
        None,
        callback=lambda step, x, x_0: seen.append(x_0),
    )
    assert all(float(x_0.abs().max()) <= 1 for x_0 in seen)
    # Rescaled, not piled up at the bound.
    assert float((seen[0].abs() == 1).float().mean()) < 0.02


def test_dynamic_threshold_against_numpy() -> None:
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * torch.tensor([0.2, 1, 3]).view(
        3, 1, 1, 1
    )
    limits = np.maximum(np.quantile(np.abs(x.numpy()).reshape(3, -1), 0.995, axis=1), 1).reshape(3, 1, 1, 1)
    expected = np.clip(x.numpy(), -limits, limits) / limits
    np.testing.assert_allclose(dynamic_threshold(x).numpy(), expected, rtol=1e-6)
    assert torch.equal(dynamic_threshold(x)[0], x[0])


def test_seeded_gradient_equals_that_of_the_formula(classifier: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 3, 16, 16, generator=generator)
    t, y = torch.tensor([0, 10, 500, 900, 999]), torch.tensor([0, 9, 3, 3, 7])
    leaf = x.clone().requires_grad_()
    log_p = torch.log_softmax(classifier(leaf, t), dim=-1)[torch.arange(5), y].sum()
    (expected,) = torch.autograd.grad(2.5 * log_p, leaf)
    ours = classifier_gradient(classifier, x, t, y, 2.5)
    assert float((ours - expected).norm() / expected.norm()) < 1e-6
    # A batch is images side by side: each has its own gradient.
    alone = classifier_gradient(classifier, x[1:2], t[1:2], y[1:2], 2.5)
    assert float((ours[1:2] - alone).norm() / alone.norm()) < 1e-5


def test_gradient_points_uphill_and_leaves_no_trace(classifier: nn.Module) -> None:
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([100, 100]), torch.tensor([1, 2])

    def log_p(images: Tensor) -> float:
        return float(torch.log_softmax(classifier(images, t), dim=-1)[torch.arange(2), y].sum())

    with torch.no_grad():
        gradient = classifier_gradient(classifier, x, t, y, 1.0)
        assert log_p(x + 0.01 * gradient / gradient.norm()) > log_p(x)
    assert not gradient.requires_grad
    assert not x.requires_grad
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_classifier_does_not_run_where_it_has_no_effect() -> None:
    seen: list[int] = []

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return x.flatten(1)[:, :4]

    x, y = torch.zeros(2, 3, 2, 2), torch.tensor([0, 1])
    schedule = make_schedule("linear", 1000, "ddim10")
    for scale, timesteps, expected in [
        (0.0, None, []),
        (1.0, None, [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]),
        (1.0, (200, 500), [400, 300, 200]),
    ]:
        seen.clear()
        guide = ClassifierGuidance(classifier=classifier, y=y, scale=scale, timesteps=timesteps)
        DDIM()(EpsDenoiser(lambda x, t: torch.zeros_like(x), schedule), x, None, guide=guide)
        assert seen == expected


def test_uint8_truncates_and_moves_channels_last() -> None:
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.003, 0.999, 1.0, 7.0])
    pixels = to_uint8(values.repeat(3, 1).view(1, 3, 2, 4))
    assert pixels.shape == (1, 2, 4, 3)
    assert pixels.dtype == np.uint8
    assert pixels[0, :, :, 1].flatten().tolist() == [0, 0, 63, 127, 127, 254, 255, 255]
    assert pixels.flags.c_contiguous
