"""What every sampler keeps to, whatever its algorithm: each test runs over every row of SAMPLERS.

A new row is tested here with its default parameters, and with the other values of each parameter that the
type shows: the other choices of a literal, the other truth value, another number in range.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from evalkit.errors import InputError
from generation.denoisers import DENOISERS, BoundNetwork, EpsDenoiser, PredictionType
from generation.noise import Streams
from generation.samplers import SAMPLERS, make_sampler, sampler_class, sampler_record
from generation.samplers.base import Sampler
from generation.schedule import make_schedule

SHAPE = (3, 4, 4)
SCHEDULE = make_schedule("cosine", 1000, "12")
NUMBERS = (0.5, 1, 2, 3, 0, 100)
"""Values to try for a parameter that is a number."""


def variants(name: str) -> list[dict[str, Any]]:
    """The default parameters, and each parameter by itself at other values that the sampler accepts."""
    cls = sampler_class(name)
    types, default = get_type_hints(cls), sampler_record(make_sampler(name))
    found: list[dict[str, Any]] = [{}]
    for field in fields(cls):  # type: ignore[arg-type]
        kind = types[field.name]
        values = get_args(kind) if get_origin(kind) is Literal else (True, False) if kind is bool else NUMBERS
        accepted = [value for value in values if value != default[field.name] and accepts(name, field, value)]
        assert accepted, f"{name}: add a value of {field.name} to this test"
        found += [{field.name: value} for value in accepted]
    return found


def accepts(name: str, field: Any, value: Any) -> bool:
    try:
        make_sampler(name, {field.name: value})
    except InputError:
        return False
    return True


CASES = [(name, parameters) for name in SAMPLERS for parameters in variants(name)]
IDS = [" ".join([name, *(f"{key}={value}" for key, value in each.items())]) for name, each in CASES]
every_case = pytest.mark.parametrize(("name", "parameters"), CASES, ids=IDS)
every_row = pytest.mark.parametrize("name", SAMPLERS)


@cache
def gaussian(kind: PredictionType) -> BoundNetwork:
    """The exact prediction for data of independent normal numbers, which are never clipped."""
    mean, variance = 0.1, 0.02
    table = dict(zip(SCHEDULE.timesteps.tolist(), SCHEDULE.alphas_cumprod.tolist(), strict=True))

    def network(x: Tensor, t: int) -> Tensor:
        abar = table[t]
        eps = math.sqrt(1 - abar) * (x - math.sqrt(abar) * mean) / (abar * variance + 1 - abar)
        x_0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        return {"eps": eps, "x_0": x_0, "v": math.sqrt(abar) * eps - math.sqrt(1 - abar) * x_0}[kind]

    return network


def sample(
    sampler: Sampler, indices: range = range(4), *, kind: PredictionType = "eps", seed: int = 3, **more: Any
) -> Tensor:
    noise = Streams(seed, indices, SHAPE, torch.device("cpu"))
    return sampler(DENOISERS[kind](gaussian(kind), SCHEDULE), noise.start(), noise, **more)


@every_case
def test_shape_type_and_range(name: str, parameters: dict[str, Any]) -> None:
    x = sample(make_sampler(name, parameters))
    assert x.shape == (4, *SHAPE)
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert x.abs().max() <= 1.5
    assert not x.requires_grad


@every_case
def test_double_precision_stays(name: str, parameters: dict[str, Any]) -> None:
    start = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoiser = EpsDenoiser(gaussian("eps"), SCHEDULE)
    assert make_sampler(name, parameters)(denoiser, start, lambda step: start).dtype == torch.float64


@every_case
def test_the_seed_decides(name: str, parameters: dict[str, Any]) -> None:
    sampler = make_sampler(name, parameters)
    assert torch.equal(sample(sampler), sample(sampler))
    assert not torch.equal(sample(sampler), sample(sampler, seed=4))


@every_case
def test_a_sample_does_not_depend_on_the_others_in_its_batch(name: str, parameters: dict[str, Any]) -> None:
    sampler = make_sampler(name, parameters)
    together = sample(sampler, range(5))
    for batch in (range(1), range(1, 4), range(4, 5)):
        torch.testing.assert_close(sample(sampler, batch), together[batch.start : batch.stop], rtol=0, atol=0)


@every_case
def test_the_callback_is_called_once_a_step_down_to_0(name: str, parameters: dict[str, Any]) -> None:
    steps: list[int] = []
    after: list[Tensor] = []

    def callback(step: int, x: Tensor, x_0: Tensor) -> None:
        steps.append(step)
        after.append(x)
        assert x.shape == x_0.shape == (4, *SHAPE)

    result = sample(make_sampler(name, parameters), callback=callback)
    assert steps == list(reversed(range(len(SCHEDULE))))
    assert torch.equal(result, after[-1])
    assert torch.equal(result, sample(make_sampler(name, parameters)))  # which nobody watched


@every_case
def test_no_noise_is_added_at_the_last_step(name: str, parameters: dict[str, Any]) -> None:
    asked: list[int] = []
    start = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))

    def noise(step: int) -> Tensor:
        asked.append(step)
        return torch.zeros_like(start)

    make_sampler(name, parameters)(EpsDenoiser(gaussian("eps"), SCHEDULE), start, noise)
    assert asked in ([], list(reversed(range(1, len(SCHEDULE)))))


@every_case
def test_every_type_of_prediction_gives_the_same_samples(name: str, parameters: dict[str, Any]) -> None:
    sampler = make_sampler(name, parameters)
    expected = sample(sampler)
    assert expected.std() > 0.05
    for kind in DENOISERS:
        torch.testing.assert_close(sample(sampler, kind=kind), expected, rtol=0, atol=1e-4)


@every_case
def test_samples_have_the_mean_of_the_data(name: str, parameters: dict[str, Any]) -> None:
    """The data's mean is 0.1; 400 samples of 48 numbers, whose deviation is at most the data's, 0.14."""
    x = sample(make_sampler(name, parameters), range(400))
    assert float(x.mean()) == pytest.approx(0.1, abs=4 * 0.15 / math.sqrt(x.numel()))


@every_case
def test_guidance_moves_samples_along_the_gradient(name: str, parameters: dict[str, Any]) -> None:
    sampler, seen = make_sampler(name, parameters), []

    def guide(x: Tensor, t: int) -> Tensor | None:
        seen.append(t)
        return torch.full_like(x, 2.0) if t > 200 else None

    assert (sample(sampler, guide=guide) - sample(sampler)).mean() > 0.005
    assert seen == SCHEDULE.timesteps[::-1].tolist()
    assert torch.equal(sample(sampler, guide=lambda x, t: None), sample(sampler))


@every_case
def test_json_both_ways(name: str, parameters: dict[str, Any]) -> None:
    sampler = make_sampler(name, parameters)
    record = json.loads(json.dumps(sampler_record(sampler)))
    assert record == sampler_record(sampler)
    again = make_sampler(record.pop("name"), record)
    assert again == sampler
    assert hash(again) == hash(sampler)
    assert parameters.items() <= record.items()


@every_row
def test_a_row_is_named_as_its_class(name: str) -> None:
    assert sampler_class(name).name == make_sampler(name).name == name
    assert sampler_class(name).__doc__
    assert "arXiv" in str(sampler_class(name).__doc__).splitlines()[0]


@every_row
def test_bad_parameters_are_named(name: str) -> None:
    with pytest.raises(InputError, match=r"The sampler .*'colour' was given"):
        make_sampler(name, {"colour": 3})
    for field in fields(sampler_class(name)):  # type: ignore[arg-type]
        for value in (None, "nonsense", [1], {}, float("nan")):
            with pytest.raises(InputError, match=rf"{name.split('+')[0]}.*{field.name}.*expected"):
                make_sampler(name, {field.name: value})


def test_unknown_samplers_are_refused() -> None:
    with pytest.raises(InputError, match=r"Unknown sampler 'euler'; expected ddpm, ddim"):
        sampler_class("euler")


def test_the_command_line_offers_every_row() -> None:
    from generation.cli.sample import sample as command

    (option,) = (option for option in command.params if option.name == "sampler")
    assert option.metavar == "|".join(SAMPLERS)  # type: ignore[attr-defined]
