"""The reference's losses, and the choice of timesteps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from goldens import GOLDEN, load

from generation.losses import LossSecondMoment, UniformTimesteps, hybrid_loss, prior_bits
from generation.networks.unet import UNet, UNetSettings
from generation.schedule import make_schedule


def test_losses_equal_the_reference() -> None:
    network = load(UNet, UNetSettings, "unet_class_cond_legacy_attention")
    with np.load(GOLDEN / "training_losses_hybrid.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file.files if key != "config_json"}
    x_0, noise, t, schedule = golden["x_start"], golden["noise"], golden["t"], make_schedule("linear")
    assert t.tolist() == [0, 1, 500, 999]
    x_t = schedule.diffuse(x_0, t, noise)
    found = hybrid_loss(network(x_t, t, golden["y"]), x_0, x_t, noise, t, schedule)
    for ours, name in ((found.total, "loss"), (found.mse, "mse"), (found.vb, "vb")):
        torch.testing.assert_close(ours, golden[name], rtol=1e-5, atol=0)
    torch.testing.assert_close(prior_bits(x_0, schedule), golden["prior_bpd"], rtol=1e-5, atol=0)


def test_the_bound_trains_the_variance_alone() -> None:
    schedule = make_schedule("cosine", 100)
    x_0, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x_0, t = x_0.clamp(-1, 1), torch.tensor([0, 60])
    x_t = schedule.diffuse(x_0, t, noise)
    output = torch.zeros(2, 6, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(hybrid_loss(output, x_0, x_t, noise, t, schedule).vb.sum(), output)
    assert not gradient[:, :3].any()
    assert gradient[:, 3:].any()
    # A tenth of the timesteps: the bound's terms are ten times fewer, and so each weighs a tenth.
    whole = hybrid_loss(output, x_0, x_t, noise, t, make_schedule("cosine", 100))
    assert torch.equal(whole.total, whole.mse + whole.vb)
    without = hybrid_loss(output[:, :3], x_0, x_t, noise, t, schedule)
    assert torch.equal(without.total, whole.mse)
    assert not without.vb.any()


def test_timesteps_follow_the_second_moment_of_their_losses() -> None:
    sampler, uniform_sampler = LossSecondMoment(4), UniformTimesteps(4)
    grid = (np.arange(10_000) + 0.5) / 10_000
    t, weights = sampler.draw(grid)
    assert np.bincount(t).tolist() == [2500] * 4
    assert (weights == 1).all()
    assert np.array_equal(uniform_sampler.draw(grid)[0], t)
    rng = np.random.default_rng(0)
    losses = rng.random((4, 13)) * [[1], [2], [3], [10]]
    for column in range(9):
        sampler.update(np.arange(4), losses[:, column])
    assert (sampler.draw(grid)[1] == 1).all()  # one short of ten
    for column in range(9, 13):
        sampler.update(np.arange(4), losses[:, column])
    root = np.sqrt((losses[:, 3:] ** 2).mean(axis=1))  # the last ten
    expected = 0.999 * root / root.sum() + 0.001 / 4
    t, weights = sampler.draw(grid)
    assert np.bincount(t, minlength=4) / 10_000 == pytest.approx(expected, abs=2e-4)
    assert weights == pytest.approx(1 / (4 * expected[t]), rel=1e-6)
    restored = LossSecondMoment(4)
    restored.restore(sampler.state())
    assert np.array_equal(restored.draw(grid)[1], weights)
