"""Networks that sample together fit together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import small_networks
from sampling_runs import SETTINGS, load, sampled

from evalkit.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_networks_that_do_not_go_together(files: dict[str, Path], tmp_path: Path) -> None:
    for name, changes, message in (
        ("large", {"image_size": 16}, "image size is 16, the model's 8"),
        ("many", {"out_channels": 12}, "number of classes is 12, the model's 10"),
        ("cosine", {"noise_schedule": "cosine"}, "noise schedule is cosine, the model's linear"),
    ):
        other = small_networks.write(tmp_path, name, "classifier", **changes)
        with pytest.raises(InputError, match=message):
            load({**files, name: other}, "unet", name)
    with pytest.raises(InputError, match="no classifier"):
        load(files, "unet", "unconditional")
    with pytest.raises(InputError, match="is a classifier"):
        load(files, "classifier", None)
    with pytest.raises(InputError, match="without a classifier"):
        sampled(SETTINGS, load(files, "unet", None), tmp_path / "run")
    with pytest.raises(InputError, match="evalkit upsample"):
        sampled(replace(SETTINGS, scale=0.0), load(files, "upsampler", None), tmp_path / "run")
    with pytest.raises(InputError, match="A batch of 0"):
        sampled(SETTINGS, load(files), tmp_path / "run", batch_size=0)
    assert not (tmp_path / "run").exists()
