"""The precision check: differences of whole runs, and of the networks at the same noisy images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sampling_runs import SETTINGS, images_of, sampled, with_prediction

from generation.batch import Networks
from generation.precision_check import check_precision

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_precision_does_not_differ_from_itself(networks: Networks) -> None:
    found = check_precision(SETTINGS, networks, networks)
    assert (found.mean, found.largest, found.changed) == (0, 0, 0)
    assert [step.timestep for step in found.steps] == [666, 333, 0]
    assert all(step.prediction == step.gradient == step.mean == step.largest == 0 for step in found.steps)


def test_the_precision_check_is_the_difference_of_the_runs(networks: Networks, tmp_path: Path) -> None:
    other = with_prediction(networks, lambda output: output * 1.01)
    found = check_precision(SETTINGS, networks, other)
    paths = [
        sampled(SETTINGS, net, tmp_path / str(i), batch_size=7) for i, net in enumerate((networks, other))
    ]
    levels = np.abs(images_of(paths[0]) - images_of(paths[1]))
    assert found.mean == pytest.approx(levels.mean(), abs=0.05)
    assert found.largest == pytest.approx(levels.max(), abs=1)
    assert all(step.prediction == pytest.approx(0.01, rel=1e-3) for step in found.steps)
    assert all(step.gradient == 0 for step in found.steps)
