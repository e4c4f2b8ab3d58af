"""A hundred kills at random moments: nothing is lost, little is made again, and the bytes are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_networks


@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path) -> None:
    small_networks.write(tmp_path, "unet", "diffusion")
    small_networks.write(tmp_path, "classifier", "classifier", seed=1)
    script = Path(__file__).parents[1] / "support" / "hundred_kills.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found = json.loads(done.stdout)
    assert sum(job["kills"] for job in found.values()) >= 100
    for job in found.values():
        assert job["codes"] == [0]
        assert job["digests"] == 1
        assert job["alone"] == 0
    # What a kill costs: a batch; of features also the pieces that wait to be written.
    most = {"Sampling": 2, "Extraction": 4 * 512, "Sweep": 2}
    for name, job in found.items():
        assert job["wasted"] <= most[name] * job["kills"], name
