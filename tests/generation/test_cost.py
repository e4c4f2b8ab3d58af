"""The cost of a run, against published counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sampling_runs import SETTINGS

from generation.batch import Networks
from generation.cost import describe_cost, flop, gradient_flop, prediction_flop
from generation.presets import MODELS


def test_cost_is_the_published_one() -> None:
    """Multiply-adds and totals as counted for the published models, to the digits given."""
    for name, giga in (("64x64_diffusion", 110), ("256x256_diffusion", 1120), ("128_512_upsampler", 2505)):
        assert round(prediction_flop(MODELS[name]) / 2e9) == giga
    # The gradient at the image is a forward pass and, without parameters, about another.
    assert gradient_flop(MODELS["64x64_classifier"]) / 2e9 == pytest.approx(2 * 19, rel=0.1)


def test_cost_of_a_run(networks: Networks) -> None:
    prediction, gradient = (
        prediction_flop(networks.diffusion.preset),
        gradient_flop(networks.classifier.preset),
    )  # type: ignore[union-attr]
    assert flop(SETTINGS, networks) == 7 * 4 * (prediction + gradient)
    assert flop(replace(SETTINGS, scale=0.0), networks) == 7 * 4 * prediction
    part = replace(SETTINGS, guidance_timesteps=(300, 700))  # of 0, 333, 666, 999
    assert flop(part, networks) == 7 * (4 * prediction + 2 * gradient)
    assert describe_cost([SETTINGS], networks).startswith("7 samples of 8x8, 4 steps each: ")
    assert describe_cost([SETTINGS, part], networks).startswith("14 samples of 8x8, 4 steps each: ")
