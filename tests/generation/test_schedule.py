"""Schedules against the tables of the reference implementation, and formulas against each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from evalkit.errors import InputError
from generation.schedule import make_schedule, respace

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "generation" / "schedules.npz")
CASES = sorted({key.rsplit("/", 1)[0] for key in GOLDEN.files if key.count("/") == 2})
TABLES = sorted({key.rsplit("/", 1)[1] for key in GOLDEN.files if key.count("/") == 2} - {"timestep_map"})


@pytest.mark.parametrize("case", CASES)
def test_tables_equal_the_reference(case: str) -> None:
    name, respacing = case.split("/")
    schedule = make_schedule(name, 1000, respacing)
    for table in TABLES:
        ours, theirs = getattr(schedule, table), GOLDEN[f"{case}/{table}"]
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=0, err_msg=table)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_no_respacing_is_every_step(name: str) -> None:
    np.testing.assert_array_equal(make_schedule(name, 1000, "").betas, make_schedule(name, 1000).betas)
    schedule = make_schedule(name)
    np.testing.assert_allclose(schedule.betas, GOLDEN[f"{name}/betas"], rtol=1e-12, atol=0)
    assert (schedule.timesteps == np.arange(1000)).all()
    assert len(schedule) == 1000


def test_linear_betas_scale_with_the_number_of_steps() -> None:
    # The same process in fewer steps: it ends with about the same share of the image left.
    long, short = make_schedule("linear", 1000), make_schedule("linear", 500)
    assert short.alphas_cumprod[-1] == pytest.approx(long.alphas_cumprod[-1], rel=0.15)


def test_respacing_keeps_what_the_forward_process_is() -> None:
    whole, part = make_schedule("cosine"), make_schedule("cosine", 1000, "30,20,7")
    np.testing.assert_allclose(
        part.alphas_cumprod, whole.alphas_cumprod[part.timesteps], rtol=1e-10, atol=1e-15
    )


@pytest.mark.parametrize(
    ("respacing", "message"),
    [
        (" ", "not understood"),
        ("9" * 5000, "not understood"),
        ("0", "not understood"),
        ("-5", "not understood"),
        ("2.5", "not understood"),
        ("ddim", "not understood"),
        ("fast27", "not understood"),
        ("10,,10", "not understood"),
        ("1001", "asks for 1001 steps of section 1, which has 1000 of 1000"),
        ("90,300,60,20", "asks for 300 steps of section 2, which has 250 of 1000"),
        ("ddim300", "no whole stride"),
        ("ddim5,5", "no whole stride"),
        ("1", "at least 2"),
        ("ddim1", "at least 2"),
    ],
)
def test_bad_respacing_is_named(respacing: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        respace(respacing, 1000)


def test_unknown_schedule_is_named() -> None:
    with pytest.raises(InputError, match="'sigmoid'"):
        make_schedule("sigmoid")


def test_formulas_invert_each_other_and_batches_equal_scalars() -> None:
    schedule = make_schedule("linear", 1000, "250")
    generator = torch.Generator().manual_seed(0)
    x_0, noise, v = (torch.randn(3, 3, 4, 4, generator=generator) for _ in range(3))
    steps = [0, 100, 249]
    batch = torch.tensor(steps)
    x = schedule.diffuse(x_0, batch, noise)
    torch.testing.assert_close(schedule.x_0(x, batch, noise), x_0, rtol=0, atol=2e-4)  # abar is 4e-5 at 249
    torch.testing.assert_close(schedule.eps(x, batch, x_0), noise, rtol=0, atol=1e-4)
    for row, step in enumerate(steps):
        one = slice(row, row + 1)
        for ours, theirs in [
            (schedule.diffuse(x_0[one], step, noise[one]), x[one]),
            (schedule.posterior_mean(x_0[one], x[one], step), schedule.posterior_mean(x_0, x, batch)[one]),
            (schedule.log_variance(v[one], step), schedule.log_variance(v, batch)[one]),
        ]:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_learned_variance_lies_between_its_bounds() -> None:
    schedule = make_schedule("linear", 1000, "100")
    v = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1)
    for step in (0, 1, 50, 99):
        low, high = schedule.log_variance(v, step).flatten().tolist()
        assert high == pytest.approx(np.log(schedule.betas[step]), rel=1e-6)
        assert low == pytest.approx(np.log(schedule.posterior_variance[max(step, 1)]), rel=1e-6)
